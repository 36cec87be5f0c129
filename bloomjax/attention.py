"""Causal attention with ALiBi: one signature, a plain reference.

Letters: B batch, T query position, S key position, N heads, H head dim. The bias of head n is
slope_n * (s - t): BLOOM adds slope_n * s, which differs by a constant of the row and so leaves the
softmax unchanged; the relative form keeps its precision at any length.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bloomjax.sharding import act

# Queries are taken in chunks of this many, so that scores never take T x S memory.
CHUNK = 512


def alibi_slopes(heads: int, base: type = np.float64) -> np.ndarray:
    """float32 [N]: 2^(-8i/n) for i = 1..n where n is a power of two; beyond the largest power of
    two below N, the odd powers of its double's base (Press et al. 2022, as in their repository).

    Transformers rounds 2^(-8/n) to float32 before the power: give `base=np.float32` for its slopes.
    """
    n = 2 ** int(np.log2(heads))
    whole = np.float64(base(2.0 ** (-8.0 / n))) ** np.arange(1, n + 1)
    rest = np.float64(base(2.0 ** (-4.0 / n))) ** np.arange(1, 2 * (heads - n), 2)
    return np.concatenate([whole, rest]).astype(np.float32)


def attend(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    *,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    round_alibi: bool = False,
    drop: Callable[[jax.Array, int], jax.Array] | None = None,
) -> jax.Array:
    """Softmax(q k / sqrt(H) + ALiBi) v -> [B, T, N, H] in q's dtype; softmax in float32.

    A query sees the keys at its own position and before. Without `positions_BT` queries and keys
    are the same T positions; with it (decoding) keys stand at 0..S-1 of a cache and the queries
    where `positions_BT` says. `segments_BT` (int, 0 is padding) restricts a query to keys of its
    own segment; a query of padding gives an undefined row. `round_alibi` reproduces the
    reference's arithmetic in low precision: the bias slope * s, and the scores, are rounded to q's
    dtype (transformers, modeling_bloom.py). `drop(probabilities, chunk)` is attention dropout.
    """
    _, T, N, H = q_BTNH.shape
    S = k_BSNH.shape[1]
    # With slopes an ulp lower, products that lie between two bfloat16 numbers round otherwise.
    slopes_N = alibi_slopes(N, np.float32 if round_alibi else np.float64)
    slopes_N11 = jax.reshard(jnp.asarray(slopes_N), act("N"))[:, None, None]
    key_positions = jnp.arange(S)
    if round_alibi and segments_BT is not None:  # the reference counts from the first real token
        key_positions = jnp.cumsum(segments_BT > 0, 1)[:, None, None, :] - 1

    def rows(chunk: int, start: int, stop: int, seen: int) -> jax.Array:
        """Attention of queries start..stop to the first `seen` keys."""
        q, k, v = q_BTNH[:, start:stop], k_BSNH[:, :seen], v_BSNH[:, :seen]
        t = jnp.arange(start, stop)[None] if positions_BT is None else positions_BT[:, start:stop]
        t, s = t[:, None, :, None], jnp.arange(seen)
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32)
        scores = scores / np.sqrt(H)
        if round_alibi:
            bias = (slopes_N11 * key_positions[..., :seen]).astype(q.dtype)
            scores = (scores + bias).astype(q.dtype).astype(jnp.float32)
        else:
            scores += slopes_N11 * (s - t).astype(jnp.float32)
        mask = s <= t
        if segments_BT is not None:
            same = segments_BT[:, start:stop, None] == segments_BT[:, None, :seen]
            mask &= same[:, None]
        probs = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
        if drop is not None:
            probs = drop(probs, chunk)
        return jnp.einsum("BNTS,BSNH->BTNH", probs.astype(q.dtype), v)

    if positions_BT is not None or T <= CHUNK:
        return rows(0, 0, T, S)
    # The keys after a chunk's last query are never touched: half of the work, and static shapes.
    rows = jax.checkpoint(rows, static_argnums=(0, 1, 2, 3))
    bounds = [(start, min(start + CHUNK, T)) for start in range(0, T, CHUNK)]
    return jnp.concatenate([rows(i, a, b, b) for i, (a, b) in enumerate(bounds)], axis=1)
