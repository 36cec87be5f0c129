"""Text from prompts: one prefill, then a few tokens a dispatch, streamed as they come.

Letters: B rows (one a prompt), T prompt positions, S places of the cache, K tokens a dispatch, V
vocabulary. Shapes are rounded up to powers
of two, so few programs are compiled; the cache is donated from step to step.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bloomjax import model
from bloomjax.config import ModelConfig
from bloomjax.decode.cache import Cache, CachedAttention, empty_cache
from bloomjax.decode.sampling import GREEDY, Sampling, choose, settings_of
from bloomjax.errors import InputError
from bloomjax.model import Params
from bloomjax.sharding import act, put

# Tokens between two looks at the host.
TOKENS_PER_DISPATCH = 8


class Fresh(NamedTuple):
    ids: list[int]
    logprobs: list[float]  # of each id under the model, before any filter, in nats


class Engine:
    """Generates from a model on a mesh; `params` are those of a stack of blocks."""

    def __init__(self, config: ModelConfig, params: Params, mesh: Mesh):
        self._config, self._mesh = config, mesh
        with jax.set_mesh(mesh):
            self._params = jax.jit(model.unroll)(params)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        *,
        seed: int = 0,
        eos_id: int | None = None,
    ) -> Iterator[list[Fresh]]:
        """Yields, a dispatch at a time, what is new in each row; after `eos_id` nothing is.

        Raises InputError for an empty prompt or an id outside of the vocabulary.
        """
        V = self._config.vocab_size
        for row, prompt in enumerate(prompts):
            if not prompt:
                raise InputError(f"prompt {row} is empty: expected at least one token")
            if wrong := [token for token in prompt if not 0 <= token < V]:
                raise InputError(f"prompt {row} has id {wrong[0]}: expected 0 to {V - 1}")
        if max_new_tokens < 1:
            return
        longest = max(map(len, prompts))
        # a power of two each, and room for the last dispatch to overshoot
        T = _round_up(longest)
        S = _round_up(max(T, longest + max_new_tokens + TOKENS_PER_DISPATCH))
        tokens_BT = np.zeros((len(prompts), T), np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, : len(prompt)] = prompt
        lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)

        with jax.set_mesh(self._mesh):
            place = functools.partial(put, mesh=self._mesh)
            inputs = place(tokens_BT, act("BT")), place(lengths_B, act("B"))
            seeds = np.arange(seed, seed + len(prompts), dtype=np.uint32)
            seeds_B = place(seeds, act("B"))
            last_B, logprob_B, cache = _prefill(
                self._config, S, sampling, self._params, *inputs, seeds_B
            )
        running = [True] * len(prompts)
        left, ids_BK, logprobs_BK = max_new_tokens, last_B[:, None], logprob_B[:, None]
        while True:
            fresh = []
            for row, (ids, logprobs) in enumerate(
                zip(np.asarray(ids_BK).tolist(), np.asarray(logprobs_BK).tolist(), strict=True)
            ):
                count = min(len(ids), left) if running[row] else 0
                if eos_id in ids[:count]:
                    count, running[row] = ids.index(eos_id), False
                fresh.append(Fresh(ids[:count], logprobs[:count]))
            yield fresh
            left -= ids_BK.shape[1]
            if left <= 0 or not any(running):
                return
            with jax.set_mesh(self._mesh):
                last_B, cache, ids_BK, logprobs_BK = _decode(
                    self._config, sampling, self._params, last_B, cache, seeds_B
                )


def _round_up(n: int, least: int = 16) -> int:
    return max(least, 1 << (n - 1).bit_length())


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(
    config: ModelConfig,
    S: int,
    sampling: Sampling,
    params: Params,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    seeds_B: jax.Array,
) -> tuple[jax.Array, jax.Array, Cache]:
    """The token after each prompt, its log-probability, and the cache that holds the prompts."""
    B, T = tokens_BT.shape
    bloom = model.bind(config, params, unrolled=True)
    attention = CachedAttention(config, empty_cache(config, B, S), T)
    x_BTD = bloom.decode(tokens_BT, attention.layer)
    # only the last real position of each row needs the head
    last_B1D = jax.vmap(lambda x_TD, i: x_TD[i])(x_BTD, lengths_B - 1)[:, None]
    return *_next(bloom, last_B1D, sampling, seeds_B, lengths_B), attention.advance(lengths_B)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _decode(
    config: ModelConfig,
    sampling: Sampling,
    params: Params,
    last_B: jax.Array,
    cache: Cache,
    seeds_B: jax.Array,
) -> tuple[jax.Array, Cache, jax.Array, jax.Array]:
    """K more tokens of every row: the last of them, the cache, all of them, log-probabilities."""
    bloom = model.bind(config, params, unrolled=True)

    def one(carry: tuple[jax.Array, Cache], _: None) -> Any:
        last_B, cache = carry
        attention = CachedAttention(config, cache, 1)
        x_B1D = bloom.decode(last_B[:, None], attention.layer)
        cache = attention.advance(jnp.ones_like(last_B))
        last_B, logprob_B = _next(bloom, x_B1D, sampling, seeds_B, cache.lengths_B)
        return (last_B, cache), (last_B, logprob_B)

    (last_B, cache), (ids_KB, logprobs_KB) = jax.lax.scan(
        one, (last_B, cache), length=TOKENS_PER_DISPATCH
    )
    return last_B, cache, ids_KB.T, logprobs_KB.T


def _next(
    bloom: model.Bloom,
    x_B1D: jax.Array,
    sampling: Sampling,
    seeds_B: jax.Array,
    positions_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    logits_BV = jax.reshard(bloom.logits(x_B1D)[:, 0], act("B3"))  # the vocabulary in one piece
    B = len(seeds_B)
    settings = settings_of([sampling] * B, [0] * B, [0] * B, [()] * B)._replace(seeds_B=seeds_B)
    return choose(logits_BV, None, positions_B, settings, sampling.features)
