"""Choosing tokens: the distributions are transformers', and a row sees no neighbour."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import FILE, META
from helpers import one_device

from bloomjax.config import MeshConfig
from bloomjax.decode import sampling as sampling_module
from bloomjax.decode.sampling import Features, Sampling, Settings, check, settings_of
from bloomjax.errors import ConfigError
from bloomjax.sharding import make_mesh

EVERYTHING = Features(True, True, True, True, True)
ALL = (
    Sampling(0.9, 20, 0.9, 0.01, repetition_penalty=1.3),
    Sampling(),
    Sampling(1.0),
    Sampling(0.7, top_p=0.8, no_repeat_ngram_size=1),
    Sampling(min_new_tokens=5),
    Sampling(1.5, top_k=3, min_new_tokens=30),
)

choose = jax.jit(sampling_module.choose, static_argnames="features")
filtered = jax.jit(sampling_module.filtered, static_argnames="features")
processed = jax.jit(sampling_module.processed, static_argnames="features")


def settings(samplings: Any, prompt: int = 0, stop_ids: tuple[int, ...] = ()) -> Settings:
    """Row r has seed r."""
    B = len(samplings)
    return settings_of(samplings, range(B), [prompt] * B, [stop_ids] * B)


def kept(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """bool: what may be drawn, of rows of logits."""
    with jax.set_mesh(one_device()):
        rows = settings([sampling] * len(logits))
        return np.isfinite(filtered(jnp.asarray(logits), rows, features=sampling.features))


@functools.cache
def scores_and_history() -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
    """The inputs of every golden distribution, as `oracles.generation` makes them."""
    scores, histories = [], []
    for seed, options in enumerate(META["distributions"]):
        random = np.random.RandomState(seed)
        rows = (3 * random.standard_normal((4, 300))).astype(np.float32)
        scores.append(np.round(rows) if "ties" in options else rows)
        histories.append(random.randint(0, 6, (4, 24)).astype(np.int32))
    return META["distributions"], np.concatenate(scores), np.concatenate(histories)


def test_distributions_are_those_of_transformers() -> None:
    """Each filter and processor, and several at once; all of them in one program."""
    options, scores, histories = scores_and_history()
    samplings = [
        Sampling(**{"temperature": 1.0} | {k: v for k, v in each.items() if k != "ties"})
        for each in options
    ]
    rows = settings([s for s in samplings for _ in range(4)], prompt=10, stop_ids=(7,))
    lengths = np.full(len(scores), histories.shape[1], np.int32)
    with jax.set_mesh(one_device()):
        found = processed(jnp.asarray(scores), histories, lengths, rows, features=EVERYTHING)
        found = np.asarray(jax.nn.softmax(filtered(found, rows, features=EVERYTHING)))
    for i, each in enumerate(options):
        theirs = FILE[f"distributions/{i}"]
        ours = found[4 * i : 4 * i + 4]
        np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=0, err_msg=str(each))
        assert ((ours > 0) == (theirs > 0)).all(), each


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("decimals", [7, 1])
def test_filters_of_a_whole_vocabulary_keep_what_a_sort_keeps(
    decimals: int, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of logits of both signs, all different, or many alike; as many as BLOOM has on CPU, and in
    the digits of other machines a few."""
    monkeypatch.setattr(sampling_module, "on_cpu", lambda: on_cpu)
    V = 250_880 if on_cpu else 5_000
    logits = np.random.RandomState(0).standard_normal((2, V)).astype(np.float32) * 2
    logits = np.round(logits, decimals)
    ranked = -np.sort(-logits, axis=1)
    for k in (1, 50, V // 3, V - 1, V):
        expected = logits >= ranked[:, k - 1, None]
        assert (kept(logits, Sampling(1.0, top_k=k)) == expected).all()
    probs = np.exp(ranked.astype(np.float64))
    before = (np.cumsum(probs, 1) - probs) / probs.sum(1, keepdims=True)
    for p in (0.01, 0.5, 0.98):
        expected = logits >= np.where(before < p, ranked, np.inf).min(1, keepdims=True)
        found = kept(logits, Sampling(1.0, top_p=p))
        assert (found != expected).sum() <= 2e-6 * p * expected.size  # sums of float32
        assert found.sum() / expected.sum() == pytest.approx(1, abs=1e-4)


def test_what_equals_the_threshold_stays() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.0625, 0.0625]], np.float32))

    def ids(sampling: Sampling) -> list[int]:
        return np.flatnonzero(kept(logits, sampling)[0]).tolist()

    assert ids(Sampling(1.0, top_k=2)) == [0, 1]
    assert ids(Sampling(1.0, top_k=4)) == [0, 1, 2, 3, 4]  # the tie of the fourth
    assert ids(Sampling(1.0, top_p=0.5)) == [0]
    assert ids(Sampling(1.0, top_p=0.51)) == [0, 1]
    assert ids(Sampling(1.0, top_p=0.9)) == [0, 1, 2, 3, 4]  # transformers would drop one
    assert ids(Sampling(1.0, top_k=3, top_p=0.9)) == [0, 1, 2]
    assert ids(Sampling(1.0, min_p=0.25)) == [0, 1, 2]
    assert ids(Sampling(2.0, min_p=0.25)) == [0, 1, 2, 3, 4]  # after the temperature
    logits[0, 1:] = -np.inf  # as processors leave them
    assert ids(Sampling(1.0, top_k=4)) == ids(Sampling(1.0, top_p=0.9)) == [0]


