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
from jax.sharding import Mesh, NamedSharding

from bloomjax.attention import attend
from bloomjax.config import ModelConfig
from bloomjax.sharding import act, offset_of, on_cpu, reduce_gradient, split_of, sum_over, weight

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Params = dict[str, Any]  # a nested dictionary of arrays, as `abstract_params` shapes it


def compute_dtype(config: ModelConfig) -> Any:
    """float32 on CPU, where bfloat16 products are slow; bfloat16 elsewhere; or as configured."""
    if config.dtype == "auto":
        return jnp.float32 if on_cpu() else jnp.bfloat16
    return jnp.dtype(config.dtype)


def param(config: ModelConfig, rngs: nnx.Rngs, axes: str, mean: float, std: float) -> nnx.Param:
    """A parameter of N(mean, std): shape, layout and sharding all follow from its letters."""
    shape, layout = tuple(config.sizes[a] for a in axes), weight(axes)
    value = jnp.full(shape, mean, jnp.float32, out_sharding=layout)
    if std:
        value += std * jax.random.normal(rngs.params(), shape, out_sharding=layout)
    return nnx.Param(value, axes=axes)


def use(parameter: nnx.Param, dtype: Any) -> jax.Array:
    """The parameter as a product needs it: cast, then gathered over what only splits it at rest.

    Its last letters name its axes: a block's share of a stack has lost the leading L.
    """
    value = parameter[...]
    return jax.reshard(value.astype(dtype), act(parameter.axes[-value.ndim :]))


def product(x: jax.Array, parameter: nnx.Param) -> jax.Array:
    """x [B, T, ...] times a weight, contracted over the weight's first axes -> [B, T, its others].

    As a product of two matrices: over several axes at once, XLA:CPU transposes weights and
    gradients in every layer. Heads lead what they are merged with, so their split stays whole.
    """
    w = use(parameter, x.dtype)
    axes = parameter.axes[-w.ndim :]
    contracted = x.ndim - 2
    i, j = axes[0], axes[contracted]
    x = x.reshape(*x.shape[:2], -1, out_sharding=act("BT" + i))
    matrix = w.reshape(x.shape[-1], -1, out_sharding=act(i + j))
    y = jnp.einsum(
        "BTi,ij->BTj", x, matrix, preferred_element_type=x.dtype, out_sharding=act("BT" + j)
    )
    rest = w.shape[contracted:]
    return y.reshape(*x.shape[:2], *rest, out_sharding=act("BT" + axes[contracted:]))


def layer_norm(x_BTD: jax.Array, w_D: nnx.Param, b_D: nnx.Param, epsilon: float) -> jax.Array:
    """Statistics, scale and shift in float32; the result in x's dtype."""
    x = x_BTD.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(variance + epsilon)
    return (normal * use(w_D, jnp.float32) + use(b_D, jnp.float32)).astype(x_BTD.dtype)


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


