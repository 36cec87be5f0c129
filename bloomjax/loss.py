"""The tied head and its cross-entropy as one operation that never holds the whole logits.

Letters: B batch, T position, D model, V vocabulary, C tokens of a chunk. The head is 46 % of the
matrix products of bloom-560m. For each chunk of tokens the forward pass makes the logits over the
full vocabulary, reduces them, and at once turns them into the gradient: three matrix products in
all, where recomputing the logits for a backward pass would need four (the idea of Liger Kernel's
fused linear cross-entropy). Where V is split, each device keeps its columns, and three numbers a
token are exchanged.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bloomjax.parallel import local_rows
from bloomjax.sharding import (
    act,
    gather_weight,
    join_stream,
    max_over,
    on_devices,
    reduce_gradient,
    stream,
    sum_over,
    sum_to_stream,
    weight,
)

# Bytes of logits that one device holds at once.
LOGITS_BYTES = 2**30


@jax.custom_vjp
def cross_entropy(
    x_BRD: jax.Array, embed_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> jax.Array:
    """Sum over tokens of weight * -log softmax(x E^T)[target]: float32, in nats.

    `embed_VD` is the parameter as it rests. Products run, and logits are kept, in x's dtype;
    reductions are float32. Targets and weights get no gradient.
    """
    (loss,) = _over_devices(x_BRD, embed_VD, targets_BT, weights_BT, gradient=False)
    return loss


def _forward(x_BRD: jax.Array, embed_VD: jax.Array, targets_BT: Any, weights_BT: Any) -> Any:
    loss, *gradients = _over_devices(x_BRD, embed_VD, targets_BT, weights_BT, gradient=True)
    return loss, gradients


def _backward(gradients: Any, g: jax.Array) -> Any:
    dx_BRD, d_embed_VD = gradients
    B, T, _ = dx_BRD.shape
    return (
        (g * dx_BRD).astype(dx_BRD.dtype),
        g * d_embed_VD,
        np.zeros((B, T), jax.dtypes.float0),
        None,
    )


cross_entropy.defvjp(_forward, _backward)


def _over_devices(x_BRD: Any, embed_VD: Any, targets: Any, weights: Any, *, gradient: bool) -> Any:
    """(loss,), or with its gradients by x, and by E in E's layout at rest."""
    letter = stream(targets.shape[1])

    def local(x_BRD: Any, embed_VD: Any, targets: Any, weights: Any) -> Any:
        embed_VD = gather_weight(embed_VD.astype(x_BRD.dtype), "VD")
        total = jnp.zeros(embed_VD.shape if gradient else (), jnp.float32)
        loss, dx_BRD, total = head(x_BRD, embed_VD, targets, weights, total, letter)
        loss = sum_over("T", sum_over("B", loss))
        return (loss, dx_BRD, reduce_gradient(total, "VD")) if gradient else (loss,)

    x, rest = act(f"B{letter}D"), weight("VD")
    outs = (act(""), x, rest) if gradient else (act(""),)
    run = on_devices(local, (x, rest, act("BT"), act("BT")), outs)
    return run(x_BRD, embed_VD, targets, weights)


def head(
    x_BRD: jax.Array,
    embed_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    total_VD: jax.Array,
    letter: str,
) -> tuple[jax.Array, Any, jax.Array]:
    """On a device: the loss of its tokens, its gradient by x as the stream has it, and `total_VD`
    plus its gradient by this piece of E, float32. With a scalar `total_VD`, the loss alone."""
    gradient, dtype = total_VD.ndim > 0, x_BRD.dtype
    x_BTD = join_stream(x_BRD, letter)
    B, T, D = x_BTD.shape
    V = embed_VD.shape[0]
    chunks = math.ceil(B * T * V * dtype.itemsize / LOGITS_BYTES)
    C = math.ceil(B * T / chunks)

    def split(a: jax.Array) -> jax.Array:  # [B, T, ...] -> [chunks, C, ...], weight 0 at the end
        a = a.reshape(B * T, *a.shape[2:])
        a = jnp.pad(a, [(0, chunks * C - B * T)] + [(0, 0)] * (a.ndim - 1))
        return a.reshape(chunks, C, *a.shape[1:])

    def chunk(carry: Any, inputs: Any) -> Any:
        loss, total_VD = carry
        x_CD, targets_C, weights_C = inputs
        logits_CV = jnp.einsum("CD,VD->CV", x_CD, embed_VD, preferred_element_type=dtype)
        # Or XLA may spare some uses the rounding to `dtype`: then the maximum is not one, the
        # exponential can overflow, and a loss can be negative.
        logits_CV = jax.lax.optimization_barrier(logits_CV)
        top_C = max_over("V", logits_CV.max(-1)).astype(jnp.float32)
        logits_CV32 = logits_CV.astype(jnp.float32)
        total_C = sum_over("V", jnp.exp(logits_CV32 - top_C[:, None]).sum(-1))
        normaliser_C = top_C + jnp.log(total_C)
        column_C, mine_C = local_rows(targets_C, V)
        target_C = jnp.take_along_axis(logits_CV, column_C[:, None], 1)[:, 0]
        target_C = sum_over("V", jnp.where(mine_C, target_C.astype(jnp.float32), 0))
        loss += (weights_C * (normaliser_C - target_C)).sum()
        if not gradient:
            return (loss, total_VD), None
        # softmax - [column is the target]: compared in the pass that exponentiates, no one-hot
        hit_CV = jnp.arange(V) == jnp.where(mine_C, column_C, -1)[:, None]
        d_CV = jnp.exp(logits_CV32 - normaliser_C[:, None]) - hit_CV
        d_CV = (weights_C[:, None] * d_CV).astype(dtype)
        dx_CD = jnp.einsum("CV,VD->CD", d_CV, embed_VD, preferred_element_type=dtype)
        total_VD += jnp.einsum("CV,CD->VD", d_CV, x_CD, preferred_element_type=jnp.float32)
        return (loss, total_VD), dx_CD

    start = jnp.float32(0), total_VD
    inputs = split(x_BTD), split(targets_BT), split(weights_BT)
    if chunks == 1:
        (loss, total_VD), dx = chunk(start, jax.tree.map(lambda a: a[0], inputs))
    else:
        (loss, total_VD), dx = jax.lax.scan(chunk, start, inputs)
    if not gradient:
        return loss, None, total_VD
    dx_BTD = dx.reshape(-1, D)[: B * T].reshape(B, T, D)
    return loss, sum_to_stream(dx_BTD, letter), total_VD
