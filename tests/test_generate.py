"""`generate` as people call it: what it prints, in which order, and what it refuses."""

import io
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from foreign import Memory, copy
from helpers import model_config
from trial import ROOT, Ended, inside, refused

import bloomjax
from bloomjax import answers, cli, generate, memory
from bloomjax.answers import Entry, print_all
from bloomjax.data.files import Progress
from bloomjax.data.prompts import Prompt, read_prompts
from bloomjax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from bloomjax.decode.engine import Fresh, Request
from bloomjax.decode.programs import decode
from bloomjax.decode.text import Answer
from bloomjax.errors import InputError
from bloomjax.formats.hf import HFWriter
from bloomjax.formats.tensors import DTYPES

CONFIG = model_config(vocab_size=320)
FIELDS = ["prompt_ids", "token_ids", "text", "finish_reason", "logprob", "logprobs"]
FIELDS += ["tokens_per_second", "seconds_to_first_token"]
Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random model and a tokenizer of 300 ids."""
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(["the cat and the dog and the cat"], 300, folder / "tokenizer.json")
    files = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}
    for name, kept in (("with", files), ("without", {})):
        writer = HFWriter(
            folder / name, CONFIG, DTYPES["float32"], tokenizer=kept, origin={"format": "memory"}
        )
        copy(Memory(CONFIG, files=kept), writer)
    return folder / "with"


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return load_tokenizer(model)


@pytest.fixture
def run(model: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """On one device: programs of several take long to compile."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    monkeypatch.setattr(cli, "keep_compiled", lambda: None)

    def call(*flags: str, model: Path = model) -> Ended:
        return inside(generate, [f"--model={model}", *flags], capfd, join=False)

    return call


def records(end: Ended, code: int = 0) -> list[dict[str, Any]]:
    assert end.code == code, end
    return [json.loads(line) for line in end.out.splitlines()]


def test_text_streams_or_comes_whole(run: Run, tokenizer: Tokenizer) -> None:
    flags = ("--prompt=the cat", "--max_new_tokens=12")
    (record,) = records(run(*flags, "--json"))
    assert list(record) == FIELDS
    assert record["prompt_ids"] == tokenizer.encode("the cat")
    known = [i for i in record["token_ids"] if i < tokenizer.vocab_size]
    assert record["text"] == tokenizer.decode(known)
    assert len(record["token_ids"]) == 12 and record["finish_reason"] == "length"
    assert record["logprob"] < 0 < record["seconds_to_first_token"]
    for stream in ((), ("--stream",), ("--nostream",)):
        end = run(*flags, *stream)
        assert (end.code, end.out) == (0, f"the cat{record['text']}\n")
        assert end.err.count("\n") == 1 and "parameters; needs" in end.err  # told first


def test_a_stop_string_ends_the_text(run: Run) -> None:
    flags = ("--prompt_ids=5,6,7", "--max_new_tokens=24", "--temperature=1", "--seed=3")
    before = decode._cache_size()
    (free,) = records(run(*flags, "--json"))
    assert decode._cache_size() - before <= 1  # several dispatches, one program
    at = next(i for i in range(4, 20) if free["text"].find(free["text"][i : i + 2]) == i)
    stop, before = free["text"][at : at + 2], free["text"][:at]
    (stopped,) = records(run(*flags, f"--stop={stop}", "--stop=never", "--json"))
    assert stopped["text"] == before and stopped["finish_reason"] == "stop"
    count = len(stopped["token_ids"])
    assert stopped["token_ids"] == free["token_ids"][:count] and count < 24
    assert run(*flags, f"--stop={stop}").out == before + "\n"


def test_several_texts_have_seeds_of_their_own(run: Run) -> None:
    flags = ("--prompt_ids=9", "--max_new_tokens=24", "--temperature=1", "--json")
    alone = [records(run(*flags, f"--seed={seed}"))[0]["token_ids"] for seed in (4, 5, 6)]
    together = records(run(*flags, "--seed=4", "--num_return_sequences=3"))
    assert [record["token_ids"] for record in together] == alone
    assert len(set(map(tuple, alone))) == 3
    plain = run(*flags[:-1], "--seed=4", "--num_return_sequences=3").out
    texts = enumerate((record["text"] for record in together), 1)
    assert plain == "".join(f"=== text {i}\n{text}\n" for i, text in texts)


