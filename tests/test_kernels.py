"""Products with packed weights: what NumPy computes in float64, whoever computes it; and what the
compilers make of them."""

import importlib.util
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from jax.sharding import PartitionSpec as P

from bloomjax import aot, cli
from bloomjax.config import base_config, freeze
from bloomjax.kernels import build, cpu
from bloomjax.kernels.packed import Packed, multiply, widened
from bloomjax.kernels.packing import BLOCKS, from_gguf, quantise
from bloomjax.sharding import make_mesh, on_devices

J, I = 37, 1056  # odd; a tile of the kernel and a part of one  # noqa: E741
KINDS = ["float32", "float16", "bfloat16", "int8", "int8 in groups", "int4"]
random = np.random.default_rng(0)


def pack(values: Any, scales: Any) -> Packed:
    place = [None if a is None else jnp.asarray(a) for a in (values, scales)]
    return Packed(*place, "F", "D", (len(values),))


def weights(kind: str, shape: tuple[int, int] = (J, I)) -> Packed:
    w_JI = random.standard_normal(shape, np.float32)
    if kind == "int8 in groups":
        blocks = quants.quantize(w_JI, GGMLQuantizationType.Q8_0)
        return pack(*from_gguf(blocks, "Q8_0"))
    if kind in ("int8", "int4"):
        return pack(*quantise(jnp.asarray(w_JI), kind))
    return pack(jnp.asarray(w_JI).astype(kind), None)


def inputs(M: int) -> np.ndarray:
    return random.standard_normal((M, I), np.float32)


def exact(x_MI: np.ndarray, packed: Packed) -> np.ndarray:
    return x_MI.astype(np.float64) @ np.asarray(widened(packed, jnp.float32), np.float64).T


@pytest.fixture(scope="module", autouse=True)
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The kernel, from a cache of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        cpu.kernel.cache_clear()
        if not cpu.kernel():
            pytest.skip("no C++ compiler")
        yield
    cpu.kernel.cache_clear()


@pytest.fixture(params=["kernel", "XLA:CPU", "XLA elsewhere"])
def way(request: Any, monkeypatch: Any) -> str:
    if request.param == "XLA:CPU":
        monkeypatch.setattr(cpu, "kernel", lambda: "")
    if request.param == "XLA elsewhere":
        monkeypatch.setattr("bloomjax.kernels.packed.on_cpu", lambda: False)
    return str(request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_numpys(kind: str, way: str) -> None:
    packed = weights(kind)

    @jax.jit
    def run(x_MI: jax.Array, packed: Packed) -> jax.Array:
        return multiply(x_MI, packed, jnp.float32)

    # what shares a register, a turn, a tile, a batch of rows of the kernel, and one more
    for M in (1, 2, 3, 4, 7, 16, 17, 24, 40, 145) if way == "kernel" else (1, 8, 33):
        x_MI = inputs(M)
        expected = exact(x_MI, packed)
        found = np.asarray(run(x_MI, packed))
        assert found.shape == (M, J)
        np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max(), rtol=0)


