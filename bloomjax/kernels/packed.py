"""A weight as decoding reads it: a matrix with a row for each output, in as few bits as it has.

Letters: M rows of x, J outputs, I inputs, G groups of I. The invariant: `multiply` reads the bytes
that are stored; no weight is widened in memory.
"""

import dataclasses

import jax
import jax.numpy as jnp

GROUP = 32  # inputs that share a scale in four bits, as in GGUF's Q4_0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """`values` [J, I] of a float dtype or int8, or uint8 [J, I / 2] with two four-bit values each.

    weight[j, i] = values[j, i] * scales[j, i // (I / G)]. A byte b of four-bit values holds, in a
    group of 32 inputs, the value (b & 15) - 8 of input k and (b >> 4) - 8 of input k + 16: the
    layout of GGUF's Q4_0.
    """

    values: jax.Array
    scales: jax.Array | None  # float32 [J, G]; None for floats
    outputs: str = dataclasses.field(metadata={"static": True})  # letters of J, as "N3H"
    inputs: str = dataclasses.field(metadata={"static": True})  # letters of I, as "D"
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # sizes of J's letters


def widened(packed: Packed, dtype: jnp.dtype) -> jax.Array:
    """The weights themselves, [J, I] in `dtype`."""
    values, scales = packed.values, packed.scales
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
    pairs = jnp.concatenate([bytes_ & 15, bytes_ >> 4], axis=2).astype(jnp.int8) - 8
    return pairs.reshape(J, -1)


def multiply(x_MI: jax.Array, packed: Packed, dtype: jnp.dtype) -> jax.Array:
    """x times the transposed weights -> [M, J] in `dtype`, summed in float32."""
    w_JI = widened(packed, x_MI.dtype)
    return jnp.einsum("MI,JI->MJ", x_MI, w_JI, preferred_element_type=dtype)
