"""Weights into the form of `bloomjax.kernels.packed`: quantised from floats, or a GGUF file's own.

Letters: J outputs, I inputs, G groups of 32 inputs. The invariant: what a GGUF file holds in one
of the kinds of `BLOCKS` stays exactly what it is.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bloomjax.kernels.packed import GROUP

# Four-bit scales that are tried: a group's value of largest size becomes one of these. -8 is what
# GGUF's Q4_0 makes of it; together they leave nine tenths of its squared error.
_EXTREMES = (-8.0, -8.8, 7.0)
# GGUF's kinds: bytes of a block of 32 values, after a float16 scale (ggml-common.h of llama.cpp).
BLOCKS = {"Q8_0": 32, "Q5_0": 4 + 16, "Q4_0": 16}


def quantise(w_JI: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """float32 weights -> (values, scales) of a `Packed`. `kind` is int8 or int4.

    int8 has a scale for each output: the largest size / 127, so no weight is off by more than half
    of it. int4 has one for each 32 inputs: of a few that are tried, each refitted to what it
    rounds to, the one of least squared error, so it is never worse than GGUF's Q4_0 with its
    scale unrounded. I must then divide by 32.
    """
    if kind == "int8":
        scales = jnp.max(jnp.abs(w_JI), axis=1, keepdims=True) / 127
        return jnp.round(_divide(w_JI, scales)).astype(jnp.int8), scales
    assert kind == "int4", kind
    w_kn = w_JI.reshape(-1, GROUP).T  # all groups side by side, which XLA:CPU sums fastest
    most, least = w_kn.max(0), w_kn.min(0)
    extreme = jnp.where(most > -least, most, least)
    error = jnp.full(extreme.shape, jnp.inf)
    q, scale = jnp.zeros_like(w_kn), jnp.zeros_like(extreme)
    for candidate in _EXTREMES:
        near = jnp.clip(jnp.round(_divide(w_kn, extreme / candidate)), -8, 7)
        fit = _divide(jnp.sum(w_kn * near, 0), jnp.sum(near**2, 0))
        left = jnp.sum((w_kn - fit * near) ** 2, 0)
        better = left < error
        error = jnp.where(better, left, error)
        q, scale = jnp.where(better, near, q), jnp.where(better, fit, scale)
    q = (q + 8).astype(jnp.uint8)
    values = q[: GROUP // 2] | q[GROUP // 2 :] << 4
    J = w_JI.shape[0]
    return values.T.reshape(J, -1), scale.reshape(J, -1)


def _divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b; where b is 0, 0."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def from_gguf(blocks: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 rows of blocks of one of the kinds of `BLOCKS` -> (values, scales) of a `Packed`.

    Q8_0 and Q5_0 become int8 in groups of 32, Q4_0 pairs of four bits: the same weights.
    """
    J = len(blocks)
    blocks = blocks.reshape(J, -1, 2 + BLOCKS[kind])
    scales = blocks[..., :2].copy().view(np.float16)[..., 0].astype(np.float32)
    values = blocks[..., 2:]
    if kind == "Q5_0":  # 32 fifth bits, then pairs of the lower four
        fifth = np.unpackbits(values[..., :4], axis=-1, bitorder="little")
        pairs = values[..., 4:]
        four = np.concatenate([pairs & 15, pairs >> 4], axis=-1)
        values = ((fifth << 4 | four).astype(np.int8) - np.int8(16)).view(np.uint8)
    values = values.reshape(J, -1)
    return values if kind == "Q4_0" else values.view(np.int8), scales
