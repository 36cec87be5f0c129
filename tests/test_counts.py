"""What is counted in a compiled program's text is what was written: FLOPs, bytes by mesh axis."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from bloomjax import counts

AXES = {"a": 2, "b": 2, "c": 2}


def compiled(f: Any, *shapes: tuple[int, ...]) -> str:
    """Text of `f`, run on each of eight devices on arrays of these local shapes."""
    mesh = jax.make_mesh(tuple(AXES.values()), tuple(AXES))
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(f, in_specs=(P(),) * len(shapes), out_specs=P(), check_vma=False)
        arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
        return jax.jit(mapped).lower(*arguments).compile().as_text()


def repeated(f: Any, times: int) -> Any:
    """x -> f(f(...x)), in a loop that no compiler unrolls away."""
    return lambda x: jax.lax.scan(lambda x, _: (f(x), None), x, None, times)[0]


def test_bytes_of_collectives_in_nested_loops() -> None:
    def inner(x: jax.Array) -> jax.Array:
        x = jnp.sin(jax.lax.psum(x, "a"))
        x = jax.lax.all_gather(x, ("b", "c"), tiled=True)
        return jax.lax.psum_scatter(jnp.sin(x), ("b", "c"), tiled=True)

    def outer(x: jax.Array) -> jax.Array:
        x = repeated(inner, 5)(x)
        return jax.lax.ppermute(jnp.sin(x), "c", [(0, 1), (1, 0)])

    size = 64 * 16 * 4
    found = counts.count(compiled(repeated(outer, 3), (64, 16)), AXES)
    assert found.collectives == {
        ("all-reduce", "a"): 15 * size,  # 2 (n - 1) / n of it
        ("all-gather", "b+c"): 15 * 3 * size,
        ("reduce-scatter", "b+c"): 15 * 3 * size,
        ("collective-permute", "c"): 3 * size,
    }
    assert found.calls["all-reduce", "a"] == 15 and found.turns == 3 + 15
    assert found.by_axis() == {"a": 15 * size, "b+c": 90 * size, "c": 3 * size}


def test_flops_by_part_in_loops() -> None:
    def layer(x_AB: jax.Array) -> jax.Array:
        scores_AC = jnp.einsum("AB,CB->AC", x_AB, x_AB)
        return jnp.sin(jnp.einsum("AC,CB->AB", scores_AC, x_AB))

    text = compiled(repeated(layer, 7), (32, 48))
    found = counts.count(text, AXES, lambda name: "second" if "AC,CB" in name else "first")
    assert found.flops == {"first": 7 * 2 * 32 * 32 * 48, "second": 7 * 2 * 32 * 32 * 48}


def test_bytes_through_memory_are_of_what_is_sliced() -> None:
    """A loop over a stack reads each layer of it once, not the stack every time."""

    def f(stack: jax.Array) -> jax.Array:
        start = jnp.zeros((256, 256))
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), start, stack)[0]

    layer = 256 * 256 * 4
    once = counts.count(compiled(f, (4, 256, 256)), AXES).memory
    twice = counts.count(compiled(f, (8, 256, 256)), AXES).memory
    assert 3 * layer <= (twice - once) / 4 <= 9 * layer


def test_a_loop_whose_limit_is_computed() -> None:
    def f(x: jax.Array) -> jax.Array:
        limit = x[0, 0].astype(jnp.int32)
        return jax.lax.fori_loop(0, limit, lambda i, x: jax.lax.psum(jnp.sin(x), "a"), x)

    found = counts.count(compiled(f, (8, 8)), AXES, unknown_trips=11)
    assert found.calls["all-reduce", "a"] == 11


def test_the_dearest_branch_counts() -> None:
    def f(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert counts.count(compiled(f, (16, 16)), AXES).flops == {"all": 2 * 2 * 16**3}


SHAPE = 16, 8
COLLECTIVES = {
    "all-reduce": (jax.lax.psum, lambda n: 2 * (n - 1) / n),
    "all-gather": (
        lambda x, axes: jax.lax.all_gather(x, axes, tiled=True)[: SHAPE[0]],
        lambda n: n - 1,
    ),
    "all-to-all": (
        lambda x, axes: jax.lax.all_to_all(x, axes, 0, 0, tiled=True),
        lambda n: (n - 1) / n,
    ),
}


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(COLLECTIVES)),
            st.sampled_from(["a", "b", "c", "a+b", "b+c", "a+c", "a+b+c"]),
            st.integers(1, 4),
            st.integers(0, 2),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_random_programs(parts: list[tuple[str, str, int, int]]) -> None:
    """Each part: a collective, its axes, how often it is repeated, and products beside it."""

    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        for kind, axes, times, products in parts:

            def once(x: jax.Array, kind: str = kind, axes: str = axes, n: int = products) -> Any:
                x = COLLECTIVES[kind][0](jnp.sin(x), tuple(axes.split("+")))
                return functools.reduce(lambda x, _: jnp.sin(x @ w), range(n), x)

            x = repeated(once, times)(x)
        return x

    sent: dict[tuple[str, str], float] = {}
    flops = 0.0
    for kind, axes, times, products in parts:
        n = 2 ** len(axes.split("+"))
        size = 4 * math.prod(SHAPE) * COLLECTIVES[kind][1](n)
        sent[kind, axes] = sent.get((kind, axes), 0) + times * size
        flops += times * products * 2 * SHAPE[0] * SHAPE[1] ** 2
    found = counts.count(compiled(f, SHAPE, (SHAPE[1], SHAPE[1])), AXES)
    assert found.collectives == sent
    assert sum(found.flops.values()) == flops


GROUPS = {
    "replica_groups={{0,4},{1,5},{2,6},{3,7}}": "a",
    "replica_groups={{0,1},{2,3},{4,5},{6,7}}": "c",
    "replica_groups=[4,2]<=[8]": "c",
    "replica_groups=[4,2]<=[2,4]T(1,0)": "a",
    "replica_groups=[2,4]<=[8]": "b+c",
    "replica_groups=mesh['x'=4,'y'=2] {'y'}": "c",
    "replica_groups=mesh['x'=4,'y'=2] {'x'}": "a+b",
    "replica_groups=mesh['x'=4,'y'=2] {'x':(1)2}": "a",
    "replica_groups=mesh['x'=4,'y'=2] {'x':(2)2}": "b",
    "replica_groups=mesh['x'=1,'y'=2,'z'=4], device_ids=([4,2]T(1,0)) {'y'}": "c",
    "replica_groups={}": "a+b+c",
    "source_target_pairs={{0,2},{2,0},{1,3},{3,1}}": "b",
}


@pytest.mark.parametrize("groups", GROUPS)
def test_every_way_to_write_groups(groups: str) -> None:
    kind = "collective-permute" if "pairs" in groups else "all-reduce"
    text = f"""
