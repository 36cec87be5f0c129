"""GGUF files: what we write is what the `gguf` package reads, what we read is what it dequantises,
and plain kinds go there and back bit by bit."""

import builtins
import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from gguf import GGUFReader as PackageReader
from gguf.constants import GGML_QUANT_SIZES, LlamaFileType
from helpers import model_config
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from bloomjax.config import ModelConfig
from bloomjax.data.tokenizer import load_tokenizer, train_tokenizer
from bloomjax.errors import InputError
from bloomjax.formats.gguf import HEAD, GGUFReader
from bloomjax.formats.gguf_file import KINDS, GGUFFile, header
from bloomjax.formats.gguf_writer import FILE_TYPES, GGUFWriter
from bloomjax.formats.names import ROWS, TABLE, Row
from bloomjax.formats.tensors import DTYPES, order, parts

ODD = model_config(layers=2, width=42, heads=6, vocab_size=75)
EVEN = model_config(layers=2, width=64, heads=2, vocab_size=50)
QUANTISED = [kind for kind in FILE_TYPES if kind.startswith("q")]
Weights = dict[tuple[str, int], np.ndarray]


def random_weights(config: ModelConfig, dtype: Any = np.float32) -> Weights:
    """By path and layer, in Hugging Face's layout."""
    random = np.random.default_rng(0)
    shapes = {(row.path, layer): row.shape(config.sizes) for row, layer in order(config)}
    return {key: random.standard_normal(shape).astype(dtype) for key, shape in shapes.items()}


def write(path: Path, config: ModelConfig, kind: str, weights: Weights, **fields: Any) -> None:
    defaults: dict[str, Any] = {"tokenizer": {}, "context_length": 2048, "name": "tiny"}
    defaults |= {"origin": {"path": "here"}}
    writer = GGUFWriter(path, config, kind, **(defaults | fields))
    for row, layer in order(config):
        rows = weights[row.path, layer]
        assert list(writer.parts(row)) == [(0, len(rows))]  # they are small
        for start, stop in parts(row, config.sizes, 4, 5000):
            writer.write(row, layer, start, rows[start:stop])
    writer.finish("5a" * 32)


def in_file_order(row: Row, rows: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Hugging Face's order to GGUF's, as conversion/bloom.py in llama.cpp does it."""
    if "query_key_value" not in row.hf:
        return rows
    triple = rows.reshape(config.heads, 3, config.width // config.heads, *rows.shape[1:])
    return np.concatenate([triple[:, i].reshape(-1, *rows.shape[1:]) for i in range(3)])


def expected(rows: np.ndarray, kind: str, config: ModelConfig) -> np.ndarray:
    """What a matrix in GGUF's order is after quantising it with the package."""
    number = GGMLQuantizationType[kind]
    bits = quants.quantize(rows.astype(np.float32), number)
    return quants.dequantize(bits, number)


@pytest.fixture
def tokenizer(tmp_path: Path) -> dict[str, bytes]:
    file = tmp_path / "trained.json"
    train_tokenizer(["the cat, the hat. \n  return (x|y) größe 漢字。 नमस्ते।" * 3], 300, file)
    return {"tokenizer.json": file.read_bytes()}


def test_kinds_and_file_types_are_the_packages() -> None:
    for kind in KINDS.values():
        assert kind.number == GGMLQuantizationType[kind.name]
        assert (kind.block, kind.size) == GGML_QUANT_SIZES[GGMLQuantizationType(kind.number)]
    for name, number in FILE_TYPES.items():
        assert LlamaFileType(number).name == (
            "ALL_F32" if name == "f32" else f"MOSTLY_{name}".upper()
        )


@pytest.mark.parametrize("config", [ODD, EVEN], ids=["odd", "even"])
@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
def test_plain_kinds_come_back_bit_by_bit(tmp_path: Path, config: ModelConfig, kind: str) -> None:
    dtype = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32}[kind]
    weights = random_weights(config, dtype)
    write(tmp_path / "m.gguf", config, kind, weights)
    reader = GGUFReader(tmp_path / "m.gguf")
    assert reader.config == dataclasses.replace(config, dtype=reader.config.dtype)
    for row, layer in order(config):
        rows, unit = weights[row.path, layer], row.unit(config.sizes)
        assert reader.dtype(row) == (np.float32 if rows.ndim == 1 else dtype)
        for start, stop in {(0, len(rows)), (1, len(rows) - 1), (unit - 1, unit + 1), (5, 5)}:
            found = reader.read(row, layer, start, stop)
            assert found.dtype == reader.dtype(row) and found.shape == rows[start:stop].shape
            assert found.astype(dtype).tobytes() == rows[start:stop].tobytes()


