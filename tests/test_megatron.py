"""Megatron-DeepSpeed's folders: what is written is read back bit for bit at any degrees, and what
BigScience's stack would have written gives the parameters and moments that it was made from."""

import tarfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import model_config
from oracles import megatron_tensors as made
from oracles.weights import hf_weights

from bloomjax.config import ModelConfig
from bloomjax.errors import ConfigError
from bloomjax.formats.megatron import MegatronReader, MegatronWriter
from bloomjax.formats.tensors import KINDS, order
from bloomjax.formats.torchfile import read_torch

BFLOAT16 = ml_dtypes.bfloat16
SHAPES = (
    {"layers": 3, "width": 20, "heads": 4, "vocab_size": 24},  # heads of 5
    {"layers": 2, "width": 36, "heads": 12, "vocab_size": 40},
)


def written(folder: Path, config: ModelConfig, tensors: dict, dtype: type, **kwargs: int) -> Path:
    """Rows of the tensors through a MegatronWriter into `folder`."""
    writer = MegatronWriter(
        folder, config, np.dtype(dtype), origin={"path": "x"}, step=3, samples=96, **kwargs
    )
    for row, layer in order(config):
        for start, stop in writer.parts(row):
            writer.write(row, layer, start, tensors[row.hf.format(layer)][start:stop])
    writer.finish()
    return folder


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=["heads4", "heads12"])
def test_round_trip(
    tmp_path: Path, shape: dict, dtype: type, tp: int, pp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bloomjax.formats.megatron.PART_BYTES", 300)  # parts that straddle ranks
    config = model_config(**shape, layer_norm_epsilon=1e-6)
    tensors = hf_weights(shape["layers"], shape["width"], shape["vocab_size"], 0)
    tensors = {name: a.astype(dtype) for name, a in tensors.items()}
    reader = MegatronReader(written(tmp_path, config, tensors, dtype, tp=tp, pp=pp))
    assert reader.config == model_config(**shape, layer_norm_epsilon=1e-6, dtype="auto")
    assert reader.progress is None
    for row, layer in order(config):
        expected = tensors[row.hf.format(layer)]
        for start, stop in ((0, len(expected)), (1, 2), (3, len(expected) - 1), (2, 2)):
            rows = reader.read(row, layer, start, stop)
            assert rows.dtype == reader.dtype(row) == dtype
            assert np.array_equal(rows, expected[start:stop])


def test_degrees_must_divide(tmp_path: Path) -> None:
    config = model_config(**SHAPES[0])
    for degrees in ({"tp": 3, "pp": 1}, {"tp": 8, "pp": 1}, {"tp": 1, "pp": 4}, {"tp": 0, "pp": 1}):
        with pytest.raises(ConfigError, match="expected"):
            written(tmp_path, config, {}, np.float32, **degrees)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests/oracles/megatron_folder.py made with torch: TP 2 x PP 2 x DP 2."""
    path = tmp_path_factory.mktemp("megatron")
    with tarfile.open(Path(__file__).parent / "golden" / "megatron_folder.tar.xz") as tar:
        tar.extractall(path, filter="data")
    return path


@pytest.mark.parametrize("name", ["", "global_step7", "global_step7_universal"])
def test_moments_are_those_of_the_whole_model(folder: Path, name: str) -> None:
    reader = MegatronReader(folder / name)
    assert reader.config == model_config(
        layers=2, width=12, heads=4, vocab_size=20, dtype="auto", init_std=0.0048,
        hidden_dropout=0.1, attention_dropout=0.1,
    )  # fmt: skip
    assert reader.progress == (made.STEP, made.SAMPLES)
    expected = made.tensors(made.LAYERS, made.WIDTH, made.VOCAB_SIZE)
    for kind, state in zip(KINDS, made.STATES, strict=True):
        for row, layer in order(reader.config):
            whole = expected[state][row.hf.format(layer)]
            for start, stop in ((0, len(whole)), (5, 6), (3, len(whole) - 1)):
                rows = reader.read(row, layer, start, stop, kind)
                assert rows.dtype == reader.dtype(row, kind) == np.float32
                assert np.array_equal(rows, whole[start:stop]), (kind, row.path)


def test_layer_files_are_merged_as_the_hubs_converter_did(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With optimizer files of fp16 ZeRO, which are left out: weights are those of layer files."""
    for file in (folder / "global_step7").iterdir():
        (tmp_path / file.name.removeprefix("bf16_")).write_bytes(file.read_bytes())
    reader = MegatronReader(tmp_path)
    (line,) = caplog.messages
    assert "fp16 ZeRO" in line and reader.progress is None
    expected = read_torch(folder / "converted.pt")
    for row, layer in order(reader.config):
        whole = expected[row.hf.format(layer)]
        whole = whole.rows(0, whole.shape[0])
        rows = reader.read(row, layer, 0, len(whole))
        assert rows.dtype == whole.dtype == BFLOAT16
        assert np.array_equal(rows, whole)
