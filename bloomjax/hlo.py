"""The grammar of a compiled program's text (`compiled.as_text()`, of CPU, GPU or TPU).

A module is computations, one of them the entry; a computation is operations, each with the arrays
that it makes, the names of its operands, and attributes, which stay text until somebody asks. Only
what `counts` needs is understood; the invariant is that nothing is guessed: a line that is no
operation of this grammar is a ValueError.

Source: XLA, hlo/parser/hlo_lexer.cc and hlo_parser.cc, hlo/ir/replica_group.cc.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Array:
    dtype: str
    dims: tuple[int, ...]
    in_memory: bool  # or in a TPU's vector or scalar memory, or on the host

    @property
    def bytes(self) -> float:
        bits = re.fullmatch(r"[a-z]+(\d+).*", self.dtype)
        one = int(bits[1]) / 8 if bits else float(self.dtype == "pred")
        return one * math.prod(self.dims)


@dataclasses.dataclass(frozen=True)
class Op:
    name: str
    code: str
    outputs: tuple[Array, ...]
    operands: tuple[str, ...]  # names
    inside: str  # what stands between the parentheses: a constant's value, a parameter's number
    attributes: str
    root: bool

    def called(self, *keys: str) -> list[str]:
        """Names of computations that these attributes name."""
        found = re.findall(rf"\b(?:{'|'.join(keys)})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return [n for text in found for n in re.findall(r"[\w.\-]+", text)]

    def numbers(self, key: str) -> list[int]:
        found = re.search(rf"\b{key}={{([\d,]*)}}", self.attributes)
        return [int(n) for n in found[1].split(",") if n] if found else []

    @property
    def op_name(self) -> str:
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1] if found else ""


class Computation:
    def __init__(self, ops: Sequence[Op]):
        self.ops = {op.name: op for op in ops}
        self.root = next((op for op in ops if op.root), ops[-1])
        self.parameters = {int(op.inside): op for op in ops if op.code == "parameter"}

    def users(self, name: str) -> list[Op]:
        return [op for op in self.ops.values() if name in op.operands]


_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_CODE = re.compile(r" ?([a-z][\w\-]*)\(")
_COMMENT = re.compile(r"/\*.*?\*/")


def parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, name = "", ""
    ops: list[Op] = []
    for line in text.splitlines():
        if not line.startswith(" ") and line.rstrip().endswith("{") and " -> " in line:
            words = line.split()
            name, ops = words[words[0] == "ENTRY"].lstrip("%"), []
            entry = name if words[0] == "ENTRY" else entry
        elif line.startswith("}") and ops:
            computations[name] = Computation(ops)
        elif head := _HEAD.match(line):
            ops.append(_op(line, head))
    if entry not in computations:
        raise ValueError("the text holds no HLO module with an ENTRY")
    return computations, entry


def _op(line: str, head: re.Match[str]) -> Op:
    line = _COMMENT.sub("", line)
    start = head.end()
    kind = _balanced(line, start) if line[start] == "(" else line.index(" ", start)
    code = _CODE.match(line, kind)
    if code is None:
        raise ValueError(f"no operation in {line[:200]!r}")
    end = _balanced(line, code.end() - 1)
    inside = line[code.end() : end - 1]
    return Op(
        name=head[2],
        code=code[1],
        outputs=tuple(_arrays(line[start:kind])),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        inside=inside,
        attributes=line[end:],
        root=bool(head[1]),
    )


def _balanced(line: str, start: int) -> int:
    """Just behind the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer("[()]", line[start:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return start + found.end()
    raise ValueError(f"unbalanced parentheses in {line[:200]!r}")


def _arrays(text: str) -> list[Array]:
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        found.append(Array(dtype, sizes, not re.search(r"S\([1-9]", layout)))
    return found


def groups(attributes: str, devices: int) -> list[list[int]]:
    """Devices, by their place in the mesh, that exchange with each other."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return [[int(n) for n in re.findall(r"\d+", pair)] for pair in pairs[1].split("},")]
    if mesh := re.search(r"replica_groups=mesh\[([^]]*)\](.*?) ?\{([^}]*)\}", attributes):
        names, sizes = zip(*re.findall(r"'?([\w.\-]+)'?=(\d+)", mesh[1]), strict=True)
        groups = _of_mesh(names, [int(s) for s in sizes], mesh[3])
        if order := re.search(
            r"device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\)", mesh[2]
        ):
            shape, turned, listed = map(_integers, order.groups())
            ids = np.arange(math.prod(shape)).reshape(shape).transpose(turned or range(len(shape)))
            groups = np.array(listed or ids.flatten())[np.array(groups)].tolist()
        return groups
    if iota := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        shape, numbers, turned = map(_integers, iota.groups())
        ids = np.arange(math.prod(numbers)).reshape(numbers)
        return (ids.transpose(turned) if turned else ids).reshape(shape).tolist()
    written = re.search(r"replica_groups=\{(\{.*?\})\}", attributes)
    if written is None:
        return [list(range(devices))]
    return [[int(n) for n in re.findall(r"\d+", group)] for group in written[1].split("},")]


def _integers(text: str | None) -> list[int]:
    return [int(n) for n in (text or "").split(",") if n]


def _of_mesh(names: Sequence[str], sizes: Sequence[int], grouped: str) -> list[list[int]]:
    """Groups along some axes of a mesh; 'a':(2)4 is the part of axis a between 2 and the rest."""
    shape: list[int] = []
    inside: list[int] = []
    parts = re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?(?:,|$)", grouped)
    for name, size in zip(names, sizes, strict=True):
        mine = sorted((int(pre or 1), int(n or size)) for axis, pre, n in parts if axis == name)
        done = 1
        for before, n in mine:
            shape += [before // done, n]
            inside.append(len(shape) - 1)
            done = before * n
        shape.append(size // done)
    outside = [i for i in range(len(shape)) if i not in inside]
    ids = np.arange(math.prod(shape)).reshape(shape).transpose(outside + inside)
    return ids.reshape(-1, math.prod(shape[i] for i in inside)).tolist()
