"""Hugging Face folders come in and go out bit by bit, in every form that they are published in."""

import json
from pathlib import Path

import numpy as np
import pytest
from foreign import copy
from hf_folders import config_json, folder, index, loaded, same, shards, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from bloomjax.data.tokenizer import load_tokenizer, train_tokenizer
from bloomjax.errors import InputError
from bloomjax.formats.hf import PREFIX, HFReader, HFWriter
from bloomjax.formats.hf_config import read_config
from bloomjax.formats.names import TABLE
from bloomjax.formats.tensors import DTYPES, cast

SHAPES = (
    {"layers": 3, "width": 42, "heads": 6, "vocab_size": 10},
    {"layers": 1, "width": 5, "heads": 1, "vocab_size": 7},
    {"layers": 2, "width": 48, "heads": 12, "vocab_size": 33},
)


def prefixed(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {PREFIX + name: array for name, array in tensors.items()}


def write(reader: HFReader, path: Path, dtype: str, **more: int) -> Path:
    tokenizer, origin = reader.tokenizer(), reader.origin
    copy(
        reader,
        HFWriter(path, reader.config, DTYPES[dtype], tokenizer=tokenizer, origin=origin, **more),
    )
    return path


@pytest.mark.parametrize("limit", [5_000_000_000, 6000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"width{s['width']}")
def test_round_trip_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: dict, dtype: str, limit: int
) -> None:
    monkeypatch.setattr("bloomjax.formats.hf._SLICE", 300)  # so that tensors go in parts
    tensors = weights(dtype, **shape)
    reader = HFReader(folder(tmp_path / "a", {"model.safetensors": tensors}, **shape))
    b = write(reader, tmp_path / "b", dtype, max_shard_bytes=limit)
    same(loaded(b), prefixed(tensors))
    largest = max(array.nbytes for array in tensors.values())
    for file in b.glob("*.safetensors"):
        raw = file.read_bytes()
        header = int.from_bytes(raw[:8], "little")
        assert header % 8 == 0 and len(raw) - 8 - header <= max(limit, largest)
    assert (len(list(b.glob("*.safetensors"))) > 1) == (
        sum(array.nbytes for array in tensors.values()) > limit
    )
    again = HFReader(b)
    assert again.config == reader.config
    same(loaded(write(again, tmp_path / "c", dtype)), prefixed(tensors))


def test_any_rows_can_be_read(tmp_path: Path) -> None:
    shape = SHAPES[0]
    tensors = weights("float16", **shape)
    reader = HFReader(folder(tmp_path / "a", {"model.safetensors": tensors}, **shape))
    random = np.random.default_rng(0)
    for row in TABLE:
        for layer in row.layers(reader.config):
            whole = tensors[row.hf.format(layer)]
            start, stop = sorted(random.integers(0, len(whole) + 1, 2))
            rows = reader.read(row, layer, start, stop)
            assert rows.dtype == reader.dtype(row) == np.float16
            assert np.array_equal(rows, whole[start:stop])


FORMS = {
    "single": ["model.safetensors"],
    "hyphens": [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)],
    "underscores": [f"model_{i:05}-of-00002.safetensors" for i in (1, 2)],
    "bin": ["pytorch_model.bin"],
    "bin hyphens": [f"pytorch_model-{i:05}-of-00002.bin" for i in (1, 2)],
    "bin underscores": [f"pytorch_model_{i:05}-of-00002.bin" for i in (1, 2)],
}


@pytest.mark.parametrize("prefix", [False, True], ids=["bare", "prefixed"])
@pytest.mark.parametrize("indexed", [False, True], ids=["alone", "indexed"])
@pytest.mark.parametrize("form", FORMS)
def test_every_published_form(tmp_path: Path, form: str, indexed: bool, prefix: bool) -> None:
    tensors = weights("bfloat16")
    files = shards(prefixed(tensors) if prefix else tensors, FORMS[form])
    a = folder(tmp_path / "a", files)
    if indexed:
        index(a, files, "bin" if "bin" in form else "safetensors")
    same(loaded(write(HFReader(a), tmp_path / "b", "bfloat16")), prefixed(tensors))


def test_safetensors_come_first(tmp_path: Path) -> None:
    tensors = weights()
    others = {name: array + 1 for name, array in tensors.items()}
    a = folder(tmp_path / "a", {"model.safetensors": tensors, "pytorch_model.bin": others})
    same(loaded(write(HFReader(a), tmp_path / "b", "float32")), prefixed(tensors))
    (a / "pytorch_model.bin").write_bytes(b"never looked at")
    HFReader(a)


