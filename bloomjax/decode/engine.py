"""The engine: slots in which requests run, come and go, on two compiled programs.

Letters: B slots, S places of a slot, C prompt tokens of a chunk, K tokens a dispatch, V vocabulary.
A slot holds its tokens, prompt and answer, and the cache of all but the last. One program takes C
tokens of one slot's prompt into the cache, the other writes K tokens into every slot that runs;
prompts are taken in whole but for their last token, from which the first of the answer is made, so
the head stands in one place. Shapes do not depend on requests: nothing is compiled once the few
sizes of chunks, and the few kinds of sampling, have been seen.

The invariant: what a request gives depends on it alone, not on its slot, its neighbours, or when it
was admitted. Every process of a mesh makes the same calls.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from bloomjax import model
from bloomjax.config import ModelConfig
from bloomjax.decode.cache import Cache, CachedAttention, empty_cache
from bloomjax.decode.sampling import GREEDY, Features, Sampling, Settings, choose, settings_of
from bloomjax.errors import InputError
from bloomjax.model import Params
from bloomjax.sharding import act, on_cpu, put

# Prompt tokens of a chunk at most.
CHUNK = 512
_SMALLEST_CHUNK = 16
# jax.Array of float32 logits, tokens and lengths -> logits; see `Engine`
LogitsFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Request:
    prompt: Sequence[int]
    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    seed: int = 0
    stop_ids: tuple[int, ...] = ()  # the request ends before any of these


class Fresh(NamedTuple):
    """What a dispatch wrote for one request."""

    number: int
    ids: list[int]
    logprobs: list[float]  # of each id under the model, before any filter, in nats
    done: bool


class State(NamedTuple):
    """On the device, donated from call to call."""

    cache: Cache
    tokens_BS: jax.Array  # int32; of slot b, the first lengths_B[b] count
    lengths_B: jax.Array  # int32
    limits_B: jax.Array  # int32, the length that ends it
    settings: Settings


@dataclasses.dataclass
class _Slot:
    """What the host knows of a request that has a slot."""

    number: int
    request: Request
    taken: int = 0  # tokens of the prompt that are in the cache


class Engine:
    """Runs requests on `slots` slots of `length` places; `params` as `decode.params` has them.

    `prompt_tokens` are taken in between two dispatches, at most: what runs waits for them. Where
    nobody watches, let there be no limit: slots that wait for their prompts write nothing.

    `logits_fn(logits_BV, tokens_BS, lengths_B)` gives the logits to choose from, after the model
    and before everything of `Sampling`; it is compiled into the step (wrap what is not JAX in
    jax.pure_callback). Raises DoesNotFitError where a mesh does not divide the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        mesh: Mesh,
        *,
        slots: int = 8,
        length: int = 2048,
        cache_dtype: str = "auto",
        prompt_tokens: int = CHUNK,
        logits_fn: LogitsFn | None = None,
    ):
        self._config, self._params, self._mesh, self._logits_fn = config, params, mesh, logits_fn
        self.length = round_up(length)
        self._prompt_tokens = prompt_tokens
        with jax.set_mesh(mesh):
            self._per_dispatch = tokens_per_dispatch(config)
            self._state = jax.jit(empty_state, static_argnums=(0, 1, 2, 3))(
                config, slots, self.length, cache_dtype
            )
        self._features = Features()
        self._slots: list[_Slot | None] = [None] * slots
        self._waiting: deque[tuple[int, Request]] = deque()
        self._numbers = self._slot_steps = self._written = 0

    def submit(self, request: Request) -> int:
        """Queues a request and gives its number. InputError for a prompt that is empty, has an id
        outside of the vocabulary, or leaves no room in a slot."""
        check(request, self._config, self.length)
        self._waiting.append((self._numbers, request))
        self._numbers += 1
        return self._numbers - 1

    def cancel(self, number: int) -> None:
        """Ends a request where it is; it gives nothing more."""
        self._waiting = deque(entry for entry in self._waiting if entry[0] != number)
        for b, slot in enumerate(self._slots):
            if slot and slot.number == number:
                self._slots[b] = None

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting) or any(self._slots)

    @property
    def occupancy(self) -> float:
        """Of the tokens that all slots could have written so far, the share that was written."""
        return self._written / max(1, self._slot_steps)

    @property
    def cache_bytes(self) -> int:
        """Of keys and values, of all slots and devices."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._state.cache))

    @property
    def written(self) -> int:
        """Tokens so far."""
        return self._written

    def step(self) -> list[Fresh]:
        """One round: requests are admitted, prompts taken in, K tokens of each slot written."""
        with jax.set_mesh(self._mesh):
            self._admit()
            self._take_prompts()
            ready_B = np.array([slot is not None and self._ready(slot) for slot in self._slots])
            if not ready_B.any():
                return []
            self._state, found = _decode(
                self._config,
                self._per_dispatch,
                self._features,
                self._logits_fn,
                self._params,
                self._state,
                put(ready_B, P(None), self._mesh),
            )
        ids_KB, logprobs_KB, wrote_KB, running_B = jax.device_get(found)
        self._slot_steps += wrote_KB.size
        self._written += int(wrote_KB.sum())
        fresh = []
        for b, slot in enumerate(self._slots):
            if slot is None or not ready_B[b]:
                continue
            wrote = wrote_KB[:, b]
            done = not running_B[b]
            fresh.append(
                Fresh(slot.number, ids_KB[wrote, b].tolist(), logprobs_KB[wrote, b].tolist(), done)
            )
            if done:
                self._slots[b] = None
        return fresh

    @staticmethod
    def _ready(slot: _Slot) -> bool:
        return slot.taken == len(slot.request.prompt) - 1

    def _admit(self) -> None:
        for b, slot in enumerate(self._slots):
            if slot is None and self._waiting:
                number, request = self._waiting.popleft()
                self._slots[b] = _Slot(number, request)
                self._features |= request.sampling.features
                prompt, tokens_S = request.prompt, np.zeros(self.length, np.int32)
                tokens_S[: len(prompt)] = prompt
                limit = len(prompt) + request.max_new_tokens
                settings = _settings(request.sampling, request.seed, request.stop_ids, len(prompt))
                row = tokens_S, np.int32(len(prompt)), np.int32(limit), settings
                cache, *rows = self._state
                self._state = State(cache, *_place(tuple(rows), np.int32(b), row))

    def _take_prompts(self) -> None:
        """Chunks of the prompts that are not in the cache yet, the first admitted first."""
        left = self._prompt_tokens
        pending = [(slot.number, b, slot) for b, slot in enumerate(self._slots) if slot]
        for _, b, slot in sorted(pending, key=lambda entry: entry[0]):
            prompt = slot.request.prompt
            while left > 0 and not self._ready(slot):
                tokens = prompt[slot.taken : min(slot.taken + CHUNK, len(prompt) - 1)]
                tokens_1C = np.zeros((1, round_up(len(tokens))), np.int32)
                tokens_1C[0, : len(tokens)] = tokens
                inputs = put(tokens_1C, act("1S"), self._mesh), np.int32(b), np.int32(slot.taken)
                cache = _take(self._config, self._params, self._state.cache, *inputs)
                self._state = self._state._replace(cache=cache)
                slot.taken += len(tokens)
                left -= tokens_1C.size


def round_up(tokens: int) -> int:
    """Places, or tokens of a chunk, that hold so many: a power of two, or whole chunks."""
    if tokens > CHUNK:
        return -(-tokens // CHUNK) * CHUNK
    return max(_SMALLEST_CHUNK, 1 << (tokens - 1).bit_length())


def check(request: Request, config: ModelConfig, length: int) -> None:
    """InputError, in one line, for a request that no slot of `length` can take."""
    prompt, V = request.prompt, config.vocab_size
    if not prompt:
        raise InputError("the prompt is empty: expected at least one token")
    if wrong := [token for token in prompt if not 0 <= token < V]:
        raise InputError(f"the prompt has id {wrong[0]}: expected 0 to {V - 1}")
    if len(prompt) + request.max_new_tokens > length:
        raise InputError(
            f"the prompt has {len(prompt)} tokens, and {request.max_new_tokens} are to come: "
            f"expected at most {length} together"
        )


def tokens_per_dispatch(config: ModelConfig) -> int:
    """K: enough that the host is not waited for, few enough that text flows and slots refill."""
    if not on_cpu():
        return 16
    return 2 if config.parameter_count > 1e8 else 8


def empty_state(config: ModelConfig, slots: int, length: int, cache_dtype: str) -> State:
    """Of an engine in which nothing runs, on the current mesh."""

    def row(value: Any) -> jax.Array:
        shape = (slots, *np.shape(value))
        return jnp.zeros(shape, value.dtype, out_sharding=P(*(None for _ in shape)))

    zero = np.int32(0)
    rows = np.zeros(length, np.int32), zero, zero, _settings(GREEDY, 0, (), 0)
    return State(empty_cache(config, slots, length, cache_dtype), *jax.tree.map(row, rows))


@functools.partial(jax.jit, donate_argnums=0)
def _place(rows: Any, slot: jax.Array, row: Any) -> Any:
    """All but the cache of a state, with what a slot holds replaced."""
    return jax.tree.map(
        lambda all_B, one: jax.lax.dynamic_update_index_in_dim(all_B, one, slot, 0), rows, row
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _take(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    tokens_1C: jax.Array,
    slot: jax.Array,
    start: jax.Array,
) -> Cache:
    """The cache with C tokens of a slot's prompt, from place `start` on."""
    attention = CachedAttention(config, cache, slot=slot, start=start)
    model.bind(config, params, unrolled=True).decode(tokens_1C, attention.layer)
    return attention.cache


