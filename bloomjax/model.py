"""BLOOM: the decoder that BigScience trained, every parameter declared once.

Letters: B batch, T position, D model, N heads, H head dim, F ffn, V vocabulary, L layers, 3 the
q/k/v triple. Flax holds the parameters; the transforms are plain JAX. Blocks are stacked along L
and scanned for training, unrolled for decoding: the block itself does not know which.

Source of every detail: Megatron-DeepSpeed (megatron/model) and transformers' modeling_bloom.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding

from bloomjax.attention import Dropout, attend
from bloomjax.config import ModelConfig
from bloomjax.kernels.packed import Packed, precision
from bloomjax.parallel import dropout, look_up, lookup, product, stationary, use
from bloomjax.sharding import act, on_cpu, scannable, stack_rows, stream, weight

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Params = dict[str, Any]  # a nested dictionary of arrays, as `abstract_params` shapes it


def compute_dtype(config: ModelConfig) -> Any:
    """float32 on CPU, where bfloat16 products are slow; bfloat16 elsewhere; or as configured."""
    if config.dtype == "auto":
        return jnp.float32 if on_cpu() else jnp.bfloat16
    return jnp.dtype(config.dtype)


def param(
    config: ModelConfig, rngs: nnx.Rngs | None, axes: str, mean: float, std: float
) -> nnx.Param:
    """A parameter of N(mean, std): shape, layout and sharding all follow from its letters. Without
    `rngs`, a shape alone: nothing is traced for it."""
    sizes = config.sizes | {"L": stack_rows(config.layers)}
    shape, layout = tuple(sizes[a] for a in axes), weight(axes)
    if rngs is None:
        return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes)
    value = jnp.full(shape, mean, jnp.float32, out_sharding=layout)
    if std:
        value += std * jax.random.normal(rngs.params(), shape, out_sharding=layout)
    if "L" in axes and shape[0] > config.layers:  # the draws of the others are the same
        row = jnp.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        value = jnp.where(row < config.layers, value, 0.0)
    return nnx.Param(value, axes=axes)


def layer_norm(x_BRD: jax.Array, w_D: nnx.Param, b_D: nnx.Param, epsilon: float) -> jax.Array:
    """Statistics, scale and shift in float32; the result in x's dtype."""
    x = x_BRD.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(variance + epsilon)
    return (normal * use(w_D, jnp.float32) + use(b_D, jnp.float32)).astype(x_BRD.dtype)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The tanh GELU with BLOOM's eight-digit constants (megatron/model/fused_bias_gelu.py).

    The backward pass keeps x alone; left to itself, autodiff would keep the tanh as well.
    """
    return (0.5 * x * (1.0 + jnp.tanh(0.79788456 * x * (1.0 + 0.044715 * x * x)))).astype(x.dtype)


def _gelu_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    tanh = jnp.tanh(0.79788456 * x * (1.0 + 0.044715 * x * x))
    slope = 0.5 * x * ((1.0 - tanh * tanh) * (0.79788456 + 0.1070322243 * x * x))
    return ((g * (slope + 0.5 * (1.0 + tanh))).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


# What the backward pass finds kept, by `run.remat`; weights as products take them never are.
KEPT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names("product"),
    "block": jax.checkpoint_policies.nothing_saveable,
}


def _named(x: jax.Array) -> jax.Array:
    return checkpoint_name(x, "product")


class Block(nnx.Module):
    """One layer; with `stack="L"` all of them, each parameter stacked along a leading axis."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None, stack: str = ""):
        self.config = config
        # Products that write to the residual stream start smaller: 2L of them add up.
        std, std_out = config.init_std, config.init_std / np.sqrt(2 * config.layers)

        def declare(axes: str, mean: float = 0.0, std: float = 0.0) -> nnx.Param:
            return param(config, rngs, stack + axes, mean, std)

        self.ln1_w, self.ln1_b = declare("D", mean=1.0), declare("D")
        self.qkv_w, self.qkv_b = declare("DN3H", std=std), declare("N3H")
        self.out_w, self.out_b = declare("NHD", std=std_out), declare("D")
        self.ln2_w, self.ln2_b = declare("D", mean=1.0), declare("D")
        self.up_w, self.up_b = declare("DF", std=std), declare("F")
        self.down_w, self.down_b = declare("FD", std=std_out), declare("D")

    def __call__(
        self,
        x_BRD: jax.Array,
        attention: Attention,
        key: jax.Array | None = None,
        letter: str = "T",
    ) -> jax.Array:
        """The residual stream through one layer; `letter` is that of its positions (`stream`).

        `attention` maps q, k, v [B, T, N, H] to the attended values: causal over the same T, or
        over a cache. `key` turns dropout on."""
        config, dtype = self.config, x_BRD.dtype
        keys = (None, None) if key is None else jax.random.split(key)
        axes = f"B{letter}D"

        h_BRD = layer_norm(x_BRD, self.ln1_w, self.ln1_b, config.layer_norm_epsilon)
        residual = h_BRD if config.apply_residual_connection_post_layernorm else x_BRD
        qkv_BTN3H = _named(product(h_BRD, self.qkv_w, letter))
        q_NH, k_NH, v_NH = jnp.moveaxis(use(self.qkv_b, dtype), 1, 0)
        # The softmax cancels what the key bias adds (the same to every key of a query), so its
        # gradient is zero; computed, it is rounding noise that Adam turns into full-size steps.
        biases = q_NH, jax.lax.stop_gradient(k_NH), v_NH
        qkv = (qkv_BTN3H[..., i, :] + b_NH for i, b_NH in enumerate(biases))
        a_BTNH = _named(attention(*qkv))
        a_BRD = _named(product(a_BTNH, self.out_w, letter)) + use(self.out_b, dtype)
        x_BRD = residual + dropout(a_BRD, config.hidden_dropout, keys[0], axes)

        h_BRD = layer_norm(x_BRD, self.ln2_w, self.ln2_b, config.layer_norm_epsilon)
        residual = h_BRD if config.apply_residual_connection_post_layernorm else x_BRD
        h_BTF = _named(product(h_BRD, self.up_w, letter)) + use(self.up_b, dtype)
        h_BRD = _named(product(gelu(h_BTF), self.down_w, letter)) + use(self.down_b, dtype)
        return residual + dropout(h_BRD, config.hidden_dropout, keys[1], axes)

    def layer(
        self, x_BRD: jax.Array, key: jax.Array | None, letter: str, segments_BT: Any = None
    ) -> jax.Array:
        """As `__call__`, with the attention of training: over the same T, packed or not."""
        config, dropped = self.config, None
        if key is not None:
            key_attention, key = jax.random.split(key)
            if config.attention_dropout:
                dropped = Dropout(config.attention_dropout, key_attention)
        attention = functools.partial(
            attend,
            segments_BT=segments_BT,
            round_alibi=config.alibi_dtype == "compute",
            dropout=dropped,
        )
        return self(x_BRD, attention, key, letter)