def test_beams_find_a_likelier_text(run: Run, model: Path) -> None:
    flags = ("--prompt_ids=5,6,7", "--max_new_tokens=6", "--json")
    (greedy,) = records(run(*flags))
    beams = ("--num_beams=3", "--num_return_sequences=2", "--length_penalty=0.5")
    found = records(run(*flags, *beams))
    assert found[0]["logprob"] >= found[1]["logprob"]
    assert found[0]["logprob"] >= greedy["logprob"] - 1e-4
    assert found[0]["token_ids"] != found[1]["token_ids"]
    for record in found:
        assert list(record) == FIELDS and record["tokens_per_second"] > 0
    loaded = bloomjax.load(model)
    for record in found:
        whole = record["prompt_ids"] + record["token_ids"]
        logprobs_TV = jax.nn.log_softmax(loaded(jnp.asarray([whole]))[0, 2:-1])
        expected = sum(float(logprobs_TV[t, i]) for t, i in enumerate(record["token_ids"]))
        assert record["logprob"] == pytest.approx(expected, abs=1e-4)
    best = run(*flags[:-1], *beams[::2]).out
    assert best == found[0]["text"] + "\n"


def test_a_model_without_a_tokenizer(run: Run, model: Path) -> None:
    without = model.parent / "without"
    flags = ("--prompt_ids=5,6", "--max_new_tokens=4")
    (record,) = records(run(*flags, "--json", model=without))
    assert record["text"] is None
    assert run(*flags, model=without).out == ",".join(map(str, record["token_ids"])) + "\n"
    for more in (["--prompt=a"], ["--prompt_ids=5", "--stop=a"]):
        refused(run(*more, model=without), 3, "no tokenizer", "give --prompt_ids")


# Files of prompts.

LINES = [
    b'{"prompt": "the cat", "id": 7}',
    b"",
    b'{"prompt": "the dog"',
    b'{"prompt_ids": [5, 320]}',
    b'{"prompt_ids": [5, true]}',
    b'{"prompt_ids": []}',
    b'{"prompt": 5}',
    b'{"prompt": "a", "prompt_ids": [5]}',
    b'{"text": "a"}',
    b"[1, 2]",
    b'{"prompt": "\xe9"}',
    b'{"prompt": "\\ud800"}',
    b"[" * 100_000,
    b'{"prompt_ids": [5, 6, 7]}',
]
FAULTS = {
    2: "an empty line",
    3: "no JSON",
    4: "id 320: expected 0 to 319",
    5: "expected integers, found true or false",
    6: "the prompt is empty",
    7: "expected text, found a number",
    8: "found prompt and prompt_ids",
    9: "found neither",
    10: "found a list",
    11: "expected UTF-8, found byte 0xe9",
    12: "no UTF-8 at character 0",
    13: "no JSON",
}


def test_a_bad_line_is_told_in_its_place(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b"\n".join(LINES) + b"\n")
    flags = (f"--prompts_file={file}", "--max_new_tokens=4")
    end = run(*flags, "--json")
    found = records(end, 3)
    assert [record["line"] for record in found] == list(range(1, 15))
    assert [record["line"] for record in found if "text" in record] == [1, 14]
    for line, part in FAULTS.items():
        assert list(found[line - 1]) == ["line", "error"] and part in found[line - 1]["error"]
    assert end.err.splitlines()[-1] == (
        f"bloomjax: {file}: 12 of 14 lines were refused, as told in place"
    )
    alone = records(run("--prompt_ids=5,6,7", "--max_new_tokens=4", "--json"))
    assert found[-1]["token_ids"] == alone[0]["token_ids"]

    end = run(*flags)
    texts = [f"the cat{found[0]['text']}", found[-1]["text"]]
    assert end.out == f"=== line 1\n{texts[0]}\n=== line 14\n{texts[1]}\n"
    for line, part in FAULTS.items():
        assert re.search(f"^bloomjax: {file}, line {line}: .*{re.escape(part)}", end.err, re.M)


def test_a_file_of_texts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\r\n two  \n\nth\u2028ree".encode())
    prompts = read_prompts(file)
    assert [(p.line, p.text) for p in prompts if not p.fault] == [
        (1, "one"),
        (2, " two  "),
        (4, "th\u2028ree"),
    ]
    assert prompts[2].fault == "the prompt is empty: expected at least one token"