def advance(
    bloom: model.Bloom, cache: Cache, tokens_B: jax.Array, positions_B: jax.Array
) -> tuple[jax.Array, Cache]:
    """float32 logits [B, V] after one token of every slot, and the cache with it."""
    attention = CachedAttention(bloom.config, cache, positions_B)
    x_B1D = bloom.decode(tokens_B[:, None], attention.layer)
    logits_BV = jax.reshard(bloom.logits(x_B1D)[:, 0], P(None, None))  # in one piece
    return logits_BV, attention.cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=5)
def _decode(
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
        next_B, logprob_B = choose(logits_BV, tokens_BS, lengths_B, settings, features)
        next_B, logprob_B = (jax.reshard(x, P(None)) for x in (next_B, logprob_B))
        wrote_B = running_B & ~(next_B[:, None] == settings.stop_ids_BE).any(-1)
        written_B = jnp.where(wrote_B, next_B, 0)
        tokens_BS = jax.vmap(
            lambda tokens_S, i, token: jax.lax.dynamic_update_index_in_dim(tokens_S, token, i, 0)
        )(tokens_BS, lengths_B, written_B)
        lengths_B += wrote_B
        running_B = wrote_B & (lengths_B < state.limits_B)
        state = State(cache, tokens_BS, lengths_B, state.limits_B, settings)
        return (state, running_B), (next_B, logprob_B, wrote_B)

    (state, running_B), found_KB = jax.lax.scan(one, (state, ready_B), length=K)
    return state, (*found_KB, running_B)


def _settings(sampling: Any, seed: int, stop_ids: Any, prompt_length: int) -> Settings:
    """Of one slot; room for four ids that end it."""
    rows = settings_of([sampling], [seed], [prompt_length], [stop_ids], 4)
    return jax.tree.map(lambda row: row[0], rows)
