"""Checkpoints: written by Orbax in the background, hashed, restored onto any mesh.

`FOLDER/STEP/` holds one zarr3 folder a leaf (so a broken file names its tensor, and a sub-tree is
read alone) and `manifest.json`: the leaves' dtypes and shapes, the caller's `meta`, and length and
sha256 of every other file. The one invariant: a folder with a plain integer name was once complete,
hashed and synced to disk. Everything before that is `STEP.saving`, everything on its way out
`STEP.deleting` (both removed when the next run starts), and what no longer matches its manifest is
set aside as `STEP.corrupt`. The folder must be seen by all processes and rename atomically (POSIX).
"""

import dataclasses
import errno
import fcntl
import importlib
import itertools
import json
import logging
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from bloomjax import manifests
from bloomjax.errors import ConfigError, DoesNotFitError, InputError, PeerLostError, UserError
from bloomjax.metrics import amount
from bloomjax.processes import on_first

log = logging.getLogger("bloomjax")
# Orbax reports each phase, and each failure with its traceback, through absl. The failures reach
# the user as our one line.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)

# A file is a shard or a part of it, and is read whole: this bounds what a process reads (and holds
# for a moment) beside its own when the mesh has changed. At 512 chips a shard of 176B is smaller.
_FILE_BYTES = 2**28
_BARRIER_SECONDS = 1200  # for the slowest process to write and hash its share; as Orbax's own
# Stacks of blocks below this key end in rows of zeros, as many as pipeline stages ask for: what a
# mesh has too many of is dropped, and what it lacks is added.
STACK = "blocks"
_ALTERED = ("", "is missing", "cannot be read", "has another length", "has other bytes")

PyTree = Any  # nested dictionaries with string keys
Like = PyTree | Callable[[dict[str, Any]], PyTree]
FOLDER, _STEP = "checkpoints", re.compile("0|[1-9][0-9]*")
_saves = itertools.count()  # the same on all processes: a barrier's name must be new


