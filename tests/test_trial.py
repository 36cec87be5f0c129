"""A run from the command line to its end: killed, stopped, resumed, on one process and on four."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import trial
from trial import ROOT, TINY, Trial, arrays, ended, metrics, refused, saved, steps, until

from bloomjax import cli, train
from bloomjax.checkpoint import restore
from bloomjax.config import MeshConfig, freeze, read_config
from bloomjax.sharding import act, make_mesh, put
from bloomjax.step import abstract_state, batch_shape, init_state, train_step

STEPS = 80  # of tests/configs/tiny.py
ENDLESS = ("--config.optim.steps=1000000", "--config.run.checkpoint_every=1000000")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    return Trial(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def unbroken(runs: Trial, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run that nothing happened to. Not to be changed."""
    workdir = tmp_path_factory.mktemp("unbroken")
    runs.done(workdir)
    assert saved(workdir) == [STEPS - 4, STEPS]
    assert [record["step"] for record in steps(workdir)] == list(range(1, STEPS + 1))
    assert steps(workdir)[-1]["loss"] < 0.9 * steps(workdir)[0]["loss"]
    return workdir


@pytest.fixture
def copy(unbroken: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unbroken, tmp_path / "copy"))


def same_samples(workdir: Path, unbroken: Path, count: int) -> None:
    """The samples of the first steps bitwise, their losses to 1e-5."""
    got, expected = steps(workdir), steps(unbroken)[:count]
    assert [r["step"] for r in got] == list(range(1, count + 1))
    assert [r["batch"] for r in got] == [r["batch"] for r in expected]
    np.testing.assert_allclose([r["loss"] for r in got], [r["loss"] for r in expected], rtol=1e-5)


@pytest.mark.slow
def test_four_processes_of_two_devices_are_one_of_one(
    runs: Trial, unbroken: Path, tmp_path: Path
) -> None:
    """Losses and samples of three steps; their gradients, as the moments have them; parameters."""
    alone, four = tmp_path / "alone", tmp_path / "four"
    mesh = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
    runs.done(alone, "--config.optim.steps=3")
    runs.done(four, "--config.optim.steps=3", *mesh, count=4, devices=2)
    same_samples(four, unbroken, 3)
    found, expected = state(four), state(alone)
    for moment in ("mu", "nu"):
        for (path, f), e in zip(
            jax.tree_util.tree_leaves_with_path(found["moments"][moment]),
            jax.tree.leaves(expected["moments"][moment]),
            strict=True,
        ):
            assert np.linalg.norm(f - e) <= 1e-4 * np.linalg.norm(e), (moment, path)
    peak = freeze(read_config(alone / "config.json")).optim.learning_rate
    for f, e in zip(
        jax.tree.leaves(found["params"]), jax.tree.leaves(expected["params"]), strict=True
    ):
        assert np.abs(f - e).max() <= 0.02 * peak


def state(workdir: Path) -> dict[str, Any]:
    """What the newest checkpoint holds, as numpy arrays."""
    config = freeze(read_config(workdir / "config.json"))
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    restored = restore(workdir / "checkpoints", abstract_state(config, mesh).as_tree())
    assert restored
    return jax.tree.map(np.asarray, restored.state)


@pytest.mark.slow
def test_killed_ten_times_is_bitwise_unbroken(runs: Trial, unbroken: Path, tmp_path: Path) -> None:
    rng, command = random.Random(0), runs.train(tmp_path)
    announced = 0
    for life in range(10):
        # Some lives end in start-up, the others some steps later, in a step or in a save.
        before, begun = len(steps(tmp_path)), time.monotonic()
        seconds, more = rng.uniform(0, 6) if life % 3 == 0 else 90, rng.randint(1, 6)
        (child,) = runs.start(command)
        while time.monotonic() < begun + seconds and len(steps(tmp_path)) < before + more:
            assert child.poll() is None
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        child.kill()
        _, err = child.communicate()
        assert child.returncode == -signal.SIGKILL
        # What was said to be complete is there after the kill.
        lines = [line for line in err.splitlines() if line.startswith("checkpoint ")]
        announced = max([announced, *(int(line.split()[1].rstrip(":")) for line in lines)])
        assert max(saved(tmp_path), default=0) >= announced
    assert 0 < announced < STEPS
    runs.done(tmp_path)
    assert metrics(tmp_path) == metrics(unbroken)
    assert arrays(tmp_path, STEPS) == arrays(unbroken, STEPS)
    assert len(arrays(tmp_path, STEPS)) > 40


