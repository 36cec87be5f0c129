"""Compile what we run for hardware that is not there, and say what the compiler made of it: the
train step, and the step that decodes.

A target is a kind of device of `bloomjax.machines` and a shape: tpu-v5p:8x8x8 (a torus of chips;
2x8x8x8 is two slices of it), gpu-h200:48x8 (nodes x devices of a node). The real compilers run on
any machine: libtpu's, and XLA's for GPUs, which `machines/*.txtpb` describe to it. The invariant:
what is compiled is the program that `bloomjax.train`, or the engine, would run there, and every
figure is of one device.
"""

import contextlib
import dataclasses
import functools
import importlib.resources
import importlib.util
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from bloomjax import machines, step
from bloomjax.config import Config, MeshConfig, ModelConfig
from bloomjax.counts import Counts, count, written
from bloomjax.decode import params, programs
from bloomjax.decode.sampling import Features
from bloomjax.errors import ConfigError, DoesNotFitError
from bloomjax.kernels.packed import Packed
from bloomjax.sharding import act, check_divides, make_mesh

_BATCH = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}


@dataclasses.dataclass(frozen=True)
class Target:
    """`kind` names a machine; `shape` is (slices,) torus of a TPU, nodes x devices of GPUs."""

    kind: str
    shape: tuple[int, ...]

    @property
    def devices(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"


def target(text: str) -> Target:
    """tpu-v5p:8x8x8 -> Target. ConfigError, in one line, for a kind or a shape that cannot be."""
    kind, _, shape = text.partition(":")
    known = {m.name: m for m in machines.machines()}
    if kind not in known:
        raise ConfigError(
            f"--target={text}: expected one of {', '.join(sorted(known))}, then :SHAPE"
        )
    tpu, dims = kind.startswith("tpu-"), known[kind].torus
    lengths = (dims, dims + 1) if tpu else (1, 2)
    numbers = [int(n) for n in shape.split("x") if n.isdecimal()]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or len(numbers) not in lengths:
        example = "x".join("4" * dims) if tpu else "2x8"
        what = f"chips as {example}" if tpu else "nodes x devices of a node, as 2x8, or devices"
        raise ConfigError(f"--target={text}: expected {kind}:{example}, {what}, found {shape!r}")
    return Target(kind, tuple(numbers))


def has_compiler(target: Target) -> bool:
    """Whether the compiler of a target is installed."""
    tpu = target.kind.startswith("tpu-")
    plugins = ("libtpu",) if tpu else ("jax_cuda13_plugin", "jax_cuda12_plugin")
    return any(map(importlib.util.find_spec, plugins))


def devices(target: Target) -> list[jax.Device]:
    """The devices of a target, for compiling only.

    ConfigError if the compiler is not installed or knows no such topology.
    """
    tpu = target.kind.startswith("tpu-")
    if not has_compiler(target):
        raise ConfigError(
            f"{target.kind}: its compiler is not installed: pip install 'bloomjax[plan]'"
        )
    try:
        if not tpu:
            nodes, each = (1, *target.shape)[-2:]
            described = importlib.resources.files(machines) / f"{target.kind}.txtpb"
            return topologies.get_topology_desc(
                platform="cuda",
                topology=f"1x{nodes}x{each}",
                target_config=described.read_text(),
            ).devices
        # Without these libtpu asks a metadata server, minutes long, which TPU it runs on.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
        # It uses no chip, so others may.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        torus = machines.machine(target.kind).torus
        name = target.kind.removeprefix("tpu-") + ":" + "x".join(map(str, target.shape[-torus:]))
        options: dict[str, object] = {}
        if len(target.shape) > torus:
            options["num_slices"] = target.shape[0]
        if target.kind == "tpu-v4":  # its two cores act as one device, as on a TPU-VM
            options["chip_config_name"] = "megacore"
        return topologies.get_topology_desc(name, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"--target={target}: the compiler refuses it: {reason}") from None


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device, as the compiler laid them out."""

    parameters: int
    optimizer: int
    batch: int
    temporaries: int  # activations, gradients, gathered weights, buffers of collectives
    outputs: int  # that take no argument's place
    code: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Program:
    mesh: dict[str, int]
    batch: tuple[int, int, int]  # A, B, T
    seconds: float  # of lowering and compiling
    memory: Memory
    counts: Counts
    involuntary: tuple[str, ...]  # lines of the log that tell of resharding by way of a full copy


def part(name: str) -> str:
    """blocks, attention or head: which part of the model a product of this name belongs to.

    The products of the house are named by their einsum, so the letters tell: S, key positions,
    stands in attention's alone, V in the head's.
    """
    einsum = re.search(r"(\w+),(\w+)->(\w+)\)*/dot_general", name)
    letters = "".join(einsum.groups()) if einsum else ""
    return "attention" if "S" in letters else "head" if "V" in letters else "blocks"


def compile_step(config: Config, devices: Sequence[jax.Device]) -> Program:
    """The train step of `config`, on its mesh over `devices`, compiled and counted.

    ConfigError where the mesh does not divide the model or the devices; DoesNotFitError where the
    compiler itself finds that the program does not fit.
    """
    mesh = make_mesh(config.mesh, devices)
    check_divides(config.model, mesh, config.data.sequence_length)
    start = time.monotonic()
    with jax.set_mesh(mesh), _log_of_compiler() as log:
        state = step.abstract_state(config, mesh)
        shape = (*step.batch_shape(config, mesh), config.data.sequence_length)
        layout = NamedSharding(mesh, act("ABT"))
        batch = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout)
            for name, dtype in _BATCH.items()
        }

        # Rows are a number here, not an argument as in a run, so that every loop over microbatches
        # has a known end.
        def train_step(state: step.TrainState, batch: step.Batch) -> Any:
            return step.train_step(config, state, batch, jnp.int32(config.data.batch_size))

        lowered = jax.jit(train_step, donate_argnums=0).lower(state, batch)
        compiled, text = _compile(lowered, devices[0].platform, "train_step")
    seconds = time.monotonic() - start
    told = compiled.memory_analysis()
    assert told is not None and text
    optimizer, parameters = _bytes_here(state.moments), _bytes_here(state.params)
    memory = Memory(
        parameters=parameters,
        optimizer=optimizer,
        batch=told.argument_size_in_bytes - optimizer - parameters,
        temporaries=told.temp_size_in_bytes,
        outputs=told.output_size_in_bytes - told.alias_size_in_bytes,
        code=told.generated_code_size_in_bytes,
    )
    sizes = dict(mesh.shape)
    found = count(text, sizes, part, unknown_trips=shape[0])
    lines = {line for line in log if "Involuntary full remat" in line}
    return Program(sizes, shape, seconds, memory, found, tuple(sorted(lines)))


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The compiled step that decodes; counts are of one token of every slot."""

    mesh: dict[str, int]
    tokens: int  # of a slot, that one dispatch writes
    seconds: float  # of lowering and compiling
    memory: dict[str, int]  # part: bytes
    counts: Counts
    # Operations that write a whole weight, or a layer's keys or values, anew: each a defect.
    weights_written: tuple[str, ...]
    cache_written: tuple[str, ...]


def compile_decode(
    config: ModelConfig,
    mesh_config: MeshConfig,
    devices: Sequence[jax.Device],
    *,
    slots: int,
    length: int,
    quantize: str = "none",
    cache: str = "auto",
) -> Decoder:
    """The engine's step of `slots` slots of `length` places on a mesh over `devices`, compiled and
    counted. Errors as of `compile_step`.
    """
    mesh = make_mesh(mesh_config, devices)
    check_divides(config, mesh)
    start = time.monotonic()
    with jax.set_mesh(mesh):
        K = programs.tokens_per_dispatch(config)
        weights = params.abstract_params(config, mesh, quantize)
        empty = functools.partial(programs.empty_state, config, slots, length, cache)
        state = jax.tree.map(functools.partial(_on, mesh), jax.eval_shape(empty))
        ready = jax.ShapeDtypeStruct((slots,), bool, sharding=NamedSharding(mesh, act("1")))
        lowered = programs.decode.lower(config, K, Features(), None, weights, state, ready)
        compiled, text = _compile(lowered, devices[0].platform, "decode")
    seconds = time.monotonic() - start
    told = compiled.memory_analysis()
    assert told is not None and text
    held, kept = _bytes_here(weights), _bytes_here(state.cache)
    memory = {
        "weights": held,
        "cache": kept,
        "state": told.argument_size_in_bytes - held - kept,
        "temporaries": told.temp_size_in_bytes,
        "outputs": told.output_size_in_bytes - told.alias_size_in_bytes,
        "code": told.generated_code_size_in_bytes,
    }
    counts = Counts()
    counts.add(count(text, dict(mesh.shape), part, unknown_trips=K), 1 / K)
    sizes = {_elements(packed) for packed in _packed(weights)}
    layers = {_size_here(held.values) for held in (*state.cache.keys, *state.cache.values)}
    return Decoder(
        mesh=dict(mesh.shape),
        tokens=K,
        seconds=seconds,
        memory=memory,
        counts=counts,
        weights_written=tuple(written(text, sizes)),
        cache_written=tuple(written(text, layers)),
    )


def _packed(weights: Any) -> list[Packed]:
    leaves = jax.tree.leaves(weights, is_leaf=lambda leaf: isinstance(leaf, Packed))
    return [leaf for leaf in leaves if isinstance(leaf, Packed)]


def _elements(packed: Packed) -> int:
    """Weights of one device's share; a byte may hold two."""
    return _size_here(packed.values) * (2 if packed.values.dtype == jnp.uint8 else 1)


def _on(mesh: Mesh, leaf: Any) -> jax.ShapeDtypeStruct:
    layout = NamedSharding(mesh, leaf.sharding.spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)


def _compile(
    lowered: jax.stages.Lowered, platform: str, name: str
) -> tuple[jax.stages.Compiled, str | None]:
    """The executable, and its text. A TPU's cannot always be read back from it ("async-update
    instruction should have 1 operands"), so there the compiler writes it down on the way.

    DoesNotFitError where the compiler itself finds that the program does not fit.
    """
    try:
        if platform != "tpu":
            compiled = lowered.compile()
            return compiled, compiled.as_text()
        with tempfile.TemporaryDirectory() as folder:
            options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            compiled = lowered.compile(compiler_options=options)
            (path,) = Path(folder).glob(f"*jit_{name}*.after_optimizations.txt")
            return compiled, path.read_text()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used ([\d.]+\w*) of ([\d.]+\w*) hbm", str(error))
        needs = f"needs {used[1]} of {used[2]} a device" if used else str(error).split("\n")[0]
        raise DoesNotFitError(f"the compiled step {needs}: split or recompute more") from None


def _size_here(leaf: Any) -> int:
    """Elements of one device's share of an abstract array."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def _bytes_here(tree: object) -> int:
    """Of one device's share of abstract arrays."""
    return sum(_size_here(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@contextlib.contextmanager
def _log_of_compiler() -> Iterator[list[str]]:
    """The lines that are written to standard error meanwhile, past Python too."""
    lines: list[str] = []
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