def dropout(x: jax.Array, rate: float, key: jax.Array | None, axes: str) -> jax.Array:
    """Zero a share `rate` of x and scale the rest up; without a key, x. Any mesh drops the same."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape, out_sharding=act(axes))
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def local_rows(ids: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Inside shard_map: ids of V -> rows of this device's piece, and whether they are in it."""
    local = ids - offset_of("V", rows)
    return jnp.clip(local, 0, rows - 1), (local >= 0) & (local < rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(embed_VD: jax.Array, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    """Rows of a vocabulary-parallel embedding, [B, T, D] in `dtype`.

    The gradient is summed in float32: frequent tokens would drown in bfloat16.
    """

    def local(embed: jax.Array, tokens: jax.Array) -> jax.Array:
        row, mine = local_rows(tokens, embed.shape[0])
        return sum_over("V", jnp.where(mine[..., None], embed[row], 0))

    return jax.shard_map(
        local, in_specs=(act("VD"), act("BT")), out_specs=act("BTD"), check_vma=False
    )(jax.reshard(embed_VD.astype(dtype), act("VD")), tokens_BT)


def _lookup_forward(embed_VD: jax.Array, tokens_BT: jax.Array, dtype: Any) -> Any:
    return lookup(embed_VD, tokens_BT, dtype), (embed_VD, tokens_BT)


def _lookup_backward(dtype: Any, kept: Any, g_BTD: jax.Array) -> Any:
    embed_VD, tokens_BT = kept
    rows = embed_VD.shape[0] // split_of("V")

    def local(tokens: jax.Array, g: jax.Array) -> jax.Array:
        row, mine = local_rows(tokens, rows)
        g = jnp.where(mine[..., None], g.astype(jnp.float32), 0)
        gradient = jnp.zeros((rows, g.shape[-1]), jnp.float32).at[row].add(g)
        return reduce_gradient(gradient, "VD").astype(embed_VD.dtype)

    gradient = jax.shard_map(
        local, in_specs=(act("BT"), act("BTD")), out_specs=weight("VD"), check_vma=False
    )(tokens_BT, g_BTD)
    return gradient, np.zeros(tokens_BT.shape, jax.dtypes.float0)


lookup.defvjp(_lookup_forward, _lookup_backward)


# What the backward pass finds kept, by `run.remat`. Weights as `product` takes them are never kept:
# a layer's copy of each would be, cast, gathered and flattened.
_USE = ("convert_element_type", "reshard", "reshape")
KEPT = {
    "none": lambda operation, *_, **__: operation.name not in _USE,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
}


class Block(nnx.Module):
    """One layer; with `stack="L"` all of them, each parameter stacked along a leading axis."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: str = ""):
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
        self, x_BTD: jax.Array, attention: Attention, key: jax.Array | None = None
    ) -> jax.Array:
        """x_BTD through one layer. `attention` maps q, k, v [B, T, N, H] to the attended values:
        causal over the same T, or over a cache. `key` turns dropout on."""
        config, dtype = self.config, x_BTD.dtype
        keys = (None, None) if key is None else jax.random.split(key)

        h_BTD = layer_norm(x_BTD, self.ln1_w, self.ln1_b, config.layer_norm_epsilon)
        residual = h_BTD if config.apply_residual_connection_post_layernorm else x_BTD
        qkv_BTN3H = product(h_BTD, self.qkv_w)
        q_NH, k_NH, v_NH = jnp.moveaxis(use(self.qkv_b, dtype), 1, 0)
        # The softmax cancels what the key bias adds (the same to every key of a query), so its
        # gradient is zero; computed, it is rounding noise that Adam turns into full-size steps.
        biases = q_NH, jax.lax.stop_gradient(k_NH), v_NH
        a_BTNH = attention(*(qkv_BTN3H[..., i, :] + b_NH for i, b_NH in enumerate(biases)))
        a_BTD = product(a_BTNH, self.out_w) + use(self.out_b, dtype)
        x_BTD = residual + dropout(a_BTD, config.hidden_dropout, keys[0], "BTD")

        h_BTD = layer_norm(x_BTD, self.ln2_w, self.ln2_b, config.layer_norm_epsilon)
        residual = h_BTD if config.apply_residual_connection_post_layernorm else x_BTD
        h_BTF = product(h_BTD, self.up_w) + use(self.up_b, dtype)
        h_BTD = product(gelu(h_BTF), self.down_w) + use(self.down_b, dtype)
        return residual + dropout(h_BTD, config.hidden_dropout, keys[1], "BTD")


class Bloom(nnx.Module):
    """Embedding and its layer norm, the blocks, the last layer norm; the head is the embedding.

    The blocks are one stack, which `__call__` scans: one layer to compile, for training. With
    `unrolled` they are a list, which `decode` walks: no layer has to be sliced out of a stack.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, unrolled: bool = False):
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
        """Token ids -> the normalised hidden state x_BTD that the head reads (`loss`, `logits`).

        `segments_BT` keeps packed sequences apart (0: padding, left or right). `key` turns dropout
        on. `remat` says what the backward pass computes again: nothing ("none"), all but the
        matrix products ("dots"), everything inside a block ("block").
        """
        config = self.config
        stack_graph, stack = nnx.split(self.blocks)

        def layer(x_BTD: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
            params, key = inputs
            key_attention, key_block = (None, None) if key is None else jax.random.split(key)

            def drop(probs_BNTS: jax.Array, chunk: int) -> jax.Array:
                assert key_attention is not None
                chunk_key = jax.random.fold_in(key_attention, chunk)
                return dropout(probs_BNTS, config.attention_dropout, chunk_key, "BNTS")

            attention = functools.partial(
                attend,
                segments_BT=segments_BT,
                round_alibi=config.alibi_dtype == "compute",
                drop=None if key is None or not config.attention_dropout else drop,
            )
            block = nnx.merge(stack_graph, params)
            return block(x_BTD, attention, key_block), None

        layer = jax.checkpoint(layer, policy=KEPT[remat], prevent_cse=False)
        keys = None
        x_BTD = self.embed_tokens(tokens_BT)
        if key is not None:
            key, embed_key = jax.random.split(key)
            x_BTD = dropout(x_BTD, config.hidden_dropout, embed_key, "BTD")
            keys = jax.random.split(key, config.layers)
        x_BTD, _ = jax.lax.scan(layer, x_BTD, (stack, keys))
        return self.last_norm(x_BTD)

    def decode(self, tokens_BT: jax.Array, attention: Callable[[int], Attention]) -> jax.Array:
        """As `__call__`, through a list of blocks; `attention(i)` is layer i's, over its cache."""
        x_BTD = self.embed_tokens(tokens_BT)
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, attention(i))
        return self.last_norm(x_BTD)

    def embed_tokens(self, tokens_BT: jax.Array) -> jax.Array:
        """Token ids -> embeddings through their layer norm, [B, T, D] in the compute dtype."""
        tokens_BT = jax.reshard(tokens_BT, act("BT"))
        x_BTD = lookup(self.embed[...], tokens_BT, compute_dtype(self.config))
        return layer_norm(x_BTD, self.embed_ln_w, self.embed_ln_b, self.config.layer_norm_epsilon)

    def last_norm(self, x_BTD: jax.Array) -> jax.Array:
        return layer_norm(x_BTD, self.ln_w, self.ln_b, self.config.layer_norm_epsilon)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """float32 [B, T, V], split over V, of what `__call__` returned. Training never asks."""
        embed_VD = use(self.embed, x_BTD.dtype)
        return jnp.einsum(
            "BTD,VD->BTV",
            x_BTD,
            embed_VD,
            preferred_element_type=jnp.float32,
            out_sharding=act("BTV"),
        )


@functools.cache
def _graph(config: ModelConfig, unrolled: bool = False) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: Bloom(config, nnx.Rngs(0), unrolled)))


def bind(config: ModelConfig, params: Params, unrolled: bool = False) -> Bloom:
    """The model with these parameters; call it where a mesh is set (`jax.set_mesh`)."""
    return nnx.merge(_graph(config, unrolled)[0], params)


def unroll(params: Params) -> Params:
    """Parameters of a stack of blocks -> of a list of blocks. Copies them; to be jitted."""
    layers = jax.tree.leaves(params["blocks"])[0].shape[0]
    blocks = {i: jax.tree.map(lambda p, i=i: p[i], params["blocks"]) for i in range(layers)}
    return {**params, "blocks": blocks}


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


def with_dtype(shapes: Params, dtype: Any) -> Params:
    """`abstract_params` as they are in another dtype."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(dtype), sharding=s.sharding), shapes
    )
