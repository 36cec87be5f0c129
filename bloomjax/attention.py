"""Causal attention with ALiBi: one signature, a plain reference.

Letters: B batch, T query position, S key position, N heads, H head dim. The bias of head n is
slope_n * (s - t): BLOOM adds slope_n * s, which differs by a constant of the row and so leaves the
softmax unchanged; the relative form keeps its precision at any length. Where positions are split, a
device has its piece of the queries, gathers all keys and values, and counts positions globally.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bloomjax.parallel import keep
from bloomjax.sharding import act, gather_over, indices, offset_of, on_devices, split_of

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


class Dropout(NamedTuple):
    """Of attention's probabilities."""

    rate: float
    key: jax.Array


def attend(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    *,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    round_alibi: bool = False,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Softmax(q k / sqrt(H) + ALiBi) v -> [B, T, N, H] in q's dtype; softmax in float32.

    A query sees the keys at its own position and before. Without `positions_BT` queries and keys
    are the same T positions; with it (decoding) keys stand at 0..S-1 of a cache and the queries
    where `positions_BT` says. `segments_BT` (int, 0 is padding) restricts a query to keys of its
    own segment; a query of padding gives an undefined row. `round_alibi` reproduces the
    reference's arithmetic in low precision: the bias slope * s, and the scores, are rounded to q's
    dtype (transformers, modeling_bloom.py).
    """
    cached = positions_BT is not None
    keys = "BSNH" if cached else "BTNH"
    ins = (act("BTNH"), act(keys), act(keys), act("BT"), act("BT"), act(""))
    key_data = jax.random.key_data(dropout.key) if dropout else None

    def local(q: Any, k: Any, v: Any, t: Any, segments: Any, key_data: Any) -> jax.Array:
        q_segments = segments
        if not cached:
            k, v = gather_over("T", k, 1), gather_over("T", v, 1)
            segments = None if segments is None else gather_over("T", segments, 1)
        drop = (dropout.rate, key_data) if dropout else None
        return _attend(q, k, v, t, q_segments, segments, round_alibi, drop)

    return on_devices(local, ins, act("BTNH"))(
        q_BTNH, k_BSNH, v_BSNH, positions_BT, segments_BT, key_data
    )


def _attend(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    positions_BT: jax.Array | None,
    segments_BT: jax.Array | None,
    segments_BS: jax.Array | None,
    round_alibi: bool,
    dropout: tuple[float, jax.Array] | None,
) -> jax.Array:
    """`attend` of one device: its rows, its heads, its queries, all keys."""
    B, T, N, H = q_BTNH.shape
    S = k_BSNH.shape[1]
    # With slopes an ulp lower, products that lie between two bfloat16 numbers round otherwise.
    slopes = alibi_slopes(N * split_of("N"), np.float32 if round_alibi else np.float64)
    slopes_N11 = jax.lax.dynamic_slice_in_dim(jnp.asarray(slopes), offset_of("N", N), N)
    slopes_N11 = slopes_N11[:, None, None]
    first = offset_of("T", T)
    key_positions = jnp.arange(S)
    if round_alibi and segments_BS is not None:  # the reference counts from the first real token
        key_positions = jnp.cumsum(segments_BS > 0, 1)[:, None, None, :] - 1

    def rows(start: int, stop: int, seen: int) -> jax.Array:
        """Attention of this device's queries start..stop to the first `seen` keys."""
        q, k, v = q_BTNH[:, start:stop], k_BSNH[:, :seen], v_BSNH[:, :seen]
        here = (first + jnp.arange(start, stop))[None]
        t = here if positions_BT is None else positions_BT[:, start:stop]
        t, s = t[:, None, :, None], jnp.arange(seen)
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32)
        scores = scores / np.sqrt(H)
        if round_alibi:
            bias = (slopes_N11 * key_positions[..., :seen]).astype(q.dtype)
            scores = (scores + bias).astype(q.dtype).astype(jnp.float32)
        else:
            scores += slopes_N11 * (s - t).astype(jnp.float32)
        mask = s <= t
        if segments_BT is not None and segments_BS is not None:
            same = segments_BT[:, start:stop, None] == segments_BS[:, None, :seen]
            mask &= same[:, None]
        probs = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
        if dropout is not None:
            rate, key_data = dropout
            # Each row, head and query draws for all keys, wherever it is computed.
            row_BN1 = indices("BN", (B, N))[..., None]
            place_BNT = row_BN1 * np.uint32(T * split_of("T")) + here.astype(jnp.uint32)
            drawn = keep(key_data, rate, place_BNT, S)[..., :seen]
            probs = jnp.where(drawn, probs / (1.0 - rate), 0.0)
        return jnp.einsum("BNTS,BSNH->BTNH", probs.astype(q.dtype), v)

    if positions_BT is not None or T <= CHUNK:
        return rows(0, T, S)
    # The keys after a chunk's last query are never touched: half of the work, and static shapes.
    # Where positions are split, all devices do the work of the last one.
    rows = jax.checkpoint(rows, static_argnums=(0, 1, 2))
    bounds = [(start, min(start + CHUNK, T)) for start in range(0, T, CHUNK)]
    whole = split_of("T") > 1
    return jnp.concatenate([rows(a, b, S if whole else b) for a, b in bounds], axis=1)
