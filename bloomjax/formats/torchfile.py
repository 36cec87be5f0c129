"""torch's files (`torch.save` since 1.6) without torch: a zip archive of a pickle and storages.

Read: tensors become `Stored`, that is where in the file they lie; nothing else is read of them.
Written: the archive is planned first, then the tensors' bytes come in order, a few rows at a time.
The one invariant: no pickle is executed (`formats.unpickle`), and no number of a file is believed
before it has been compared with the file's real size.
"""

import io
import math
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from bloomjax.errors import InputError
from bloomjax.formats.archive import Member, content, members
from bloomjax.formats.tensors import Stored
from bloomjax.formats.unpickle import Global, unpickle

PICKLE_BYTES = 4 << 20

# torch.<tag>Storage
STORAGES = {
    "Float": np.dtype(np.float32),
    "Half": np.dtype(np.float16),
    "BFloat16": np.dtype(ml_dtypes.bfloat16),
    "Double": np.dtype(np.float64),
    "Long": np.dtype(np.int64),
    "Int": np.dtype(np.int32),
    "Short": np.dtype(np.int16),
    "Char": np.dtype(np.int8),
    "Byte": np.dtype(np.uint8),
    "Bool": np.dtype(np.bool_),
}
_TAGS = {f"torch.{tag}Storage": dtype for tag, dtype in STORAGES.items()}
_INERT = frozenset(_TAGS) | {
    *(f"torch.{dtype.name}" for dtype in STORAGES.values()),
    *("torch.device", "torch.Tensor", "torch.nn.parameter.Parameter"),
    *("argparse.Namespace", "__builtin__.set", "numpy.ndarray", "numpy.dtype"),
    *(
        f"numpy.{core}.multiarray.{x}"
        for core in ("core", "_core")
        for x in ("_reconstruct", "scalar")
    ),
}


