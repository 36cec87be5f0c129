"""Any mesh and any accumulation gives one device's losses, gradients and parameters."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from processes import launch

from bloomjax import checkpoint, step
from bloomjax.checkpoint import Checkpoints
from bloomjax.config import Config, MeshConfig, base_config, freeze
from bloomjax.errors import ConfigError
from bloomjax.sharding import AXES, act, check_divides, faults, make_mesh, put

BATCH, T, LAYERS = 8, 16, 10
RATE = 1e-3
ALONE = "data 1"
# Every axis alone and mixed. Ten layers on four stages are 10 + 2 = 4 x 3 slots; on two or five
# stages they divide. Six devices have an axis that divides no weight.
LAYOUTS = """
    data 8; fsdp 8; sequence 8; tensor 8; stage 2; stage 4; stage 5
    data 2 fsdp 2 tensor 2; fsdp 2 sequence 2 tensor 2; data 2 fsdp 4; fsdp 4 tensor 2
    sequence 2 tensor 4; data 2 sequence 4; data 3 tensor 2; stage 2 data 2 fsdp 2
    stage 2 tensor 4; stage 4 fsdp 2; stage 4 tensor 2; stage 2 sequence 2 tensor 2
    stage 4 sequence 2; stage 2 fsdp 2 sequence 2; stage 2 data 3
