"""Answers to many prompts, written together and printed in the order of the prompts.

The one invariant: what is printed, and in which order, depends on prompts and requests alone, not
on which of them ended first. Every process runs the requests; process 0 prints.
"""

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from bloomjax.data.files import Progress
from bloomjax.data.prompts import Prompt
from bloomjax.decode.beam import Beams, Steps, search
from bloomjax.decode.engine import Engine, Fresh
from bloomjax.decode.text import Answer

Pieces = Iterable[tuple[Answer, str]]  # whose, and the text that came


class Entry(NamedTuple):
    """What is to be printed of a prompt: its text number `sequence`, or its fault."""

    prompt: Prompt
    sequence: int = 0
    answer: Answer | None = None

    @property
    def finished(self) -> bool:
        return self.answer is None or bool(self.answer.finish)


def even(count: int, most: int) -> int:
    """Slots, `most` at most, that all have about as many of `count` requests to do."""
    return -(-count // max(1, -(-count // most)))


def together(engine: Engine, answers: Sequence[Answer], slots: int) -> Iterator[tuple[Answer, str]]:
    """Runs the requests, begun in order, `slots` at a time; gives the text of each as it comes."""
    waiting, running = deque(answers), dict[int, Answer]()
    while waiting or running:
        while waiting and len(running) < slots:
            answer = waiting.popleft()
            answer.begin()
            running[engine.submit(answer.request)] = answer
        for fresh in engine.step():
            answer = running[fresh.number]
            text = answer.take(fresh)
            if answer.finish:
                del running[fresh.number]
                if not fresh.done:  # at a stop string, of which the engine knows nothing
                    engine.cancel(fresh.number)
            yield answer, text


def searched(
    steps: Steps, mesh: Mesh, answers: Sequence[Answer], beams: Beams
) -> Iterator[tuple[Answer, str]]:
    """Prompt after prompt, `beams.returned` answers to each, which follow one another: the best of
    a search, the best first."""
    for first in range(0, len(answers), beams.returned):
        group = answers[first : first + beams.returned]
        for answer in group:
            answer.begin()
        asked = group[0].request
        prompts, options = [asked.prompt], (asked.sampling, asked.stop_ids)
        with jax.set_mesh(mesh):
            (found,) = search(steps, prompts, asked.max_new_tokens, beams, *options)
        for answer, (ids, score) in zip(group, found, strict=True):
            text = answer.take(Fresh(0, ids, [0.0] * len(ids), True))
            length = len(ids) + (answer.finish == "stop")  # with the id that ends it
            answer.logprob = score * length**beams.length_penalty
            yield answer, text


def rate(engine: Engine) -> Callable[[], str]:
    """What tells how quick and how full the engine has been from now on."""
    begun = time.monotonic()

    def note() -> str:
        seconds = time.monotonic() - begun
        return f"{engine.written / seconds:,.1f} tokens/s, occupancy {engine.occupancy:.0%}"

    return note


def print_stream(entry: Entry, pieces: Pieces) -> None:
    """The only entry, as its text comes."""
    speaks = jax.process_index() == 0
    if speaks:
        print(entry.prompt.text or "", end="", flush=True)
    for _, text in pieces:
        if speaks:
            print(text, end="", flush=True)
    if speaks:
        print()


def print_all(
    entries: Sequence[Entry], pieces: Pieces, as_json: bool, file: str, note: Callable[[], str]
) -> None:
    """Each entry as soon as it and all before it are finished.

    `file` is where the prompts stand, if in one; then progress is shown, with `note`.
    """
    speaks, waiting = jax.process_index() == 0, deque(entries)
    total, done = sum(entry.answer is not None for entry in entries), 0
    progress = Progress("writing", total, "texts") if file and total and speaks else None

    def print_finished() -> None:
        while waiting and waiting[0].finished:
            entry = waiting.popleft()
            if not speaks:
                continue
            if progress:
                progress.clear()
            if as_json:
                print(json.dumps(record(entry)), flush=True)
            elif entry.answer:
                print(plain(entry, len(entries) > 1), flush=True)
            else:
                line = f"bloomjax: {file}, line {entry.prompt.line}: {entry.prompt.fault}"
                print(line, file=sys.stderr, flush=True)

    print_finished()
    for answer, _ in pieces:
        if answer.finish:
            done += 1
            print_finished()
        if progress:
            progress.update(done, note())
    if progress:
        progress.done(f"{done} texts, {note()}")


def record(entry: Entry) -> dict[str, Any]:
    """The JSON object of an entry."""
    prompt, answer = entry.prompt, entry.answer
    line = {"line": prompt.line} if prompt.line else {}
    if answer is None:
        return line | {"error": prompt.fault}
    return line | {
        "prompt_ids": prompt.ids,
        "token_ids": answer.ids,
        "text": answer.text and answer.text.text,
        "finish_reason": answer.finish,
        "logprob": answer.logprob,
        "logprobs": answer.logprobs or None,  # of a beam search only the sum is known
        "tokens_per_second": answer.tokens_per_second,
        "seconds_to_first_token": answer.seconds_to_first_token,
    }


def plain(entry: Entry, headed: bool) -> str:
    """The prompt and what continues it; of several, below a line that says which it is."""
    prompt, answer = entry.prompt, entry.answer
    assert answer
    if answer.text is None:
        text = ",".join(map(str, answer.ids))
    else:
        text = (prompt.text or "") + answer.text.text
    places = [f"line {prompt.line}"] if prompt.line else []
    places += [f"text {entry.sequence + 1}"] if entry.sequence or not places else []
    return f"=== {', '.join(places)}\n{text}" if headed else text
