"""Plans of decoding: by count against figures by hand and published ones, and as compiled."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bloomjax import aot, cli, counts, machines, plan
from bloomjax.config import SIZES, MeshConfig, ModelConfig, base_config, freeze
from bloomjax.decode_cost import QUANTIZE, Estimate, Layout, estimate, memory, search
from bloomjax.errors import ConfigError
from bloomjax.machines import machine
from bloomjax.traffic import hops_of


def model(size: str, **fields: Any) -> ModelConfig:
    return dataclasses.replace(freeze(base_config(size)).model, **fields)


def best(
    name: str, devices: int, slots: int, quantize: str = "none", length: int = 2048
) -> Estimate:
    found = search(
        model("176b"), machine(name), devices, slots=slots, length=length, quantize=quantize
    )
    return found[0]


# Counts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("sequence", "tensor"), [(1, 1), (1, 8), (2, 8), (8, 1)])
def test_weights_add_up_to_the_models(size: str, sequence: int, tensor: int) -> None:
    """Over all devices: two bytes a parameter, but for vectors, of which each has a copy."""
    asked = model(size)
    layout = Layout(asked, sequence, tensor, slots=1, length=16)
    vectors = (13 * asked.layers + 4) * asked.width
    expected = asked.parameter_count + (sequence * tensor - 1) * vectors
    assert memory(layout)["weights"] * sequence * tensor == pytest.approx(2 * expected, rel=1e-9)


def test_bits_of_a_weight() -> None:
    """Eight bits and a float32 for every output; four and one for every 32 inputs."""
    D, L, V = 14336, 70, 250_880
    outputs, matrices, vectors = 9 * D * L + V, 12 * D * D * L + V * D, (13 * L + 4) * D
    expected = {
        "none": 2 * matrices,
        "int8": matrices + 4 * outputs,
        "int4": matrices / 2 + 4 * matrices / 32,
    }
    for quantize in QUANTIZE:
        found = memory(Layout(model("176b"), 1, 1, 1, 16, quantize))["weights"]
        assert found == pytest.approx(expected[quantize] + 2 * vectors, rel=1e-9)


def test_the_cache_of_176b() -> None:
    """4 MB a token: keys and values of 70 layers of 14,336 in two bytes; a slot is on one device of
    `sequence` where the slots divide, else on all."""
    whole = 32 * 2048 * 2 * 70 * 14336 * 2
    for sequence, slots, share in ((1, 32, 8), (2, 32, 16), (2, 1, 8 * 32)):
        found = memory(Layout(model("176b"), sequence, 8, slots, 2048))["cache"]
        assert found == pytest.approx(whole / share)
    eight = memory(Layout(model("176b"), 1, 8, 32, 2048, cache="int8"))["cache"]
    assert eight == pytest.approx(whole / 8 * (128 + 4) / 256)


def test_one_token_by_hand() -> None:
    """176B on eight H200: 352.5 GB at 4,301 GB/s; 141 sums of 28,672 bytes, each 6.6 us and 14 hops
    of 0.6; sixteen kernels a layer, 2.1 us each."""
    found = best("gpu-h200", 8, 1)
    assert found.layout.tensor == 8 and found.bound_by == "bytes of weights"
    assert found.seconds["bytes of weights"] == pytest.approx(352.5e9 / 8 / 4.301e12, rel=2e-3)
    latency = 141 * (6.6e-6 + 14 * 0.6e-6) + (6.6e-6 + 7 * 0.6e-6)
    assert found.seconds["latency of collectives"] == pytest.approx(latency, rel=1e-3)
    assert found.seconds["launches"] == pytest.approx((16 * 70 + 15) * 2.1e-6)
    sums = [one for one in found.exchanges if one.kind == "all-reduce"]
    assert sum(one.count for one in sums) == 141
    assert all(one.sent == pytest.approx(2 * 7 / 8 * 14336 * 2) for one in sums)


@pytest.mark.parametrize(
    ("size", "slots", "milliseconds"), [("560m", 1, 1.135), ("560m", 8, 1.488), ("7b1", 1, 5.021)]
)
def test_what_steps_took_on_an_h200(size: str, slots: int, milliseconds: float) -> None:
    """XLA's programs, behind 1,900 tokens (benchmarks/results/decode-gpu-by-hand-2026-11-26.json).
    The time between kernels was fitted to those of 560m."""
    layout = Layout(model(size), 1, 1, slots, 1908)
    found = estimate(layout, machine("gpu-h200"))
    assert found.step_seconds == pytest.approx(milliseconds / 1e3, rel=0.1)


def test_a_prompt_by_hand() -> None:
    """Four chunks of 512; the products of blocks at no more than large ones reach, and no head: a
    larger vocabulary would cost nothing."""
    found = best("gpu-h200", 8, 1)
    flops = 2 * 70 * 12 * 14336**2 * 512 / 8
    assert 1 < found.prefill_seconds(512) / (flops / found.machine.gemm_flops) < 2.5
    assert found.prefill_seconds(2048) == pytest.approx(4 * found.prefill_seconds(512))
    assert found.prefill_seconds(600) < found.prefill_seconds(1024)
    wide = dataclasses.replace(found.layout, model=model("176b", vocab_size=501_760))
    assert estimate(wide, found.machine).prefill_seconds(512) == found.prefill_seconds(512)


@pytest.mark.parametrize(
    ("name", "sizes", "axis", "hops"),
    [  # a v5p slice of 2 x 4 x 4: two rings of four, two hops each; two chips side by side
        ("tpu-v5p", {"sequence": 2, "tensor": 16}, "tensor", (4, 0)),
        ("tpu-v5p", {"sequence": 2, "tensor": 16}, "sequence", (1, 0)),
        ("tpu-v5p", {"sequence": 4, "tensor": 8}, "tensor", (3, 0)),
        ("tpu-v5e", {"tensor": 16}, "tensor", (6, 0)),  # 4 x 4, which closes nowhere
        ("gpu-h200", {"sequence": 2, "tensor": 4}, "sequence", (1, 0)),
        ("gpu-h200", {"sequence": 2, "tensor": 8}, "sequence", (0, 1)),
        ("gpu-h200", {"tensor": 16}, "tensor", (14, 1)),
    ],
)
def test_hops(name: str, sizes: dict[str, int], axis: str, hops: tuple[int, int]) -> None:
    whole = {"stage": 1, "data": 1, "fsdp": 1, "sequence": 1, "tensor": 1} | sizes
    assert hops_of(whole, machine(name), axis) == hops


# Time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 32, 128])
def test_more_devices_are_faster(slots: int) -> None:
    """Up to sixteen chips, on each of which a head's share of the weights still outweighs hops."""
    times = []
    for devices in (1, 2, 4, 8, 16):
        found = search(model("7b1"), machine("tpu-v5p"), devices, slots=slots, length=512)
        times.append(found[0].step_seconds)
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("name", ["gpu-a100-80g", "gpu-h200", "tpu-v5p"])
@pytest.mark.parametrize("slots", [1, 32, 512])
def test_seconds_never_beat_the_bounds(name: str, slots: int) -> None:
    known = machine(name)
    for quantize in QUANTIZE:
        found = best(name, 16, slots, quantize)
        parts = memory(found.layout)
        bytes_ = (parts["weights"] + parts["cache"]) / known.memory_bandwidth
        flops = 2 * 175e9 * slots / 16 / known.peak_flops
        assert found.step_seconds == pytest.approx(sum(found.seconds.values()))
        assert max(bytes_, flops) < found.step_seconds


