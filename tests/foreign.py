"""A model in memory that reads like a file of any format, for tests of what reads and writes."""

from typing import Any

import numpy as np
from oracles.weights import hf_weights

from bloomjax.config import ModelConfig
from bloomjax.formats.names import Row
from bloomjax.formats.tensors import DTYPES, KINDS, PARAMS, Progress, Reader, Writer, order


class Memory:
    """The random weights of `oracles.weights`, and moments of them if `progress` is given."""

    format = "memory"

    def __init__(
        self,
        config: ModelConfig,
        dtype: str = "float32",
        seed: int = 0,
        progress: Progress | None = None,
        files: dict[str, bytes] | None = None,
    ):
        self.config, self.progress, self.origin = config, progress, {"format": "memory"}
        self._dtype, self._files = DTYPES[dtype], files or {}
        weights = hf_weights(config.layers, config.width, config.vocab_size, seed)
        self.tensors: dict[str, dict[str, np.ndarray]] = {
            kind: {
                name: (a if i == 0 else np.square(a) if i == 2 else 0.5 * a).astype(self._dtype)
                for name, a in weights.items()
            }
            for i, kind in enumerate(KINDS[: 3 if progress else 1])
        }

    def dtype(self, row: Row, kind: str = PARAMS) -> np.dtype:
        return self._dtype

    def read(self, row: Row, layer: int, start: int, stop: int, kind: str = PARAMS) -> np.ndarray:
        return self.tensors[kind][row.hf.format(layer)][start:stop]

    def tokenizer(self) -> dict[str, bytes]:
        return self._files


def copy(reader: Reader, writer: Writer) -> None:
    """What a conversion does."""
    for kind in KINDS if reader.progress else (PARAMS,):
        for row, layer in order(reader.config):
            for start, stop in writer.parts(row, kind):
                writer.write(row, layer, start, reader.read(row, layer, start, stop, kind), kind)
    writer.finish("5a" * 32)


def same(one: Reader, other: Reader) -> None:
    """Both hold the same bits of the same types, whichever rows are asked for."""
    rng = np.random.default_rng(0)
    assert one.progress == other.progress
    for kind in KINDS if one.progress else (PARAMS,):
        for row, layer in order(one.config):
            R = row.shape(one.config.sizes)[0]
            ends: Any = sorted(rng.integers(0, R + 1, 2))
            for start, stop in ((0, R), ends):
                a, b = (r.read(row, layer, start, stop, kind) for r in (one, other))
                assert a.dtype == b.dtype == one.dtype(row, kind) == other.dtype(row, kind)
                assert a.shape == b.shape and a.tobytes() == b.tobytes(), (kind, row.path, layer)
