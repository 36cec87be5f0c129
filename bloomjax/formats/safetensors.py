"""safetensors files: a header that says where each tensor lies, read and written by rows.

The invariant: tensors cover the file after the header exactly, without holes or overlaps, on either
side. The format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bloomjax.errors import DoesNotFitError, InputError
from bloomjax.formats.tensors import DTYPES, Stored
from bloomjax.formats.untrusted import MAX_JSON, opened, parse_json

_CODES = {
    "F32": DTYPES["float32"],
    "F16": DTYPES["float16"],
    "BF16": DTYPES["bfloat16"],
}
_MAX_NAME, _MAX_DIMENSIONS = 100, 8


def read_header(path: Path) -> dict[str, Stored]:
    """Where each tensor of a file lies, by name.

    InputError unless the header is one that the safetensors package accepts too and holds floats
    of 16 or 32 bits only. The format allows headers of 100 MB; more than MAX_JSON is no BLOOM's.
    """
    with opened(path) as (file, size):
        length = int.from_bytes(file.read(8), "little")
        data = size - 8 - length
        if data < 0 or length > MAX_JSON:
            raise InputError(
                f"{path}: expected a safetensors file, found {size:,} bytes that claim a header of "
                f"{length:,}: bring it back from a copy"
            )
        raw = file.read(length)
    if not raw.startswith(b"{"):
        raise InputError(f"{path}: expected a safetensors file, found a header that is no JSON")
    header = parse_json(raw, path)
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise InputError(f"{path}: expected strings as __metadata__, found something else")
    spans = [_span(path, name, entry) for name, entry in header.items()]
    spans.sort(key=lambda span: span[:2])
    ends = [(0, 0), *(span[:2] for span in spans), (data, data)]
    for (_, end), (begin, _) in pairwise(ends):
        if begin != end:
            raise InputError(
                f"{path}: expected tensors that cover its {data:,} bytes one after the other, "
                f"found that one ends at {end} and the next begins at {begin}: bring it back from "
                "a copy"
            )
    return {
        name: Stored(path, 8 + length + begin, dtype, shape)
        for begin, _, name, dtype, shape in spans
    }


def _span(path: Path, name: str, entry: Any) -> tuple[int, int, str, np.dtype, tuple[int, ...]]:
    """(begin, end, name, dtype, shape) of a header's entry, which agree with each other."""
    if len(name) > _MAX_NAME or not name.isprintable():
        raise InputError(f"{path}: expected names of tensors, found {name[:40]!r}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{path}: expected {name} with dtype, shape and data_offsets only")
    code, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _CODES:
        found = f"{code!r:.40}"
        raise InputError(f"{path}: expected {name} in {', '.join(_CODES)}, found {found}")
    for what, numbers in (("shape", shape), ("data_offsets", span)):
        whole = isinstance(numbers, list) and all(
            type(number) is int and 0 <= number < 1 << 63 for number in numbers
        )
        if not whole or len(numbers) > _MAX_DIMENSIONS:
            raise InputError(f"{path}: expected a {what} of {name}, found {numbers!r:.40}")
    size = math.prod(shape) * _CODES[code].itemsize
    if len(span) != 2 or span[1] - span[0] != size:
        raise InputError(f"{path}: expected {size} bytes of {name}, found data_offsets {span}")
    return span[0], span[1], name, _CODES[code], tuple(shape)


def create(
    path: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]
) -> dict[str, Stored]:
    """A new file for tensors of these dtypes and shapes, in this order: the header is written, the
    rest is zeros, and `write_rows` fills it in any order."""
    codes = {dtype: code for code, dtype in _CODES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # as the package does, so that data is aligned to 8 bytes
    data = 8 + len(raw)
    with open(path, "xb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(data + end)
    return {
        name: Stored(path, data + header[name]["data_offsets"][0], dtype, shape)
        for name, (dtype, shape) in tensors.items()
    }


def write_rows(stored: Stored, start: int, rows: np.ndarray) -> None:
    """Rows of a tensor, in its dtype, from row `start` on. DoesNotFitError if the disk is full."""
    flat = np.ascontiguousarray(rows, stored.dtype).reshape(-1).view(np.uint8).data
    offset = stored.offset + start * math.prod(stored.shape[1:]) * stored.dtype.itemsize
    try:
        handle = os.open(stored.file, os.O_WRONLY)
        try:
            done = 0
            while done < len(flat):
                done += os.pwrite(handle, flat[done : done + (1 << 30)], offset + done)
        finally:
            os.close(handle)
    except OSError as error:
        raise DoesNotFitError(
            f"{stored.file}: expected to write {len(flat):,} bytes, found: {error.strerror}"
        ) from error
