"""The engine: slots in which requests run, come and go, on two compiled programs.

Letters: B slots, S places of a slot, K tokens a dispatch, V vocabulary. Shapes do not depend on
requests: nothing is compiled once the few sizes of chunks, and the few kinds of sampling, have been
seen (`programs`).

The invariant: what a request gives depends on it alone, not on its slot, its neighbours, or when it
was admitted. Every process of a mesh makes the same calls.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from bloomjax.config import ModelConfig
from bloomjax.decode import sampling
from bloomjax.decode.programs import (
    STOP_IDS,
    LogitsFn,
    State,
    decode,
    empty_state,
    place,
    round_up,
    row_of,
    take_prompt,
    tokens_per_dispatch,
)
from bloomjax.decode.sampling import GREEDY, Features, Sampling, settings_of
from bloomjax.errors import ConfigError, InputError
from bloomjax.model import Params
from bloomjax.sharding import put

# Of prompts, between two dispatches: those who write wait for them.
PROMPT_TOKENS = 512


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


@dataclasses.dataclass
class _Slot:
    """What the host knows of a request that has a slot."""

    number: int
    request: Request
    taken: int = 0  # tokens of the prompt that are in the cache


class Engine:
    """Runs requests on `slots` slots of `length` places; `params` as `decode.params` has them.

    `prompt_tokens` are taken in between two dispatches, or a chunk more. Where nobody reads along,
    let there be no limit: slots that wait for their prompts write nothing.

    `logits_fn(logits_BV, tokens_BS, lengths_B)` gives the logits to choose from, after the model
    and before everything of `Sampling`; it is compiled into the step (wrap what is not JAX in
    jax.pure_callback), once for each function object: pass the same one again.
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
        prompt_tokens: int = PROMPT_TOKENS,
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
        """Queues a request and gives its number. Refuses what `check` does."""
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
    def written(self) -> int:
        """Tokens so far."""
        return self._written

    @property
    def cache_bytes(self) -> int:
        """Of keys and values, of all slots and devices."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._state.cache))

    def step(self) -> list[Fresh]:
        """One round: requests are admitted, prompts taken in, K tokens of each slot written."""
        with jax.set_mesh(self._mesh):
            self._admit()
            self._take_prompts()
            ready_B = np.array([slot is not None and self._ready(slot) for slot in self._slots])
            if not ready_B.any():
                return []
            self._state, found = decode(
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

    def run(self) -> Iterator[Fresh]:
        """Steps, until nothing waits or runs."""
        while self.busy:
            yield from self.step()

    @staticmethod
    def _ready(slot: _Slot) -> bool:
        return slot.taken == len(slot.request.prompt) - 1

    def _admit(self) -> None:
        for b, slot in enumerate(self._slots):
            if slot is None and self._waiting:
                number, request = self._waiting.popleft()
                self._features |= request.sampling.features
                prompt, stops = request.prompt, request.stop_ids
                settings = settings_of(
                    [request.sampling], [request.seed], [len(prompt)], [stops], STOP_IDS
                )
                row = row_of(prompt, len(prompt) + request.max_new_tokens, settings, self.length)
                self._slots[b] = _Slot(number, request)
                cache, *rows = self._state
                self._state = State(cache, *place(tuple(rows), np.int32(b), row))

    def _take_prompts(self) -> None:
        """Chunks of the prompts that are not in the cache yet, the first admitted first."""
        left = self._prompt_tokens
        pending = [(slot.number, b, slot) for b, slot in enumerate(self._slots) if slot]
        for _, b, slot in sorted(pending, key=lambda entry: entry[0]):
            prompt = slot.request.prompt
            while left > 0 and not self._ready(slot):
                arguments = self._config, self._params, self._state.cache, prompt, b, slot.taken
                cache, tokens = take_prompt(*arguments)
                self._state = self._state._replace(cache=cache)
                slot.taken += tokens
                left -= tokens


def check(request: Request, config: ModelConfig, length: int) -> None:
    """InputError, in one line, for a prompt that is empty, has something else than ids of the
    vocabulary, or leaves no room in a slot of `length`; ConfigError for its settings."""
    prompt, V = request.prompt, config.vocab_size
    if request.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {request.max_new_tokens}: expected 1 or more")
    sampling.check(request.sampling, request.max_new_tokens)
    if len(request.stop_ids) > STOP_IDS:
        raise InputError(f"{len(request.stop_ids)} stop ids: expected at most {STOP_IDS}")
    if isinstance(prompt, str):
        raise InputError("the prompt is a text: expected token ids, as tokenizer.encode gives them")
    if len(prompt) == 0:
        raise InputError("the prompt is empty: expected at least one token")
    for name, ids in (("the prompt has id", prompt), ("a stop id is", request.stop_ids)):
        known = (isinstance(id, int | np.integer) and 0 <= id < V for id in ids)
        if wrong := [id for id, is_known in zip(ids, known, strict=True) if not is_known]:
            raise InputError(f"{name} {wrong[0]}: expected 0 to {V - 1}")
    if len(prompt) + request.max_new_tokens > length:
        raise InputError(
            f"the prompt has {len(prompt)} tokens, and {request.max_new_tokens} are to come: "
            f"expected at most {length} together"
        )
