"""The engine's answers are those of transformers' `generate` (tests/oracles/generation.py)."""

import jax
import pytest
from golden_cases import MODELS, cases_of, model_of
from helpers import one_device

from bloomjax.decode.engine import Engine, Request
from bloomjax.model import abstract_params


@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_are_those_of_transformers(name: str) -> None:
    """All cases of a model at once, each with its own settings, in fewer slots than requests."""
    config, params = model_of(name)
    mesh = one_device()
    shapes = abstract_params(config, mesh)
    params = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), params, shapes)
    engine = Engine(config, params, mesh, slots=6, length=32)
    expected, found = {}, {}
    for case in cases_of(name, beams=False):
        for prompt, (ids,) in zip(case.prompts, case.ids, strict=True):
            request = Request(
                prompt, case.max_new_tokens, case.sampling, stop_ids=tuple(case.stop_ids)
            )
            expected[engine.submit(request)] = (case.sampling, prompt, ids)
    while engine.busy:
        for fresh in engine.step():
            found.setdefault(fresh.number, []).extend(fresh.ids)
    for number, (sampling, prompt, ids) in expected.items():
        assert found.get(number, []) == ids, f"{sampling} after {prompt}"