def test_a_stored_head_may_only_repeat_the_embedding(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("bloomjax.formats.hf._SLICE", 100)
    tensors = weights()
    head = tensors["word_embeddings.weight"].copy()
    whole = prefixed(tensors) | {"lm_head.weight": head}
    b = write(
        HFReader(folder(tmp_path / "a", {"model.safetensors": whole})), tmp_path / "b", "float32"
    )
    same(loaded(b), prefixed(tensors))
    head[-1, -1] += 1
    with pytest.raises(InputError, match=r"lm_head\.weight of its own"):
        HFReader(folder(tmp_path / "c", {"model.safetensors": whole}))
    with pytest.raises(InputError, match=r"lm_head\.weight of its own"):
        HFReader(
            folder(tmp_path / "d", {"model.safetensors": tensors | {"lm_head.weight": head[:-1]}})
        )


def test_layers_of_several_dtypes(tmp_path: Path) -> None:
    tensors = weights("float16")
    name = "h.1.mlp.dense_4h_to_h.weight"
    tensors[name] = weights("bfloat16")[name]
    tensors["ln_f.bias"] = weights("float32")["ln_f.bias"]
    reader = HFReader(folder(tmp_path / "a", {"model.safetensors": tensors}))
    wide = {row.path for row in TABLE if reader.dtype(row) == np.float32}
    assert wide == {"blocks.down_w", "ln_b"}
    expected = {name: array.astype(np.float32) for name, array in prefixed(tensors).items()}
    same(loaded(write(reader, tmp_path / "b", "float32")), expected)


def test_casts_round_to_nearest_even_and_refuse_what_does_not_fit(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    bits = random.integers(0, 0x7F000000, 100_000, dtype=np.uint32)
    bits[:50_000] &= 0xFFFF8000  # many ties
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    out = cast(bits.view(np.float32), DTYPES["bfloat16"], "x")
    assert np.array_equal(out.view(np.uint16), rounded)

    tensors = weights()
    tensors["h.1.mlp.dense_h_to_4h.bias"][3] = 65_519.9  # the largest that float16 rounds down
    reader = HFReader(folder(tmp_path / "a", {"model.safetensors": tensors}))
    found = loaded(write(reader, tmp_path / "b", "float16"))
    same(found, prefixed({name: array.astype(np.float16) for name, array in tensors.items()}))
    tensors["h.1.mlp.dense_h_to_4h.bias"][3] = 65_520
    reader = HFReader(folder(tmp_path / "c", {"model.safetensors": tensors}))
    with pytest.raises(
        InputError, match=r"h\.1\.mlp\.dense_h_to_4h\.bias.* float16, found larger: use bfloat16"
    ):
        write(reader, tmp_path / "d", "float16")
    tensors["h.1.mlp.dense_h_to_4h.bias"][3] = np.inf  # was so before: not ours to judge
    write(
        HFReader(folder(tmp_path / "e", {"model.safetensors": tensors})), tmp_path / "f", "float16"
    )


@settings(max_examples=50, deadline=None)
@given(
    heads=st.integers(1, 8),
    head_dim=st.integers(1, 8),
    post=st.booleans(),
    dropouts=st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)),
    epsilon=st.floats(1e-9, 0.5),
)
def test_the_configuration_survives(tmp_path_factory, heads, head_dim, post, dropouts, epsilon):
    path = tmp_path_factory.mktemp("config")
    fields = {
        "layer_norm_epsilon": epsilon,
        "apply_residual_connection_post_layernorm": post,
        "hidden_dropout": dropouts[0],
        "attention_dropout": dropouts[1],
        "initializer_range": 0.0123,
    }
    given_json = config_json(layers=1, width=heads * head_dim, heads=heads, **fields)
    (path / "config.json").write_text(json.dumps(given_json))
    config = read_config(path)
    assert (config.width, config.heads, config.init_std) == (heads * head_dim, heads, 0.0123)
    assert config.apply_residual_connection_post_layernorm is post
    writer = HFWriter(path / "b", config, DTYPES["float16"], tokenizer={}, origin={})
    writer.finish("")
    assert read_config(path / "b") == config


def test_what_stands_beside_the_weights(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", {"model.safetensors": weights()})
    train_tokenizer(["some text " * 50], 300, a / "tokenizer.json")
    (a / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    b = write(HFReader(a, {"commit": "abc"}), tmp_path / "b", "bfloat16")
    config = json.loads((b / "config.json").read_text())
    assert config["architectures"] == ["BloomForCausalLM"] and config["torch_dtype"] == "bfloat16"
    assert [config[f"{x}_token_id"] for x in ("unk", "bos", "eos", "pad")] == [0, 1, 2, 3]
    settings = json.loads((b / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "BloomTokenizerFast"
    assert settings["padding_side"] == "left" and settings["pad_token"] == "<pad>"
    for name in ("tokenizer.json", "special_tokens_map.json"):
        assert (b / name).read_bytes() == (a / name).read_bytes()
    card = (b / "README.md").read_text()
    assert "license: bigscience-bloom-rail-1.0" in card and "spaces/bigscience/license" in card
    source = HFReader(b).origin["source"]
    assert source["commit"] == "abc" and source["name"] == a.name and "sha256" in source
    assert load_tokenizer(b).eos_id == 2

    other = json.loads((a / "tokenizer.json").read_text())
    for token in other["added_tokens"]:
        token["id"] += 100
    (a / "tokenizer.json").write_text(json.dumps(other))
    c = write(HFReader(a), tmp_path / "c", "float32")
    assert json.loads((c / "config.json").read_text())["eos_token_id"] == 102
    assert json.loads((c / "generation_config.json").read_text())["eos_token_id"] == 102


def test_the_hubs_cache_is_made_of_links(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    snapshot = folder(cache / "snapshots" / "abc", {"model.safetensors": weights()})
    for i, file in enumerate(list(snapshot.iterdir())):
        file.rename(cache / "blobs" / str(i))
        file.symlink_to(f"../../blobs/{i}")
    same(loaded(write(HFReader(snapshot), tmp_path / "b", "float32")), prefixed(weights()))
