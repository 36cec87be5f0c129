"""Data: Megatron's bytes, corpora, crash-safe preparation, and the order of samples."""

import dataclasses
import functools
import gzip
import itertools
import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bloomjax.config import base_config, freeze
from bloomjax.data.corpus import Corpus
from bloomjax.data.indexed import Indexed, IndexedWriter
from bloomjax.data.pipeline import Rows, heldout_batches, train_batches
from bloomjax.data.prepare import Prepared, Split, open_prepared, prepare
from bloomjax.data.tokenizer import load_tokenizer
from bloomjax.errors import ConfigError, InputError


def write(prefix, documents, vocab_size=250_880):
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.write(document)
            writer.end_document()
    return writer


def config(**fields):
    raw = base_config().to_dict()
    raw["data"].update(fields)
    return freeze(raw).data


# The format


def test_bytes_are_megatrons(tmp_path):
    write(tmp_path / "x", [[5, 6, 2], [], [250_679, 2]])
    expected = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, 3, 4)
    expected += struct.pack("<3i", 3, 0, 2) + struct.pack("<3q", 0, 12, 12)
    expected += struct.pack("<4q", 0, 1, 2, 3)
    assert (tmp_path / "x.idx").read_bytes() == expected
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<5i", 5, 6, 2, 250_679, 2)
    write(tmp_path / "y", [[65_498]], vocab_size=65_499)
    assert (tmp_path / "y.bin").read_bytes() == struct.pack("<H", 65_498)
    assert (tmp_path / "y.idx").read_bytes()[17] == 8
    write(tmp_path / "z", [[1]], vocab_size=65_500)
    assert (tmp_path / "z.idx").read_bytes()[17] == 4


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 499), max_size=9), max_size=9), st.data())
def test_reader_gives_back_what_was_written(tmp_path_factory, documents, data):
    prefix = tmp_path_factory.mktemp("indexed") / "x"
    write(prefix, documents, 500)
    indexed = Indexed(prefix)
    assert [indexed.document(i).tolist() for i in range(len(indexed))] == documents
    stream = list(itertools.chain(*documents))
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(stream))] * 2)))
    assert indexed.tokens == len(stream) and indexed.read(a, b).tolist() == stream[a:b]


def patched(offset, form, value):
    def change(idx, bin):
        raw = bytearray(idx)
        struct.pack_into(form, raw, offset, value)
        return bytes(raw), bin

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda idx, bin: (b"", bin), "x.idx: offset 0: expected a header"),
        (lambda idx, bin: (b"TNTIDX\0\0\0" + idx[9:], bin), "offset 0: .* older TNTIDX"),
        (patched(9, "<Q", 2), "offset 9: expected version 1, found 2"),
        (patched(17, "<B", 6), "offset 17: expected a dtype code"),
        (patched(18, "<Q", 2**63), "offset 18: expected a file of"),
        (lambda idx, bin: (idx[:-1], bin), "offset 18: .* found 101 bytes"),
        (patched(34 + 4, "<i", -1), "offset 38: expected a size of 0 or more, found -1"),
        (patched(46 + 8, "<q", 2**62), "offset 54: expected the offset 12 of sequence 1"),
        (patched(70, "<q", 1), "offset 70: expected doc_idx that starts at 0"),
        (patched(78, "<q", 9), "offset 86: expected doc_idx that never falls"),
        (patched(94, "<q", 9), "offset 94: expected doc_idx that ends at 3"),
        (lambda idx, bin: (idx, bin[:-4]), "x.bin: offset 16: expected 20 bytes"),
        (lambda idx, bin: (idx, bin + b"\0"), "x.bin: offset 20: expected 20 bytes"),
    ],
)
def test_broken_files_are_refused_in_one_line(tmp_path, change, says):
    write(tmp_path / "x", [[5, 6, 2], [], [7, 2]])
    files = [tmp_path / "x.idx", tmp_path / "x.bin"]
    for file, raw in zip(files, change(*(f.read_bytes() for f in files)), strict=True):
        file.write_bytes(raw)
    with pytest.raises(InputError, match=says) as error:
        Indexed(tmp_path / "x")
    assert "\n" not in str(error.value)


