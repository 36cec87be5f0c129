"""Text as it comes: ids in, printable text out, until a stop string.

The one invariant: what has been given is final. It holds no part of a stop string, nor half a
character, and however the text is cut into tokens, all that is given is the same.
"""

from collections.abc import Sequence
from typing import Protocol


class Stream(Protocol):
    """What a tokenizer has to decode id by id (`data.tokenizer.Stream`)."""

    def feed(self, index: int) -> str: ...

    def end(self) -> str: ...


class Text:
    """One answer. `text` is all that has been given; `stopped`, whether a stop string came.

    Of several stop strings the one that is complete first ends the text, which ends where it begins.
    """

    def __init__(self, stream: Stream, stops: Sequence[str] = ()):
        """`stops` are not empty strings."""
        self.text, self.stopped = "", False
        self._stream, self._stops, self._held = stream, tuple(stops), ""

    def feed(self, index: int) -> str:
        """The text that this id makes final; may be empty, and is after a stop string."""
        return self._give(self._stream.feed(index))

    def end(self) -> str:
        """The text that is left when no more ids come."""
        given = self._give(self._stream.end())
        held, self._held = self._held, ""
        self.text += held
        return given + held

    def _give(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        self.stopped = bool(found)
        _, end = min(found) if found else (0, self._open(text))
        given, self._held = text[:end], "" if found else text[end:]
        self.text += given
        return given

    def _open(self, text: str) -> int:
        """Where a stop string may have begun, at the end of the text."""
        longest = max(map(len, self._stops), default=1) - 1
        for at in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[at:]) for stop in self._stops):
                return at
        return len(text)
