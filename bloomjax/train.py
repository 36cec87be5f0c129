"""Train BLOOM on any mesh.

    python -m bloomjax.train --config=configs/quickstart.py --workdir=runs/quickstart

The same command again resumes. `--config.group.field=value` changes a field.
"""

import json
import math
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding

from bloomjax import checkpoint, cli, processes, sharding
from bloomjax.checkpoint import Checkpoints
from bloomjax.config import Config, read_config, resume_differences
from bloomjax.data.files import replacing
from bloomjax.data.pipeline import heldout_batches, train_batches
from bloomjax.data.prepare import Prepared, open_prepared, prepare
from bloomjax.data.tokenizer import load_tokenizer
from bloomjax.errors import ConfigError, InputError, NonFiniteError
from bloomjax.metrics import Metrics, duration, peak_flops
from bloomjax.model import Params, with_dtype
from bloomjax.optim import BatchRamp
from bloomjax.step import (
    TrainState,
    abstract_state,
    batch_shape,
    eval_shape,
    eval_step,
    init_state,
    start_from,
    train_step,
)
from bloomjax.watchdog import Watchdog

# Steps in a row without a finite gradient after which a run gives up.
PATIENCE = 3


def define(values: flags.FlagValues) -> None:
    cli.define_config(values)
    flags.DEFINE_string("workdir", None, "the folder of the run", flag_values=values)


def main(values: flags.FlagValues) -> None:
    if values.config is None or not values.workdir:
        missing = "--config" if values.config is None else "--workdir"
        raise ConfigError(f"{missing} is missing: expected --config=FILE.py --workdir=FOLDER")
    config = cli.load_config(values)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_divides(config.model, mesh, config.data.sequence_length)
    with jax.set_mesh(mesh):
        train(config, Path(values.workdir), mesh)


def train(config: Config, workdir: Path, mesh: Mesh) -> None:
    """The run of `workdir`, which it has for itself."""
    keep = config.run.keep_checkpoints
    with closing(Checkpoints(workdir / "checkpoints", keep)) as checkpoints:
        prepared = prepare_run(config, workdir)
        with Watchdog(config.run.watchdog) as watchdog:
            continue_run(config, workdir, mesh, prepared, checkpoints, watchdog)


def continue_run(
    config: Config,
    workdir: Path,
    mesh: Mesh,
    prepared: Prepared,
    checkpoints: Checkpoints,
    watchdog: Watchdog,
) -> None:
    """From where the run stands to `optim.steps`."""
    run, steps = config.run, config.optim.steps
    meta: dict[str, Any] = {"config": config.to_dict()} | identity(prepared)

    # ---- the state: restored, or fresh ------------------------------------------------------
    stop = processes.Stop()  # the first step compiles: whoever stops the run now waits for it
    state, origin = restore(config, mesh, checkpoints)
    meta |= {"origin": origin} if origin else {}
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
    evaluation = Evaluation(config, prepared, mesh, watchdog)

    # ---- the loop ---------------------------------------------------------------------------
    reporter = Reporter(config, metrics, first)
    with stop, closing(metrics), closing(batches), resume_told(metrics):
        for done, batch in enumerate(batches, first + 1):
            if done == run.profile_step:
                jax.profiler.start_trace(str(workdir / "profile"))
            placed = {
                name: sharding.from_rows(local, rows, (A, B, T), layout, dim=1)
                for name, local in batch.items()
            }
            count = ramp(done - 1)[1]
            state, report = train_step(config, state, placed, np.int32(count))
            reporter.step(done, report)  # of the step before: this one is still running
            watchdog.step(done)

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
                watchdog.begin(f"saving step {done}", slow=True)
                checkpoints.save(done, state.as_tree(), meta | {"samples": int(state.samples)})
                saved = done
            if not reporter.waiting:
                reporter.restart_clock()
                watchdog.begin(f"step {done + 1}")
            if stopping:
                break
        watchdog.begin(f"saving step {saved}", slow=True)
        checkpoints.wait()
    if saved < steps:
        metrics.say(f"stopped after step {saved}; to resume:\n  {command()}")
        if stop.interrupted:
            raise SystemExit(130)


def restore(
    config: Config, mesh: Mesh, checkpoints: Checkpoints
) -> tuple[TrainState, dict[str, Any] | None]:
    """Where the run stands: a checkpoint's state; a fresh one of a checkpoint that holds parameters
    alone, as a conversion leaves it; or a fresh one of random parameters. And what is known of
    where it all came from."""

    def stored(meta: dict[str, Any]) -> dict[str, Any]:
        state = abstract_state(config, mesh).as_tree()
        alone = meta.get("params")  # their dtype
        return {"params": with_dtype(state["params"], alone)} if alone else state

    restored = checkpoints.restore(stored)
    if restored is None:
        return init_state(config), None
    if "params" in restored.meta:
        return start_from(restored.state["params"]), restored.meta.get("origin")
    return TrainState.from_tree(restored.state), restored.meta.get("origin")


