"""What a block does with weights and with the vocabulary when both are split: the operations that
communicate, and dropout, which has to agree on what it drops.

Letters: B batch, T position, R position along the residual stream (`sharding.stream`), D model,
V vocabulary; i and j are the contracted and the other axes of a weight, flattened. Each operation
is what one device does with its pieces, with a derivative of its own, so that its collectives are
the ones that stand here, forward and backward. Inside a pipeline weights are in use already:
they were gathered once for the whole step, and their gradients are summed once at its end.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from bloomjax.kernels.packed import Packed, multiply, widened
from bloomjax.sharding import (
    act,
    gather_weight,
    indices,
    join_stream,
    offset_of,
    on_device,
    on_devices,
    reduce_gradient,
    split_of,
    sum_at_rest,
    sum_to_stream,
    weight,
)


def use(parameter: nnx.Param, dtype: Any) -> jax.Array:
    """A bias or a scale as it is added or multiplied: cast, then whole but for a split of heads.

    Its last letters name its axes: a block's share of a stack has lost the leading L.
    """
    value = parameter[...].astype(dtype)
    return value if on_device() else jax.reshard(value, act(parameter.axes[-value.ndim :]))


def product(x: jax.Array, parameter: nnx.Param, letter: str) -> jax.Array:
    """x times a weight, contracted over the weight's first axes -> [B, ..., the weight's others].

    A weight whose other axes are split reads the residual stream [B, R, D] and gives [B, T, ...];
    one whose first axes are split reads [B, T, ...] and writes to the stream. `letter` is the
    stream's, R or T. The weight is gathered here, in x's dtype, and again for the backward pass.
    A weight packed for decoding stays where it is (`stationary`).
    """
    w = parameter.get_value()
    if isinstance(w, Packed):
        return stationary(x, w, x.dtype)
    axes = parameter.axes[-w.ndim :]
    return _product(x, w, axes, letter, not on_device())


def stationary(x: jax.Array, w: Packed, dtype: Any) -> jax.Array:
    """x [B, S, inputs] times a weight that no device gathers -> [B, S, outputs] in `dtype`. Rows of
    x are nowhere split.

    Each device takes the part of x that meets its piece; sums travel, which at a few tokens are
    smaller by far than weights (Pope et al. 2022, "weight-stationary"). No derivative.
    """
    layout, scales_layout = packed_layouts(w)

    def local(x: jax.Array, values: jax.Array, scales: jax.Array | None) -> jax.Array:
        piece = dataclasses.replace(w, values=values, scales=scales)
        x_MI = x.reshape(-1, math.prod(x.shape[2:]))
        y_MJ = sum_at_rest(w.inputs[0], multiply(x_MI, piece, dtype))
        return y_MJ.reshape(*x.shape[:2], -1, *w.shape[1:])

    ins = P(*act("1S"), *weight(w.inputs)), layout, scales_layout
    y = on_devices(local, ins, P(*act("1S"), *weight(w.outputs)))(x, w.values, w.scales)
    return jax.reshard(y, act("1S" + w.outputs))


def packed_layouts(w: Packed) -> tuple[P, P]:
    """How the values and the scales of a packed weight lie, by the first letters of its sides."""
    layout = weight(w.outputs[0] + w.inputs[0])
    per_channel = w.scales is not None and w.scales.shape[1] == 1
    return layout, P(layout[0], None) if per_channel else layout


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(x: jax.Array, w: jax.Array, axes: str, letter: str, at_rest: bool) -> jax.Array:
    into, out_of, x_axes, y_axes = _ways(x, axes, letter)

    def local(x: jax.Array, w: jax.Array) -> jax.Array:
        x_BTi, w_ij, shape = _matrices(join_stream(x, letter) if into else x, w, axes, at_rest)
        y = jnp.einsum("BTi,ij->BTj", x_BTi, w_ij, preferred_element_type=x.dtype)
        y = sum_to_stream(y, letter) if out_of else y
        return y.reshape(*y.shape[:2], *shape)

    layout = weight(axes) if at_rest else act(axes)
    return on_devices(local, (act(x_axes), layout), act(y_axes))(x, w)


def _product_forward(x: Any, w: Any, axes: str, letter: str, at_rest: bool) -> Any:
    return _product(x, w, axes, letter, at_rest), (x, w)


def _product_backward(axes: str, letter: str, at_rest: bool, kept: Any, dy: jax.Array) -> Any:
    into, out_of, x_axes, y_axes = _ways(kept[0], axes, letter)

    def local(x: jax.Array, w: jax.Array, dy: jax.Array) -> Any:
        x_BTi, w_ij, _ = _matrices(join_stream(x, letter) if into else x, w, axes, at_rest)
        dy = join_stream(dy, letter) if out_of else dy
        dy_BTj = dy.reshape(*dy.shape[:2], -1)
        dx = jnp.einsum("BTj,ij->BTi", dy_BTj, w_ij, preferred_element_type=x.dtype)
        dx = sum_to_stream(dx, letter) if into else dx
        dw = jnp.einsum("BTi,BTj->ij", x_BTi, dy_BTj, preferred_element_type=x.dtype)
        dw = dw.reshape(*x.shape[2:], *dy.shape[2:])
        dw = reduce_gradient(dw, axes) if at_rest else dw
        return dx.reshape(x.shape), dw.astype(w.dtype)

    layout = weight(axes) if at_rest else act(axes)
    ins, outs = (act(x_axes), layout, act(y_axes)), (act(x_axes), layout)
    return on_devices(local, ins, outs)(*kept, dy)


_product.defvjp(_product_forward, _product_backward)


def _ways(x: jax.Array, axes: str, letter: str) -> tuple[bool, bool, str, str]:
    """Whether a product reads the residual stream, whether it writes to it, its x's axes, its y's.

    Heads, or the ffn's width, lead what they are merged with, so a split of theirs stays whole."""
    i, j = axes[: x.ndim - 2], axes[x.ndim - 2 :]
    into, out_of = i == "D", j == "D"
    return into, out_of, "B" + (letter if into else "T") + i, "B" + (letter if out_of else "T") + j


