"""The kernel of one launch (kernels/gpu.cu). What it computes is compared in real shapes where a
GPU is that it serves (`JAX_PLATFORMS=cuda pytest tests/test_gpu.py`), and elsewhere in small ones,
the same source compiled for a CPU (cuda_on_cpu); that it compiles for a GPU, and what XLA makes of
a step with it, wherever the compilers are."""

import ctypes
import dataclasses
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bloomjax import aot, model
from bloomjax.config import MeshConfig, ModelConfig, base_config, freeze
from bloomjax.decode import programs
from bloomjax.decode.cache import Cache, Held
from bloomjax.decode.params import abstract_params
from bloomjax.kernels import gpu
from bloomjax.sharding import decode_mesh

CORES = 18  # of the GPU that is emulated: no multiple of the heads, as on real ones
HOPPER = types.SimpleNamespace(platform="gpu", compute_capability="9.0", core_count=132)


def served() -> bool:
    return jax.default_backend() == "gpu" and bool(gpu._cores())


def without_gpu(monkeypatch: Any) -> None:
    """Libraries are taken as they are, though nothing can run them."""
    real = ctypes.CDLL

    def loaded(path: str) -> Any:
        made = real(path)
        return types.SimpleNamespace(BloomjaxStep=made.BloomjaxStep, BloomjaxRuns=lambda: 0)

    monkeypatch.setattr(ctypes, "CDLL", loaded)


def small(dtype: str, **sizes: int) -> ModelConfig:
    asked = {"layers": 2, "vocab_size": 4096} | sizes
    return dataclasses.replace(freeze(base_config("560m")).model, dtype=dtype, **asked)


def random_params(config: ModelConfig, mesh: Any, quantize: str) -> Any:
    """Matrices about as large as trained ones, so that no output drowns in rounding."""

    def draw(i: int, like: Any) -> jax.Array:
        key = jax.random.key(i)
        if like.dtype == jnp.int8:
            value = jax.random.randint(key, like.shape, -127, 128, jnp.int8)
        elif like.dtype == jnp.float32:
            value = 3e-4 * (1 + jax.random.uniform(key, like.shape))  # scales
        else:
            is_matrix = len(like.shape) == 2 and like.shape[0] * like.shape[1] > 16_000
            shift, spread = (0.0, 0.02) if is_matrix else (1.0, 0.1)
            value = shift + spread * jax.random.normal(key, like.shape)
        return jax.device_put(value.astype(like.dtype), like.sharding)

    leaves, tree = jax.tree.flatten(abstract_params(config, mesh, quantize))
    return jax.tree.unflatten(tree, [draw(i, leaf) for i, leaf in enumerate(leaves)])


def random_cache(config: ModelConfig, length: int) -> Cache:
    empty = jax.jit(programs.empty_state, static_argnums=(0, 1, 2, 3))

    def filled(i: int, held: Held) -> Held:
        noise = jax.random.normal(jax.random.key(i), held.values.shape, jnp.bfloat16)
        return Held(jax.device_put(noise, held.values.sharding), None)

    like = empty(config, 1, length, "auto").cache
    return Cache(*(tuple(filled(i, held) for i, held in enumerate(half)) for half in like))


def wide(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.astype("float32") if a.dtype == jnp.bfloat16 else a, tree)


@pytest.mark.parametrize(
    ("width", "heads", "quantize"),
    [
        (1024, 16, "none"),
        (2048, 16, "int8"),
        (2560, 32, "none"),  # heads of 80
        (4096, 32, "none"),
        (1024, 16, "int8"),
        (256, 8, "none"),  # fewer outputs than warps
    ],
)
def test_a_step_on_a_gpu(width: int, heads: int, quantize: str, monkeypatch: Any) -> None:
    if not served():
        pytest.skip("no GPU that the kernel serves")
    config = small("bfloat16", width=width, heads=heads)
    compare(config, quantize, 2048, (0, 1, 15, 37, 1999, 2047), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "heads", "quantize"),
    [
        (128, 4, "none"),  # fewer outputs than warps
        (256, 2, "int8"),  # nine blocks share a head
        (640, 8, "none"),  # heads of 80, rows of F in two copies
        (640, 10, "none"),  # heads of 64, as published small ones have
        (1280, 16, "int8"),  # more than four numbers a thread
    ],
)
def test_a_step_on_an_emulated_gpu(
    width: int, heads: int, quantize: str, monkeypatch: Any, emulated: None
) -> None:
    config = small("bfloat16", width=width, heads=heads, vocab_size=512)
    compare(config, quantize, 256, (0, 1, 37, 255), monkeypatch)


