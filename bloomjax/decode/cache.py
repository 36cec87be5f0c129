"""The key/value cache: per layer two arrays [B, S, N, H], a slot of S places for each row of B.

Rows are ragged: each begins at place 0 and counts its own length, so a short prompt wastes
nothing and ALiBi needs no correction. What stands beyond a row's length is never attended to.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bloomjax.attention import attend
from bloomjax.config import ModelConfig
from bloomjax.model import Attention, compute_dtype
from bloomjax.sharding import act


class Cache(NamedTuple):
    keys: tuple[jax.Array, ...]  # per layer [B, S, N, H]
    values: tuple[jax.Array, ...]
    lengths_B: jax.Array  # int32, tokens that each row holds


def empty_cache(config: ModelConfig, rows: int, length: int) -> Cache:
    """A cache for `rows` sequences of up to `length` tokens, on the current mesh."""
    shape = (rows, length, config.heads, config.width // config.heads)

    def zeros() -> tuple[jax.Array, ...]:
        dtype = compute_dtype(config)
        return tuple(
            jnp.zeros(shape, dtype, out_sharding=act("BSNH")) for _ in range(config.layers)
        )

    return Cache(zeros(), zeros(), jnp.zeros(rows, jnp.int32, out_sharding=act("B")))


class CachedAttention:
    """Attention of T new tokens a row to what the cache holds and to themselves.

    Hands each layer its attention, collects what the layers write, and gives the new cache: `T`
    tokens are written at each row's length; `advance` of them count.
    """

    def __init__(self, config: ModelConfig, cache: Cache, T: int):
        self._round = config.alibi_dtype == "compute"
        self._cache = cache
        self._keys, self._values = list(cache.keys), list(cache.values)
        self._positions_BT = cache.lengths_B[:, None] + jnp.arange(T)

    def layer(self, i: int) -> Attention:
        def attention(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array) -> jax.Array:
            self._keys[i] = self._write(self._keys[i], k_BTNH)
            self._values[i] = self._write(self._values[i], v_BTNH)
            return attend(
                q_BTNH,
                self._keys[i],
                self._values[i],
                positions_BT=self._positions_BT,
                round_alibi=self._round,
            )

        return attention

    def _write(self, held_BSNH: jax.Array, new_BTNH: jax.Array) -> jax.Array:
        def row(held: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(held, new.astype(held.dtype), (start, 0, 0))

        new_BSNH = jax.reshard(new_BTNH, act("BSNH"))
        return jax.vmap(row)(held_BSNH, new_BSNH, self._cache.lengths_B)

    def advance(self, tokens_B: jax.Array) -> Cache:
        return Cache(tuple(self._keys), tuple(self._values), self._cache.lengths_B + tokens_B)
