"""The compiled programs of decoding, and the state that goes through them.

Letters: B slots, S places of a slot, C prompt tokens of a chunk, K tokens a dispatch, V vocabulary.
A slot holds its tokens, prompt and answer, and the cache of all but the last. One program takes C
tokens of one slot's prompt into the cache, another writes K tokens into every slot that runs.
Prompts are taken in whole but for their last token, from which the first of the answer is made: the
head stands in one place.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from bloomjax import model
from bloomjax.attention import slopes_here
from bloomjax.config import ModelConfig
from bloomjax.decode.cache import Cache, CachedAttention, Held, empty_cache
from bloomjax.decode.sampling import GREEDY, Features, Settings, choose, settings_of
from bloomjax.kernels import gpu
from bloomjax.model import Params
from bloomjax.sharding import act, on_cpu, on_one_gpu, put

# Prompt tokens of a chunk at most.
CHUNK = 512
_SMALLEST_CHUNK = 16
STOP_IDS = 4  # that a request may have
# float32 logits [B, V], tokens [B, S] and lengths [B] -> logits; see `engine.Engine`
LogitsFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class State(NamedTuple):
    """On the device, donated from call to call."""

    cache: Cache
    tokens_BS: jax.Array  # int32; of slot b, the first lengths_B[b] count
    lengths_B: jax.Array  # int32
    limits_B: jax.Array  # int32, the length that ends it
    settings: Settings


def round_up(tokens: int) -> int:
    """Places, or tokens of a chunk, that hold so many: a power of two, or whole chunks."""
    if tokens > CHUNK:
        return -(-tokens // CHUNK) * CHUNK
    return max(_SMALLEST_CHUNK, 1 << (tokens - 1).bit_length())


def tokens_per_dispatch(config: ModelConfig) -> int:
    """K: enough that the host is not waited for, few enough that text flows and slots refill."""
    if not on_cpu():
        return 16
    return max(1, min(8, int(2.4e9 / config.parameter_count)))  # in about a third of a second


def empty_state(config: ModelConfig, slots: int, length: int, cache_dtype: str) -> State:
    """Of an engine in which nothing runs, on the current mesh."""

    def row(value: Any) -> jax.Array:
        shape = slots, *np.shape(value)
        return jnp.zeros(shape, value.dtype, out_sharding=P(*(None for _ in shape)))

    rows = row_of((), 0, settings_of([GREEDY], [0], [0], [()], STOP_IDS), length)
    return State(empty_cache(config, slots, length, cache_dtype), *jax.tree.map(row, rows))


def row_of(prompt: Sequence[int], limit: int, settings: Settings, length: int) -> Any:
    """What a slot of a state holds beside its cache; `settings` are of one row."""
    tokens_S = np.zeros(length, np.int32)
    tokens_S[: len(prompt)] = prompt
    one = jax.tree.map(lambda setting_1: setting_1[0], settings)
    return tokens_S, np.int32(len(prompt)), np.int32(limit), one


@functools.partial(jax.jit, donate_argnums=0)
def place(rows: Any, slot: jax.Array, row: Any) -> Any:
    """All but the cache of a state, with what a slot holds replaced."""
    return jax.tree.map(
        lambda all_B, one: jax.lax.dynamic_update_index_in_dim(all_B, one, slot, 0), rows, row
    )


def take_prompt(
    config: ModelConfig, params: Params, cache: Cache, prompt: Sequence[int], slot: int, start: int
) -> tuple[Cache, int]:
    """The next chunk of a prompt, from place `start` on, into a slot; and how many tokens it is.

    Starts are whole chunks, and so are longer slots: no chunk reaches past the end of a slot. Few
    programs are compiled: one for each size of a first chunk, and for each power of two of what
    later ones see."""
    tokens = prompt[start : min(start + CHUNK, len(prompt) - 1)]
    tokens_1C = np.zeros((1, CHUNK if start else round_up(len(tokens))), np.int32)
    tokens_1C[0, : len(tokens)] = tokens
    inputs = put(tokens_1C, act("1S"), jax.sharding.get_mesh()), np.int32(slot), np.int32(start)
    seen, length = start + tokens_1C.size, cache.keys[0].values.shape[2]
    seen = min(length, 1 << (seen - 1).bit_length()) if start else seen
    return _take(config, seen, params, cache, *inputs), len(tokens)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _take(
    config: ModelConfig,
    seen: int,
    params: Params,
    cache: Cache,
    tokens_1C: jax.Array,
    slot: jax.Array,
    start: jax.Array,
) -> Cache:
    """The cache with C tokens of a slot's prompt, from place `start` on."""
    attention = CachedAttention(config, cache, slot=slot, start=start, seen=seen)
    model.bind(config, params, unrolled=True).decode(tokens_1C, attention.layer)
    return attention.cache


