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

from bloomjax.kernels.packed import precision
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


def slopes_here(heads: int, round_alibi: bool) -> jax.Array:
    """`alibi_slopes` of this device's `heads`, as [N, 1, 1]."""
    # With slopes an ulp lower, products that lie between two bfloat16 numbers round otherwise.
    slopes = alibi_slopes(heads * split_of("N"), np.float32 if round_alibi else np.float64)
    slopes_N = jax.lax.dynamic_slice_in_dim(jnp.asarray(slopes), offset_of("N", heads), heads)
    return slopes_N[:, None, None]


def attend(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    round_alibi: bool = False,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Softmax(q k / sqrt(H) + ALiBi) v -> [B, T, N, H] in q's dtype; softmax in float32.

    A query sees the keys at its own position and before. `segments_BT` (int, 0 is padding)
    restricts a query to keys of its own segment; a query of padding gives an undefined row.
    `round_alibi` reproduces the reference's arithmetic in low precision: the bias slope * s, and
    the scores, are rounded to q's dtype (transformers, modeling_bloom.py). Attention over a cache
    is in `decode.cache`.
    """
    ins = (*3 * (act("BTNH"),), act("BT"), act(""))
    key_data = jax.random.key_data(dropout.key) if dropout else None

    def local(q: Any, k: Any, v: Any, segments_BT: Any, key_data: Any) -> jax.Array:
        k, v = gather_over("T", k, 1), gather_over("T", v, 1)
        segments_BS = None if segments_BT is None else gather_over("T", segments_BT, 1)
        drop = (dropout.rate, key_data) if dropout else None
        return _attend(q, k, v, segments_BT, segments_BS, round_alibi, drop)

    return on_devices(local, ins, act("BTNH"))(q_BTNH, k_BTNH, v_BTNH, segments_BT, key_data)


def _attend(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    segments_BT: jax.Array | None,
    segments_BS: jax.Array | None,
    round_alibi: bool,
    dropout: tuple[float, jax.Array] | None,
) -> jax.Array:
    """`attend` of one device: its rows, its heads, its queries, all keys."""
    B, T, N, H = q_BTNH.shape
    S = k_BSNH.shape[1]
    slopes_N11, exact = slopes_here(N, round_alibi), precision(q_BTNH.dtype)
    first = offset_of("T", T)
    key_positions = jnp.arange(S)
    if round_alibi and segments_BS is not None:  # the reference counts from the first real token
        key_positions = jnp.cumsum(segments_BS > 0, 1)[:, None, None, :] - 1

    def rows(start: int, stop: int, seen: int) -> jax.Array:
        """Attention of this device's queries start..stop to the first `seen` keys."""
        q, k, v = q_BTNH[:, start:stop], k_BSNH[:, :seen], v_BSNH[:, :seen]
        here = (first + jnp.arange(start, stop))[None]
        t, s = here[:, None, :, None], jnp.arange(seen)
        scores = jnp.einsum(
            "BTNH,BSNH->BNTS", q, k, precision=exact, preferred_element_type=jnp.float32
        )
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
        return jnp.einsum("BNTS,BSNH->BTNH", probs.astype(q.dtype), v, precision=exact)

    if T <= CHUNK:
        return rows(0, T, S)
    # The keys after a chunk's last query are never touched: half of the work, and static shapes.
    # Where positions are split, all devices do the work of the last one.
    rows = jax.checkpoint(rows, static_argnums=(0, 1, 2))
    bounds = [(start, min(start + CHUNK, T)) for start in range(0, T, CHUNK)]
    whole = split_of("T") > 1
    return jnp.concatenate([rows(a, b, S if whole else b) for a, b in bounds], axis=1)
