"""Train BLOOM on any mesh.

    python -m bloomjax.train --config=configs/quickstart.py --workdir=runs/quickstart

The same command again resumes. `--config.group.field=value` changes a field.
"""

import json
import math
import os
import shlex
import shutil
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding
from ml_collections import config_flags

from bloomjax import checkpoint, cli, processes, sharding
from bloomjax.checkpoint import Checkpoints
from bloomjax.config import Config, freeze, resume_differences
from bloomjax.data.pipeline import heldout_batches, train_batches
from bloomjax.data.prepare import Prepared, open_prepared, prepare
from bloomjax.data.tokenizer import load_tokenizer
from bloomjax.errors import ConfigError, InputError, NonFiniteError
from bloomjax.metrics import Metrics, duration, peak_flops
from bloomjax.model import Params
from bloomjax.optim import BatchRamp
from bloomjax.step import TrainState, abstract_state, batch_shape, eval_step, init_state, train_step

# Steps in a row without a finite gradient after which a run gives up.
PATIENCE = 3


def define(values: flags.FlagValues) -> None:
    config_flags.DEFINE_config_file("config", None, "a file of configs/", flag_values=values)
    flags.DEFINE_string("workdir", None, "the folder of the run", flag_values=values)


def main(values: flags.FlagValues) -> None:
    if values.config is None or not values.workdir:
        missing = "--config" if values.config is None else "--workdir"
        raise ConfigError(f"{missing} is missing: expected --config=FILE.py --workdir=FOLDER")
    config = freeze(values.config)
    processes.start()
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_divides(config, mesh)
    with jax.set_mesh(mesh):
        train(config, Path(values.workdir), mesh)


def train(config: Config, workdir: Path, mesh: Mesh) -> None:
    """The run of `workdir`, from where it stands to `optim.steps`."""
    run, steps = config.run, config.optim.steps

    # ---- the folder, its data ---------------------------------------------------------------
    checkpoints = Checkpoints(workdir / "checkpoints", run.keep_checkpoints)
    prepared = prepare_run(config, workdir)
    meta: dict[str, Any] = {
        "config": config.to_dict(),
        "data": prepared.train.sha256,
        "tokenizer": load_tokenizer(prepared.tokenizer).fingerprint if prepared.tokenizer else "",
    }

    # ---- the state: restored, or fresh ------------------------------------------------------
    restored = checkpoints.restore(abstract_state(config, mesh).as_tree())
    if restored:
        for what in ("data", "tokenizer"):
            if restored.meta[what] != meta[what]:
                raise InputError(
                    f"{workdir}: expected the {what} of step {restored.step} "
                    f"({restored.meta[what]:.12}), found {meta[what]:.12}: bring it back, or "
                    "choose another workdir"
                )
        state = TrainState.from_tree(restored.state)
    else:
        state = init_state(config)
    first = saved = int(state.step)
    metrics = Metrics(workdir, done=first)
    metrics.say(describe(config, mesh, prepared, state))
    if first >= steps:
        metrics.say(f"complete at step {first}: raise config.optim.steps to go on")

    # ---- the batches ------------------------------------------------------------------------
    ramp = BatchRamp.of(config)
    A, B = batch_shape(config, mesh)
    T = config.data.sequence_length
    layout = NamedSharding(mesh, sharding.act("ABT"))
    rows = sharding.rows_of_this_process(layout, (A, B, T), dim=1)
    batches = train_batches(
        prepared,
        sequence_length=T,
        seed=run.seed,
        samples_of=ramp,
        shape=(A, B),
        rows=rows,
        first_step=first,
        steps=steps,
        workers=run.workers,
    )
    evaluation = Evaluation(config, prepared, mesh, B)

    # ---- the loop ---------------------------------------------------------------------------
    reporter = Reporter(config, metrics, first)
    with processes.Stop() as stop, closing(checkpoints), closing(metrics), closing(batches):
        for done, batch in enumerate(batches, first + 1):
            if done == run.profile_step:
                jax.profiler.start_trace(str(workdir / "profile"))
            batch = {
                name: jax.make_array_from_process_local_data(layout, local, (A, B, T))
                for name, local in batch.items()
            }
            count = ramp(done - 1)[1]
            state, report = train_step(config, state, batch, np.int32(count))
            reporter.step(done, report)  # of the step before: this one is still running

            stopping = stop.now(done)
            save = done % run.checkpoint_every == 0 or done == steps or stopping
            evaluate = (run.eval_every and done % run.eval_every == 0) or done == steps
            if save or evaluate or done == run.profile_step:
                reporter.flush()
            if done == run.profile_step:
                jax.profiler.stop_trace()
            if evaluate and not stopping and evaluation:
                record = evaluation(state.params)
                metrics.write({"step": done} | record)
                metrics.say("held out:" + "".join(f"  {k} {v:.4f}" for k, v in record.items()))
            if save:
                checkpoints.save(done, state.as_tree(), meta | {"samples": int(state.samples)})
                saved = done
            if not reporter.waiting:
                reporter.restart_clock()
            if stopping:
                break
    if saved < steps:
        metrics.say(f"stopped after step {saved}; to resume:\n  {command()}")
        if stop.interrupted:
            raise SystemExit(130)


