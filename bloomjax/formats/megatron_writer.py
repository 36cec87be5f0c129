"""BLOOM's layer files as Megatron-DeepSpeed loads them, written row by row.

The one invariant: tensors come in the order of the files, and rows of a tensor in order, so that no
file has to be visited twice and none is in memory.
"""

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bloomjax.config import ModelConfig
from bloomjax.data.files import replacing
from bloomjax.errors import ConfigError
from bloomjax.formats.megatron import FIELDS
from bloomjax.formats.names import TABLE, Row
from bloomjax.formats.tensors import PARAMS, cast, parts
from bloomjax.formats.torchfile import Planned, TorchWriter

PART_BYTES = 16 << 20


class MegatronWriter:
    """A Writer of the layer files at one tensor and pipeline parallel degree, in
    `folder`/global_stepN with `latest` beside.

    Megatron-DeepSpeed loads it with --no-load-optim --no-load-rng --override-lr-scheduler at the
    same degrees, or through its own converters. Its arguments are not written (a Namespace is
    refused by `torch.load(weights_only=True)`), so it does not check them and begins to count
    samples at 0, as with --finetune; there are neither optimizer nor random states.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        dtype: np.dtype,
        *,
        tp: int,
        pp: int,
        origin: Mapping[str, Any],
        step: int,
        samples: int,
    ):
        """`dtype` is of all tensors. ConfigError if the degrees do not divide the model."""
        n = config.sizes
        for letter, name in (("N", "heads"), ("V", "the vocabulary")):
            if tp < 1 or n[letter] % tp:
                raise ConfigError(f"tp is {tp}: expected a divisor of {name}, {n[letter]}")
        if not 1 <= pp <= config.layers:
            raise ConfigError(f"pp is {pp}: expected 1 to {config.layers}, the number of layers")
        self._folder, self._tag = folder, f"global_step{step}"
        self._config, self._dtype, self._tp, self._pp = config, dtype, tp, pp
        self._state = functools.partial(_loadable, config, tp * pp, step, samples)
        self._origin = origin
        self._number: int | None = None  # of the layer files that are open
        self._files: list[TorchWriter] = []
        (folder / self._tag).mkdir(parents=True)

    def parts(self, row: Row, kind: str = PARAMS) -> Iterable[tuple[int, int]]:
        return parts(row, self._config.sizes, self._dtype.itemsize, PART_BYTES)

    def write(self, row: Row, layer: int, start: int, rows: np.ndarray, kind: str = PARAMS) -> None:
        number = row.megatron_file(layer, self._config.layers)
        if number != self._number:
            self._close()
            self._number = number
            self._files = [self._open(number, rank) for rank in range(self._tp)]
        rows = self.stored(row, rows)
        each = row.shape(self._config.sizes)[0] // self._tp
        for rank, file in enumerate(self._files):
            if row.split == 1:
                file.write(np.split(rows, self._tp, axis=1)[rank])
            elif row.split == 0:
                first, last = (max(0, i * each - start) for i in (rank, rank + 1))
                if rows[first:last].size:
                    file.write(rows[first:last])
            else:
                file.write(rows)

    def stored(self, row: Row, rows: np.ndarray) -> np.ndarray:
        return cast(rows, self._dtype, row.path)

    def finish(self, sha256: str) -> None:
        self._close()
        state = self._state({**self._origin, "sha256": sha256})
        for rank in range(self._tp * self._pp):
            path = self._folder / self._tag / f"mp_rank_{rank:02d}_model_states.pt"
            TorchWriter(path, state).finish()
        with replacing(self._folder / "latest") as file:
            file.write(self._tag.encode())

    def _open(self, number: int, rank: int) -> TorchWriter:
        """One tensor-parallel rank's file of a layer."""
        tree = {}
        for row in TABLE:
            if any(
                row.megatron_file(layer, self._config.layers) == number
                for layer in row.layers(self._config)
            ):
                shape = list(row.shape(self._config.sizes))
                if row.split is not None:
                    shape[row.split] //= self._tp
                tree[row.megatron] = Planned(self._dtype, tuple(shape))
        name = f"layer_{number:02d}-model_{rank:02d}-model_states.pt"
        return TorchWriter(self._folder / self._tag / name, tree)

    def _close(self) -> None:
        for file in self._files:
            file.finish()
        self._files = []


def _loadable(
    config: ModelConfig, ranks: int, step: int, samples: int, origin: Mapping[str, Any]
) -> dict[str, Any]:
    """What DeepSpeed's engine and Megatron's load_checkpoint ask of mp_rank_RR_model_states.pt."""
    padded = config.vocab_size
    args = {name: getattr(config, field) for field, (name, _) in FIELDS.items()}
    sizes = {"num_layers": config.layers, "hidden_size": config.width}
    sizes |= {"num_attention_heads": config.heads, "padded_vocab_size": padded}
    return {
        "module": None,  # that is, in the layer files
        "optimizer": None,
        "lr_scheduler": {
            **{"max_lr": 0.0, "min_lr": 0.0, "warmup_steps": 0, "decay_steps": samples},
            **{"decay_style": "constant", "num_steps": samples},
        },
        "skipped_steps": 0,
        "global_steps": step,
        "global_samples": samples,
        "dp_world_size": 1,
        "mp_world_size": ranks,
        "checkpoint_version": 3.0,
        "iteration": step,
        # 250,880 rows are BLOOM's 250,680 tokens and padding.
        "checkpoint_info": {
            "padded_vocab_size": padded,
            "original_vocab_size": 250_680 if padded == 250_880 else padded,
        },
        "bloomjax": {**args, **sizes, "origin": json.dumps(origin)},
    }
