"""Small files that others wrote: read only after their size and their place have been checked.

The invariant: nothing is read, parsed or followed because a file says so. Names lead to regular
files of their folder (or to the blobs of the Hub's cache that it belongs to), sizes are bounded
before anything is allocated, and JSON may not repeat a key.
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from bloomjax.errors import InputError

MAX_JSON = 4 << 20  # bytes: the header or index of a BLOOM of 1000 layers has 1.8 MB
_MAX_VALUES = 200_000  # of which it has 110,000; a value takes up to 120 bytes once parsed


def member(folder: Path, name: str) -> Path | None:
    """The file `name` of `folder`, or None if there is none.

    InputError unless `name` is a plain name, and a regular file that lies in the folder itself;
    the links of the Hub's cache, snapshots/COMMIT/NAME -> ../../blobs/HASH, are the exception.
    """
    if name in ("", ".", "..") or not name.isprintable() or set(name) & {"/", "\\"}:
        raise InputError(f"{folder}: expected names of files in it, found {name[:80]!r}")
    path = folder / name
    try:
        real = path.resolve(strict=True)
        regular = stat.S_ISREG(real.stat().st_mode)  # opening a pipe would wait for its writer
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long
        raise InputError(f"{path}: expected a file, found one that cannot be opened") from error
    if not regular:
        raise InputError(f"{path}: expected a file, found a folder or a device")
    base = folder.resolve()
    cache = base.parent.parent if base.parent.name == "snapshots" else base
    if real.parent not in (base, cache / "blobs"):
        raise InputError(f"{path}: expected a file of this folder, found a link out of it: copy it")
    return path


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file and its size in bytes. InputError if it is none, or cannot be read."""
    try:
        # O_NONBLOCK: a pipe that nobody writes to must not hold us up.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as f:
            status = os.fstat(f.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{path}: expected a file, found a device")
            yield f, status.st_size
    except OSError as error:
        raise InputError(f"{path}: expected a file, found: {error.strerror}") from error


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole file. InputError if it is larger than `limit` bytes or cannot be read."""
    with opened(path) as (file, size):
        if size > limit:
            raise InputError(
                f"{path}: expected at most {limit:,} bytes, found {size:,}: is it the file of this "
                "name?"
            )
        return file.read(size)


def parse_json(raw: bytes, source: object) -> dict[str, Any]:
    """The object that `raw` spells in JSON. InputError if it spells none, repeats a key, or has
    more values than anything of a BLOOM needs."""
    if len(raw) > MAX_JSON or sum(map(raw.count, (b"{", b"[", b","))) > _MAX_VALUES:
        raise InputError(f"{source}: expected the JSON of a BLOOM, found one far larger")
    try:
        parsed = json.loads(raw.decode(), object_pairs_hook=_unique)  # and never UTF-16
    except RecursionError as error:
        raise InputError(f"{source}: expected JSON, found nesting without end") from error
    except ValueError as error:
        found = " ".join(str(error).split())[:120]
        raise InputError(f"{source}: expected JSON, found {found}") from error
    if not isinstance(parsed, dict):
        raise InputError(f"{source}: expected a JSON object, found {type(parsed).__name__}")
    return parsed


def read_json(path: Path) -> dict[str, Any]:
    """`parse_json` of a file."""
    return parse_json(read_bytes(path, MAX_JSON), path)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) < len(pairs):
        raise ValueError("a key twice")
    return parsed
