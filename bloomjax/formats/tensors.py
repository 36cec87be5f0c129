"""What the formats have in common: a model that can be read, or written, by rows of its tensors.

A reader opens a model and reads headers only; `read` then gives any rows of any tensor, in Hugging
Face's layout and in the dtype of the file, with nothing else held in memory. A writer knows all
sizes beforehand, so that rows can be written where they belong as they come. Rows are those of
`formats.names`; a conversion is a loop that hands slices from one to the other.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from bloomjax.config import LARGEST, ModelConfig, base_config, freeze
from bloomjax.errors import InputError
from bloomjax.formats.names import TABLE, Row, Sizes

CONTEXT_LENGTH = 2048  # of BLOOM's training, and of whatever does not say
PARAMS, MU, NU = KINDS = ("params", "moments.mu", "moments.nu")
_ALIGNMENT = 64  # bytes
_PIECE, _READERS = 4 << 20, min(8, os.cpu_count() or 1)
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class Progress(NamedTuple):
    """Where training stood; with it go the moments of AdamW (the kinds MU and NU)."""

    step: int
    samples: int  # sequences consumed
    skipped: int = 0  # of the steps, those that changed nothing


class Reader(Protocol):
    """A model in some format, opened. `read` may be called by several threads at a time."""

    @property
    def format(self) -> str:
        """As --to names it."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def origin(self) -> dict[str, Any]:
        """Where it came from (JSON): name, commit, ...; under "source", the same of what it was
        converted from. No paths: it is published with the weights."""

    @property
    def context_length(self) -> int:
        """Tokens of a row in training, as far as the source says; with ALiBi no limit."""

    @property
    def progress(self) -> Progress | None:
        """None: it has no optimizer state, and PARAMS is the only kind."""

    def dtype(self, row: Row, kind: str = PARAMS) -> np.dtype:
        """Of what `read` returns."""

    def read(self, row: Row, layer: int, start: int, stop: int, kind: str = PARAMS) -> np.ndarray:
        """Rows `start` to `stop` of `row.theirs` of one layer (0 outside of blocks). InputError if
        the file has changed or ends too early."""

    def tokenizer(self) -> dict[str, bytes]:
        """Files of the tokenizer by the names that Hugging Face gives them; {} if it has none."""


class Writer(Protocol):
    """A model in some format, being written into a folder or file of its own."""

    def parts(self, row: Row, kind: str = PARAMS) -> Iterable[tuple[int, int]]:
        """The (start, stop) in which `write` wants the rows of each layer of a tensor: they cover
        it in order, begin and end at whole units, and are small enough to hold a few of them."""

    def write(self, row: Row, layer: int, start: int, rows: np.ndarray, kind: str = PARAMS) -> None:
        """Rows of `row.theirs` from `start` on, cast to what is being written. By one thread."""

    def stored(self, row: Row, rows: np.ndarray) -> np.ndarray:
        """What a reader of the written file gives for these rows: cast, or quantised and back."""

    def finish(self, sha256: str) -> None:
        """All tensors have been written: complete the files, with the digest of what was read."""