@pytest.mark.parametrize("figure", ["link_bytes", "memory_bandwidth", "peak_flops"])
def test_faster_hardware_is_never_slower(figure: str) -> None:
    known = machine("gpu-h100")
    faster = dataclasses.replace(known, **{figure: 2 * getattr(known, figure)})
    for slots in (1, 256):
        layout = Layout(model("176b"), 2, 8, slots, 2048)
        before, after = estimate(layout, known), estimate(layout, faster)
        assert after.step_seconds <= before.step_seconds
        assert after.prefill_seconds(2048) <= before.prefill_seconds(2048)


@pytest.mark.parametrize(
    ("name", "devices", "quantize", "slots", "milliseconds"),
    [  # by hand: weights, cache and two sums a layer alone
        ("gpu-h200", 8, "none", 1, 11.6),
        ("gpu-h200", 8, "none", 32, 19.6),
        ("tpu-v5p", 32, "none", 1, 4.7),
        ("tpu-v5p", 32, "none", 32, 9.0),
        ("gpu-h200", 4, "int8", 1, 11.6),
    ],
)
def test_176b_fits_and_is_near_its_bound(
    name: str, devices: int, quantize: str, slots: int, milliseconds: float
) -> None:
    found = best(name, devices, slots, quantize)
    assert found.fits and found.layout.cache == "bfloat16"
    assert milliseconds < 1e3 * found.step_seconds < 1.5 * milliseconds


