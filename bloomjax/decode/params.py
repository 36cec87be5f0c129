"""Parameters as decoding has them: a list of blocks, every matrix packed, on the decode mesh.

Matrices are Hugging Face's, rows of outputs (`formats.names`, `theirs`), so what a file holds is
what a product reads; vectors are ours, in the dtype of compute.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from bloomjax.config import ModelConfig
from bloomjax.formats.names import TABLE, Row, nest
from bloomjax.kernels.packed import GROUP, Packed
from bloomjax.model import Params, compute_dtype
from bloomjax.parallel import packed_layouts
from bloomjax.sharding import act


def tree(config: ModelConfig, leaf: Callable[[Row, int], Any]) -> Params:
    """The tree of decoding's parameters; `leaf(row, layer)` makes what stands in it."""
    flat = {row.path: leaf(row, 0) for row in TABLE if not row.stacked}
    blocks = {
        layer: {row.path.partition(".")[2]: leaf(row, layer) for row in TABLE if row.stacked}
        for layer in range(config.layers)
    }
    return nest(flat) | {"blocks": blocks}


def sides(row: Row) -> tuple[str, str] | None:
    """(letters of outputs, letters of inputs) of a matrix; None for a vector."""
    groups = row.theirs.split(".")
    return (groups[0], groups[1]) if len(groups) == 2 else None


def abstract_params(
    config: ModelConfig, mesh: Mesh, quantize: str = "none", dtype: Any = None
) -> Params:
    """Shape, dtype and layout of every parameter, none of them allocated.

    `quantize` is "none" (matrices in `dtype`, by default that of compute), "int8" (a scale for
    every output) or "int4" (a scale for 32 inputs).
    """
    sizes = config.sizes
    with jax.set_mesh(mesh):
        compute = compute_dtype(config)

    def leaf(row: Row, _: int) -> Any:
        def like(shape: tuple[int, ...], dtype: Any, spec: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

        if (letters := sides(row)) is None:
            return like(tuple(sizes[a] for a in row.ours), compute, act(row.ours))
        J, K = row.shape(sizes)
        shapes = {
            "none": ((J, K), dtype or compute, None),
            "int8": ((J, K), jnp.int8, (J, 1)),
            "int4": ((J, K // 2), jnp.uint8, (J, K // GROUP)),
        }
        values, kind, scales = shapes[quantize]
        shape = tuple(sizes[a] for a in letters[0])
        empty = Packed(None, jnp.zeros(scales) if scales else None, *letters, shape)  # type: ignore[arg-type]
        with jax.set_mesh(mesh):
            layout, scales_layout = packed_layouts(empty)
        return Packed(
            like(values, kind, layout),  # type: ignore[arg-type]
            like(scales, jnp.float32, scales_layout) if scales else None,  # type: ignore[arg-type]
            *letters,
            shape,
        )

    return tree(config, leaf)
