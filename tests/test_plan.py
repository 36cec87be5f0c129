"""Plans: targets are understood or refused in one line, and what is counted agrees."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import jax
import pytest

from bloomjax import aot, cli, cost, counts, machines, plan, search
from bloomjax.config import Config, base_config, freeze
from bloomjax.errors import ConfigError


def small(**mesh: int) -> Config:
    """Wide enough that matrices outweigh all else. A pipeline gets twice as many microbatches as
    it has stages."""
    config = base_config()
    config.run.accumulation = 2 * mesh["stage"] if "stage" in mesh else 1
    config.model.update(layers=8, width=256, heads=8, vocab_size=2048, dtype="float32")
    config.data.update(batch_size=16, sequence_length=64)
    config.optim.update(ramp_start=0)
    config.mesh.update({"fsdp": 1, **mesh})
    return freeze(config)


def test_targets() -> None:
    assert aot.target("tpu-v5p:8x16x16") == aot.Target("tpu-v5p", (8, 16, 16))
    assert aot.target("tpu-v5e:2x16x16").devices == 512
    assert aot.target("gpu-h200:48x8").devices == 384
    assert str(aot.target("gpu-b200:8")) == "gpu-b200:8"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tpu-v7:2x2", "tpu-v5p"),
        ("tpu-v5p", "tpu-v5p:4x4x4"),
        ("tpu-v5p:8x8", "tpu-v5p:4x4x4"),
        ("tpu-v5e:4x4x4x4", "tpu-v5e:4x4"),
        ("gpu-h200:0x8", "gpu-h200:2x8"),
        ("gpu-h200:2x8x4", "gpu-h200:2x8"),
        ("gpu-h200:-8", "gpu-h200:2x8"),
    ],
)
def test_a_target_that_cannot_be(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        aot.target(text)
    assert text in str(error.value) and said in str(error.value)
    assert "\n" not in str(error.value)


def test_gpu_descriptions_agree_with_the_machines() -> None:
    gpus = [m for m in machines.machines() if m.name.startswith("gpu-")]
    assert len(gpus) >= 4
    for machine in gpus:
        text = (Path(machines.__file__).parent / f"{machine.name}.txtpb").read_text()
        said = {k: float(v) for k, v in re.findall(r"(\w+): ([\d.]+)", text)}
        assert said["memory_bandwidth"] == pytest.approx(machine.memory_bandwidth, rel=0.05)
        assert said["core_count"] == machine.cores
        assert machine.capacity <= said["device_memory_size"] <= 1.1 * machine.memory_bytes


LAYOUTS: list[dict[str, int]] = [
    {"fsdp": 8},
    {"tensor": 8},
    {"data": 8},
    {"sequence": 8},
    {"stage": 8},
]


@pytest.mark.parametrize("mesh", LAYOUTS, ids=str)
def test_the_compiled_step_is_what_the_model_counts(mesh: dict[str, int]) -> None:
    """FLOPs to 1 %, bytes of collectives to 5 % an axis: two ways of counting, one of them XLA's
    text of the program, the other no more than the sizes of the model."""
    config = small(**mesh)
    program = aot.compile_step(config, jax.devices())
    expected = cost.estimate(config, machines.machine("gpu-h200"), 8)
    flops = sum(program.counts.flops.values())
    assert flops == pytest.approx(sum(expected.flops.values()), rel=0.01)
    sent = plan.sent_by_axis(expected)
    found = program.counts.by_axis()
    assert found.keys() == sent.keys()
    for axis in sent:
        assert found[axis] == pytest.approx(sent[axis], rel=0.05)


def test_memory_is_of_one_device() -> None:
    config = small(fsdp=8)
    memory = aot.compile_step(config, jax.devices()).memory
    state = 4 * config.model.parameter_count / 8  # but for biases, which have no D to split
    assert memory.parameters == pytest.approx(state, rel=0.02)
    assert memory.optimizer == pytest.approx(2 * state, rel=0.02)
    assert 0 < memory.batch < 1e5 and memory.temporaries > 0 and memory.outputs < 1e4


def run(capsys: Any, *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.run(plan.main, plan.define, plan.__doc__, argv)
    out, err = capsys.readouterr()
    return int(str(left.value.code)), out, err


CONFIG = '''"""A small one."""
from bloomjax.config import base_config


def get_config():
    config = base_config()
    config.model.update(layers=4, width=256, heads=8, vocab_size=2048)
    config.data.update(batch_size=16, sequence_length=64)
    config.optim.update(ramp_start=0)
    return config
'''


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return f"--config={path}"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "--target"),
        (("--target=gpu-h200",), "gpu-h200:2x8"),
        (("--target=gpu-h200:8", "--plot=plan.pdf"), ".png or .svg"),
        (("--target=gpu-h200:8", "--plot=/nowhere/plan.png"), "folder"),
    ],
)
def test_command_lines_that_cannot_be(
    capsys: Any, config_file: str, flags: tuple[str, ...], said: str
) -> None:
    code, out, err = run(capsys, config_file, *flags)
    assert code == 2 and not out and said in err and err.count("\n") == 1


def test_without_a_compiler(capsys: Any, config_file: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, err = run(capsys, config_file, "--target=tpu-v5e:2x2")
    assert code == 2 and not out and "pip install 'bloomjax[plan]'" in err


@pytest.fixture
def devices_of_this_host(monkeypatch: Any) -> None:
    """The compiler of CPUs in place of the target's, which need not be installed."""
    monkeypatch.setattr(aot, "devices", lambda target: jax.devices()[: target.devices])


