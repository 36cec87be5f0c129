"""The mesh and the one table of layouts. No other file names a mesh axis.

A tensor's axes are a string of letters (see `bloomjax.config`); `weight("DN3H")` and `act("BTNH")`
turn it into a PartitionSpec through `RULES`. The mesh is explicit: shardings are part of an
array's type, and a wrong layout is an error when the program is traced, never a silent gather.

What communicates is written once, as what one device does with its pieces (`on_devices`), so every
collective of a step stands in the code. A pipeline is one such function as a whole, and calls the
others from inside: there `act` has nothing left to split.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bloomjax.config import MeshConfig, ModelConfig
from bloomjax.errors import ConfigError, DoesNotFitError

# From the least traffic to the most: neighbours on the last axis share a node, or a chip's links.
AXES = ("stage", "data", "fsdp", "sequence", "tensor")

Axes = tuple[str, ...]
# letter: (of weights at rest, of activations and of weights in use). FSDP splits D of weights at
# rest only: they are gathered just in time, and their gradients scattered back. R is T where it
# runs along the residual stream, between the products that are split over `tensor`. C are the slots
# of a decoding cache, whose mesh is `decode_mesh`.
RULES: dict[str, tuple[Axes, Axes]] = {
    "B": ((), ("data", "fsdp")),
    "T": ((), ("sequence",)),
    "R": ((), ("sequence", "tensor")),
    "L": (("stage",), ("stage",)),
    "D": (("fsdp", "sequence"), ()),
    "N": (("tensor",), ("tensor",)),
    "F": (("tensor",), ("tensor",)),
    "V": (("tensor",), ("tensor",)),
    "C": ((), ("sequence",)),
}
_NOWHERE: tuple[Axes, Axes] = ((), ())


def weight(axes: str) -> P:
    """The layout of a parameter (and of its gradient and moments) with these axes."""
    return _spec(axes, 0)


def act(axes: str) -> P:
    """The layout of an activation with these axes, or of a weight gathered for use."""
    return _spec(axes, 1)


def _spec(axes: str, column: int) -> P:
    if on_device():
        return P(*(None for _ in axes))
    split = (RULES.get(a, _NOWHERE)[column] for a in axes)
    return P(*(s[0] if len(s) == 1 else s or None for s in split))


def stream(length: int) -> str:
    """The letter for `length` positions of the residual stream on the current mesh: R where they
    divide over `tensor` too, else T. Norms and what they keep are then split like the products."""
    return "T" if length % split_of("R") or split_of("R") == split_of("T") else "R"


def stack_rows(layers: int) -> int:
    """Rows of a stack of blocks at rest: every pipeline stage holds as many, and what is left over
    stands at the end as rows of zeros (70 layers on 12 stages: 72 rows)."""
    stages = split_of("L")
    return -(-layers // stages) * stages


def scannable(stack: Any) -> Any:
    """Stacks of blocks whose first dimension no axis splits, as a scan needs it: of one stage."""

    def whole(w: jax.Array) -> jax.Array:
        return jax.reshard(w, P(None, *jax.typeof(w).sharding.spec[1:]))

    return jax.tree.map(whole, stack)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a configuration over `devices` (default: all, of all processes).

    One axis may be -1: it takes what the others leave. Where the devices are several TPU slices,
    the outer axes (stage, data, fsdp) span them. Raises DoesNotFitError when the devices are too
    few, ConfigError when they cannot all be used.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    layout = _layout(sizes)
    free = [axis for axis, size in sizes.items() if size == -1]
    bad = [axis for axis, size in sizes.items() if size < 1 and size != -1]
    if bad or len(free) > 1:
        raise ConfigError(f"mesh {layout}: expected sizes of 1 or more, at most one of them -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if fixed > len(devices):
        raise DoesNotFitError(
            f"mesh {layout} needs {fixed} devices, found {len(devices)}: lower mesh.*, or start "
            "more processes or devices"
        )
    if free:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(
            f"mesh {layout} uses {math.prod(sizes.values())} of {len(devices)} devices: expected "
            "all of them; change mesh.* (one axis may be -1)"
        )
    kinds = (AxisType.Explicit,) * len(AXES)
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    # A logical axis may be a part of one of a TPU's torus: 4 x 128 on 8 x 8 x 8.
    if devices[0].platform != "tpu" or slices == 1:
        grid = mesh_utils.create_device_mesh(
            tuple(sizes.values()), devices, allow_split_physical_axes=True
        )
        return Mesh(grid, AXES, axis_types=kinds)
    across, left = {}, slices
    for axis, size in sizes.items():
        across[axis] = math.gcd(size, left) if axis in ("stage", "data", "fsdp") else 1
        left //= across[axis]
    if left > 1:
        raise ConfigError(
            f"mesh {layout} on {slices} slices: expected stage, data and fsdp to divide by "
            f"{slices} together, so that no other axis leaves a slice"
        )
    within = tuple(sizes[axis] // across[axis] for axis in AXES)
    grid = mesh_utils.create_hybrid_device_mesh(
        within, tuple(across.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=kinds)


def decode_mesh(model: ModelConfig, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh that weights are stationary on: heads, ffn and vocabulary over as many devices as
    divide them, the width over the rest. Where that does not divide, over fewer of the devices: the
    most that it does on; but of several processes none can be left out, so there ConfigError."""
    n, total = model.sizes, len(devices)

    def tensor(count: int) -> int:
        return math.gcd(n["N"], n["F"], n["V"], count)

    fit = [count for count in range(1, total + 1) if n["D"] % (count // tensor(count)) == 0]
    count = fit[-1]
    if count < total and len({device.process_index for device in devices}) > 1:
        raise ConfigError(
            f"decoding on {total} devices: expected a common divisor of heads ({n['N']}), ffn "
            f"({n['F']}) and vocabulary ({n['V']}), times one of the width ({n['D']}), found "
            f"{total}: start processes that have {count} devices together"
        )
    config = MeshConfig(sequence=count // tensor(count), tensor=tensor(count))
    return make_mesh(config, devices[:count])


def on_cpu() -> bool:
    """Whether the current mesh is of CPUs; that need not be the default backend, when a program is
    compiled for devices that are not there."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device.platform if device else jax.default_backend()) == "cpu"


def on_one_gpu() -> bool:
    """Whether the current mesh is one GPU of the kind that is here: not a target to compile for."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size != 1 or on_cpu() or jax.default_backend() != "gpu":
        return False
    device = mesh.abstract_device
    return device is None or device.device_kind == jax.local_devices()[0].device_kind


_SIZES = {"D": "width", "N": "heads", "F": "ffn width", "V": "vocabulary", "T": "sequence length"}


def faults(model: ModelConfig, mesh: dict[str, int], length: int | None = None) -> Iterator[str]:
    """What keeps a model, with `length` positions, from being laid out by axes of these sizes."""
    sizes = model.sizes | ({"T": length} if length else {})
    for letter, name in _SIZES.items():
        for axes in dict.fromkeys(RULES[letter]):
            parts = math.prod(mesh[a] for a in axes)
            if letter in sizes and sizes[letter] % parts:
                over = " x ".join(f"mesh.{a}" for a in axes if mesh[a] > 1)
                yield f"{name} ({letter} = {sizes[letter]}) does not divide over {over} = {parts}"
    stages = math.prod(mesh[a] for a in RULES["L"][0])
    rows = -(-model.layers // stages)
    if rows * stages - model.layers >= rows:
        yield f"{model.layers} layers leave one of mesh.stage = {stages} without any"


def check_divides(model: ModelConfig, mesh: Mesh, length: int | None = None) -> None:
    """ConfigError, in one line, if a size of the model does not divide its mesh axes: with the
    layouts of as many devices that are nearest to it and do."""
    found = dict(mesh.shape)
    for fault in faults(model, found, length):
        fit = (m for m in layouts(mesh.size) if not any(faults(model, m, length)))
        near = sorted(fit, key=lambda m: sum(abs(math.log2(m[a] / found[a])) for a in AXES))
        proposed = ", or ".join(_layout(m) for m in near[:3])
        raise ConfigError(f"{fault}: on {mesh.size} devices, take {proposed or 'fewer devices'}")


def layouts(devices: int) -> Iterator[dict[str, int]]:
    """Every way to split `devices` over the axes."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for outer in itertools.product(divisors, repeat=len(AXES) - 1):
        rest, over = divmod(devices, math.prod(outer))
        if rest and not over:
            yield dict(zip(AXES, (*outer, rest), strict=True))


def _layout(sizes: dict[str, int]) -> str:
    return " x ".join(f"{a} {n}" for a, n in sizes.items() if n != 1) or "data 1"


def put(array: np.ndarray, spec: P, mesh: Mesh) -> jax.Array:
    """A host array, the same on every process, as a global array of this layout."""
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def rows_of_this_process(sharding: NamedSharding, shape: tuple[int, ...], dim: int) -> list[int]:
    """Sorted indices along `dim` of a global array that this process's devices hold."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    slices = (index[dim] for index in indices if index is not None)
    return sorted({row for s in slices for row in range(*s.indices(shape[dim]))})


def from_rows(
    rows: np.ndarray, held: Sequence[int], shape: tuple[int, ...], sharding: NamedSharding, dim: int
) -> jax.Array:
    """A global array of `shape`, of which this process knows the rows `held` along `dim`."""
    place = {row: i for i, row in enumerate(held)}

    def piece(index: Any) -> np.ndarray:
        start, stop, _ = index[dim].indices(shape[dim])
        here = slice(place[start], place[stop - 1] + 1)
        return rows[(*index[:dim], here, *index[dim + 1 :])]

    return jax.make_array_from_callback(shape, sharding, piece)


# What one device does with its pieces ------------------------------------------------------------


def on_device() -> bool:
    """Whether the caller is already inside a function of one device's pieces."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.are_all_axes_manual


def on_devices(f: Callable[..., Any], ins: Sequence[P], outs: Any) -> Callable[..., Any]:
    """`f` of the pieces of arrays laid out by `ins`; where the caller has pieces already, `f`.

    `f` may only contain collectives below custom derivatives, or whose transpose is their true
    one: all_gather, psum_scatter, ppermute.
    """
    if on_device():
        return f

    def run(*arrays: Any) -> Any:
        pieces = jax.shard_map(f, in_specs=tuple(ins), out_specs=outs, check_vma=False)
        laid = (None if a is None else jax.reshard(a, i) for a, i in zip(arrays, ins, strict=True))
        return pieces(*laid)

    return run


def split_of(letter: str) -> int:
    """Into how many pieces the current mesh splits `letter` of activations."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in RULES.get(letter, _NOWHERE)[1])


def offset_of(letter: str, size: int) -> jax.Array | int:
    """Where this device's piece of `size` along `letter` begins in the whole."""
    axes = _real(RULES.get(letter, _NOWHERE)[1])
    return jax.lax.axis_index(axes) * size if axes else 0


def _real(axes: Axes) -> Axes:
    """Those of size above 1. Over the others XLA still copies, and a scatter even transposes: the
    gradient of the embedding was written four times more than needed."""
    shape = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in axes if shape[axis] > 1)


def sum_over(letter: str, x: Any) -> Any:
    """Sum of `x` over the devices that split `letter` of activations."""
    axes = _real(RULES[letter][1])
    return jax.lax.psum(x, axes) if axes else x


def sum_at_rest(letter: str, x: jax.Array) -> jax.Array:
    """Sum of `x` over the devices that split `letter` of weights at rest."""
    axes = _real(RULES[letter][0])
    return jax.lax.psum(x, axes) if axes else x


def max_over(letter: str, x: jax.Array) -> jax.Array:
    """Maximum of `x` over the devices that split `letter` of activations."""
    axes = _real(RULES[letter][1])
    return jax.lax.pmax(x, axes) if axes else x


def gather_over(letter: str, x: jax.Array, dim: int) -> jax.Array:
    """The pieces of `x` along `dim`, which is split like `letter`, put together."""
    axes = _real(RULES[letter][1])
    return jax.lax.all_gather(x, axes, axis=dim, tiled=True) if axes else x


def _between_products() -> Axes:
    return _real(tuple(a for a in RULES["R"][1] if a not in RULES["T"][1]))


def join_stream(x: jax.Array, letter: str) -> jax.Array:
    """[B, R, ...] of the residual stream -> [B, T, ...], as a product needs it."""
    axes = _between_products() if letter == "R" else ()
    return jax.lax.all_gather(x, axes, axis=1, tiled=True) if axes else x


def sum_to_stream(x: jax.Array, letter: str) -> jax.Array:
    """Partial sums [B, T, ...] over `tensor` -> their sum as the residual stream has it."""
    axes = _between_products()
    if letter == "T":
        return jax.lax.psum(x, axes) if axes else x
    return jax.lax.psum_scatter(x, axes, scatter_dimension=1, tiled=True) if axes else x


def gather_weight(w: jax.Array, axes: str) -> jax.Array:
    """A weight at rest -> in use: put together over what splits it at rest only."""
    for dim, letter in enumerate(axes):
        at_rest, in_use = RULES.get(letter, _NOWHERE)
        if over := _real(tuple(a for a in at_rest if a not in in_use)):
            w = jax.lax.all_gather(w, over, axis=dim, tiled=True)
    return w


def reduce_gradient(gradient: jax.Array, axes: str) -> jax.Array:
    """Sum a gradient of a weight in use over batch and positions; it comes back as at rest.

    Where the weight at rest is split over one of their axes, the sum is scattered over it.
    """
    left = _real(RULES["B"][1] + RULES["T"][1])
    for dim, letter in enumerate(axes):
        at_rest, in_use = RULES.get(letter, _NOWHERE)
        if over := tuple(a for a in at_rest if a in left and a not in in_use):
            gradient = jax.lax.psum_scatter(gradient, over, scatter_dimension=dim, tiled=True)
            left = tuple(a for a in left if a not in over)
    return jax.lax.psum(gradient, left) if left else gradient


def sum_partial(gradient: jax.Array, axes: str) -> jax.Array:
    """A weight's gradient by positions along the stream -> by those of a product: sums over what
    splits R beside T, unless it is split by that itself."""
    over = set(_between_products()) - {a for b in axes for a in RULES.get(b, _NOWHERE)[1]}
    return jax.lax.psum(gradient, tuple(over)) if over else gradient


def shift(x: Any, by: int) -> Any:
    """What the stage `by` before this one has; around the end, so nobody waits for nothing."""
    (axis,) = RULES["L"][1]
    stages = split_of("L")
    return jax.lax.ppermute(x, axis, [(s, (s + by) % stages) for s in range(stages)])


def deal(x: jax.Array) -> jax.Array:
    """Sums over stages of equal pieces of x's first dimension, one piece to each stage."""
    return jax.lax.psum_scatter(x, RULES["L"][1], scatter_dimension=0, tiled=True)


def indices(axes: str, shape: tuple[int, ...]) -> jax.Array:
    """uint32 of `shape`: each element's place in the whole array of which this is a piece."""
    place = jnp.zeros((), jnp.uint32)
    for letter, size in zip(axes, shape, strict=True):
        here = offset_of(letter, size) + jnp.arange(size)
        place = place[..., None] * np.uint32(size * split_of(letter)) + here.astype(jnp.uint32)
    return place