def prepare_run(config: Config, workdir: Path) -> Prepared:
    """Claim the folder for this configuration, and tokenise the data where that is still to do.

    ConfigError, listing the differences, if the folder holds the run of another configuration.
    """
    data, tokens = workdir / "data", config.model.vocab_size

    def claim() -> None:
        path = workdir / "config.json"
        if path.exists():
            differences = resume_differences(json.loads(path.read_text()), config)
            if differences:
                raise ConfigError(
                    f"{workdir} holds a run of another configuration ({'; '.join(differences)}): "
                    "expected run.*, mesh.* or a larger optim.steps to differ; choose another "
                    "workdir"
                )
        # What a run has begun with stays: sources may change under it, its tokens do not.
        begun = checkpoint.newest_meta(workdir / "checkpoints")
        prepared = (begun and whole(data)) or prepare(config.data, tokens, data)
        if prepared.tokenizer:  # beside the checkpoints, so that they are of use without the data
            shutil.copy(prepared.tokenizer, workdir / prepared.tokenizer.name)
        fresh = path.with_suffix(".tmp")
        fresh.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        os.replace(fresh, path)

    processes.on_first(claim)
    return open_prepared(data)


def whole(folder: Path) -> Prepared | None:
    """What `prepare` left in `folder`, if it is all there."""
    try:
        return open_prepared(folder)
    except InputError:
        return None


class Evaluation:
    """Loss over all held-out documents, each by itself; false if there are none."""

    def __init__(self, config: Config, prepared: Prepared, mesh: Mesh, rows: int):
        self._config, self._split = config, prepared.heldout
        if not self._split:
            return
        T = config.data.sequence_length
        self._shape = (rows, T)
        self._layout = NamedSharding(mesh, sharding.act("BT"))
        mine = sharding.rows_of_this_process(self._layout, self._shape, dim=0)
        self._batches = heldout_batches(prepared, sequence_length=T, rows_per_batch=rows, rows=mine)

    def __bool__(self) -> bool:
        return self._split is not None

    def __call__(self, params: Params) -> dict[str, float]:
        assert self._split
        nats = 0.0
        for local in self._batches:
            batch = {
                name: jax.make_array_from_process_local_data(self._layout, a, self._shape)
                for name, a in local.items()
            }
            # Waiting for each keeps collectives of several in one order: CPU has no stream.
            nats += float(eval_step(self._config, params, batch))
        record = {"eval_loss": nats / self._split.tokens}
        if self._split.bytes:
            record["eval_bits_per_byte"] = nats / math.log(2) / self._split.bytes
        return record