@pytest.mark.slow  # to compile
def test_two_hundred_prompts_fill_the_slots(run: Run, tmp_path: Path) -> None:
    rng, file = random.Random(0), tmp_path / "prompts.jsonl"
    prompts = [[rng.randrange(4, 320) for _ in range(rng.randint(5, 500))] for _ in range(200)]
    file.write_text("".join(json.dumps({"prompt_ids": prompt}) + "\n" for prompt in prompts))
    end = run(f"--prompts_file={file}", "--max_new_tokens=20", "--json")
    found = records(end)
    assert [record["prompt_ids"] for record in found] == prompts
    (occupancy,) = re.findall(r"occupancy (\d+)%", end.err.splitlines()[-1])
    assert int(occupancy) >= 80
    ids = ",".join(map(str, prompts[77]))
    (alone,) = records(run(f"--prompt_ids={ids}", "--max_new_tokens=20", "--json"))
    assert alone["token_ids"] == found[77]["token_ids"]
    assert alone["logprob"] == pytest.approx(found[77]["logprob"], abs=1e-3)


def test_results_are_printed_as_soon_as_all_before_are(capsys: pytest.CaptureFixture[str]) -> None:
    entries = [Entry(Prompt(line=i), 0, Answer(Request([1], 1))) for i in range(1, 5)]
    entries.insert(2, Entry(Prompt(line=9, fault="no")))
    printed: list[list[int]] = []

    def pieces() -> Iterator[tuple[Answer, str]]:
        for i in (1, 0, 4, 3):
            answer = entries[i].answer
            assert answer
            answer.take(Fresh(0, [i], [0.0], True))
            yield answer, ""
            lines = capsys.readouterr().out.splitlines()
            printed.append([json.loads(line)["line"] for line in lines])

    print_all(entries, pieces(), True, "file", str)
    assert printed == [[], [1, 2, 9], [], [3, 4]]


def test_progress_makes_room_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    clock, terminal = iter([0.0, 10.0, 20.0]), Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    progress = Progress("writing", 60, "texts")
    progress.update(20, "30 tokens/s")
    progress.clear()
    progress.done("60 texts")
    shown = terminal.getvalue().split("\r\x1b[K")
    assert shown == [
        "",
        "writing: 20 of 60 texts, 2.0 texts/s, 0 min 20 s left, 30 tokens/s",
        "",
        "writing: 60 texts in 20.0 s\n",
    ]


@pytest.mark.parametrize(("count", "most", "slots"), [(1, 8, 1), (9, 8, 5), (200, 32, 29)])
def test_slots_are_of_even_use(count: int, most: int, slots: int) -> None:
    assert answers.even(count, most) == slots


def test_verbose_tells_stages_sizes_and_compiles(run: Run) -> None:
    end = run("--prompt_ids=5,6,7", "--max_new_tokens=5", "--verbose", "--num_beams=1")
    assert end.code == 0
    for told in (
        r"^imports: [\d.]+ s$",
        r"^load: [\d.]+ s$",
        r"^open: [\d.]+ s$",
        rf"{CONFIG.parameter_count:,} parameters; needs",
        r"^1 slots of 16 tokens, [\d.]+ MB$",
        r"^first token: [\d.]+ s$",
        r"^the rest: [\d.]+ s$",
        r"^[\d.]+ tokens/s of a text; of all, compiling too, [\d.,]+ tokens/s, occupancy \d+%$",
        r"^\d+ programs to trace and compile, or to find: [\d.]+ s$",
    ):
        assert re.search(told, end.err, re.M), end.err


# Refusals.


