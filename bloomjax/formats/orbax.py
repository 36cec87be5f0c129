"""Our own checkpoints, slice by slice: what Orbax restores, in the memory of a slice.

`FOLDER/config.json`, `FOLDER/tokenizer.json` and `FOLDER/checkpoints/STEP/`, as a training run has
them, so that training goes on from a conversion. A tensor is a zarr3 array, a slice of it a file,
cut inside into blocks of a megabyte, so that a mesh of any layout reads little more than its own.
(Training's own files are not cut inside: whoever reads a part of one reads it all.) The one
invariant: every file is hashed and synced before the manifest names it.
"""

import errno
import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from bloomjax import checkpoint, manifests
from bloomjax.config import ModelConfig, architecture, model_of, read_model
from bloomjax.errors import InputError
from bloomjax.formats import tensors
from bloomjax.formats.names import TABLE, Row
from bloomjax.formats.tensors import PARAMS, Progress
from bloomjax.formats.untrusted import member, read_bytes

TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # the first that is there counts
_MAX_TOKENIZER = 200 << 20  # bytes; BLOOM's has 14.5 MB
SLICE_BYTES, BLOCK_BYTES = 64 << 20, 1 << 20
# Files are synced when they are hashed: tensorstore would wait for the disk at each.
_CONTEXT = {"file_io_sync": False}


def _done(future: Any) -> Any:
    """What tensorstore made, its errors as those of the system."""
    try:
        return future.result()
    except ValueError as error:
        full = "No space left" in str(error) or "quota" in str(error).lower()
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error).splitlines()[0]) from error


def _found(future: Any, path: Path) -> Any:
    """What tensorstore opened or read."""
    try:
        return future.result()
    except ValueError as error:
        what = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: expected an array, found: {what}") from error