def _matrices(x: jax.Array, w: jax.Array, axes: str, at_rest: bool) -> Any:
    """(x_BTi, w_ij, the shape of j) on a device. As a product of two matrices: over several axes at
    once, XLA:CPU transposes weights and gradients in every layer."""
    w = w.astype(x.dtype)
    w = gather_weight(w, axes) if at_rest else w
    shape = w.shape[x.ndim - 2 :]
    x_BTi = x.reshape(*x.shape[:2], -1)
    return x_BTi, w.reshape(x_BTi.shape[-1], -1), shape


def local_rows(ids: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """On a device: ids of V -> rows of its piece, and whether they are in it."""
    local = ids - offset_of("V", rows)
    return jnp.clip(local, 0, rows - 1), (local >= 0) & (local < rows)


def look_up(table: Packed, tokens_BS: jax.Array, dtype: Any) -> jax.Array:
    """Rows of a packed embedding -> [B, S, D] in `dtype`; each device has some columns of some."""
    layout, scales_layout = packed_layouts(table)

    def local(tokens: jax.Array, values: jax.Array, scales: jax.Array | None) -> jax.Array:
        row, mine = local_rows(tokens.ravel(), values.shape[0])
        scales = None if scales is None else scales[row]
        rows = widened(dataclasses.replace(table, values=values[row], scales=scales), dtype)
        rows = sum_at_rest("V", jnp.where(mine[:, None], rows, 0))
        return rows.reshape(*tokens.shape, -1)

    ins = act("1S"), layout, scales_layout
    x = on_devices(local, ins, P(*act("1S"), *weight("D")))(tokens_BS, table.values, table.scales)
    return jax.reshard(x, act("1SD"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(embed_VD: jax.Array, tokens_BT: jax.Array, dtype: Any, letter: str) -> jax.Array:
    """Rows of an embedding at rest, to the residual stream: [B, R, D] in `dtype`.

    The gradient is summed in float32: frequent tokens would drown in bfloat16.
    """

    def local(embed: jax.Array, tokens: jax.Array) -> jax.Array:
        return lookup_rows(gather_weight(embed.astype(dtype), "VD"), tokens, letter)

    ins = weight("VD"), act("BT")
    return on_devices(local, ins, act(f"B{letter}D"))(embed_VD, tokens_BT)


def _lookup_forward(embed_VD: jax.Array, tokens_BT: jax.Array, dtype: Any, letter: str) -> Any:
    return lookup(embed_VD, tokens_BT, dtype, letter), (embed_VD, tokens_BT)


def _lookup_backward(dtype: Any, letter: str, kept: Any, g_BRD: jax.Array) -> Any:
    embed_VD, tokens_BT = kept
    shape = embed_VD.shape[0] // split_of("V"), embed_VD.shape[1]

    def local(tokens: jax.Array, g: jax.Array) -> jax.Array:
        gradient = add_rows(jnp.zeros(shape, jnp.float32), tokens, g, letter)
        return reduce_gradient(gradient, "VD").astype(embed_VD.dtype)

    ins = act("BT"), act(f"B{letter}D")
    gradient = on_devices(local, ins, weight("VD"))(tokens_BT, g_BRD)
    return gradient, np.zeros(tokens_BT.shape, jax.dtypes.float0)


lookup.defvjp(_lookup_forward, _lookup_backward)


def lookup_rows(embed_VD: jax.Array, tokens_BT: jax.Array, letter: str) -> jax.Array:
    """On a device: rows of its piece of an embedding in use, to the residual stream."""
    row, mine = local_rows(tokens_BT, embed_VD.shape[0])
    return sum_to_stream(jnp.where(mine[..., None], embed_VD[row], 0), letter)


def add_rows(sum_VD: jax.Array, tokens_BT: jax.Array, g_BRD: jax.Array, letter: str) -> jax.Array:
    """On a device: float32 `sum_VD` of its piece, plus g at the rows of the tokens."""
    row, mine = local_rows(tokens_BT, sum_VD.shape[0])
    g_BTD = join_stream(g_BRD, letter).astype(jnp.float32)
    return sum_VD.at[row].add(jnp.where(mine[..., None], g_BTD, 0))


def dropout(x: jax.Array, rate: float, key: jax.Array | None, axes: str) -> jax.Array:
    """Zero a share `rate` of x and scale the rest up; without a key, x.

    What is dropped depends on key and place in the whole alone, so any mesh drops the same.
    """
    if key is None or rate == 0.0:
        return x
    shape = x.shape if on_device() else _piece(axes, x.shape)

    def local(key_data: jax.Array) -> jax.Array:
        return keep(key_data, rate, indices(axes[:-1], shape[:-1]), shape[-1])

    kept = on_devices(local, (act(""),), act(axes))(jax.random.key_data(key))
    return jnp.where(kept, x / (1.0 - rate), 0.0).astype(x.dtype)


def keep(key_data: jax.Array, rate: float, places: jax.Array, size: int) -> jax.Array:
    """bool [*places.shape, size]: each place draws `size` values of its own, true at 1 - rate."""

    def draw(place: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key_data), place)
        return jax.random.bernoulli(key, 1.0 - rate, (size,))

    return jax.vmap(draw)(places.ravel()).reshape(*places.shape, size)


def _piece(axes: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n // split_of(a) for a, n in zip(axes, shape, strict=True))
