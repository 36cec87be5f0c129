"""Folders that mean harm (reliability R22, R23, R26, R27) are refused, soon and in one line."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hf_folders import config_json, folder, index, shards, weights
from hostile import refused, survives

from bloomjax.data.tokenizer import load_tokenizer
from bloomjax.formats.hf import HFReader
from bloomjax.formats.hf_config import read_config
from bloomjax.formats.names import TABLE
from bloomjax.formats.safetensors import read_header
from bloomjax.formats.torchfile import Planned, TorchWriter
from bloomjax.formats.untrusted import member


def entry(begin: int, end: int, shape: list[Any], dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file(header: Any, data: int = 16, length: int | None = None) -> bytes:
    """A safetensors file of this header and `data` zeros."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data)


GOOD = {"a": entry(0, 8, [2]), "b": entry(8, 16, [2, 1])}
TWICE = b'{"a":%s,"a":%s}' % ((json.dumps(GOOD["a"]).encode(),) * 2)
MALFORMED = {
    "nothing": b"",
    "seven bytes": b"\x02\0\0\0\0\0\0",
    "header longer than the file": file(GOOD, length=1 << 20),
    "header of 2^64 - 1 bytes": file(GOOD, length=(1 << 64) - 1),
    "header of over 100 MB": file(GOOD, length=100_000_001),
    "header begins with a space": file(b" " + json.dumps(GOOD).encode()),
    "header is a list": file([1, 2]),
    "header is cut off": file(json.dumps(GOOD).encode()[:-5]),
    "header is UTF-16": file(json.dumps(GOOD).encode("utf-16-le")),
    "header is no UTF-8": file(b'{"\xff\xfe":1}'),
    "a key twice": file(TWICE, 8),
    "metadata that is no string": file({"__metadata__": {"x": 1}, **GOOD}),
    "a hole": file({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, 20),
    "an overlap": file({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, 12),
    "bytes left over": file(GOOD, 17),
    "end beyond the file": file(GOOD, 15),
    "end before begin": file({"a": entry(8, 0, [2])}, 8),
    "negative offsets": file({"a": entry(-8, 0, [2])}, 8),
    "shape says more than the offsets": file({"a": entry(0, 8, [1 << 40])}, 8),
    "shape says less than the offsets": file({"a": entry(0, 16, [2])}),
    "shape that overflows 64 bits": file({"a": entry(0, 8, [1 << 62, 4, 2])}, 8),
    "negative shape": file({"a": entry(0, 8, [-1, -2])}, 8),
    "shape of 100,000 dimensions": file({"a": entry(0, 4, [1] * 99_999)}, 4),
    "offsets that are floats": file({"a": entry(0.0, 8.0, [2])}, 8),
    "offsets that are true": file({"a": entry(False, True, [True], "F32")}, 4),
    "an unknown dtype": file({"a": entry(0, 8, [2], "F31")}, 8),
    "a dtype that is a list": file({"a": entry(0, 8, [2], ["F32"])}, 8),
    "an entry that is a number": file({"a": 3}),
    "an entry with more keys": file({"a": entry(0, 16, [4]) | {"x": 1}}),
    "nested 100,000 deep": file(b'{"a":' + b"[" * 100_000),
    "a million values": file(b'{"a":[' + b"{}," * 1_000_000 + b"{}]}"),
    "numbers of 5,000 digits": file(b'{"a":' + b"9" * 5000 + b"}"),
    "a name of two lines": file({"a\nb": entry(0, 16, [4])}),
    "a name of a megabyte": file({"a" * (1 << 20): entry(0, 16, [4])}),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_safetensors(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(MALFORMED[name])
    refused(lambda: read_header(path), str(path), "expected")


def test_the_package_refuses_them_too(tmp_path: Path) -> None:
    """All but what its text forbids and its code lets pass, and what no BLOOM looks like."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(file(GOOD))
    assert set(read_header(path)) == {name for name, _ in safetensors.deserialize(file(GOOD))}
    ours = {"a name of two lines", "a name of a megabyte", "shape of 100,000 dimensions"}
    ours |= {"an entry with more keys", "header begins with a space", "a key twice"}
    for name, content in MALFORMED.items():
        if name not in ours:
            with pytest.raises(safetensors.SafetensorError):
                safetensors.deserialize(content)


def test_sparse_and_special_files(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", {"model.safetensors": weights()})
    path = a / "model.safetensors"
    for size in (1 << 30, 1 << 40):
        path.write_bytes(file(b" ", 0, length=99_999_999))
        os.truncate(path, size)
        refused(lambda: HFReader(a), "claim a header of 99,999,999")
    for make in (os.mkfifo, os.mkdir):
        path.unlink()
        make(path)
        refused(lambda: HFReader(a), "folder or a device")
        refused(lambda: read_header(path), "expected a file")
        path.rmdir() if path.is_dir() else None
        path.touch()


def test_files_that_shrink_after_they_were_opened(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", {"model.safetensors": weights()})
    reader = HFReader(a)
    os.truncate(a / "model.safetensors", 5000)
    refused(lambda: reader.read(TABLE[-1], 0, 0, 8), "cut short")


NAMES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def sharded(tmp_path: Path) -> Callable[..., Path]:
    def make(**renamed: str) -> Path:
        """Two shards and an index in which `one` or `two` goes by another name."""
        files = shards(weights(), NAMES)
        a = folder(tmp_path / "a", files)
        spelt = [renamed.get("one", NAMES[0]), renamed.get("two", NAMES[1])]
        index(a, dict(zip(spelt, files.values(), strict=True)), "safetensors")
        return a

    return make


@pytest.mark.parametrize(
    "name",
    [
        *("../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "..", ".", ""),
        *("..\\secret.safetensors", "x\0.safetensors", "x\n.safetensors", "x" * 5000),
        *("model.gguf", "a" * 90 + ".safetensors"),
    ],
)
def test_an_index_names_only_files_beside_it(sharded, name: str, monkeypatch) -> None:
    a = sharded(two=name)
    monkeypatch.setattr("bloomjax.formats.safetensors.read_header", None)  # never gets there
    refused(lambda: HFReader(a), "expected")


def test_links_stay_in_the_folder(sharded, tmp_path: Path) -> None:
    a = sharded()
    outside = tmp_path / "secret.safetensors"
    (a / NAMES[1]).rename(outside)
    refused(lambda: HFReader(a), NAMES[1], "missing")
    (a / NAMES[1]).symlink_to(outside)
    refused(lambda: HFReader(a), "link out of it")
    (a / NAMES[1]).unlink()
    (a / NAMES[1]).symlink_to(NAMES[1])
    refused(lambda: HFReader(a), "cannot be opened")
    (a / NAMES[1]).unlink()
    (a / NAMES[1]).symlink_to("../secret.safetensors")
    refused(lambda: HFReader(a), "link out of it")
    (a / NAMES[1]).unlink()
    (a / NAMES[1]).symlink_to(outside)
    # What looks like the Hub's cache may lead to its blobs, and nowhere else.
    cache = tmp_path / "snapshots"
    cache.mkdir()
    a.rename(cache / "rev")
    refused(lambda: HFReader(cache / "rev"), "link out of it")
    (tmp_path / "blobs").symlink_to("/etc")
    (cache / "rev" / "passwd").symlink_to("../../blobs/passwd")
    refused(lambda: member(cache / "rev", "passwd"), "link out of it")


def test_shards_are_all_there_and_once(sharded) -> None:
    a = sharded()
    (a / NAMES[0]).unlink()
    refused(lambda: HFReader(a), NAMES[0], "missing")
    (a / NAMES[0]).hardlink_to(a / NAMES[1])
    refused(lambda: HFReader(a), "a second time")
    (a / "model.safetensors.index.json").unlink()
    refused(lambda: HFReader(a), "a second time")
    (a / "model_00001-of-00002.safetensors").touch()
    refused(lambda: HFReader(a), "one set of shards")
    (a / "model_00001-of-00002.safetensors").unlink()
    (a / NAMES[0]).unlink()
    refused(lambda: HFReader(a), NAMES[0], "missing")
    (a / NAMES[1]).rename(a / "model-99999-of-99999.safetensors")
    refused(lambda: HFReader(a), "and 99994 more are missing")


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'),
        *('{"weight_map": {"a": "b", "a": "c"}}', '{"a":' * 90_000, "[" * 3_000_000),
    ],
)
def test_an_index_that_is_none(sharded, text: str) -> None:
    a = sharded()
    (a / "model.safetensors.index.json").write_text(text)
    refused(lambda: HFReader(a), "index.json")


def test_tensors_of_another_model(tmp_path: Path) -> None:
    """One error lists them all, and stays one line."""
    tensors = weights()
    del tensors["ln_f.bias"]
    tensors["h.0.mlp.dense_h_to_4h.bias"] = tensors["h.0.mlp.dense_h_to_4h.bias"][:-1]
    tensors["x" * 100] = tensors["ln_f.weight"]
    a = folder(tmp_path / "a", {"model.safetensors": tensors})
    refused(lambda: HFReader(a), "ln_f.bias is missing", "is [31], not [32]", "xxx is unknown")
    refused(lambda: HFReader(tmp_path), "config.json")
    (a / "model.safetensors").unlink()
    refused(lambda: HFReader(a), "found none")
    b = folder(
        tmp_path / "b",
        {"model.safetensors": weights() | {"transformer.ln_f.bias": tensors["ln_f.weight"]}},
    )
    refused(lambda: HFReader(b), "ln_f.bias a second time")
    many = {f"{i:02}" * 50: tensors["ln_f.weight"] for i in range(50)}
    c = folder(tmp_path / "c", {"model.safetensors": weights() | many})
    refused(lambda: HFReader(c), "and 42 more")


def test_bins_of_something_else(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", {})
    for tree, part in (
        ([1, 2], "found list"),
        ({"a\nb": 1}, "short name"),
        ({3: 1}, "names of tensors"),
        ({"word_embeddings.weight": 1}, "tensor of floats"),
        ({"word_embeddings.weight": Planned(np.dtype(np.int64), (0,))}, "tensor of floats"),
    ):
        (a / "pytorch_model.bin").unlink(missing_ok=True)
        TorchWriter(a / "pytorch_model.bin", tree).finish()
        refused(lambda: HFReader(a), part, "pytorch_model.bin")


ABSURD: dict[str, Any] = {
    "layers": config_json(n_layer=10**9),
    "width": config_json(n_embed=1 << 40),
    "heads": config_json(num_attention_heads=0),
    "heads that do not divide": config_json(num_attention_heads=3),
    "vocabulary": config_json(vocab_size=10**12),
    "negative": config_json(n_layer=-1),
    "true": config_json(n_layer=True),
    "float": config_json(n_layer=2.0),
    "text": config_json(n_layer="2" * 1_000_000),
    "list": config_json(n_layer=[[2] * 1000]),
    "two widths": config_json(hidden_size=16),
    "no width": config_json(n_embed=None),
    "epsilon": config_json(layer_norm_epsilon=float("nan")),
    "dropout": config_json(hidden_dropout=1e999),
    "residuals": config_json(apply_residual_connection_post_layernorm="no"),
    "initializer": config_json(initializer_range=[]),
    "n_inner": config_json(n_inner=7),
    "llama": config_json(model_type="llama"),
    "llama of two lines": config_json(model_type="lla\nma" * 1000),
    "no type": {},
    "list instead": [],
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_configs(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(ABSURD[name]))
    refused(lambda: read_config(tmp_path), "config.json", "expected")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_huge_and_deep_files(tmp_path: Path, name: str) -> None:
    a = folder(tmp_path / "a", {"model.safetensors": weights()})

    def read() -> None:
        HFReader(a).tokenizer()
        load_tokenizer(a / name)

    (a / name).write_bytes(b"{")
    os.truncate(a / name, 1 << 30)
    refused(read, "1,073,741,824")
    (a / name).write_text('{"a":' * 200_000)
    refused(read)
    (a / name).write_text("[" * 3_000_000)
    refused(read)


def test_mutations_of_safetensors(tmp_path: Path) -> None:
    seed = file(
        {"a": entry(0, 8, [2]), "b": entry(8, 12, [2, 1], "BF16"), "c": entry(12, 16, [2], "F16")}
    )
    assert survives(read_header, [seed], tmp_path / "x") > 5000


def test_what_is_accepted_the_package_reads_alike(tmp_path: Path) -> None:
    """Mutations that we let pass are safetensors files to the package too, with the same shapes."""
    seed, passed = file(GOOD), 0

    def read(path: Path) -> None:
        nonlocal passed
        ours = {
            name: (s.shape, s.rows(0, s.shape[0]).tobytes())
            for name, s in read_header(path).items()
            if s.shape
        }
        theirs = {
            name: (tuple(found["shape"]), bytes(found["data"]))
            for name, found in safetensors.deserialize(path.read_bytes())
            if found["shape"]
        }
        assert ours == theirs
        passed += 1

    survives(read, [seed], tmp_path / "x", 2000)
    assert passed > 100


def test_mutations_of_configs(tmp_path: Path) -> None:
    seed = json.dumps(config_json(hidden_dropout=0.1, initializer_range=0.02)).encode()
    assert survives(lambda path: read_config(path.parent), [seed], tmp_path / "config.json") > 5000


@pytest.mark.slow
def test_mutations_of_an_index(tmp_path: Path) -> None:
    files = shards(weights(layers=1), NAMES)
    a = folder(tmp_path / "a", files, layers=1)
    index(a, files, "safetensors")
    path = a / "model.safetensors.index.json"
    assert survives(lambda path: HFReader(a), [path.read_bytes()], path) > 5000
