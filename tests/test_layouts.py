"""Any mesh and any accumulation gives one device's losses, gradients and parameters."""

from typing import Any

import jax
import numpy as np
import pytest

from bloomjax import step
from bloomjax.config import Config, base_config, freeze
from bloomjax.sharding import act, make_mesh, put

BATCH, T = 8, 16
RATE = 1e-3
ALONE = {"data": 1, "fsdp": 1, "tensor": 1}
LAYOUTS = {
    "sequence 8": {"data": 1, "fsdp": 1, "sequence": 8, "tensor": 1},
    "stage 2": {"stage": 2, "fsdp": 1},
    "mix": {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2},
    "data 8": {"data": 8, "fsdp": 1, "tensor": 1},
    "fsdp 8": {"data": 1, "fsdp": 8, "tensor": 1},
    "data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "tensor 8": {"data": 1, "fsdp": 1, "tensor": 8},
}


def config(mesh: dict[str, int], accumulation: int, remat: str, **model: Any) -> Config:
    base = base_config()
    base.model.update(
        {"layers": 2, "width": 32, "heads": 8, "vocab_size": 256, "init_std": 0.02} | model
    )
    base.data.update(batch_size=BATCH, sequence_length=T)
    base.optim.update(learning_rate=RATE, min_learning_rate=RATE, warmup_samples=0, ramp_start=0)
    base.mesh.update(mesh)
    base.run.update(accumulation=accumulation, remat=remat)
    return freeze(base)


def batches(config: Config, mesh: jax.sharding.Mesh) -> list[step.Batch]:
    """Three batches of random tokens and weights, the same for every layout."""
    A, B = step.batch_shape(config, mesh)
    made = []
    for seed in range(3):
        random = np.random.RandomState(seed)
        rows = random.randint(0, config.model.vocab_size, (BATCH, T + 1)).astype(np.int32)
        weights = random.rand(BATCH, T).astype(np.float32)
        host = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "weights": weights}

        def place(a: np.ndarray) -> jax.Array:
            padded = np.pad(a, [(0, A * B - BATCH), (0, 0)])
            return put(padded.reshape(A, B, T), act("ABT"), mesh)

        made.append({name: place(a) for name, a in host.items()})
    return made


def run(
    layout: dict[str, int], accumulation: int = 1, remat: str = "block", **model: Any
) -> tuple[Any, ...]:
    """Losses of three steps, gradients of the first, parameters after the third, checksums."""
    cfg = config(layout, accumulation, remat, **model)
    devices = jax.devices()[: int(np.prod(list(layout.values())))]
    mesh = make_mesh(cfg.mesh, devices)
    with jax.set_mesh(mesh):
        state = step.init_state(cfg)
        made = batches(cfg, mesh)
        compute = jax.jit(step.loss_and_gradients, static_argnums=0)
        key = jax.random.key(1)
        _, gradients = compute(cfg, state.params, made[0], np.int32(BATCH), key)
        gradients = jax.tree.map(np.asarray, gradients)
        losses, checksums = [], []
        for batch in made:
            state, report = step.train_step(cfg, state, batch, np.int32(BATCH))
            losses.append(float(report["loss"]))
            checksums.append(int(report["checksum"]))
        return losses, gradients, jax.tree.map(np.asarray, state.params), checksums


def assert_equal(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for (path, g), e in zip(
        jax.tree_util.tree_leaves_with_path(found[1]), jax.tree.leaves(expected[1]), strict=True
    ):
        g, e = g[: len(e)], e[: len(g)]  # a stack may end in padding
        assert np.linalg.norm(g - e) <= 1e-4 * np.linalg.norm(e), path
    for (path, p), e in zip(
        jax.tree_util.tree_leaves_with_path(found[2]), jax.tree.leaves(expected[2]), strict=True
    ):
        p, e = p[: len(e)], e[: len(p)]
        assert np.abs(p - e).max() <= 0.02 * RATE, path
    assert found[3] == expected[3]


@pytest.fixture(scope="module")
def alone() -> tuple[Any, ...]:
    return run(ALONE)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_mesh_changes_nothing(layout: dict[str, int], alone: tuple[Any, ...]) -> None:
    assert_equal(run(layout), alone)


@pytest.mark.parametrize(
    ("layout", "accumulation"),  # three microbatches leave the last partly empty
    [(ALONE, 2), (ALONE, 3), (LAYOUTS["fsdp 8"], 2)],
)
def test_accumulation_changes_nothing(
    layout: dict[str, int], accumulation: int, alone: tuple[Any, ...]
) -> None:
    assert_equal(run(layout, accumulation), alone)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_rematerialisation_changes_nothing(remat: str, alone: tuple[Any, ...]) -> None:
    assert_equal(run(LAYOUTS["data 2 x fsdp 2 x tensor 2"], remat=remat), alone)


def test_dropout_is_the_same_on_every_mesh() -> None:
    rates = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    alone, split = run(ALONE, **rates), run(LAYOUTS["data 2 x fsdp 2 x tensor 2"], **rates)
    assert_equal(split, alone)
    assert alone[0] != run(ALONE)[0]
