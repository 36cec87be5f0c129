"""The key/value cache: per layer two arrays [B, N, S, H], a slot of S places for each row of B.

Rows are ragged: each begins at place 0 and counts its own length, so a short prompt wastes nothing
and ALiBi needs no correction. What stands beyond a row's length is never attended to. Slots are
split over what the weights' width is (C in `sharding.RULES`) where they divide, heads as the heads
of the products. In eight bits every key and every value has a scale of its own.

Letters: B slots, S places, C tokens of a chunk, N heads, H head dim.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bloomjax.attention import slopes_here
from bloomjax.config import ModelConfig
from bloomjax.kernels import cpu
from bloomjax.kernels.packed import precision
from bloomjax.model import Block, compute_dtype
from bloomjax.sharding import act, offset_of, on_cpu, on_devices, split_of, sum_over

# Of a chunk, those that look at as many places.
_QUERIES = 128


class Held(NamedTuple):
    """Keys, or values, of one layer: `values` [B, N, S, H]; `scales` float32 [B, N, S] if int8."""

    values: jax.Array
    scales: jax.Array | None


class Cache(NamedTuple):
    keys: tuple[Held, ...]  # of each layer
    values: tuple[Held, ...]


def slots_letter(slots: int) -> str:
    """C where slots divide over the devices that split it, else 1, which nothing splits. (Layouts
    that name an axis of size 1 come back from a program without it, which would compile it anew.)
    """
    split = split_of("C")
    return "C" if split > 1 and slots % split == 0 else "1"


def empty_cache(config: ModelConfig, slots: int, length: int, dtype: str = "auto") -> Cache:
    """A cache for `slots` sequences of up to `length` tokens, on the current mesh.

    `dtype` is "auto" (that of compute), "bfloat16", "float32" or "int8".
    """
    shape = (slots, config.heads, length, config.width // config.heads)
    kind = compute_dtype(config) if dtype == "auto" else jnp.dtype(dtype)
    axes = slots_letter(slots) + "NSH"

    def held() -> Held:
        values = jnp.zeros(shape, kind, out_sharding=act(axes))
        if kind != jnp.int8:
            return Held(values, None)
        return Held(values, jnp.zeros(shape[:3], jnp.float32, out_sharding=act(axes[:3])))

    def layers() -> tuple[Held, ...]:
        return tuple(held() for _ in range(config.layers))

    return Cache(layers(), layers())


class CachedAttention:
    """Hands each layer its attention over the cache, and collects what the layers write.

    One token of every slot, at `positions_B`; or, with `slot`, C tokens of one, from place
    `start` on, of which none sees beyond the first `seen` places. The rows of x are the slots, or
    the one slot.
    """

    def __init__(
        self,
        config: ModelConfig,
        cache: Cache,
        positions_B: jax.Array | None = None,
        slot: jax.Array | None = None,
        start: jax.Array | None = None,
        seen: int | None = None,
    ):
        self._round = config.alibi_dtype == "compute"
        self._keys, self._values = list(cache.keys), list(cache.values)
        self._at = (positions_B,) if slot is None else (slot, start)
        self._seen = seen

    @property
    def cache(self) -> Cache:
        return Cache(tuple(self._keys), tuple(self._values))

    def layer(self, i: int, block: Block, x_BSD: jax.Array) -> jax.Array:
        """The residual stream through block i."""
        graph, weights = nnx.split(block)
        x_BSD, self._keys[i], self._values[i] = _layer(
            graph,
            self._seen,
            self._round,
            weights,
            x_BSD,
            self._keys[i],
            self._values[i],
            self._at,
        )
        return x_BSD


# Under jit for the sake of its trace, which all layers share: to trace them one by one takes
# seconds of every start. In the program, layers stand one after the other.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _layer(
    graph: Any,
    seen: int | None,
    round_alibi: bool,
    weights: Any,
    x_BSD: jax.Array,
    keys: Held,
    values: Held,
    at: Any,
) -> tuple[jax.Array, Held, Held]:
    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        nonlocal keys, values
        letter = slots_letter(keys.values.shape[0])
        axes = letter + "NSH"
        held = jax.tree.map(lambda x: act(axes[: x.ndim]), keys)
        if seen is None:
            local = functools.partial(_one_token, round_alibi)
            rows, places = act(letter + "SNH"), [act(letter)]
        else:
            local = functools.partial(_chunk, round_alibi, letter, seen)
            rows, places = act("1SNH"), [act(""), act("")]
        ins = rows, rows, rows, held, held, *places
        run = on_devices(local, ins, (rows, held, held))
        out, keys, values = run(q, k, v, keys, values, *at)
        return jax.reshard(out, act("1SNH"))

    return nnx.merge(graph, weights)(x_BSD, attention, letter="S"), keys, values


def _one_token(
    round_alibi: bool,
    q_B1NH: jax.Array,
    k_B1NH: jax.Array,
    v_B1NH: jax.Array,
    keys: Held,
    values: Held,
    positions_B: jax.Array,
) -> tuple[jax.Array, Held, Held]:
    """On a device: its slots and heads, one query each."""
    keys = _write_each(keys, k_B1NH[:, 0], positions_B)
    values = _write_each(values, v_B1NH[:, 0], positions_B)
    q_BNH, out_BNH = q_B1NH[:, 0], None
    if on_cpu():
        origins_B = jnp.zeros_like(positions_B) if round_alibi else positions_B
        slopes_N = slopes_here(q_BNH.shape[1], round_alibi)[:, 0, 0]
        out_BNH = cpu.attend(q_BNH, keys, values, positions_B, origins_B, slopes_N)
    if out_BNH is None:
        out = _attend(q_BNH[:, :, None], keys, values, positions_B[:, None], round_alibi)
        out_BNH = out[:, :, 0]
    return out_BNH[:, None], keys, values


def _chunk(
    round_alibi: bool,
    letter: str,
    seen: int,
    q_1CNH: jax.Array,
    k_1CNH: jax.Array,
    v_1CNH: jax.Array,
    keys: Held,
    values: Held,
    slot: jax.Array,
    start: jax.Array,
) -> tuple[jax.Array, Held, Held]:
    """On a device: C queries of one slot. Where another device has the slot, nothing is written,
    and what is computed for another slot is left out of the sum."""
    slots = keys.values.shape[0]
    here = slot - offset_of(letter, slots)
    mine = (here >= 0) & (here < slots)
    here = jnp.clip(here, 0, slots - 1)
    keys = _write_chunk(keys, k_1CNH, here, start, mine)
    values = _write_chunk(values, v_1CNH, here, start, mine)

    C = q_1CNH.shape[1]
    q_1NCH = q_1CNH.swapaxes(1, 2)

    def queries(first: int, stop: int) -> jax.Array:
        """The last of them sees so many places less than the last of the chunk."""
        size = seen - C + stop

        def row(held: Held) -> Held:
            return jax.tree.map(
                lambda x: jax.lax.dynamic_slice_in_dim(x, here, 1)[:, :, :size], held
            )

        positions_1Q = (start + jnp.arange(first, stop))[None]
        q_1NQH = q_1NCH[:, :, first:stop]
        return _attend(q_1NQH, row(keys), row(values), positions_1Q, round_alibi)

    pieces = [queries(at, min(at + _QUERIES, C)) for at in range(0, C, _QUERIES)]
    out_1NCH = jnp.concatenate(pieces, axis=2)
    if split_of(letter) > 1:
        out_1NCH = sum_over(letter, jnp.where(mine, out_1NCH, 0))
    return out_1NCH.swapaxes(1, 2), keys, values


def _attend(
    q_BNTH: jax.Array, keys: Held, values: Held, positions_BT: jax.Array, round_alibi: bool
) -> jax.Array:
    """Softmax(q k / sqrt(H) + ALiBi) v -> [B, N, T, H] in q's dtype, of this device's heads."""
    N, S, H = keys.values.shape[1:]
    slopes_N11, exact = slopes_here(N, round_alibi), precision(q_BNTH.dtype)
    dtype = q_BNTH.dtype
    scores = jnp.einsum(
        "BNTH,BNSH->BNTS",
        q_BNTH,
        keys.values.astype(dtype),
        precision=exact,
        preferred_element_type=jnp.float32,
    )
    if keys.scales is not None:
        scores *= keys.scales[:, :, None]
    scores /= np.sqrt(H)
    t, s = positions_BT[:, None, :, None], jnp.arange(S)
    if round_alibi:
        scores = (scores + (slopes_N11 * s).astype(dtype)).astype(dtype).astype(jnp.float32)
    else:
        scores += slopes_N11 * (s - t).astype(jnp.float32)
    scores = jnp.where(s <= t, scores, -1e30)
    # Softmax, divided by its sum where that takes H numbers a query and not S.
    probs = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = probs.sum(-1, keepdims=True)
    if values.scales is not None:
        probs *= values.scales[:, :, None]
    out = jnp.einsum(
        "BNTS,BNSH->BNTH",
        probs.astype(dtype),
        values.values.astype(dtype),
        precision=exact,
        preferred_element_type=jnp.float32,
    )
    return (out / total).astype(dtype)


def _quantised(new: jax.Array, like: Held) -> Held:
    """[..., H] as the cache holds it."""
    if like.scales is None:
        return Held(new.astype(like.values.dtype), None)
    new = new.astype(jnp.float32)
    scales = jnp.maximum(jnp.abs(new).max(-1), 1e-30) / 127
    return Held(jnp.round(new / scales[..., None]).astype(jnp.int8), scales)


def _write_each(held: Held, new_BNH: jax.Array, positions_B: jax.Array) -> Held:
    """One token of every slot, each at its own place, in one scatter along the slots: in one over
    pairs of slot and place, libtpu copies the whole cache into another layout and back."""

    def write(slot: jax.Array, new: jax.Array, position: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(slot, new, position, 1)

    def write_all(whole: jax.Array, new: jax.Array) -> jax.Array:
        return jax.vmap(write)(whole, new, positions_B)

    return jax.tree.map(write_all, held, _quantised(new_BNH, held))


def _write_chunk(
    held: Held, new_1CNH: jax.Array, slot: jax.Array, start: jax.Array, mine: jax.Array
) -> Held:
    """C tokens of one slot from place `start` on, unless the slot is another device's."""

    def write(whole: Any, new: Any) -> Any:
        at = (slot, 0, start) + (0,) * (whole.ndim - 3)
        before = jax.lax.dynamic_slice(whole, at, new.shape)
        return jax.lax.dynamic_update_slice(whole, jnp.where(mine, new, before), at)

    return jax.tree.map(write, held, _quantised(new_1CNH.swapaxes(1, 2), held))
