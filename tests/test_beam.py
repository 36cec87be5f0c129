"""Beam search, on models of which everything is known; on real ones: test_golden_generation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import one_device

from bloomjax.decode.beam import Beams, Hypothesis, search
from bloomjax.decode.sampling import GREEDY, Sampling
from bloomjax.errors import ConfigError


class Table:
    """`beam.Steps` whose logits depend on the last token alone: a chain of which every sequence's
    probability can be told."""

    def __init__(self, logits_VV: np.ndarray):
        self._logits_VV = logits_VV

    def prefill(self, prompts: Sequence[Sequence[int]], rows_each: int) -> jax.Array:
        return self._of(np.repeat([prompt[-1] for prompt in prompts], rows_each))

    def advance(self, parents_R: np.ndarray, tokens_R: np.ndarray) -> jax.Array:
        return self._of(tokens_R)

    def _of(self, last_R: np.ndarray) -> jax.Array:
        return jnp.asarray(self._logits_VV[last_R])


def chain(seed: int, V: int) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal((V, V)).astype(np.float32)


def best_of_all(logits_VV: np.ndarray, last: int, count: int, stop: int) -> list[Hypothesis]:
    """Every sequence of up to `count` tokens, the likeliest first."""
    logprobs_VV = np.asarray(jax.nn.log_softmax(logits_VV), np.float64)
    going, done = [Hypothesis([], 0.0)], []
    for length in range(1, count + 1):
        longer = []
        for ids, score in going:
            for v, logprob in enumerate(logprobs_VV[ids[-1] if ids else last]):
                if v == stop:
                    done.append(Hypothesis(ids, score + logprob))
                else:
                    longer.append(Hypothesis([*ids, v], score + logprob))
        going = longer
        if length == count:
            done += going
    return sorted(done, key=lambda h: -h.score)


@pytest.mark.parametrize("seed", range(3))
def test_with_as_many_beams_as_sequences_the_likeliest_is_found(seed: int) -> None:
    """And the others in order: a search that drops nothing, without a length penalty."""
    V, stop = 6, 2
    logits_VV = chain(seed, V)
    with jax.set_mesh(one_device()):
        found = search(Table(logits_VV), [[0], [3, 1]], 3, Beams(125, 0.0, 4), stop_ids=(stop,))
    for last, answers in zip((0, 1), found, strict=True):
        expected = best_of_all(logits_VV, last, 3, stop)[:4]
        assert [answer.ids for answer in answers] == [answer.ids for answer in expected]
        np.testing.assert_allclose([a.score for a in answers], [e.score for e in expected], 1e-5)


def test_one_beam_is_greedy_and_a_prompt_does_not_see_its_neighbours() -> None:
    logits_VV = chain(7, 40)
    prompts = [[1], [5, 6, 7], [30, 2]]
    with jax.set_mesh(one_device()):
        greedy = search(Table(logits_VV), prompts, 6, Beams(1))
        for prompt, (answer,) in zip(prompts, greedy, strict=True):
            expected, last = [], prompt[-1]
            for _ in range(6):
                last = int(logits_VV[last].argmax())
                expected.append(last)
            assert answer.ids == expected
        beams, sampling = Beams(3, returned=3), Sampling(no_repeat_ngram_size=2)
        together = search(Table(logits_VV), prompts, 6, beams, sampling, (4,))
        for prompt, answers in zip(prompts, together, strict=True):
            assert search(Table(logits_VV), [prompt], 6, beams, sampling, (4,)) == [answers]


def test_a_search_ends_when_nothing_better_can_come() -> None:
    """An end that is certain after every token: one step beyond the first is enough."""
    logits_VV = np.full((8, 8), -20, np.float32)
    logits_VV[:, :2] = 0
    logits_VV[1:, 1] = 10
    calls = 0

    class Counting(Table):
        def advance(self, parents_R: np.ndarray, tokens_R: np.ndarray) -> jax.Array:
            nonlocal calls
            calls += 1
            return super().advance(parents_R, tokens_R)

    with jax.set_mesh(one_device()):
        found = search(Counting(logits_VV), [[0]], 100, Beams(2, 0.0), stop_ids=(1,))
    assert found[0][0].ids == [] and calls < 5


@pytest.mark.parametrize(
    ("beams", "sampling", "count", "message"),
    [
        (Beams(0), GREEDY, 5, "num_beams is 0: expected 1"),
        (Beams(2, returned=3), GREEDY, 5, r"num_return_sequences is 3: expected 1 to num_beams"),
        (Beams(2, returned=0), GREEDY, 5, "num_return_sequences is 0"),
        (Beams(2, float("nan")), GREEDY, 5, "length_penalty is nan"),
        (Beams(2), GREEDY, 0, "max_new_tokens is 0"),
        (Beams(2), Sampling(0.7), 5, "temperature is 0.7 with num_beams 2: a beam search draws"),
        (Beams(2), Sampling(min_new_tokens=6), 5, "min_new_tokens is 6"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    beams: Beams, sampling: Sampling, count: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        search(Table(chain(0, 8)), [[1]], count, beams, sampling)
    assert "\n" not in str(error.value)
