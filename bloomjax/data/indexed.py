"""Megatron's mmap format for tokens: `x.bin` holds them, `x.idx` says where documents begin.

.idx, little-endian: magic, u64 version 1, u8 dtype code, u64 N, u64 M; int32[N] sizes in tokens;
int64[N] byte offsets in the .bin; int64[M] doc_idx. Each of the N sequences is a document here, as
for Megatron's own index datasets.

The invariant: a .bin counts only beside a .idx that fits it, and the .idx is written last.
"""

import array
import hashlib
import os
import struct
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from bloomjax.data.files import replacing
from bloomjax.errors import ConfigError, InputError

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
# 6 and 7 are floating point, which no tokens are.
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CHUNK = 1 << 20  # items of an array checked at a time


def dtype_code(vocab_size: int) -> int:
    """uint16 below 65,500 ids, else int32, as Megatron chooses."""
    return 8 if vocab_size < 65_500 else 4


def paths(prefix: str | os.PathLike[str]) -> tuple[Path, Path]:
    """(x.bin, x.idx) of the prefix x, which may also be given as x.bin or x.idx."""
    name = os.fspath(prefix)
    name = name.removesuffix(".bin").removesuffix(".idx")
    return Path(name + ".bin"), Path(name + ".idx")


def is_indexed(prefix: str | os.PathLike[str]) -> bool:
    """Whether both files of the prefix are there."""
    return all(path.is_file() for path in paths(prefix))


class IndexedWriter:
    """Writes a prefix, document by document; used as a context manager.

    Nothing counts before the block ends, nor if it ends with an exception. Afterwards `documents`,
    `tokens` and `sha256` (hex, of the .bin) describe what was written.
    """

    def __init__(self, prefix: str | os.PathLike[str], vocab_size: int):
        self._bin_path, self._idx_path = paths(prefix)
        self._code = dtype_code(vocab_size)
        self._dtype = np.dtype(_DTYPES[self._code])
        self._sizes = array.array("i")
        self._open_size = 0  # tokens of the document that has begun
        self._sha256 = hashlib.sha256()
        self._stack = ExitStack()
        self.tokens = 0

    def __enter__(self) -> "IndexedWriter":
        self._idx_path.unlink(missing_ok=True)  # or an old .idx would sit beside the new .bin
        self._bin = self._stack.enter_context(replacing(self._bin_path))
        return self

    def write(self, ids: Sequence[int]) -> None:
        """Append to the document that has begun. Ids must be below the vocabulary's size."""
        raw = np.asarray(ids, self._dtype).tobytes()
        self._bin.write(raw)
        self._sha256.update(raw)
        self._open_size += len(ids)

    def end_document(self) -> None:
        """End the document that has begun."""
        if self._open_size >= 2**31:
            raise InputError(
                f"{self._bin_path}: a document of {self._open_size} tokens: Megatron's format "
                "holds less than 2^31; split it"
            )
        self._sizes.append(self._open_size)
        self.tokens += self._open_size
        self._open_size = 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if kind is None:
            self._write_index()

    @property
    def documents(self) -> int:
        return len(self._sizes)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def _write_index(self) -> None:
        N = len(self._sizes)
        sizes = np.array(self._sizes, "<i4")
        ends = np.cumsum(sizes, dtype="<i8") * self._dtype.itemsize
        with replacing(self._idx_path) as file:
            file.write(_HEADER.pack(_MAGIC, 1, self._code, N, N + 1))
            file.write(sizes.tobytes())
            file.write(np.concatenate([np.zeros(1, "<i8"), ends])[:N].tobytes())
            file.write(np.arange(N + 1, dtype="<i8").tobytes())


