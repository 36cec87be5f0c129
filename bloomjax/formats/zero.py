"""What DeepSpeed's optimizer keeps: float32 weights and AdamW's moments, in partitions.

The BF16 optimizer, which BLOOM's runs had, lays the parameters of a group (Megatron has three: two
halves with weight decay, and one without) flat, one after another, pads, and cuts the whole into as
many equal partitions as there are data-parallel ranks; each rank saves its own. So a rank's part of
a parameter lies in one or more pieces; `param_slice_mappings` says where (DeepSpeed's
runtime/bf16_optimizer.py and checkpoint/ds_to_universal.py). A universal folder has one file per
parameter and kind instead. The one invariant: pieces are in order and fill the parameter exactly.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from bloomjax.errors import InputError
from bloomjax.formats.tensors import MU, NU, PARAMS, Stored, pread_into
from bloomjax.formats.torchfile import read_torch

UNIVERSAL = {PARAMS: "fp32", MU: "exp_avg", NU: "exp_avg_sq"}
_FILE = re.compile(r"bf16_zero_pp_rank_(\d{1,5})_mp_rank_(\d{1,5})_optim_states\.pt")

Names = dict[str, list[Any]]  # by the parameter's name: a shard for each tensor-parallel rank


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A tensor whose elements lie in several pieces, one after another."""

    pieces: tuple[Stored, ...]  # [elements]
    dtype: np.dtype
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """As of `Stored`."""
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        flat = out.reshape(-1)
        wanted = start * math.prod(self.shape[1:])  # elements before `out`
        before = 0  # elements before the piece
        for piece in self.pieces:
            first, last = max(wanted, before), min(wanted + flat.size, before + piece.shape[0])
            if first < last:
                offset = piece.offset + (first - before) * self.dtype.itemsize
                pread_into(piece.file, offset, flat[first - wanted : last - wanted])
            before += piece.shape[0]
        return out


def grid(paths: Mapping[tuple[int, int], Path], what: str) -> tuple[int, int]:
    """How many ranks the files, by two numbers each, are of. InputError if one is missing."""
    size = max(a for a, _ in paths) + 1, max(b for _, b in paths) + 1
    if size[0] * size[1] != len(paths):
        a, b = next(key for key in product(range(size[0]), range(size[1])) if key not in paths)
        raise InputError(
            f"{next(iter(paths.values())).parent}: expected {what} of {size[0]} x {size[1]} ranks, "
            f"found that of ranks {a}, {b} missing: bring it back from a copy"
        )
    return size


def partitions(folder: Path, layers: Mapping[str, list[Stored]]) -> dict[str, Names]:
    """Weights and moments by kind and name, from the files of the BF16 optimizer; {} if there are
    none.

    `layers` are the layer files' tensors, for their shapes on each tensor-parallel rank. Pipeline
    stages after the first have the tied embedding too, where it is a copy that is kept equal, and
    its layer norm, where it is not used: the first stage's count. InputError for what does not fit
    together.
    """
    files = {}
    for path in folder.iterdir():
        if match := _FILE.fullmatch(path.name):
            files[int(match[2]), int(match[1])] = path
    if not files:
        return {}
    tp = len(next(iter(layers.values())))
    ranks, dp = grid(files, "files of the optimizer")
    if ranks % tp:
        raise InputError(f"{folder}: expected optimizer files for {tp} x pp ranks, found {ranks}")
    pieces: dict[tuple[str, str], list[list[Stored]]] = {}
    for rank, d in product(range(ranks), range(dp)):
        stage, t = divmod(rank, tp)
        for kind, name, piece in _pieces(files[rank, d]):
            if not (stage and name.startswith("tied_modules.")):
                pieces.setdefault((kind, name), [[] for _ in range(tp)])[t].append(piece)
    found: dict[str, Names] = {kind: {} for kind in UNIVERSAL}
    for (kind, name), shards in pieces.items():
        counts = [sum(piece.shape[0] for piece in shard) for shard in shards]
        shape = layers[name][0].shape if name in layers else (counts[0],)
        if counts != [math.prod(shape)] * tp:
            raise InputError(
                f"{folder}: expected {math.prod(shape)} elements of {name} on each of {tp} ranks, "
                f"found {counts[:8]} in the optimizer's files: are they of another step?"
            )
        found[kind][name] = [Pieces(tuple(shard), np.dtype(np.float32), shape) for shard in shards]
    return found


def _pieces(path: Path) -> Iterator[tuple[str, str, Stored]]:
    """(kind, parameter, piece) of one file, in the order of the parameters."""
    try:
        state = read_torch(path)["optimizer_state_dict"]
        masters, seen = state["single_partition_of_fp32_groups"], set()
        for group, mapping in enumerate(state["param_slice_mappings"]):
            moments = state["base_optimizer_state"]["state"][group]
            flat = {PARAMS: masters[group], MU: moments["exp_avg"], NU: moments["exp_avg_sq"]}
            for name, address in mapping.items():
                if type(name) is not str or name in seen:
                    raise ValueError("no name of a parameter, or one twice")
                seen.add(name)
                start, count = address.state["start"], address.state["numel"]
                for kind, whole in flat.items():
                    yield kind, name, _piece(whole, start, count)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        found = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: expected the state of DeepSpeed's BF16 optimizer, found {found}: is it of "
            "another optimizer, or damaged?"
        ) from error


def _piece(whole: Stored, start: int, count: int) -> Stored:
    whole_size, *more = whole.shape
    if more or whole.dtype != np.float32:
        raise ValueError(f"a partition of {whole.dtype} {list(whole.shape)}")
    if not (type(start) is type(count) is int and 0 <= start <= start + count <= whole_size):
        raise ValueError("a piece that is outside of its partition")
    return Stored(whole.file, whole.offset + 4 * start, whole.dtype, (count,))


def universal(folder: Path) -> dict[str, Names]:
    """As `partitions`, with one shard each, of a folder zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt."""
    found: dict[str, Names] = {}
    for path in folder.iterdir():
        for kind, file in UNIVERSAL.items():
            if re.fullmatch(r"[\w.]{1,128}", path.name) and (path / f"{file}.pt").exists():
                tensor = read_torch(path / f"{file}.pt")
                if type(tensor) is dict:
                    tensor = tensor.get("param")
                if type(tensor) is not Stored:
                    raise InputError(f"{path}: expected a tensor in {file}.pt, found none")
                found.setdefault(kind, {})[path.name] = [tensor]
    return found
