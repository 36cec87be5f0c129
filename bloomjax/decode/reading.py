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
from bloomjax.kernels import packing
from bloomjax.kernels.packed import Packed
from bloomjax.model import Params, compute_dtype
from bloomjax.sharding import on_cpu, put

_ROWS = 256  # that are widened at a time


Pack = tuple[Callable[[jax.Array, str], tuple[jax.Array, jax.Array]], str]  # of kernels.packing


class _Rows(NamedTuple):
    """Where the rows of a matrix come from, and what is to be done with them."""

    read: Callable[[int, int], np.ndarray]
    width: int  # of a row as `read` gives it
    dtype: Any
    pack: Pack | None  # None: a cast at most
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
    width, stored = row.shape(config.sizes)[1], reader.dtype(row)
    read = functools.partial(reader.read, row, layer)
    if quantize == "none":
        with jax.set_mesh(mesh):
            # On CPU compute is in float32, but 16 bits stay 16: it is exact, and less to read.
            kept = config.dtype == "auto" and on_cpu() and stored.itemsize == 2
            dtype = stored if kept else jnp.dtype(compute_dtype(config))
        return _Rows(read, width, stored, None, dtype.name)
    if isinstance(reader, GGUFReader) and grouped(config, mesh, row):
        kind = reader.kind(row, layer)
        if packing.BLOCKS.get(kind.name) == quantize:
            blocks = functools.partial(reader.read_blocks, row, layer)
            form = "int8 groups" if quantize == "int8" else quantize
            pack = packing.from_blocks, kind.name
            return _Rows(blocks, width // kind.block * kind.size, np.uint8, pack, form)
    return _Rows(read, width, stored, (packing.quantised, quantize), quantize)


def _matrix(rows: _Rows, like: Packed, mesh: Mesh) -> Packed:
    """One layer's matrix as `like` is, in shape, dtype and layout."""
    J = like.values.shape[0]
    # Rows are dealt to all devices alike, the last ones padded. How they come from there to where
    # they belong is left to the compiler, so these meshes are not explicit.
    flat = Mesh(mesh.devices.reshape(-1), ("rows",), axis_types=(AxisType.Auto,))
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    by_rows = NamedSharding(flat, P("rows"))
    each = -(-J // mesh.size)

    def read(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(each * mesh.size)
        found = rows.read(min(start, J), min(stop, J))
        missing = stop - start - len(found)
        return np.pad(found, ((0, missing), (0, 0))) if missing else found

    shape = each * mesh.size, rows.width
    dealt = jax.make_array_from_callback(shape, by_rows, read, dtype=rows.dtype)
    found: Any = dealt, None
    same = dealt.dtype == like.values.dtype and shape == like.values.shape
    if rows.pack or not same or not by_rows.is_equivalent_to(like.values.sharding, 2):
        wanted = like.values, like.scales
        layouts = jax.tree.map(lambda a: NamedSharding(auto, a.sharding.spec), wanted)
        found = _packed(J, rows.pack, like.values.dtype, by_rows, layouts)(dealt)
    values, scales = jax.tree.map(
        lambda a, b: jax.device_put(a, b.sharding), found, (like.values, like.scales)
    )
    return dataclasses.replace(like, values=values, scales=scales)


@functools.cache
def _packed(J: int, pack: Pack | None, dtype: Any, by_rows: NamedSharding, layouts: Any) -> Any:
    def one(row: jax.Array) -> Any:
        assert pack
        return jax.tree.map(lambda a: a[0], pack[0](row[None], pack[1]))

    def on_device(rows: jax.Array) -> Any:  # some at a time: packing widens them
        return jax.lax.map(one, rows, batch_size=_ROWS)

    def run(dealt: jax.Array) -> Any:
        if pack is None:
            return dealt[:J].astype(dtype), None
        spec = by_rows.spec
        found = jax.shard_map(on_device, mesh=by_rows.mesh, in_specs=spec, out_specs=spec)(dealt)
        return jax.tree.map(lambda a: a[:J], found)

    return jax.jit(run, out_shardings=layouts)
