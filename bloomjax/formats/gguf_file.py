"""The container GGUF: key-value pairs and where tensors lie, of a file that nobody vouches for.

The one invariant: a number of the file is compared with limits and with the file's real size before
anything is allocated, or looped over, because of it. Versions 2 and 3, little-endian; the layout is
ggml's docs/gguf.md, and limits are stricter than ggml's where no BLOOM needs more.
"""

import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from bloomjax.errors import InputError

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
_MAX_HEADER = 32 << 20  # bytes before the tensors; that of a BLOOM, with its vocabulary, has 15 MB
_MAX_PAIRS, _MAX_TENSORS, _MAX_DIMENSIONS = 10_000, 65_000, 4
_MAX_STRINGS = 1 << 20  # in all arrays together: their lengths are walked through; BLOOM has 0.5 M
_MAX_STRING, _MAX_KEY, _MAX_NAME = 1 << 20, 1 << 16, 63  # bytes; ggml has 64 for a name and its end
_MAX_ALIGNMENT = 1 << 16

# Types of values, by ggml's numbers. 8 is a string, 9 an array.
_NUMBERS = {
    i: np.dtype(code)
    for i, code in {
        **{0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"},
        **{10: "<u8", 11: "<i8", 12: "<f8"},
    }.items()
}
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class Kind(NamedTuple):
    """How a tensor's numbers are stored: blocks of `block` weights in `size` bytes each."""

    name: str  # as in gguf.GGMLQuantizationType
    number: int  # ggml's
    block: int
    size: int
    dtype: np.dtype | None = None  # None: quantised


KINDS = {
    kind.name: kind
    for kind in (
        Kind("F32", 0, 1, 4, np.dtype("<f4")),
        Kind("F16", 1, 1, 2, np.dtype("<f2")),
        Kind("BF16", 30, 1, 2, np.dtype(ml_dtypes.bfloat16)),
        Kind("Q4_0", 2, 32, 18),
        Kind("Q4_1", 3, 32, 20),
        Kind("Q5_0", 6, 32, 22),
        Kind("Q5_1", 7, 32, 24),
        Kind("Q8_0", 8, 32, 34),
        Kind("Q2_K", 10, 256, 84),
        Kind("Q3_K", 11, 256, 110),
        Kind("Q4_K", 12, 256, 144),
        Kind("Q5_K", 13, 256, 176),
        Kind("Q6_K", 14, 256, 210),
    )
}
_BY_NUMBER = {kind.number: kind for kind in KINDS.values()}


class Tensor(NamedTuple):
    kind: Kind
    shape: tuple[int, ...]  # as numpy has it: GGUF lists the dimensions the other way round
    offset: int  # bytes from the start of the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.kind.block * self.kind.size


class Array(NamedTuple):
    """An array of the header, not yet made into Python objects."""

    type: int  # of its elements
    length: int
    start: int  # in the header


class GGUFFile:
    """Header of a GGUF file: `values` by key (numbers, booleans, strings, `Array`s), `tensors` by
    name. InputError, in one line, for whatever is not as it should be."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self._size = os.fstat(file.fileno()).st_size
                self._header = file.read(_MAX_HEADER)
        except OSError as error:
            raise InputError(
                f"{self.path}: expected a GGUF file, found: {error.strerror}"
            ) from error
        self._at = self._strings = 0
        if self._take(4) != MAGIC:
            self._refuse("a GGUF file", "another kind of file")
        version = self._number(_U32)
        if version not in (2, 3):
            self._refuse("GGUF version 2 or 3, little-endian", f"version {version:#x}")
        counts = self._number(_U64), self._number(_U64)
        for what, count, most in zip(
            ("tensors", "key-value pairs"), counts, (_MAX_TENSORS, _MAX_PAIRS), strict=True
        ):
            if count > most:
                self._refuse(f"at most {most} {what}", f"{count}")
        self.values = self._pairs(counts[1])
        self.tensors = self._tensors(counts[0])
        self._header = self._header[: self._at]

    def get(self, key: str, expected: type, default: Any = None) -> Any:
        """The value of `key` if it is of that type. InputError if not, or if there is neither the
        key nor a default."""
        value = self.values.get(key, default)
        if type(value) is not expected:
            found = "none" if value is None else f"a {type(value).__name__}"
            self._refuse(f"{key}, of type {expected.__name__}", found)
        return value

    def strings(self, key: str) -> list[str] | None:
        """The elements of an array of strings; None without the key."""
        array = self._array(key)
        if array is None:
            return None
        if array.type != STRING:
            self._refuse(f"{key}, an array of strings", "an array of something else")
        header, at, out = self._header, array.start, []
        try:
            for _ in range(array.length):  # whose lengths the constructor has seen
                (length,) = _U64.unpack_from(header, at)
                at += 8 + length
                out.append(str(header[at - length : at], "utf-8"))
        except UnicodeDecodeError:
            self._refuse(f"{key}, an array of UTF-8", "other bytes")
        return out

    def numbers(self, key: str) -> np.ndarray | None:
        """The elements of an array of numbers; None without the key."""
        array = self._array(key)
        if array is None:
            return None
        if array.type == STRING:
            self._refuse(f"{key}, an array of numbers", "strings")
        return np.frombuffer(self._header, _NUMBERS[array.type], array.length, array.start)

    def _array(self, key: str) -> Array | None:
        return self.get(key, Array) if key in self.values else None

    def _refuse(self, expected: str, found: str) -> NoReturn:
        raise InputError(f"{self.path}: expected {expected}, found {found}: get the file again")

    def _skip(self, count: int) -> int:
        """Where the next `count` bytes of the header begin."""
        start, end = self._at, self._at + count
        if end > len(self._header):
            if end > self._size:
                self._refuse(f"{count} bytes at {self._at}", f"{self._size - self._at} to the end")
            self._refuse(f"a header of at most {_MAX_HEADER >> 20} MiB", "more")
        self._at = end
        return start

    def _take(self, count: int) -> bytes:
        start = self._skip(count)
        return self._header[start : self._at]

    def _number(self, form: struct.Struct) -> int:
        return form.unpack(self._take(form.size))[0]

    def _text(self, most: int, what: str) -> str:
        length = self._number(_U64)
        if length > most:
            self._refuse(f"{what} of at most {most} bytes", f"{length}")
        try:
            return str(self._take(length), "utf-8")
        except UnicodeDecodeError:
            self._refuse(f"{what} in UTF-8", "other bytes")

    def _name(self, most: int, what: str, known: Mapping[str, Any]) -> str:
        """A key, or a tensor's name: fit to be printed in one line, and new."""
        name = self._text(most, what)
        if not name or not name.isprintable():
            self._refuse(f"{what} that can be printed", f"{name[:40]!r}")
        if name in known:
            self._refuse(f"every {what} once", f"{name[:80]!r} twice")
        return name

    def _pairs(self, count: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for _ in range(count):
            key = self._name(_MAX_KEY, "key", values)
            values[key] = self._value(key[:80])
        return values

    def _value(self, key: str) -> Any:
        number = self._number(_U32)
        if number == STRING:
            return self._text(_MAX_STRING, f"a value of {key}")
        if number != ARRAY:
            dtype = self._dtype(number, key)
            return np.frombuffer(self._take(dtype.itemsize), dtype)[0].item()
        number, count = self._number(_U32), self._number(_U64)
        array = Array(number, count, self._at)
        if number == STRING:
            self._skip_strings(count, key)
        else:  # an array of arrays has no dtype either
            self._skip(count * self._dtype(number, key).itemsize)
        return array

    def _dtype(self, number: int, key: str) -> np.dtype:
        if number not in _NUMBERS:
            self._refuse(f"numbers, strings, or an array of them as {key}", f"type {number}")
        return _NUMBERS[number]

    def _skip_strings(self, count: int, key: str) -> None:
        self._strings += count
        if self._strings > _MAX_STRINGS:
            self._refuse(f"at most {_MAX_STRINGS} strings in arrays", f"{self._strings} with {key}")
        header, at = self._header, self._at
        last = len(header) - 8
        for _ in range(count):
            if at > last:
                break
            (length,) = _U64.unpack_from(header, at)
            if length > _MAX_STRING:
                self._refuse(f"strings of at most {_MAX_STRING} bytes in {key}", f"{length}")
            at += 8 + length
        else:
            last = len(header)
        if at > last:
            self._skip(at + 8 - self._at)  # which are too many
        self._at = at

    def _tensors(self, count: int) -> dict[str, Tensor]:
        found: dict[str, tuple[Kind, tuple[int, ...], int]] = {}
        for _ in range(count):
            name = self._name(_MAX_NAME, "tensor's name", found)
            dimensions = self._number(_U32)
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                self._refuse(f"1 to 4 dimensions of {name}", f"{dimensions}")
            shape = tuple(self._number(_U64) for _ in range(dimensions))[::-1]
            kind = _BY_NUMBER.get(self._number(_U32))
            if kind is None:
                self._refuse(f"{name} as one of {', '.join(KINDS)}", "another type")
            if not 0 < math.prod(shape) < 1 << 62 or shape[-1] % kind.block:
                self._refuse(f"rows of {name} in whole blocks of {kind.name}", f"{list(shape)}")
            found[name] = kind, shape, self._number(_U64)
        align = self.get("general.alignment", int, ALIGNMENT)
        if not 1 <= align <= _MAX_ALIGNMENT or align & (align - 1):
            self._refuse("an alignment that is a power of two up to 65536", f"{align}")
        start = padded(self._at, align)
        tensors = {}
        for name, (kind, shape, offset) in found.items():
            tensors[name] = Tensor(kind, shape, start + offset)
            if offset % align or start + offset + tensors[name].nbytes > self._size:
                self._refuse(
                    f"{name} aligned to {align} bytes within the file's {self._size}",
                    f"{tensors[name].nbytes} bytes at {start + offset}",
                )
        end, before = start, ""
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
            if tensor.offset < end:
                self._refuse("tensors apart from each other", f"{name} overlapping {before}")
            end, before = tensor.offset + tensor.nbytes, name
        return tensors


def padded(offset: int, alignment: int = ALIGNMENT) -> int:
    """The next multiple of `alignment`."""
    return -(-offset // alignment) * alignment


def header(
    values: Mapping[str, tuple[int, Any]], tensors: Sequence[tuple[str, Kind, tuple[int, ...]]]
) -> tuple[bytes, dict[str, Tensor]]:
    """The bytes of a file of version 3 before its tensors, and where these lie, in this order.

    `values` are pairs of a type and a value; a sequence is an array of that type.
    """
    pieces = [MAGIC, _U32.pack(VERSION), _U64.pack(len(tensors)), _U64.pack(len(values))]
    for key, (number, value) in values.items():
        pieces.append(_string(key))
        if isinstance(value, str) or np.isscalar(value):
            pieces += [_U32.pack(number), *_elements(number, [value])]
        else:
            pieces += [_U32.pack(ARRAY), _U32.pack(number), _U64.pack(len(value))]
            pieces += _elements(number, value)
    placed, offset = {}, 0
    for name, kind, shape in tensors:
        dimensions = b"".join(_U64.pack(size) for size in reversed(shape))
        pieces += [_string(name), _U32.pack(len(shape)), dimensions]
        pieces += [_U32.pack(kind.number), _U64.pack(offset)]
        placed[name] = Tensor(kind, shape, offset)
        offset = padded(offset + placed[name].nbytes)
    data = b"".join(pieces)
    data += bytes(padded(len(data)) - len(data))
    return data, {k: t._replace(offset=t.offset + len(data)) for k, t in placed.items()}


def _string(text: str) -> bytes:
    data = text.encode()
    return _U64.pack(len(data)) + data


def _elements(number: int, values: Sequence[Any]) -> Iterator[bytes]:
    if number == STRING:
        return map(_string, values)
    return iter([np.asarray(values, _NUMBERS[number]).tobytes()])