def test_unfinished_files_do_not_count(tmp_path):
    write(tmp_path / "x", [[1, 2]])
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "x", 500) as writer:
        writer.write([3])
        raise RuntimeError
    with pytest.raises(InputError, match=r"x\.idx: expected it beside x\.bin"):
        Indexed(tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]


# Corpora


def names(sources, exclude=()):
    return [part.name for part in Corpus([str(s) for s in sources], exclude, "text")]


def test_documents_their_names_and_order(tmp_path):
    for name in ("b.txt", "a/z.txt", "test/t.txt", "a/test/t.txt", ".git/x", "a.lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty").write_text("")
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n\n{"text": ""}\n{"text": "two"}')
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write('{"text": "three"}\n')
    rows = ["c.jsonl:1", "c.jsonl:4", "d.jsonl.gz:1"]
    found = names([tmp_path], ["test", "*.lock"])
    assert found == ["a/test/t.txt", "a/z.txt", "b.txt", *rows]
    assert names([tmp_path / "**" / "*.txt"], ["a"]) == ["b.txt", "test/t.txt"]
    assert names([tmp_path / "b.txt", tmp_path], ["a", "test/", "*.lock"]) == ["b.txt", *rows]
    with pytest.raises(InputError, match="nothing there"):
        names([tmp_path / "missing"])
    with pytest.raises(InputError, match="none that count"):
        names([tmp_path], ["*"])
    with pytest.raises(InputError, match="only empty ones"):
        names([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"caf\xe9 au lait", "a.txt:3: expected text, found byte 0xe9"),
        ("a.txt", b"x" * (4 << 20) + b"\xe4\xbd", "a.txt:4194304: .* byte 0xe4"),
        ("a.txt", b"text\0", "a.txt:4: expected text, found a NUL"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "a.jsonl:1: .* no JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "tail', "a.jsonl:2: .* no JSON"),
        ("a.jsonl", b'{"txt": "a"}', "a.jsonl:1: .* without a string 'text' .'txt'"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1: .* surrogate"),
        ("a.jsonl", b'{"text": "\\u0000"}', "a.jsonl:1: .* NUL"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: .* no JSON"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz:1: .* a broken file"),
    ],
)
def test_no_text_is_refused_in_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says + ".*; 1 of . documents are no text") as error:
        names([tmp_path])
    assert "\n" not in str(error.value)


def test_few_bad_rows_are_left_out_and_counted(tmp_path, caplog):
    rows = [json.dumps({"text": f"row {i}"}) for i in range(2000)]
    rows[7] = "broken"
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    corpus = Corpus([str(tmp_path)], (), "text")
    assert [p.name for p in corpus] == [f"a.jsonl:{i + 1}" for i in range(2000) if i != 7]
    assert corpus.refused == 1 and "a.jsonl:8: expected text" in caplog.text


# Preparation


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(f"document {i} é</s>: " + "the words of it, " * (i + 1))
    return folder


@pytest.fixture
def prepared(tmp_path, texts):
    data = config(train=str(texts), tokenizer="train", heldout_every=5)
    return prepare(data, 300, tmp_path / "run")


def test_every_document_is_tokenised_once(texts, prepared):
    tokenizer = load_tokenizer(prepared.tokenizer)
    decoded = {}
    for split in (prepared.train, prepared.heldout):
        indexed = Indexed(split.prefix)
        assert len(indexed) == split.documents and indexed.tokens == split.tokens
        documents = [indexed.document(i).tolist() for i in range(len(indexed))]
        assert all(d[-1] == 2 and 2 not in d[:-1] for d in documents)
        decoded[split] = [tokenizer.decode(d) for d in documents]
        assert sum(len(text.encode()) for text in decoded[split]) == split.bytes
    everything = sorted(decoded[prepared.train] + decoded[prepared.heldout])
    assert everything == sorted(file.read_text() for file in texts.iterdir())
    held = [int(text.split()[1]) for text in decoded[prepared.heldout]]
    shell = "for f in *; do printf %s $f | sha256sum | cut -c1-16; done"
    hashes = subprocess.check_output(["bash", "-c", shell], cwd=texts, text=True).split()
    assert held == [i for i, h in enumerate(hashes) if int(h, 16) % 5 == 0]


