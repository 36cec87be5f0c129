"""How the next token is chosen. Filters have the semantics, and the order, of transformers:
temperature, top-k (ties of the k-th stay), top-p (the fewest tokens that reach p).

Draws are keyed by (seed of the request, position), so a request's tokens do not depend on its
neighbours in the batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Features(NamedTuple):
    """Static for the compiler: what any request needs."""

    draws: bool = False

    @classmethod
    def of(cls, sampling):
        return cls(sampling.temperature > 0)

    def __or__(self, other: "Features") -> "Features":  # type: ignore[override]
        return Features(*(a or b for a, b in zip(self, other, strict=True)))


class Sampling(NamedTuple):
    """Temperature 0 is greedy; top_k 0 and top_p 1 filter nothing."""

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


class Settings(NamedTuple):
    seeds: jax.Array
    temperature: jax.Array
    stop_ids: jax.Array

    @classmethod
    def of(cls, sampling, seed, stop_ids, prompt_length):
        import numpy as np

        ids = np.full(4, -1, np.int32)
        ids[: len(stop_ids)] = stop_ids
        return cls(np.uint32(seed), np.float32(sampling.temperature), ids)


def choose(logits_BV, tokens_BS, lengths_B, settings, features):
    next_B = jnp.argmax(logits_BV, -1).astype(jnp.int32)
    chosen_B = jax.vmap(lambda logits_V, i: logits_V[i])(logits_BV, next_B)
    return next_B, chosen_B - jax.nn.logsumexp(logits_BV, -1)
