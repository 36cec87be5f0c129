"""AdamW as BLOOM used it: schedules counted in samples, decay mask, clipping, batch ramp-up.

Source: Megatron-DeepSpeed (learning_rates.py, microbatches.py, optimizer/clip_grads.py) and the
scripts of the tr11 runs. The step is written out, so that parameters and moments are read and
written once, with what clips and what skips a step in the same pass.
"""

import dataclasses
import functools
import math
from bisect import bisect_right
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bloomjax.config import Config, OptimConfig
from bloomjax.model import Params
from bloomjax.sharding import on_cpu


def learning_rate(config: OptimConfig, samples: jax.Array) -> jax.Array:
    """The rate of a step before which `samples` were consumed: linear warm-up, cosine, floor."""
    n = jnp.asarray(samples, jnp.float32)
    top, floor = config.learning_rate, config.min_learning_rate
    warmup, decay = config.warmup_samples, config.decay_samples
    progress = jnp.clip((n - warmup) / max(decay - warmup, 1), 0.0, 1.0)
    cosine = floor + (top - floor) * 0.5 * (1.0 + jnp.cos(math.pi * progress))
    return jnp.where(n <= warmup, top * n / max(warmup, 1), cosine) if warmup else cosine


@dataclasses.dataclass(frozen=True)
class BatchRamp:
    """Sequences a step: from `start` by `increment` to `full` while `samples` are consumed.

    Calling it with a step gives (samples consumed before it, its batch size), a pure function.
    """

    start: int
    increment: int
    samples: int
    full: int

    @classmethod
    def of(cls, config: Config) -> "BatchRamp":
        optim, full = config.optim, config.data.batch_size
        if optim.ramp_start in (0, full):
            return cls(full, 1, 0, full)
        return cls(optim.ramp_start, optim.ramp_increment, optim.ramp_samples, full)

    @functools.cached_property
    def _plateaus(self) -> list[tuple[int, int, int]]:
        """(first step, samples consumed before it, batch size) of each plateau."""
        rungs = (self.full - self.start) // self.increment
        step, consumed, plateaus = 0, 0, []
        while rungs and consumed < self.samples:
            rung = int(consumed / (self.samples / rungs))
            batch = self.start + rung * self.increment
            plateaus.append((step, consumed, batch))
            steps = math.ceil(((rung + 1) * self.samples / rungs - consumed) / batch)
            step, consumed = step + steps, consumed + steps * batch
        return [*plateaus, (step, consumed, self.full)]

    def __call__(self, step: int) -> tuple[int, int]:
        place = bisect_right(self._plateaus, step, key=lambda plateau: plateau[0]) - 1
        first, consumed, batch = self._plateaus[place]
        return consumed + (step - first) * batch, batch


def decays(path: tuple[Any, ...]) -> bool:
    """Weight decay is for matrices, the embedding among them: for no bias and no layer norm."""
    name = path[-1].key
    return name == "embed" or (name.endswith("_w") and "ln" not in name)


def clip_factor(config: OptimConfig, norm: jax.Array) -> jax.Array:
    """What gradients of this global norm are multiplied with (1e-6 is Megatron's)."""
    return jnp.minimum(1.0, config.clip_norm / (norm + 1e-6)) if config.clip_norm else jnp.ones(())


def adamw(
    config: OptimConfig,
    gradients: Params,
    params: Params,
    moments: optax.ScaleByAdamState,
    rate: jax.Array,
    factor: jax.Array,
    apply: jax.Array,
) -> tuple[Params, optax.ScaleByAdamState]:
    """One step of decoupled AdamW (Loshchilov & Hutter 2019) on gradients times `factor`, float32.

    Where `apply` is false everything stays as it was, bit for bit.
    """
    b1, b2, epsilon = config.beta1, config.beta2, config.epsilon

    def first(m: jax.Array, g: jax.Array) -> jax.Array:
        return jnp.where(apply, b1 * m + (1 - b1) * (factor * g), m)

    def second(v: jax.Array, g: jax.Array) -> jax.Array:
        return jnp.where(apply, b2 * v + (1 - b2) * jnp.square(factor * g), v)

    count = moments.count + apply
    mu = jax.tree.map(first, moments.mu, gradients)
    nu = jax.tree.map(second, moments.nu, gradients)
    if on_cpu():
        # XLA:CPU fuses one output at a time: it would form each moment again for the parameters,
        # and copy the old ones aside first. GPU and TPU write all three in one pass.
        mu, nu = jax.lax.optimization_barrier((mu, nu))
    step_size = rate / (1 - b1**count)
    unbias = 1 / (1 - b2**count)

    def step(path: Any, p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        decay = rate * config.weight_decay * p if decays(path) else 0.0
        return jnp.where(apply, p - step_size * m / (jnp.sqrt(v * unbias) + epsilon) - decay, p)

    params = jax.tree_util.tree_map_with_path(step, params, mu, nu)
    return params, optax.ScaleByAdamState(count, mu, nu)
