"""How the next token is chosen. Filters have the semantics, and the order, of transformers:
temperature, top-k (ties of the k-th stay), top-p (the fewest tokens that reach p).

Draws are keyed by (seed of the request, position), so a request's tokens do not depend on its
neighbours in the batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """Static for the compiler. Temperature 0 is greedy; top_k 0 and top_p 1 filter nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


def filtered(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """float32 logits after temperature, top-k and top-p; what they exclude is -inf."""
    logits_BV = logits_BV / sampling.temperature
    V = logits_BV.shape[-1]
    if not 0 < sampling.top_k < V and sampling.top_p >= 1.0:
        return logits_BV
    ranked_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    if 0 < sampling.top_k < V:
        least_B1 = ranked_BV[:, sampling.top_k - 1, None]
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
        ranked_BV = jnp.where(ranked_BV >= least_B1, ranked_BV, -jnp.inf)
    if sampling.top_p < 1.0:
        probs_BV = jax.nn.softmax(ranked_BV, -1)
        before_BV = jnp.cumsum(probs_BV, -1) - probs_BV  # mass of what ranks higher
        kept_BV = jnp.where(before_BV < sampling.top_p, ranked_BV, jnp.inf)
        logits_BV = jnp.where(logits_BV >= kept_BV.min(-1, keepdims=True), logits_BV, -jnp.inf)
    return logits_BV


def choose(
    logits_BV: jax.Array, sampling: Sampling, seeds_B: jax.Array, positions_B: jax.Array
) -> jax.Array:
    """The next token of each row, int32 [B]; `positions_B` is where it will stand."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)

    def draw(logits_V: jax.Array, seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), logits_V)

    drawn = jax.vmap(draw)(filtered(logits_BV, sampling), seeds_B, positions_B)
    return drawn.astype(jnp.int32)