def parts(row: Row, sizes: Sizes, itemsize: int, limit: int) -> Iterator[tuple[int, int]]:
    """Rows of `row.theirs` cut into whole units of at most `limit` bytes (or one unit); a vector,
    which is small, in one piece."""
    shape, unit = row.shape(sizes), row.unit(sizes)
    unit_bytes = unit * int(np.prod(shape[1:])) * itemsize
    step = unit * max(1, limit // unit_bytes) if len(shape) > 1 else shape[0]
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def cast(rows: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`rows` in another float dtype, rounded to nearest even. InputError, with the name of the
    tensor, if a finite number becomes infinite."""
    if rows.dtype == dtype:
        return rows
    with np.errstate(over="ignore"):
        out = rows.astype(dtype)
    if np.count_nonzero(np.isinf(out)) > np.count_nonzero(np.isinf(rows)):
        other = "bfloat16 or float32" if dtype == np.float16 else "float32"
        raise InputError(f"{name}: expected numbers that fit {dtype}, found larger: use {other}")
    return out


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor that lies in one piece in a file, row after row, little-endian.

    Whoever makes one has seen that offset and shape lie within the file.
    """

    file: Path
    offset: int  # bytes
    dtype: np.dtype
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows along the first dimension, read with pread (mapped pages would count as resident).

        InputError when the file does not hold them any more.
        """
        width = int(np.prod(self.shape[1:], dtype=np.int64))
        out = empty((stop - start, *self.shape[1:]), self.dtype)
        pread_into(self.file, self.offset + start * width * self.dtype.itemsize, out)
        return out


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """As np.empty, but where JAX can take it for an array of the CPU without a copy."""
    size = math.prod(shape) * dtype.itemsize
    data = np.empty(size + _ALIGNMENT, np.uint8)
    start = -data.ctypes.data % _ALIGNMENT
    return data[start : start + size].view(dtype).reshape(shape)


def pread_into(file: Path, offset: int, out: np.ndarray) -> None:
    """Fills a contiguous array with the bytes of `file` from `offset` on. InputError if too few.

    Several pieces at a time: fresh memory costs more than the copy, and networks have latency.
    """
    view = out.reshape(-1).view(np.uint8).data
    try:
        handle = os.open(file, os.O_RDONLY)
        try:
            starts = range(0, len(view), _PIECE)
            pieces = [view[start : start + _PIECE] for start in starts]
            places = [offset + start for start in starts]
            with ThreadPoolExecutor(_READERS) as pool:
                at_once = pool.map if len(pieces) > 1 else map
                done = sum(at_once(functools.partial(_pread, handle), pieces, places))
        finally:
            os.close(handle)
    except OSError as error:
        raise InputError(f"{file}: expected to read tensors, found: {error.strerror}") from error
    if done < len(view):
        raise InputError(
            f"{file}: expected {len(view)} bytes at {offset}, found {done}: the file was cut "
            "short; bring it back from a copy"
        )


def _pread(handle: int, piece: memoryview, offset: int) -> int:
    done = 0
    while done < len(piece) and (count := os.preadv(handle, [piece[done:]], offset + done)):
        done += count
    return done


def model_config(
    source: object,
    *,
    layers: Any,
    width: Any,
    heads: Any,
    vocab_size: Any,
    layer_norm_epsilon: Any = 1e-5,
    **fields: Any,
) -> ModelConfig:
    """The configuration of a model that `source` describes; `fields` are others of ModelConfig.

    InputError unless each number is one that a BLOOM could have: nothing may be allocated, or
    looped over, because a file says so.
    """
    for name, value, most in (
        ("layers", layers, LARGEST["layers"]),
        ("width", width, LARGEST["width"]),
        ("heads", heads, LARGEST["heads"]),
        ("vocabulary", vocab_size, LARGEST["vocab_size"]),
    ):
        if type(value) is not int or not 1 <= value <= most:
            raise InputError(
                f"{source}: expected {name} of 1 to {most}, found {str(value)[:40]!r}: is it a "
                "BLOOM's?"
            )
    if width % heads:
        raise InputError(f"{source}: expected heads to divide width {width}, found {heads}")
    if type(layer_norm_epsilon) is not float or not 0 < layer_norm_epsilon < 1:
        found = str(layer_norm_epsilon)[:40]
        raise InputError(f"{source}: expected a layer norm epsilon below 1, found {found!r}")
    known = {"layers": layers, "width": width, "heads": heads, "vocab_size": vocab_size}
    base = freeze(base_config()).model
    return dataclasses.replace(base, **known, layer_norm_epsilon=layer_norm_epsilon, **fields)


def licence(origin: Mapping[str, Any]) -> str | None:
    """That of weights that came from `origin`, as the hub spells it: BLOOM's own, which whatever
    derives from BLOOM keeps. None for what a run of ours trained from nothing."""
    while isinstance(before := origin.get("source"), Mapping):
        origin = before
    return None if origin.get("format") == "orbax" else "bigscience-bloom-rail-1.0"


def check_tensors(
    source: object, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """InputError that lists every tensor that is missing, unknown, or of another shape."""
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is unknown" for name in found if name not in expected]
    wrong += [
        f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise InputError(
            f"{source}: expected the {len(expected)} tensors of a BLOOM, found that "
            f"{'; '.join(wrong[:8])}{more}"
        )


def order(config: ModelConfig) -> Iterator[tuple[Row, int]]:
    """Every (row, layer), layer by layer, as files of other formats hold them."""
    front = [row for row in TABLE if not row.stacked and not row.path.startswith("ln_")]
    back = [row for row in TABLE if row.path.startswith("ln_")]
    yield from ((row, 0) for row in front)
    for layer in range(config.layers):
        yield from ((row, layer) for row in TABLE if row.stacked)
    yield from ((row, 0) for row in back)
