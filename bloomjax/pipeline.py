"""Layers over pipeline stages: one step's loss and gradients, 1F1B in lockstep.

Letters: A microbatches, B their rows, T position, R position along the residual stream, L rows of
the stack of blocks, K those of one stage, S stages, D model, V vocabulary.

On tick t stage s runs microbatch t - s forward and microbatch t - 2(S - 1) + s backward, so the
last stage turns each of them around at once: S - 1 ticks forward, A forward and backward, S - 1
backward. That idles (S - 1) / (A + S - 1) of the time, and never keeps more than 2S - 1
microbatches (Narayanan et al. 2021, with both halves in one tick). All of it is what one device
does with its pieces, and the backward pass is written out: weights are gathered once, in the
compute dtype, gradients add up in float32 and are summed over the batch once.

Where stages divide the layers, the head's tokens are dealt to all stages alike. Where they do not,
the last stage has rows to spare: embedding and head are slots like the layers (176B on 12 stages:
70 + 2 = 12 x 6), and it runs the head instead of its empty rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Literal

from bloomjax import model
from bloomjax.config import Config
from bloomjax.loss import head
from bloomjax.model import KEPT, Params, layer_norm
from bloomjax.parallel import add_rows, dropout, lookup_rows
from bloomjax.sharding import (
    act,
    deal,
    gather_over,
    gather_weight,
    offset_of,
    on_devices,
    reduce_gradient,
    shift,
    split_of,
    stream,
    sum_over,
    sum_partial,
    weight,
)

Batch = dict[str, jax.Array]


def loss_and_gradients(
    config: Config,
    params: Params,
    batch_ABT: Batch,
    microbatches: jax.Array | int,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Params]:
    """Sum of weight * negative log-likelihood, in nats, over the first `microbatches` of the batch,
    and its gradients, float32, laid out like the parameters. `key` turns dropout on."""
    axes = model.axes_of(config.model)
    layout = jax.tree.map(weight, axes)

    def local(params: Params, batch: Batch, microbatches: Any, key_data: Any) -> Any:
        key = None if key_data is None else jax.random.wrap_key_data(key_data)
        stage = _Stage(config, params, batch, key)
        loss, gradients = stage.train(microbatches)
        return loss, jax.tree.map(stage.reduce, gradients, axes)

    ins = layout, jax.tree.map(lambda _: act("ABT"), batch_ABT), act(""), act("")
    data = None if key is None else jax.random.key_data(key)
    run = on_devices(local, ins, (act(""), layout))
    return run(params, batch_ABT, jnp.asarray(microbatches), data)


def loss(config: Config, params: Params, batch_ABT: Batch) -> jax.Array:
    """The loss of `loss_and_gradients` alone, over all microbatches, without dropout."""
    layout = jax.tree.map(weight, model.axes_of(config.model))

    def local(params: Params, batch: Batch) -> jax.Array:
        return _Stage(config, params, batch, None).evaluate(len(batch["tokens"]))

    ins = layout, jax.tree.map(lambda _: act("ABT"), batch_ABT)
    return on_devices(local, ins, act(""))(params, batch_ABT)


class _Carry(NamedTuple):
    """What goes from tick to tick."""

    x_BRD: jax.Array  # from the stage before: the microbatch that this one runs forward
    g_BRD: jax.Array  # from the stage after: of the one that it runs backward
    kept: list[jax.Array]  # [2S - 1, K, ...]: what the backward pass needs of each row
    loss: jax.Array
    gradients: Params  # float32, of weights in use


class _Stage:
    """One device of one stage: its weights in use, and its part of the batch."""

    def __init__(self, config: Config, params: Params, batch: Batch, key: jax.Array | None):
        self.config, self.batch, self.key = config, batch, key
        self.dtype = model.compute_dtype(config.model)
        T = batch["tokens"].shape[-1] * split_of("T")
        self.letter = stream(T)
        self.across = split_of("R") // split_of("T") if self.letter == "R" else 1
        self.stages, self.here = split_of("L"), offset_of("L", 1)
        self.last = self.here == self.stages - 1
        self.params = jax.tree.map(self._in_use, params, model.axes_of(config.model))
        blocks = model.bind(config.model, self.params).blocks
        self.graph, self.stack = nnx.split(blocks)
        self.rows = jax.tree.leaves(self.stack)[0].shape[0]
        self.spare = self.rows * self.stages > config.model.layers
        B, T = batch["tokens"].shape[1:]
        shape = B, T // self.across, config.model.width
        self.x = jax.ShapeDtypeStruct(shape, self.dtype)

    def _in_use(self, w: jax.Array, axes: str) -> jax.Array:
        """Matrices in the compute dtype; vectors, which cost nothing, as they are."""
        matrix = "D" in axes and axes not in ("D", "LD")
        return gather_weight(w.astype(self.dtype) if matrix else w, axes)

    def reduce(self, gradient: jax.Array, axes: str) -> jax.Array:
        """A gradient of what this device did -> of the whole batch, as the weight rests."""
        if self.letter == "R":
            gradient = sum_partial(gradient, axes)
        gradient = reduce_gradient(gradient, axes)
        return gradient if "L" in axes else sum_over("L", gradient)

    # ---- one microbatch through this stage ---------------------------------------------------

    def keys(self, m: jax.Array) -> tuple[Any, Any]:
        """Of the embedding's dropout and of each row's, as without a pipeline."""
        if self.key is None:
            return None, None
        layers = self.config.model.layers
        key, embed_key = jax.random.split(jax.random.fold_in(self.key, m))
        row = self.here * self.rows + jnp.arange(self.rows)
        return embed_key, jax.random.split(key, layers)[jnp.minimum(row, layers - 1)]

    def row(self, x_BRD: jax.Array, params: Any, key: Any) -> jax.Array:
        return nnx.merge(self.graph, params).layer(x_BRD, key, self.letter)

    def real(self, i: jax.Array) -> jax.Array:
        return self.here * self.rows + i < self.config.model.layers

    def embed(self, m: jax.Array) -> jax.Array:
        """The rows of the embedding that microbatch m reads."""
        table_VD = self.params["embed"].astype(self.dtype)
        return lookup_rows(table_VD, self.batch["tokens"][m], self.letter)

    def embed_norm(self, x_BRD: jax.Array, w: Any, b: Any, key: Any) -> jax.Array:
        c = self.config.model
        x_BRD = layer_norm(x_BRD, nnx.Param(w), nnx.Param(b), c.layer_norm_epsilon)
        return dropout(x_BRD, c.hidden_dropout, key, f"B{self.letter}D")

    def enter(self, carry: _Carry, m: jax.Array) -> jax.Array:
        """What this stage's first row reads."""
        p, (key, _) = self.params, self.keys(m)
        x_BRD = self.embed_norm(self.embed(m), p["embed_ln_w"], p["embed_ln_b"], key)
        return jnp.where(self.here == 0, x_BRD, carry.x_BRD)

    def head(self, y_BRD: jax.Array, m: jax.Array, total_VD: jax.Array) -> Any:
        """Loss of microbatch m, its gradient by the last row's y and by the last norm, and
        `total_VD` plus that by the embedding; with a scalar `total_VD`, the loss alone."""
        targets, weights = self.batch["targets"][m], self.batch["weights"][m]
        if self.spare:
            nothing = jnp.float32(0), (jnp.zeros_like(y_BRD), *self._no_norm()), total_VD

            def run() -> Any:
                return self._head(y_BRD, targets, weights, total_VD)

            return jax.lax.cond(self.last, run, lambda: nothing)
        B, R, D = y_BRD.shape
        flat = jnp.where(self.last, y_BRD, 0).reshape(B * R, D)
        each = -(-B * R // self.stages)
        flat = jnp.pad(flat, [(0, each * self.stages - B * R), (0, 0)])

        def share(a: jax.Array) -> jax.Array:  # of targets: those of the positions that were dealt
            a = a.reshape(B, self.across, R).swapaxes(0, 1).reshape(self.across, B * R)
            a = jnp.pad(a, [(0, 0), (0, each * self.stages - B * R)])
            return jax.lax.dynamic_slice_in_dim(a, self.here * each, each, 1).reshape(1, -1)

        loss, (dy, *norm), total_VD = self._head(
            deal(flat)[None], share(targets), share(weights), total_VD
        )
        dy_BRD = gather_over("L", dy[0], 0)[: B * R].reshape(B, R, D)
        return loss, (dy_BRD, *norm), total_VD

    def _no_norm(self) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros_like(self.params["ln_w"]), jnp.zeros_like(self.params["ln_b"])

    def _head(self, y_BRD: Any, targets: Any, weights: Any, total_VD: jax.Array) -> Any:
        def norm(y_BRD: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
            epsilon = self.config.model.layer_norm_epsilon
            return layer_norm(y_BRD, nnx.Param(w), nnx.Param(b), epsilon)

        x_BRD, back = jax.vjp(norm, y_BRD, self.params["ln_w"], self.params["ln_b"])
        table_VD = self.params["embed"].astype(self.dtype)
        loss, dx_BRD, total_VD = head(x_BRD, table_VD, targets, weights, total_VD, self.letter)
        if dx_BRD is None:
            return loss, (jnp.zeros_like(y_BRD), *self._no_norm()), total_VD
        return loss, back(dx_BRD), total_VD

    # ---- the ticks ---------------------------------------------------------------------------

    def train(self, microbatches: jax.Array) -> tuple[jax.Array, Params]:
        S, n, A = self.stages, microbatches, len(self.batch["tokens"])
        policy = KEPT[self.config.run.remat]
        run = jax.checkpoint(self.row, policy=policy, prevent_cse=False)
        one = jax.tree.map(lambda w: w[0], self.stack)
        _, keys = self.keys(jnp.int32(0))
        halves = _Halves(run, self.x, one, None if keys is None else keys[0])

        def forward(t: jax.Array, carry: _Carry) -> tuple[_Carry, jax.Array]:
            m = jnp.clip(t - self.here, 0, A - 1)
            _, keys = self.keys(m)
            slot = (t - self.here) % (2 * S - 1)

            def row(i: jax.Array, inner: Any) -> Any:
                x_BRD, kept = inner
                params = jax.tree.map(lambda w: w[i], self.stack)
                key = None if keys is None else keys[i]
                x_BRD, fresh = self._if_real(
                    i,
                    lambda: halves.forward(x_BRD, params, key),
                    lambda: (x_BRD, halves.nothing()),
                )
                place = [k.at[slot, i].set(f) for k, f in zip(kept, fresh, strict=True)]
                return x_BRD, place

            start = self.enter(carry, m), carry.kept
            y_BRD, kept = jax.lax.fori_loop(0, self.rows, row, start)
            return carry._replace(kept=kept), y_BRD

        def turn(t: jax.Array, carry: _Carry, y_BRD: jax.Array) -> _Carry:
            """The last stage's y becomes its gradient: that of the head, wherever it ran."""
            total = carry.gradients["embed"]
            loss, (g_BRD, w, b), total = self.head(y_BRD, t - (S - 1), total)
            gradients = carry.gradients | {"embed": total}
            gradients |= {"ln_w": gradients["ln_w"] + w, "ln_b": gradients["ln_b"] + b}
            g_BRD = jnp.where(self.last, g_BRD, carry.g_BRD)
            return carry._replace(g_BRD=g_BRD, loss=carry.loss + loss, gradients=gradients)

        def backward(t: jax.Array, carry: _Carry) -> tuple[_Carry, jax.Array]:
            m = t - 2 * (S - 1) + self.here
            slot, valid = m % (2 * S - 1), (m >= 0) & (m < n)
            m = jnp.clip(m, 0, A - 1)
            gradients = carry.gradients

            def row(j: jax.Array, inner: Any) -> Any:
                g_BRD, total = inner
                i = self.rows - 1 - j
                params = jax.tree.map(lambda w: w[i], self.stack)
                kept = [k[slot, i] for k in carry.kept]
                g_BRD, dw = self._if_real(
                    i,
                    lambda: halves.backward(kept, params, g_BRD),
                    lambda: (g_BRD, jax.tree.map(jnp.zeros_like, params)),
                )
                dw = nnx.to_pure_dict(dw)
                return g_BRD, jax.tree.map(lambda s, d: s.at[i].add(d.astype(s.dtype)), total, dw)

            start = jnp.where(valid, carry.g_BRD, 0), gradients["blocks"]
            g_BRD, blocks = jax.lax.fori_loop(0, self.rows, row, start)
            # The first stage's gradient is that of the embedding; on the others it counts nothing.
            p, (key, _) = self.params, self.keys(m)
            _, back = jax.vjp(
                lambda x, w, b: self.embed_norm(x, w, b, key),
                self.embed(m),
                p["embed_ln_w"],
                p["embed_ln_b"],
            )
            dx_BRD, w, b = back(jnp.where(self.here == 0, g_BRD, 0))
            tokens = self.batch["tokens"][m]
            gradients = gradients | {
                "blocks": blocks,
                "embed": add_rows(gradients["embed"], tokens, dx_BRD, self.letter),
                "embed_ln_w": gradients["embed_ln_w"] + w,
                "embed_ln_b": gradients["embed_ln_b"] + b,
            }
            return carry._replace(gradients=gradients), g_BRD

        def fill(t: jax.Array, carry: _Carry) -> _Carry:
            carry, y_BRD = forward(t, carry)
            return carry._replace(x_BRD=shift(y_BRD, 1))

        def steady(t: jax.Array, carry: _Carry) -> _Carry:
            carry, y_BRD = forward(t, carry)
            carry, g_BRD = backward(t, turn(t, carry, y_BRD))
            return carry._replace(x_BRD=shift(y_BRD, 1), g_BRD=shift(g_BRD, -1))

        def drain(t: jax.Array, carry: _Carry) -> _Carry:
            carry, g_BRD = backward(t, carry)
            return carry._replace(g_BRD=shift(g_BRD, -1))

        zeros = jnp.zeros(self.x.shape, self.dtype)
        ring = [jnp.zeros((2 * S - 1, self.rows, *k.shape), k.dtype) for k in halves.nothing()]
        total = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), self.params)
        carry = _Carry(zeros, zeros, ring, jnp.float32(0), total)
        carry = jax.lax.fori_loop(0, S - 1, fill, carry)
        carry = jax.lax.fori_loop(S - 1, n + S - 1, steady, carry)
        carry = jax.lax.fori_loop(n + S - 1, n + 2 * (S - 1), drain, carry)
        return self._sum(carry.loss), carry.gradients

    def evaluate(self, microbatches: int) -> jax.Array:
        S = self.stages

        def tick(t: jax.Array, carry: Any) -> Any:
            carry, loss = carry
            m = jnp.clip(t - self.here, 0, microbatches - 1)

            def row(i: jax.Array, x_BRD: jax.Array) -> jax.Array:
                params = jax.tree.map(lambda w: w[i], self.stack)
                return self._if_real(i, lambda: self.row(x_BRD, params, None), lambda: x_BRD)

            y_BRD = jax.lax.fori_loop(0, self.rows, row, self.enter(carry, m))
            done = t - (S - 1)
            fresh, _, _ = self.head(y_BRD, jnp.maximum(done, 0), jnp.float32(0))
            loss += jnp.where(done >= 0, fresh, 0)
            return carry._replace(x_BRD=shift(y_BRD, 1)), loss

        zeros = jnp.zeros(self.x.shape, self.dtype)
        start = _Carry(zeros, zeros, [], jnp.float32(0), {}), jnp.float32(0)
        _, loss = jax.lax.fori_loop(0, microbatches + S - 1, tick, start)
        return self._sum(loss)

    def _sum(self, loss: jax.Array) -> jax.Array:
        """Stages hold the loss of what they ran the head on: nothing, or their share."""
        return sum_over("L", sum_over("T", sum_over("B", loss)))

    def _if_real(self, i: jax.Array, run: Callable[[], Any], skip: Callable[[], Any]) -> Any:
        """Rows of padding take no time: all devices of a stage agree on which they are."""
        return jax.lax.cond(self.real(i), run, skip) if self.spare else run()


