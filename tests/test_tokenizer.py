"""Tokenizers: BLOOM's pre-tokenizer, exact round trips, streams, refusals."""

import itertools
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers

from bloomjax.data import tokenizer as module
from bloomjax.data.tokenizer import SPLIT, load_tokenizer, parts, train_tokenizer
from bloomjax.errors import ConfigError, InputError

TEXTS = [
    "Hello world, the quick brown fox jumps over the lazy dog.\n" * 3,
    "def f(x|y):\n    return x  # naïve, 你好。再见、世界 😀😀\n" * 3,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 400, folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [  # as measured with the published tokenizer's pattern
        ("Hello  world", ["Hello", " ", " world"]),
        ("a\n\n  b", ["a", "\n\n ", " b"]),
        ("    return", ["   ", " return"]),
        ("f(x|y)", ["f", "(", "x", "|", "y", ")"]),
        ("don't 12ab", ["don't", " 12ab"]),
    ],
)
def test_pieces_are_blooms(text, pieces):
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    assert [piece for piece, _ in split.pre_tokenize_str(text)] == pieces


def test_file_has_blooms_shape(folder, tokenizer):
    saved = json.loads((folder / "tokenizer.json").read_text())
    split, byte_level = saved["pre_tokenizer"]["pretokenizers"]
    assert saved["normalizer"] is None
    assert split["pattern"] == {"Regex": SPLIT} and split["behavior"] == "Isolated"
    assert not byte_level["add_prefix_space"] and not byte_level["use_regex"]
    assert saved["decoder"]["type"] == "ByteLevel"
    marks = [(t["id"], t["content"], t["special"]) for t in saved["added_tokens"]]
    assert marks == [(i, s, True) for i, s in enumerate(["<unk>", "<s>", "</s>", "<pad>"])]
    assert tokenizer.eos_id == 2 and tokenizer.vocab_size <= 400
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert own.encode(TEXTS[1]).ids == tokenizer.encode(TEXTS[1])


def test_training_is_deterministic(folder, tmp_path):
    code = "import sys; from bloomjax.data.tokenizer import train_tokenizer as t; import ast\n"
    code += "t(ast.literal_eval(sys.argv[1]), 400, sys.argv[2])"
    again = tmp_path / "tokenizer.json"
    env = {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", code, repr(TEXTS), again], check=True, env=env)
    assert again.read_bytes() == (folder / "tokenizer.json").read_bytes()


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=80))
def test_round_trip_is_exact(tokenizer, text):
    ids = tokenizer.encode_batch([text], special=False)[0]
    assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    pieces = [stream.feed(i) for i in ids]
    assert "�" in text or not any("�" in piece for piece in pieces)
    assert "".join(pieces) + stream.end() == text


def test_special_strings(tokenizer):
    prompt = "The quick brown fox</s>"
    assert tokenizer.encode(prompt)[-1] == 2
    corpus = tokenizer.encode_batch([prompt], special=False)[0]
    assert 2 not in corpus and tokenizer.decode(corpus) == prompt
    assert tokenizer.decode(tokenizer.encode(prompt)) == "The quick brown fox"
    assert tokenizer.decode(tokenizer.encode(prompt), skip_special=False) == prompt


def test_half_a_character(tokenizer):
    ids = tokenizer.encode("é🦖")[:-1]
    assert tokenizer.decode(ids).startswith("é�")
    assert tokenizer.stream().feed(tokenizer.vocab_size) == ""  # of a model that has more ids
    with pytest.raises(IndexError):
        tokenizer.decode([tokenizer.vocab_size])


WORDS = st.lists(st.sampled_from(["a", "bc", " ", "  ", ". ", "。", "\n", "(", "|", "é"]))


@settings(max_examples=100, deadline=None)
@given(words=WORDS, blocks=st.lists(st.integers(0, 30), max_size=4))
def test_parts_change_no_id(tokenizer, words, blocks):
    text = "".join(words)
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PART", 3)
        assert tokenizer.encode(text) == whole
        patch.setattr(module, "_LIMIT", 8)
        bounds = [0, *sorted(min(b, len(text)) for b in blocks), len(text)]
        pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
        cut = list(parts(pieces))
        assert cut == list(parts([text])) and "".join(cut) == text
        assert [p for part in cut for p in parts([part])] == cut


def test_long_text_is_cut():
    cut = list(parts(["word " * 100_000]))
    assert len(cut) > 5 and max(map(len, cut)) < 70_000
    assert max(map(len, parts(["x" * 5_000_000]))) == 1 << 20


def test_sentencepiece(tmp_path):
    import sentencepiece

    (tmp_path / "text").write_text("\n".join(TEXTS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=306,
        byte_fallback=True,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (306, 2)
    text = "Hello world, ж over the dog."
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ids = tokenizer.encode(text)
    assert ids == own.encode(text) and tokenizer.decode(ids) == own.decode(ids) == text
    stream = tokenizer.stream()
    assert "".join(map(stream.feed, ids)) == " " + text  # it continues a text


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.json", None, "no such file"),
        ("a.json", b"{", "expected a tokenizer.json"),
        ("a.json", b"\xff\xfe\0", "expected a tokenizer.json"),
        ("a.model", b"", "expected a SentencePiece model"),
        ("a.model", b"garbage\xff" * 9, "expected a SentencePiece model"),
        ("a.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "byte-level"),
    ],
)
def test_refusals_are_one_line(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says) as error:
        load_tokenizer(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_refusals_of_size(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="folder without one"):
        load_tokenizer(tmp_path)
    monkeypatch.setattr(module, "_MAX_BYTES", 1 << 20)
    (tmp_path / "tokenizer.json").write_bytes(b" " * (2 << 20))
    with pytest.raises(InputError, match="over 1 MiB"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="needs 260"):
        train_tokenizer(TEXTS, 259, tmp_path / "never.json")
    assert not (tmp_path / "never.json").exists()
