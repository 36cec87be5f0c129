"""Files of torch.save that mean harm, or are damaged: refused in one line, and nothing executed."""

import io
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import refused, survives

from bloomjax.errors import InputError
from bloomjax.formats import torchfile
from bloomjax.formats.tensors import Stored
from bloomjax.formats.torchfile import Planned, TorchWriter, read_torch

GOLDEN = Path(__file__).parent / "golden" / "torch_save.pt"


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *args: Any):
        self.how = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.how


def saved(
    path: Path, pickled: bytes, members: dict[str, bytes] | None = None, **kwargs: int
) -> Path:
    """An archive as torch writes it, of any pickle."""
    with zipfile.ZipFile(path, "w", **kwargs) as archive:  # type: ignore[arg-type]
        archive.writestr("archive/data.pkl", pickled)
        for name, data in (members or {"data/0": bytes(24)}).items():
            archive.writestr(f"archive/{name}", data)
    return path


def op(text: str) -> bytes:
    """The byte of an opcode by its name in pickletools."""
    return next(x.code for x in pickletools.opcodes if x.name == text).encode("latin-1")


def value(item: Any) -> bytes:
    """Opcodes that push a plain value."""
    return pickle.dumps(item, 2)[2:-1]


def tensor(
    shape: Any = (2, 3), stride: Any = (3, 1), offset: Any = 0, key: Any = "0", numel: Any = 6
) -> bytes:
    storage = b"(" + value("storage") + b"ctorch\nFloatStorage\n" + value(key) + value("cpu")
    storage += value(numel) + b"tQ"
    rest = value(offset) + value(shape) + value(stride) + value(False) + value(None)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


def pickled(*opcodes: bytes) -> bytes:
    return b"\x80\x02" + b"".join(opcodes) + b"."


def test_the_helper_is_right(tmp_path: Path) -> None:
    """Otherwise the refusals below prove nothing."""
    path = saved(
        tmp_path / "x.pt", pickled(tensor()), {"data/0": np.arange(6.0).astype("f").tobytes()}
    )
    assert read_torch(path).rows(0, 2).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_executed(tmp_path: Path, protocol: int) -> None:
    canary = tmp_path / "canary"
    attack = Call(os.system, f"touch {canary}")
    path = saved(tmp_path / "x.pt", pickle.dumps({"weight": attack}, protocol))
    refused(lambda: read_torch(path), str(path), "posix.system" if protocol == 2 else "expected")
    assert not canary.exists()


GLOBALS = ("builtins.eval", "__builtin__.getattr", "numpy.load", "torch.load", "torch._utils._x",
           "runpy._run_code", "importlib.import_module", "collections.OrderedDict.update",
           "megatron_evil.x", "operator.attrgetter", "functools.partial")  # fmt: skip


@pytest.mark.parametrize("name", GLOBALS)
def test_unknown_globals(tmp_path: Path, name: str) -> None:
    module, attribute = name.rsplit(".", 1)
    path = saved(tmp_path / "x.pt", pickled(f"c{module}\n{attribute}\n".encode(), b")R"))
    refused(lambda: read_torch(path), repr(name), "nothing was executed")