def test_no_ngram_comes_twice() -> None:
    """Against the definition, for every length and n, of histories of three different ids."""
    tokens = np.random.RandomState(1).randint(0, 3, 12)
    cases = [(n, length) for n in range(5) for length in range(len(tokens) + 1)]
    rows = settings([Sampling(no_repeat_ngram_size=n) for n, _ in cases])
    lengths = np.array([length for _, length in cases], np.int32)
    histories = np.tile(tokens.astype(np.int32), (len(cases), 1))
    scores = jnp.zeros((len(cases), 4))
    with jax.set_mesh(one_device()):
        found = processed(scores, histories, lengths, rows, features=Features(history=True))
    for (n, length), row in zip(cases, np.isfinite(found), strict=True):
        said = tokens[:length].tolist()
        grams = [said[i : i + n] for i in range(length - n + 1)]
        allowed = [n == 0 or [*said[max(0, length - n + 1) :], v] not in grams for v in range(4)]
        if n <= length + 1:
            assert row.tolist() == allowed, (n, length)
        else:
            assert row.all()


def test_nothing_ends_before_its_time_and_then_it_may() -> None:
    rows = settings_of([Sampling(min_new_tokens=3)] * 4, [0] * 4, [5] * 4, [(2, 4), (2,), (), (4,)])
    scores = jnp.zeros((4, 6))
    with jax.set_mesh(one_device()):
        for new in range(5):
            lengths = np.full(4, 5 + new, np.int32)
            found = processed(scores, None, lengths, rows, features=Features(minimum=True))
            barred = [np.flatnonzero(np.isinf(row)).tolist() for row in np.asarray(found)]
            assert barred == ([[2, 4], [2], [], [4]] if new < 3 else [[]] * 4)


def batch(seed: int, rows: int, V: int = 700) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.RandomState(seed)
    logits = (3 * random.standard_normal((rows, V))).astype(np.float32)
    tokens = random.randint(0, V, (rows, 16)).astype(np.int32)
    return logits, tokens, random.randint(1, 17, rows).astype(np.int32)


@pytest.mark.slow
def test_a_row_does_not_see_its_neighbours() -> None:
    """Nor the features that only they need: alone it is the same token."""
    logits, tokens, lengths = batch(2, len(ALL))
    rows = settings(ALL, prompt=1, stop_ids=(9,))
    with jax.set_mesh(one_device()):
        together = choose(jnp.asarray(logits), tokens, lengths, rows, features=EVERYTHING)
        for i in (1, 3, 4):
            one = jax.tree.map(lambda a, i=i: a[i : i + 1], (logits, tokens, lengths, rows))
            alone = choose(jnp.asarray(one[0]), *one[1:], features=ALL[i].features)
            assert int(alone[0][0]) == int(together[0][i])
            np.testing.assert_allclose(alone[1][0], together[1][i], atol=1e-5)


def test_a_mesh_chooses_the_same() -> None:
    logits, tokens, lengths = batch(3, len(ALL))
    rows = settings(ALL, prompt=1)
    chosen = []
    for mesh in (one_device(), make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])):
        with jax.set_mesh(mesh):
            found = choose(jnp.asarray(logits), tokens, lengths, rows, features=EVERYTHING)
            chosen.append(np.asarray(found[0]).tolist())
    assert chosen[0] == chosen[1]


