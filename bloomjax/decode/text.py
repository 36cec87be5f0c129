"""Answers as they come: ids in, printable text out, until a stop string.

The one invariant: what has been given is final. It holds no part of a stop string, nor half a
character, and however the text is cut into tokens, all that is given is the same.
"""

import time
from collections.abc import Sequence
from typing import Protocol

from bloomjax.decode.engine import Fresh, Request


class Stream(Protocol):
    """What a tokenizer has to decode id by id (`data.tokenizer.Stream`)."""

    def feed(self, index: int) -> str: ...

    def end(self) -> str: ...


class Text:
    """One answer. `text` is all that has been given; `stopped`, whether a stop string came.

    Of several stop strings the first to be complete ends the text, which ends where it begins.
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


class Answer:
    """What has come of a request so far.

    `finish` is "length" when its tokens were used up, "stop" at one of its `stop_ids` or at a stop
    string, "" until then. `ids` are the new ones, also those that spell a stop string.
    """

    def __init__(self, request: Request, text: Text | None = None):
        self.request, self.text = request, text
        self.ids: list[int] = []
        self.logprobs: list[float] = []  # of each, in nats
        self.logprob = 0.0  # of all of them together
        self.finish = ""
        self._begun = self._first = self._last = 0.0
        self._at_first = 0

    def begin(self) -> None:
        """Time counts from here."""
        self._begun = time.perf_counter()

    def take(self, fresh: Fresh) -> str:
        """The text that these tokens make final."""
        given = ""
        for token, logprob in zip(fresh.ids, fresh.logprobs, strict=True):
            self.ids.append(token)
            self.logprobs.append(logprob)
            self.logprob += logprob
            given += self.text.feed(token) if self.text else ""
            if self.text and self.text.stopped:
                self.finish = "stop"
                break
        if fresh.done and not self.finish:
            given += self.text.end() if self.text else ""
            self.finish = "length" if len(self.ids) == self.request.max_new_tokens else "stop"
        self._last = time.perf_counter()
        if not self._first:
            self._first, self._at_first = self._last, len(self.ids)
        return given

    @property
    def seconds_to_first_token(self) -> float:
        return self._first - self._begun

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: of what came after the first dispatch; of all, prompt included, if all came
        at once."""
        since, before = self._first, self._at_first
        if before == len(self.ids):
            since, before = self._begun, 0
        return (len(self.ids) - before) / (self._last - since)