NAMESPACE = b"cargparse\nNamespace\n)\x81"
STORAGE = (
    b"(" + value("storage") + b"ctorch\nFloatStorage\n" + value("0") + value("cpu") + b"K\x06tQ"
)
ODD = {
    "nothing": b"",
    "no end": b"}" * 5,
    "two values": b"}}",
    "inside a mark": b"(}",
    "empty stack": b"0",
    "underflow": b"s",
    "no mark": b"t",
    "unknown memo": b"h\x07",
    "memo of nothing": b"q\x00",
    "huge memo": b"]r\xff\xff\xff\xffj\xfe\xff\xff\xff",
    "STACK_GLOBAL": value("os") + value("system") + op("STACK_GLOBAL"),
    "INST": b"(ios\nsystem\n",
    "OBJ": b"(cargparse\nNamespace\no",
    "EXT1": op("EXT1") + b"\x01",
    "PERSID": b"Pfile:///etc/passwd\n",
    "a long integer": op("LONG4") + struct.pack("<I", 1 << 20) + b"\x01" * (1 << 20),
    "integer of 255 bytes": op("LONG1") + b"\xff" + b"\x01" * 255,
    "text of 4 GB": b"X\xff\xff\xff\xffabc",
    "no text": b"X\x02\x00\x00\x00\xff\xfe",
    "global without end": b"c" + b"torch" * 100_000,
    "million values": b"}" * 1_000_000,
    "million marks": b"(" * 1_000_000,
    "entry of a list": b"]" + value("a") + value(1) + b"s",
    "entry of a tensor": tensor() + value("a") + value(1) + b"s",
    "entry of an object": NAMESPACE + value("a") + value(1) + b"s",
    "item of a dictionary": b"}" + value(1) + b"a",
    "item of a tensor": tensor() + value(1) + b"a",
    "odd entries": b"}(" + value("a") + b"u",
    "list as a key": b"}]" + value(1) + b"s",
    "tuple as a key": b"}" + value((1,)) + value(1) + b"s",
    "object as a key": b"}" + NAMESPACE + value(1) + b"s",
    "line as a key": b"}" + value("a\nb") + value(1) + b"s",
    "long key": b"}" + value("a" * 1000) + value(1) + b"s",
    "state of a tensor": tensor() + b"}b",
    "state of a list": b"]}b",
    "state of a global": b"ctorch\nfloat32\n}b",
    "call of a value": value("os.system") + b")R",
    "call of an object": NAMESPACE + b")R",
    "call without a tuple": b"ccollections\nOrderedDict\n]R",
    "full OrderedDict": b"ccollections\nOrderedDict\n" + value(([("a", 1)],)) + b"R",
    "tensor of nothing": b"ctorch._utils\n_rebuild_tensor_v2\n)R",
    "parameter of nothing": b"ctorch._utils\n_rebuild_parameter\n(]tR",
    "encoded list": b"c_codecs\nencode\n(]" + value("latin1") + b"tR",
    "encoded otherwise": b"c_codecs\nencode\n" + value(("a", "rot13")) + b"R",
    "size of a list": b"ctorch\nSize\n(]tR",
    "attributes of a call": b"ctorch._tensor\n_rebuild_from_type_v2\n(cargparse\nNamespace\nN)NtR",
    "other persistent id": value(("module", "x")) + b"Q",
    "storage of no type": value(("storage", "FloatStorage", "0", "cpu", 6)) + b"Q",
    "negative size": tensor(shape=(-2, -3)),
    "negative stride": tensor(stride=(-3, 1)),
    "negative offset": tensor(offset=-1),
    "beyond the storage": tensor(offset=1),
    "huge shape": tensor(shape=(1 << 62, 1 << 62), stride=(1 << 62, 1)),
    "wrapping shape": tensor(shape=(1 << 32, 1 << 32), stride=(1 << 32, 1)),
    "empty and huge": tensor(shape=(0, 1 << 47, 1 << 47), stride=(1, 1, 1)),
    "many dimensions": tensor(shape=(1,) * 9, stride=(1,) * 9),
    "float shape": tensor(shape=(2.0, 3)),
    "boolean shape": tensor(shape=(True, 3)),
    "shape of text": tensor(shape="23"),
    "strides of another length": tensor(stride=(1,)),
    "transposed": tensor(stride=(1, 2)),
    "repeated": tensor(stride=(0, 1)),
    "storage that lies up": tensor(shape=(1000, 1000), stride=(1000, 1), numel=1_000_000),
    "storage that lies down": tensor(shape=(1,), stride=(1,), numel=1),
    "storage of negative size": tensor(numel=-6),
    "storage outside": tensor(key="../../../etc/passwd"),
    "storage that is missing": tensor(key="1"),
    "storage by number": tensor(key=0),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_pickles(tmp_path: Path, name: str) -> None:
    data = ODD[name] if name == "no end" else pickled(ODD[name])
    path = saved(tmp_path / "x.pt", data)
    refused(lambda: read_torch(path), str(path), "expected", "found")


HARMLESS = {
    "a list in itself": b"]q\x00h\x00a",
    "a dictionary in itself": b"}q\x00" + value("a") + b"h\x00s",
    "deep lists": b"]" * 49_000 + b"a" * 48_999,
    "deep tuples": b")" + b"\x85" * 99_000,
    "tuples of themselves": b")" + b"q\x00h\x00\x86" * 30_000,
    "deep objects": b"(" + NAMESPACE + (b"q\x00" + NAMESPACE + b"h\x00b") * 16_000 + b"t",
    "a storage by itself": STORAGE,
    "attributes of a dictionary": b"}}" + value("_metadata") + b"]s" + b"b",
    "an object with hostile state": NAMESPACE + b"}" + value("__class__") + value("x") + b"sb",
}


@pytest.mark.parametrize("name", HARMLESS)
def test_odd_values_do_no_harm(tmp_path: Path, name: str) -> None:
    read_torch(saved(tmp_path / "x.pt", pickled(HARMLESS[name])))


def _good() -> bytes:
    return GOLDEN.read_bytes()


def _patched(what: bytes, offset: int, new: bytes) -> bytes:
    """`new` some bytes after the last place of `what`."""
    data, at = bytearray(_good()), _good().rindex(what) + offset
    data[at : at + len(new)] = new
    return bytes(data)


ENTRY, END, END64 = b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06"


def _wide(field: int, form: str) -> bytes:
    """An archive of one member whose entry has 2^64 - 1 at `field`, in its field for large
    numbers, `form` being that of an entry's 32 bits there."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(b"}"))
    data = stream.getvalue()
    entry, end = bytearray(data[data.index(ENTRY) : data.index(END)]), data.index(END)
    extra = struct.pack("<2H", 1, 8 * len(form)) + b"\xff" * 8 * len(form)
    entry[field : field + 4 * len(form)] = b"\xff" * 4 * len(form)
    entry[30:32] = struct.pack("<H", len(extra))
    directory = bytes(entry) + extra
    tail = data[end : end + 12] + struct.pack("<I", len(directory)) + data[end + 16 :]
    return data[: data.index(ENTRY)] + directory + tail


NO_ZIP = {
    "empty": lambda: b"",
    "four bytes": lambda: b"PK\x03\x04",
    "7z": lambda: b"7z\xbc\xaf\x27\x1c" + _good()[6:],
    "gzip": lambda: b"\x1f\x8b" + bytes(100),
    "pickle of torch < 1.6": lambda: pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"\x80\x02.",
    "pointer of git-lfs": lambda: b"version https://git-lfs.github.com/spec/v1\n",
    "something before": lambda: b"#!" + _good(),
    "something after": lambda: _good() + b"x",
    "half": lambda: _good()[: len(_good()) // 2],
    "no last byte": lambda: _good()[:-1],
    "no directory": lambda: _good()[: _good().index(ENTRY)] + _good()[_good().rindex(END64) :],
    "count of 2^63": lambda: _patched(END64, 24, b"\xff" * 15 + b"\x7f"),
    "directory of 2^63 bytes": lambda: _patched(END64, 40, b"\xff" * 7 + b"\x7f"),
    "directory far away": lambda: _patched(END64, 48, b"\xff" * 7 + b"\x7f"),
    "two disks": lambda: _patched(END64, 16, b"\x01"),
    "member far away": lambda: _patched(ENTRY, 42, b"\xfe\xff\xff\xff"),
    "member at 2^64": lambda: _wide(42, "I"),
    "member of 2^64 bytes": lambda: _wide(20, "II"),
    "member over another": lambda: _patched(ENTRY, 42, bytes(4)),
    "large member": lambda: _patched(ENTRY, 20, b"\xfe\xff\xff\xff" * 2),
    "member of two sizes": lambda: _patched(ENTRY, 20, b"\xfe\xff\xff\xff"),
    "compressed": lambda: _patched(ENTRY, 10, b"\x08"),
    "encrypted": lambda: _patched(ENTRY, 8, b"\x01"),
    "other name": lambda: _patched(ENTRY, 46, b"X"),
    "damaged pickle": lambda: _good().replace(b"parameter", b"parametes", 1),
    "big endian": lambda: _good().replace(b"little", b"big   ", 1),
}  # fmt: skip


def test_a_member_inside_another(tmp_path: Path) -> None:
    path, inner = tmp_path / "x.pt", io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("archive/data/1", b"inside")
    saved(path, pickled(b"}"), {"data/0": inner.getvalue(), "data/1": b"inside"})
    data = bytearray(path.read_bytes())
    at = data.rindex(ENTRY) + 42
    data[at : at + 4] = struct.pack("<I", data.index(inner.getvalue()))
    path.write_bytes(data)
    refused(lambda: read_torch(path), "overlap")


@pytest.mark.parametrize("name", NO_ZIP)
def test_odd_archives(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(NO_ZIP[name]())
    refused(lambda: read_torch(path), str(path), "expected", "found")


def test_bombs(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    saved(path, b"\0" * (60 << 20), compression=zipfile.ZIP_DEFLATED)
    refused(lambda: read_torch(path), "compressed")
    saved(path, pickled(tensor()), {"data/0": b"\0" * (60 << 20)})
    refused(lambda: read_torch(path), "62914560")
    saved(path, b"\x80\x02" + b"}" * (60 << 20))
    refused(lambda: read_torch(path), "at most")
    many = {f"data/{i}": b"" for i in range(70_000)}
    saved(path, pickled(tensor()), many)
    refused(lambda: read_torch(path), "70001 members")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(b"}"))
        archive.writestr("other/data.pkl", pickled(b"}"))
    refused(lambda: read_torch(path), "2 data.pkl")
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", pickled(b"}"))
        archive.writestr("archive/data.pkl", pickled(b"]"))
    refused(lambda: read_torch(path), "twice")


def test_no_file(tmp_path: Path) -> None:
    refused(lambda: read_torch(tmp_path / "x.pt"), "No such file")
    refused(lambda: read_torch(tmp_path), "directory")


def small(path: Path) -> bytes:
    writer = TorchWriter(path, {"a": Planned(np.dtype(np.int16), (3,)), "b": [1, "x", (2.0,)]})
    writer.write(np.arange(3, dtype=np.int16))
    writer.finish()
    return path.read_bytes()


def read_all(path: Path) -> None:
    """What a damaged file still gives lies within the file."""
    tree = read_torch(path)
    for leaf in tree.values() if type(tree) is dict else [tree]:
        if type(leaf) is Stored and leaf.shape:
            try:
                leaf.rows(0, leaf.shape[0])
            except InputError as error:
                raise AssertionError("beyond the file") from error


@pytest.mark.slow
def test_mutated_archives(tmp_path: Path) -> None:
    seeds = [_good(), small(tmp_path / "seed.pt")]
    assert survives(read_all, seeds, tmp_path / "x.pt") > 5000


@pytest.mark.slow
def test_mutated_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of the pickle alone, which a checksum would protect otherwise."""
    with zipfile.ZipFile(GOLDEN) as archive:
        seed = archive.read("torch_save/data.pkl")
    path = tmp_path / "x.pkl"

    def read(path: Path) -> None:
        data = {16: b"little", torchfile.PICKLE_BYTES: path.read_bytes()}
        monkeypatch.setattr(torchfile, "content", lambda path, member, limit: data[limit])
        read_all(GOLDEN)

    assert survives(read, [seed, pickled(tensor())], path) > 5000