def test_as_fast_as_nobody_was_yet_and_not_absurd() -> None:
    """DeepSpeed-Inference, float16, 8 x A100-80G, prompts of a few tokens, 100 new ones
    (transformers-bloom-inference): its kernels reached half of the bandwidth at batch 1, and less
    with more rows."""
    published = {1: 44.02, 8: 8 * 5.70, 16: 16 * 3.01, 32: 32 * 1.68, 64: 64.0, 128: 128 * 0.69}
    for slots, milliseconds in published.items():
        found = best("gpu-a100-80g", 8, slots, length=128)
        assert found.fits
        assert 0.45 * milliseconds < 1e3 * found.step_seconds < 0.75 * milliseconds


# Search -------------------------------------------------------------------------------------------


def test_what_does_not_fit_in_bfloat16_keeps_its_cache_in_eight_bits() -> None:
    assert best("gpu-h200", 8, 32).layout.cache == "bfloat16"
    many = best("gpu-h200", 8, 128)
    assert many.fits and many.layout.cache == "int8"
    assert not best("gpu-h200", 4, 128, "int8").fits


@pytest.mark.parametrize("quantize", QUANTIZE)
def test_room(quantize: str) -> None:
    """So many slots fit and no more."""
    found = best("gpu-h200", 8, 1, quantize)
    assert 60 < found.room < 200
    for more, fits in ((0, True), (1, False)):
        layout = dataclasses.replace(found.layout, slots=found.room + more)
        assert estimate(layout, found.machine).fits == fits
    assert best("gpu-a100-80g", 1, 1, quantize).room == 0


@pytest.mark.parametrize(("size", "devices"), [("176b", 8), ("176b", 32), ("7b1", 4), ("560m", 4)])
def test_heads_are_split_first(size: str, devices: int) -> None:
    """The best layout is the one that weights are loaded to (`sharding.decode_mesh`)."""
    sizes = model(size).sizes
    tensor = math.gcd(sizes["N"], sizes["F"], sizes["V"], devices)
    found = search(model(size), machine("tpu-v5p"), devices, slots=32, length=512)[0]
    assert (found.layout.sequence, found.layout.tensor) == (devices // tensor, tensor)


def test_layouts_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"no layout of 3 devices .* N = 32 .* D = 4096"):
        search(model("7b1"), machine("gpu-h200"), 3, slots=1, length=16)
    with pytest.raises(ConfigError, match=r"heads \(N = 32\) does not divide"):
        estimate(Layout(model("7b1"), 1, 3, 1, 16), machine("gpu-h200"))


# As compiled --------------------------------------------------------------------------------------


def small() -> ModelConfig:
    """No two of its sizes agree by chance."""
    return model("560m", layers=1, width=256, heads=8, vocab_size=1536, dtype="float32")