def test_prepared_is_reused_until_something_changes(tmp_path, texts, prepared, capsys):
    data = config(train=str(texts), tokenizer="train", heldout_every=5, sequence_length=7)
    capsys.readouterr()
    assert prepare(data, 300, tmp_path / "run") == prepared == open_prepared(tmp_path / "run")
    assert capsys.readouterr().err == ""
    (texts / "00.txt").write_text("something else")
    assert prepare(data, 300, tmp_path / "run").train.sha256 != prepared.train.sha256
    os.truncate(tmp_path / "run" / "train.bin", 10)
    with pytest.raises(InputError, match=r"train\.bin: offset 10"):
        open_prepared(tmp_path / "run")
    assert prepare(data, 300, tmp_path / "run").train.tokens > 5
    (tmp_path / "run").rename(tmp_path / "moved")
    assert open_prepared(tmp_path / "moved").train.prefix == tmp_path / "moved" / "train"


def test_explicit_heldout_never_trains(tmp_path, texts):
    held = [str(texts / "03.txt"), str(texts / "1*.txt")]
    data = config(train=str(texts), heldout=held, tokenizer="train", heldout_every=2)
    prepared = prepare(data, 300, tmp_path / "run")
    assert (prepared.heldout.documents, prepared.train.documents) == (11, 29)


def test_a_kill_leaves_nothing_that_counts(tmp_path, texts):
    data = config(train=str(texts), tokenizer="train", heldout_every=5)
    script = tmp_path / "job.py"
    script.write_text(
        "import os, sys, signal, pathlib\n"
        "from bloomjax.config import DataConfig\n"
        "from bloomjax.data import prepare as module, indexed\n"
        f"data = DataConfig(**{dataclasses.asdict(data)!r})\n"
        "name, wait = sys.argv[1], int(sys.argv[2])\n"
        "owner = indexed if name == '_write_index' else module\n"
        "target = indexed.IndexedWriter if owner is indexed else module\n"
        "real = getattr(target, name)\n"
        "def killed(*args, **keys):\n"
        "    global wait\n"
        "    wait -= 1\n"
        "    if wait < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*args, **keys)\n"
        "setattr(target, name, killed)\n"
        "module._BATCH = 500\n"
        "module.prepare(data, 300, pathlib.Path(sys.argv[3]))\n"
    )
    whole = prepare(data, 300, tmp_path / "whole")
    env = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    prepare(dataclasses.replace(data, heldout_every=4), 300, tmp_path / "run")
    points = [
        ("_tokenise", 0),
        ("is_held_out", 60),
        ("_write_index", 0),
        ("_write_index", 1),
        ("replacing", 0),
    ]
    for name, wait in points:
        command = [sys.executable, script, name, str(wait), tmp_path / "run"]
        killed = subprocess.run(command, env=env, capture_output=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        with pytest.raises(InputError, match="prepare again"):
            open_prepared(tmp_path / "run")
    again = prepare(data, 300, tmp_path / "run")
    assert again.train.sha256 == whole.train.sha256
    assert again.heldout.sha256 == whole.heldout.sha256
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert left == sorted(path.name for path in (tmp_path / "whole").iterdir())


def test_tokens_made_elsewhere(tmp_path, texts, prepared):
    write(tmp_path / "x", [[5, 6, 2], [299, 2]])
    for name in ("x", "x.bin", "x.idx"):
        data = config(train=str(tmp_path / name), tokenizer="")
        found = prepare(data, 300, tmp_path / "other")
        assert found.train.prefix == tmp_path / "x" and found.train.tokens == 5
        assert (found.heldout, found.tokenizer, found.eos_id) == (None, None, 2)
    with pytest.raises(
        ConfigError, match=r"x\.bin: offset 12: token id 299 .* model.vocab_size = 299"
    ):
        prepare(data, 299, tmp_path / "other")
    write(tmp_path / "x", [[5, -6]])
    with pytest.raises(InputError, match=r"x\.bin: offset 4: expected a token id, found -6"):
        prepare(data, 300, tmp_path / "other")


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"train": ()}, ConfigError, "data.train is empty"),
        ({"tokenizer": ""}, ConfigError, "data.tokenizer is empty"),
        ({"tokenizer": "SELF"}, ConfigError, "has 300 ids, model.vocab_size is 280"),
        ({"train": ("TEXTS", "no.bin")}, ConfigError, "2 sources, one of them no.bin"),
        ({"train": ("no.bin",)}, InputError, "no.bin: expected it beside no.idx"),
        ({"heldout_every": 10**9}, InputError, "none of 40 documents is left for heldout"),
        ({"heldout_every": 1}, InputError, "none of 40 documents is left for train"),
    ],
)
def test_contradictions_are_one_line(tmp_path, texts, prepared, fields, error, says):
    fields = {"train": ("TEXTS",), "tokenizer": "train"} | fields
    fields["train"] = tuple(s.replace("TEXTS", str(texts)) for s in fields["train"])
    fields["tokenizer"] = fields["tokenizer"].replace("SELF", str(prepared.tokenizer))
    with pytest.raises(error, match=says) as raised:
        prepare(config(**fields), 280, tmp_path / "new")
    assert "\n" not in str(raised.value)


