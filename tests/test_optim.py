"""Schedules against the log of the BLOOM runs; the optimizer against its paper's formulas."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import model_config, one_device

from bloomjax import model, optim
from bloomjax.config import SIZES, base_config, freeze
from bloomjax.optim import BatchRamp

# (step, samples consumed, learning rate) as tr11-176B-ml logged them; rates have four digits.
LOGGED_176B = [
    (12_695, 9_841_584, 5.969e-5),
    (31_214, 47_768_496, 5.279e-5),
    (42_780, 71_455_664, 4.475e-5),
    (85_376, 158_692_272, 1.150e-5),
    (95_000, 178_402_224, None),
]
# model: (steps of the ramp-up, step of the release, tokens consumed by then)
RELEASED = {
    "560m": (None, 659_500, 341.0e9),
    "1b1": (None, 660_750, 342.6e9),
    "1b7": (None, 340_500, 344.8e9),
    "3b": (31_583, 337_250, 340.5e9),
    "7b1": (31_583, 337_500, 340.8e9),
    "176b": (12_658, 95_000, 365.37e9),
}


@pytest.mark.parametrize(("step", "samples", "rate"), LOGGED_176B)
def test_the_176b_run_is_reproduced(step: int, samples: int, rate: float | None) -> None:
    config = freeze(base_config("176b"))
    assert BatchRamp.of(config)(step)[0] == samples
    if rate:
        found = float(optim.learning_rate(config.optim, jnp.int32(samples)))
        assert found == pytest.approx(rate, abs=0.5e-8)


@pytest.mark.parametrize("size", SIZES)
def test_the_other_runs_are_reproduced(size: str) -> None:
    config = freeze(base_config(size))
    ramp = BatchRamp.of(config)
    ramp_steps, released, tokens = RELEASED[size]
    assert ramp(released)[0] * 2048 == pytest.approx(tokens, rel=2e-4)
    if ramp_steps:
        full = config.data.batch_size
        assert ramp(ramp_steps)[1] == full and ramp(ramp_steps - 1)[1] < full
    # the planned 220,000,000 samples are consumed by the configured steps, and by no fewer
    assert ramp(config.optim.steps)[0] >= 220_000_000 > ramp(config.optim.steps - 1)[0]


def test_the_ramp_is_megatrons_rule() -> None:
    ramp = BatchRamp(start=4, increment=3, samples=1000, full=19)
    consumed = 0
    for step in range(400):
        rung = 1000 / ((19 - 4) / 3)
        batch = 4 + int(consumed / rung) * 3 if consumed <= 1000 else 19
        assert ramp(step) == (consumed, batch)
        consumed += batch


def test_the_rate_warms_up_falls_and_stays() -> None:
    config = freeze(base_config("176b")).optim
    rates = [float(optim.learning_rate(config, jnp.int32(n))) for n in (0, 183_105, 2 * 10**8)]
    assert rates == pytest.approx([0, 6e-5, 6e-6])
    assert float(optim.learning_rate(config, jnp.int32(2.1e8))) == pytest.approx(6e-6)
    half = optim.learning_rate(config, jnp.int32((200_000_000 + 183_105) // 2))
    assert float(half) == pytest.approx((6e-5 + 6e-6) / 2, rel=1e-5)


def _some_params() -> Any:
    with jax.set_mesh(one_device()):
        return jax.jit(model.init_params, static_argnums=0)(model_config(), jax.random.key(0))


def test_matrices_decay_and_nothing_else_does() -> None:
    leaves = jax.tree_util.tree_leaves_with_path(_some_params())
    decayed = {path[-1].key for path, _ in leaves if optim.decays(path)}
    assert decayed == {"embed", "qkv_w", "out_w", "up_w", "down_w"}


def test_adamw_is_the_papers() -> None:
    """Three steps against Loshchilov & Hutter's algorithm 2, in float64, with clipping."""
    base = base_config()
    base.optim.update(clip_norm=0.7, epsilon=1e-3)
    config = freeze(base).optim
    params = _some_params()
    moments = optax.scale_by_adam().init(params)
    random = np.random.RandomState(0)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    p = [np.float64(leaf) for leaf in jax.tree.leaves(params)]
    m, v = [np.zeros_like(x) for x in p], [np.zeros_like(x) for x in p]
    for t in itertools.islice(itertools.count(1), 3):
        g = [random.standard_normal(x.shape) * 0.01 * t for x in p]
        norm = np.sqrt(sum((x**2).sum() for x in g))
        gradients = jax.tree.unflatten(jax.tree.structure(params), [np.float32(x) for x in g])
        params, moments = jax.jit(optim.adamw, static_argnums=0)(
            config,
            gradients,
            params,
            moments,
            1e-2,
            optim.clip_factor(config, jnp.float32(norm)),
            True,
        )
        for i, path in enumerate(paths):
            clipped = g[i] * min(1.0, 0.7 / (norm + 1e-6))
            m[i] = 0.9 * m[i] + 0.1 * clipped
            v[i] = 0.95 * v[i] + 0.05 * clipped**2
            step = m[i] / (1 - 0.9**t) / (np.sqrt(v[i] / (1 - 0.95**t)) + 1e-3)
            p[i] -= 1e-2 * (step + (0.1 * p[i] if optim.decays(path) else 0))
    for found, expected in zip(jax.tree.leaves(params), p, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-6)
