"""Decoding: the cache changes nothing, and no request sees its neighbours, its slot or the mesh."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import model_config, one_device, packed_params
from hypothesis import given, settings
from hypothesis import strategies as st

from bloomjax import model
from bloomjax.decode import programs
from bloomjax.decode.engine import Engine, Request
from bloomjax.decode.sampling import GREEDY, Sampling
from bloomjax.decode.steps import CachedSteps
from bloomjax.errors import ConfigError, InputError
from bloomjax.sharding import decode_mesh

CONFIG = model_config(heads=6, width=48, init_std=0.2)
LENGTH = 128
PROMPTS = [[5, 6, 7], [10, 20, 30, 40, 5, 6, 9], [1], list(range(2, 35))]
SAMPLINGS = [GREEDY, Sampling(1.0), Sampling(0.7, 20, 0.9), Sampling(repetition_penalty=1.5)]
# Devices: one; heads over two and slots over two; the same over eight.
MESHES = [1, 4, 8]


@functools.cache
def trained() -> Any:
    with jax.set_mesh(one_device()):
        made = jax.jit(model.init_params, static_argnums=0)(CONFIG, jax.random.key(3))
    return jax.tree.map(np.asarray, made)


@functools.cache
def placed(devices: int) -> Any:
    mesh = decode_mesh(CONFIG, jax.devices()[:devices])
    return packed_params(CONFIG, trained(), mesh), mesh


def engine(devices: int = 1, slots: int = 4, length: int = LENGTH, **options: Any) -> Engine:
    return Engine(CONFIG, *placed(devices), slots=slots, length=length, **options)


@functools.cache
def shared(devices: int = 1, slots: int = 4) -> Engine:
    """An engine that several tests use, one after the other: what ran before leaves no trace."""
    return engine(devices, slots)


Answer = tuple[list[int], list[float]]


def run(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    """Ids and log-probabilities of each."""
    numbers = [engine.submit(request) for request in requests]
    answers: dict[int, Answer] = {number: ([], []) for number in numbers}
    while engine.busy:
        for fresh in engine.step():
            answers[fresh.number][0].extend(fresh.ids)
            answers[fresh.number][1].extend(fresh.logprobs)
    return [answers[number] for number in numbers]


@jax.jit
def logits_of_training(params: Any, tokens_BT: jax.Array) -> jax.Array:
    bloom = model.bind(CONFIG, params)
    return bloom.logits(bloom(tokens_BT))


def uncached(tokens: Sequence[int]) -> np.ndarray:
    """Logits [T, V] of the model as it is trained; one shape, for what is padding is not seen."""
    padded = np.zeros((1, LENGTH if len(tokens) <= LENGTH else 2560), np.int32)
    padded[0, : len(tokens)] = tokens
    with jax.set_mesh(one_device()):
        return np.asarray(logits_of_training(trained(), padded))[0, : len(tokens)]


@pytest.mark.slow
@pytest.mark.parametrize("devices", MESHES)
def test_greedy_tokens_and_their_logprobs_are_those_of_the_model_without_a_cache(
    devices: int,
) -> None:
    answers = run(shared(devices), [Request(prompt, 12) for prompt in PROMPTS])
    for prompt, (ids, logprobs) in zip(PROMPTS, answers, strict=True):
        logits = uncached([*prompt, *ids])[len(prompt) - 1 : -1]
        assert ids == logits.argmax(-1).tolist() and len(ids) == 12
        expected = np.asarray(jax.nn.log_softmax(logits))[range(12), ids]
        np.testing.assert_allclose(logprobs, expected, atol=1e-4)


tokens = st.lists(st.integers(0, CONFIG.vocab_size - 1), min_size=1, max_size=70)


@pytest.mark.slow
@pytest.mark.parametrize("devices", MESHES)
@settings(max_examples=12, deadline=None)
@given(prompts=st.lists(tokens, min_size=4, max_size=4), more=tokens)
def test_cached_logits_are_those_without_a_cache(
    devices: int, prompts: list[list[int]], more: list[int]
) -> None:
    """Of rows side by side, whatever their lengths; through chunks of 16 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "CHUNK", 16)
        steps = CachedSteps(CONFIG, *placed(devices), 256)
        found = [np.asarray(steps.prefill(prompts, 1))]
        for token in more[:5]:
            found.append(np.asarray(steps.advance(np.arange(4), np.full(4, token))))
    for row, prompt in enumerate(prompts):
        expected = uncached([*prompt, *more[:5]])[len(prompt) - 1 :]
        np.testing.assert_allclose([logits[row] for logits in found], expected, atol=1e-4)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(
    requests=st.lists(
        st.builds(
            Request,
            prompt=tokens,
            max_new_tokens=st.integers(1, 20),
            sampling=st.sampled_from(SAMPLINGS),
            seed=st.integers(0, 3),
        ),
        min_size=1,
        max_size=10,
    ),
    devices=st.sampled_from(MESHES),
)
def test_a_request_does_not_see_its_neighbours(requests: list[Request], devices: int) -> None:
    """More requests than slots, on any mesh, against each alone on one device."""
    together = run(shared(devices), requests)
    for request, (ids, logprobs) in zip(requests, together, strict=True):
        ((alone, expected),) = run(shared(1, slots=1), [request])
        assert ids == alone  # no two of these logits are nearer than rounding
        np.testing.assert_allclose(logprobs, expected, atol=1e-4)