""".replace("\n", ";")
LAYOUTS = [" ".join(layout.split()) for layout in LAYOUTS.split(";") if layout.strip()]
MIXED = [
    "data 2 fsdp 2 tensor 2",
    "fsdp 2 sequence 2 tensor 2",
    "stage 4 fsdp 2",
    "stage 2 sequence 2 tensor 2",
]


def sizes(layout: str) -> dict[str, int]:
    words = layout.split()
    return {axis: 1 for axis in AXES} | dict(zip(words[::2], map(int, words[1::2]), strict=True))


def config(layout: str, accumulation: int = 1, remat: str = "block", **model: Any) -> Config:
    base = base_config()
    small = {"layers": LAYERS, "width": 32, "heads": 8, "vocab_size": 256, "init_std": 0.02}
    base.model.update(small | model)
    base.data.update(batch_size=BATCH, sequence_length=T)
    base.optim.update(learning_rate=RATE, min_learning_rate=RATE, warmup_samples=0, ramp_start=0)
    base.mesh.update(sizes(layout))
    base.run.update(accumulation=accumulation, remat=remat)
    return freeze(base)


def mesh_of(layout: str) -> jax.sharding.Mesh:
    count = int(np.prod(list(sizes(layout).values())))
    return make_mesh(MeshConfig(**sizes(layout)), jax.devices()[:count])


def microbatches(layout: str) -> int:
    return 4 if "stage" in layout else 1


def batch_of(config: Config, mesh: jax.sharding.Mesh, seed: int) -> step.Batch:
    """Random tokens and weights, the same for every layout."""
    A, B = step.batch_shape(config, mesh)
    random = np.random.RandomState(seed)
    rows = random.randint(0, config.model.vocab_size, (BATCH, T + 1)).astype(np.int32)
    weights = random.rand(BATCH, T).astype(np.float32)
    host = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "weights": weights}

    def place(a: np.ndarray) -> jax.Array:
        padded = np.pad(a, [(0, A * B - BATCH), (0, 0)])
        return put(padded.reshape(A, B, T), act("ABT"), mesh)

    return {name: place(a) for name, a in host.items()}


def start(config: Config, mesh: jax.sharding.Mesh) -> Any:
    """Parameters that no layer norm or bias of zero makes simple, the same for every layout."""
    shapes = step.abstract_state(config, mesh).params

    def random(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        stacked = "blocks" in name
        whole = (config.model.layers, *shape.shape[1:]) if stacked else shape.shape
        value = np.random.RandomState(len(name) * 7 + sum(map(ord, name))).randn(*whole) * 0.05
        value += 1 if "ln" in name and name.endswith("_w']") else 0
        value = np.pad(value, [(0, n - m) for n, m in zip(shape.shape, whole, strict=True)])
        return put(value.astype(np.float32), shape.sharding.spec, mesh)

    return jax.tree_util.tree_map_with_path(random, shapes)


GRADIENTS = jax.jit(step.loss_and_gradients, static_argnums=0)


def gradients(layout: str, **options: Any) -> tuple[float, Any]:
    cfg = config(layout, **{"accumulation": microbatches(layout)} | options)
    with jax.set_mesh(mesh := mesh_of(layout)):
        batch, key = batch_of(cfg, mesh, 0), jax.random.key(1)
        loss, found = GRADIENTS(cfg, start(cfg, mesh), batch, np.int32(BATCH), key)
        return float(loss), jax.tree.map(np.asarray, found)


def assert_close(found: tuple[float, Any], expected: tuple[float, Any]) -> None:
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for (path, g), e in zip(
        jax.tree_util.tree_leaves_with_path(found[1]), jax.tree.leaves(expected[1]), strict=True
    ):
        assert not g[len(e) :].any(), path  # rows of padding learn nothing
        assert np.linalg.norm(g[: len(e)] - e) <= 1e-4 * np.linalg.norm(e), path


@pytest.fixture(scope="module")
def alone() -> tuple[float, Any]:
    return gradients(ALONE)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_no_gradient(layout: str, alone: tuple[float, Any]) -> None:
    assert_close(gradients(layout), alone)


@pytest.mark.parametrize("layout", ["stage 4 fsdp 2", "fsdp 2 sequence 2 tensor 2"])
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_rematerialisation_changes_nothing(
    layout: str, remat: str, alone: tuple[float, Any]
) -> None:
    assert_close(gradients(layout, remat=remat), alone)


@pytest.mark.parametrize("layout", ["stage 2 data 2 tensor 2", "fsdp 2 sequence 2 tensor 2"])
def test_dropout_is_the_same_on_every_mesh(layout: str, alone: tuple[float, Any]) -> None:
    rates = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    one = gradients(ALONE, accumulation=microbatches(layout), **rates)
    assert_close(gradients(layout, **rates), one)
    assert one[0] != alone[0]


@pytest.mark.parametrize(("layout", "accumulation"), [(ALONE, 3), ("fsdp 8", 2), ("stage 4", 3)])
def test_accumulation_changes_nothing(
    layout: str, accumulation: int, alone: tuple[float, Any]
) -> None:  # three microbatches leave the last partly empty
    assert_close(gradients(layout, accumulation=accumulation), alone)


def test_a_pipeline_runs_no_microbatch_without_a_row(alone: tuple[float, Any]) -> None:
    cfg = config("stage 4", accumulation=4)
    with jax.set_mesh(mesh := mesh_of("stage 4")):
        batch, key = batch_of(cfg, mesh, 0), jax.random.key(1)
        batch["weights"] = batch["weights"].at[2:].set(np.nan)
        loss, _ = GRADIENTS(cfg, start(cfg, mesh), batch, np.int32(4), key)
    assert np.isfinite(loss)


def train(layout: str, steps: int = 3) -> tuple[Any, ...]:
    """Losses, what an evaluation finds afterwards, parameters, checksums."""
    cfg = config(layout, accumulation=microbatches(layout))
    with jax.set_mesh(mesh := mesh_of(layout)):
        state = step.init_state(cfg)
        losses, checksums = [], []
        for seed in range(steps):
            batch = batch_of(cfg, mesh, seed)
            state, report = step.train_step(cfg, state, batch, np.int32(BATCH))
            losses.append(float(report["loss"]))
            checksums.append(int(report["checksum"]))
        losses.append(float(step.eval_step(cfg, state.params, batch_of(cfg, mesh, 9))))
        return losses, jax.tree.map(np.asarray, state.params), checksums


@pytest.fixture(scope="module")
def trained() -> tuple[Any, ...]:
    return train(ALONE)


@pytest.mark.slow
@pytest.mark.parametrize("layout", MIXED)
def test_a_layout_changes_no_training(layout: str, trained: tuple[Any, ...]) -> None:
    found = train(layout)
    np.testing.assert_allclose(found[0], trained[0], rtol=1e-5)
    for (path, p), e in zip(
        jax.tree_util.tree_leaves_with_path(found[1]), jax.tree.leaves(trained[1]), strict=True
    ):
        assert np.abs(p[: len(e)] - e).max() <= 0.02 * RATE, path
    assert found[2] == trained[2]


def test_fresh_parameters_are_the_same_on_every_mesh() -> None:
    def fresh(layout: str) -> Any:
        with jax.set_mesh(mesh_of(layout)):
            return jax.tree.map(np.asarray, step.init_state(config(layout)).params)

    for e, g in zip(jax.tree.leaves(fresh(ALONE)), jax.tree.leaves(fresh("stage 4")), strict=True):
        np.testing.assert_array_equal(g[: len(e)], e)
        assert not g[len(e) :].any()


@pytest.mark.slow
def test_a_checkpoint_of_any_layout_restores_onto_any_other(tmp_path: Path) -> None:
    """Of all 23 x 23 pairs; a few leaves, one of each kind of layout."""
    kinds = ("up_w", "qkv_b", "ln1_w")

    def some(tree: Any) -> Any:
        blocks = {name: tree["blocks"][name] for name in kinds}
        return {"params": {"embed": tree["embed"], "blocks": blocks}}

    whole = jax.tree.map(np.asarray, some(start(config(ALONE), mesh_of(ALONE))))
    targets = {}
    for layout in [ALONE, *LAYOUTS]:
        cfg, mesh = config(layout), mesh_of(layout)
        with jax.set_mesh(mesh):
            state = some(start(cfg, mesh))
            targets[layout] = some(step.abstract_state(cfg, mesh).params)
        checkpoints = Checkpoints(tmp_path / layout.replace(" ", "-"), keep=1)
        checkpoints.save(1, state, {})
        checkpoints.close()
    for folder in tmp_path.iterdir():
        for layout, target in targets.items():
            restored = checkpoint.restore(folder, target)
            assert restored is not None
            for e, g in zip(jax.tree.leaves(whole), jax.tree.leaves(restored.state), strict=True):
                np.testing.assert_array_equal(np.asarray(g)[: len(e)], e, f"{folder} {layout}")
                assert not np.asarray(g)[len(e) :].any()


FOUR = """
    import sys
    import jax, numpy as np
    from jax.sharding import PartitionSpec as P
    from test_layouts import GRADIENTS, BATCH, batch_of, config, mesh_of, microbatches, start

    folder, *layouts = sys.argv[1:]
    for layout in layouts:
        cfg = config(layout, accumulation=microbatches(layout))
        with jax.set_mesh(mesh := mesh_of(layout)):
            batch, key = batch_of(cfg, mesh, 0), jax.random.key(1)
            found = GRADIENTS(cfg, start(cfg, mesh), batch, np.int32(BATCH), key)
            found = jax.jit(lambda tree: jax.tree.map(lambda x: jax.reshard(x, P()), tree))(found)
        if jax.process_index() == 0:
            leaves = [x.addressable_shards[0].data for x in jax.tree.leaves(found)]
            np.savez(f"{folder}/{layout}.npz", *leaves)
