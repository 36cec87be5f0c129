"""Reads a pickle without executing it: what it describes becomes plain or inert values.

The one invariant: nothing is imported or called because a pickle says so. A global is a name on an
allow-list; calling one either runs a function of ours from a table, or makes a `Stub`, which only
remembers. Work and memory are bounded by the number of opcodes, and so is what a caller may meet:
the tree may hold itself and share its parts, so look into known places of it, and never walk it.
"""

import dataclasses
import struct
from collections.abc import Callable, Mapping
from typing import Any

from bloomjax.errors import InputError

OPCODES = 100_000  # a file of 3000 tensors has fewer
NAME = 128  # characters of a key; keys are printable, so that errors may show them

# Types of programs that wrote BLOOM's files; of everything else an exact name is needed.
PROGRAMS = ("megatron", "deepspeed", "apex")


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function; never the thing itself."""

    name: str


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class Stub:
    """What would be an object: the name of what was called, its arguments, its state (of an
    ordinary class a dict of its attributes)."""

    name: str
    args: tuple[Any, ...]
    state: Any = None


def unpickle(
    data: bytes,
    source: object,
    functions: Mapping[str, Callable[..., Any]],
    inert: frozenset[str],
    persistent: Callable[[Any], Any],
) -> Any:
    """The value of a pickle of protocol 2, which is what torch writes.

    Calls of `functions` (by name) run them; calls of names in `inert`, and of classes of Megatron,
    DeepSpeed and Apex, make stubs. `persistent` gives the value of a persistent id. All of them
    raise InputError for arguments that they do not like. InputError, which names `source`, for
    everything else that is not understood.
    """
    machine = _Machine(data, functions, inert, persistent)
    try:
        return machine.run()
    except (LookupError, ValueError) as error:
        found = error if isinstance(error, ValueError) else "a use of what is not there"
        raise InputError(
            f"{source}: expected the pickle of a checkpoint, found {found} at byte {machine.at}: "
            "it is damaged, or no checkpoint of a BLOOM; bring it back from a copy"
        ) from error
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


class _Machine:
    def __init__(
        self,
        data: bytes,
        functions: Mapping[str, Callable[..., Any]],
        inert: frozenset[str],
        persistent: Callable[[Any], Any],
    ):
        self._data, self.at = data, 0
        self._functions, self._inert, self._persistent = functions, inert, persistent
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  # stacks below marks
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        if self._data[:2] != b"\x80\x02":
            raise ValueError("no protocol 2")
        self.at = 2
        for _ in range(OPCODES):
            code = self._data[self.at : self.at + 1]
            if code == b".":
                if self._outer or len(self._stack) != 1:
                    raise ValueError("an end in the middle")
                return self._stack[0]
            step = _STEPS.get(code)
            if step is None:
                raise ValueError(f"opcode {code!r}, which torch does not write,")
            self.at += 1
            step(self)
        raise ValueError(f"more than {OPCODES} opcodes")

    def take(self, count: int) -> bytes:
        piece = self._data[self.at : self.at + count]
        if len(piece) < count:
            raise ValueError("its end")
        self.at += count
        return piece

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        return self._stack.pop()

    def to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._outer.pop()
        return items

    def mark(self) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def integer(self) -> None:
        size = self.number("<B")
        if size > 32:
            raise ValueError(f"an integer of {size} bytes")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def tuple_of(self, count: int) -> None:
        items = tuple(self.pop() for _ in range(count))
        self.push(items[::-1])

    def append(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError("items of what is no list")
        self._stack[-1].extend(items)

    def set(self, items: list[Any]) -> None:
        into = self._stack[-1]
        if type(into) is not dict or len(items) % 2:
            raise ValueError("entries of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A tuple, or anything that holds others, may take forever to hash.
            text = type(key) is str and len(key) <= NAME and key.isprintable()
            if not (text or type(key) is int):
                raise ValueError("a key that is neither a number nor a short name")
            into[key] = value

    def set_one(self) -> None:
        value, key = self.pop(), self.pop()
        self.set([key, value])

    def line(self) -> str:
        end = self._data.find(b"\n", self.at, self.at + NAME)
        if end < 0:
            raise ValueError("a name without end")
        return self.take(end + 1 - self.at)[:-1].decode()

    def name(self) -> None:
        module, attribute = self.line(), self.line()
        name = f"{module}.{attribute}"
        ours = module.split(".")[0] in PROGRAMS
        if not (ours or name in self._functions or name in self._inert):
            raise InputError(
                f"expected a checkpoint of tensors, found a pickle that calls for {name[:100]!r}: "
                "nothing was executed; get the file from a source you trust, as safetensors"
            )
        self.push(Global(name))

    def call(self) -> None:
        args, what = self.pop(), self.pop()
        if type(what) is not Global or type(args) is not tuple:
            raise ValueError("a call of what is no function")
        function = self._functions.get(what.name)
        self.push(function(*args) if function else Stub(what.name, args))

    def build(self) -> None:
        """State of an object: kept by stubs; a dictionary's attributes (`_metadata`) are dropped"""
        state, into = self.pop(), self._stack[-1]
        if type(into) is Stub:
            into.state = state
        elif type(into) is not dict:
            raise ValueError("the state of what has none")

    def text(self) -> None:
        self.push(self.take(self.number("<I")).decode("utf-8", "surrogatepass"))

    def remember(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def recall(self, index: int) -> None:
        self.push(self._memo[index])

    def persist(self) -> None:
        self.push(self._persistent(self.pop()))


# By the letters of Python's pickletools.
_STEPS: dict[bytes, Callable[[_Machine], None]] = {
    b"(": _Machine.mark,
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": _Machine.integer,
    b"G": lambda m: m.push(m.number(">d")),
    b"X": _Machine.text,
    b"]": lambda m: m.push([]),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.to_mark()),
    b"}": lambda m: m.push({}),
    b"s": _Machine.set_one,
    b"u": lambda m: m.set(m.to_mark()),
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.to_mark())),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"c": _Machine.name,
    b"R": _Machine.call,
    b"\x81": _Machine.call,  # NEWOBJ: the same, of a class
    b"b": _Machine.build,
    b"q": lambda m: m.remember(m.number("<B")),
    b"r": lambda m: m.remember(m.number("<I")),
    b"h": lambda m: m.recall(m.number("<B")),
    b"j": lambda m: m.recall(m.number("<I")),
    b"Q": _Machine.persist,
}