@pytest.mark.parametrize("config", [ODD, EVEN], ids=["odd", "even"])
@pytest.mark.parametrize("kind", FILE_TYPES)
def test_the_package_reads_what_we_write(tmp_path: Path, config: ModelConfig, kind: str) -> None:
    weights = random_weights(config)
    write(tmp_path / "m.gguf", config, kind, weights)
    theirs = PackageReader(tmp_path / "m.gguf")
    reader = GGUFReader(tmp_path / "m.gguf")
    assert [t.name for t in theirs.tensors] == [row.gguf.format(i) for row, i in order(config)]
    for tensor, (row, layer) in zip(theirs.tensors, order(config), strict=True):
        rows = in_file_order(row, weights[row.path, layer], config)
        assert tuple(reversed(tensor.shape.tolist())) == rows.shape
        stored = kind.upper()
        if rows.ndim == 1:
            stored = "F32"
        elif kind in QUANTISED:
            stored = "F16" if rows.shape[1] % 32 else "Q8_0" if row.path == "embed" else stored
        assert tensor.tensor_type.name == stored
        values = quants.dequantize(tensor.data, tensor.tensor_type).reshape(rows.shape)
        assert np.array_equal(values, expected(rows, stored, config))
        ours = reader.read(row, layer, 0, len(rows))  # and so do we
        assert np.array_equal(in_file_order(row, ours, config).astype(np.float32), values)
        part = reader.read(row, layer, 7, 31)
        assert part.tobytes() == ours[7:31].tobytes()


def test_metadata(tmp_path: Path, tokenizer: Mapping[str, bytes]) -> None:
    config = dataclasses.replace(EVEN, vocab_size=320)
    origin = {"format": "hf", "url": "https://huggingface.co/bigscience/bloom-560m", "n": [1]}
    write(
        tmp_path / "m.gguf",
        config,
        "q8_0",
        random_weights(config),
        tokenizer=tokenizer,
        context_length=1024,
        origin=origin,
    )
    fields = PackageReader(tmp_path / "m.gguf").fields
    found = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    size = load_tokenizer(tmp_path / "trained.json").vocab_size
    tokens, types = found.pop("tokenizer.ggml.tokens"), found.pop("tokenizer.ggml.token_type")
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<pad>"] and types[:5] == [3, 3, 3, 3, 1]
    assert tokens[size:] == [f"[PAD{i}]" for i in range(size, 320)]  # as llama.cpp names them
    assert types[4:] == [1] * (size - 4) + [5] * (320 - size)
    spec = json.loads(tokenizer["tokenizer.json"])
    assert found.pop("tokenizer.ggml.merges") == [" ".join(m) for m in spec["model"]["merges"]]
    assert json.loads(found.pop("bloomjax.origin")) == {**origin, "sha256": "5a" * 32}
    assert found.pop("bloom.attention.layer_norm_epsilon") == pytest.approx(1e-5)
    assert found == {
        "general.architecture": "bloom",
        "general.type": "model",
        "general.name": "tiny",
        "general.license": "bigscience-bloom-rail-1.0",
        "general.source.url": origin["url"],
        "general.file_type": 7,
        "general.quantization_version": 2,
        "bloom.context_length": 1024,
        "bloom.embedding_length": 64,
        "bloom.feed_forward_length": 256,
        "bloom.block_count": 2,
        "bloom.attention.head_count": 2,
        "bloom.attention.head_count_kv": 2,
        "bloom.vocab_size": 320,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "bloom",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 3,
    }
    origin_read = GGUFReader(tmp_path / "m.gguf").origin
    assert origin_read["general.name"] == "tiny" and origin_read["source"]["n"] == [1]


