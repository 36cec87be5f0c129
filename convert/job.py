"""A conversion: slices from a reader to a writer, in the memory of a few slices.

The one invariant: the destination appears under its name whole, synced, and verified if asked for,
or not at all. Until then everything lies in a hidden folder beside it, which a conversion that is
broken off leaves behind and the next one removes.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bloomjax import manifests
from bloomjax.data.files import Progress
from bloomjax.errors import ConfigError, DoesNotFitError, InputError
from bloomjax.formats.names import Row
from bloomjax.formats.tensors import KINDS, PARAMS, Reader, Writer, order

_TRIAL_BYTES = 64 << 20


class Part(NamedTuple):
    kind: str
    row: Row
    layer: int
    start: int
    stop: int

    def read(self, reader: Reader) -> np.ndarray:
        return reader.read(self.row, self.layer, self.start, self.stop, self.kind)

    @property
    def name(self) -> str:
        name = self.row.hf.format(self.layer)
        return name if self.kind == PARAMS else f"{self.kind}/{name}"


def size(reader: Reader, kinds: tuple[str, ...]) -> int:
    """Bytes of all tensors of these kinds, as the reader gives them."""
    n = reader.config.sizes
    return sum(
        int(np.prod(row.shape(n))) * reader.dtype(row, kind).itemsize
        for kind in kinds
        for row, _ in order(reader.config)
    )


def all_parts(reader: Reader, writer: Writer, kinds: tuple[str, ...]) -> Iterator[Part]:
    for kind in kinds:
        for row, layer in order(reader.config):
            for start, stop in writer.parts(row, kind):
                yield Part(kind, row, layer, start, stop)


def transfer(reader: Reader, writer: Writer, kinds: tuple[str, ...]) -> str:
    """Everything from one to the other but `writer.finish`. The sha256 (hex) of all that was read:
    every tensor in `order`, row by row, in Hugging Face's layout and the dtype of the source."""
    digest = hashlib.sha256()
    progress, done = Progress("converting", size(reader, kinds)), 0

    def read(part: Part) -> np.ndarray:
        rows = part.read(reader)
        digest.update(np.ascontiguousarray(rows).view(np.uint8).data)
        return rows

    with ThreadPoolExecutor(1, "read") as pool:  # the next part is read while one is written
        ahead: deque[tuple[Part, Future[np.ndarray]]] = deque()
        for part in all_parts(reader, writer, kinds):
            ahead.append((part, pool.submit(read, part)))
            if len(ahead) > 1:
                done += _write(writer, *ahead.popleft())
                progress.update(done, peak())
        while ahead:
            done += _write(writer, *ahead.popleft())
    progress.done(f"{done / 1e6:,.0f} MB, {peak()}")
    return digest.hexdigest()


def _write(writer: Writer, part: Part, rows: Future[np.ndarray]) -> int:
    array = rows.result()
    writer.write(part.row, part.layer, part.start, array, part.kind)
    return array.nbytes
