"""One training step and one evaluation step, compiled once for every batch size of a run.

Letters: A microbatches, B rows of a microbatch, T position. The invariant: a batch is
{tokens, targets, weights}_ABT with weight 0 wherever there is nothing to learn, and the loss is
the weighted mean over the whole of it, however it is cut into microbatches and over the mesh.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from bloomjax import model, optim, pipeline
from bloomjax.config import Config
from bloomjax.loss import cross_entropy
from bloomjax.model import Params
from bloomjax.sharding import act, split_of

Batch = dict[str, jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "samples", "skipped", "streak", "params", "moments"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a run carries from step to step. Scalars are int32."""

    step: jax.Array  # steps done
    samples: jax.Array  # sequences consumed, by skipped steps too
    skipped: jax.Array  # steps that changed nothing, since their gradients were not finite
    streak: jax.Array  # how many of those came last, in a row
    params: Params
    moments: optax.ScaleByAdamState

    def as_tree(self) -> dict[str, Any]:
        """Nested dictionaries, as a checkpoint holds them."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {"moments": self.moments._asdict()}

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> "TrainState":
        return cls(**tree | {"moments": optax.ScaleByAdamState(**tree["moments"])})


def _init(config: Config) -> TrainState:
    return start_from(model.init_params(config.model, jax.random.key(config.run.seed)))


def init_state(config: Config) -> TrainState:
    """A fresh state on the current mesh; the same values on every mesh."""
    return jax.jit(_init, static_argnums=0)(config)


@jax.jit
def start_from(params: Params) -> TrainState:
    """A fresh state of these parameters, which become float32."""
    zero = jnp.zeros((), jnp.int32)
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    return TrainState(zero, zero, zero, zero, params, optax.scale_by_adam().init(params))


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shape, dtype and layout of every leaf of the state on `mesh`, none of them allocated."""

    def shaped(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        layout = NamedSharding(mesh, leaf.sharding.spec if leaf.sharding else act(""))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)

    with jax.set_mesh(mesh):
        return jax.tree.map(shaped, jax.eval_shape(functools.partial(_init, config)))


def loss_fn(config: Config, params: Params, batch_BT: Batch, key: jax.Array | None) -> jax.Array:
    """Sum of weight * negative log-likelihood, in nats."""
    bloom = model.bind(config.model, params)
    x_BTD = bloom(batch_BT["tokens"], key=key, remat=config.run.remat)
    return cross_entropy(x_BTD, params["embed"], batch_BT["targets"], batch_BT["weights"])


def loss_and_gradients(
    config: Config, params: Params, batch_ABT: Batch, count: jax.Array, key: jax.Array
) -> tuple[jax.Array, Params]:
    """`loss_fn` summed over microbatches, and its gradients in float32; `key` is for dropout.

    While the batch ramps up, microbatches without one of the first `count` rows are not run.
    """
    A, B, _ = batch_ABT["tokens"].shape
    microbatches = (count + B - 1) // B
    dropout = config.model.hidden_dropout or config.model.attention_dropout
    if split_of("L") > 1:
        return pipeline.loss_and_gradients(
            config, params, batch_ABT, microbatches, key if dropout else None
        )

    def microbatch(a: jax.Array | int) -> tuple[jax.Array, Params]:
        batch_BT = jax.tree.map(lambda x: x[a], batch_ABT)
        key_a = jax.random.fold_in(key, a) if dropout else None
        return jax.value_and_grad(functools.partial(loss_fn, config))(
            params, batch_BT=batch_BT, key=key_a
        )

    if A == 1:
        return microbatch(0)

    def add(a: jax.Array, total: Any) -> Any:
        return jax.tree.map(jnp.add, total, microbatch(a))

    start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.fori_loop(0, microbatches, add, start)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(
    config: Config, state: TrainState, batch_ABT: Batch, count: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of AdamW on the first `count` rows of a batch [A, B, T].

    Where the gradient is not finite, parameters and moments stay as they were; the samples count
    as consumed all the same. The report holds scalars: loss, grad_norm, lr, tokens, finite, the
    state's counts, and `checksum`, which tells tokens and their places apart and is the same on
    every mesh and under any accumulation.
    """
    weights = batch_ABT["weights"]
    tokens = (weights > 0).sum()
    batch_ABT = batch_ABT | {"weights": weights / weights.sum()}
    step_key = jax.random.fold_in(jax.random.key(config.run.seed), state.step)
    loss, gradients = loss_and_gradients(config, state.params, batch_ABT, count, step_key)

    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    rate = optim.learning_rate(config.optim, state.samples)
    factor = optim.clip_factor(config.optim, norm)
    params, moments = optim.adamw(
        config.optim, gradients, state.params, state.moments, rate, factor, apply=finite
    )
    state = TrainState(
        step=state.step + 1,
        samples=state.samples + count,
        skipped=state.skipped + ~finite,
        streak=jnp.where(finite, 0, state.streak + 1),
        params=params,
        moments=moments,
    )
    return state, {
        "loss": loss,
        "grad_norm": norm,
        "lr": rate,
        "tokens": tokens,
        "finite": finite,
        "samples": state.samples,
        "skipped": state.skipped,
        "streak": state.streak,
        "checksum": _checksum(batch_ABT["tokens"], count),
    }


@functools.partial(jax.jit, static_argnums=0)
def eval_step(config: Config, params: Params, batch_ABT: Batch) -> jax.Array:
    """Sum of weight * negative log-likelihood over a batch [A, B, T], in nats."""
    if split_of("L") > 1:
        return pipeline.loss(config, params, batch_ABT)
    total = jnp.float32(0)
    for a in range(len(batch_ABT["tokens"])):
        total += loss_fn(config, params, {name: x[a] for name, x in batch_ABT.items()}, None)
    return total


def _checksum(tokens_ABT: jax.Array, count: jax.Array) -> jax.Array:
    """uint32: each token times an odd number of its place (sample of the step, position)."""
    A, B, T = tokens_ABT.shape
    sample_AB = jnp.arange(A)[:, None] * B + jnp.arange(B)
    place_ABT = (sample_AB[..., None] * T + jnp.arange(T)).astype(jnp.uint32)
    hashed = (tokens_ABT.astype(jnp.uint32) + 1) * (place_ABT * jnp.uint32(2654435761) | 1)
    return jnp.where((sample_AB < count)[..., None], hashed, 0).sum(dtype=jnp.uint32)


def batch_shape(config: Config, mesh: Mesh) -> tuple[int, int]:
    """(A, B): microbatches a step, and rows of each, padded up to what the mesh divides."""
    parts = NamedSharding(mesh, act("B")).shard_shape((mesh.size,))
    pieces = mesh.size // parts[0]
    A = config.run.accumulation
    rows = -(-config.data.batch_size // A)
    return A, -(-rows // pieces) * pieces


def eval_shape(config: Config, mesh: Mesh) -> tuple[int, int]:
    """(A, B) of an evaluation's batches: microbatches only where they fill a pipeline."""
    A, B = batch_shape(config, mesh)
    with jax.set_mesh(mesh):
        return (A if split_of("L") > 1 else 1), B