def read_torch(path: Path) -> Any:
    """What `torch.save` put into `path`: dictionaries (ordered ones too), lists, tuples and plain
    values, with `Stored` for every tensor, and a `Stub` for objects of Megatron and DeepSpeed.

    The tree may hold itself or share its parts: take what is expected from it, and check the types
    of that. Raises InputError for whatever is no such file, or is damaged, or means harm.
    """
    found = members(path)
    pickles = [name for name in found if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise InputError(
            f"{path}: expected a file of torch.save, found a zip archive with {len(pickles)} "
            "data.pkl: is it the right file?"
        )
    prefix = pickles[0].removesuffix("data.pkl")
    order = found.get(f"{prefix}byteorder")
    if order and content(path, order, 16) != b"little":
        raise InputError(f"{path}: expected little-endian tensors, found others: save it anew")
    return unpickle(
        content(path, found[pickles[0]], PICKLE_BYTES),
        path,
        _functions(path),
        _INERT,
        lambda key: _storage(key, found, prefix),
    )


class _Storage(NamedTuple):
    offset: int  # bytes, in the file
    numel: int
    dtype: np.dtype


def _storage(key: Any, found: dict[str, Member], prefix: str) -> _Storage:
    """Of a persistent id: ("storage", the tag, name of the member, device, elements)."""
    match key:
        case ("storage", Global(tag), str(name), _, int(numel)) if tag in _TAGS:
            member, dtype = found.get(f"{prefix}data/{name}"), _TAGS[tag]
            size = member.size if member else None
            if member and size == numel * dtype.itemsize:
                return _Storage(member.offset, numel, dtype)
            raise InputError(f"expected a storage of {numel} {dtype} elements, found {size} bytes")
    raise InputError("expected a storage, found another persistent id: it is no file of torch.save")


def _functions(path: Path) -> dict[str, Callable[..., Any]]:
    """What a pickle may call, by name, in words of ours; all take any number of arguments."""

    def tensor(*args: Any) -> Stored:
        match args:
            case (_Storage(), int(offset), tuple(shape), tuple(stride), *_):
                return _stored(path, args[0], offset, shape, stride)
        raise InputError("expected a tensor of a storage, found other arguments")

    def parameter(*args: Any) -> Stored:
        if args and type(args[0]) is Stored:
            return args[0]
        raise InputError("expected a parameter of a tensor, found other arguments")

    def with_attributes(*args: Any) -> Stored:
        """torch._tensor._rebuild_from_type_v2(function, type, arguments, attributes)."""
        match args:
            case (Global("torch._utils._rebuild_tensor_v2"), _, tuple(inner), *_):
                return tensor(*inner)
            case (Global("torch._utils._rebuild_parameter"), _, tuple(inner), *_):
                return parameter(*inner)
        raise InputError("expected a tensor with attributes, found other arguments")

    def size(*args: Any) -> tuple[Any, ...]:
        match args:
            case (tuple(shape),):
                return shape
        raise InputError("expected a shape, found other arguments")

    def ordered(*args: Any) -> dict[Any, Any]:
        if args:
            raise InputError("expected an empty OrderedDict, found arguments")
        return {}

    def encoded(*args: Any) -> bytes:
        """bytes, as protocol 2 writes them."""
        match args:
            case (str(text), "latin1"):
                return text.encode("latin-1")
        raise InputError("expected text, found other arguments")

    return {
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_parameter": parameter,
        "torch._utils._rebuild_parameter_with_state": parameter,
        "torch._tensor._rebuild_from_type_v2": with_attributes,
        "torch.Size": size,
        "collections.OrderedDict": ordered,
        "_codecs.encode": encoded,
    }


def _stored(
    path: Path, storage: _Storage, offset: int, shape: tuple[Any, ...], stride: tuple[Any, ...]
) -> Stored:
    """InputError unless the tensor lies in its storage, in one piece."""
    whole = all(type(x) is int and 0 <= x < 1 << 48 for x in (offset, *shape, *stride))
    if (
        not whole
        or not len(shape) == len(stride) <= 8
        or math.prod(filter(None, shape)) >= 1 << 48  # an empty tensor may not overflow either
    ):
        raise InputError("expected a tensor's shape and strides, found no such numbers")
    numel = math.prod(shape)
    if offset + numel > storage.numel:
        raise InputError(
            f"expected a tensor of {list(shape)} at {offset}, found {storage.numel} elements "
            "stored: the file was cut short, or is no BLOOM's"
        )
    expected = 1
    for size, step in reversed(list(zip(shape, stride, strict=True))):
        if numel and size > 1 and step != expected:
            raise InputError(
                f"expected a tensor in one piece, found strides {list(stride)} of shape "
                f"{list(shape)}: save it again with .contiguous()"
            )
        expected *= size
    return Stored(path, storage.offset + offset * storage.dtype.itemsize, storage.dtype, shape)


class Planned(NamedTuple):
    """A tensor to be written: a leaf of the tree that TorchWriter gets."""

    dtype: np.dtype
    shape: tuple[int, ...]


class Size(tuple[int, ...]):
    """A shape that shall be read as torch.Size."""


class TorchWriter:
    """A file that `torch.load(weights_only=True)` reads (`mmap=True` too), written in order.

    `tree` is made of dictionaries, lists, tuples, `Size`, str, int, float, bool and None, with
    `Planned` where tensors shall be. Then `write` takes the elements of one tensor after another,
    in the order of the tree, in any pieces that end where a tensor ends; `finish` completes the
    file.
    """

    def __init__(self, path: Path, tree: Any):
        self._file = open(path, "wb")  # noqa: SIM115 (until finish)
        self._zip = zipfile.ZipFile(self._file, "w")
        pickle = _Pickle()
        pickle.value(tree)
        self._put("data.pkl", b"\x80\x02" + pickle.out.getvalue() + b".")
        self._put("byteorder", b"little")
        self._plans = enumerate(pickle.plans)
        self._left = 0
        self._next()

    def write(self, elements: np.ndarray) -> None:
        """The next elements of the tensor whose turn it is, in its dtype."""
        data = np.ascontiguousarray(elements).reshape(-1)
        assert self._member and data.dtype == self._dtype and data.nbytes <= self._left
        self._member.write(data.view(np.uint8).data)
        self._left -= data.nbytes
        if not self._left:
            self._next()

    def finish(self) -> None:
        """Complete the file and sync it to disk."""
        assert self._member is None, "some tensor has not been written"
        self._put("version", b"3\n")
        self._zip.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _next(self) -> None:
        """Open the storage of the next tensor that has any elements."""
        self._member = None
        for index, plan in self._plans:
            size = math.prod(plan.shape) * plan.dtype.itemsize
            if size:
                self._member, self._left = self._open(f"data/{index}", size), size
                self._dtype = plan.dtype
                return
            self._put(f"data/{index}", b"")

    def _put(self, name: str, data: bytes) -> None:
        with self._open(name, len(data)) as member:
            member.write(data)

    def _open(self, name: str, size: int) -> IO[bytes]:
        """A member whose bytes begin at a multiple of 64, by a filler of torch's kind."""
        info = zipfile.ZipInfo(f"archive/{name}")
        wide = size >= 1 << 31
        before = self._file.tell() + 30 + len(info.filename) + 4 + 20 * wide
        info.extra = b"FB" + struct.pack("<H", -before % 64) + b"Z" * (-before % 64)
        return self._zip.open(info, "w", force_zip64=wide)


class _Pickle:
    """The opcodes of a tree, without a memo, and the tensors in it."""

    def __init__(self) -> None:
        self.out = io.BytesIO()
        self.plans: list[Planned] = []

    def value(self, value: Any) -> None:
        match value:
            case None:
                self.out.write(b"N")
            case bool():
                self.out.write(b"\x88" if value else b"\x89")
            case int():
                data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
                self.out.write(b"\x8a" + bytes([len(data)]) + data)
            case float():
                self.out.write(b"G" + struct.pack(">d", value))
            case str():
                data = value.encode()
                self.out.write(b"X" + struct.pack("<I", len(data)) + data)
            case Planned():
                self._tensor(value)
            case Size():
                self._call("torch\nSize", tuple(value))
            case tuple():
                self.out.write(b"(")
                for item in value:
                    self.value(item)
                self.out.write(b"t")
            case list():
                self.out.write(b"](")
                for item in value:
                    self.value(item)
                self.out.write(b"e")
            case dict():
                self.out.write(b"}(")
                for key, item in value.items():
                    self.value(key)
                    self.value(item)
                self.out.write(b"u")
            case _:
                raise TypeError(f"{type(value)} in a tree for torch")

    def _call(self, name: str, *args: Any) -> None:
        self.out.write(f"c{name}\n".encode())
        self.value(args)
        self.out.write(b"R")

    def _tensor(self, plan: Planned) -> None:
        """torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, requires_grad, hooks)."""
        tag = next(tag for tag, dtype in STORAGES.items() if dtype == plan.dtype)
        strides = tuple(math.prod(plan.shape[i + 1 :]) for i in range(len(plan.shape)))
        self.out.write(b"ctorch._utils\n_rebuild_tensor_v2\n((")
        self.value("storage")
        self.out.write(f"ctorch\n{tag}Storage\n".encode())
        self.value(str(len(self.plans)))
        self.value("cpu")
        self.value(math.prod(plan.shape))
        self.out.write(b"tQ")
        for value in (0, plan.shape, strides, False):
            self.value(value)
        self._call("collections\nOrderedDict")
        self.out.write(b"tR")
        self.plans.append(plan)
