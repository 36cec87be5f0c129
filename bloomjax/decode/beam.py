"""Beam search: the likeliest sequences of a few that are followed at a time.

Letters: P prompts, R rows (the beams of each prompt, one after the other), V vocabulary, S places
of a row's history, C candidates of a prompt. Semantics are those of transformers' `_beam_search`
(generation/utils.py, 5.23) with `early_stopping=False`.

The one invariant: the device scores and ranks, in one dispatch a token, and the host decides: of
the logits it sees a prompt's C candidates, and tells the device which rows go on with which tokens.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bloomjax.decode.sampling import (
    GREEDY,
    Features,
    Sampling,
    Settings,
    check,
    processed,
    settings_of,
)
from bloomjax.errors import ConfigError
from bloomjax.sharding import act


class Steps(Protocol):
    """A model that keeps what its rows have read."""

    def prefill(self, prompts: Sequence[Sequence[int]], rows_each: int) -> jax.Array:
        """Each prompt in `rows_each` rows, one after the other -> float32 logits [R, V]."""

    def advance(self, parents_R: np.ndarray, tokens_R: np.ndarray) -> jax.Array:
        """Row r goes on from what row parents_R[r] has read, with tokens_R[r] -> logits [R, V]."""


class Beams(NamedTuple):
    """How to search."""

    number: int = 4
    length_penalty: float = 1.0  # above 0 favours long answers
    returned: int = 1  # of each prompt


class Hypothesis(NamedTuple):
    ids: list[int]  # without the prompt and without the id that ended it
    score: float  # its log-probability over its length (the end counts) ** length_penalty


def check_beams(beams: Beams, sampling: Sampling, max_new_tokens: int) -> None:
    """ConfigError, in one line, for what cannot be searched."""
    if beams.number < 1:
        raise ConfigError(f"num_beams is {beams.number}: expected 1 or more")
    if not 1 <= beams.returned <= beams.number:
        raise ConfigError(
            f"num_return_sequences is {beams.returned}: expected 1 to num_beams ({beams.number})"
        )
    if not -10 <= beams.length_penalty <= 10:
        raise ConfigError(f"length_penalty is {beams.length_penalty}: expected -10 to 10")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}: expected 1 or more")
    if sampling.features.draws:
        raise ConfigError(
            f"temperature is {sampling.temperature} with num_beams {beams.number}: a beam search "
            "draws nothing; expected temperature 0, or num_beams 1"
        )
    check(sampling, max_new_tokens)


def search(
    steps: Steps,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    beams: Beams,
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] = (),
) -> list[list[Hypothesis]]:
    """`beams.returned` answers to each prompt, the best first. To be called where a mesh is set.

    What `sampling` says of penalty, n-grams and minimum length changes the log-probabilities that
    are added up. ConfigError for what cannot be searched.
    """
    check_beams(beams, sampling, max_new_tokens)
    K, P = beams.number, len(prompts)
    prompt_lengths = [len(prompt) for prompt in prompts for _ in range(K)]
    features = sampling.features
    settings = settings_of([sampling] * P * K, [0] * P * K, prompt_lengths, [stop_ids] * P * K)
    S = 1 << (max(prompt_lengths) + max_new_tokens - 1).bit_length()
    tokens_RS, lengths_R = np.zeros((P * K, S), np.int32), np.array(prompt_lengths, np.int32)
    for p, prompt in enumerate(prompts):
        tokens_RS[p * K : (p + 1) * K, : len(prompt)] = prompt
    # All beams of a prompt begin alike: only the first of them counts.
    scores_R = np.tile(np.where(np.arange(K) == 0, 0, -np.inf), P).astype(np.float32)
    found: list[list[Hypothesis]] = [[] for _ in prompts]
    open_ = [True] * P
    logits_RV = steps.prefill(prompts, K)
    for length in range(1, max_new_tokens + 1):
        history = tokens_RS if features.history else None
        candidates = _candidates(logits_RV, scores_R, history, lengths_R, settings, features, K)
        scores_PC, parents_PC, ids_PC = map(np.asarray, candidates)
        ends_PC = np.isin(ids_PC, stop_ids) | (length == max_new_tokens)
        divisor = np.float32(length**beams.length_penalty)
        parents_R, next_R = np.arange(P * K, dtype=np.int32), np.zeros(P * K, np.int32)
        for p in [p for p in range(P) if open_[p]]:
            # Ends are taken from the first K candidates; the others are there to go on with.
            for c in np.flatnonzero(ends_PC[p, :K]):
                row, last = parents_PC[p, c], int(ids_PC[p, c])
                ids = tokens_RS[row, len(prompts[p]) : lengths_R[row]].tolist()
                ids += [] if last in stop_ids else [last]
                found[p].append(Hypothesis(ids, float(scores_PC[p, c] / divisor)))
            found[p] = sorted(found[p], key=lambda answer: -answer.score)[:K]
            if length < max_new_tokens:
                here, going = slice(p * K, (p + 1) * K), np.flatnonzero(~ends_PC[p])[:K]
                parents_R[here], next_R[here] = parents_PC[p, going], ids_PC[p, going]
                scores_R[here] = scores_PC[p, going]
                best = float(scores_R[p * K] / divisor)
                open_[p] = len(found[p]) < K or best > found[p][-1].score
        if length == max_new_tokens or not any(open_):
            break
        tokens_RS = tokens_RS[parents_R]
        tokens_RS[np.arange(P * K), lengths_R] = next_R
        lengths_R = lengths_R + 1
        logits_RV = steps.advance(parents_R, next_R)
    return [hypotheses[: beams.returned] for hypotheses in found]


@functools.partial(jax.jit, static_argnames=("features", "K"))
def _candidates(
    logits_RV: jax.Array,
    scores_R: jax.Array,
    tokens_RS: jax.Array | None,
    lengths_R: jax.Array,
    settings: Settings,
    features: Features,
    K: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best continuations of each prompt's K rows, the best first: their scores, the rows that
    they continue, the ids; [P, C]. So many that K of them do not end, whatever ends."""
    E = settings.stop_ids_BE.shape[1]
    C = K * max(2, 1 + E)
    R, V = logits_RV.shape
    logprobs_RV = jax.nn.log_softmax(jax.reshard(logits_RV, act("B3")))
    scores_RV = processed(logprobs_RV, tokens_RS, lengths_R, settings, features) + scores_R[:, None]
    # the best of all rows are among the best of each
    best_RC, ids_RC = (jax.reshard(x, act("33")) for x in jax.lax.top_k(scores_RV, min(C, V)))
    scores_PC, where_PC = jax.lax.top_k(best_RC.reshape(R // K, -1), C)
    ids_PC = jnp.take_along_axis(ids_RC.reshape(R // K, -1), where_PC, 1)
    rows_PC = where_PC // ids_RC.shape[1] + K * jnp.arange(R // K)[:, None]
    return scores_PC, rows_PC.astype(jnp.int32), ids_PC