def k_quant_file(path: Path, config: ModelConfig, kinds: list[str]) -> dict[str, np.ndarray]:
    """A file whose matrices are random blocks of these kinds in turn; what the package makes of
    them. Scales, which are float16, are kept small: most bits are valid, but NaN is not equal."""
    random = np.random.default_rng(1)
    shapes = {row.gguf.format(i): row.shape(config.sizes) for row, i in order(config)}
    names = [name for name, shape in shapes.items() if len(shape) == 2]
    chosen = {name: kinds[i % len(kinds)] for i, name in enumerate(names)}
    layout = [(name, KINDS[chosen.get(name, "F32")], shape) for name, shape in shapes.items()]
    values: dict[str, tuple[int, Any]] = {
        "general.architecture": (8, "bloom"),
        "bloom.embedding_length": (4, config.width),
        "bloom.block_count": (4, config.layers),
        "bloom.attention.head_count": (4, config.heads),
        "bloom.attention.layer_norm_epsilon": (6, 1e-5),
    }
    data, tensors = header(values, layout)
    with open(path, "wb") as file:
        file.write(data)
        for name, tensor in tensors.items():
            file.seek(tensor.offset)
            if name not in chosen:
                file.write(random.standard_normal(tensor.shape).astype(np.float32).tobytes())
                continue
            blocks = random.integers(0, 256, (tensor.nbytes // tensor.kind.size, tensor.kind.size))
            # where each kind has its float16s: ggml-common.h
            ends = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q6_K": (208, 210)}
            start, stop = ends.get(tensor.kind.name, (0, 4))
            blocks[:, start + 1 : stop : 2] &= 0xBF  # an exponent below 2
            file.write(blocks.astype(np.uint8).tobytes())
    read = PackageReader(path)
    return {
        t.name: quants.dequantize(t.data, t.tensor_type).reshape(shapes[t.name])
        for t in read.tensors
    }


def test_k_quants(tmp_path: Path) -> None:
    config = model_config(layers=2, width=256, heads=4, vocab_size=20)
    kinds = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
    theirs = k_quant_file(tmp_path / "k.gguf", config, kinds)
    assert {t.kind.name for t in GGUFFile(tmp_path / "k.gguf").tensors.values()} >= set(kinds)
    reader = GGUFReader(tmp_path / "k.gguf")
    for row, layer in order(config):
        rows = reader.read(row, layer, 0, row.shape(config.sizes)[0])
        assert reader.dtype(row) == rows.dtype == np.float32
        assert np.isfinite(rows).all() and rows.any()
        found = in_file_order(row, rows, config)
        assert np.array_equal(found, theirs[row.gguf.format(layer)])


def test_a_tensor_that_layers_store_differently_is_float32(tmp_path: Path) -> None:
    config = model_config(layers=2, width=256, heads=4, vocab_size=20)
    k_quant_file(tmp_path / "k.gguf", config, ["F32", "F16", "F16", "F16", "Q4_K"])
    reader = GGUFReader(tmp_path / "k.gguf")
    stored = {t: k.kind.name for t, k in GGUFFile(tmp_path / "k.gguf").tensors.items()}
    for row in TABLE:
        kinds = {stored[row.gguf.format(i)] for i in row.layers(config)}
        both = {"F16": np.dtype(np.float16)}.get(kinds.pop(), DTYPES["float32"])
        assert reader.dtype(row) == (DTYPES["float32"] if kinds else both)
        assert reader.read(row, 0, 0, 3).dtype == reader.dtype(row)


def with_head(path: Path, kinds: tuple[str, str], noise: float) -> np.ndarray:
    """A file that holds the embedding a second time, `noise` away; the exact embedding."""
    config = model_config(layers=1, width=64, heads=2, vocab_size=600)
    weights = random_weights(config)
    embed = weights["embed", 0]
    far = embed + noise * np.random.default_rng(2).standard_normal(embed.shape).astype(np.float32)
    write(path, config, "f32", weights)
    old, data = GGUFFile(path), path.read_bytes()
    tensors = [(name, t.kind, t.shape) for name, t in old.tensors.items()]
    tensors[0] = ("token_embd.weight", KINDS[kinds[0]], embed.shape)
    tensors.append((HEAD, KINDS[kinds[1]], embed.shape))
    values = {
        key: ({str: 8, int: 4, float: 6}[type(value)], value) for key, value in old.values.items()
    }
    start, placed = header(values, tensors)
    with open(path, "wb") as file:
        file.write(start)
        for name, tensor in placed.items():
            file.seek(tensor.offset)
            if name in old.tensors and name != "token_embd.weight":
                at = old.tensors[name].offset
                file.write(data[at : at + tensor.nbytes])
            else:
                copy = far if name == HEAD else embed
                number = GGMLQuantizationType(tensor.kind.number)
                file.write(quants.quantize(copy, number).tobytes())
    return embed


@pytest.mark.parametrize(
    ("kinds", "taken"),
    [
        (("F32", "F32"), "F32"),
        (("F16", "F32"), "F32"),
        (("Q4_0", "Q8_0"), "Q8_0"),
        (("Q8_0", "Q4_0"), "Q8_0"),
        (("Q4_1", "Q4_1"), "Q4_1"),
    ],
)
def test_the_finer_copy_of_the_embedding_is_read(
    tmp_path: Path, kinds: tuple[str, str], taken: str
) -> None:
    embed = with_head(tmp_path / "m.gguf", kinds, 0)
    reader = GGUFReader(tmp_path / "m.gguf")
    found = reader.read(ROWS["embed"], 0, 0, 600)
    assert np.array_equal(found, expected(embed, taken, reader.config))


@pytest.mark.parametrize(
    ("kinds", "noise"),
    [(("F32", "F32"), 1e-6), (("F16", "F32"), 0.01), (("Q4_0", "Q8_0"), 0.8)],
)
def test_another_head_is_refused(tmp_path: Path, kinds: tuple[str, str], noise: float) -> None:
    with_head(tmp_path / "m.gguf", kinds, noise)
    with pytest.raises(InputError, match="tied"):
        GGUFReader(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_1"])
def test_numbers_that_a_kind_cannot_hold_are_refused(tmp_path: Path, kind: str) -> None:
    weights = random_weights(EVEN)
    weights["blocks.up_w", 1][3, 4] = 70_000
    with pytest.raises(InputError, match=r"blk\.1\.ffn_up\.weight.*70000"):
        write(tmp_path / "m.gguf", EVEN, kind, weights)
    write(tmp_path / "m.gguf", EVEN, "bf16", weights)


def test_other_residuals_are_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(EVEN, apply_residual_connection_post_layernorm=True)
    with pytest.raises(InputError, match="residual"):
        write(tmp_path / "m.gguf", config, "f32", random_weights(config))


def test_plain_kinds_need_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights(EVEN)
    write(tmp_path / "quantised.gguf", EVEN, "q8_0", weights)
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "gguf":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr("importlib.import_module", without)
    write(tmp_path / "m.gguf", EVEN, "f16", weights)
    assert GGUFReader(tmp_path / "m.gguf").read(ROWS["embed"], 0, 1, 3).shape == (2, 64)
    for do in (
        lambda: GGUFReader(tmp_path / "quantised.gguf"),
        lambda: write(tmp_path / "m.gguf", EVEN, "q8_0", weights),
    ):
        with pytest.raises(InputError, match=r"pip install 'bloomjax\[gguf\]'"):
            do()


def restored(path: Path, tokenizer: Mapping[str, bytes], vocab_size: int = 320) -> bytes:
    config = dataclasses.replace(EVEN, vocab_size=vocab_size)
    write(path, config, "f16", random_weights(config), tokenizer=tokenizer)
    files = GGUFReader(path).tokenizer()
    settings = json.loads(files["tokenizer_config.json"])
    assert settings["padding_side"] == "left" and settings["pad_token"] == "<pad>"
    return files["tokenizer.json"]


def test_the_tokenizer_comes_back(tmp_path: Path, tokenizer: Mapping[str, bytes]) -> None:
    before = Tokenizer.from_buffer(tokenizer["tokenizer.json"])
    again = restored(tmp_path / "m.gguf", tokenizer)
    after = Tokenizer.from_buffer(again)
    assert after.get_vocab() == before.get_vocab()  # [PADn] are gone
    (tmp_path / "tokenizer.json").write_bytes(again)
    load_tokenizer(tmp_path)  # has its </s>

    @given(st.text() | st.text("the cat(|)., \n<s>/।。"))
    @settings(deadline=None, max_examples=300)
    def same(text: str) -> None:
        ids = before.encode(text).ids
        assert after.encode(text).ids == ids
        assert after.decode(ids, skip_special_tokens=False) == before.decode(
            ids, skip_special_tokens=False
        )

    same()
    for text in (
        "Hello  world",
        "a\n\n  b",
        "    return",
        "f(x|y)",
        "</s>the<pad>",
        "größe।漢字。",
    ):
        assert after.encode(text).ids == before.encode(text).ids


def test_added_tokens_come_back(tmp_path: Path, tokenizer: Mapping[str, bytes]) -> None:
    before = Tokenizer.from_buffer(tokenizer["tokenizer.json"])
    before.add_tokens(["the cat"])
    before.add_special_tokens(["<|end|>"])
    spec = before.to_str().encode()
    after = Tokenizer.from_buffer(restored(tmp_path / "m.gguf", {"tokenizer.json": spec}, 330))
    for text in ("I saw the cat<|end|> there", "the ca the cat"):
        assert after.encode(text).ids == before.encode(text).ids
    ids = before.encode("the cat<|end|>").ids
    assert after.decode(ids) == before.decode(ids) == "the cat"


def test_no_tokenizer(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", EVEN, "f16", random_weights(EVEN))
    assert GGUFReader(tmp_path / "m.gguf").tokenizer() == {}


def test_other_tokenizers_are_refused(tmp_path: Path, tokenizer: Mapping[str, bytes]) -> None:
    spec = json.loads(tokenizer["tokenizer.json"])
    level = spec["pre_tokenizer"]["pretokenizers"][1]
    split = {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False}
    gpt2 = {"type": "Sequence", "pretokenizers": [split, level]}
    others: list[dict[str, Any]] = [
        {"pre_tokenizer": {"type": "ByteLevel"}},
        {"pre_tokenizer": gpt2},
        {"normalizer": {"type": "NFC"}},
        {"model": spec["model"] | {"type": "WordPiece"}},
        {"model": spec["model"] | {"vocab": {"\ud800": 0}}},
    ]
    for files in (
        *({"tokenizer.json": json.dumps(spec | other).encode()} for other in others),
        {"tokenizer.json": b"[" * 100_000},
        {"tokenizer.model": b"sentencepiece"},
    ):
        with pytest.raises(InputError, match="pre-tokenizer"):
            restored(tmp_path / "m.gguf", files)
    with pytest.raises(InputError, match="200 rows"):
        restored(tmp_path / "m.gguf", tokenizer, 200)


def test_a_vocabulary_of_blooms_size_is_read_soon(tmp_path: Path) -> None:
    """The package takes 12 s and 900 MB for it."""
    count = 250_680
    vocab = {f"token{i}": i for i in range(count)}
    values: dict[str, tuple[int, Any]] = {
        "tokenizer.ggml.tokens": (8, list(vocab)),
        "tokenizer.ggml.token_type": (5, [1] * count),
        "tokenizer.ggml.merges": (8, [f"token{i} {i % 10}" for i in range(count)]),
    }
    (tmp_path / "m.gguf").write_bytes(header(values, [])[0])
    start = time.monotonic()
    file = GGUFFile(tmp_path / "m.gguf")
    assert file.strings("tokenizer.ggml.tokens") == list(vocab)
    assert len(file.strings("tokenizer.ggml.merges") or []) == count
    assert time.monotonic() - start < 3
