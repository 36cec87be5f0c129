"""The product with packed weights on CPU: cpu.cc, compiled for this machine where it first runs.

XLA:CPU reads weights in 8 or 16 bits at a fraction of the memory's speed, in every form that was
tried. The compiler is the machine's own (CXX, or the first of c++, g++, clang++ that is there),
and what it made stays in the user's cache. The invariant: nothing here is an error; without a
compiler, or a cache, there is one line in the log, and no kernel.

Letters: see `bloomjax.kernels.packed`.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.resources
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from bloomjax.folders import cache_folder

UNIT = 32  # inputs that cpu.cc takes at a time

_LOG = logging.getLogger("bloomjax")
_NATIVE = "-mcpu" if platform.machine() in ("aarch64", "arm64") else "-march"
_FLAGS = ("-std=c++17", "-O3", f"{_NATIVE}=native", "-ffp-contract=off", "-fPIC", "-shared", "-w")
_PATIENCE = 120  # seconds that the compiler, which takes some ten, may take


_REGISTERED: set[str] = set()  # XLA takes a name once; what it calls is the same in any library


def multiply(x_MI: jax.Array, values: jax.Array, scales: jax.Array | None) -> jax.Array | None:
    """x times the transposed weights of a `Packed` -> float32 [M, J], or None for want of a kernel.

    x is float32. A row of the result does not depend on the other rows, bit by bit; on their number
    it does only by whether there are more than 16.
    """
    if x_MI.shape[1] % UNIT or not (target := kernel()):
        return None
    scales = jnp.ones((1, 1), jnp.float32) if scales is None else scales
    result = jax.ShapeDtypeStruct((x_MI.shape[0], values.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(target, result)(x_MI, values, scales)


@functools.cache
def kernel() -> str:
    """The name under which XLA knows the kernel; "" if it cannot be had here.

    The first call on a machine compiles it, which takes seconds.
    """
    source = importlib.resources.files(__package__).joinpath("cpu.cc").read_bytes()
    try:
        library = ctypes.CDLL(str(_library(source)))
        address = jax.ffi.pycapsule(library.BloomjaxMultiply)
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        if isinstance(said, bytes):  # of a compiler that was stopped, whatever mode it ran in
            said = said.decode(errors="replace")
        reason = " ".join(said.split())[:300]
        _LOG.warning("products with packed weights on CPU fall back to XLA, slower: %s", reason)
        return ""
    name = f"bloomjax_multiply_{hashlib.sha256(source).hexdigest()[:8]}"
    if name not in _REGISTERED:
        jax.ffi.register_ffi_target(name, address, platform="cpu")
        _REGISTERED.add(name)
    return name


def _library(source: bytes) -> Path:
    """The shared library, compiled unless the cache has it. OSError or SubprocessError."""
    key = (source, *map(str.encode, (*_FLAGS, _processor(), importlib.metadata.version("jaxlib"))))
    digest = hashlib.sha256(b"\0".join(key)).hexdigest()[:32]
    if (cache := cache_folder()) is None:
        raise FileNotFoundError("expected a home for the cache, found none: set XDG_CACHE_HOME")
    path = cache / "kernels" / f"{digest}.so"
    if path.exists():
        return path
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError("expected a C++ compiler, found none: install g++ or clang++")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _LOG.info("compiling the product with packed weights for this machine, once")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # processes may race to here
        code, made = Path(folder) / "cpu.cc", Path(folder) / "cpu.so"
        code.write_bytes(source)
        command = (compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", str(code), "-o", str(made))
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_PATIENCE)
        made.replace(path)
    return path


def _processor() -> str:
    """What "native" means here: a home may be shared by machines of several kinds."""
    facts = {platform.machine(), platform.processor()}
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts.update(x for x in lines if x.startswith(("model name", "flags", "Features")))
    return "\n".join(sorted(facts))
