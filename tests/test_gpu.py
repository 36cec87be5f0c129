"""The kernel of one launch (kernels/gpu.cu). What it computes is compared where a GPU is that it
serves (`JAX_PLATFORMS=cuda pytest tests/test_gpu.py`); that it compiles, and what XLA makes of a
step with it, wherever the compilers are."""

import ctypes
import dataclasses
import importlib.util
import re
import types
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

LENGTH = 2048  # places of a slot
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
            is_matrix = len(like.shape) == 2 and like.shape[0] * like.shape[1] > 40_000
            shift, spread = (0.0, 0.02) if is_matrix else (1.0, 0.1)
            value = shift + spread * jax.random.normal(key, like.shape)
        return jax.device_put(value.astype(like.dtype), like.sharding)

    leaves, tree = jax.tree.flatten(abstract_params(config, mesh, quantize))
    return jax.tree.unflatten(tree, [draw(i, leaf) for i, leaf in enumerate(leaves)])


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
def test_a_step_is_that_of_float32(
    width: int, heads: int, quantize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearer to it than XLA's program in bfloat16, and the cache as that program leaves it."""
    if not served():
        pytest.skip("no GPU that the kernel serves")
    config = small("bfloat16", width=width, heads=heads)
    mesh = decode_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = random_params(config, mesh, quantize)
        empty = jax.jit(programs.empty_state, static_argnums=(0, 1, 2, 3))
        like = empty(config, 1, LENGTH, "auto").cache

        def filled(i: int, held: Held) -> Held:
            noise = jax.random.normal(jax.random.key(i), held.values.shape, jnp.bfloat16)
            return Held(jax.device_put(noise, held.values.sharding), None)

        cache = Cache(*(tuple(filled(j, held) for j, held in enumerate(half)) for half in like))

        def step(dtype: str, in_one: bool, position: int) -> Any:
            monkeypatch.setattr(programs, "on_one_gpu", lambda: in_one)
            asked = dataclasses.replace(config, dtype=dtype)

            @jax.jit
            def run(params: Any, cache: Cache, token: jax.Array, place: jax.Array) -> Any:
                bloom = model.bind(asked, params, unrolled=True)
                return programs.advance(bloom, cache, token, place)

            given = (params, cache) if dtype == "bfloat16" else (wide(params), wide(cache))
            text = run.lower(*given, *at(position)).as_text()
            assert ("bloomjax_step" in text) == in_one
            return run(*given, *at(position))

        def at(position: int) -> tuple[jax.Array, jax.Array]:
            return jnp.array([position % 1000 + 3], jnp.int32), jnp.array([position], jnp.int32)

        for position in (0, 1, 15, 37, 1999, LENGTH - 1):
            exact = step("float32", False, position)[0]
            ours, theirs = (step("bfloat16", in_one, position) for in_one in (True, False))
            off = [float(abs(one[0] - exact).max() / abs(exact).max()) for one in (ours, theirs)]
            assert off[0] < 4e-3 and off[0] < off[1]
            for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
                difference = np.asarray(abs(a.astype("float32") - b.astype("float32")))
                assert difference.max() < 0.1  # of numbers of size 1: where both round
                changed = np.flatnonzero(difference.max((0, 1, 3)))
                assert set(changed) <= {position}


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
    program = aot.compile_decode(config, MeshConfig(), devices, slots=1, length=LENGTH)
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