def test_rows_that_do_not_fill_a_unit_or_a_block() -> None:
    for shape in ((3, 40), (1, 32), (5, 64)):
        packed = weights("float16", shape)
        x_MI = random.standard_normal((3, shape[1]), np.float32)
        found = multiply(jnp.asarray(x_MI), packed, jnp.float32)
        np.testing.assert_allclose(found, exact(x_MI, packed), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_others(kind: str) -> None:
    """Bit by bit, whatever its place among them, and whichever thread it met; nor on their number,
    as long as they are few (a step of decoding), or many (a chunk of a prompt)."""
    packed = weights(kind, (303, I))
    few = [(0, 1), (5, 6), (3, 5), (7, 10), (1, 9), (3, 16)]
    many = [(0, 17), (20, 51), (100, 145), (1, 146)]
    for whole, parts in ((inputs(16), few), (inputs(300), many)):
        expected = np.asarray(multiply(jnp.asarray(whole), packed, jnp.float32))
        for start, stop in parts:
            part = multiply(jnp.asarray(whole[start:stop]), packed, jnp.float32)
            np.testing.assert_array_equal(np.asarray(part), expected[start:stop])


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_on_eight_devices(kind: str) -> None:
    """Each multiplies its outputs, at the same time, as one device would all of them."""
    packed, x_MI = weights(kind, (64, 256)), random.standard_normal((3, 256), np.float32)
    config = base_config()
    config.mesh.update(fsdp=1, tensor=8)
    alone = multiply(jnp.asarray(x_MI), packed, jnp.float32)

    def local(x_MI: jax.Array, values: jax.Array, scales: jax.Array | None) -> jax.Array:
        return multiply(x_MI, Packed(values, scales, "F", "D", values.shape[:1]), jnp.float32)

    with jax.set_mesh(make_mesh(freeze(config).mesh, jax.devices())):
        ins = P(), P("tensor"), P("tensor")
        run = jax.jit(on_devices(local, ins, P(None, "tensor")))
        split = run(x_MI, packed.values, packed.scales)
    np.testing.assert_array_equal(np.asarray(split), np.asarray(alone))


def test_shapes_that_do_not_agree_are_refused() -> None:
    x, w, s = jnp.ones((2, 64)), jnp.ones((3, 96), jnp.int8), jnp.ones((3, 1))
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not agree"):
        jax.block_until_ready(cpu.multiply(x, w, s))
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not agree"):
        jax.block_until_ready(cpu.multiply(x, w[:, :64], s[:2]))
    with pytest.raises(jax.errors.JaxRuntimeError, match="of this type"):
        jax.block_until_ready(cpu.multiply(x, w[:, :64].astype(jnp.int16), s))


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("anchored", [False, True])
def test_attention_over_a_cache_is_numpys(kind: str, anchored: bool) -> None:
    """ALiBi may count from the query, or from place 0. What is not filled is not read."""
    B, N, S, H = 5, 3, 40, 24
    positions_B = np.array([0, 1, 17, 39, 38], np.int32)
    origins_B = positions_B * (not anchored)
    filled = np.arange(S) <= positions_B[:, None, None]
    q_BNH = random.standard_normal((B, N, H), np.float32)
    slopes_N = np.array([0.5, 0.25, 0.1], np.float32)

    def cache() -> tuple[jax.Array, jax.Array | None, np.ndarray]:
        if kind == "int8":
            values = random.integers(-127, 128, (B, N, S, H)).astype(np.int8)
            scales = np.where(filled, random.uniform(0.01, 0.03, (B, N, S)), np.nan)
            scales = scales.astype(np.float32)
            return jnp.asarray(values), jnp.asarray(scales), values * scales[..., None]
        floats = np.where(filled[..., None], random.standard_normal((B, N, S, H)), np.nan)
        values = jnp.asarray(floats, jnp.float32).astype(kind)
        return values, None, np.asarray(values, np.float64)

    (keys, key_scales, k_BNSH), (values, value_scales, v_BNSH) = cache(), cache()
    scores = np.einsum("BNH,BNSH->BNS", q_BNH, k_BNSH) / np.sqrt(H)
    scores += slopes_N[:, None] * (np.arange(S) - origins_B[:, None])[:, None]
    probs = np.where(
        filled, np.exp(scores - np.where(filled, scores, -np.inf).max(-1)[..., None]), 0
    )
    expected = np.einsum("BNS,BNSH->BNH", probs, np.nan_to_num(v_BNSH)) / probs.sum(-1)[..., None]

    found = jax.jit(cpu.attend)(
        q_BNH, (keys, key_scales), (values, value_scales), positions_B, origins_B, slopes_N
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_caches_that_do_not_agree_are_refused() -> None:
    q, held = jnp.ones((2, 3, 8)), (jnp.ones((2, 3, 4, 8)), None)
    places, slopes = jnp.zeros(2, jnp.int32), jnp.ones(3)
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not agree"):
        jax.block_until_ready(cpu.attend(q[:1], held, held, places, places, slopes))
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not agree"):
        jax.block_until_ready(cpu.attend(q, held, held, places, places, slopes[:2]))
    small = jax.tree.map(lambda x: x.astype(jnp.int8), held)
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not agree"):  # for want of scales
        jax.block_until_ready(cpu.attend(q, small, small, places, places, slopes))


# What weights become ------------------------------------------------------------------------------


def squared_error(w_JI: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Of each group of 32."""
    return ((w_JI - found) ** 2).reshape(len(w_JI), -1, 32).sum(2)


def test_int8_is_off_by_half_a_step() -> None:
    w_JI = random.standard_normal((J, 40), np.float32) * 10.0 ** random.integers(-20, 9, (J, 1))
    w_JI[3], w_JI[5, 7] = 0, 1e30
    values, scales = jax.jit(quantise, static_argnums=1)(w_JI.astype(np.float32), "int8")
    found = np.asarray(values, np.float64) * np.asarray(scales, np.float64)
    assert np.all(np.abs(w_JI - found) <= 0.5001 * np.asarray(scales))
    assert np.all(found[3] == 0) and np.abs(np.asarray(values)).max() == 127


def test_int4_is_nearer_than_gguf() -> None:
    w_JI = random.standard_normal((J, I), np.float32)
    w_JI[3], w_JI[4, 32:64], w_JI[5] = 0, 0, -0.25
    values, scales = jax.jit(quantise, static_argnums=1)(w_JI, "int4")
    assert values.dtype == np.uint8 and values.shape == (J, I // 2) and scales.shape == (J, I // 32)
    ours = squared_error(w_JI, np.asarray(widened(pack(values, scales), jnp.float32)))
    kind = GGMLQuantizationType.Q4_0
    theirs = squared_error(w_JI, quants.dequantize(quants.quantize(w_JI, kind), kind))
    assert np.all(ours <= 1.01 * theirs + 1e-12)
    assert ours.sum() < 0.93 * theirs.sum()


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_a_file_are_kept_exactly(kind: str) -> None:
    blocks = random.integers(0, 256, (J, 3 * (2 + BLOCKS[kind]))).astype(np.uint8)
    scales = random.standard_normal((J, 3)).astype(np.float16)
    blocks.reshape(J, 3, -1)[..., :2] = scales[..., None].view(np.uint8)
    expected = quants.dequantize(blocks, GGMLQuantizationType[kind])
    found = widened(pack(*from_gguf(blocks, kind)), jnp.float32)
    np.testing.assert_array_equal(np.asarray(found), expected)


# Where there is no kernel -------------------------------------------------------------------------


def fallen_back(caplog: Any) -> str:
    """The one line that says so; the product is computed all the same, twice."""
    cpu.kernel.cache_clear()
    packed, x_MI = weights("int8"), inputs(2)
    with caplog.at_level(logging.WARNING, "bloomjax"):
        for _ in range(2):
            found = multiply(jnp.asarray(x_MI), packed, jnp.float32)
            np.testing.assert_allclose(np.asarray(found), exact(x_MI, packed), atol=1e-3)
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    return record.getMessage()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: Any) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path / "bloomjax" / "kernels"
    cpu.kernel.cache_clear()


@pytest.mark.usefixtures("cache")
def test_without_a_compiler(caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "install g++" in fallen_back(caplog)


def test_with_a_compiler_that_fails(caplog: Any, monkeypatch: Any, cache: Path) -> None:
    monkeypatch.setenv("CXX", "false")
    fallen_back(caplog)
    assert not list(cache.iterdir())


def test_with_a_library_that_is_none(caplog: Any, monkeypatch: Any, cache: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(cpu, "library", lambda *arguments: asked.append(arguments) or cache)
    fallen_back(caplog)
    caplog.clear()
    made = build.library(*asked[0])
    assert made.parent == cache and build.library(*asked[0]) == made
    made.write_bytes(b"no library")
    monkeypatch.setattr(cpu, "library", build.library)
    assert str(made) in fallen_back(caplog)


def test_with_a_cache_that_cannot_be_written(caplog: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    fallen_back(caplog)
    cpu.kernel.cache_clear()


@pytest.mark.usefixtures("cache")
def test_with_a_compiler_that_takes_too_long(caplog: Any, monkeypatch: Any, tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\necho still at it >&2\nexec sleep 60\n")
    slow.chmod(0o700)
    monkeypatch.setenv("CXX", str(slow))
    monkeypatch.setattr(build, "_PATIENCE", 0.5)
    assert "still at it" in fallen_back(caplog)


@pytest.mark.usefixtures("cache")
def test_for_a_user_without_a_home(caplog: Any, monkeypatch: Any) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    assert "set XDG_CACHE_HOME" in fallen_back(caplog)
    config = SimpleNamespace(values={"jax_compilation_cache_dir": None})  # and no way to update it
    monkeypatch.setattr(cli, "jax", SimpleNamespace(config=config))
    assert cli.keep_compiled() is None


# What the compiler for GPUs makes of it -----------------------------------------------------------


@pytest.mark.parametrize("M", [1, 8, 64])
@pytest.mark.parametrize("kind", ["int8", "int8 in groups", "int4"])
def test_gpus_store_no_widened_weight(kind: str, M: int) -> None:
    """The program for an H200 reads the packed bytes where it multiplies: nothing that it writes
    has as many elements as a quarter of the weight."""
    if not importlib.util.find_spec("jax_cuda13_plugin"):
        pytest.skip("jax_cuda13_plugin is not installed")
    J, I = 2048, 4096  # noqa: E741
    devices = aot.devices(aot.target("gpu-h200:1"))
    with jax.set_mesh(make_mesh(freeze(base_config()).mesh, devices)):
        dtype = jnp.uint8 if kind == "int4" else jnp.int8
        values = jax.ShapeDtypeStruct((J, I // 2 if kind == "int4" else I), dtype)
        scales = jax.ShapeDtypeStruct((J, 1 if kind == "int8" else I // 32), jnp.float32)

        def local(x_MI: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
            return multiply(x_MI, Packed(values, scales, "F", "D", (J,)), jnp.bfloat16)

        run = jax.jit(on_devices(local, (P(), P(), P()), P()))
        text = run.lower(jax.ShapeDtypeStruct((M, I), jnp.bfloat16), values, scales).compile()
    written = results(str(text.as_text()))
    assert written and max(written) < J * I / 4


def results(text: str) -> list[int]:
    """Elements of every array that an instruction outside of a fusion writes."""
    sizes = []
    bodies = re.findall(r"\bbody=(%[\w.-]+)", text)
    for computation in re.split(r"\n(?=\S)", text):
        if not computation.startswith(("ENTRY", *(f"{body} " for body in bodies))):
            continue
        for line in computation.splitlines()[1:]:
            found = re.match(r"\s*(?:ROOT )?%\S+ = (.*?) ([a-z-]+)\(", line)
            if found and found[2] not in _NOTHING_WRITTEN:
                for dims in re.findall(r"\w+\[([\d,]*)\]", found[1]):
                    sizes.append(int(np.prod([int(n) for n in dims.split(",") if n], dtype=int)))
    return sizes


_NOTHING_WRITTEN = ("parameter", "bitcast", "get-tuple-element", "tuple", "while")
