"""What the model promises without an oracle: slopes, sizes, chunks, dropout, the head's loss."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import model_config, on_mesh, one_device

from bloomjax import attention, loss
from bloomjax.attention import alibi_slopes, attend
from bloomjax.config import SIZES, base_config, freeze
from bloomjax.model import abstract_params, bind, dropout, init_params
from bloomjax.sharding import put, weight

# Printed by the reference implementations for these head counts, at these heads.
SLOPES = {
    8: {0: 0.5, 7: 0.00390625},
    16: {0: 0.70710678, 1: 0.5, 2: 0.35355339, 15: 0.00390625},
    32: {0: 0.8408964, 31: 0.00390625},
    112: {0: 0.91700404, 1: 0.8408964, 2: 0.77110541, 63: 0.00390625, 64: 0.95760328,
          65: 0.87812608, 66: 0.80524517, 111: 0.01631678},
}  # fmt: skip

# The parameters of the published checkpoints, counted.
PARAMETERS = {
    "560m": 559_214_592,
    "1b1": 1_065_314_304,
    "1b7": 1_722_408_960,
    "3b": 3_002_557_440,
    "7b1": 7_069_016_064,
    "176b": 176_247_271_424,
}


@pytest.mark.parametrize("heads", SLOPES)
def test_slopes(heads: int) -> None:
    slopes = alibi_slopes(heads)
    assert slopes.shape == (heads,) and slopes.dtype == np.float32
    known = SLOPES[heads]
    np.testing.assert_allclose(slopes[list(known)], list(known.values()), rtol=4e-7)


@pytest.mark.parametrize("size", SIZES)
def test_parameter_count(size: str) -> None:
    config = freeze(base_config(size)).model
    assert config.parameter_count == PARAMETERS[size]
    leaves = jax.tree.leaves(abstract_params(config, one_device()))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == PARAMETERS[size]


def random_qkv(B: int, T: int, N: int = 6, H: int = 8) -> list[np.ndarray]:
    shape = (3, B, T, N, H)
    return list(np.random.RandomState(0).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("T", [128, 150])
@pytest.mark.parametrize("padded", [False, True])
def test_chunks_of_queries_change_nothing(
    T: int, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = np.repeat([[0, 1, 2], [1, 1, 0]], T // 3 + 1, axis=1)[:, :T] if padded else None
    upstream = np.random.RandomState(1).standard_normal((2, T, 6, 8)).astype(np.float32)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, segments: Any) -> Any:
        out = attend(q, k, v, segments_BT=segments)
        out = out if segments is None else jnp.where((segments > 0)[..., None, None], out, 0)
        return (upstream * out).sum(), out

    results = []
    with jax.set_mesh(one_device()):
        qkv = [on_mesh("BTNH", a) for a in random_qkv(2, T)]
        segments = None if segments is None else on_mesh("BT", segments)
        for chunk in (T, 32):
            monkeypatch.setattr(attention, "CHUNK", chunk)
            gradient = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))
            (_, out), grads = gradient(*qkv, segments)
            results.append([out, *grads])
    for whole, chunked in zip(*results, strict=True):
        np.testing.assert_allclose(chunked, whole, atol=2e-5)


def test_packed_sequences_do_not_see_each_other() -> None:
    config = model_config()
    tokens = np.random.RandomState(0).randint(0, 64, (1, 24))
    segments = np.repeat([[1, 2, 0]], [10, 9, 5], axis=1)
    with jax.set_mesh(one_device()):
        params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
        run = jax.jit(lambda tokens, segments: bind(config, params)(tokens, segments_BT=segments))
        packed = run(on_mesh("BT", tokens), on_mesh("BT", segments))
        for a, b in ((0, 10), (10, 19)):
            alone = run(on_mesh("BT", tokens[:, a:b]), None)
            np.testing.assert_allclose(packed[:, a:b], alone, atol=1e-5)


def test_dropout_keeps_its_share_and_the_mean() -> None:
    with jax.set_mesh(one_device()):
        x = on_mesh("BTD", np.ones((8, 64, 512), np.float32))
        for rate in (0.1, 0.5):
            y = np.asarray(dropout(x, rate, jax.random.key(3), "BTD"))
            kept = y != 0
            sigma = math.sqrt(rate * (1 - rate) / y.size)
            assert abs(kept.mean() - (1 - rate)) < 5 * sigma
            np.testing.assert_allclose(y[kept], 1 / (1 - rate), rtol=1e-6)


@pytest.mark.parametrize("kind", ["hidden_dropout", "attention_dropout"])
def test_dropout_follows_its_key(kind: str) -> None:
    config = model_config(**{kind: 0.1})
    tokens = np.random.RandomState(0).randint(0, 64, (2, 16))
    with jax.set_mesh(one_device()):
        params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
        params = jax.tree.map(lambda p: p * 10, params)  # attention and MLP that matter
        run = jax.jit(lambda tokens, key: bind(config, params)(tokens, key=key))
        tokens = on_mesh("BT", tokens)
        one, again, other = (run(tokens, jax.random.key(seed)) for seed in (1, 1, 2))
        without, calm = run(tokens, None), bind(model_config(), jax.tree.map(jnp.asarray, params))
        np.testing.assert_array_equal(one, again)
        assert np.abs(one - other).max() > 1e-3 and np.abs(one - without).max() > 1e-3
        np.testing.assert_allclose(without, jax.jit(calm)(tokens), atol=1e-6)


def plain_loss(x: jax.Array, embed: jax.Array, targets: Any, weights: Any) -> jax.Array:
    logprobs = jax.nn.log_softmax(x @ embed.T)
    return -(weights * jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0]).sum()


@pytest.mark.parametrize("scale", [1.0, 3000.0])
@pytest.mark.parametrize("chunks", [1, 3, 7, 39])
def test_loss_in_chunks_is_the_plain_loss(
    chunks: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 x 13 tokens: 3 divides them, 7 does not, 39 leaves one each. Scaled, logits reach 1e4."""
    B, T, D, V = 3, 13, 16, 80
    random = np.random.RandomState(0)
    x = (scale * random.standard_normal((B, T, D))).astype(np.float32)
    embed = random.standard_normal((V, D)).astype(np.float32)
    targets = random.randint(0, V, (B, T))
    weights = random.randint(0, 3, (B, T)).astype(np.float32)
    if scale > 1:
        assert np.abs(x @ embed.T).max() > 1e4
    monkeypatch.setattr(loss, "LOGITS_BYTES", math.ceil(B * T * V * 4 / chunks))
    theirs = jax.value_and_grad(plain_loss, (0, 1))(x, embed, targets, weights)
    with jax.set_mesh(one_device()):
        resting = put(embed, weight("VD"), jax.sharding.get_mesh())
        batch = on_mesh("BTD", x), resting, on_mesh("BT", targets), on_mesh("BT", weights)
        ours = jax.jit(jax.value_and_grad(loss.cross_entropy, (0, 1)))(*batch)
        value_alone = loss.cross_entropy(*batch)
    np.testing.assert_allclose(value_alone, ours[0], rtol=1e-6)
    for mine, plain in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.isfinite(mine).all()
        assert np.linalg.norm(mine - plain) <= 1e-5 * np.linalg.norm(plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_logits_stay_finite_in_the_whole_model(dtype: str) -> None:
    config = dataclasses.replace(model_config(), dtype=dtype)
    tokens = np.random.RandomState(0).randint(0, 64, (2, 16))
    with jax.set_mesh(one_device()):
        params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
        params["embed"] *= 1e6
        tokens, weights = on_mesh("BT", tokens), on_mesh("BT", np.ones((2, 16), np.float32))

        @jax.jit
        @jax.value_and_grad
        def run(params: Any) -> jax.Array:
            x_BTD = bind(config, params)(tokens)
            return loss.cross_entropy(x_BTD, params["embed"], tokens, weights)

        value, gradients = run(params)
        assert np.isfinite(value) and value >= 0
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