class Restored(NamedTuple):
    step: int
    state: PyTree
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one training run, which has the folder for itself until `close`.

    All processes construct it and call its methods in the same order; whatever one of them raises
    about the folder, all raise.
    """

    def __init__(self, folder: Path, keep: int):
        """`keep`: how many of the newest steps stay.

        Raises ConfigError when another process of this or another host uses the folder, InputError
        when it cannot be written.
        """
        self.folder, self.keep = folder.absolute(), keep
        self._lock: int | None = None
        self._pending: Future[None] | None = None
        on_first(self._open)  # by process 0 for all
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._orbax = _ocp().AsyncCheckpointer(_handler())

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # The kernel drops this lock with its process, so a killed run leaves none behind.
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(lock, 1000, 0).decode(errors="replace").strip()
                os.close(lock)
                raise ConfigError(
                    f"{self.folder} is in use by {holder or 'another run'}: expected one run a "
                    "folder; stop that one or choose another workdir"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                    raise
                log.warning("%s: no file locks here, so a second run would go unseen", self.folder)
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            self._lock = lock
            for path in self.folder.iterdir():
                if re.match(r"\d+\.(saving|deleting)", path.name):
                    shutil.rmtree(path)
        except OSError as error:
            raise _cannot_write(self.folder, error) from error

    def check_room(self, state: PyTree) -> None:
        """Raises DoesNotFitError unless the disk holds the checkpoints of `state` that are to come.

        `state` may be shapes only. At its peak a run has `keep` steps and the one being written.
        """
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

        def check() -> None:
            count = max(1, self.keep + 1 - len(_steps(self.folder)))
            free = shutil.disk_usage(self.folder).free
            if free < count * size:
                raise DoesNotFitError(
                    f"{self.folder}: expected {amount(count * size)} of free disk ({count} "
                    f"checkpoints of {amount(size)}), found {amount(free)}: make room, or lower "
                    "run.keep_checkpoints"
                )

        on_first(check)

    def save(self, step: int, state: PyTree, meta: Mapping[str, Any]) -> None:
        """Starts to write `state` (nested dict of jax.Array) and `meta` (JSON) as `step`.

        Returns when the arrays may be donated or changed. First waits for the save before, and
        raises what that one met (see `wait`); then DoesNotFitError when the disk is too small,
        ValueError when the step is there already or `meta` is not JSON.
        """
        self.wait()
        self.check_room(state)
        if on_first(lambda: step in _steps(self.folder)):
            raise ValueError(f"step {step} is already in {self.folder}")
        manifest = {"step": step, "meta": json.loads(json.dumps(meta)), "leaves": _leaves(state)}
        path, begun = self.folder / f"{step}.saving", time.monotonic()
        ocp = _ocp()
        cut = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_FILE_BYTES), state)
        try:
            self._orbax.save(path, args=ocp.args.PyTreeSave(state, save_args=cut))
        except (OSError, jax.errors.JaxRuntimeError) as error:
            raise self._failed(step, error) from error
        self._pending = self._pool.submit(self._finish, path, manifest, begun, next(_saves))

    def _finish(self, path: Path, manifest: dict[str, Any], begun: float, save: int) -> None:
        """The background half: wait for Orbax, hash, and give the folder its name."""
        step, me, count = manifest["step"], jax.process_index(), jax.process_count()
        # Collectives over devices would mix with those of the training step; these barriers and
        # the shared folder do not.
        barrier = _ocp().multihost.get_barrier_sync_fn()
        try:
            self._orbax.wait_until_finished()
            sizes = manifests.sizes(path)
            files = manifests.entries(path, manifests.share(sizes, me, count))
            if me:
                manifests.write_text(path / f"{manifests.NAME}.{me}", json.dumps(files))
            barrier(key=f"bloomjax_hashed_{save}", timeout_ms=_BARRIER_SECONDS * 1000)
            if me == 0:
                for peer in range(1, count):
                    part = path / f"{manifests.NAME}.{peer}"
                    files |= json.loads(part.read_text())
                    part.unlink()
                # Peers share the files out by their own view of a shared folder, which may lag.
                files |= manifests.entries(path, sizes.keys() - files.keys())
                manifests.write(path, manifest | {"files": files})
                path.rename(self.folder / str(step))
                manifests.sync(self.folder)
            barrier(key=f"bloomjax_named_{save}", timeout_ms=_BARRIER_SECONDS * 1000)
        except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
            raise self._failed(step, error) from error
        if me == 0:
            total, seconds = sum(sizes.values()), time.monotonic() - begun
            log.info("checkpoint %d: %s, complete after %.1f s", step, amount(total), seconds)
            self._prune()

    def _failed(self, step: int, error: Exception) -> UserError:
        if jax.process_index() == 0:  # a half-written step would keep a full disk full
            for path in self.folder.glob(f"{step}.saving*"):
                shutil.rmtree(path, ignore_errors=True)
        return _cannot_write(self.folder / str(step), error)

    def _prune(self) -> None:
        for step in _steps(self.folder)[: -self.keep]:
            # Renamed first: a kill while files go must not leave half a step under a step's name.
            going = self.folder / f"{step}.deleting"
            try:
                (self.folder / str(step)).rename(going)
                shutil.rmtree(going)
            except OSError as error:
                log.warning("checkpoint %d could not be deleted: %s", step, error)

    def restore(self, like: Like) -> Restored | None:
        """As the function `restore`; the broken steps it passed over are set aside."""
        self.wait()
        found, broken = _restore(self.folder, like)
        if found:
            on_first(lambda: _set_aside([self.folder / str(step) for step in broken]))
        return found

    def wait(self) -> None:
        """Returns when the last save is complete on disk under its name.

        Raises what it met: InputError when the folder could not be written, DoesNotFitError when
        the disk was full, PeerLostError when another process did not finish its share.
        """
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def close(self) -> None:
        """`wait`, and leave the folder to others (even when `wait` raises)."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._orbax.close()
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None


def restore(folder: Path, like: Like, only: int | None = None) -> Restored | None:
    """The newest whole step of `folder` (or step `only`), on the shardings of `like`; None when
    there never was one.

    `like` is a tree of jax.ShapeDtypeStruct with shardings, or a function from the step's `meta` to
    one. Its top-level keys say what is read and verified ("params" alone for generation); below
    them it must have exactly the stored leaves. A process reads only the files that its shards
    touch, and verifies only its share of them all. A step that does not match its manifest is named
    in a warning and the one before is taken. Only reads, so it may look into the folder of a
    running training. All processes call it together. Raises InputError when a leaf differs from
    what is stored (nothing is ever cast), when no step is whole, or when a newer bloomjax wrote it.
    """
    return _restore(folder.absolute(), like, only)[0]


def newest_meta(folder: Path, only: int | None = None) -> tuple[int, dict[str, Any]] | None:
    """Step and `meta` of the newest step (or of `only`) with a sound manifest; its arrays are not
    looked at."""
    for step in reversed(_steps(folder) if only is None else [only]):
        manifest, fault = _manifest(folder, step)
        if not fault:
            return step, manifest["meta"]
    return None