ENTRY %main (x: f32[10]) -> f32[10] {{
  %x = f32[10]{{0}} parameter(0)
  ROOT %y = f32[10]{{0}} {kind}(%x), channel_id=1, {groups}, use_global_device_ids=true
}}
"""
    assert list(counts.count(text, AXES).by_axis()) == [GROUPS[groups]]


# As libtpu writes them: a batched product, a reduce-scatter, a loop without its trip count, an
# operand in vector memory.
TPU = """
%all-reduce-scatter.1 (p: bf16[8,128]) -> bf16[4,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %sum = bf16[8,128]{1,0:T(8,128)(2,1)} all-reduce(%p), replica_groups=[4,2]<=[8], to_apply=%add
  %zero = u32[] constant(0)
  ROOT %mine = bf16[4,128]{1,0:T(8,128)} dynamic-slice(%sum, %zero, %zero)
}

%body (loop: (s32[]{:T(128)}, bf16[2,512,4,64]{3,1,2,0})) -> (s32[], bf16[2,512,4,64]) {
  %loop = (s32[]{:T(128)}, bf16[2,512,4,64]{3,1,2,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%loop), index=0
  %x = bf16[2,512,4,64]{3,1,2,0:T(8,128)(2,1)S(1)} get-tuple-element(%loop), index=1
  %k = bf16[2,512,4,64]{3,1,2,0:T(8,128)(2,1)S(1)} bitcast(%x)
  %s = f32[2,4,512,512]{2,3,1,0:T(8,128)S(1)} convolution(%x, %k), window={size=2x4 stride=1x3 \
lhs_dilate=2x4}, dim_labels=0b1f_0o1i->01bf, metadata={op_name="f/BTNH,BSNH->BNTS/dot_general"}
  %g = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} constant({...})
  %rs = bf16[4,128]{1,0:T(8,128)(2,1)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %next = (s32[]{:T(128)}, bf16[2,512,4,64]{3,1,2,0:T(8,128)(2,1)S(1)}) tuple(%i, %x)
}

%condition (loop: (s32[], bf16[2,512,4,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(9)
  %loop = (s32[]{:T(128)}, bf16[2,512,4,64]{3,1,2,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%loop), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (x: bf16[2,512,4,64]) -> (s32[], bf16[2,512,4,64]) {
  %x = bf16[2,512,4,64]{3,1,2,0:T(8,128)(2,1)S(1)} parameter(0)
  %begin = s32[]{:T(128)} constant(2)
  %first = (s32[]{:T(128)}, bf16[2,512,4,64]{3,1,2,0:T(8,128)(2,1)S(1)}) tuple(%begin, %x)
  ROOT %w = (s32[]{:T(128)}, bf16[2,512,4,64]{3,1,2,0:T(8,128)(2,1)S(1)}) while(%first), \
condition=%condition, body=%body
}
"""


def test_what_tpus_write() -> None:
    found = counts.count(TPU, AXES)
    assert found.flops == {"all": 7 * 2 * 2 * 4 * 512 * 512 * 64}
    assert found.collectives == {("reduce-scatter", "c"): 7 * 8 * 128 * 2 / 2}
    assert found.memory == 7 * 4 * 128 * 2  # all else is in vector memory
