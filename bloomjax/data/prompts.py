"""A file of prompts, one a line.

The one invariant: a line that is no prompt is a prompt with a fault, in its place; the others are
what they would be without it.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from bloomjax.data.tokenizer import Tokenizer
from bloomjax.errors import InputError


@dataclass
class Prompt:
    """Text or ids to continue. `fault` says in one line why it cannot be, or is empty."""

    text: str | None = None
    ids: list[int] = field(default_factory=list)
    line: int = 0  # of a file, from 1
    fault: str = ""

    def encode(self, tokenizer: Tokenizer) -> None:
        """Makes ids of a text."""
        if self.text is None or self.fault:
            return
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            self.fault = f"the prompt is no UTF-8 at character {error.start}: expected text"
            return
        self.ids = tokenizer.encode(self.text)


def read_prompts(path: Path) -> list[Prompt]:
    """Each line of the file: its text; or, of a file named .jsonl, an object with "prompt" (text)
    or "prompt_ids" (integers), whose other keys are left alone.

    InputError if the file cannot be read, or has no line.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        cause = (error.strerror or str(error)).lower()
        raise InputError(f"{path}: expected a file of prompts, found: {cause}") from error
    lines = raw.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        raise InputError(f"{path}: expected a prompt in each line, found an empty file")
    read = _object if path.suffix == ".jsonl" else _text
    prompts = []
    for n, line in enumerate(lines, 1):
        try:
            prompt = read(line.removesuffix(b"\r").decode())
        except UnicodeDecodeError as error:
            prompt = Prompt(
                fault=f"expected UTF-8, found byte 0x{line[error.start]:02x} at {error.start}"
            )
        prompt.line = n
        prompts.append(prompt)
    return prompts


def _text(line: str) -> Prompt:
    return Prompt(text=line) if line else Prompt(fault=EMPTY)


def _object(line: str) -> Prompt:
    expected = 'expected an object {"prompt": "..."} or {"prompt_ids": [...]}, found'
    if not line.strip():
        return Prompt(fault=f"{expected} an empty line")
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Prompt(fault=f"{expected} no JSON: {' '.join(str(error).split())}")
    if not isinstance(found, dict):
        return Prompt(fault=f"{expected} {_kind(found)}")
    given = [key for key in ("prompt", "prompt_ids") if key in found]
    if len(given) != 1:
        return Prompt(fault=f"{expected} {' and '.join(given) or 'neither'}")
    value = found[given[0]]
    if given == ["prompt"]:
        if not isinstance(value, str):
            return Prompt(fault=f"prompt: expected text, found {_kind(value)}")
        return _text(value)
    wrong = [i for i in value if type(i) is not int] if isinstance(value, list) else [value]
    if wrong:
        return Prompt(fault=f"prompt_ids: expected integers, found {_kind(wrong[0])}")
    return Prompt(ids=value) if value else Prompt(fault=EMPTY)


EMPTY = "the prompt is empty: expected at least one token"


def _kind(value: object) -> str:
    kinds = {str: "text", bool: "true or false", int: "a number", float: "a number"}
    return (kinds | {list: "a list", dict: "an object"}).get(type(value), "null")
