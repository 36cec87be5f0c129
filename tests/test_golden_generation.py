"""Answers are those of transformers' `generate` (tests/oracles/generation.py), id for id."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from golden_cases import MODELS, cases_of, model_of
from helpers import packed_params

from bloomjax.decode.beam import search
from bloomjax.decode.engine import Engine, Request
from bloomjax.decode.steps import CachedSteps
from bloomjax.sharding import decode_mesh

LENGTH = 32  # of prompt and answer together
pytestmark = pytest.mark.slow


@functools.cache
def placed(name: str) -> tuple[Any, ...]:
    """A model's configuration, its parameters as decoding has them, and their mesh."""
    config, params = model_of(name)
    mesh = decode_mesh(config, jax.devices()[:1])
    return config, packed_params(config, params, mesh), mesh


@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_are_those_of_transformers(name: str) -> None:
    """All cases of a model at once, each with its own settings, in fewer slots than requests. The
    last of them needs most of the program: begun with it, no second one is compiled."""
    engine = Engine(*placed(name), slots=6, length=LENGTH)
    expected: dict[int, Any] = {}
    found: dict[int, list[int]] = {}
    for case in reversed(cases_of(name, beams=False)):
        for prompt, (ids,) in zip(case.prompts, case.ids, strict=True):
            request = Request(prompt, case.max_new_tokens, case.sampling, stop_ids=case.stop_ids)
            expected[number := engine.submit(request)] = request, ids
            found[number] = []
    while engine.busy:
        for fresh in engine.step():
            found[fresh.number] += fresh.ids
    for number, (request, ids) in expected.items():
        assert found[number] == ids, request


@pytest.mark.parametrize("name", MODELS)
def test_answers_of_beams_and_their_scores_are_those_of_transformers(name: str) -> None:
    steps = CachedSteps(*placed(name), length=LENGTH)
    with jax.set_mesh(placed(name)[-1]):
        for case in cases_of(name, beams=True):
            assert case.beams is not None
            asked = case.max_new_tokens, case.beams, case.sampling, case.stop_ids
            found = search(steps, case.prompts, *asked)
            assert [[answer.ids for answer in answers] for answers in found] == case.ids, asked
            for answers, scores in zip(found, case.scores, strict=True):
                np.testing.assert_allclose([a.score for a in answers], scores, rtol=1e-4)
