"""Long work on files: written crash-safe, and visible while it lasts.

The invariant: a file under its final name is complete.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which appears as `path` (replacing any) once it is safely on disk.

    If the block raises, `path` is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")  # a fixed name: broken-off work piles up not
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Progress:
    """What is done, rate and remaining time of long work, on stderr.

    One line rewritten in place on a terminal; elsewhere a line every half minute.
    """

    def __init__(self, what: str, total: int, unit: str = ""):
        """`what` heads the line; `total` is in bytes, or counts what `unit` names."""
        self._what, self._total = what, total
        self._unit, self._size = (unit, 1) if unit else ("MB", 10**6)
        self._terminal = sys.stderr.isatty()
        self._start = self._shown = time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        """Show how much of the total is done, and a note, if it is time to."""
        now = time.monotonic()
        if now - self._shown < (0.2 if self._terminal else 30):
            return
        self._shown = now
        rate = done / (now - self._start)
        left = max(0, self._total - done) / rate if rate else 0
        line = (
            f"{self._what}: {done / self._size:,.0f} of {self._total / self._size:,.0f} "
            f"{self._unit}, {rate / self._size:,.1f} {self._unit}/s, "
            f"{left // 60:.0f} min {left % 60:02.0f} s left" + (f", {note}" if note else "")
        )
        self._print(line, "" if self._terminal else "\n")

    def clear(self) -> None:
        """Make room on the terminal for a line of somebody else's."""
        if self._terminal:
            self._print("", "")

    def done(self, result: str) -> None:
        """End with one line that says what came of it."""
        seconds = time.monotonic() - self._start
        self._print(f"{self._what}: {result} in {seconds:.1f} s", "\n")

    def _print(self, line: str, end: str) -> None:
        rewind = "\r\x1b[K" if self._terminal else ""
        print(rewind + line, end=end, file=sys.stderr, flush=True)
