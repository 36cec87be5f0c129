"""One token through the model in one launch (gpu.cu), for a batch of one on an NVIDIA GPU from
Hopper on; compiled for the model and the GPU where it first runs.

The compiler is nvcc, of the CUDA toolkit or of the wheels that jax[cuda13] brings, on top of a C++
compiler. The invariant: nothing here is an error; what the kernel does not serve (other GPUs,
several devices or slots, weights in groups of a scale, a cache in eight bits) is XLA's program, and
without a compiler there is one line in the log.

Letters: D width, N heads, H head dim, F ffn width, V vocabulary, S places of the cache.
"""

import ctypes
import functools
import importlib.util
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bloomjax.kernels.build import FAILURES, fallen_back, library
from bloomjax.kernels.packed import Packed
from bloomjax.sharding import on_devices

# Compute capabilities: Hopper's bulk copies are what the kernel is made of; from 11.0 on there may
# be too little shared memory.
_CAPABLE = range(90, 110)
_BYTES = {"bf16": 2, "int8_t": 3}  # of an input of a product with such weights
_INPUTS = 2**17  # bytes of shared memory that a product's inputs may take
_TOOLKIT = Path("/usr/local/cuda")
_REGISTERED: set[str] = set()  # XLA takes a name once


def step(
    token_1: jax.Array,
    position_1: jax.Array,
    slopes_N: jax.Array,
    norms: Sequence[jax.Array],
    table: Packed,
    layers: Sequence[Sequence[Any]],
    epsilon: float,
) -> tuple[jax.Array, list[jax.Array]] | None:
    """float32 logits [1, V] after a token, and keys and values of every layer with it; or None
    where the kernel does not serve.

    `norms` are scale and shift of the embedding's layer norm and of the last one; a layer is
    scales and shifts of its two layer norms, weights and biases of qkv, of the heads' output, up
    and down by turns, and its keys and values [1, N, S, H].
    """
    matrices = [table] + [part for layer in layers for part in layer if isinstance(part, Packed)]
    kind, cores = _kind(matrices), _cores()
    _, N, _, H = layers[0][-1].shape
    D, F, V = norms[0].shape[0], layers[0][8].values.shape[0], table.values.shape[0]
    others = norms[0], *layers[0][-2:]
    served = (
        kind is not None
        and token_1.shape == (1,)
        and all(a.dtype == jnp.bfloat16 for a in others)
        and (H % 8, D % 16) == (0, 0)
        and H <= 128
        and max(N, -(-D // 256)) <= cores
        and F <= 4 * D
        and _BYTES[kind] * F <= _INPUTS
        and len(layers) <= 128
    )
    if kind is None or not served or not (name := kernel(kind, -(-D // 1024))):
        return None

    ones = jnp.ones((1,), jnp.float32)

    def parts(packed: Packed) -> list[jax.Array]:
        return [packed.values, ones if packed.scales is None else packed.scales]

    inputs = [token_1, position_1, slopes_N, *norms, *parts(table)]
    held: dict[int, int] = {}  # inputs that are written in place, and which results they are
    for i, layer in enumerate(layers):
        for part in layer:
            inputs += parts(part) if isinstance(part, Packed) else [part]
        held |= {len(inputs) - 2 + j: 2 + 2 * i + j for j in range(2)}
    caches = [inputs[i] for i in held]
    room = 4 * (4 * D + F + cores * (H + 2)) + 8 * 128
    results = [
        jax.ShapeDtypeStruct((1, V), jnp.float32),
        jax.ShapeDtypeStruct((room,), jnp.uint8),
        *(jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in caches),
    ]

    def local(*inputs: jax.Array) -> tuple[jax.Array, ...]:
        call = jax.ffi.ffi_call(name, results, input_output_aliases=held)
        logits_1V, _, *caches = call(
            *inputs, layers=np.int64(len(layers)), epsilon=np.float32(epsilon)
        )
        return logits_1V, *caches

    specs = [jax.typeof(a).sharding.spec for a in inputs]
    outs = (jax.P(None, None), *(specs[i] for i in held))
    logits_1V, *written = on_devices(local, specs, outs)(*inputs)
    return logits_1V, written


def _kind(matrices: Sequence[Packed]) -> str | None:
    """The type of the weights in gpu.cu; None for those that it does not know."""
    if all(m.values.dtype == jnp.bfloat16 for m in matrices):
        return "bf16"
    whole = (m.scales is not None and m.scales.shape[1] == 1 for m in matrices)
    return "int8_t" if all(m.values.dtype == jnp.int8 for m in matrices) and all(whole) else None


@functools.cache
def _cores() -> int:
    """Multiprocessors of the GPU, if it is one that the kernel is made for; else 0."""
    device = jax.local_devices()[0]
    known = getattr(device, "compute_capability", "").replace(".", "")  # of AMD's it is a name
    is_known = known.isdigit() and int(known) in _CAPABLE
    return int(getattr(device, "core_count", 0)) if is_known else 0


@functools.cache
def kernel(kind: str, vectors: int) -> str:
    """The name under which XLA knows the kernel; "" if it cannot be had here.

    The first call on a machine compiles it, which takes some twenty seconds.
    """
    architecture = jax.local_devices()[0].compute_capability.replace(".", "")
    flags = (
        "-std=c++17",
        "-O3",
        f"-arch=sm_{architecture}",
        f"-DBLOOMJAX_WEIGHT={kind}",
        f"-DBLOOMJAX_VECTORS={vectors}",
        *("-Xcompiler", "-fPIC", "-shared", "-w"),
    )
    try:
        path = library(("gpu.cu", "hopper.cuh"), compiler(), flags)
        made = ctypes.CDLL(str(path))
        function = made.BloomjaxStep
        if error_code := made.BloomjaxRuns():
            raise OSError(f"{path}: CUDA's error {error_code}: expected a driver of its version")
    except FAILURES as error:
        fallen_back("GPU", error)
        return ""
    name = f"bloomjax_step_{path.stem}"
    if name not in _REGISTERED:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="CUDA")
        _REGISTERED.add(name)
    return name


def compiler() -> str | None:
    """nvcc: that of the toolkit that is found first, or of NVIDIA's wheels."""
    homes = [Path(home) for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    homes.append(_TOOLKIT)
    wheels = importlib.util.find_spec("nvidia")
    for place in (wheels.submodule_search_locations or ()) if wheels else ():
        homes += [Path(place) / "cu13", Path(place) / "cuda_nvcc"]
    found = (shutil.which("nvcc"), *(shutil.which(str(home / "bin" / "nvcc")) for home in homes))
    return next(filter(None, found), None)