class Whole(NamedTuple):
    """A step of which every file is as it was written."""

    path: Path
    manifest: dict[str, Any]


def newest_whole(path: Path) -> Whole:
    """The newest whole step of a workdir, of its `checkpoints`, or the step at `path`.

    Every byte of it is verified. InputError if there is none.
    """
    folder, only = locate(path)

    def wanted(manifest: dict[str, Any]) -> set[str]:
        size = sum(size for size, _ in manifest["files"].values())
        log.info("verifying checkpoint %d: %s", manifest["step"], amount(size))
        return set(manifest["leaves"])

    manifest, _ = _find(folder, only, wanted)
    if manifest is None:
        raise InputError(f"{path}: expected a checkpoint, found none: train first")
    return Whole(folder / str(manifest["step"]), manifest)


def locate(path: Path) -> tuple[Path, int | None]:
    """The folder of checkpoints that `path` (a workdir, its `checkpoints`, a step) means, and the
    step if it means one."""
    path = path.resolve()
    if (path / manifests.NAME).is_file() and _STEP.fullmatch(path.name):
        return path.parent, int(path.name)
    return (path / FOLDER if (path / FOLDER).is_dir() else path), None


def is_run(path: Path) -> bool:
    """Whether `path` is a training workdir, its `checkpoints`, or a step."""
    folder, step = locate(path)
    if step is not None:
        return True
    names = os.listdir(folder) if folder.name == FOLDER and folder.is_dir() else []
    return any(name == "lock" or _STEP.fullmatch(name.partition(".")[0]) for name in names)


def _restore(
    folder: Path, like: Like, only: int | None = None
) -> tuple[Restored | None, list[int]]:
    """What `restore` returns, and the steps that were passed over."""
    target: PyTree = None

    def wanted(manifest: dict[str, Any]) -> set[str]:
        nonlocal target
        target = like(manifest["meta"]) if callable(like) else like
        _check_leaves(folder / str(manifest["step"]), manifest["leaves"], target)
        return set(_leaves(target))

    while True:
        manifest, broken = _find(folder, only, wanted)
        if manifest is None:
            return None, broken
        path = folder / str(manifest["step"])
        state = _read(path, target)
        # What a running training removes meanwhile reads as zeros; it is renamed first.
        if on_first((path / manifests.NAME).is_file):
            return Restored(manifest["step"], state, manifest["meta"]), broken


def _find(
    folder: Path, only: int | None, wanted: Callable[[dict[str, Any]], set[str]]
) -> tuple[dict[str, Any] | None, list[int]]:
    """The manifest of the newest step (or of `only`) whose leaves that `wanted` names are whole,
    and the steps that were passed over. InputError if there are steps, and none is whole."""
    broken: dict[int, str] = {}
    while True:
        # Listed anew each time: a running training may have replaced a step under a reader.
        step = on_first(
            lambda: max(
                {s for s in _steps(folder) if only in (None, s)} - set(broken), default=None
            )
        )
        if step is None:
            break
        path = folder / str(step)
        manifest, fault = on_first(partial(_manifest, folder, step))
        if not fault:
            fault = _verify(path, manifest, wanted(manifest))
        if not fault:
            return manifest, list(broken)
        broken[step] = f"{path.name}/{fault}"
        if jax.process_index() == 0:
            then = "falling back to the step before" if only is None else "take another step"
            log.warning("checkpoint %d is broken (%s/%s): %s", step, path, fault, then)
    lost = list(broken.values()) or on_first(
        lambda: sorted(path.name for path in folder.glob("*.corrupt*"))
    )
    if lost:
        raise InputError(
            f"{folder}: expected a whole checkpoint, found only broken ones ({'; '.join(lost)}): "
            "bring one back from a copy, take another step, or start from zero in another workdir"
        )
    return None, []


def _ocp() -> Any:
    """Orbax, which takes half a second to import: whoever reads other formats need not wait."""
    return importlib.import_module("orbax.checkpoint")


def _handler() -> Any:
    # One file a chunk instead of OCDBT: what a leaf needs can be read and verified alone, no
    # process merges the others' work, and a conversion can write the same layout slice by slice.
    # Trained float32 hardly compresses, and the cores are busy training.
    return _ocp().PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, use_compression=False)


