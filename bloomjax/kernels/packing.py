"""Weights into the few bits of `kernels.packed`: from floats, or from the blocks of a GGUF file.

Letters: J outputs, I inputs, G groups of I. The invariant: a row is packed by itself, so rows may
be packed wherever they lie, in any portions.
"""

import jax
import jax.numpy as jnp

from bloomjax.kernels.packed import GROUP

KINDS = ("int8", "int4")
# GGUF's kinds whose blocks are a scale and small integers -> how `from_blocks` packs them.
BLOCKS = {"Q8_0": "int8", "Q5_0": "int8", "Q4_0": "int4"}


def quantised(w_JI: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """Floats -> (values, scales) of a Packed: "int8" with a scale for every output, [J, 1], or
    "int4" with one for every 32 inputs, [J, I / 32]."""
    J, inputs = w_JI.shape
    w_JGi = w_JI.astype(jnp.float32).reshape(J, -1, inputs if kind == "int8" else GROUP)
    if kind == "int8":
        scales_JG = jnp.abs(w_JGi).max(-1) / 127
        return _rounded(w_JGi, scales_JG).astype(jnp.int8).reshape(J, inputs), scales_JG
    # The largest of a group becomes -8, as in GGUF's Q4_0: all sixteen values are used.
    at = jnp.abs(w_JGi).argmax(-1, keepdims=True)
    scales_JG = jnp.take_along_axis(w_JGi, at, -1)[..., 0] / -8
    values = (jnp.clip(_rounded(w_JGi, scales_JG), -8, 7) + 8).astype(jnp.uint8)
    pairs = values[..., : GROUP // 2] | values[..., GROUP // 2 :] << 4
    return pairs.reshape(J, inputs // 2), scales_JG


def _rounded(w_JGi: jax.Array, scales_JG: jax.Array) -> jax.Array:
    inverse = jnp.where(scales_JG == 0, 0, 1 / scales_JG)
    return jnp.round(w_JGi * inverse[..., None])


def from_blocks(blocks: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """Rows of whole blocks, uint8 [J, bytes] -> (values, scales [J, I / 32]) of the same weights,
    exactly. A block is a float16 scale, then (Q5_0: 32 fifth bits, then) 32 integers."""
    J = blocks.shape[0]
    size = {"Q8_0": 34, "Q5_0": 22, "Q4_0": 18}[kind]
    blocks = blocks.reshape(J, -1, size)
    scales_JG = jax.lax.bitcast_convert_type(blocks[..., :2], jnp.float16).astype(jnp.float32)
    if kind == "Q8_0":
        values = jax.lax.bitcast_convert_type(blocks[..., 2:], jnp.int8)
    elif kind == "Q4_0":
        values = blocks[..., 2:]
    else:
        low = jnp.concatenate([blocks[..., 6:] & 15, blocks[..., 6:] >> 4], -1)
        bits = jnp.arange(8, dtype=jnp.uint8)
        high = (blocks[..., 2:6, None] >> bits & 1).reshape(*low.shape)
        values = (low | high << 4).astype(jnp.int8) - 16
    return values.reshape(J, -1), scales_JG
