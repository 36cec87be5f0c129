"""What a compiled program does, counted in its text: FLOPs, bytes through memory, collectives.

XLA's own `cost_analysis` counts the body of a loop once and is empty for GPUs. Here the text is
walked from its entry, and everything inside a loop counts as often as the loop turns. The
invariant: every figure is of one device, and of one run of the program.

Bytes of a collective are what one device sends under the ring algorithm, for n devices in a group
and an operand of `size` bytes: all-gather size * (n - 1), reduce-scatter and all-to-all
size * (n - 1) / n, all-reduce twice that, a permute size. Bytes through memory are what operations
read and write outside their own fusion, without what lies in a TPU's vector memory; of an operand
that is only sliced, the slice counts, and of one that is updated in place, the update.

Source of the convolution's count: XLA, service/hlo_cost_analysis.cc.
"""

import dataclasses
import functools
import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, TypeVar

import numpy as np

from bloomjax.hlo import Array, Computation, Op, groups, parse

COLLECTIVES = {
    "all-gather": lambda size, n: size * (n - 1),
    "reduce-scatter": lambda size, n: size * (n - 1) / n,
    "all-to-all": lambda size, n: size * (n - 1) / n,
    "ragged-all-to-all": lambda size, n: size * (n - 1) / n,
    "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
    "collective-permute": lambda size, n: size,
    "collective-broadcast": lambda size, n: size,
}


K = TypeVar("K")
Sums = defaultdict[K, float]


def _sums() -> Any:
    return defaultdict(float)


@dataclasses.dataclass
class Counts:
    """Of one device and one run. `collectives` and `calls` are by (kind, mesh axes)."""

    flops: Sums[str] = dataclasses.field(default_factory=_sums)  # by part
    memory: float = 0.0  # bytes read and written
    turns: float = 0.0  # of loops
    collectives: Sums[tuple[str, str]] = dataclasses.field(default_factory=_sums)  # bytes sent
    calls: Sums[tuple[str, str]] = dataclasses.field(default_factory=_sums)

    def add(self, other: "Counts", times: float = 1) -> None:
        self.memory += times * other.memory
        self.turns += times * other.turns
        for name in ("flops", "collectives", "calls"):
            mine, others = getattr(self, name), getattr(other, name)
            for key, value in others.items():
                mine[key] += times * value

    def by_axis(self) -> dict[str, float]:
        """Bytes sent over each mesh axis, or several together ("data+fsdp"), by all collectives."""
        sums: Sums[str] = defaultdict(float)
        for (_, axes), size in self.collectives.items():
            sums[axes] += size
        return dict(sums)


def count(
    text: str,
    mesh: Mapping[str, int],
    part: Callable[[str], str] = lambda name: "all",
    unknown_trips: int = 1,
) -> Counts:
    """Counts of an executable's text, compiled for a mesh of these axes and sizes, in order.

    `part` maps the name of an operation ("jit(f)/while/body/BTD,DF->BTF/dot_general") to the key
    that its FLOPs are filed under. `unknown_trips` is how often a loop turns whose limit the
    program computes. Of a conditional's branches, the one with most FLOPs counts. ValueError if
    the text is not an HLO module.
    """
    computations, entry = parse(text)
    return _Walk(computations, dict(mesh), part, unknown_trips).computation(entry, _nothing)


def written(text: str, sizes: Set[int]) -> Iterator[str]:
    """Operations of an executable that write an array of so many elements to memory anew, not in
    place: what no program does that keeps large arguments where they are."""
    computations, _ = parse(text)
    ops = [op for computation in computations.values() for op in computation.ops.values()]
    fused = {name for op in ops if op.code == "fusion" for name in op.called("calls")}
    for name, here in computations.items():
        for op in here.ops.values() if name not in fused else ():
            if op.code in _FREE | _IN_PLACE.keys() | _CALLS or op.code.endswith(_MEANWHILE):
                continue  # of what goes on meanwhile, "-done" has the result alone
            roots = [computations[n].root for n in op.called("calls")]
            if any(root.code in _IN_PLACE for root in roots):
                continue
            for array in op.outputs:
                if array.in_memory and math.prod(array.dims) in sizes:
                    dims = ",".join(map(str, array.dims))
                    yield f"{array.dtype}[{dims}] by {op.name} ({op.op_name})"


_CALLS = {"while", "call", "conditional"}
_MEANWHILE = ("-start", "-update")
# Operations that move nothing, or whose bytes other operations count.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency", "domain", "reshape"),
}
_VIEWS = {"bitcast", "reshape", "convert", "copy", "transpose"}
# Where an array that is updated in place is the first operand: which one the update is.
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}

Known = Callable[[int], int | None]  # the number at a place of a tuple, if it is known


def _nothing(index: int) -> None:
    return None


