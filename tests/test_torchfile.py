"""torch's files: read as torch wrote them, and written so that they are read again (by torch too:
tests/oracles/megatron_roundtrip.py)."""

import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bloomjax.errors import InputError
from bloomjax.formats.tensors import Stored
from bloomjax.formats.torchfile import Planned, Size, TorchWriter, read_torch
from bloomjax.formats.unpickle import Global, Stub

GOLDEN = Path(__file__).parent / "golden" / "torch_save.pt"  # tests/oracles/torch_files.py


def rows(tensor: Any) -> list:
    assert type(tensor) is Stored
    return tensor.rows(0, tensor.shape[0]).tolist()


def test_every_dtype() -> None:
    tensors = read_torch(GOLDEN)["tensors"]
    names = ["float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8"]
    assert list(tensors) == [*names, "uint8"]
    for name, tensor in tensors.items():
        expected = ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)
        assert tensor.dtype == expected
        assert rows(tensor) == [[0, 1, 2], [3, 4, 5]]
        assert tensor.rows(1, 2).tolist() == [[3, 4, 5]]


def test_every_kind_of_tensor() -> None:
    tree = read_torch(GOLDEN)
    assert rows(tree["bool"]) == [False, True]
    assert rows(tree["parameter"]) == [0, 1, 2]
    assert rows(tree["view"]) == [[4, 5, 6], [7, 8, 9]]
    assert rows(tree["same_storage"]) == list(range(12, 20))
    assert rows(tree["one_row"]) == [[0, 1, 2]]
    assert rows(tree["attributes"]) == [0, 1, 2, 3]
    assert rows(tree["empty"]) == [] and tree["empty"].shape == (0, 3)
    assert tree["scalar"].shape == () and tree["scalar"].rows(0, 1).tolist() == [7]


def test_what_is_no_tensor() -> None:
    tree = read_torch(GOLDEN)
    assert list(tree["state"]) == ["weight"] and rows(tree["state"]["weight"]) == [0, 1]
    assert tree["size"] == (2, 3) and tree[5] == "number"
    values = [None, True, -1, 300, 70_000, 2**40, -(2**70), 1.5, "é\n", (), (1,), b"\xff\x00"]
    assert tree["plain"] == values
    args = tree["args"]
    assert type(args) is Stub and args.name == "argparse.Namespace"
    assert args.state["layers"] == 2 and args.state["dtype"] == Global("torch.bfloat16")
    assert type(tree["set"]) is Stub and tree["set"].args == (["a"],)
    assert tree["random"][0] == "MT19937" and type(tree["random"][1]) is Stub


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    tree = {
        "plain": [
            None,
            True,
            False,
            0,
            -1,
            255,
            256,
            2**63,
            -(2**63),
            1.5,
            "é",
            (),
            ((1,), {}),
            [],
        ],
        "size": Size((2, 3)),
        "a": Planned(np.dtype(np.float32), (5, 3)),
        "inside": [{"empty": Planned(np.dtype(np.float16), (0, 3))}],
        "b": Planned(np.dtype(ml_dtypes.bfloat16), (70,)),
        7: Planned(np.dtype(np.int64), ()),
    }
    a, b = np.arange(15, dtype=np.float32), np.arange(70).astype(ml_dtypes.bfloat16)
    writer = TorchWriter(path, tree)
    for piece in (a[:1], a[1:7].reshape(2, 3), a[7:], b, np.array(9)):
        writer.write(piece)
    writer.finish()
    found = read_torch(path)
    assert list(found) == list(tree) and found["plain"] == tree["plain"]
    assert found["size"] == (2, 3)
    assert np.array_equal(found["a"].rows(0, 5), a.reshape(5, 3))
    assert np.array_equal(found["b"].rows(0, 70), b)
    assert found[7].rows(0, 1).tolist() == [9]
    assert found["inside"][0]["empty"].shape == (0, 3)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_tensors_are_aligned_as_torchs_are(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    sizes = [1, 33, 95, 32, 64, 7]
    writer = TorchWriter(path, [Planned(np.dtype(np.int8), (size,)) for size in sizes])
    for size in sizes:
        writer.write(np.zeros(size, np.int8))
    writer.finish()
    assert [tensor.offset % 64 for tensor in read_torch(path)] == [0] * len(sizes)


def test_a_tensor_that_is_not_written_is_noticed(tmp_path: Path) -> None:
    writer = TorchWriter(tmp_path / "x.pt", [Planned(np.dtype(np.int8), (2,))])
    writer.write(np.zeros(1, np.int8))
    with pytest.raises(AssertionError):
        writer.finish()


def test_a_file_that_shrinks_later(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(GOLDEN.read_bytes())
    tensor = read_torch(path)["view"]
    path.write_bytes(path.read_bytes()[: tensor.offset + 8])
    with pytest.raises(InputError, match="cut short"):
        tensor.rows(0, 2)