def _read(path: Path, target: PyTree) -> PyTree:
    ocp = _ocp()

    def loose(path: Any, args: Any) -> Any:
        stacked = any(getattr(key, "key", None) == STACK for key in path)
        return dataclasses.replace(args, strict=not stacked)

    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    is_args = lambda leaf: isinstance(leaf, ocp.RestoreArgs)  # noqa: E731
    restore_args = jax.tree_util.tree_map_with_path(loose, restore_args, is_leaf=is_args)
    args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=True)
    return ocp.Checkpointer(_handler()).restore(path, args=args)


def _steps(folder: Path) -> list[int]:
    """By number: clocks and copies change times."""
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(name) for name in names if _STEP.fullmatch(name))


def _manifest(folder: Path, step: int) -> tuple[dict[str, Any], str]:
    manifest, fault = manifests.read(folder / str(step))
    if not fault and manifest["step"] != step:
        fault = f"{manifests.NAME} is that of step {manifest['step']}"
    return manifest, fault


def _set_aside(paths: list[Path]) -> None:
    for path in paths:
        names = (f"{path.name}.corrupt{n or ''}" for n in itertools.count())
        aside = next(path.with_name(n) for n in names if not path.with_name(n).exists())
        path.rename(aside)
        log.warning("checkpoint %s is set aside as %s: delete it when you like", path.name, aside)


def _leaves(tree: PyTree) -> dict[str, list[Any]]:
    """leaf: [dtype, shape]; the names are Orbax's folder names."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {
        ".".join(key.key for key in path): [str(np.dtype(x.dtype)), list(x.shape)]
        for path, x in flat
    }


def _check_leaves(path: Path, stored: dict[str, list[Any]], target: PyTree) -> None:
    wanted, groups = _leaves(target), set(target)
    for name in sorted(wanted.keys() | {n for n in stored if n.split(".")[0] in groups}):
        if not _fits(name, stored.get(name), wanted.get(name)):
            expected, found = (
                f"{leaf[0]}{leaf[1]}" if leaf else "nothing"
                for leaf in (wanted.get(name), stored.get(name))
            )
            raise InputError(
                f"checkpoint {path}: expected {expected} at {name}, found {found}: use the "
                "configuration that wrote it (nothing is cast on the way)"
            )


def _fits(name: str, stored: list[Any] | None, wanted: list[Any] | None) -> bool:
    """Whether one can be restored as the other: equal, or two stacks that end in other padding."""
    if stored is None or wanted is None or f".{STACK}." not in f".{name}.":
        return stored == wanted
    return stored[0] == wanted[0] and stored[1][1:] == wanted[1][1:]


def _verify(path: Path, manifest: dict[str, Any], leaves: set[str]) -> str:
    """The first file that is not as it was written, and how; "" when all are.

    Every process hashes a share of the files that `leaves` need, and learns of all faults.
    """
    passed = manifest["leaves"].keys() - leaves
    files = {n: entry for n, entry in manifest["files"].items() if n.split("/")[0] not in passed}

    def fault(name: str) -> int:
        try:
            status = (path / name).stat()
            if not stat.S_ISREG(status.st_mode):
                return 2
            if status.st_size != files[name][0]:
                return 3
            return 0 if manifests.entry(path / name) == files[name] else 4
        except FileNotFoundError:
            return 1
        except OSError:
            return 2

    me, count = jax.process_index(), jax.process_count()
    mine = manifests.share({name: size for name, (size, _) in files.items()}, me, count)
    faults = dict(zip(mine, manifests.in_threads(fault, mine), strict=True))
    codes = np.array([faults.get(name, 0) for name in files], np.uint8)
    if count > 1:
        codes = np.asarray(multihost_utils.process_allgather(codes)).max(0)
    bad = [f"{name} {_ALTERED[code]}" for name, code in zip(files, codes, strict=True) if code]
    more = f" and {len(bad) - 1} more files" if len(bad) > 1 else ""
    return bad[0] + more if bad else ""


def _cannot_write(path: Path, error: Exception) -> UserError:
    lines = str(error).splitlines() or [type(error).__name__]
    if isinstance(error, TimeoutError | jax.errors.JaxRuntimeError):
        return PeerLostError(f"checkpoint {path}: a process did not finish its share: {lines[0]}")
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error):
        return DoesNotFitError(
            f"checkpoint {path}: the disk is full: make room and run the same command again; the "
            "steps before are intact"
        )
    return InputError(
        f"checkpoint {path}: expected a writable folder, found: {lines[0]}: mend the folder and "
        "run the same command again; the steps before are intact"
    )