@pytest.mark.usefixtures("devices_of_this_host")
def test_json(capsys: Any, config_file: str) -> None:
    """One object on stdout; the mesh is chosen where none is given, and kept where one is."""
    code, out, _ = run(capsys, config_file, "--target=gpu-h200:8", "--json")
    found = json.loads(out)
    assert code == 0 and found["fits"] and found["devices"] == 8
    assert found["flags"].startswith("--config.mesh.stage=")
    assert found["memory"]["total"] == sum(found["memory"].values()) - found["memory"]["total"]
    assert found["step_seconds"] == pytest.approx(sum(found["seconds"].values()))
    argv = config_file, "--target=gpu-h200:8", "--json", "--config.mesh.tensor=2"
    mesh = json.loads(run(capsys, *argv)[1])["mesh"]
    assert mesh["tensor"] == 2 and mesh["fsdp"] == 4


@pytest.mark.usefixtures("devices_of_this_host")
def test_what_does_not_fit_leaves_with_4(capsys: Any, config_file: str, monkeypatch: Any) -> None:
    little = dataclasses.replace(machines.machine("gpu-h200"), memory_bytes=1e6)
    monkeypatch.setattr(machines, "machine", lambda name: little)
    code, out, err = run(capsys, config_file, "--target=gpu-h200:8", "--config.mesh.data=8")
    assert code == 2 or (code == 4 and "DOES NOT FIT" in out)
    code, out, err = run(
        capsys, config_file, "--target=gpu-h200:8", "--config.mesh.fsdp=8", "--config.mesh.data=1"
    )
    assert code == 4 and "DOES NOT FIT" in out and "a device" in err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "plugin"), [("tpu-v5e:2x2", "libtpu"), ("gpu-h100:4", "jax_cuda13_plugin")]
)
def test_with_the_real_compilers(
    capsys: Any, config_file: str, tmp_path: Path, target: str, plugin: str
) -> None:
    if not importlib.util.find_spec(plugin):
        pytest.skip(f"{plugin} is not installed")
    plot = tmp_path / "plan.png"
    argv = [config_file, f"--target={target}", "--json", "--config.mesh.tensor=2"]
    if importlib.util.find_spec("matplotlib"):
        argv.append(f"--plot={plot}")
    code, out, _ = run(capsys, *argv)
    found = json.loads(out)
    assert code == 0 and found["devices"] == 4 and not found["involuntary_rematerialization"]
    assert {c["axes"] for c in found["collectives"]} >= {"fsdp", "tensor"}
    expected = sum(found["expected"]["flops"].values())
    assert sum(found["flops"].values()) == pytest.approx(expected, rel=0.01)
    assert plot.exists() == (f"--plot={plot}" in argv)


def test_a_plan_goes_on_until_a_layout_fits(monkeypatch: Any) -> None:
    """What the first compiled layout needs above its count is expected of the others too."""
    machine = machines.machine("gpu-h200")
    names = ("tight", "as tight", "roomy", "roomier")
    sizes = dict(zip(names, (0.98, 0.97, 0.8, 0.7), strict=True))
    compiled = []

    def candidate(name: str) -> search.Candidate:
        estimate = dataclasses.replace(
            cost.estimate(small(fsdp=8), machine, 8), memory={"all": sizes[name] * machine.capacity}
        )
        return search.Candidate(small(fsdp=8), estimate, name)

    candidates = [candidate(name) for name in names]

    def compile_step(config: Config, devices: Any) -> aot.Program:
        name = names[[c.config is config for c in candidates].index(True)]
        compiled.append(name)
        memory = aot.Memory(0, 0, 0, int(1.1 * sizes[name] * machine.capacity), 0, 0)
        return aot.Program({}, (1, 1, 1), 0.0, memory, counts.Counts(), ())

    monkeypatch.setattr(aot, "compile_step", compile_step)
    target = aot.target("gpu-h200:8")
    plans, _ = plan.compile_best(target, candidates, [], several=False)
    assert compiled == ["tight", "roomy"] and [p.note for p in plans] == compiled
    compiled.clear()
    plans, _ = plan.compile_best(target, candidates, [], several=True)
    assert compiled == ["tight", "roomy", "roomier"]
