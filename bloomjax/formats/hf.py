"""Hugging Face folders: safetensors or torch's .bin, in one file or in shards.

The invariant: names of files come from the folder's listing or from an index that is checked
against it, and every tensor of the model is there exactly once before any is read.
"""

import functools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bloomjax.config import ModelConfig
from bloomjax.errors import InputError
from bloomjax.formats import safetensors, tensors
from bloomjax.formats.hf_config import (
    ORIGIN,
    as_json,
    read_config,
    read_context_length,
    read_dtype,
    side_files,
)
from bloomjax.formats.names import HEADS, TABLE, Row
from bloomjax.formats.tensors import DTYPES, PARAMS, Progress, Stored
from bloomjax.formats.torchfile import read_torch
from bloomjax.formats.untrusted import member, read_bytes, read_json

PREFIX = "transformer."
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_MAX_TOKENIZER = 200 << 20  # bytes of a file; BLOOM's has 14.5 MB
_SLICE = 32 << 20  # bytes that are held at a time


class HFPromise:
    """A folder whose weights are still to come. A `tensors.Reader`, but for them: dtypes are what
    config.json says."""

    format = "hf"
    progress: Progress | None = None  # there is no optimizer state

    def __init__(self, folder: Path):
        """InputError if it is not a BLOOM's."""
        self.folder = folder
        self.config = read_config(folder)
        self.context_length = read_context_length(folder)
        self._dtypes = dict.fromkeys((row.path for row in TABLE), read_dtype(folder))
        self.origin: dict[str, Any] = {"format": self.format, "name": folder.absolute().name}

    def dtype(self, row: Row, kind: str = PARAMS) -> np.dtype:
        """Of the weights; float32 if the layers of `row` have several."""
        return self._dtypes[row.path]

    def read(self, row: Row, layer: int, start: int, stop: int, kind: str = PARAMS) -> np.ndarray:
        raise InputError(f"{self.folder}: expected weights, found none yet: fetch them")

    def tokenizer(self) -> dict[str, bytes]:
        found = {name: member(self.folder, name) for name in TOKENIZER}
        return {name: read_bytes(path, _MAX_TOKENIZER) for name, path in found.items() if path}


class HFReader(HFPromise):
    """A folder as `save_pretrained` leaves it, opened. A `tensors.Reader`."""

    def __init__(self, folder: Path, origin: Mapping[str, Any] | None = None):
        """`origin` is what else is known of where the folder came from. InputError if it does not
        hold exactly one BLOOM."""
        super().__init__(folder)
        files = _weight_files(folder)
        self._stored = _tensors(folder, files, self.config)
        for row in TABLE:
            found = {self._at(row, layer).dtype for layer in row.layers(self.config)}
            self._dtypes[row.path] = found.pop() if len(found) == 1 else DTYPES["float32"]
        before = member(folder, ORIGIN)
        self.origin |= {
            "files": {file.name: file.stat().st_size for file in files},
            **(origin or {}),
            **({"source": read_json(before)} if before else {}),
        }

    def _at(self, row: Row, layer: int) -> Stored:
        return self._stored[row.hf.format(layer)]

    def read(self, row: Row, layer: int, start: int, stop: int, kind: str = PARAMS) -> np.ndarray:
        return self._at(row, layer).rows(start, stop).astype(self.dtype(row), copy=False)


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: safetensors if there are any, else .bin."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        if single := member(folder, f"{stem}.{suffix}"):
            return [single]
        if index := member(folder, f"{stem}.{suffix}.index.json"):
            names = _names_in_index(index, suffix)
        else:
            names = _numbered(folder, stem, suffix)
        if missing := sorted(names - set(os.listdir(folder))):
            more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            raise InputError(
                f"{folder}: expected {len(names)} files of weights in it, found that "
                f"{', '.join(map(repr, missing[:4]))}{more} are missing: fetch them again"
            )
        if names:
            return [path for name in sorted(names) if (path := member(folder, name))]
    raise InputError(
        f"{folder}: expected model.safetensors or pytorch_model.bin, or shards of one, found none"
    )


def _names_in_index(index: Path, suffix: str) -> set[str]:
    places = read_json(index).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else []
    if not names or not all(isinstance(name, str) and len(name) < 100 for name in names):
        raise InputError(f"{index}: expected a weight_map from tensors to files, found none")
    for name in names:
        if not name.endswith(f".{suffix}"):
            raise InputError(f"{index}: expected names of .{suffix} files, found {name!r}")
    return set(names)


def _numbered(folder: Path, stem: str, suffix: str) -> set[str]:
    """Names of all the shards that should be there, if one is: the published 176B has an
    underscore before the number, and all others a hyphen."""
    pattern = re.compile(rf"({stem}[-_])(\d{{5}})-of-(\d{{5}})\.{suffix}")
    matches = [m for m in map(pattern.fullmatch, os.listdir(folder)) if m]
    kinds = {(match[1], match[3]) for match in matches}
    if len(kinds) > 1:
        raise InputError(f"{folder}: expected one set of shards, found {len(kinds)}: keep one")
    return {
        f"{start}{number:05}-of-{count}.{suffix}"
        for start, count in kinds
        for number in range(1, int(count) + 1)
    }