@pytest.mark.slow
def test_samples_do_not_depend_on_processes(runs: Trial, unbroken: Path, tmp_path: Path) -> None:
    command = runs.train(tmp_path, "--config.optim.steps=12")
    for count, end in ((1, 4), (2, 8)):
        children = runs.start(command, count)
        until(lambda end=end: end in saved(tmp_path), children)
        trial.kill(children)
        assert saved(tmp_path)[-1] < 12
    assert [e.code for e in runs.run(command, 4)] == [0] * 4
    same_samples(tmp_path, unbroken, 12)
    assert saved(tmp_path)[-1] == 12


def test_a_flipped_byte_costs_four_steps(runs: Trial, unbroken: Path, copy: Path) -> None:
    file = max((copy / "checkpoints" / str(STEPS)).glob("params*/c/**/0"))
    flipped = bytearray(file.read_bytes())
    flipped[len(flipped) // 2] ^= 16
    file.write_bytes(flipped)
    (end,) = runs.done(copy)
    name = file.relative_to(copy / "checkpoints").as_posix()
    assert name in end.err and "falling back to the step before" in end.err
    assert arrays(copy, STEPS) == arrays(unbroken, STEPS)
    assert metrics(copy) == metrics(unbroken)


def test_stopped_it_saves_and_says_how_to_resume(runs: Trial, tmp_path: Path) -> None:
    children = runs.start(runs.train(tmp_path, *ENDLESS))
    until(lambda: len(steps(tmp_path)) > 2, children)
    children[0].terminate()
    (first,) = ended(children)
    assert first.code == 0, first
    assert saved(tmp_path) == [len(steps(tmp_path))]

    resume = shlex.split(first.err.splitlines()[-1])
    assert "to resume:" in first.err.splitlines()[-2] and resume[:2] == ["python", "-m"]
    children = runs.start(resume[2:])
    until(lambda: len(steps(tmp_path)) > saved(tmp_path)[0] + 2, children)
    children[0].send_signal(signal.SIGINT)
    (second,) = ended(children)
    assert second.code == 130 and shlex.split(second.err.splitlines()[-1]) == resume
    assert [r["step"] for r in steps(tmp_path)] == list(range(1, saved(tmp_path)[-1] + 1))


def test_stopped_while_it_compiles_it_saves_the_first_step(runs: Trial, tmp_path: Path) -> None:
    # 17 positions: nothing compiled before is of use
    flags = ("--config.data.sequence_length=17", *ENDLESS)
    children = runs.start(runs.train(tmp_path, *flags))
    assert children[0].stderr
    while not children[0].stderr.readline().startswith("data: "):
        assert children[0].poll() is None
    children[0].terminate()
    (end,) = ended(children)
    assert end.code == 0 and saved(tmp_path) == [1], end


@pytest.mark.slow
def test_one_of_two_is_told_and_both_stop(runs: Trial, tmp_path: Path) -> None:
    children = runs.start(runs.train(tmp_path, *ENDLESS), 2)
    until(lambda: len(steps(tmp_path)) > 2, children)
    children[1].terminate()
    both = ended(children)
    assert [e.code for e in both] == [0, 0], both
    assert saved(tmp_path) == [len(steps(tmp_path))]
    assert "to resume:" in both[0].err and not both[1].err.count("to resume:")


@pytest.mark.slow
def test_when_one_of_two_dies_the_other_leaves(runs: Trial, tmp_path: Path) -> None:
    children = runs.start(runs.train(tmp_path, *ENDLESS), 2)
    until(lambda: len(steps(tmp_path)) > 2, children)
    children[1].kill()
    survivor, _ = ended(children, 20)
    assert survivor.code == 6, survivor
    *_, told, resume, last = survivor.err.splitlines()
    assert last.startswith("bloomjax: ") and "to resume" in told, survivor.err
    assert f"python -m bloomjax.train --config={TINY} --workdir={tmp_path}" in resume


def test_what_process_0_refuses_is_the_last_thing_said(
    runs: Trial, copy: Path, tmp_path: Path
) -> None:
    before = trial.tree(copy)
    with (tmp_path / "terminal").open("w+") as terminal:
        end = subprocess.run(
            [ROOT / "launch" / "local.sh", "2", *runs.train(copy, "--config.optim.steps=7")],
            env=runs.environment | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=terminal,
            cwd=ROOT,
            timeout=60,
        )
        terminal.seek(0)
        said = terminal.read().splitlines()
    assert end.returncode == 2 and not end.stdout
    assert len(said) == 1 and "optim.steps: 80 -> 7" in said[0]
    assert trial.tree(copy) == before


def test_a_second_trainer_is_refused(runs: Trial, tmp_path: Path) -> None:
    children = runs.start(runs.train(tmp_path, *ENDLESS))
    until(lambda: steps(tmp_path), children)
    refused(runs.one(tmp_path, *ENDLESS), 2, f"process {children[0].pid} on", "another workdir")
    children[0].terminate()
    assert ended(children)[0].code == 0  # it was not disturbed


def test_a_complete_run_says_so_and_more_steps_continue(
    runs: Trial, unbroken: Path, copy: Path
) -> None:
    before = trial.tree(copy)
    (end,) = runs.done(copy)
    assert f"complete at step {STEPS}: raise config.optim.steps" in end.err
    assert trial.tree(copy) == before
    runs.done(copy, f"--config.optim.steps={STEPS + 2}", "--config.run.seed=42")
    assert [r["step"] for r in steps(copy)] == list(range(1, STEPS + 3))
    assert steps(copy)[:STEPS] == steps(unbroken)
    assert saved(copy)[-1] == STEPS + 2


def test_steps_without_finite_gradients_end_the_run(runs: Trial, tmp_path: Path) -> None:
    """An absurd learning rate: the first steps end in infinities, no later one has a gradient."""
    end = runs.one(tmp_path, "--config.optim.learning_rate=1e38", "--config.run.checkpoint_every=1")
    assert end.code == 5, end
    last = end.err.splitlines()[-1]
    assert last.startswith("bloomjax: no finite gradient in 3 steps in a row"), last
    records = steps(tmp_path)
    assert [r["skipped"] for r in records[-3:]] == [1, 2, 3]
    assert [r["loss"] for r in records[-3:]] == [None] * 3
    assert [r["samples"] for r in records] == [4 * r["step"] for r in records]  # consumed
    skipped = [arrays(tmp_path, step) for step in saved(tmp_path)]
    kept = [{k: v for k, v in a.items() if k.startswith(("params", "moments"))} for a in skipped]
    assert kept[0] == kept[1] and len(kept[0]) > 40


def test_accumulation_and_ramp_up_change_no_loss(runs: Trial, tmp_path: Path) -> None:
    ramp = ("ramp_start=2", "ramp_increment=1", "ramp_samples=10", "steps=8")
    counted = """
from bloomjax import cli, train
from bloomjax.step import train_step
try:
    cli.run(train.main, train.define, train.__doc__)
finally:
    print(train_step._cache_size())
"""
    losses, batches = [], []
    for accumulation in (1, 2):
        workdir = tmp_path / str(accumulation)
        flags = [f"--config.optim.{flag}" for flag in ramp]
        argv = runs.train(workdir, f"--config.run.accumulation={accumulation}", *flags)[1:]
        (end,) = runs.run(["-c", counted, *argv])
        assert end.code == 0 and end.out == "1\n", end  # one program for all batch sizes
        records = steps(workdir)
        assert [r["samples"] for r in records] == [2, 4, 6, 9, 12, 16, 20, 24]
        losses.append([r["loss"] for r in records])
        batches.append([r["batch"] for r in records])
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert batches[0] == batches[1]


def test_a_step_without_a_finite_gradient_changes_nothing(runs: Trial) -> None:
    config = cli.load_config(cli.parse(runs.train(Path("unused"))[1:], train.define))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = init_state(config)
        A, B = batch_shape(config, mesh)
        shape = A, B, config.data.sequence_length
        tokens = put(
            np.arange(np.prod(shape)).reshape(shape).astype(np.int32) % 320, act("ABT"), mesh
        )
        good = np.ones(shape, np.float32)
        bad = good.copy()
        bad[0, 1, 2] = np.inf
        seen = []
        for weights in (good, bad, bad, good):
            batch = {"tokens": tokens, "targets": tokens, "weights": put(weights, act("ABT"), mesh)}
            state, report = train_step(config, state, batch, np.int32(B))
            assert report["finite"] == (weights is good)
            seen.append(jax.device_get(state))
    same = [jax.tree.map(np.array_equal, seen[0], s) for s in seen]
    assert all(jax.tree.leaves([same[i].params for i in (1, 2)]))
    assert all(jax.tree.leaves([same[i].moments for i in (1, 2)]))
    assert not any(jax.tree.leaves(same[3].params["embed"]))
    assert [(s.step, s.samples, s.skipped, s.streak) for s in seen] == [
        (1, B, 0, 0),
        (2, 2 * B, 1, 1),
        (3, 3 * B, 2, 2),
        (4, 4 * B, 2, 0),
    ]


def test_only_results_are_on_standard_output(runs: Trial, unbroken: Path) -> None:
    command = ["bloomjax.generate", f"--model={unbroken}", "--prompt_ids=5,6,7", "--json"]
    alone = runs.run([*command, "--max_new_tokens=4"])[0]
    both = runs.run([*command, "--max_new_tokens=4"], 2)
    assert [e.code for e in (alone, *both)] == [0, 0, 0], (alone, both)
    one, two = json.loads(alone.out), json.loads(both[0].out)
    assert one["token_ids"] == two["token_ids"] and len(one["token_ids"]) == 4
    assert not both[1].out
