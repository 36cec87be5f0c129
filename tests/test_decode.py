"""Decoding: the cache changes no token, neighbours change no token, filters are transformers'."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import model_config, one_device

from bloomjax import model
from bloomjax.config import MeshConfig
from bloomjax.decode.engine import GREEDY, Engine
from bloomjax.decode.sampling import Sampling, choose, filtered
from bloomjax.errors import InputError
from bloomjax.sharding import make_mesh

CONFIG = model_config(heads=6, width=48, init_std=0.2)
PROMPTS = [[5, 6, 7], [10, 20, 30, 40, 5, 6, 9], [1], list(range(2, 35))]


def engine(mesh: jax.sharding.Mesh) -> Engine:
    with jax.set_mesh(mesh):
        params = jax.jit(model.init_params, static_argnums=0)(CONFIG, jax.random.key(3))
    return Engine(CONFIG, params, mesh)


def tokens(engine: Engine, prompts: Any, count: int, *args: Any, **options: Any) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    for fresh in engine.generate(prompts, count, *args, **options):
        for row, new in zip(rows, fresh, strict=True):
            row += new.ids
    return rows


@pytest.fixture(scope="module")
def alone() -> Engine:
    return engine(one_device())


def test_greedy_tokens_and_their_logprobs_are_those_of_the_model_without_a_cache(
    alone: Engine,
) -> None:
    with jax.set_mesh(one_device()):
        params = jax.jit(model.init_params, static_argnums=0)(CONFIG, jax.random.key(3))
        bloom = model.bind(CONFIG, params)
        for prompt in PROMPTS:
            logprobs = []
            ids = []
            for (new,) in alone.generate([prompt], 12, GREEDY):
                ids += new.ids
                logprobs += new.logprobs
            assert len(ids) == 12
            whole = jnp.asarray([prompt + ids])
            logits = np.asarray(bloom.logits(bloom(whole)))[0, len(prompt) - 1 : -1]
            assert ids == logits.argmax(-1).tolist()
            expected = np.asarray(jax.nn.log_softmax(logits))[range(12), ids]
            np.testing.assert_allclose(logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0), Sampling(0.7, 20, 0.9)])
def test_a_row_does_not_see_its_neighbours(alone: Engine, sampling: Sampling) -> None:
    together = tokens(alone, PROMPTS, 10, sampling, seed=7)
    for i, prompt in enumerate(PROMPTS):
        assert tokens(alone, [prompt], 10, sampling, seed=7 + i) == [together[i]]


def test_a_mesh_writes_the_same_text(alone: Engine) -> None:
    split = engine(make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4]))
    for sampling in (GREEDY, Sampling(0.9, 0, 0.95)):
        assert tokens(split, PROMPTS, 9, sampling) == tokens(alone, PROMPTS, 9, sampling)


def test_generation_ends_at_the_end_of_text(alone: Engine) -> None:
    (free,) = tokens(alone, [PROMPTS[1]], 12, Sampling(1.0), seed=1)
    eos = free[5]
    (ended,) = tokens(alone, [PROMPTS[1]], 12, Sampling(1.0), seed=1, eos_id=eos)
    assert ended == free[: free.index(eos)]


def test_filters_keep_what_transformers_keeps() -> None:
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.125, 0.0625, 0.0625]]))

    def kept(sampling: Sampling) -> list[int]:
        return np.flatnonzero(np.isfinite(filtered(logits, sampling)[0])).tolist()

    assert kept(Sampling(1.0, top_k=2)) == [0, 1]
    assert kept(Sampling(1.0, top_k=4)) == [0, 1, 2, 3, 4]  # the tie of the fourth stays
    assert kept(Sampling(1.0, top_p=0.5)) == [0]
    assert kept(Sampling(1.0, top_p=0.51)) == [0, 1]
    assert kept(Sampling(1.0, top_p=0.76)) == [0, 1, 2]
    assert kept(Sampling(1.0, top_k=3, top_p=0.9)) == [0, 1, 2]
    assert kept(Sampling(2.0)) == [0, 1, 2, 3, 4]


def test_draws_follow_the_distribution(alone: Engine) -> None:
    logits = jnp.tile(jnp.log(jnp.asarray([[0.6, 0.3, 0.1]])), (4000, 1))

    positions = jnp.zeros(4000, jnp.int32)
    drawn = np.asarray(choose(logits, Sampling(1.0), jnp.arange(4000, dtype=jnp.uint32), positions))
    shares = np.bincount(drawn, minlength=3) / 4000
    np.testing.assert_allclose(shares, [0.6, 0.3, 0.1], atol=0.03)


@pytest.mark.parametrize("prompt", [[], [-1], [64]])
def test_bad_prompts_are_refused(alone: Engine, prompt: list[int]) -> None:
    with pytest.raises(InputError, match="expected"):
        tokens(alone, [[1], prompt], 3)
