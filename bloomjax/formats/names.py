"""One table: every parameter of BLOOM, its name in each foreign format, and how layouts differ.

Letters as everywhere. A row's `to_ours` and `to_theirs` are inverse to each other and touch one
layer's tensor at a time; they only reshape and transpose, so they work on numpy and JAX arrays.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from bloomjax.config import ModelConfig
from bloomjax.errors import InputError
from bloomjax.model import Params

Layout = Callable[[Any, dict[str, int]], Any]


class Row(NamedTuple):
    path: str  # ours: keys of the parameter tree joined by dots; blocks are stacked along L
    hf: str  # Hugging Face's, without the optional prefix `transformer.`; {} is the layer
    to_ours: Layout
    to_theirs: Layout


def _same(a: Any, n: dict[str, int]) -> Any:
    return a


# Torch's linear layers are [out, in]; features of the fused QKV are [heads, 3, head dim], and what
# attention puts out is [heads, head dim].
_LINEAR = (lambda a, n: a.T, lambda a, n: a.T)
_QKV = (
    lambda a, n: a.T.reshape(n["D"], n["N"], 3, n["H"]),
    lambda a, n: a.reshape(n["D"], 3 * n["D"]).T,
)
_QKV_BIAS = (
    lambda a, n: a.reshape(n["N"], 3, n["H"]),
    lambda a, n: a.reshape(3 * n["D"]),
)
_OUT = (
    lambda a, n: a.T.reshape(n["N"], n["H"], n["D"]),
    lambda a, n: a.reshape(n["D"], n["D"]).T,
)

TABLE = (
    Row("embed", "word_embeddings.weight", _same, _same),
    Row("embed_ln_w", "word_embeddings_layernorm.weight", _same, _same),
    Row("embed_ln_b", "word_embeddings_layernorm.bias", _same, _same),
    Row("blocks.ln1_w", "h.{}.input_layernorm.weight", _same, _same),
    Row("blocks.ln1_b", "h.{}.input_layernorm.bias", _same, _same),
    Row("blocks.qkv_w", "h.{}.self_attention.query_key_value.weight", *_QKV),
    Row("blocks.qkv_b", "h.{}.self_attention.query_key_value.bias", *_QKV_BIAS),
    Row("blocks.out_w", "h.{}.self_attention.dense.weight", *_OUT),
    Row("blocks.out_b", "h.{}.self_attention.dense.bias", _same, _same),
    Row("blocks.ln2_w", "h.{}.post_attention_layernorm.weight", _same, _same),
    Row("blocks.ln2_b", "h.{}.post_attention_layernorm.bias", _same, _same),
    Row("blocks.up_w", "h.{}.mlp.dense_h_to_4h.weight", *_LINEAR),
    Row("blocks.up_b", "h.{}.mlp.dense_h_to_4h.bias", _same, _same),
    Row("blocks.down_w", "h.{}.mlp.dense_4h_to_h.weight", *_LINEAR),
    Row("blocks.down_b", "h.{}.mlp.dense_4h_to_h.bias", _same, _same),
    Row("ln_w", "ln_f.weight", _same, _same),
    Row("ln_b", "ln_f.bias", _same, _same),
)


def from_hf(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> Params:
    """Tensors under Hugging Face's names -> a parameter tree. InputError lists what is missing."""
    tensors = {name.removeprefix("transformer."): a for name, a in tensors.items()}
    missing = [name for row in TABLE for name in _names(row, config) if name not in tensors]
    if missing:
        raise InputError(f"tensors are missing: {', '.join(missing)}")
    flat = {}
    for row in TABLE:
        layers = [row.to_ours(tensors[name], config.sizes) for name in _names(row, config)]
        flat[row.path] = np.stack(layers) if "{}" in row.hf else layers[0]
    return nest(flat)


def to_hf(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """The inverse of `from_hf`; also of gradients and moments, which have the same tree."""
    tensors = {}
    for row in TABLE:
        leaf: Any = params
        for key in row.path.split("."):
            leaf = leaf[key]
        for layer, name in enumerate(_names(row, config)):
            one = np.asarray(leaf[layer] if "{}" in row.hf else leaf)
            tensors[name] = row.to_theirs(one, config.sizes)
    return tensors


def _names(row: Row, config: ModelConfig) -> list[str]:
    return [row.hf.format(i) for i in range(config.layers if "{}" in row.hf else 1)]


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"blocks.up_w": a} -> {"blocks": {"up_w": a}}."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
