"""Text as it comes: nothing is given that has to be taken back, however it is cut into tokens."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bloomjax.data.tokenizer import load_tokenizer, train_tokenizer
from bloomjax.decode.engine import Fresh, Request
from bloomjax.decode.text import Answer, Text

LETTERS = st.text("ab", max_size=12)


class Pieces:
    """Ids stand for these strings."""

    def __init__(self, pieces: Sequence[str], rest: str = ""):
        self.pieces, self.rest = pieces, rest

    def feed(self, index: int) -> str:
        return self.pieces[index]

    def end(self) -> str:
        return self.rest


def cut(text: str, stops: Sequence[str]) -> str:
    """Letter by letter: as soon as the text ends in a stop string, it is taken off."""
    for end in range(len(text) + 1):
        if ending := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, ending))]
    return text


@given(st.lists(LETTERS, max_size=8), LETTERS, st.lists(st.text("ab", min_size=1), max_size=3))
def test_what_is_given_is_final(pieces: list[str], rest: str, stops: list[str]) -> None:
    whole = "".join(pieces) + rest
    expected = cut(whole, stops)
    text, given = Text(Pieces(pieces, rest), stops), ""
    for i in range(len(pieces)):
        given += text.feed(i)
        assert expected.startswith(given)
        held = len("".join(pieces[: i + 1])) - len(given)
        assert text.stopped or held < max(map(len, stops), default=1)  # no more than needed
    given += text.end()
    assert given == text.text == expected
    assert text.stopped == (expected != whole)


def test_a_stop_string_of_half_characters(tmp_path: Path) -> None:
    train_tokenizer(["x"], 300, tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("naïve 😀 text")
    assert len(ids) == len("naïve 😀 text".encode())  # each is a byte
    text = Text(tokenizer.stream(), ["😀"])
    given = [text.feed(i) for i in ids]
    assert "".join(given) == "naïve " and text.stopped and "�" not in text.text
    text = Text(tokenizer.stream(), ["😁"])  # the first three of its bytes are the same
    given = [text.feed(i) for i in ids[:10]]
    assert "".join(given) == "naïve " and text.end() == "�"


def test_an_answer_ends_at_a_stop_string_at_its_limit_or_at_an_id() -> None:
    def answer(stops: Sequence[str] = ()) -> Answer:
        return Answer(Request([1], max_new_tokens=4), Text(Pieces("abcd"), stops))

    stopped = answer(["bc"])
    assert stopped.take(Fresh(0, [0, 1], [-1.0, -1.0], False)) == "a"
    assert stopped.take(Fresh(0, [2, 3], [-1.0, -1.0], False)) == ""
    assert (stopped.ids, stopped.logprob, stopped.finish) == ([0, 1, 2], -3.0, "stop")

    full = answer(["de"])
    assert full.take(Fresh(0, [0, 1, 2], [-1.0] * 3, False)) == "abc" and full.finish == ""
    assert full.take(Fresh(0, [3], [-1.0], True)) == "d" and full.finish == "length"

    ended = answer()
    assert ended.take(Fresh(0, [0], [-1.0], True)) == "a" and ended.finish == "stop"
    empty = answer()
    assert empty.take(Fresh(0, [], [], True)) == "" and empty.finish == "stop"


def test_the_rate_is_of_what_came_after_the_first_dispatch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([10.0, 13.0, 15.0, 20.0, 22.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    answer = Answer(Request([1], max_new_tokens=6))
    answer.begin()
    answer.take(Fresh(0, [0, 1], [0.0, 0.0], False))
    answer.take(Fresh(0, [0, 1, 2, 3], [0.0] * 4, True))
    assert answer.seconds_to_first_token == 3.0 and answer.tokens_per_second == 2.0
    short = Answer(Request([1], max_new_tokens=6))
    short.begin()
    short.take(Fresh(0, [0, 1, 2], [0.0] * 3, True))
    assert short.seconds_to_first_token == 2.0 and short.tokens_per_second == 1.5