@pytest.mark.slow
def test_nothing_is_compiled_in_steady_state() -> None:
    def requests(seed: int) -> Iterator[Request]:
        rng = np.random.default_rng(seed)
        for size in rng.integers(1, 100, 20):
            prompt = rng.integers(0, 64, size).tolist()
            yield Request(prompt, int(rng.integers(1, 28)), SAMPLINGS[seed % 4], int(size))

    one = engine()
    for seed in range(4):
        run(one, list(requests(seed)))
    compiled = [f._cache_size() for f in (programs.decode, programs._take, programs.place)]  # type: ignore[attr-defined]
    for seed in range(4, 8):
        run(one, list(requests(seed)))
    assert compiled == [
        f._cache_size()  # type: ignore[attr-defined]
        for f in (programs.decode, programs._take, programs.place)
    ]


@pytest.mark.slow
def test_a_prompt_beyond_the_lengths_of_training() -> None:
    """ALiBi has no last position; chunks of 512 tokens, the last of them short."""
    prompt = np.random.default_rng(0).integers(0, 64, 2500).tolist()
    ((ids, logprobs),) = run(engine(slots=2, length=2600), [Request(prompt, 9)])
    logits = uncached([*prompt, *ids])[len(prompt) - 1 : -1]
    assert ids == logits.argmax(-1).tolist()
    expected = np.asarray(jax.nn.log_softmax(logits))[range(9), ids]
    np.testing.assert_allclose(logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("devices", [1, 4])
def test_a_cache_in_eight_bits_is_nearly_the_same(devices: int) -> None:
    steps = CachedSteps(CONFIG, *placed(devices), 64, "int8")
    logits = np.asarray(steps.prefill([PROMPTS[3]], 2))
    expected = uncached(PROMPTS[3])[-1]
    error = np.abs(logits - expected).max()
    assert 0 < error < 0.02 * np.abs(expected).max()


@pytest.mark.slow
def test_a_request_that_ends_or_is_cancelled_makes_room() -> None:
    one = engine(slots=2)
    ((free, _),) = run(one, [Request(PROMPTS[1], 30, Sampling(1.0), 1)])
    stop = next(id for id in free[5:] if id not in free[:5])
    requests = [Request(PROMPTS[1], 30, Sampling(1.0), 1, (stop, 63)), Request(PROMPTS[0], 100)]
    requests += [Request([7, 8], 10)]
    numbers = [one.submit(request) for request in requests]
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    done = {}
    while one.busy:
        for fresh in one.step():
            answers[fresh.number] += fresh.ids
            done[fresh.number] = fresh.done
        if len(answers[numbers[1]]) > 20:
            one.cancel(numbers[1])
    assert answers[numbers[0]] == free[: free.index(stop)] and done[numbers[0]]
    assert 20 < len(answers[numbers[1]]) < 40 and not done[numbers[1]]
    ((alone, _),) = run(one, [requests[2]])
    assert answers[numbers[2]] == alone


def test_logits_are_what_a_function_makes_of_them() -> None:
    def odd_ids_only(logits_BV: Any, tokens_BS: Any, lengths_B: Any) -> Any:
        last_B = jax.vmap(lambda tokens_S, n: tokens_S[n - 1])(tokens_BS, lengths_B)
        V = logits_BV.shape[1]
        wrong_BV = (jnp.arange(V) % 2 == 0) | (jnp.arange(V) == last_B[:, None])
        return jnp.where(wrong_BV, -jnp.inf, logits_BV)

    answers = run(engine(logits_fn=odd_ids_only), [Request(prompt, 20) for prompt in PROMPTS])
    for prompt, (ids, _) in zip(PROMPTS, answers, strict=True):
        assert all(id % 2 for id in ids)
        assert all(a != b for a, b in zip([prompt[-1], *ids], ids, strict=False))


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (Request([]), InputError),
        (Request([-1]), InputError),
        (Request([64]), InputError),
        (Request([1] * 100, 29), InputError),
        (Request([1], stop_ids=(1, 2, 3, 4, 5)), InputError),
        (Request([1], 5, Sampling(top_k=3)), ConfigError),
        (Request([1], 0), ConfigError),
    ],
)
def test_bad_requests_are_refused(request_: Request, error: type[Exception]) -> None:
    one = shared()
    with pytest.raises(error, match="expected") as caught:
        one.submit(request_)
    assert "\n" not in str(caught.value)
    assert not one.busy


@pytest.mark.parametrize("prompt", ["hello", [1.5], [2**40]])
def test_prompts_of_something_else_than_ids_are_refused(prompt: Any) -> None:
    with pytest.raises(InputError, match="expected"):
        shared().submit(Request(prompt))


def test_prompts_may_be_arrays() -> None:
    prompt = np.array(PROMPTS[3], np.int64)
    assert run(shared(), [Request(prompt, 5)]) == run(shared(), [Request(PROMPTS[3], 5)])


def test_settings_have_bounds() -> None:
    for sampling in (Sampling(1.0, top_k=2**40), Sampling(no_repeat_ngram_size=2**40)):
        with pytest.raises(ConfigError, match="expected"):
            shared().submit(Request([1], 5, sampling))
    with pytest.raises(InputError, match="expected"):
        shared().submit(Request([1], 5, stop_ids=(2**40,)))