@pytest.mark.parametrize(("sequence", "tensor", "slots"), [(1, 8, 6), (4, 2, 12), (2, 4, 3)])
def test_the_compiled_step_is_what_is_counted(sequence: int, tensor: int, slots: int) -> None:
    """Collectives by kind and axis, to the byte; weights and cache; nothing large written anew."""
    mesh = MeshConfig(sequence=sequence, tensor=tensor)
    program = aot.compile_decode(small(), mesh, jax.devices()[:8], slots=slots, length=64)
    expected = estimate(Layout(small(), sequence, tensor, slots, 64), machine("gpu-h200"))
    sent: dict[tuple[str, str], float] = {}
    calls: dict[tuple[str, str], float] = {}
    for one in expected.exchanges:
        key = one.kind, one.axis
        sent[key], calls[key] = sent.get(key, 0) + one.bytes, calls.get(key, 0) + one.count
    assert program.counts.collectives == pytest.approx(sent, rel=1e-3)
    assert program.counts.calls == pytest.approx(calls, rel=0.05)
    assert program.memory["weights"] == pytest.approx(expected.memory["weights"], rel=0.03)
    assert program.memory["cache"] == expected.memory["cache"]
    assert not program.weights_written and not program.cache_written


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "plugin"), [("tpu-v5e:2x2", "libtpu"), ("gpu-h100:1x4", "jax_cuda13_plugin")]
)
def test_with_the_real_compilers(target: str, plugin: str) -> None:
    if not importlib.util.find_spec(plugin):
        pytest.skip(f"{plugin} is not installed")
    asked = model("560m", layers=2, width=1024, heads=8, vocab_size=2048)
    devices = aot.devices(aot.target(target))
    mesh = MeshConfig(sequence=2, tensor=2)
    program = aot.compile_decode(asked, mesh, devices, slots=4, length=64)
    expected = estimate(Layout(asked, 2, 2, 4, 64), machine(target.partition(":")[0]))
    found = program.counts.by_axis()
    for axis in ("sequence", "tensor"):
        sent = sum(one.bytes for one in expected.exchanges if one.axis == axis)
        assert found[axis] == pytest.approx(sent, rel=0.02)
    assert not program.weights_written


def test_what_is_written_anew_is_found() -> None:
    """A widened weight is; a row that is set in place is not."""
    weights = jax.ShapeDtypeStruct((48, 40), jnp.int8)

    def widens(w: jax.Array) -> jax.Array:
        return w.astype(jnp.float32) * 2

    (found,) = counts.written(jax.jit(widens).lower(weights).compile().as_text() or "", {48 * 40})
    assert found.startswith("f32[48,40] by ")

    def sets(w: jax.Array, i: jax.Array) -> jax.Array:
        return w.at[i].set(1)

    place = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = jax.jit(sets, donate_argnums=0).lower(weights, place).compile()
    assert not list(counts.written(compiled.as_text() or "", {48 * 40}))


# The command line ---------------------------------------------------------------------------------


