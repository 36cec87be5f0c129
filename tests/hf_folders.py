"""Hugging Face folders for tests: written by the safetensors package, read back by it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from oracles.weights import hf_weights
from safetensors.numpy import save_file

from bloomjax.formats.tensors import DTYPES
from bloomjax.formats.torchfile import Planned, TorchWriter

CODES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SMALL = {"layers": 2, "width": 8, "heads": 2, "vocab_size": 10}


def weights(dtype: str = "float32", **shape: int) -> dict[str, np.ndarray]:
    shape = SMALL | shape
    made = hf_weights(shape["layers"], shape["width"], shape["vocab_size"], 0)
    return {name: array.astype(DTYPES[dtype]) for name, array in made.items()}


def config_json(**fields: Any) -> dict[str, Any]:
    """As a published config.json spells it; width, heads ... of `fields` by our names."""
    shape = {name: fields.pop(name, size) for name, size in SMALL.items()}
    return {
        "model_type": "bloom",
        "n_layer": shape["layers"],
        "n_embed": shape["width"],
        "num_attention_heads": shape["heads"],
        "vocab_size": shape["vocab_size"],
        **fields,
    }


def folder(path: Path, files: Mapping[str, Mapping[str, np.ndarray]], **fields: Any) -> Path:
    """A folder of `files`: name -> tensors; a .bin is written by our own writer."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_json(**fields)))
    for name, tensors in files.items():
        if name.endswith(".bin"):
            planned = {key: Planned(a.dtype, a.shape) for key, a in tensors.items()}
            writer = TorchWriter(path / name, planned)
            for array in tensors.values():
                writer.write(array)
            writer.finish()
        else:
            save_file(dict(tensors), path / name, {"format": "pt"})
    return path


def index(path: Path, files: Mapping[str, Mapping[str, np.ndarray]], suffix: str) -> None:
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    places = {key: name for name, tensors in files.items() for key in tensors}
    (path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": places}))


def shards(tensors: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, dict]:
    """The tensors dealt out to files of these names."""
    keys = list(tensors)
    return {
        name: {key: tensors[key] for key in keys[i :: len(names)]} for i, name in enumerate(names)
    }


def loaded(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder's safetensors files, as the safetensors package reads them."""
    tensors = {}
    for file in path.glob("*.safetensors"):
        for name, entry in safetensors.deserialize(file.read_bytes()):
            assert name not in tensors
            dtype = DTYPES[CODES[entry["dtype"]]]
            tensors[name] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
    return tensors


def same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> None:
    """Bit for bit."""
    assert set(a) == set(b)
    for name, array in a.items():
        assert array.dtype == b[name].dtype and array.shape == b[name].shape, name
        assert array.tobytes() == b[name].tobytes(), name
