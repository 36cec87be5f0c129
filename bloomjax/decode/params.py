"""Parameters as decoding has them: a list of blocks, every matrix packed, on the decode mesh.

Matrices are Hugging Face's, rows of outputs (`formats.names`, `theirs`), so what a file holds is
what a product reads; vectors are ours, in the dtype of compute. Letters: J outputs, K inputs.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from bloomjax.config import ModelConfig
from bloomjax.errors import DoesNotFitError
from bloomjax.formats.names import TABLE, Row, nest
from bloomjax.kernels.packed import GROUP, Packed
from bloomjax.model import Params, compute_dtype
from bloomjax.parallel import packed_layouts
from bloomjax.sharding import act, weight


def tree(config: ModelConfig, leaf: Callable[[Row, int], Any]) -> Params:
    """The tree of decoding's parameters; `leaf(row, layer)` makes what stands in it."""
    flat = {row.path: leaf(row, 0) for row in TABLE if not row.stacked}
    blocks = {
        layer: {row.path.partition(".")[2]: leaf(row, layer) for row in TABLE if row.stacked}
        for layer in range(config.layers)
    }
    return nest(flat) | {"blocks": blocks}


def is_matrix(row: Row) -> bool:
    return "." in row.theirs


# How a matrix is held: "float32", "bfloat16" or "float16"; "int8", a scale for every output;
# "int8 groups" or "int4", a scale for every 32 inputs.
Form = str


def abstract_params(
    config: ModelConfig,
    mesh: Mesh,
    quantize: str = "none",
    dtype: Any = None,
    form_of: Callable[[Row, int], Form] | None = None,
) -> Params:
    """Shape, dtype and layout of every parameter, none of them allocated.

    `quantize` is "none" (matrices in `dtype`, by default that of compute), "int8" or "int4";
    `form_of` says instead how the matrix of a row and layer is held.
    """
    with jax.set_mesh(mesh):
        compute = compute_dtype(config)
    form = quantize if quantize != "none" else jnp.dtype(dtype or compute).name

    def leaf(row: Row, layer: int) -> Any:
        if is_matrix(row):
            return abstract_matrix(config, mesh, row, form_of(row, layer) if form_of else form)
        shape = tuple(config.sizes[a] for a in row.ours)
        return jax.ShapeDtypeStruct(shape, compute, sharding=NamedSharding(mesh, act(row.ours)))

    return tree(config, leaf)


def abstract_matrix(config: ModelConfig, mesh: Mesh, row: Row, form: Form) -> Packed:
    """One of `abstract_params`. DoesNotFitError where groups of inputs do not divide."""
    J, K = row.shape(config.sizes)
    outputs, inputs = row.theirs.split(".")
    groups = {"int8": 1, "int8 groups": K // GROUP, "int4": K // GROUP}.get(form)
    if groups and form != "int8" and not grouped(config, mesh, row):
        raise DoesNotFitError(
            f"{row.path} has {K} inputs: {form} needs a multiple of {GROUP} of them on each "
            "device: take --quantize=int8, or fewer devices"
        )
    empty = Packed(
        jax.ShapeDtypeStruct(  # type: ignore[arg-type]
            (J, K // 2 if form == "int4" else K),
            "uint8" if form == "int4" else "int8" if groups else form,
        ),
        jax.ShapeDtypeStruct((J, groups), jnp.float32) if groups else None,  # type: ignore[arg-type]
        outputs,
        inputs,
        tuple(config.sizes[a] for a in outputs),
    )
    with jax.set_mesh(mesh):
        layouts = packed_layouts(empty)

    def laid(like: Any, spec: Any) -> Any:
        return like and like.update(sharding=NamedSharding(mesh, spec))

    values, scales = map(laid, (empty.values, empty.scales), layouts)
    return dataclasses.replace(empty, values=values, scales=scales)


def grouped(config: ModelConfig, mesh: Mesh, row: Row) -> bool:
    """Whether whole groups of a matrix's inputs fall to each device."""
    K = row.shape(config.sizes)[1]
    split = weight(row.theirs.split(".")[1][0])[0]
    over = (split,) if isinstance(split, str) else split or ()
    return K % (GROUP * math.prod(mesh.shape[axis] for axis in over)) == 0


def bytes_per_device(shapes: Any) -> int:
    """Of abstract arrays: what the first device of their mesh holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(shapes)
    )
