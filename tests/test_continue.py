"""Training goes on from what was converted: a whole state, or parameters alone."""

import json
import tarfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import trial
from bloomjax_convert import __main__ as entry
from helpers import to_hf
from oracles import megatron_tensors as made
from trial import Trial

from bloomjax import cli, step, train
from bloomjax.checkpoint import Checkpoints
from bloomjax.config import base_config, freeze
from bloomjax.data.indexed import IndexedWriter
from bloomjax.sharding import act, make_mesh, put

GOLDEN = Path(__file__).parent / "golden"


def convert(source: Path, target: Path, *flags: str) -> Path:
    with pytest.raises(SystemExit) as left:
        argv = [str(source), str(target), *flags]
        cli.run(entry.main, entry.define, entry.__doc__, argv, ("src", "dst"))
    assert left.value.code == 0
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Megatron-DeepSpeed's, of TP 2 x PP 2 x DP 2, with BF16 optimizer; see its generator."""
    path = tmp_path_factory.mktemp("megatron")
    with tarfile.open(GOLDEN / "megatron_folder.tar.xz") as tar:
        tar.extractall(path, filter="data")
    return path


@pytest.mark.parametrize("name", ["global_step7", "global_step7_universal"])
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)], ids=["one device", "eight"])
def test_one_more_step_is_that_of_the_unbroken_run(
    folder: Path, tmp_path: Path, name: str, mesh: tuple[int, int, int]
) -> None:
    """torch's AdamW goes on from the whole tensors, ours from the converted folder
    (tests/oracles/megatron_step.py)."""
    golden = np.load(GOLDEN / "megatron_step.npz")
    run = convert(folder / name, tmp_path / "run", "--to=orbax")
    config = base_config()
    config.model.update(layers=2, width=12, heads=4, vocab_size=20)
    rows, rate = golden["rows"], float(golden["rate"])
    config.data.update(batch_size=len(rows), sequence_length=rows.shape[1] - 1)
    config.optim.update(learning_rate=rate, min_learning_rate=rate, warmup_samples=0, ramp_start=0)
    config.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
    frozen = freeze(config)
    devices = make_mesh(frozen.mesh, jax.devices()[: int(np.prod(mesh))])
    with jax.set_mesh(devices):
        checkpoints = Checkpoints(run / "checkpoints", keep=1)
        state, origin = train.restore(frozen, devices, checkpoints)
        checkpoints.close()
        assert (int(state.step), int(state.samples)) == (7, 1344)
        assert origin and origin["format"] == "megatron" and origin["iteration"] == 7
        host = {
            "tokens": rows[:, :-1],
            "targets": rows[:, 1:],
            "weights": np.ones(rows[:, 1:].shape),
        }
        batch = {
            k: put(a[None].astype(np.float32 if k == "weights" else np.int32), act("ABT"), devices)
            for k, a in host.items()
        }
        state, report = step.train_step(frozen, state, batch, np.int32(len(rows)))
    np.testing.assert_allclose(report["loss"], golden["loss"], rtol=1e-6)
    np.testing.assert_allclose(report["grad_norm"], golden["norm"], rtol=1e-5)
    trees = {
        "params": state.params, "moments.mu": state.moments.mu, "moments.nu": state.moments.nu
    }  # fmt: skip
    moved = 0.0
    for kind, tree in trees.items():
        for tensor, found in to_hf(jax.tree.map(np.asarray, tree), frozen.model).items():
            expected = golden[f"{kind}/{tensor}"]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=tensor)
            if kind == "params":
                before = _before(folder, tensor)
                moved = max(moved, float(np.abs(expected - before).max()))
    assert moved > 1e-3  # a thousand times what is tolerated


def _before(folder: Path, tensor: str) -> np.ndarray:
    return made.tensors(made.LAYERS, made.WIDTH, made.VOCAB_SIZE)["fp32"][tensor]


@pytest.mark.slow
def test_a_run_starts_from_converted_parameters(tmp_path: Path) -> None:
    """Trained, exported, imported: the first loss is that of a trained model, the optimizer is
    new, the run's checkpoints know where it all began, and resuming works as ever."""
    runs = Trial(tmp_path)
    runs.done(tmp_path / "first")
    first = [record["loss"] for record in trial.steps(tmp_path / "first")]
    convert(tmp_path / "first", tmp_path / "hf", "--to=hf", "--dtype=bfloat16")
    second = convert(tmp_path / "hf", tmp_path / "second", "--to=orbax")
    flags = (
        f"--config.data.tokenizer={second / 'tokenizer.json'}",
        "--config.optim.learning_rate=1e-4",
        "--config.optim.warmup_samples=0",
    )
    runs.done(second, *flags, "--config.optim.steps=4")
    losses = [record["loss"] for record in trial.steps(second)]
    assert first[0] > 5 and losses[0] < min(first) + 0.3 < first[0] - 1
    runs.done(second, *flags, "--config.optim.steps=6")
    assert [record["step"] for record in trial.steps(second)] == [1, 2, 3, 4, 5, 6]
    meta = json.loads((second / "checkpoints" / "6" / "manifest.json").read_text())["meta"]
    assert meta["origin"]["format"] == "hf" and meta["origin"]["source"]["format"] == "orbax"
    end = runs.one(second, *flags, "--config.model.width=64", "--config.optim.steps=8")
    trial.refused(end, 2, "model.width: 32 -> 64")


@pytest.mark.slow
def test_a_converted_state_is_of_another_model(folder: Path, tmp_path: Path) -> None:
    """The configuration has to be that of the checkpoint; data and optimizer are free."""
    runs, workdir = Trial(tmp_path), convert(folder, tmp_path / "run", "--to=orbax")
    before = trial.tree(workdir)
    trial.refused(runs.one(workdir), 2, "model.width: 12 -> 32", "model.heads: 4 -> 2")
    assert trial.tree(workdir) == before


def test_metrics_go_on_from_the_step(folder: Path, tmp_path: Path) -> None:
    """Step and samples of the folder count on: schedule, data order and names of checkpoints."""
    runs, workdir = Trial(tmp_path), convert(folder, tmp_path / "run", "--to=orbax")
    shape: dict[str, Any] = {"layers": 2, "width": 12, "heads": 4, "vocab_size": 20}
    with IndexedWriter(tmp_path / "tokens", 20) as writer:
        writer.write(np.random.default_rng(0).integers(0, 20, 500).tolist())
        writer.end_document()
    flags = [f"--config.model.{name}={value}" for name, value in shape.items()]
    flags += [f"--config.data.train={tmp_path / 'tokens'}", "--config.data.tokenizer="]
    flags += ["--config.data.heldout_every=0", "--config.optim.steps=9"]
    runs.done(workdir, *flags)
    (eighth, ninth) = trial.steps(workdir)
    assert (eighth["step"], eighth["samples"], ninth["samples"]) == (8, 1348, 1352)
    assert trial.saved(workdir) == [8, 9]
