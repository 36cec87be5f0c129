"""A conversion: slices from a reader to a writer, in the memory of a few slices.

The one invariant: the destination appears under its name whole, verified if asked for, and synced,
or not at all. Until then everything lies in a hidden folder beside it, which a conversion that is
broken off leaves behind and the next one removes.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import resource
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bloomjax import manifests
from bloomjax.data.files import Progress
from bloomjax.errors import ConfigError, DoesNotFitError, InputError, UserError
from bloomjax.formats.names import Row
from bloomjax.formats.tensors import PARAMS, Reader, Writer, order, parts
from bloomjax.metrics import amount

_TRIAL_BYTES = 64 << 20
log = logging.getLogger("bloomjax")


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
    progress.done(f"{amount(done)}, {peak()}")
    return digest.hexdigest()


def _write(writer: Writer, part: Part, rows: Future[np.ndarray]) -> int:
    array = rows.result()
    writer.write(part.row, part.layer, part.start, array, part.kind)
    return array.nbytes


def verify(reader: Reader, writer: Writer, written: Reader, kinds: tuple[str, ...]) -> None:
    """Compare both sides tensor by tensor, and print the sha256 of each as it was written (its rows
    in Hugging Face's layout, as `written` reads them), with its name.

    InputError that names the first tensor of which a bit is not what it has to be.
    """
    progress, done = Progress("verifying", size(reader, kinds)), 0
    digest, previous = hashlib.sha256(), ""
    for part in all_parts(reader, writer, kinds):
        if part.name != previous:
            _print_hash(digest, previous)
            digest, previous = hashlib.sha256(), part.name
        rows = part.read(reader)
        found = np.ascontiguousarray(part.read(written))
        expected = np.ascontiguousarray(writer.stored(part.row, rows))
        if found.dtype != expected.dtype or found.tobytes() != expected.tobytes():
            raise InputError(
                f"{part.name}: expected rows {part.start} to {part.stop} as they were converted, "
                "found others; nothing was kept: run it again, and suspect disk or memory"
            )
        digest.update(found.view(np.uint8).data)
        done += rows.nbytes
        progress.update(done, peak())
    _print_hash(digest, previous)
    progress.done("both sides are equal")


def _print_hash(digest: Any, name: str) -> None:
    """A reader of standard output that has seen enough is no reason to stop."""
    if name:
        with contextlib.suppress(BrokenPipeError):
            print(f"{digest.hexdigest()}  {name}", flush=True)


def peak() -> str:
    """The most memory that this process has had resident."""
    return f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"


@contextmanager
def appearing(path: Path, needed: int) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends well.

    ConfigError if `path` is there already or another conversion is at it, DoesNotFitError if the
    disk has less than `needed` bytes, InputError if it cannot be written.
    """
    check_absent(path)
    folder = path.with_name(f".{path.name}.converting")
    with _writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # dropped with the process
        except BlockingIOError:
            raise ConfigError(f"{path}: another conversion is writing it: wait for it") from None
        except OSError:
            log.warning("%s: no file locks here, so a second conversion would go unseen", folder)
        try:
            with _writing(path):
                _clear(folder)
                if (free := shutil.disk_usage(folder).free) < needed:
                    raise DoesNotFitError(
                        f"{path}: expected {amount(needed)} of free disk, found {amount(free)}: "
                        "make room, choose a smaller --dtype or another disk"
                    )
                new = folder / path.name
                yield new
                sync(new)
                check_absent(path)  # a rename would replace a file that has come meanwhile
                new.rename(path)
                manifests.sync(path.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Errors of the system while `path` is written are the user's to mend."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def check_absent(path: Path) -> None:
    """ConfigError if something is there: nothing is ever overwritten."""
    if os.path.lexists(path):
        raise ConfigError(f"{path}: expected nothing there, found something: choose another name")


def _clear(folder: Path) -> None:
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def sync(path: Path) -> None:
    """Every file and folder from `path` down is on disk."""
    for root, _, names in os.walk(path):
        for name in names:
            manifests.sync(Path(root, name))
        manifests.sync(Path(root))
    manifests.sync(path)


def cannot_write(path: Path, error: OSError) -> UserError:
    """What to tell of a destination that the system refuses."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DoesNotFitError(f"{path}: the disk is full: make room and run it again")
    return InputError(
        f"{path}: expected a folder that can be written, found: {error.strerror or error}"
    )


def rate(reader: Reader, folder: Path) -> float:
    """Bytes per second of a trial: the first tensors' rows, read, and written beside `folder`."""
    start, done = time.monotonic(), 0
    with _writing(folder), tempfile.TemporaryFile(dir=folder) as file:
        for row, layer in order(reader.config):
            for first, last in parts(row, reader.config.sizes, 4, _TRIAL_BYTES // 4):
                rows = reader.read(row, layer, first, last)
                file.write(np.ascontiguousarray(rows).view(np.uint8).data)
                done += rows.nbytes
                if done >= _TRIAL_BYTES:
                    break
            if done >= _TRIAL_BYTES:
                break
        file.flush()
        os.fsync(file.fileno())
    return done / (time.monotonic() - start)