def test_not_enough_memory(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the model; for the cache of a long line of a file; for as many slots as are of use."""
    flags = ("--prompt_ids=5", "--max_new_tokens=15")
    monkeypatch.setattr(memory, "free", lambda devices: 1000)
    refused(run(*flags), 4, "of free memory on each of 1 devices", "found 0.00 MB")
    model_bytes = 4 * CONFIG.parameter_count + 4 * CONFIG.vocab_size * CONFIG.width
    place = 2 * 4 * CONFIG.layers * CONFIG.width  # of keys and values
    monkeypatch.setattr(memory, "free", lambda devices: model_bytes + 1100 * place)
    file = tmp_path / "prompts.jsonl"
    prompts = [{"prompt_ids": [5] * length} for length in (9, 500, 1200, 9)]
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    end = run(f"--prompts_file={file}", "--max_new_tokens=8", "--json", "--verbose")
    found = records(end, 3)
    assert ["error" in record for record in found] == [False, False, True, False]
    assert "1200 tokens" in found[2]["error"] and "at most 1024" in found[2]["error"]
    assert "2 slots of 512" in end.err


@pytest.mark.parametrize(
    ("flags", "code", "parts"),
    [
        ([], 2, ["--prompt, --prompt_ids and --prompts_file, found none"]),
        (["--prompt=a", "--prompts_file=b"], 2, ["found --prompt and --prompts_file"]),
        (["--prompt=a", "--min_new_tokens=9", "--max_new_tokens=4"], 2, ["min_new_tokens is 9"]),
        (["--prompt=a", "--top_k=5"], 2, ["top_k is 5", "temperature above 0"]),
        (["--prompt=a", "--top_k=-5", "--temperature=1"], 2, ["top_k is -5: expected 0"]),
        (["--prompt=a", "--min_p=2", "--temperature=1"], 2, ["min_p is 2"]),
        (["--prompt=a", "--temperature=nan"], 2, ["temperature is nan"]),
        (["--prompt=a", "--repetition_penalty=0"], 2, ["repetition_penalty is 0"]),
        (["--prompt=a", "--no_repeat_ngram_size=-1"], 2, ["no_repeat_ngram_size is -1"]),
        (["--prompt=a", "--num_return_sequences=3"], 2, ["temperature 0 all are the same"]),
        (["--prompt=a", "--num_return_sequences=0"], 2, ["is 0: expected 1 or more"]),
        (["--prompt=a", "--num_beams=0"], 2, ["num_beams is 0: expected 1 or more"]),
        (["--prompt=a", "--num_beams=2", "--temperature=1"], 2, ["temperature is 1.0", "beam"]),
        (["--prompt=a", "--num_beams=2", "--num_return_sequences=3"], 2, ["num_beams (2)"]),
        (["--prompt=a", "--num_beams=2", "--stop=x"], 2, ["--stop with num_beams 2"]),
        (["--prompt=a", "--num_beams=2", "--stream"], 2, ["--stream with --num_beams=2"]),
        (["--prompt=a", "--json", "--stream"], 2, ["--stream with --json"]),
        (["--prompts_file=a", "--stream"], 2, ["--stream with --prompts_file"]),
        (["--prompt=a", "--length_penalty=2"], 2, ["length_penalty is 2.0", "no beams"]),
        (["--prompt=a", "--stop="], 2, ["--stop is empty"]),
        (["--prompt=a", "--cache_dtype=int4"], 2, ["cache_dtype"]),
        (["--prompt=a", "--quantize=int2"], 2, ["quantize"]),
        (["--prompt=a\udce9"], 2, ["no UTF-8 at character 1"]),
        (["--prompts_file={}/nowhere"], 3, ["nowhere", "no such file"]),
        (["--prompts_file={}"], 3, ["is a directory"]),
        (["--prompts_file={}/empty"], 3, ["found an empty file"]),
    ],
)
def test_refused(run: Run, tmp_path: Path, flags: list[str], code: int, parts: list[str]) -> None:
    (tmp_path / "empty").touch()
    refused(run(*(flag.format(tmp_path) for flag in flags)), code, *parts)


def test_a_reader_that_leaves_is_no_defect(model: Path, tmp_path: Path) -> None:
    """`| head`, and whatever else is started as people start it."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": ""}\n' * 100_000)
    command = [sys.executable, "-m", "bloomjax.generate", f"--model={model}", "--json"]
    with subprocess.Popen(
        [*command, f"--prompts_file={file}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as child:
        assert child.stdout and child.stderr
        first = json.loads(child.stdout.readline())
        child.stdout.close()
        assert child.stderr.read() == "bloomjax: nobody reads what is written\n"
    assert child.returncode == 141
    assert first == {"line": 1, "error": "the prompt is empty: expected at least one token"}


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(InputError, match="found: permission denied"):
        read_prompts(tmp_path)