def test_features_of_two_requests_are_what_both_need() -> None:
    both = Sampling(1.0, top_k=4).features | Sampling(repetition_penalty=2.0).features
    assert both == Features(draws=True, top_k=True, history=True)


def test_the_logprob_is_that_of_the_model() -> None:
    """Of ids too that a penalty made less likely, and that are the likeliest all the same."""
    logits, tokens, lengths = batch(4, len(ALL))
    logits[range(len(ALL)), tokens[:, 0]] = 30
    with jax.set_mesh(one_device()):
        ids, found = choose(
            jnp.asarray(logits), tokens, lengths, settings(ALL), features=EVERYTHING
        )
    expected = np.asarray(jax.nn.log_softmax(logits))[range(len(ALL)), np.asarray(ids)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_likeliest_of_a_vocabulary_of_several_groups() -> None:
    """NumPy's, the first of equals too; the last of 1,300 ids do not fill a group."""
    random = np.random.RandomState(0)
    logits = np.round(3 * random.standard_normal((64, 1300))).astype(np.float32)
    logits[range(64), random.randint(0, 1300, 64)] = 10
    logits[range(32), random.randint(0, 1300, 32)] = 10
    logits[0], logits[1, -1] = -5, 20
    lengths, rows = np.ones(64, np.int32), settings([Sampling()] * 64)
    with jax.set_mesh(one_device()):
        ids, found = choose(jnp.asarray(logits), None, lengths, rows, features=Features())
    np.testing.assert_array_equal(ids, logits.argmax(-1))
    whole = logits.astype(np.float64)
    expected = whole.max(-1) - np.log(np.exp(whole).sum(-1))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_draws_follow_the_distribution() -> None:
    """Of ids near and far, likely and not, over three groups of ids; seeds and positions both give
    draws of their own."""
    shares = {0: 0.2, 1: 0.15, 2: 0.1, 511: 0.1, 512: 0.05, 513: 0.2, 1026: 0.15, 1029: 0.05}
    logits = np.full((4000, 1030), -np.inf, np.float32)
    logits[:, list(shares)] = np.log(list(shares.values()))
    rows, same = settings([Sampling(1.0)] * 4000), np.zeros(4000, np.uint32)
    drawn = Features(draws=True)
    with jax.set_mesh(one_device()):
        for each, positions in (
            (rows, np.zeros(4000, np.int32)),
            (rows._replace(seeds_B=same), np.arange(4000, dtype=np.int32)),
        ):
            ids, _ = choose(jnp.asarray(logits), None, positions, each, features=drawn)
            found = np.bincount(np.asarray(ids), minlength=1030)[list(shares)] / 4000
            np.testing.assert_allclose(found, list(shares.values()), atol=0.03)
            pairs = np.asarray(ids)[:-1] == np.asarray(ids)[1:]  # one draw says nothing of the next
            assert pairs.mean() == pytest.approx(sum(s * s for s in shares.values()), abs=0.03)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(-1.0), "temperature is -1.0: expected 0"),
        (Sampling(float("nan")), "temperature is nan: expected"),
        (Sampling(float("inf")), "temperature is inf: expected"),
        (Sampling(1.0, top_k=-1), "top_k is -1: expected"),
        (Sampling(1.0, top_p=1.5), "top_p is 1.5: expected 0 to 1"),
        (Sampling(1.0, min_p=-0.1), "min_p is -0.1: expected 0 to 1"),
        (Sampling(repetition_penalty=0.0), "repetition_penalty is 0.0: expected above 0"),
        (Sampling(no_repeat_ngram_size=-2), "no_repeat_ngram_size is -2: expected"),
        (Sampling(min_new_tokens=-1), "min_new_tokens is -1: expected"),
        (Sampling(min_new_tokens=11), r"min_new_tokens is 11: expected max_new_tokens \(10\)"),
        (Sampling(top_k=5), "top_k is 5, but nothing is drawn at temperature 0: expected a temp"),
        (Sampling(top_p=0.9), "top_p is 0.9, but nothing is drawn"),
        (Sampling(min_p=0.1), "min_p is 0.1, but nothing is drawn"),
    ],
)
def test_bad_settings_are_refused(sampling: Sampling, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        check(sampling, 10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sampling", ALL)
def test_good_settings_are_not(sampling: Sampling) -> None:
    check(sampling, 100)