@pytest.fixture
def emulated(monkeypatch: Any, emulation: Callable[[str, int], str]) -> None:
    """A CPU that the kernel serves."""
    monkeypatch.setattr(gpu, "_cores", lambda: CORES)
    monkeypatch.setattr(gpu, "kernel", emulation)


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: Any) -> Callable[[str, int], str]:
    """As `gpu.kernel`, but compiled for this CPU."""
    compiler = shutil.which("c++")
    if compiler is None or sys.platform != "linux" or jax.default_backend() != "cpu":
        pytest.skip("no C++ compiler on Linux, or there is a GPU")

    @functools.cache
    def kernel(kind: str, vectors: int) -> str:
        folder = tmp_path_factory.mktemp("emulation")
        source = shutil.copy(Path(gpu.__file__).parent / "gpu.cu", folder)  # not its hopper.cuh
        flags = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-w"]
        flags.append("-U_FORTIFY_SOURCE")  # which refuses a longjmp from stack to stack
        sizes = {"EMULATED_CORES": CORES, "BLOOMJAX_WEIGHT": kind, "BLOOMJAX_VECTORS": vectors}
        defined = [f"-D{name}={value}" for name, value in sizes.items()]
        headers = f"-I{Path(__file__).parent / 'cuda_on_cpu'}", f"-I{jax.ffi.include_dir()}"
        command = [compiler, *flags, *defined, *headers, "-fPIC", "-shared", "-x", "c++", source]
        subprocess.run([*command, "-o", folder / "made.so"], check=True)
        made = ctypes.CDLL(str(folder / "made.so"))
        assert made.BloomjaxRuns() == 0
        name = f"bloomjax_step_{kind}_{vectors}"
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(made.BloomjaxStep), platform="cpu")
        return name

    return kernel


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_broken_numbers_stay_broken(quantize: str, monkeypatch: Any, emulated: None) -> None:
    """A scale that is no number, in the first layer, is seen in every logit."""
    config = small("bfloat16", width=256, heads=8, vocab_size=512)
    mesh = decode_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        params, cache = random_params(config, mesh, quantize), random_cache(config, 64)
        broken = params["blocks"][0]["ln1_w"].at[7].set(jnp.nan)
        params["blocks"][0]["ln1_w"] = broken
        logits_1V, _ = a_step(config, params, cache, True, monkeypatch)(3)
    assert np.isnan(logits_1V).all()


def compare(
    config: ModelConfig, quantize: str, length: int, positions: Sequence[int], monkeypatch: Any
) -> None:
    """A step in bfloat16 by the kernel is nearer to float32's than XLA's program is, and leaves the
    cache as that does."""
    mesh = decode_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        params, cache = random_params(config, mesh, quantize), random_cache(config, length)
        wide_config = dataclasses.replace(config, dtype="float32")
        in_float32 = a_step(wide_config, wide(params), wide(cache), False, monkeypatch)
        both = [a_step(config, params, cache, in_one, monkeypatch) for in_one in (True, False)]
        for position in positions:
            exact = in_float32(position)[0]
            ours, theirs = (step(position) for step in both)
            off = [float(abs(one[0] - exact).max() / abs(exact).max()) for one in (ours, theirs)]
            assert off[0] < 4e-3 and off[0] < off[1]
            for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
                difference = np.asarray(abs(a.astype("float32") - b.astype("float32")))
                assert difference.max() < 0.1  # of numbers of size 1: where both round
                changed = np.flatnonzero(difference.max((0, 1, 3)))
                assert set(changed) <= {position}