def _tensors(folder: Path, files: list[Path], config: ModelConfig) -> dict[str, Stored]:
    """Every tensor of the model, under its name without prefix."""
    found: dict[str, Stored] = {}
    for file in files:
        header = _read_bin(file) if file.suffix == ".bin" else safetensors.read_header(file)
        for name, stored in header.items():
            plain = name.removeprefix(PREFIX)
            if plain in found:
                raise InputError(
                    f"{file}: expected each tensor once, found {name} a second time (before in "
                    f"{found[plain].file.name})"
                )
            found[plain] = stored
    head = found.pop(HEADS[0], None)
    expected = {
        row.hf.format(layer): row.shape(config.sizes) for row, layer in tensors.order(config)
    }
    tensors.check_tensors(folder, {name: stored.shape for name, stored in found.items()}, expected)
    if head is not None:
        _check_tied(folder, head, found[TABLE[0].hf])
    return found


def _check_tied(folder: Path, head: Stored, embedding: Stored) -> None:
    """InputError if a head that is stored is not the embedding once more."""
    if head == embedding:  # torch saves what shares memory once
        return

    def same(start: int) -> bool:
        stop = min(start + step, embedding.shape[0])
        a, b = (stored.rows(start, stop).astype(np.float32) for stored in (head, embedding))
        return np.array_equal(a, b, equal_nan=True)

    step = max(1, _SLICE // (4 * embedding.shape[1]))
    starts = range(0, embedding.shape[0], step)
    if head.shape != embedding.shape or not all(map(same, starts)):
        raise InputError(
            f"{folder}: expected a head tied to the embedding, as BLOOM's, found a "
            f"{HEADS[0]} of its own, which cannot be represented"
        )


def _read_bin(file: Path) -> dict[str, Stored]:
    found = read_torch(file)
    if not isinstance(found, dict):
        raise InputError(f"{file}: expected tensors by name, found {type(found).__name__}")
    for name, stored in found.items():
        if not isinstance(name, str):
            raise InputError(f"{file}: expected names of tensors, found {name!r:.40}")
        if not isinstance(stored, Stored) or stored.dtype not in DTYPES.values():
            raise InputError(f"{file}: expected {name} to be a tensor of floats, found another")
    return found


class HFWriter:
    """A folder that `transformers` loads as it is, being written. A `tensors.Writer`."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        dtype: np.dtype,
        *,
        tokenizer: Mapping[str, bytes],
        origin: Mapping[str, Any],
        context_length: int = tensors.CONTEXT_LENGTH,
        max_shard_bytes: int = 5_000_000_000,
    ):
        """`tokenizer` and `origin` are those of the reader. All files of weights are made here, in
        their final sizes."""
        folder.mkdir(parents=True)
        self._folder, self._sizes, self._dtype = folder, config.sizes, dtype
        shards: list[dict[str, tuple[np.dtype, tuple[int, ...]]]] = [{}]
        room = max_shard_bytes
        for row, layer in tensors.order(config):
            shape = row.shape(config.sizes)
            room -= (size := int(np.prod(shape)) * dtype.itemsize)
            if room < 0 and shards[-1]:
                shards.append({})
                room = max_shard_bytes - size
            shards[-1][PREFIX + row.hf.format(layer)] = dtype, shape
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        if len(shards) == 1:
            names = ["model.safetensors"]
        self._stored: dict[str, Stored] = {}
        for name, shard in zip(names, shards, strict=True):
            self._stored |= safetensors.create(folder / name, shard)
        self._side = functools.partial(side_files, config, dtype, tokenizer, context_length)
        self._origin = origin
        self._index: dict[str, Any] = {}
        if len(shards) > 1:
            total = config.parameter_count * dtype.itemsize
            places = {name: stored.file.name for name, stored in self._stored.items()}
            self._index = {"metadata": {"total_size": total}, "weight_map": places}

    def parts(self, row: Row, kind: str = PARAMS) -> Iterator[tuple[int, int]]:
        return tensors.parts(row, self._sizes, 4, _SLICE)

    def write(self, row: Row, layer: int, start: int, rows: np.ndarray, kind: str = PARAMS) -> None:
        name = row.hf.format(layer)
        rows = tensors.cast(rows, self._dtype, name)
        safetensors.write_rows(self._stored[PREFIX + name], start, rows)

    def stored(self, row: Row, rows: np.ndarray) -> np.ndarray:
        return tensors.cast(rows, self._dtype, row.hf)

    def finish(self, sha256: str) -> None:
        files = self._side({**self._origin, "sha256": sha256})
        if self._index:
            files["model.safetensors.index.json"] = as_json(self._index)
        for name, content in files.items():
            (self._folder / name).write_bytes(content)
