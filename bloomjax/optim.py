"""AdamW as BLOOM used it: schedules counted in samples, decay mask, clipping, batch ramp-up.

Source: Megatron-DeepSpeed (learning_rates.py, microbatches.py, optimizer/clip_grads.py) and the
scripts of the tr11 runs. Moments come from optax; the step is written out, so that parameters and
moments are read and written once.
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
) -> tuple[Params, optax.ScaleByAdamState]:
    """One step of decoupled AdamW on gradients times `factor`; everything float32."""
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    scaled = jax.tree.map(lambda g: g * factor, gradients)
    updates, moments = adam.update(scaled, moments)

    def step(path: Any, p: jax.Array, u: jax.Array) -> jax.Array:
        return p - rate * (u + config.weight_decay * p if decays(path) else u)

    return jax.tree_util.tree_map_with_path(step, params, updates), moments