def advance(
    bloom: model.Bloom, cache: Cache, tokens_B: jax.Array, positions_B: jax.Array
) -> tuple[jax.Array, Cache]:
    """float32 logits [B, V] after one token of every slot, and the cache with it."""
    if (made := _in_one_launch(bloom, cache, tokens_B, positions_B)) is not None:
        return made
    attention = CachedAttention(bloom.config, cache, positions_B)
    x_B1D = bloom.decode(tokens_B[:, None], attention.layer)
    logits_BV = jax.reshard(bloom.logits(x_B1D)[:, 0], P(None, None))  # in one piece
    return logits_BV, attention.cache


def _in_one_launch(
    bloom: model.Bloom, cache: Cache, tokens_B: jax.Array, positions_B: jax.Array
) -> tuple[jax.Array, Cache] | None:
    """`advance` on the kernel that has the whole model, where there is one (`kernels.gpu`)."""
    config = bloom.config
    if config.apply_residual_connection_post_layernorm or config.alibi_dtype == "compute":
        return None
    if cache.keys[0].scales is not None or not on_one_gpu():
        return None
    of = [[getattr(block, name).get_value() for name in _ORDER] for block in bloom.blocks]
    layers = [
        [*weights, keys.values, values.values]
        for weights, keys, values in zip(of, cache.keys, cache.values, strict=True)
    ]
    norms = [getattr(bloom, f"{name}_{part}") for name in ("embed_ln", "ln") for part in "wb"]
    made = gpu.step(
        tokens_B,
        positions_B,
        slopes_here(config.heads, round_alibi=False)[:, 0, 0],
        [norm.get_value() for norm in norms],
        bloom.embed.get_value(),
        layers,
        config.layer_norm_epsilon,
    )
    if made is None:
        return None
    logits_BV, written = made
    keys, values = (tuple(Held(held, None) for held in written[i::2]) for i in range(2))
    return logits_BV, Cache(keys, values)


# Parameters of a block as `gpu.step` takes them.
_ORDER = [f"{name}_{part}" for name in ("ln1", "ln2", "qkv", "out", "up", "down") for part in "wb"]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=5)
def decode(
    config: ModelConfig,
    K: int,
    features: Features,
    logits_fn: LogitsFn | None,
    params: Params,
    state: State,
    ready_B: jax.Array,
) -> tuple[State, Any]:
    """K more tokens of every slot that is ready, each until its end.

    Gives, beside the state: ids, log-probabilities and whether they count, each [K, B], and which
    slots have not ended.
    """
    bloom = model.bind(config, params, unrolled=True)

    def one(carry: tuple[State, jax.Array], _: None) -> Any:
        state, running_B = carry
        tokens_BS, lengths_B, settings = state.tokens_BS, state.lengths_B, state.settings
        last_B = jnp.maximum(lengths_B - 1, 0)
        here_B = jax.vmap(lambda tokens_S, i: tokens_S[i])(tokens_BS, last_B)
        logits_BV, cache = advance(bloom, state.cache, here_B, last_B)
        if logits_fn is not None:
            logits_BV = logits_fn(logits_BV, tokens_BS, lengths_B)
        chosen = choose(logits_BV, tokens_BS, lengths_B, settings, features)
        next_B, logprob_B = (jax.reshard(x, P(None)) for x in chosen)
        wrote_B = running_B & ~(next_B[:, None] == settings.stop_ids_BE).any(-1)
        written_B = jnp.where(wrote_B, next_B, 0)
        at = tokens_BS.at[jnp.arange(len(lengths_B)), lengths_B]
        tokens_BS = at.set(written_B, mode="drop", unique_indices=True)
        lengths_B += wrote_B
        running_B = wrote_B & (lengths_B < state.limits_B)
        state = State(cache, tokens_BS, lengths_B, state.limits_B, settings)
        return (state, running_B), (next_B, logprob_B, wrote_B)

    layouts = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, state.cache)
    (state, running_B), found_KB = jax.lax.scan(one, (state, ready_B), length=K)
    # In the layout it came in: another would be another program the next time.
    cache = jax.tree.map(jax.reshard, state.cache, layouts)
    return state._replace(cache=cache), (*found_KB, running_B)
