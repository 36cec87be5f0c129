"""A folder's manifest: length and sha256 of every file, and the means to make and check it.

`manifest.json` holds its own digest and has one spelling, so that no bit of it, nor of any file it
lists, can change unseen. Files it does not list are nobody's concern.
"""

import hashlib
import heapq
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from bloomjax.errors import InputError

VERSION = 1
NAME = "manifest.json"

T = TypeVar("T")


def share(sizes: Mapping[str, int], me: int, count: int) -> list[str]:
    """This process's part of the files: the same cut on all, even in bytes."""
    loads, mine = [(0, process) for process in range(count)], []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, process = heapq.heappop(loads)
        heapq.heappush(loads, (load + sizes[name], process))
        if process == me:
            mine.append(name)
    return mine


def sizes(path: Path) -> dict[str, int]:
    files = (Path(root, name) for root, _, names in os.walk(path) for name in names)
    return {
        file.relative_to(path).as_posix(): file.stat().st_size
        for file in files
        if not file.name.startswith(NAME)
    }


def entry(file: Path, sync: bool = False) -> list[Any]:
    """[length, sha256]. Raises OSError."""
    with file.open("rb") as f:
        if sync:
            os.fsync(f.fileno())
        digest = hashlib.file_digest(f, "sha256").hexdigest()
        return [f.tell(), digest]


def entries(path: Path, names: Iterable[str]) -> dict[str, list[Any]]:
    """What a manifest says of these files, which are then on disk: Orbax syncs only its arrays."""
    names = list(names)
    found = in_threads(lambda name: entry(path / name, sync=True), names)
    return dict(zip(names, found, strict=True))


def in_threads(work: Callable[[str], T], names: list[str]) -> list[T]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
        return list(pool.map(work, names))


def _dump(manifest: Mapping[str, Any]) -> str:
    body = dict(manifest) | {"version": VERSION}
    body["digest"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body, sort_keys=True, indent=1) + "\n"


def write(path: Path, manifest: Mapping[str, Any]) -> None:
    temporary = path / f"{NAME}.tmp"
    write_text(temporary, _dump(manifest))
    temporary.rename(path / NAME)
    sync(path)


def read(path: Path) -> tuple[dict[str, Any], str]:
    """The manifest, and what is wrong with it ("": nothing). InputError when it is too new."""
    try:
        text = (path / NAME).read_bytes()
        manifest = json.loads(text)
        body = {key: value for key, value in manifest.items() if key not in ("version", "digest")}
        version = manifest.get("version")
        # A manifest holds its own digest and has one spelling, so no bit of it can change unseen.
        if version == VERSION and _dump(body).encode() == text:
            return manifest, "" if _sound(manifest) else f"{NAME} is none of ours"
    except FileNotFoundError:
        return {}, f"{NAME} is missing"
    except OSError:
        return {}, f"{NAME} cannot be read"
    except (ValueError, AttributeError, RecursionError):
        return {}, f"{NAME} has other bytes"
    newer = {key: value for key, value in manifest.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(newer, sort_keys=True).encode()).hexdigest()
    if version != VERSION and manifest.get("digest") == digest:
        raise InputError(
            f"{path / NAME}: expected manifest version {VERSION}, found {version}: use the "
            "bloomjax that wrote it"
        )
    return {}, f"{NAME} has other bytes"


def _sound(manifest: Mapping[str, Any]) -> bool:
    """Whether it says what `write` is given, and names files of its folder only: anybody can make
    a manifest with the right digest."""

    def pairs(name: str) -> list[tuple[str, list[Any]]]:
        found = manifest.get(name)
        entries = list(found.items()) if type(found) is dict else [("", [])]
        return [(k, v if type(v) is list and len(v) == 2 else []) for k, v in entries]

    def inside(name: str) -> bool:
        return bool(name) and not name.startswith("/") and ".." not in name.split("/")

    return (
        type(manifest.get("step")) is int
        and type(manifest.get("meta")) is dict
        and all(inside(n) and v and type(v[0]) is int for n, v in pairs("files"))
        and all(
            inside(n) and v and type(v[0]) is str and type(v[1]) is list
            and all(type(size) is int and size >= 0 for size in v[1])
            for n, v in pairs("leaves")
        )
    )  # fmt: skip


def write_text(file: Path, text: str) -> None:
    with file.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def sync(folder: Path) -> None:
    """Makes names in a folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