class _Walk:
    def __init__(
        self,
        computations: dict[str, Computation],
        mesh: dict[str, int],
        part: Callable[[str], str],
        unknown_trips: int,
    ):
        self.computations, self.mesh = computations, mesh
        self.part, self.unknown_trips = part, unknown_trips

    def computation(
        self, name: str, known: Known, fused: bool = False, op_name: str = ""
    ) -> Counts:
        """`known` tells numbers of the tuple that is the computation's only parameter; `op_name`
        is what a fusion is called, for products in it that have lost their own name."""
        total, here = Counts(), self.computations[name]
        scatters = fused and "all-reduce-scatter" in name  # what a TPU makes of a reduce-scatter
        for op in here.ops.values():
            start = op.code.removesuffix("-start")
            if op.code == "while":
                (body,), (condition,) = op.called("body"), op.called("condition")
                begin = functools.partial(self._number, here, op.operands[0], known)
                trips = self._trips(op, condition, begin)
                total.add(self.computation(body, begin), trips)
                total.turns += trips
            elif op.code == "conditional":
                keys = "branch_computations", "true_computation", "false_computation"
                branches = [self.computation(b, _nothing) for b in op.called(*keys)]
                total.add(max(branches, key=lambda c: (sum(c.flops.values()), c.memory)))
            elif op.code == "call" or (op.code.endswith("-start") and op.called("calls")):
                for called in op.called("calls", "to_apply"):
                    total.add(self.computation(called, known, fused))
            else:
                if start in COLLECTIVES:
                    kind = "reduce-scatter" if scatters and start == "all-reduce" else start
                    total.add(self._collective(op, kind, here))
                elif op.code == "fusion":
                    (called,) = op.called("calls")
                    total.add(self.computation(called, _nothing, True, op.op_name))
                elif flops := self._flops(op, here):
                    total.flops[self.part(op.op_name or op_name)] += flops
                if not fused:
                    total.memory += self._traffic(op, here)
        return total

    # Loops.

    def _trips(self, op: Op, condition: str, begin: Known) -> int:
        if found := re.search(r'"known_trip_count":{"n":"(\d+)"}', op.attributes):
            return int(found[1])
        here = self.computations[condition]
        compare, resolve = here.root, lambda name: self._number(here, name, begin)
        if compare.code == "fusion":  # the comparison alone, in a computation of its own
            outer, inner = compare, self.computations[compare.called("calls")[0]]
            compare = inner.root

            def resolve(name: str) -> int | None:
                at = inner.ops[name]
                outside = at.code == "parameter"
                return (
                    self._number(here, outer.operands[int(at.inside)], begin)
                    if outside
                    else self._number(inner, name, begin)
                )

        direction = re.search(r"direction=(\w+)", compare.attributes)
        if compare.code != "compare" or direction is None or len(compare.operands) != 2:
            return self.unknown_trips
        first, limit = map(resolve, compare.operands)
        if limit is None or first is None:
            return self.unknown_trips
        return max(0, {"LT": limit - first, "LE": limit - first + 1}.get(direction[1], 1))

    def _number(
        self, here: Computation, name: str, known: Known, index: int | None = None
    ) -> int | None:
        """The integer that `name` (or its element `index`) is before a loop begins, if constant."""
        op = here.ops[name]
        if op.code == "constant" and re.fullmatch(r"-?\d+", op.inside):
            return int(op.inside)
        if op.code == "tuple" and index is not None:
            return self._number(here, op.operands[index], known)
        if op.code == "parameter" and index is not None:
            return known(index)
        if op.code == "get-tuple-element":
            at = int(re.search(r"index=(\d+)", op.attributes)[1])  # type: ignore[index]
            return self._number(here, op.operands[0], known, at)
        if op.code in ("copy", "bitcast", "convert", "opt-barrier", "reshape"):
            return self._number(here, op.operands[0], known, index)
        return None

    # Collectives.

    def _collective(self, op: Op, kind: str, here: Computation) -> Counts:
        size = sum(a.bytes for name in op.operands for a in here.ops[name].outputs)
        together = groups(op.attributes, math.prod(self.mesh.values()))
        places = np.unravel_index(np.array(together), tuple(self.mesh.values()))
        axes = [a for a, at in zip(self.mesh, places, strict=True) if (at != at[:, :1]).any()]
        if not axes:
            return Counts()
        key = kind, "+".join(axes)
        found = Counts()
        found.collectives[key], found.calls[key] = COLLECTIVES[kind](size, len(together[0])), 1
        return found

    # Products.

    def _flops(self, op: Op, here: Computation) -> float:
        if op.code == "dot":
            left = here.ops[op.operands[0]].outputs[0].dims
            return (
                2.0
                * math.prod(op.outputs[0].dims)
                * _pick(left, op.numbers("lhs_contracting_dims"))
            )
        if op.code == "convolution":
            return _convolution(op, *(here.ops[name].outputs[0].dims for name in op.operands))
        if op.code == "custom-call" and '"__cublas$' in op.attributes:
            found = re.search(r'"lhs_contracting_dimensions":\[([^]]*)\]', op.attributes)
            left = here.ops[op.operands[0]].outputs[0].dims
            axes = [int(a) for a in json.loads(f"[{found[1]}]")] if found else []
            return 2.0 * math.prod(op.outputs[0].dims) * _pick(left, axes)
        return 0.0

    # Memory.

    def _traffic(self, op: Op, here: Computation) -> float:
        if op.code in _FREE or op.code.endswith(("-done", "-update")):
            return 0.0
        operands = [_in_memory(here.ops[name].outputs) for name in op.operands]
        if op.code == "fusion":
            called = self.computations[op.called("calls")[0]]
            reads = sum(self._read(called, i, size) for i, size in enumerate(operands))
            return reads + self._written(called, op.outputs)
        if op.code in ("slice", "dynamic-slice", "gather"):
            return 2 * _in_memory(op.outputs)
        if op.code in _IN_PLACE:
            return 2 * operands[_IN_PLACE[op.code]]
        if op.code.endswith("-start"):  # its output lists its operand again
            return 2 * sum(operands)
        return sum(operands) + _in_memory(op.outputs)

    def _read(self, fused: Computation, parameter: int, whole: float) -> float:
        """Bytes that a fusion reads of an operand of `whole` bytes."""
        if not whole or parameter not in fused.parameters:
            return 0.0
        total, names = 0.0, [fused.parameters[parameter].name]
        while names:
            name = names.pop()
            if fused.ops[name].root:
                return whole
            for user in fused.users(name):
                first = user.operands[0] == name
                if user.code in _VIEWS:
                    names.append(user.name)
                elif user.code in ("slice", "dynamic-slice", "gather") and first:
                    total += sum(a.bytes for a in user.outputs)
                elif user.code == "fusion":
                    inner = self.computations[user.called("calls")[0]]
                    places = [i for i, n in enumerate(user.operands) if n == name]
                    total += sum(self._read(inner, i, whole) for i in places)
                elif not (user.code in _IN_PLACE and first):
                    return whole
        return min(whole, total)

    def _written(self, fused: Computation, outputs: Sequence[Array]) -> float:
        """Bytes that a fusion writes."""
        tuple_root = fused.root.code == "tuple"
        roots = [fused.ops[n] for n in fused.root.operands] if tuple_root else [fused.root]
        if len(roots) != len(outputs):
            return _in_memory(outputs)
        total = 0.0
        for root, output in zip(roots, outputs, strict=True):
            while root.code in _VIEWS:
                root = fused.ops[root.operands[0]]
            if root.code in _IN_PLACE:
                update = root.operands[_IN_PLACE[root.code]]
                total += fused.ops[update].outputs[0].bytes * output.in_memory
            elif root.code == "fusion" and not tuple_root:
                total += self._written(self.computations[root.called("calls")[0]], outputs)
            else:
                total += output.bytes * output.in_memory
        return total