def run(capsys: Any, *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.run(plan.main, plan.define, plan.__doc__, ["--decode", *argv])
    out, err = capsys.readouterr()
    return int(str(left.value.code)), out, err


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    """Of 176B, as it trains."""
    path = tmp_path / "big.py"
    path.write_text(
        "from bloomjax.config import base_config\n\n\ndef get_config():\n"
        "    config = base_config('176b')\n    config.mesh.update(fsdp=16, tensor=8)\n"
        "    return config\n"
    )
    return f"--config={path}"


@pytest.fixture
def no_compiler(monkeypatch: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.usefixtures("no_compiler")
def test_by_count_alone(capsys: Any, config_file: str) -> None:
    code, out, err = run(capsys, config_file, "--target=gpu-h200:1x8", "--json")
    found = json.loads(out)
    assert code == 0 and "by count alone" in err
    assert found["devices"] == 8 and found["context"] == 2048 and found["quantize"] == "none"
    assert [one["slots"] for one in found["plans"]] == [1, 32, 128]
    for one in found["plans"]:
        assert one["fits"] and one["compiled"] is None and one["mesh"] == {"tensor": 8}
        assert one["step_seconds"] == pytest.approx(sum(one["seconds"].values()))
        assert one["tokens_per_second"] == pytest.approx(one["slots"] / one["step_seconds"])
        assert one["prefill_seconds"]["512"] < one["prefill_seconds"]["2048"]
    code, out, _ = run(capsys, config_file, "--target=gpu-h200:1x4", "--quantize=int8")
    assert code == 0 and out.count("DOES NOT FIT") == 1 and "bytes of weights" in out


@pytest.mark.usefixtures("no_compiler")
def test_the_mesh_of_the_command_line_is_kept(capsys: Any, config_file: str) -> None:
    argv = config_file, "--target=gpu-h200:1x8", "--json", "--config.mesh.sequence=2"
    (one,) = json.loads(run(capsys, *argv, "--slots=4")[1])["plans"]
    assert one["mesh"] == {"sequence": 2, "tensor": 4}


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--target=gpu-h200:1x2",), 4, "179.4 GB: take more devices, --quantize=int8"),
        (
            ("--target=gpu-h200:1x4", "--quantize=int8", "--slots=128"),
            4,
            "--quantize=int4, or --slots=80",
        ),
        (("--target=gpu-h200:1x8", "--slots=0"), 2, "--slots=0: expected numbers of 1 or more"),
        (("--target=gpu-h200:1x8", "--quantize=int2"), 2, "int8"),
        (("--target=gpu-h200:1x8", "--search"), 2, "leave --search, --plot out"),
        (("--target=gpu-h200:1x8", "--config.mesh.data=2"), 2, "with mesh.data = 2"),
        (("--target=gpu-h200:1x3",), 2, "no layout of 3 devices"),
        (("--target=tpu-v5p:2x4x4x4",), 2, "one slice"),
    ],
)
def test_plans_that_cannot_be(
    capsys: Any, config_file: str, flags: tuple[str, ...], code: int, said: str
) -> None:
    found, out, err = run(capsys, config_file, *flags)
    assert found == code and not out
    assert said in err.splitlines()[-1]


def test_a_plan_tells_what_the_compiler_made(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The compiler of CPUs in place of the target's, which need not be installed."""
    monkeypatch.setattr(aot, "has_compiler", lambda target: True)
    monkeypatch.setattr(aot, "devices", lambda target: jax.devices()[: target.devices])
    path = tmp_path / "small.py"
    path.write_text(
        "from bloomjax.config import base_config\n\n\ndef get_config():\n"
        "    config = base_config()\n    config.data.sequence_length = 64\n"
        "    config.model.update(layers=1, width=64, heads=4, vocab_size=192)\n"
        "    return config\n"
    )
    code, out, err = run(capsys, f"--config={path}", "--target=gpu-h200:1x4", "--slots=2,4")
    assert code == 0 and "compiling the step of 4 slots" in err
    assert "compiled for 4 slots" in out and "compiled for 2 slots" not in out
    assert "all-reduce over tensor" in out and "0 operations write the cache anew" in out


def test_quantize_belongs_to_decoding(capsys: Any, config_file: str) -> None:
    with pytest.raises(SystemExit) as left:
        argv = [config_file, "--target=gpu-h200:1x8", "--quantize=int8"]
        cli.run(plan.main, plan.define, plan.__doc__, argv)
    assert left.value.code == 2 and "--decode" in capsys.readouterr().err


def test_machines_know_their_protocols() -> None:
    """A small collective of eight takes what NCCL's own tuning says: 15 us by LL, 40 by LL128."""
    for known in machines.machines():
        steps = 2 * 7
        times = [1e6 * (start + steps * hop) for start, hop, _ in known.protocols]
        assert times == pytest.approx([15, 40.6, 56] if not known.torus else [14])
        assert max(share for *_, share in known.protocols) == 1