def _group(meta: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A group of the configuration that a step was saved with; {} if it says nothing of it."""
    saved = meta.get("config")
    found = saved.get(name) if type(saved) is dict else None
    return found if type(found) is dict else {}


def model_of_step(meta: Mapping[str, Any], folder: Path) -> ModelConfig:
    """The model of a step of `folder` with this `meta`, or what the run's config.json says."""
    found = _group(meta, "model")
    return model_of(found, folder) if found else read_model(folder.parent)


def tokenizers(folder: Path) -> dict[str, bytes]:
    """The files of the tokenizer beside the checkpoints in `folder`, if these are a run's."""
    paths = {name: member(folder.parent, name) for name in TOKENIZERS}
    if folder.name != checkpoint.FOLDER:
        return {}
    return {name: read_bytes(path, _MAX_TOKENIZER) for name, path in paths.items() if path}


def leaf_shape(row: Row, config: ModelConfig) -> tuple[int, ...]:
    layers = (config.layers,) if row.stacked else ()
    return (*layers, *(config.sizes[a] for a in row.ours))


def _unpadded(name: str, shape: list[int], layers: int) -> tuple[int, ...]:
    """A run on pipeline stages leaves stacks that end in rows of zeros, fewer than there are."""
    padded = f".{checkpoint.STACK}." in name and layers < shape[0] < 2 * layers
    return (layers, *shape[1:]) if padded else tuple(shape)


class OrbaxReader:
    """The newest whole step of a run (its folder, its `checkpoints`, or the step's own folder).

    InputError if there is none. Its files are verified against their hashes first.
    """

    format = "orbax"

    def __init__(self, path: Path):
        self._path, manifest = checkpoint.newest_whole(path)
        self._inode = self._manifest()
        meta, leaves = manifest["meta"], manifest["leaves"]
        self.config = model_of_step(meta, self._path.parent)
        kinds = [kind for kind in tensors.KINDS if f"{kind}.embed" in leaves] or [PARAMS]
        tensors.check_tensors(
            self._path,
            {
                n: _unpadded(n, leaf[1], self.config.layers)
                for n, leaf in leaves.items()
                if n.startswith(tuple(kinds))
            },
            {f"{k}.{row.path}": leaf_shape(row, self.config) for k in kinds for row in TABLE},
        )
        names = [f"{kind}.{row.path}" for kind in kinds for row in TABLE]
        self._arrays = {name: self._open(name, *leaves[name]) for name in names}
        self.progress = None
        if len(kinds) == 3:
            scalars = [self._open(name, "int32", []) for name in Progress._fields]
            self.progress = Progress(*(int(_found(x.read(), self._path)) for x in scalars))
        self.origin = {
            "format": self.format,
            "name": self._path.parent.parent.name,
            "step": manifest["step"],
        }
        self.origin |= {"source": meta["origin"]} if type(meta.get("origin")) is dict else {}
        length = _group(meta, "data").get("sequence_length") or meta.get("context_length")
        known = type(length) is int and 0 < length < 1 << 24
        self.context_length = length if known else tensors.CONTEXT_LENGTH

    def _manifest(self) -> int:
        """The identity of its file; 0 if it has gone."""
        try:
            return (self._path / manifests.NAME).stat().st_ino
        except OSError:
            return 0

    def _open(self, name: str, dtype: str, shape: list[int]) -> Any:
        path = self._path / name
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
        array = _found(ts.open(spec, open=True, read=True), path)
        if [array.dtype.name, list(array.shape)] != [dtype, shape]:
            raise InputError(
                f"{path}: expected {dtype}{shape}, found {array.dtype.name}{list(array.shape)}"
            )
        return array

    def dtype(self, row: Row, kind: str = PARAMS) -> np.dtype:
        return self._arrays[f"{kind}.{row.path}"].dtype.numpy_dtype

    def read(self, row: Row, layer: int, start: int, stop: int, kind: str = PARAMS) -> np.ndarray:
        array, n = self._arrays[f"{kind}.{row.path}"], self.config.sizes
        if row.stacked:
            array = array[layer]
        unit = row.unit(n)
        first = start // unit
        cut: list[Any] = [slice(None)] * len(row.ours)
        cut[row.ours.index(row.theirs[0])] = slice(first, -(-stop // unit))
        rows = row.to_theirs(_found(array[tuple(cut)].read(), self._path), n)
        if not self._inode == self._manifest() != 0:  # what is gone reads as zeros
            raise InputError(
                f"{self._path}: expected it to stay, found it removed while it was read, as a "
                "running training does: take a newer step"
            )
        return contiguous(rows[start - first * unit : stop - first * unit])

    def tokenizer(self) -> dict[str, bytes]:
        return tokenizers(self._path.parent)


class OrbaxWriter:
    """A run's folder with one checkpoint, step `progress.step`: a whole training state in float32
    if there is `progress`, or parameters alone, in `dtype`, at step 0.

    Training that finds parameters alone starts from them. `origin` goes into the manifest.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        dtype: np.dtype,
        *,
        progress: Progress | None,
        tokenizer: dict[str, bytes],
        origin: Mapping[str, Any],
        context_length: int = tensors.CONTEXT_LENGTH,
    ):
        self._config, self._progress, self._origin = config, progress, origin
        self._context_length = context_length
        self._kinds = tensors.KINDS if progress else (PARAMS,)
        self._dtype = np.dtype(np.float32) if progress else dtype
        self._step = progress.step if progress else 0
        self._path = folder / "checkpoints" / str(self._step)
        self._path.mkdir(parents=True)
        self._saved = {"model": architecture(config)}
        manifests.write_text(folder / "config.json", json.dumps(self._saved, indent=2) + "\n")
        self._tokenizer = {name: raw for name, raw in tokenizer.items() if name in TOKENIZERS}
        for name, raw in self._tokenizer.items():
            (folder / name).write_bytes(raw)
        self._arrays = {
            f"{kind}.{row.path}": self._create(f"{kind}.{row.path}", row)
            for kind in self._kinds
            for row in TABLE
        }
        # Vectors of all layers together are a file: they are kept until it is full.
        self._vectors: dict[str, np.ndarray] = {}
        self._hashing = ThreadPoolExecutor(2, "hash")
        self._hashes: list[Future[dict[str, list[Any]]]] = []

    def _create(self, name: str, row: Row) -> Any:
        shape = leaf_shape(row, self._config)
        file = list(shape)
        if len(row.shape(self._config.sizes)) == 2:
            start, stop = next(iter(self.parts(row)))
            file = [1] * row.stacked + [self._config.sizes[a] for a in row.ours]
            cut = row.stacked + row.ours.index(row.theirs[0])
            file[cut] = (stop - start) // row.unit(self._config.sizes)
        return self._new(name, self._dtype, shape, file)

    def _new(self, name: str, dtype: np.dtype, shape: Iterable[int], file: list[int]) -> Any:
        block = list(file)
        while np.prod(block) * dtype.itemsize > BLOCK_BYTES:
            even = [i for i, size in enumerate(block) if size % 2 == 0]
            if not even:
                break
            block[max(even, key=lambda i: block[i])] //= 2
        plain = {"name": "bytes", "configuration": {"endian": "little"}}
        sharding = {
            "chunk_shape": block,
            "codecs": [plain],
            "index_codecs": [plain, {"name": "crc32c"}],
        }
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(self._path / name)},
            "metadata": {
                "shape": list(shape),
                "data_type": str(dtype),
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": file}},
                "chunk_key_encoding": {"name": "default"},
                "fill_value": 0,
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            },
        }
        return _done(ts.open(spec, create=True, open=True, context=ts.Context(_CONTEXT)))

    def parts(self, row: Row, kind: str = PARAMS) -> Iterable[tuple[int, int]]:
        return tensors.parts(row, self._config.sizes, self._dtype.itemsize, SLICE_BYTES)

    def write(self, row: Row, layer: int, start: int, rows: np.ndarray, kind: str = PARAMS) -> None:
        n, name = self._config.sizes, f"{kind}.{row.path}"
        rows = tensors.cast(rows, self._dtype, f"{name}, layer {layer}")
        if rows.ndim == 1:
            shape = leaf_shape(row, self._config)
            whole = self._vectors.setdefault(name, np.empty(shape, self._dtype))
            target = whole[layer] if row.stacked else whole
            target[...] = row.to_ours(rows, n)
            return
        ours = row.to_ours(transposed(rows).T if row.ours[0] != row.theirs[0] else rows, n)
        first = start // row.unit(n)
        axis = row.ours.index(row.theirs[0])
        place: list[Any] = [slice(None)] * len(row.ours)
        place[axis] = slice(first, first + ours.shape[axis])
        at = (layer, *place) if row.stacked else tuple(place)
        array = self._arrays[name]
        _done(array[at].write(ours, can_reference_source_data_indefinitely=True))
        size = array.chunk_layout.write_chunk.shape[-len(row.ours) :][axis]
        places = [0] * len(row.ours)
        places[axis] = first // size
        key = "/".join(map(str, ([layer] if row.stacked else []) + places))
        self._hash(f"{name}/c/{key}")

    def _hash(self, file: str) -> None:
        """While it is still in the page cache; a slice of zeros has no file."""

        def entry() -> dict[str, list[Any]]:
            exists = (self._path / file).exists()
            return {file: manifests.entry(self._path / file, sync=True)} if exists else {}

        self._hashes.append(self._hashing.submit(entry))

    def stored(self, row: Row, rows: np.ndarray) -> np.ndarray:
        return tensors.cast(rows, self._dtype, row.path)

    def finish(self, sha256: str) -> None:
        for name, vector in self._vectors.items():
            _done(self._arrays[name].write(vector))
        scalars = {}
        if self._progress:
            scalars = {**self._progress._asdict(), "streak": 0}
            scalars["moments.count"] = self._progress.step - self._progress.skipped
        for name, value in scalars.items():
            _done(self._new(name, np.dtype(np.int32), (), []).write(np.int32(value)))
        leaves = {
            f"{kind}.{row.path}": [str(self._dtype), list(leaf_shape(row, self._config))]
            for kind in self._kinds
            for row in TABLE
        } | {name: ["int32", []] for name in scalars}
        self._write_orbax_metadata(leaves)
        files = {name: entry for hashed in self._hashes for name, entry in hashed.result().items()}
        self._hashing.shutdown()
        left = manifests.sizes(self._path).keys() - files.keys()
        files |= manifests.entries(self._path, left)
        meta: dict[str, Any] = {
            "config": self._saved,
            "context_length": self._context_length,
            "origin": {**self._origin, "sha256": sha256},
        }
        if self._tokenizer:  # training with another is refused
            raw = next(self._tokenizer[name] for name in TOKENIZERS if name in self._tokenizer)
            meta["tokenizer"] = hashlib.sha256(raw).hexdigest()
        if not self._progress:
            meta["params"] = str(self._dtype)
        else:
            meta["samples"] = self._progress.samples
        manifest = {"step": self._step, "meta": meta, "leaves": leaves, "files": files}
        manifests.write(self._path, manifest)

    def _write_orbax_metadata(self, leaves: dict[str, list[Any]]) -> None:
        """The file by which Orbax knows the tree (its PyTreeCheckpointHandler writes the same)."""
        tree = {}
        for name, (_, shape) in leaves.items():
            keys = name.split(".")
            tree[str(tuple(keys))] = {
                "key_metadata": [{"key": key, "key_type": 2} for key in keys],
                "value_metadata": {
                    "value_type": "jax.Array",
                    "skip_deserialize": False,
                    "write_shape": shape,
                },
            }
        metadata = {
            "tree_metadata": tree,
            "use_ocdbt": False,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": False,
            "custom_metadata": None,
        }
        manifests.write_text(self._path / "_METADATA", json.dumps(metadata))


def transposed(matrix: np.ndarray) -> np.ndarray:
    """A copy of matrix.T, in bands that stay in the cache: several times numpy's speed."""
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    for i in range(0, len(matrix), 32):
        out[:, i : i + 32] = matrix[i : i + 32].T
    return out


def contiguous(matrix: np.ndarray) -> np.ndarray:
    """A contiguous copy, if it is not contiguous yet."""
    if matrix.ndim == 2 and not matrix.flags.c_contiguous and matrix.T.flags.c_contiguous:
        return transposed(matrix.T)
    return np.ascontiguousarray(matrix)