class Bloom(nnx.Module):
    """Embedding and its layer norm, the blocks, the last layer norm; the head is the embedding.

    The blocks are one stack, which `__call__` scans: one layer to compile, for training. With
    `unrolled` they are a list of packed weights, which `decode` walks.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None, unrolled: bool = False):
        self.config = config
        declare = functools.partial(param, config, rngs)
        self.embed = declare("VD", mean=0.0, std=config.init_std)
        self.embed_ln_w, self.embed_ln_b = declare("D", 1.0, 0.0), declare("D", 0.0, 0.0)
        self.blocks: Any = (
            nnx.List([Block(config, rngs) for _ in range(config.layers)])
            if unrolled
            else Block(config, rngs, stack="L")
        )
        self.ln_w, self.ln_b = declare("D", 1.0, 0.0), declare("D", 0.0, 0.0)

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        segments_BT: jax.Array | None = None,
        key: jax.Array | None = None,
        remat: str = "none",
    ) -> jax.Array:
        """Token ids -> the normalised hidden state x_BRD that the head reads (`loss`, `logits`).

        `segments_BT` keeps packed sequences apart (0: padding, left or right). `key` turns dropout
        on. `remat` says what the backward pass computes again: nothing ("none"), all but the
        matrix products ("dots"), everything inside a block ("block").
        """
        config, letter = self.config, stream(tokens_BT.shape[1])
        graph, stack = nnx.split(self.blocks)

        def layer(x_BRD: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
            params, key = inputs
            return nnx.merge(graph, params).layer(x_BRD, key, letter, segments_BT), None

        layer = jax.checkpoint(layer, policy=KEPT[remat], prevent_cse=False)
        x_BRD = self.embed_tokens(tokens_BT, letter)
        keys = None
        if key is not None:
            key, embed_key = jax.random.split(key)
            x_BRD = dropout(x_BRD, config.hidden_dropout, embed_key, f"B{letter}D")
            keys = jax.random.split(key, config.layers)
        x_BRD, _ = jax.lax.scan(layer, x_BRD, (scannable(stack), keys))
        return self.last_norm(x_BRD)

    def decode(
        self, tokens_BS: jax.Array, layer: Callable[[int, Block, jax.Array], jax.Array]
    ) -> jax.Array:
        """As `__call__`, through a list of blocks; `layer` takes the stream through one of them."""
        table = self.embed.get_value()
        x_BSD = look_up(table, jax.reshard(tokens_BS, act("1S")), compute_dtype(self.config))
        epsilon = self.config.layer_norm_epsilon
        x_BSD = layer_norm(x_BSD, self.embed_ln_w, self.embed_ln_b, epsilon)
        for i, block in enumerate(self.blocks):
            x_BSD = layer(i, block, x_BSD)
        return self.last_norm(x_BSD)

    def embed_tokens(self, tokens_BT: jax.Array, letter: str = "T") -> jax.Array:
        """Token ids -> embeddings through their layer norm, to the stream, in the compute dtype."""
        tokens_BT = jax.reshard(tokens_BT, act("BT"))
        x_BRD = lookup(self.embed[...], tokens_BT, compute_dtype(self.config), letter)
        return layer_norm(x_BRD, self.embed_ln_w, self.embed_ln_b, self.config.layer_norm_epsilon)

    def last_norm(self, x_BTD: jax.Array) -> jax.Array:
        return layer_norm(x_BTD, self.ln_w, self.ln_b, self.config.layer_norm_epsilon)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """float32 [B, T, V], split over V, of what `__call__` returned. Training never asks."""
        if isinstance(table := self.embed.get_value(), Packed):
            return stationary(x_BTD, table, jnp.float32)
        x_BTD, embed_VD = jax.reshard(x_BTD, act("BTD")), use(self.embed, x_BTD.dtype)
        return jnp.einsum(
            "BTD,VD->BTV",
            x_BTD,
            embed_VD,
            precision=precision(x_BTD.dtype),
            preferred_element_type=jnp.float32,
            out_sharding=act("BTV"),
        )


def _graph(config: ModelConfig, unrolled: bool = False) -> tuple[Any, Any]:
    return _graph_of(config, unrolled, stack_rows(config.layers))


@functools.cache
def _graph_of(config: ModelConfig, unrolled: bool, rows: int) -> tuple[Any, Any]:
    return nnx.split(Bloom(config, None, unrolled))


def bind(config: ModelConfig, params: Params, unrolled: bool = False) -> Bloom:
    """The model with these parameters; call it where a mesh is set (`jax.set_mesh`)."""
    return nnx.merge(_graph(config, unrolled)[0], params)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters, float32, in the layout of the current mesh; to be called under jit.

    The values are the same on every mesh.
    """
    return nnx.to_pure_dict(nnx.state(Bloom(config, nnx.Rngs(key))))


def abstract_params(config: ModelConfig, mesh: Mesh) -> Params:
    """Shape, dtype and layout on `mesh` of every parameter, none of them allocated."""

    def shaped(p: nnx.Param) -> jax.ShapeDtypeStruct:
        value, layout = p.get_value(), NamedSharding(mesh, weight(p.axes))
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=layout)

    with jax.set_mesh(mesh):
        _, state = _graph(config)
    return nnx.to_pure_dict(
        jax.tree.map(shaped, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    )


def axes_of(config: ModelConfig) -> Params:
    """The letters of every parameter; "" for none."""
    _, state = _graph(config)
    is_param = lambda leaf: isinstance(leaf, nnx.Param)  # noqa: E731
    return nnx.to_pure_dict(jax.tree.map(lambda p: p.axes, state, is_leaf=is_param))


def with_dtype(shapes: Params, dtype: Any) -> Params:
    """`abstract_params` as they are in another dtype."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(dtype), sharding=s.sharding), shapes
    )
