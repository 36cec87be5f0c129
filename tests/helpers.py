"""What several tests need: a small model's configuration, a mesh of one device, arrays on it."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bloomjax.config import ModelConfig, base_config, freeze
from bloomjax.sharding import act, make_mesh, put


def model_config(**fields: Any) -> ModelConfig:
    """The model of `base_config`, two layers of width 32 unless `fields` say otherwise."""
    small = {"layers": 2, "width": 32, "heads": 4, "vocab_size": 64, "dtype": "float32"}
    return dataclasses.replace(freeze(base_config()).model, **small | fields)


def one_device() -> Mesh:
    """For `jax.set_mesh`."""
    return make_mesh(freeze(base_config()).mesh, jax.devices()[:1])


def on_mesh(axes: str, array: np.ndarray) -> jax.Array:
    """A host array in the layout that activations of these axes have on the current mesh."""
    return put(array, act(axes), jax.sharding.get_mesh())
