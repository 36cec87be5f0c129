"""The parameters of a file of any format onto a mesh, as decoding has them.

Letters: J outputs, K inputs of a matrix. The invariant: of a tensor every process reads the rows
that fall to its devices, once, and they are packed where they lie; then the packed rows travel.
Beside the model in its final bytes there is one tensor as the file has it, dealt over all devices.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bloomjax.config import ModelConfig
from bloomjax.decode.params import Form, abstract_params, grouped, is_matrix, tree
from bloomjax.formats.gguf import GGUFReader
from bloomjax.formats.names import TABLE, Row
from bloomjax.formats.tensors import Reader
from bloomjax.kernels.packed import Packed
from bloomjax.kernels.packing import from_gguf, quantise
from bloomjax.model import Params, compute_dtype
from bloomjax.sharding import on_cpu, put

_WIDENED = 1 << 15  # weights at a time, on each device: they stay in a core's cache


# GGUF's kinds whose blocks stay as they are, and for which `quantize`.
_BLOCKS = {"Q8_0": "int8", "Q5_0": "int8", "Q4_0": "int4"}


class _Rows(NamedTuple):
    """Where the rows of a matrix come from, and what is to be done with them."""

    read: Callable[[int, int], tuple[np.ndarray, ...]]  # values, and scales if there are any
    quantise: str  # on the devices, to this; or ""
    form: Form


def read_params(reader: Reader, config: ModelConfig, mesh: Mesh, quantize: str = "none") -> Params:
    """All parameters on `mesh`; every process calls it. Vectors, which are small, are read by all.

    `quantize` is "none", "int8" (a scale for every output) or "int4" (for every 32 inputs). Raises
    what the reader does, and DoesNotFitError where groups of inputs do not divide.
    """
    shapes = abstract_of(reader, config, mesh, quantize)

    def leaf(row: Row, layer: int) -> Any:
        key = row.path.partition(".")[2]
        like: Any = shapes["blocks"][layer][key] if row.stacked else shapes[row.path]
        if is_matrix(row):
            return _matrix(_rows(reader, row, layer, config, mesh, quantize), like, mesh)
        vector = reader.read(row, layer, 0, row.shape(config.sizes)[0])
        ours = row.to_ours(vector, config.sizes).astype(like.dtype)
        return put(ours, like.sharding.spec, mesh)

    return tree(config, leaf)


def abstract_of(reader: Reader, config: ModelConfig, mesh: Mesh, quantize: str) -> Params:
    """What `read_params` gives, none of it allocated or read."""

    def form_of(row: Row, layer: int) -> Form:
        return _rows(reader, row, layer, config, mesh, quantize).form

    return abstract_params(config, mesh, form_of=form_of)


def largest_tensor(reader: Reader, config: ModelConfig, mesh: Mesh) -> int:
    """Bytes of a tensor that each device holds for a moment while it is packed."""
    counts = (math.prod(row.shape(config.sizes)) * reader.dtype(row).itemsize for row in TABLE)
    return -(-max(counts) // mesh.size)


def _rows(
    reader: Reader, row: Row, layer: int, config: ModelConfig, mesh: Mesh, quantize: str
) -> _Rows:
    def read(start: int, stop: int) -> tuple[np.ndarray, ...]:
        return (reader.read(row, layer, start, stop),)

    if quantize == "none":
        stored = reader.dtype(row)
        with jax.set_mesh(mesh):
            # On CPU compute is in float32, but 16 bits stay 16: it is exact, and less to read.
            kept = config.dtype == "auto" and on_cpu() and stored.itemsize == 2
            dtype = stored if kept else jnp.dtype(compute_dtype(config))
        return _Rows(read, "", dtype.name)
    if isinstance(reader, GGUFReader) and grouped(config, mesh, row):
        blocks, kind = reader.read_blocks, reader.kind(row, layer).name
        if _BLOCKS.get(kind) == quantize:
            form = "int8 groups" if quantize == "int8" else quantize
            return _Rows(lambda *rows: from_gguf(blocks(row, layer, *rows), kind), "", form)
    return _Rows(read, quantize, quantize)


def _matrix(rows: _Rows, like: Packed, mesh: Mesh) -> Packed:
    """One layer's matrix as `like` is, in shape, dtype and layout."""
    J = like.values.shape[0]
    # Rows are dealt to all devices alike, the last ones padded. How they come from there to where
    # they belong is left to the compiler, so these meshes are not explicit.
    flat = Mesh(mesh.devices.reshape(-1), ("rows",), axis_types=(AxisType.Auto,))
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    by_rows = NamedSharding(flat, P("rows"))
    each = -(-J // mesh.size)
    total = each * mesh.size
    pieces = []
    for device, index in by_rows.addressable_devices_indices_map((total,)).items():
        start, stop, _ = index[0].indices(total) if index else (0, total, 1)
        found = rows.read(min(start, J), min(stop, J))
        if missing := stop - start - len(found[0]):
            found = tuple(np.pad(a, ((0, missing), (0, 0))) for a in found)
        pieces.append([jax.device_put(a, device) for a in found])
    dealt = [
        jax.make_array_from_single_device_arrays((total, parts[0].shape[1]), by_rows, [*parts])
        for parts in zip(*pieces, strict=True)
    ]
    wanted: list[Any] = [a for a in (like.values, like.scales) if a is not None]
    if not all(map(_same, dealt, wanted)):
        layouts = tuple(NamedSharding(auto, a.sharding.spec) for a in wanted)
        dealt = _packed(J, rows.quantise, like.values.dtype, by_rows, layouts)(*dealt)
    placed = [jax.device_put(a, b.sharding) for a, b in zip(dealt, wanted, strict=True)]
    jax.block_until_ready(placed)  # or tensors that wait for the devices would pile up
    values, scales = placed if len(placed) == 2 else (*placed, None)
    return dataclasses.replace(like, values=values, scales=scales)


def _same(found: jax.Array, wanted: Any) -> bool:
    """Whether nothing is left to be done."""
    return (
        found.shape == wanted.shape
        and found.dtype == wanted.dtype
        and found.sharding.is_equivalent_to(wanted.sharding, 2)
    )


@functools.cache
def _packed(J: int, kind: str, dtype: Any, by_rows: NamedSharding, layouts: Any) -> Any:
    def on_device(rows: jax.Array) -> Any:
        # Some at a time, since they are widened for it; the last may be done twice.
        n = min(max(1, _WIDENED // rows.shape[1]), len(rows))

        def some(i: jax.Array, packed: Any) -> Any:
            start = jnp.minimum(i * n, len(rows) - n)
            part = jax.lax.dynamic_slice_in_dim(rows, start, n).astype(jnp.float32)
            return jax.tree.map(
                lambda a, new: jax.lax.dynamic_update_slice_in_dim(a, new, start, 0),
                packed,
                quantise(part, kind),
            )

        part = jax.ShapeDtypeStruct((n, rows.shape[1]), jnp.float32)
        like = jax.eval_shape(lambda part: quantise(part, kind), part)
        empty = jax.tree.map(lambda a: jnp.zeros((len(rows), a.shape[1]), a.dtype), like)
        return jax.lax.fori_loop(0, -(-len(rows) // n), some, empty)

    spec = by_rows.spec
    quantised = jax.shard_map(
        on_device, mesh=by_rows.mesh, in_specs=spec, out_specs=spec, check_vma=False
    )

    def run(*dealt: jax.Array) -> Any:
        values, *scales = quantised(*dealt) if kind else dealt
        return values[:J].astype(dtype), *(a[:J] for a in scales)

    return jax.jit(run, out_shardings=layouts)