def a_step(
    config: ModelConfig, params: Any, cache: Cache, in_one: bool, monkeypatch: Any
) -> Callable[[int], tuple[jax.Array, Cache]]:
    """A function of the position: logits and cache after a token there."""
    monkeypatch.setattr(programs, "on_one_gpu", lambda: in_one)

    @jax.jit
    def run(params: Any, cache: Cache, token: jax.Array, place: jax.Array) -> Any:
        return programs.advance(model.bind(config, params, unrolled=True), cache, token, place)

    def at(position: int) -> tuple[jax.Array, jax.Array]:
        return jnp.array([position % 500 + 3], jnp.int32), jnp.array([position], jnp.int32)

    lowered = run.lower(params, cache, *at(0))
    assert ("bloomjax_step" in lowered.as_text()) == in_one
    compiled = lowered.compile()
    return lambda position: compiled(params, cache, *at(position))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "vectors"), [("bf16", 1), ("int8_t", 3)])
def test_it_compiles(kind: str, vectors: int, monkeypatch: Any) -> None:
    if gpu.compiler() is None:
        pytest.skip("nvcc is not installed")
    monkeypatch.setattr(jax, "local_devices", lambda: [HOPPER])
    made: list[Path] = []
    real = gpu.library

    def noted(*arguments: Any) -> Path:
        made.append(real(*arguments))
        return made[-1]

    monkeypatch.setattr(gpu, "library", noted)
    without_gpu(monkeypatch)
    assert gpu.kernel.__wrapped__(kind, vectors).startswith("bloomjax_step_")
    assert ctypes.CDLL(str(made[0])).BloomjaxStep


@pytest.mark.slow
def test_the_program_of_a_gpu_has_one_launch_a_token(monkeypatch: Any) -> None:
    """And XLA copies no cache for it: keys and values are written in place."""
    if not importlib.util.find_spec("jax_cuda13_plugin") or gpu.compiler() is None:
        pytest.skip("XLA's compiler for GPUs, or nvcc, is not installed")
    real = jax.local_devices
    monkeypatch.setattr(jax, "local_devices", lambda **asked: real(**asked) if asked else [HOPPER])
    without_gpu(monkeypatch)
    monkeypatch.setattr(programs, "on_one_gpu", lambda: True)
    monkeypatch.setattr(gpu, "_cores", lambda: HOPPER.core_count)
    texts: list[str] = []
    compile_, keep = aot._compile, texts.append

    def noted(*arguments: Any) -> Any:
        compiled, text = compile_(*arguments)
        keep(text)
        return compiled, text

    monkeypatch.setattr(aot, "_compile", noted)
    config = small("bfloat16", width=1024, heads=16)
    devices = aot.devices(aot.target("gpu-h200:1x1"))
    program = aot.compile_decode(config, MeshConfig(), devices, slots=1, length=2048)
    assert len(re.findall('custom_call_target="bloomjax_step', texts[0])) == 1
    assert "output_to_operand_aliasing" in texts[0] and not program.weights_written
    assert all(" by ffi_call" in written for written in program.cache_written)  # in place, that is


def test_nvcc_of_wheels_is_found(tmp_path: Path, monkeypatch: Any) -> None:
    nvcc = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o700)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    places = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: places)
    monkeypatch.setattr(gpu, "_TOOLKIT", tmp_path / "nowhere")
    assert gpu.compiler() == str(nvcc)


@pytest.mark.slow
def test_what_cannot_run_is_xlas(monkeypatch: Any, caplog: Any) -> None:
    """A library that compiles, where there is no GPU or driver for it: one line, and no error."""
    if gpu.compiler() is None:
        pytest.skip("nvcc is not installed")
    if served():
        pytest.skip("it can run here")
    monkeypatch.setattr(jax, "local_devices", lambda: [HOPPER])
    with caplog.at_level("WARNING", "bloomjax"):
        assert gpu.kernel.__wrapped__("bf16", 1) == ""
    (record,) = caplog.records
    assert "CUDA's error" in record.getMessage() and "\n" not in record.getMessage()