class Reporter:
    """Turns what steps report into records and lines, a step behind, so that no device waits."""

    def __init__(self, config: Config, metrics: Metrics, first: int):
        self._config, self._metrics, self._first = config, metrics, first
        self.waiting: tuple[int, dict[str, jax.Array]] | None = None
        self._peak = peak_flops()
        self._tokens, self._steps, self._seconds = 0, 0, 0.0
        self._clock = time.perf_counter()

    def step(self, done: int, report: dict[str, jax.Array]) -> None:
        """Take the report of a step that was just dispatched; record the one before.

        Raises NonFiniteError when too many in a row had no finite gradient.
        """
        self.flush()
        self.waiting = done, report

    def flush(self) -> None:
        """Wait for the step that is running, and record it."""
        if not self.waiting:
            return
        (done, report), self.waiting = self.waiting, None
        values = {name: value.item() for name, value in jax.device_get(report).items()}
        now = time.perf_counter()
        self._seconds, self._clock = self._seconds + now - self._clock, now
        self._tokens, self._steps = self._tokens + values["tokens"], self._steps + 1
        if done == self._first + 1:  # it compiled
            self._metrics.say(f"first step after {duration(self._seconds)}")
        if values["streak"]:
            self._metrics.say(
                f"step {done}: gradients are not finite, parameters stay ({values['streak']} in a "
                f"row, {values['skipped']} in all)"
            )
        if done % self._config.run.log_every == 0 or done in (
            self._first + 1,
            self._config.optim.steps,
        ):
            self._record(done, values)
        if values["streak"] >= PATIENCE:
            raise NonFiniteError(
                f"no finite gradient in {PATIENCE} steps in a row, up to step {done}: parameters "
                f"are those of step {done - PATIENCE}; lower optim.learning_rate or look at the "
                "data of these steps"
            )

    def _record(self, done: int, values: dict[str, Any]) -> None:
        config, rate = self._config, self._tokens / self._seconds
        T = config.data.sequence_length
        full, causal = (config.model.flops_per_token(T, causal=c) for c in (False, True))
        record = {
            "step": done,
            "loss": values["loss"] if values["finite"] else None,
            "grad_norm": values["grad_norm"] if values["finite"] else None,
            "lr": values["lr"],
            "samples": values["samples"],
            "tokens": values["samples"] * T,
            "tokens_per_second": rate,
            "step_time": self._seconds / self._steps,
            "mfu": full * rate / self._peak if self._peak else None,
            "mfu_causal": causal * rate / self._peak if self._peak else None,
            "skipped": values["skipped"],
            "batch": f"{values['checksum']:08x}",
        }
        self._metrics.write(record)
        left = (config.optim.steps - done) * record["step_time"]
        mfu = f"  MFU {record['mfu']:.0%}" if self._peak else ""
        self._metrics.say(
            f"step {done}/{config.optim.steps}  loss {values['loss']:.4f}  "
            f"{rate:,.0f} tokens/s{mfu}  {duration(left)} left"
        )
        self._tokens, self._steps, self._seconds = 0, 0, 0.0

    def restart_clock(self) -> None:
        """Evaluation and saving are no part of a step."""
        self._clock = time.perf_counter()


def describe(config: Config, mesh: Mesh, prepared: Prepared, state: TrainState) -> str:
    """What is about to run, and what it takes, in a few lines."""
    leaves = jax.tree.leaves(state)
    each = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    heldout = f", {prepared.heldout.documents:,} held out" if prepared.heldout else ""
    return (
        f"model: {config.model.parameter_count:,} parameters; mesh: {axes} on {devices}, "
        f"{each / 1e9:.2f} GB of state each\n"
        f"data: {prepared.train.tokens:,} tokens in {prepared.train.documents:,} documents"
        f"{heldout}; {config.data.batch_size} x {config.data.sequence_length} tokens a step"
    )


def command() -> str:
    return "python -m bloomjax.train " + shlex.join(sys.argv[1:])


if __name__ == "__main__":
    cli.run(main, define, __doc__)
