"""BLOOM into a GGUF file that llama.cpp loads, by rows.

The invariant: everything's place is known before the first row comes, so each row is written where
it belongs. Which kind a tensor gets is llama.cpp's custom (src/llama-quant.cpp): vectors stay
float32; rows that are no whole blocks become float16; the tied embedding, which is the head too, is
kept finer than the rest, Q8_0 in all quantised files (llama.cpp takes Q6_K, which the `gguf`
package cannot write). The embedding is written once: llama.cpp ties it (src/models/bloom.cpp).
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bloomjax.config import ModelConfig
from bloomjax.errors import ConfigError, InputError
from bloomjax.formats.gguf import ORIGIN, package
from bloomjax.formats.gguf_file import (
    FLOAT32,
    KINDS,
    STRING,
    UINT32,
    Kind,
    Tensor,
    header,
    padded,
)
from bloomjax.formats.gguf_tokenizer import to_gguf
from bloomjax.formats.names import Row
from bloomjax.formats.tensors import CONTEXT_LENGTH, PARAMS, licence, order, parts

# What may be written -> general.file_type (llama_ftype in include/llama.h).
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}
FILE_TYPES |= {"q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9}
_QUANTISATION_VERSION = 2  # GGML_QNT_VERSION
_PART = 16 << 20  # bytes of float32 rows that are cast at a time


class GGUFWriter:
    """A `formats.tensors.Writer` of one GGUF file."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: ModelConfig,
        kind: str,
        *,
        tokenizer: Mapping[str, bytes],
        context_length: int = CONTEXT_LENGTH,
        name: str,
        origin: Mapping[str, Any],
    ):
        """Makes the file with its header at its full size, all tensors zero.

        `kind` is one of FILE_TYPES; `tokenizer` files as `Reader.tokenizer` gives them; the
        context length is that of training; `origin` is kept as JSON.
        InputError if GGUF cannot hold this model or tokenizer.
        """
        if kind not in FILE_TYPES:
            raise ConfigError(f"GGUF kind {kind!r}: expected one of {', '.join(FILE_TYPES)}")
        if config.apply_residual_connection_post_layernorm:
            raise InputError(
                f"{name}: expected residuals from before the layer norms, which is all that GGUF "
                "knows of BLOOM, found apply_residual_connection_post_layernorm"
            )
        self._path, self._config = Path(path), config
        self._kind = KINDS[kind.upper()]
        if self._kind.dtype is None:
            package(path)
        source = origin.get("url")
        values: dict[str, tuple[int, Any]] = {
            "general.architecture": (STRING, "bloom"),
            "general.type": (STRING, "model"),
            "general.name": (STRING, name),
            **({"general.license": (STRING, terms)} if (terms := licence(origin)) else {}),
            **({"general.source.url": (STRING, source)} if source else {}),
            ORIGIN: (STRING, _origin(origin, "0" * 64)),  # as long as it will be
            "general.file_type": (UINT32, FILE_TYPES[kind]),
            "general.quantization_version": (UINT32, _QUANTISATION_VERSION),
            "bloom.context_length": (UINT32, context_length),
            "bloom.embedding_length": (UINT32, config.width),
            "bloom.feed_forward_length": (UINT32, config.sizes["F"]),
            "bloom.block_count": (UINT32, config.layers),
            "bloom.attention.head_count": (UINT32, config.heads),
            "bloom.attention.head_count_kv": (UINT32, config.heads),
            "bloom.attention.layer_norm_epsilon": (FLOAT32, config.layer_norm_epsilon),
            **to_gguf(name, tokenizer, config.vocab_size),
        }
        tensors = [
            (row.gguf.format(layer), self._kind_of(row), row.shape(config.sizes))
            for row, layer in order(config)
        ]
        self._origin, self._values, self._layout = origin, values, tensors
        data, self._tensors = header(values, tensors)
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (until `finish`)
        self._pwrite(data, 0)
        end = max(tensor.offset + tensor.nbytes for tensor in self._tensors.values())
        os.ftruncate(self._file.fileno(), padded(end))

    def parts(self, row: Row, kind: str = PARAMS) -> Iterable[tuple[int, int]]:
        """See `formats.tensors.Writer`."""
        return parts(row, self._config.sizes, 4, _PART)

    def write(self, row: Row, layer: int, start: int, rows: np.ndarray, kind: str = PARAMS) -> None:
        """See `formats.tensors.Writer`. InputError for numbers that the kind cannot hold."""
        name = row.gguf.format(layer)
        tensor, sizes = self._tensors[name], self._config.sizes
        data = self._cast(name, tensor.kind, rows)
        if "3" not in row.theirs:
            self._put(tensor, start, data)
            return
        heads, each = len(rows) // row.unit(sizes), sizes["H"]
        triple = data.reshape(heads, 3, each, *data.shape[1:])
        for i in range(3):
            run = triple[:, i].reshape(heads * each, *data.shape[1:])
            self._put(tensor, i * sizes["D"] + start // 3, run)

    def stored(self, row: Row, rows: np.ndarray) -> np.ndarray:
        """See `formats.tensors.Writer`."""
        kind = self._kind_of(row)
        data = self._cast(row.gguf, kind, rows)
        if kind.dtype is not None:
            return data
        quants = package(self._path)
        return quants.dequantize(data, quants.GGMLQuantizationType(kind.number))

    def finish(self, sha256: str) -> None:
        """See `formats.tensors.Writer`."""
        self._values[ORIGIN] = STRING, _origin(self._origin, sha256)
        self._pwrite(header(self._values, self._layout)[0], 0)
        os.fsync(self._file.fileno())
        self._file.close()

    def _kind_of(self, row: Row) -> Kind:
        shape = row.shape(self._config.sizes)
        if len(shape) == 1:
            return KINDS["F32"]
        if shape[1] % self._kind.block:
            return KINDS["F16"]
        embedding = row.path == "embed" and self._kind.dtype is None
        return KINDS["Q8_0"] if embedding else self._kind

    def _cast(self, name: str, kind: Kind, rows: np.ndarray) -> np.ndarray:
        if rows.dtype == kind.dtype:
            return rows
        rows = rows.astype(np.float32, copy=False)
        if rows.dtype == kind.dtype:
            return rows
        most = float(ml_dtypes.finfo(kind.dtype or np.float16).max)  # float16: scales of blocks
        least, largest = rows.min(), rows.max()
        if not -most <= least <= largest <= most:
            found = largest if -most <= least else least
            raise InputError(
                f"{name}: expected numbers that {kind.name} holds, found {found}: write bf16 or f32"
            )
        if kind.dtype is not None:
            return rows.astype(kind.dtype)
        quants = package(self._path)
        return quants.quantize(rows, quants.GGMLQuantizationType(kind.number))

    def _put(self, tensor: Tensor, start: int, rows: np.ndarray) -> None:
        data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
        self._pwrite(data, tensor.offset + start * (tensor.nbytes // tensor.shape[0]))

    def _pwrite(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[done:], offset + done


def _origin(origin: Mapping[str, Any], sha256: str) -> str:
    return json.dumps({**origin, "sha256": sha256}, sort_keys=True)
