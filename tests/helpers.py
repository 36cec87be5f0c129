"""What several tests need: a small model's configuration, a mesh of one device, arrays on it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bloomjax.config import ModelConfig, base_config, freeze
from bloomjax.decode import params as decode_params
from bloomjax.formats.names import TABLE, Row, nest
from bloomjax.kernels.packed import Packed, widened
from bloomjax.model import Params, abstract_params, bind
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


def from_hf(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> Params:
    """Tensors under Hugging Face's names -> a parameter tree, in memory."""
    flat = {}
    for row in TABLE:
        names = [row.hf.format(layer) for layer in row.layers(config)]
        layers = [row.to_ours(tensors[name], config.sizes) for name in names]
        flat[row.path] = np.stack(layers) if row.stacked else layers[0]
    return nest(flat)


def to_hf(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """The inverse of `from_hf`; also of gradients and moments, which have the same tree."""
    tensors = {}
    for row in TABLE:
        leaf: Any = params
        for key in row.path.split("."):
            leaf = leaf[key]
        for layer in row.layers(config):
            one = np.asarray(leaf[layer] if row.stacked else leaf)
            tensors[row.hf.format(layer)] = row.to_theirs(one, config.sizes)
    return tensors


def widened_hf(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """Parameters as decoding has them -> tensors under Hugging Face's names: matrices in the dtype
    that they are held in, or float32 where they are quantised."""
    tensors = {}
    for row in TABLE:
        for layer in row.layers(config):
            key = row.path.rpartition(".")[2]
            leaf: Any = params["blocks"][layer][key] if row.stacked else params[key]
            if isinstance(leaf, Packed):
                dtype = jnp.float32 if leaf.scales is not None else leaf.values.dtype
                tensor = np.asarray(widened(leaf, dtype))
            else:
                tensor = row.to_theirs(np.asarray(leaf), config.sizes)
            tensors[row.hf.format(layer)] = tensor
    return tensors


def packed_params(config: ModelConfig, params: Params, mesh: Mesh, dtype: Any = None) -> Params:
    """`params` of training as decoding has them, in floats, on a decode mesh."""
    tensors = to_hf(params, config)
    shapes = decode_params.abstract_params(config, mesh, dtype=dtype)

    def leaf(row: Row, layer: int) -> Any:
        return tensors[row.hf.format(layer)]

    def place(like: Any, tensor: np.ndarray) -> Any:
        if not isinstance(like, Packed):
            return jax.device_put(tensor.astype(like.dtype).reshape(like.shape), like.sharding)
        values = jax.device_put(tensor.astype(like.values.dtype), like.values.sharding)
        return dataclasses.replace(like, values=values)

    tensors_as_tree = decode_params.tree(config, leaf)
    is_packed = lambda node: isinstance(node, Packed)  # noqa: E731
    return jax.tree.map(place, shapes, tensors_as_tree, is_leaf=is_packed)


def forward(params: Params, config: ModelConfig, tokens_BT: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] on one device, in the dtype of `config`."""

    @jax.jit
    def run(params: Params, tokens_BT: jax.Array) -> jax.Array:
        model = bind(config, params)
        return model.logits(model(tokens_BT))

    with jax.set_mesh(mesh := one_device()):
        shapes = abstract_params(config, mesh)
        placed = jax.tree.map(
            lambda a, s: jax.device_put(a.astype(s.dtype), s.sharding), params, shapes
        )
        return np.asarray(run(placed, on_mesh("BT", tokens_BT)))
