"""A weight as decoding reads it: a matrix with a row for each output, in as few bits as it has.

Letters: M rows of x, J outputs, I inputs, G groups of I. The invariant: for few rows of x, and on
CPU for any, `multiply` reads the bytes that are stored, and writes no widened weight to memory (but
a tile that stays in a cache).
"""

import dataclasses

import jax
import jax.numpy as jnp

from bloomjax.kernels import cpu
from bloomjax.sharding import on_cpu

GROUP = 32  # inputs that share a scale in four bits, as in GGUF's Q4_0
_ROWS, _FEW = 16, 64  # rows of x: that share one read of weights in groups; that are read for so
_TILE = 2**18  # weights that XLA:CPU widens at a time: a MiB of float32, which stays in a cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """`values` [J, I] of a float dtype or int8, or uint8 [J, I / 2] with two four-bit values each.

    weight[j, i] = values[j, i] * scales[j, i // (I / G)]; G is 1, or I / 32. A byte b of four-bit
    values holds, in a group of 32 inputs, the value (b & 15) - 8 of input k and (b >> 4) - 8 of
    input k + 16: the layout of GGUF's Q4_0.
    """

    values: jax.Array
    scales: jax.Array | None  # float32 [J, G]; None for floats
    outputs: str = dataclasses.field(metadata={"static": True})  # letters of J, as "N3H"
    inputs: str = dataclasses.field(metadata={"static": True})  # letters of I, as "D"
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # sizes of J's letters


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Of products of `dtype`: float32 means float32, of which TPUs by default make bfloat16, and
    GPUs TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def widened(packed: Packed, dtype: jnp.dtype) -> jax.Array:
    """The weights themselves, [J, I] in `dtype`."""
    return _widened(packed.values, packed.scales, dtype)


def _widened(values: jax.Array, scales: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    if values.dtype == jnp.uint8:
        values = unpacked(values)
    if scales is None:
        return values.astype(dtype)
    groups = values.reshape(*scales.shape, -1).astype(jnp.float32)
    return (groups * scales[..., None]).reshape(values.shape).astype(dtype)


def unpacked(values: jax.Array) -> jax.Array:
    """uint8 [J, I / 2] of four-bit pairs -> int8 [J, I]."""
    J = values.shape[0]
    bytes_ = values.reshape(J, -1, 1, GROUP // 2)
    pairs = jnp.concatenate([bytes_ & 15, bytes_ >> 4], axis=2)
    # by way of int32: XLA:CPU of jax 0.10 and 0.11 shortens uint8 -> int8 -> float32 wrongly
    return (pairs.astype(jnp.int32) - 8).astype(jnp.int8).reshape(J, -1)


def multiply(x_MI: jax.Array, packed: Packed, dtype: jnp.dtype) -> jax.Array:
    """x times the transposed weights -> [M, J] in `dtype`, summed in float32."""
    values, scales = packed.values, packed.scales
    if on_cpu():
        x_MI = x_MI.astype(jnp.float32)
        y_MJ = cpu.multiply(x_MI, values, scales)
        y_MJ = _in_tiles(x_MI, values, scales) if y_MJ is None else y_MJ
    elif scales is not None and scales.shape[1] == 1:
        w_JI = values.astype(x_MI.dtype)
        y_MJ = _product(x_MI, w_JI, jnp.float32)
        y_MJ *= scales[:, 0]
    elif scales is not None and len(x_MI) <= _ROWS:
        y_MJ = _in_sums(x_MI, values, scales)
    elif scales is not None and len(x_MI) <= _FEW:
        x_PMI = jnp.pad(x_MI, ((0, -len(x_MI) % _ROWS), (0, 0))).reshape(-1, _ROWS, x_MI.shape[1])
        y_PMJ = jax.lax.map(lambda part: _in_sums(part, values, scales), x_PMI)
        y_MJ = y_PMJ.reshape(-1, len(values))[: len(x_MI)]
    else:
        w_JI = widened(packed, x_MI.dtype)
        y_MJ = _product(x_MI, w_JI, dtype)
    return y_MJ.astype(dtype)


def _product(x_MI: jax.Array, w_JI: jax.Array, dtype: jnp.dtype) -> jax.Array:
    exact = precision(x_MI.dtype)
    return jnp.einsum("MI,JI->MJ", x_MI, w_JI, precision=exact, preferred_element_type=dtype)


def _in_sums(x_MI: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
    """The product as a sum for each row of x, which XLA:GPU makes one pass over the weights of: as
    operands of a product, those with scales by groups are written widened first."""
    x_MGPk = x_MI.astype(jnp.float32).reshape(len(x_MI), scales.shape[1], -1, GROUP // 2)
    if values.dtype == jnp.uint8:
        bytes_ = values.reshape(*scales.shape, GROUP // 2)
        parts = [half.astype(jnp.float32) - 8 for half in (bytes_ & 15, bytes_ >> 4)]
    else:
        parts = list(jnp.moveaxis(values.reshape(*scales.shape, 2, GROUP // 2), 2, 0))
    w_PJGk = [part.astype(jnp.float32) * scales[..., None] for part in parts]
    rows = (sum(w * x_GPk[:, p] for p, w in enumerate(w_PJGk)) for x_GPk in x_MGPk)
    return jnp.stack([jnp.sum(row_JGk, (1, 2)) for row_JGk in rows])


def _in_tiles(x_MI: jax.Array, values: jax.Array, scales: jax.Array | None) -> jax.Array:
    """The product on XLA:CPU, which multiplies float32 well and nothing else: some outputs' weights
    are widened at a time, behind a barrier lest that be fused into the product."""

    def some(start: jax.Array | int, size: int) -> jax.Array:
        w, s = jax.tree.map(
            lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), (values, scales)
        )
        if w.dtype == jnp.bfloat16:  # as XLA:CPU converts it, ten times slower
            bits = jax.lax.bitcast_convert_type(w, jnp.uint16).astype(jnp.uint32) << 16
            w = jax.lax.bitcast_convert_type(bits, jnp.float32)
        w_JI = jax.lax.optimization_barrier(_widened(w, s, jnp.float32))
        return jnp.einsum("MI,JI->MJ", x_MI, w_JI)

    J = values.shape[0]
    rows = max(_TILE // x_MI.shape[1], 1)
    if values.dtype == jnp.float32 or rows >= J:
        return some(0, J)
    tiles, rest = divmod(J, rows)
    y_TMJ = jax.lax.map(lambda t: some(t * rows, rows), jnp.arange(tiles))
    y_MJ = y_TMJ.swapaxes(0, 1).reshape(len(x_MI), tiles * rows)
    return jnp.concatenate([y_MJ, some(tiles * rows, rest)], axis=1) if rest else y_MJ