class _Halves:
    """A function y(x, w, key) as its two halves, which may run at different times: `forward` gives
    y and the arrays that `backward` needs beside w, and `backward` the gradients by x and w."""

    def __init__(self, run: Callable[..., jax.Array], x: Any, w: Any, key: Any):
        self._run = run
        jaxpr, shapes = jax.make_jaxpr(self._both, return_shape=True)(x, w, key)
        invars = jaxpr.jaxpr.invars[len(jax.tree.leaves(x)) :][: len(jax.tree.leaves(w))]
        places = {var: i for i, var in enumerate(invars)}
        # A weight that the backward pass needs is there again when it runs.
        self._weight = [
            None if isinstance(var, Literal) else places.get(var) for var in jaxpr.jaxpr.outvars[1:]
        ]
        self._shapes = [s for s, i in zip(shapes[1], self._weight, strict=True) if i is None]

    def _both(self, x: Any, w: Any, key: Any) -> Any:
        y, back = jax.vjp(lambda x, w: self._run(x, w, key), x, w)
        leaves, self._tree = jax.tree.flatten(back)
        return y, leaves

    def nothing(self) -> list[jax.Array]:
        return [jnp.zeros(s.shape, s.dtype) for s in self._shapes]

    def forward(self, x: jax.Array, w: Any, key: Any) -> tuple[jax.Array, list[jax.Array]]:
        y, leaves = self._both(x, w, key)
        return y, [leaf for leaf, i in zip(leaves, self._weight, strict=True) if i is None]

    def backward(self, kept: list[jax.Array], w: Any, g: jax.Array) -> Any:
        rest, weights = iter(kept), jax.tree.leaves(w)
        leaves = [next(rest) if i is None else weights[i] for i in self._weight]
        return jax.tree.unflatten(self._tree, leaves)(g)