def prepare_run(config: Config, workdir: Path) -> Prepared:
    """Claim the folder for this configuration, and tokenise the data where that is still to do.

    ConfigError, listing the differences, if the folder holds the run of another configuration;
    InputError if it was trained on other data. Nothing but `data/` changes in what is refused.
    """
    path, data = workdir / "config.json", workdir / "data"

    def claim() -> None:
        begun = checkpoint.newest_meta(workdir / "checkpoints")
        step, meta = begun or (0, None)
        saved = meta["config"] if meta else read_config(path) if path.exists() else None
        if saved and (differences := resume_differences(saved, config)):
            raise ConfigError(
                f"{workdir} holds a run of another configuration ({'; '.join(differences)}): "
                "expected run.*, mesh.* or a larger optim.steps to differ; choose another "
                "workdir"
            )
        # What a run has begun with stays: texts may change under it, its tokens do not.
        prepared = whole(data, meta) if meta else None
        prepared = prepared or prepare(config.data, config.model.vocab_size, data)
        for what, found in identity(prepared).items():
            if meta and found and meta.get(what, found) != found:
                raise InputError(
                    f"{workdir}: expected the {what} of step {step} ({meta[what]:.12}), found "
                    f"{found:.12}: bring it back, or choose another workdir"
                )
        if prepared.tokenizer:  # beside the checkpoints, so that they are of use without the data
            with replacing(workdir / prepared.tokenizer.name) as copy:
                copy.write(prepared.tokenizer.read_bytes())
        with replacing(path) as file:
            file.write((json.dumps(config.to_dict(), indent=2) + "\n").encode())

    processes.on_first(claim)
    return open_prepared(data)


def identity(prepared: Prepared) -> dict[str, str]:
    """What a run may not continue without: hashes of its tokens and its tokenizer."""
    tokenizer = prepared.tokenizer
    return {
        "data": prepared.train.sha256,
        "tokenizer": load_tokenizer(tokenizer).fingerprint if tokenizer else "",
    }


def whole(folder: Path, meta: dict[str, Any]) -> Prepared | None:
    """What `prepare` left in `folder`, if it is all there and what a run of `meta` began with.

    Tokens that lie elsewhere are left to `prepare`, which sees whether they have changed.
    """
    try:
        prepared = open_prepared(folder)
        same = identity(prepared).items() <= meta.items()
    except InputError:
        return None
    return prepared if same and prepared.train.prefix.parent == folder.absolute() else None


class Evaluation:
    """Loss over all held-out documents, each by itself; false if there are none."""

    def __init__(self, config: Config, prepared: Prepared, mesh: Mesh, watchdog: Watchdog):
        self._config, self._split, self._watchdog = config, prepared.heldout, watchdog
        self._compiled = False
        if not self._split:
            return
        T = config.data.sequence_length
        A, B = eval_shape(config, mesh)
        self._shape = A, B, T
        self._layout = NamedSharding(mesh, sharding.act("ABT"))
        self._mine = sharding.rows_of_this_process(self._layout, self._shape, dim=1)
        rows = [a * B + b for a in range(A) for b in self._mine]
        self._batches = heldout_batches(
            prepared, sequence_length=T, rows_per_batch=A * B, rows=rows
        )

    def __bool__(self) -> bool:
        return self._split is not None

    def __call__(self, params: Params) -> dict[str, float]:
        assert self._split
        nats = 0.0
        for local in self._batches:
            self._watchdog.begin("evaluation", slow=not self._compiled)
            A, _, T = self._shape
            batch = {
                name: sharding.from_rows(
                    a.reshape(A, -1, T), self._mine, self._shape, self._layout, dim=1
                )
                for name, a in local.items()
            }
            # Waiting for each keeps collectives of several in one order: CPU has no stream.
            nats += float(eval_step(self._config, params, batch))
            self._compiled = True
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


@contextmanager
def resume_told(metrics: Metrics) -> Iterator[None]:
    """Whatever goes wrong inside, the command that resumes is told."""
    try:
        yield
    except Exception:
        metrics.say(f"to resume from the last checkpoint:\n  {command()}")
        raise


def command() -> str:
    return "python -m bloomjax.train " + shlex.join(sys.argv[1:])


if __name__ == "__main__":
    cli.run(main, define, __doc__)