class Indexed:
    """A prefix, open for random access: its `tokens` are one stream, and documents of `sizes`.

    InputError if the two files are not exactly what the format says. Can be sent to a worker
    process, which opens the files again.
    """

    def __init__(self, prefix: str | os.PathLike[str]):
        self._prefix = os.fspath(prefix)
        self.bin_path, self.idx_path = paths(prefix)
        for path, other in ((self.bin_path, self.idx_path), (self.idx_path, self.bin_path)):
            if not path.is_file():
                raise InputError(f"{path}: expected it beside {other.name}, found no such file")
        raw = np.memmap(self.idx_path, np.uint8, "r") if self.idx_path.stat().st_size else b""
        dtype, N, M = self._header(bytes(raw[: _HEADER.size]), len(raw))
        self.sizes = np.frombuffer(raw, "<i4", N, _HEADER.size)
        self._offsets = np.frombuffer(raw, "<i8", N, _HEADER.size + 4 * N)
        self._check_documents(np.frombuffer(raw, "<i8", M, _HEADER.size + 12 * N))
        self.tokens = self._check_sizes(dtype.itemsize)
        # numpy refuses to map an empty file
        self._stream = np.memmap(self.bin_path, dtype, "r") if self.tokens else np.zeros(0, dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return Indexed, (self._prefix,)

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.sizes)

    def read(self, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start]: these tokens of the stream, 0 <= start <= stop <= tokens."""
        return self._stream[start:stop].astype(np.int32)

    def document(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """int32: the tokens of document i, or those from `start` to `stop` as far as it goes."""
        size = int(self.sizes[i])
        first = int(self._offsets[i]) // self._stream.dtype.itemsize
        return self.read(first + start, first + (size if stop is None else min(stop, size)))

    def check_ids(self, vocab_size: int, update: Callable[[int], None]) -> str:
        """Read all tokens once; the sha256 (hex) of the .bin.

        `update` hears the bytes done. InputError for a negative id, ConfigError for one that
        `vocab_size` does not cover.
        """
        sha256 = hashlib.sha256()
        itemsize = self._stream.dtype.itemsize
        for start in range(0, self.tokens, _CHUNK):
            chunk = self._stream[start : start + _CHUNK]
            sha256.update(chunk.tobytes())
            bad = np.flatnonzero((chunk < 0) | (chunk >= vocab_size))
            if bad.size:
                where = f"{self.bin_path}: offset {(start + int(bad[0])) * itemsize}"
                found = int(chunk[bad[0]])
                if found < 0:
                    raise InputError(f"{where}: expected a token id, found {found}; make it again")
                raise ConfigError(
                    f"{where}: token id {found} does not fit model.vocab_size = {vocab_size}: "
                    "raise it, or take the tokenizer that the model was made for"
                )
            update((start + len(chunk)) * itemsize)
        return sha256.hexdigest()

    def _header(self, header: bytes, length: int) -> tuple[np.dtype, int, int]:
        if len(header) < _HEADER.size:
            raise self._refused(0, f"a header of {_HEADER.size} bytes", f"{len(header)} bytes")
        magic, version, code, N, M = _HEADER.unpack(header)
        if magic != _MAGIC:
            old = "the older TNTIDX format" if magic.startswith(b"TNTIDX") else repr(magic)
            raise self._refused(0, f"the magic {_MAGIC!r}", old)
        if version != 1:
            raise self._refused(9, "version 1", str(version))
        if code not in _DTYPES:
            raise self._refused(17, f"a dtype code of {sorted(_DTYPES)}", str(code))
        expected = _HEADER.size + 12 * N + 8 * M
        if length != expected:
            raise self._refused(
                18, f"a file of {expected} bytes for {N} sequences", f"{length} bytes"
            )
        return np.dtype(_DTYPES[code]), N, M

    def _check_documents(self, starts: np.ndarray) -> None:
        N = len(self.sizes)
        base = self.idx_path.stat().st_size - 8 * len(starts)
        if not len(starts) or starts[0] != 0:
            raise self._refused(base, "doc_idx that starts at 0", str(starts[:1]))
        falling = np.flatnonzero(starts[1:] < starts[:-1])
        if falling.size:
            at = int(falling[0]) + 1
            raise self._refused(base + 8 * at, "doc_idx that never falls", str(starts[at]))
        if starts[-1] != N:
            at = base + 8 * (len(starts) - 1)
            raise self._refused(at, f"doc_idx that ends at {N}", str(starts[-1]))

    def _check_sizes(self, itemsize: int) -> int:
        """Offsets are the running sums of sizes and end with the .bin; the number of tokens."""
        total = 0
        for start in range(0, len(self.sizes), _CHUNK):
            sizes = self.sizes[start : start + _CHUNK].astype(np.int64)
            offsets = self._offsets[start : start + _CHUNK]
            if (negative := np.flatnonzero(sizes < 0)).size:
                at = int(negative[0])
                raise self._refused(
                    _HEADER.size + 4 * (start + at), "a size of 0 or more", str(sizes[at])
                )
            ends = total + np.cumsum(sizes) * itemsize
            expected = ends - sizes * itemsize
            if (wrong := np.flatnonzero(offsets != expected)).size:
                at = int(wrong[0])
                raise self._refused(
                    _HEADER.size + 4 * len(self.sizes) + 8 * (start + at),
                    f"the offset {expected[at]} of sequence {start + at}",
                    str(offsets[at]),
                )
            total = int(ends[-1])
        length = self.bin_path.stat().st_size
        if length != total:
            raise InputError(
                f"{self.bin_path}: offset {min(length, total)}: expected {total} bytes, as "
                f"{self.idx_path.name} says, found {length}; copy or make both files again"
            )
        return total // itemsize

    def _refused(self, offset: int, expected: str, found: str) -> InputError:
        return InputError(
            f"{self.idx_path}: offset {offset}: expected {expected}, found {found}; copy or make "
            "the file again"
        )
