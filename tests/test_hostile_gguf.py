"""GGUF files that mean harm: refused in a line, soon, in little memory."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import model_config
from hostile import refused, survives

from bloomjax.data.tokenizer import train_tokenizer
from bloomjax.formats.gguf import GGUFReader
from bloomjax.formats.gguf_file import KINDS, GGUFFile, header
from bloomjax.formats.gguf_writer import GGUFWriter
from bloomjax.formats.names import ROWS
from bloomjax.formats.tensors import order

CONFIG = model_config(layers=1, width=32, heads=2, vocab_size=300)
HUGE = 1 << 62


def good(path: Path) -> bytes:
    """A whole little BLOOM in Q4_0, with its tokenizer."""
    vocabulary = path.with_name("tokenizer.json")
    train_tokenizer(["the cat and the hat, the cat, the hat."], 280, vocabulary)
    writer = GGUFWriter(
        path,
        CONFIG,
        "q4_0",
        tokenizer={"tokenizer.json": vocabulary.read_bytes()},
        context_length=2048,
        name="good",
        origin={},
    )
    for row, layer in order(CONFIG):
        writer.write(row, layer, 0, np.ones(row.shape(CONFIG.sizes), np.float32))
    writer.finish("0" * 64)
    GGUFReader(path).tokenizer()
    return path.read_bytes()


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pair(key: str | bytes, number: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", number) + value


def tensor(name: str, shape: tuple[int, ...] = (8,), number: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + dimensions + struct.pack("<IQ", number, offset)


def file(
    pairs: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    *,
    counts: tuple[int, int] | None = None,
    magic: bytes = b"GGUF",
    version: int = 3,
    data: int = 4096,
) -> bytes:
    pairs, tensors = pairs or [], tensors or []
    n_tensors, n_pairs = counts or (len(tensors), len(pairs))
    start = magic + struct.pack("<IQQ", version, n_tensors, n_pairs)
    body = start + b"".join(pairs) + b"".join(tensors)
    return body + bytes(-len(body) % 32 + data)


def array(number: int, count: int, elements: bytes = b"") -> bytes:
    return struct.pack("<IQ", number, count) + elements


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "4 bytes"),
    "another kind of file": (file(magic=b"PK\3\4"), "GGUF file"),
    "the other byte order": (file(version=3 << 24), "little-endian"),
    "version 1": (file(version=1), "version"),
    "tensors without end": (file(counts=(HUGE, 0)), "tensors"),
    "more tensors than bytes": (file(counts=(65_000, 0), data=0), "printed"),
    "pairs without end": (file(counts=(0, 2**64 - 1)), "pairs"),
    "a string without end": (file([pair("a", 8, struct.pack("<Q", 2**64 - 1))]), "1048576 bytes"),
    "a key without end": (file([struct.pack("<Q", 1 << 40)]), "65536 bytes"),
    "a key of several lines": (file([pair("a\nb", 4, bytes(4))]), "printed"),
    "a key that is no UTF-8": (file([pair(b"\xff\xfe", 4, bytes(4))]), "UTF-8"),
    "a key twice": (file([pair("a", 4, bytes(4))] * 2), "twice"),
    "an array of numbers without end": (file([pair("a", 9, array(4, HUGE))]), "bytes"),
    "an array whose size wraps": (file([pair("a", 9, array(10, 1 << 61))]), "bytes"),
    "an array of strings without end": (file([pair("a", 9, array(8, HUGE))]), "1048576 strings"),
    "many arrays of strings": (
        file([pair(f"{i}", 9, array(8, 600_000, bytes(8 * 600_000))) for i in range(2)]),
        "1048576 strings",
    ),
    "a long array": (file([pair("a", 9, array(10, 5 << 20))], data=41 << 20), "32 MiB"),
    "a string in an array without end": (
        file([pair("a", 9, array(8, 2, string("a") + struct.pack("<Q", 1 << 50)))]),
        "1048576 bytes",
    ),
    "strings that end too early": (file([pair("a", 9, array(8, 9, string("a")))], data=0), "bytes"),
    "arrays in arrays": (file([pair("a", 9, array(9, 1) * 5000)]), "type 9"),
    "an unknown type of value": (file([pair("a", 13, bytes(8))]), "type 13"),
    "an alignment of zero": (
        file([pair("general.alignment", 4, struct.pack("<I", 0))], [tensor("t")]),
        "power of two",
    ),
    "an alignment of 24": (
        file([pair("general.alignment", 4, struct.pack("<I", 24))], [tensor("t")]),
        "power of two",
    ),
    "an alignment of 2 GiB": (
        file([pair("general.alignment", 4, struct.pack("<I", 1 << 31))], [tensor("t")]),
        "power of two",
    ),
    "an alignment in words": (file([pair("general.alignment", 8, string("32"))]), "alignment"),
    "a tensor twice": (file([], [tensor("t"), tensor("t", offset=32)]), "twice"),
    "a tensor's name too long": (file([], [tensor("t" * 64)]), "63 bytes"),
    "a tensor of no dimensions": (file([], [tensor("t", ())]), "dimensions"),
    "a tensor of a thousand dimensions": (file([], [tensor("t", (1,) * 1000)]), "dimensions"),
    "an empty tensor": (file([], [tensor("t", (8, 0))]), "blocks"),
    "dimensions whose product wraps": (file([], [tensor("t", (1 << 32, 1 << 32, 8))]), "blocks"),
    "a larger tensor than the file": (file([], [tensor("t", (1 << 40,))]), "within"),
    "half a block": (file([], [tensor("t", (48, 2), 2)]), "blocks"),
    "an unknown type of tensor": (file([], [tensor("t", (256, 2), 4000)]), "Q6_K"),
    "an offset that wraps": (file([], [tensor("t", offset=2**64 - 32)]), "within"),
    "an offset that is not aligned": (file([], [tensor("t", offset=4)]), "aligned"),
    "overlapping tensors": (file([], [tensor("t"), tensor("u", (64,))]), "overlapping"),
    "the same place twice": (file([], [tensor("t"), tensor("u")]), "overlapping"),
    "cut short": (file([], [tensor("t", (8,))], data=31), "within"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_containers(tmp_path: Path, case: str) -> None:
    data, part = MALFORMED[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    refused(lambda: GGUFFile(path), part, "m.gguf")


VALUES: dict[str, tuple[int, Any]] = {
    "general.architecture": (8, "bloom"),
    "bloom.embedding_length": (4, 32),
    "bloom.feed_forward_length": (4, 128),
    "bloom.block_count": (4, 1),
    "bloom.attention.head_count": (4, 2),
    "bloom.attention.head_count_kv": (4, 2),
    "bloom.attention.layer_norm_epsilon": (6, 1e-5),
}


def without(key: str) -> dict[str, tuple[int, Any]]:
    return {k: v for k, v in VALUES.items() if k != key}


MODELS: dict[str, tuple[dict[str, tuple[int, Any]], str]] = {
    "no architecture": (without("general.architecture"), "general.architecture"),
    "another architecture": (VALUES | {"general.architecture": (8, "x\n" * 500)}, "bloom"),
    "a part of a model": (VALUES | {"split.count": (2, 3)}, "one of 3 parts"),
    "no width": (without("bloom.embedding_length"), "embedding_length"),
    "a width in words": (VALUES | {"bloom.embedding_length": (8, "32")}, "of type int"),
    "a list of widths": (VALUES | {"bloom.embedding_length": (4, [32] * 9)}, "of type int"),
    "no heads": (VALUES | {"bloom.attention.head_count": (4, 0)}, "heads"),
    "heads that do not divide": (VALUES | {"bloom.attention.head_count": (4, 5)}, "heads"),
    "layers without end": (VALUES | {"bloom.block_count": (10, 10**9)}, "layers"),
    "layers below none": (VALUES | {"bloom.block_count": (11, -1)}, "layers"),
    "a width without end": (VALUES | {"bloom.embedding_length": (10, 1 << 60)}, "width"),
    "epsilon in whole numbers": (VALUES | {"bloom.attention.layer_norm_epsilon": (4, 1)}, "float"),
    "an epsilon that is no number": (
        VALUES | {"bloom.attention.layer_norm_epsilon": (6, float("nan"))},
        "epsilon",
    ),
    "fewer heads of keys": (VALUES | {"bloom.attention.head_count_kv": (4, 1)}, "head_count_kv"),
    "another ffn": (VALUES | {"bloom.feed_forward_length": (4, 64)}, "feed_forward_length"),
}


@pytest.mark.parametrize("case", MODELS)
def test_malformed_models(tmp_path: Path, case: str) -> None:
    values, part = MODELS[case]
    path = tmp_path / "m.gguf"
    data, _ = header(values, [("token_embd.weight", KINDS["F32"], (300, 32))])
    path.write_bytes(data + bytes(300 * 32 * 4))
    refused(lambda: GGUFReader(path), part, "m.gguf")


Layout = list[tuple[str, Any, tuple[int, ...]]]


def rename(name: str) -> Callable[[Layout], Layout]:
    return lambda layout: [(name, *layout[0][1:]), *layout[1:]]


LAYOUTS: dict[str, tuple[Callable[[Layout], Layout], str]] = {
    "no embedding": (lambda layout: layout[1:], "vocabulary"),
    "a tensor missing": (lambda layout: layout[:-1], "output_norm.bias is missing"),
    "a path as a name": (rename("../../etc/passwd"), "vocabulary"),
    "a path beside the names": (
        lambda layout: [*layout, ("../../etc/passwd", KINDS["F32"], (8,))],
        "../../etc/passwd is unknown",
    ),
    "a thousand more": (
        lambda layout: [*layout, *((f"{i}" * 12, KINDS["F32"], (1,)) for i in range(1000, 2000))],
        "and 992 more",
    ),
    "another shape": (
        lambda layout: [
            (name, kind, (32, 96)) if shape == (96, 32) else (name, kind, shape)
            for name, kind, shape in layout
        ],
        "is [32, 96], not [96, 32]",
    ),
    "quantised biases": (
        lambda layout: [
            (name, KINDS["Q8_0"], shape) if len(shape) == 1 else (name, kind, shape)
            for name, kind, shape in layout
        ],
        "not quantised",
    ),
    "a head of its own": (
        lambda layout: [*layout, ("output.weight", KINDS["F32"], (300, 32))],
        "tied",
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_malformed_sets_of_tensors(tmp_path: Path, case: str) -> None:
    change, part = LAYOUTS[case]
    layout = [(r.gguf.format(i), KINDS["F32"], r.shape(CONFIG.sizes)) for r, i in order(CONFIG)]
    data, tensors = header(VALUES, change(layout))
    end = max(t.offset + t.nbytes for t in tensors.values())
    path = tmp_path / "m.gguf"
    bits = np.random.default_rng(0).integers(0, 120, end - len(data)).astype(np.uint8)
    path.write_bytes(data + bits.tobytes())
    refused(lambda: GGUFReader(path), part, "m.gguf")


TOKENS: dict[str, tuple[int, Any]] = {
    "tokenizer.ggml.model": (8, "gpt2"),
    "tokenizer.ggml.tokens": (8, ["<unk>", "<s>", "</s>", "<pad>", "a", "b", "ab"]),
    "tokenizer.ggml.token_type": (5, [3, 3, 3, 3, 1, 1, 1]),
    "tokenizer.ggml.merges": (8, ["a b"]),
}
TOKENIZERS: dict[str, tuple[dict[str, tuple[int, Any]], str]] = {
    "another model": ({"tokenizer.ggml.model": (8, "llama\n")}, "BLOOM's tokenizer"),
    "another pre-tokenizer": ({"tokenizer.ggml.pre": (8, "qwen2" * 99)}, "BLOOM's tokenizer"),
    "tokens as numbers": ({"tokenizer.ggml.tokens": (5, [1, 2])}, "array of strings"),
    "tokens as one string": ({"tokenizer.ggml.tokens": (8, "abc")}, "of type Array"),
    "types as strings": ({"tokenizer.ggml.token_type": (8, ["a"] * 7)}, "array of numbers"),
    "too few types": ({"tokenizer.ggml.token_type": (5, [1])}, "a type for each"),
    "a token twice": ({"tokenizer.ggml.tokens": (8, [*"abcdef", "a"])}, "different tokens"),
    "more tokens than rows": (
        {
            "tokenizer.ggml.tokens": (8, [f"{i}" for i in range(301)]),
            "tokenizer.ggml.token_type": (5, [1] * 301),
        },
        "at most 300",
    ),
    "merges of three": ({"tokenizer.ggml.merges": (8, ["a b c"])}, "merges of two"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_malformed_tokenizers(tmp_path: Path, case: str) -> None:
    change, part = TOKENIZERS[case]
    layout = [(r.gguf.format(i), KINDS["F32"], r.shape(CONFIG.sizes)) for r, i in order(CONFIG)]
    data, tensors = header(VALUES | TOKENS | change, layout)
    path = tmp_path / "m.gguf"
    path.write_bytes(data + bytes(max(t.offset + t.nbytes for t in tensors.values()) - len(data)))
    reader = GGUFReader(path)
    refused(reader.tokenizer, part, "m.gguf")


def test_tokens_that_are_no_utf8(tmp_path: Path) -> None:
    data = good(tmp_path / "m.gguf")
    assert data.count(string("Ġthe")) == 1
    (tmp_path / "m.gguf").write_bytes(data.replace(string("Ġthe"), string(b"\xff\xfethe")[:13]))
    refused(GGUFReader(tmp_path / "m.gguf").tokenizer, "UTF-8", "m.gguf")


def test_a_file_that_shrank_after_it_was_opened(tmp_path: Path) -> None:
    data = good(tmp_path / "m.gguf")
    reader = GGUFReader(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(data[: len(data) // 2])
    refused(lambda: reader.read(ROWS["ln_b"], 0, 0, 32), "cut short")


def test_not_a_file(tmp_path: Path) -> None:
    refused(lambda: GGUFReader(tmp_path), "GGUF file")
    refused(lambda: GGUFReader(tmp_path / "none"), "No such file")


def test_a_header_as_large_as_may_be(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    pairs = [pair("a", 9, array(8, 1 << 20, bytes(8 << 20))), pair("b", 9, array(10, 3 << 20))]
    path.write_bytes(file([*pairs], [], data=0) + bytes(24 << 20))
    refused(lambda: GGUFFile(path), "32 MiB")


@pytest.mark.slow
def test_ten_thousand_mutations(tmp_path: Path) -> None:
    seed = good(tmp_path / "seed.gguf")
    everything = [(row, layer, row.shape(CONFIG.sizes)[0]) for row, layer in order(CONFIG)]

    def read(path: Path) -> None:
        reader = GGUFReader(path)
        reader.tokenizer()
        for row, layer, rows in everything[:6] if reader.config.sizes == CONFIG.sizes else ():
            reader.read(row, layer, 1, min(rows, 20))

    assert survives(read, [seed], tmp_path / "m.gguf") > 5000