# The order of samples


def four_a_step(step):
    return 4 * step, 4


def ramped(step):
    return (2 * step, 2) if step < 3 else (6 + 4 * (step - 3), 4)


@pytest.fixture
def numbers(tmp_path):
    """A stream 10, 11, 12, ... of 8 rows of T = 5 and a bit, so that tokens tell their place."""
    write(tmp_path / "n", [range(10, 30), range(30, 54)])
    split = Split(tmp_path / "n", 2, 44, None, "")
    return Prepared(split, None, None, 2, 0, "")


def batches(
    prepared, rows=range(2), first=0, workers=0, samples_of=four_a_step, steps=6, shape=(2, 2)
):
    return list(
        train_batches(
            prepared,
            sequence_length=5,
            seed=3,
            samples_of=samples_of,
            shape=shape,
            rows=rows,
            first_step=first,
            steps=steps,
            workers=workers,
        )
    )


def same(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x)
        for x, y in zip(a, b, strict=True)
    )


def test_every_row_once_an_epoch(numbers):
    found = batches(numbers)
    for batch in found:
        assert batch["tokens"].shape == batch["weights"].shape == (2, 2, 5)
        assert batch["tokens"].dtype == np.int32 and batch["weights"].dtype == np.float32
        assert (batch["targets"] == batch["tokens"] + 1).all() and (batch["weights"] == 1).all()
    starts = np.concatenate([batch["tokens"][..., 0].ravel() for batch in found])
    epochs = starts.reshape(3, 8)  # 24 samples
    assert (np.sort(epochs, 1) == np.arange(10, 50, 5)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_is_frozen(numbers):
    """Grain's own shuffle of the rows; another order would change every run that is resumed."""
    rows = Rows(Indexed(numbers.train.prefix), 5, 3)
    order = [(int(rows.sample(i)[0]) - 10) // 5 for i in range(24)]
    shuffled = grain.MapDataset.range(8).shuffle(seed=3)
    assert order == [shuffled[i] for i in range(24)]
    assert order[:10] == [4, 7, 0, 1, 2, 5, 3, 6, 6, 0]


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_divide_the_same_batches(numbers, hosts):
    whole = batches(numbers, range(4), shape=(1, 4), samples_of=ramped)
    each = [
        batches(numbers, range(h, h + 4 // hosts), shape=(1, 4), samples_of=ramped)
        for h in range(0, 4, 4 // hosts)
    ]
    for step, batch in enumerate(whole):
        for key in batch:
            joined = np.concatenate([host[step][key] for host in each], axis=1)
            assert np.array_equal(joined, batch[key])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(numbers, workers):
    assert same(
        batches(numbers, samples_of=ramped), batches(numbers, workers=workers, samples_of=ramped)
    )


@pytest.mark.parametrize("first", [1, 4, 6])
def test_resume_continues_the_stream(numbers, first):
    assert same(batches(numbers, first=first), batches(numbers)[first:])


def test_ramp_up_leaves_places_empty(numbers):
    full = [b["tokens"][..., 0].ravel() for b in batches(numbers)]
    rampd = batches(numbers, samples_of=ramped)
    for batch in rampd[:3]:
        assert batch["weights"].sum(-1).tolist() == [[5, 5], [0, 0]]
        assert (batch["tokens"][1] == 2).all() and (batch["targets"][1] == 2).all()
    kept = [b["tokens"][..., 0][b["weights"][..., 0] > 0] for b in rampd]
    order = np.concatenate(kept)
    assert np.array_equal(order, np.concatenate(full)[: len(order)])
    with pytest.raises(ConfigError, match="5 samples does not fit 2 x 2"):
        batches(numbers, samples_of=functools.partial(lambda n, step: (0, n), 5))


def test_too_short_and_bad_seed(numbers):
    indexed = Indexed(numbers.train.prefix)
    assert len(Rows(indexed, 43, 0)) == 1
    with pytest.raises(InputError, match=r"44 tokens are too few for a row of .* = 45"):
        Rows(indexed, 44, 0)
    with pytest.raises(ConfigError, match=r"run\.seed is -1"):
        Rows(indexed, 5, -1)


def test_close_ends_the_workers(numbers):
    stream = train_batches(
        numbers,
        sequence_length=5,
        seed=3,
        samples_of=four_a_step,
        shape=(2, 2),
        rows=[0],
        first_step=0,
        steps=10**6,
        workers=1,
    )
    next(stream)
    stream.close()
    end = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(0.1)
    assert not multiprocessing.active_children()


# Held-out


KEYS = ("tokens", "targets", "weights")


@pytest.mark.parametrize("T", [1, 2, 3, 4, 8, 64])
def test_heldout_predicts_each_token_once(tmp_path, numbers, T):
    documents = [
        [*range(10 * i, 10 * i + n), 2] for i, n in enumerate([0, 1, 3, 4, 7, 8, 9, 30], 1)
    ]
    write(tmp_path / "h", documents)
    total = sum(map(len, documents))
    prepared = dataclasses.replace(
        numbers, heldout=Split(tmp_path / "h", len(documents), total, None, "")
    )
    whole = heldout_batches(prepared, sequence_length=T, rows_per_batch=3, rows=range(3))
    hosts = [
        heldout_batches(prepared, sequence_length=T, rows_per_batch=3, rows=rows)
        for rows in ([0, 2], [1])
    ]
    predicted = []
    for k, batch in enumerate(whole):
        assert batch["tokens"].shape == batch["targets"].shape == batch["weights"].shape == (3, T)
        assert np.array_equal(batch["tokens"][[0, 2]], hosts[0][k]["tokens"])
        assert np.array_equal(batch["weights"][[1]], hosts[1][k]["weights"])
        for tokens, targets, weights in zip(*(batch[key] for key in KEYS), strict=True):
            assert set(weights) <= {0, 1}
            for p in np.flatnonzero(weights):
                predicted.append((int(tokens[p]), int(targets[p])))
                # As much left context as the window gives: half of it, or the document's start.
                assert p >= T - max(1, T // 2) or tokens[0] == 2
                assert (tokens[1 : p + 1] == targets[:p]).all()
    expected = [pair for d in documents for pair in zip([2, *d[:-1]], d, strict=True)]
    assert sorted(predicted) == sorted(expected) and len(predicted) == total
    assert len(whole) == len(list(whole)) == len(hosts[1])


def test_heldout_must_exist(numbers):
    with pytest.raises(InputError, match="no documents are held out"):
        heldout_batches(numbers, sequence_length=4, rows_per_batch=1, rows=[0])
