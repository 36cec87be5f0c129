"""One small training state for every step, told from every other, here and in child processes."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from bloomjax.sharding import put, weight


def values(step: int, scale: int = 1) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    params = {"head": {"bias": rng.standard_normal(8)}, "wte": rng.standard_normal((16, 8 * scale))}
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    return {"params": params, "mu": jax.tree.map(lambda x: x * 2, params), "count": np.int32(step)}


def state(step: int, mesh: Mesh, scale: int = 1) -> dict[str, Any]:
    def spec(x: np.ndarray) -> P:
        return weight("VD") if x.ndim == 2 else weight("N") if x.ndim else P()

    return jax.tree.map(lambda x: put(x, spec(x), mesh), values(step, scale))


def shapes(mesh: Mesh, scale: int = 1) -> dict[str, Any]:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0, mesh, scale)
    )


def exact(restored: dict[str, Any], step: int, scale: int = 1) -> None:
    """Every shard that this process holds is bitwise what `values` gave."""

    def same(got: jax.Array, expected: np.ndarray) -> None:
        assert got.dtype == expected.dtype and got.shape == expected.shape
        for shard in got.addressable_shards:
            assert np.asarray(shard.data).tobytes() == expected[shard.index].tobytes()

    expected = values(step, scale)
    jax.tree.map(same, restored, {key: expected[key] for key in restored})