"""


@pytest.mark.slow
def test_four_processes_compute_what_one_does(tmp_path: Path, alone: tuple[float, Any]) -> None:
    layouts = ["fsdp 4", "data 2 tensor 2", "sequence 2 tensor 2", "stage 4", "stage 2 fsdp 2"]
    launch(4, FOUR, tmp_path, *layouts, limit=600)
    for layout in layouts:
        loss, *leaves = np.load(tmp_path / f"{layout}.npz").values()
        tree = jax.tree.unflatten(jax.tree.structure(alone[1]), leaves)
        assert_close((float(loss), tree), alone)


@pytest.mark.parametrize(
    ("layout", "fault", "proposed"),
    [
        ("tensor 3 data 2", "heads (N = 8) does not divide over mesh.tensor = 3", "data 3"),
        ("stage 8", "10 layers leave one of mesh.stage = 8 without any", "stage 4"),
        (
            "sequence 5",
            "width (D = 32) does not divide over mesh.sequence = 5",
            "stage 5",
        ),
        ("fsdp 6", "width (D = 32) does not divide over mesh.fsdp = 6", "data 3"),
    ],
)
def test_a_layout_that_does_not_divide_is_answered_with_those_that_do(
    layout: str, fault: str, proposed: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_divides(config(layout).model, mesh_of(layout), T)
    line = str(caught.value)
    assert fault in line and proposed in line and "\n" not in line


def test_heads_of_176b_beyond_sixteen_ways() -> None:
    """112 = 16 x 7: what does not split over 32 devices does with positions, or in sevens."""
    big = freeze(base_config("176b"))
    one = {axis: 1 for axis in AXES}
    assert list(faults(big.model, one | {"tensor": 32}, 2048))
    assert not list(faults(big.model, one | {"tensor": 16, "sequence": 2}, 2048))
    assert not list(faults(big.model, one | {"tensor": 28}, 2048))