def _in_memory(arrays: Sequence[Array]) -> float:
    return sum(a.bytes for a in arrays if a.in_memory)


def _pick(dims: Sequence[int], axes: Sequence[int]) -> int:
    return math.prod(dims[a] for a in axes)


def _convolution(op: Op, left: Sequence[int], right: Sequence[int]) -> float:
    """TPUs write matrix products as convolutions, batched ones as dilated ones: only positions of
    the window that meet an element count."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    window = re.search(r"window={([^}]*)}", op.attributes)
    if labels is None:
        return 0.0
    given = dict(pair.split("=") for pair in (window[1].split() if window else ()))
    batches = re.search(r"batch_group_count=(\d+)", op.attributes)
    flops = 2.0 * left[labels[1].index("b")] * _pick(right, [labels[2].index(c) for c in "io"])
    flops /= int(batches[1]) if batches else 1
    spatial = sorted(c for c in labels[1] if c.isdigit())

    def each(key: str, default: str) -> list[str]:
        return given[key].split("x") if key in given else [default] * len(spatial)

    keys = ("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"), ("rhs_dilate", "1")
    for axis, *sizes in zip(spatial, *itertools.starmap(each, keys), strict=True):
        stride, pad, dilate, spread = (int(s.split("_")[0]) for s in sizes)
        size = left[labels[1].index(axis)]
        k = np.arange(right[labels[2].index(axis)])[:, None]
        at = np.arange(op.outputs[0].dims[labels[3].index(axis)]) * stride + k * spread - pad
        flops *= ((at >= 0) & (at % dilate == 0) & (at < size * dilate)).sum()
    return float(flops)
