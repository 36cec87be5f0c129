"""Kernels are compiled for the machine where they first run, and kept in the user's cache."""

import hashlib
import importlib.metadata
import importlib.resources
import logging
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax

from bloomjax.folders import cache_folder

# What keeps a library from being had, of `library` and of loading what it gives.
FAILURES = (OSError, AttributeError, subprocess.SubprocessError)

_COMPILERS = {"cpu.cc": "g++ or clang++", "gpu.cu": "NVIDIA's nvcc"}

_LOG = logging.getLogger("bloomjax")
_PATIENCE = 120  # seconds that a compiler, which takes some fifteen or twenty, may take


def library(
    sources: Sequence[str], compiler: str | None, flags: Sequence[str], machine: str = ""
) -> Path:
    """The shared library of a file beside this one, compiled unless the cache has it.

    The file is the first of `sources`, which includes the others; `machine` is what it depends on
    beside them and `flags`. One of FAILURES, if it cannot be had.
    """
    here = importlib.resources.files(__package__)
    code = {source: here.joinpath(source).read_bytes() for source in sources}
    words = (*flags, machine, importlib.metadata.version("jaxlib"))
    key = (*code.values(), *map(str.encode, words))
    digest = hashlib.sha256(b"\0".join(key)).hexdigest()[:32]
    if (cache := cache_folder()) is None:
        raise FileNotFoundError("expected a home for the cache, found none: set XDG_CACHE_HOME")
    path = cache / "kernels" / f"{digest}.so"
    if path.exists():
        return path
    if compiler is None:
        needed = _COMPILERS[sources[0]]
        raise FileNotFoundError(f"expected a compiler, found none: install {needed}")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _LOG.info("compiling the kernels of decoding for this machine, once")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # processes may race to here
        for source in sources:
            (Path(folder) / source).write_bytes(code[source])
        written, made = Path(folder) / sources[0], Path(folder) / "made.so"
        headers = f"-I{jax.ffi.include_dir()}"
        command = (compiler, *flags, headers, str(written), "-o", str(made))
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_PATIENCE)
        made.replace(path)
    return path


def fallen_back(where: str, error: Exception) -> None:
    """One line in the log for a library that cannot be had."""
    said = getattr(error, "stderr", None) or str(error)
    if isinstance(said, bytes):  # of a compiler that was stopped, whatever mode it ran in
        said = said.decode(errors="replace")
    reason = " ".join(said.split())[:300]
    _LOG.warning("decoding on %s falls back to XLA's own kernels, slower: %s", where, reason)
