"""BLOOM in a GGUF file, as llama.cpp's converter and quantiser make them, read by rows.

Two things differ from Hugging Face's layout: the rows of the fused QKV lie as 3NH (all queries, all
keys, all values), and most tensors of most files are quantised. The invariant: `read` gives what
the `gguf` package's `dequantize` gives of the same blocks, in Hugging Face's order.
"""

import contextlib
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bloomjax.errors import InputError
from bloomjax.formats.gguf_file import GGUFFile, Kind, Tensor
from bloomjax.formats.gguf_tokenizer import from_gguf
from bloomjax.formats.names import HEADS, ROWS, Row
from bloomjax.formats.tensors import (
    CONTEXT_LENGTH,
    DTYPES,
    PARAMS,
    Stored,
    check_tensors,
    model_config,
    order,
)

ORIGIN = "bloomjax.origin"  # JSON: where the weights came from
_MAX_NOTE = 10_000  # characters of it
HEAD = HEADS[1]  # what GGUF calls a copy of the embedding
_SAMPLE = 256  # rows of a head that are compared with the embedding's


class GGUFReader:
    """A `formats.tensors.Reader` of one GGUF file."""

    format = "gguf"
    progress = None

    def __init__(self, path: str | os.PathLike[str]):
        """Reads the header, and a few rows if the embedding is there twice.

        InputError if it is no BLOOM in a kind that we read, if it holds quantised tensors and the
        `gguf` package is not there, or if its head is not its embedding.
        """
        self._file = file = GGUFFile(path)
        architecture = file.get("general.architecture", str)
        if architecture != "bloom":
            raise InputError(
                f"{path}: expected general.architecture bloom, found {architecture[:40]!r}"
            )
        if (split := file.get("split.count", int, 1)) > 1:
            raise InputError(
                f"{path}: expected a whole model, found one of {split} parts: join them with "
                "llama-gguf-split --merge"
            )
        embed = file.tensors.get(ROWS["embed"].gguf)
        width = file.get("bloom.embedding_length", int)
        heads = file.get("bloom.attention.head_count", int)
        epsilon = file.get("bloom.attention.layer_norm_epsilon", float)
        self.config = model_config(
            path,
            layers=file.get("bloom.block_count", int),
            width=width,
            heads=heads,
            vocab_size=embed.shape[0] if embed else None,
            layer_norm_epsilon=float(str(np.float32(epsilon))),  # 1e-5, not 9.999999747e-06
        )  # bloom.context_length is often the width, and no limit of a model with ALiBi
        for key, only in (("attention.head_count_kv", heads), ("feed_forward_length", 4 * width)):
            if (found := file.get(f"bloom.{key}", int, only)) != only:
                raise InputError(f"{path}: expected bloom.{key} {only}, a BLOOM's, found {found}")
        sizes = self.config.sizes
        expected = {row.gguf.format(layer): row.shape(sizes) for row, layer in order(self.config)}
        twice = {HEAD: expected[ROWS["embed"].gguf]} if HEAD in file.tensors else {}
        check_tensors(path, {k: t.shape for k, t in file.tensors.items()}, expected | twice)
        for name, tensor in file.tensors.items():
            if tensor.kind.dtype is None and len(tensor.shape) == 1:
                raise InputError(
                    f"{path}: expected {name} not quantised, as llama.cpp leaves vectors, found "
                    f"{tensor.kind.name}: convert the model again"
                )
        if any(tensor.kind.dtype is None for tensor in file.tensors.values()):
            package(path)
        self._embed = self._judge_head() if twice else ROWS["embed"].gguf
        length = file.get("bloom.context_length", int, 0)  # often the width, by mistake
        self.context_length = length if length not in (0, width) else CONTEXT_LENGTH
        self.origin: dict[str, Any] = {"format": self.format, "name": Path(path).name}
        self.origin |= {
            key: value[:1000]
            for key, value in file.values.items()
            if key.startswith("general.") and type(value) is str
        }
        with contextlib.suppress(ValueError, RecursionError):  # a note, not worth a refusal
            if type(source := json.loads(file.get(ORIGIN, str, "")[:_MAX_NOTE])) is dict:
                self.origin["source"] = source

    def dtype(self, row: Row, kind: str = PARAMS) -> np.dtype:
        """The stored one; float32 where a layer is quantised, or layers are stored differently."""
        del kind  # PARAMS is the only one
        stored = {self._tensor(row, layer).kind.dtype for layer in row.layers(self.config)}
        (one,) = stored if len(stored) == 1 else (None,)
        return DTYPES["float32"] if one is None else one

    def read(self, row: Row, layer: int, start: int, stop: int, kind: str = PARAMS) -> np.ndarray:
        """See `formats.tensors.Reader`."""
        rows = self._in_order(self._rows, row, layer, start, stop)
        return rows.astype(self.dtype(row), copy=False)

    def kind(self, row: Row, layer: int) -> Kind:
        """How the file stores a tensor."""
        return self._tensor(row, layer).kind

    def read_blocks(self, row: Row, layer: int, start: int, stop: int) -> np.ndarray:
        """As `read`, but the bytes of the rows' blocks: uint8 [stop - start, bytes of a row]."""
        return self._in_order(self._blocks, row, layer, start, stop)

    def _in_order(
        self,
        read: Callable[[Tensor, int, int], np.ndarray],
        row: Row,
        layer: int,
        start: int,
        stop: int,
    ) -> np.ndarray:
        """What `read` gives of the file's rows, in Hugging Face's order."""
        tensor = self._tensor(row, layer)
        if "3" not in row.theirs:
            return read(tensor, start, stop)
        # Whole heads of q, of k and of v, then what was asked for of them.
        sizes = self.config.sizes
        width, unit, each = sizes["D"], row.unit(sizes), sizes["H"]
        first, last = start // unit, -(-stop // unit)
        triple = [read(tensor, i * width + first * each, i * width + last * each) for i in range(3)]
        heads = [x.reshape(last - first, each, *x.shape[1:]) for x in triple]
        whole = np.stack(heads, 1).reshape((last - first) * unit, *triple[0].shape[1:])
        return whole[start - first * unit : stop - first * unit]

    def tokenizer(self) -> dict[str, bytes]:
        """See `formats.tensors.Reader`; made anew from the metadata `tokenizer.ggml.*`."""
        return from_gguf(self._file, self.config.vocab_size)

    def _tensor(self, row: Row, layer: int) -> Tensor:
        name = self._embed if row.path == "embed" else row.gguf.format(layer)
        return self._file.tensors[name]

    def _rows(self, tensor: Tensor, start: int, stop: int) -> np.ndarray:
        """Of the file's order, dequantised."""
        kind = tensor.kind
        if kind.dtype is not None:
            stored = Stored(self._file.path, tensor.offset, kind.dtype, tensor.shape)
            return stored.rows(start, stop)
        quants = package(self._file.path)
        with np.errstate(all="ignore"):  # scales of a damaged file may be infinite
            return quants.dequantize(
                self._blocks(tensor, start, stop), quants.GGMLQuantizationType(kind.number)
            )

    def _blocks(self, tensor: Tensor, start: int, stop: int) -> np.ndarray:
        kind, (rows, width) = tensor.kind, tensor.shape
        shape = rows, width // kind.block * kind.size
        return Stored(self._file.path, tensor.offset, np.dtype(np.uint8), shape).rows(start, stop)

    def _judge_head(self) -> str:
        """Which of the two copies of the tied embedding to read.

        Quantisers keep a head finer (Q6_K beside Q4_K), and llama.cpp takes each copy for its own
        end. The finer one for both is nearer to what llama.cpp computes, and to the model before
        it was quantised, than the coarser one (tests/oracles/compare_llama_cpp.py). InputError if
        the two differ by more than quantisation, in a sample of rows.
        """
        names = ROWS["embed"].gguf, HEAD
        embed, head = (self._file.tensors[name] for name in names)
        step = max(1, embed.shape[0] // _SAMPLE)
        rows = range(0, embed.shape[0], step)
        a, b = (
            np.concatenate([self._rows(t, i, i + 1) for i in rows]).astype(np.float64)
            for t in (embed, head)
        )
        difference, size = np.linalg.norm(a - b), np.linalg.norm(a)
        # Q2_K, the coarsest, is off by 0.3 of its size; independent matrices differ by 1.4
        if not difference <= _tolerance(embed.kind, head.kind) * size:
            raise InputError(
                f"{self._file.path}: expected {HEAD} to be a copy of {names[0]}, as BLOOM's is "
                "tied, found another matrix: such a model cannot be loaded"
            )
        return names[head.nbytes > embed.nbytes]


def _tolerance(a: Kind, b: Kind) -> float:
    """How far copies of a matrix in two kinds may be apart, relative to its size."""
    if a.dtype is None or b.dtype is None:
        return 0.5
    return 0.0 if a == b else 2.0**-8


def package(path: object) -> Any:
    """The module gguf.quants. InputError if it is not installed."""
    try:
        return importlib.import_module("gguf.quants")
    except ImportError as error:
        raise InputError(
            f"{path}: expected the package gguf for quantised tensors, found none: "
            "pip install 'bloomjax[gguf]'"
        ) from error
