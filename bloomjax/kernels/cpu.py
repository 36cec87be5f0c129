"""Decoding's own kernels on CPU: cpu.cc, compiled for this machine where it first runs.

XLA:CPU reads weights in 8 or 16 bits at a fraction of the memory's speed, in every form that was
tried; and a cache whole, whatever of it is filled. The compiler is the machine's own (CXX, or the
first of c++, g++, clang++ that is there), and what it made stays in the user's cache. The
invariant: nothing here is an error; without a compiler, or a cache, there is one line in the log,
and no kernel.

Letters: see `bloomjax.kernels.packed`.
"""

import contextlib
import ctypes
import functools
import os
import platform
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp

from bloomjax.kernels.build import FAILURES, fallen_back, library

UNIT = 32  # inputs that cpu.cc takes at a time

_NATIVE = "-mcpu" if platform.machine() in ("aarch64", "arm64") else "-march"
_FLAGS = ("-std=c++17", "-O3", f"{_NATIVE}=native", "-ffp-contract=off", "-fPIC", "-shared", "-w")

_REGISTERED: set[str] = set()  # XLA takes a name once
_LANES = 8  # that divide H: what cpu.cc has at most in a vector


def multiply(x_MI: jax.Array, values: jax.Array, scales: jax.Array | None) -> jax.Array | None:
    """x times the transposed weights of a `Packed` -> float32 [M, J], or None for want of a kernel.

    x is float32. A row of the result does not depend on the other rows, bit by bit; on their number
    it does only by whether there are more than 16.
    """
    if x_MI.shape[1] % UNIT or not (digest := kernel()):
        return None
    scales = jnp.ones((1, 1), jnp.float32) if scales is None else scales
    result = jax.ShapeDtypeStruct((x_MI.shape[0], values.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(f"bloomjax_multiply_{digest}", result)(x_MI, values, scales)


def attend(
    q_BNH: jax.Array,
    keys: tuple[jax.Array, jax.Array | None],
    values: tuple[jax.Array, jax.Array | None],
    positions_B: jax.Array,
    origins_B: jax.Array,
    slopes_N: jax.Array,
) -> jax.Array | None:
    """Attention of one query for each slot and head -> float32 [B, N, H], or None for want of a
    kernel.

    q is float32, positions and origins int32. `keys` and `values` are [B, N, S, H], float or int8
    with scales float32 [B, N, S]; of these the places up to and with a slot's position are read.
    Place s is lowered by its head's slope times its distance from the slot's origin.
    """
    if q_BNH.dtype != jnp.float32 or q_BNH.shape[-1] % _LANES or not (digest := kernel()):
        return None
    none = jnp.ones((1,), jnp.float32)
    parts = [none if part is None else part for part in (*keys, *values)]
    result = jax.ShapeDtypeStruct(q_BNH.shape, jnp.float32)
    call = jax.ffi.ffi_call(f"bloomjax_attend_{digest}", result)
    return call(q_BNH, *parts, positions_B, origins_B, slopes_N)


@functools.cache
def kernel() -> str:
    """What ends the names under which XLA knows the kernels; "" if they cannot be had here.

    The first call on a machine compiles them, which takes seconds.
    """
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    try:
        path = library(("cpu.cc",), compiler, _FLAGS, _processor())
        made = ctypes.CDLL(str(path))
        functions = {"multiply": made.BloomjaxMultiply, "attend": made.BloomjaxAttend}
    except FAILURES as error:
        fallen_back("CPU", error)
        return ""
    digest = path.stem[:8]
    if digest not in _REGISTERED:
        for name, function in functions.items():
            capsule = jax.ffi.pycapsule(function)
            jax.ffi.register_ffi_target(f"bloomjax_{name}_{digest}", capsule, platform="cpu")
        _REGISTERED.add(digest)
    return digest


def _processor() -> str:
    """What "native" means here: a home may be shared by machines of several kinds."""
    facts = {platform.machine(), platform.processor()}
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts.update(x for x in lines if x.startswith(("model name", "flags", "Features")))
    return "\n".join(sorted(facts))
