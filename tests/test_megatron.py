"""Megatron-DeepSpeed's folders: what is written is read back bit for bit at any degrees, and what
BigScience's stack would have written gives the parameters and moments that it was made from."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import model_config
from oracles.weights import hf_weights

from bloomjax.config import ModelConfig
from bloomjax.errors import ConfigError
from bloomjax.formats.megatron import MegatronReader, MegatronWriter
from bloomjax.formats.tensors import order

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
