"""Rows that read one token at a time and may be copied over each other: what a search runs on.

Letters: P prompts, R rows, V vocabulary. The invariant: `lengths_R[r]` tokens of row r are in the
cache, and logits are those after the last of them.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from bloomjax import model
from bloomjax.config import ModelConfig
from bloomjax.decode.cache import Cache, empty_cache, slots_letter
from bloomjax.decode.programs import advance, round_up, take_prompt
from bloomjax.model import Params
from bloomjax.sharding import act, put


class CachedSteps:
    """`beam.Steps` of a model on a mesh, with a cache of `length` places a row."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        mesh: Mesh,
        length: int,
        cache_dtype: str = "auto",
    ):
        self._config, self._params, self._mesh = config, params, mesh
        self._length, self._cache_dtype = round_up(length), cache_dtype

    def prefill(self, prompts: Sequence[Sequence[int]], rows_each: int) -> jax.Array:
        """Each prompt in `rows_each` rows, one after the other -> float32 logits [R, V]."""
        self._cache: Cache | None = None  # of an earlier search: its memory is this one's
        first_R = np.repeat(np.arange(len(prompts)) * rows_each, rows_each)
        with jax.set_mesh(self._mesh):
            cache = jax.jit(empty_cache, static_argnums=(0, 1, 2, 3))(
                self._config, len(first_R), self._length, self._cache_dtype
            )
            for row, prompt in zip(first_R[::rows_each], prompts, strict=True):
                taken = 0
                while taken < len(prompt) - 1:
                    arguments = cache, prompt, row, taken
                    cache, tokens = take_prompt(self._config, self._params, *arguments)
                    taken += tokens
        self._cache = cache
        self._lengths_R = np.repeat([len(prompt) - 1 for prompt in prompts], rows_each)
        return self.advance(first_R, np.repeat([prompt[-1] for prompt in prompts], rows_each))

    def advance(self, parents_R: np.ndarray, tokens_R: np.ndarray) -> jax.Array:
        """Row r goes on from what row parents_R[r] has read, with tokens_R[r] -> logits [R, V]."""
        lengths_R = self._lengths_R[parents_R]
        with jax.set_mesh(self._mesh):
            inputs = (
                put(a.astype(np.int32), P(None), self._mesh)
                for a in (parents_R, tokens_R, lengths_R)
            )
            logits_RV, self._cache = _advance(self._config, self._params, self._cache, *inputs)
        self._lengths_R = lengths_R + 1
        return logits_RV


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    parents_R: jax.Array,
    tokens_R: jax.Array,
    lengths_R: jax.Array,
) -> tuple[jax.Array, Cache]:
    def copied(held: jax.Array) -> jax.Array:
        axes = slots_letter(len(parents_R)) + "NSH"[: held.ndim - 1]
        return held.at[parents_R].get(mode="promise_in_bounds", out_sharding=act(axes))

    cache = jax.tree.map(copied, cache)
    return advance(model.bind(config, params, unrolled=True), cache, tokens_R, lengths_R)
