"""The mesh and the one table of layouts. No other file names a mesh axis.

A tensor's axes are a string of letters (see `bloomjax.config`); `weight("DN3H")` and `act("BTNH")`
turn it into a PartitionSpec through `RULES`. The mesh is explicit: shardings are part of an
array's type, and a wrong layout is an error when the program is traced, never a silent gather.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bloomjax.config import MeshConfig, ModelConfig
from bloomjax.errors import ConfigError, DoesNotFitError

AXES = ("data", "fsdp", "tensor")

Axis = str | tuple[str, ...] | None
# letter: (of weights at rest, of activations and of weights in use). FSDP splits D of weights at
# rest only: they are gathered just in time, and their gradients scattered back.
RULES: dict[str, tuple[Axis, Axis]] = {
    "B": (None, ("data", "fsdp")),
    "D": ("fsdp", None),
    "N": ("tensor", "tensor"),
    "F": ("tensor", "tensor"),
    "V": ("tensor", "tensor"),
}


def weight(axes: str) -> P:
    """The layout of a parameter (and of its gradient and moments) with these axes."""
    return P(*(RULES.get(a, (None, None))[0] for a in axes))


def act(axes: str) -> P:
    """The layout of an activation with these axes, or of a weight gathered for use."""
    return P(*(RULES.get(a, (None, None))[1] for a in axes))


def shards(mesh: Mesh, axis: Axis) -> int:
    """Into how many parts `axis` (an entry of RULES) splits a dimension."""
    names = () if axis is None else (axis,) if isinstance(axis, str) else axis
    return math.prod(mesh.shape[a] for a in names)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a configuration over `devices` (default: all, of all processes).

    One axis may be -1: it takes what the others leave. Raises DoesNotFitError when the devices are
    too few, ConfigError when they cannot all be used.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    layout = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
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
    # A logical axis may be a part of one of a TPU's torus: 4 x 128 on 8 x 8 x 8.
    grid = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=kinds)


def on_cpu() -> bool:
    """Whether the current mesh is of CPUs; that need not be the default backend, when a program is
    compiled for devices that are not there."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device.platform if device else jax.default_backend()) == "cpu"


def check_divides(model: ModelConfig, mesh: Mesh) -> None:
    """ConfigError, in one line, if a size of the model does not divide its mesh axes."""
    for letter, size in model.sizes.items():
        for axis in RULES.get(letter, ()):
            parts = shards(mesh, axis)
            if size % parts:
                total = mesh.size
                fit = [str(n) for n in range(1, total + 1) if size % n == 0 and total % n == 0]
                raise ConfigError(
                    f"{_NAMES[letter]} ({letter} = {size}) does not divide over mesh.{axis} = "
                    f"{parts}: on {total} devices mesh.{axis} can be {', '.join(fit)}"
                )


_NAMES = {"D": "width", "N": "heads", "F": "ffn width", "V": "vocabulary"}


def put(array: np.ndarray, spec: P, mesh: Mesh) -> jax.Array:
    """A host array, the same on every process, as a global array of this layout."""
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def rows_of_this_process(sharding: NamedSharding, shape: tuple[int, ...], dim: int) -> list[int]:
    """Sorted indices along `dim` of a global array that this process's devices hold."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    slices = (index[dim] for index in indices if index is not None)
    return sorted({row for s in slices for row in range(*s.indices(shape[dim]))})


# Inside shard_map: a letter's dimension is split, and each device holds one piece of it.


def _activation_axes(letter: str) -> tuple[str, ...]:
    axis = RULES[letter][1]
    return () if axis is None else (axis,) if isinstance(axis, str) else axis


def split_of(letter: str) -> int:
    """Into how many pieces the current mesh splits `letter` of activations."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in _activation_axes(letter))


def offset_of(letter: str, size: int) -> jax.Array:
    """Where this device's piece of `size` along `letter` begins in the whole."""
    return jax.lax.axis_index(_activation_axes(letter)) * size


def _real(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of size above 1. Over the others XLA still copies, and a scatter even transposes: the
    gradient of the embedding was written four times more than needed."""
    shape = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in axes if shape[axis] > 1)


def sum_over(letter: str, x: jax.Array) -> jax.Array:
    """Sum of `x` over the devices that split `letter` of activations."""
    axes = _real(_activation_axes(letter))
    return jax.lax.psum(x, axes) if axes else x


def max_over(letter: str, x: jax.Array) -> jax.Array:
    """Maximum of `x` over the devices that split `letter` of activations."""
    axes = _real(_activation_axes(letter))
    return jax.lax.pmax(x, axes) if axes else x


def reduce_gradient(gradient: jax.Array, axes: str) -> jax.Array:
    """Sum a weight's gradient over the batch; what comes back has the layout `weight(axes)`.

    Where the weight at rest is split over an axis of the batch, the sum is scattered over it.
    """
    left = list(_real(_activation_axes("B")))
    for dim, axis in enumerate(weight(axes)):
        if axis in left:
            left.remove(axis)
            gradient = jax.lax.psum_scatter(gradient, axis, scatter_dimension=dim, tiled=True)
    return jax.lax.psum(gradient, tuple(left)) if left else gradient
