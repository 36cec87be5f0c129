"""Text files, JSONL files, folders and globs as one list of documents, in an order that is fixed.

A text file is one document, named by its path relative to its source; a row of a *.jsonl (or
*.jsonl.gz) file is one, named `path:line`. Sources come in the order given, files by name.

The invariant: a document that is no text (bytes that are no UTF-8, NUL, a broken row) reaches
nobody. Such documents are left out with a warning, or end the work if there are too many.
"""

import codecs
import fnmatch
import glob
import gzip
import itertools
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from bloomjax.data.tokenizer import parts
from bloomjax.errors import InputError

_TOLERATED = 0.001  # share of documents that may be no text
_BLOCK = 4 << 20  # bytes read at a time
_LONGEST_ROW = 256 << 20  # bytes of a JSONL row, which is in memory at once


class Part(NamedTuple):
    """A piece of a document: long ones come in several."""

    name: str
    text: str
    last: bool


class File(NamedTuple):
    path: Path
    name: str  # relative to its source
    bytes: int


class _NotText(Exception):
    """Refuses a document; the arguments are the offset in its file and what stands there."""


class Corpus:
    """The documents of `sources`: iterating gives their parts in order, in bounded memory.

    `exclude` are patterns over names: one without wildcards (`test`, `docs/old`) leaves out the
    file or folder of that name at the top of each source; one with wildcards (`*.lock`,
    `*/tests/*`) is matched against the whole name, where * crosses folders. Hidden files and
    folders below a source do not count, nor do the files of `without`, which belong to another
    corpus. InputError if a source has no files, and, at the end of the iteration, if there were no
    documents or over 0.1 % of them were no text. While it lasts, `read` says how many of the
    files' `bytes` are done; `refused` counts what was left out.
    """

    def __init__(
        self,
        sources: Sequence[str],
        exclude: Sequence[str],
        text_key: str,
        without: Iterable[File] = (),
    ):
        self._text_key = text_key
        self.files: list[File] = []
        seen = {file.path.resolve() for file in without}
        for source in sources:
            for file in _files(source, exclude):
                real = file.path.resolve()
                if real not in seen:
                    seen.add(real)
                    self.files.append(file)
        self.bytes = sum(file.bytes for file in self.files)
        self.read = self.refused = 0

    def __iter__(self) -> Iterator[Part]:
        self.read = self.refused = documents = 0
        self._first_refused = ""
        before = 0
        for file in self.files:
            parts_of = self._rows if file.name.endswith((".jsonl", ".jsonl.gz")) else self._text
            for part in parts_of(file, before):
                documents += part.last
                yield part
            before += file.bytes
            self.read = before
        total = documents + self.refused
        if self.refused > _TOLERATED * total:
            raise InputError(
                f"{self._first_refused}; {self.refused} of {total} documents are no text: remove "
                "them, or leave them out with data.exclude"
            )
        if not documents:
            raise InputError(
                f"expected text in {len(self.files)} files, found only empty ones: set data.train"
            )

    def _refuse(self, path: Path, place: int, found: object) -> None:
        line = f"{path}:{place}: expected text, found {found}"
        self._first_refused = self._first_refused or line
        self.refused += 1
        logging.getLogger(__name__).warning("left out: %s", line)

    def _text(self, file: File, before: int) -> Iterator[Part]:
        try:
            for _ in _blocks(file.path):  # all of it is checked before any of it counts
                pass
        except _NotText as error:
            self._refuse(file.path, *error.args)
            return

        def blocks() -> Iterator[str]:
            for read, text in _blocks(file.path):
                self.read = before + read
                yield text

        yield from _document(file.name, blocks())

    def _rows(self, file: File, before: int) -> Iterator[Part]:
        with _open(file.path) as raw:
            rows = gzip.GzipFile(fileobj=raw) if file.name.endswith(".gz") else raw
            for line in itertools.count(1):
                try:
                    row = rows.readline(_LONGEST_ROW)
                    if not row:
                        return
                    text = self._row(row)
                    while len(row) == _LONGEST_ROW and not row.endswith(b"\n"):
                        row = rows.readline(_LONGEST_ROW)  # the rest of a row that is refused
                except _NotText as error:
                    self._refuse(file.path, line, *error.args)
                    continue
                except (OSError, EOFError, zlib.error) as error:
                    self._refuse(file.path, line, f"a broken file ({error})")
                    return
                self.read = before + raw.tell()
                yield from _document(f"{file.name}:{line}", [text])

    def _row(self, row: bytes) -> str:
        """The text of a JSONL row; empty for a blank line."""
        if len(row) == _LONGEST_ROW:
            raise _NotText(f"a row of over {_LONGEST_ROW >> 20} MiB")
        if not row.strip():
            return ""
        try:
            value = json.loads(row.decode())
        except (ValueError, RecursionError) as error:
            raise _NotText(f"a row that is no JSON in UTF-8 ({error})") from error
        text = value.get(self._text_key) if isinstance(value, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(map(repr, value)) if isinstance(value, dict) else "no object"
            raise _NotText(f"a row without a string {self._text_key!r} ({keys[:100]})")
        if "\0" in text:
            raise _NotText("a NUL")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _NotText("half of a surrogate pair") from error
        return text


def _document(name: str, blocks: Iterable[str]) -> Iterator[Part]:
    held: str | None = None
    for text in parts(blocks):
        if held is not None:
            yield Part(name, held, False)
        held = text
    if held is not None:  # None: an empty text is no document
        yield Part(name, held, True)


def _open(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(
            f"{path}: expected a readable file, found: {error.strerror}; mend it or leave it out "
            "with data.exclude"
        ) from error


def _blocks(path: Path) -> Iterator[tuple[int, str]]:
    """(bytes read so far, text) of each block; _NotText at the first byte that is none."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    read = 0
    with _open(path) as file:
        while True:
            block = file.read(_BLOCK)
            start = read - len(decoder.getstate()[0])  # of the bytes that are decoded now
            if (nul := block.find(b"\0")) >= 0:
                raise _NotText(read + nul, "a NUL byte (a binary file?)")
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                reason = f"byte 0x{byte:02x} that is no UTF-8"
                raise _NotText(start + error.start, reason) from error
            if not block:
                return
            read += len(block)
            yield read, text


def _files(source: str, exclude: Sequence[str]) -> list[File]:
    """The files of one source, by name."""
    path = Path(source)
    if path.is_file():
        root, found = path.parent, [path]
    elif path.is_dir():
        root, found = path, []
        for folder, folders, names in os.walk(path):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [Path(folder, name) for name in names if not name.startswith(".")]
    elif glob.has_magic(source):
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)
        root, found = Path(*fixed), [Path(name) for name in glob.glob(source, recursive=True)]
    else:
        raise InputError(f"{source}: expected a file, a folder or a glob, found nothing there")
    files = []
    for path in found:
        name = path.relative_to(root).as_posix()
        if path.is_file() and not any(_matches(name, pattern) for pattern in exclude):
            files.append(File(path, name, path.stat().st_size))
    if not files:
        raise InputError(f"{source}: expected text or JSONL files, found none that count")
    return sorted(files, key=lambda file: file.name)


def _matches(name: str, pattern: str) -> bool:
    if glob.has_magic(pattern):
        return fnmatch.fnmatchcase(name, pattern)
    pattern = pattern.strip("/")
    return name == pattern or name.startswith(pattern + "/")
