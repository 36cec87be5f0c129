"""Text to token ids and back: BLOOM's byte-level BPE, or a SentencePiece model.

The invariant: every id stands for fixed bytes, so `decode` joins bytes and cleans nothing up; with
byte-level BPE decode(encode(text)) is text, byte for byte.
"""

import codecs
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from bloomjax.data.files import replacing
from bloomjax.errors import ConfigError, InputError

SPECIALS = ("<unk>", "<s>", "</s>", "<pad>")  # ids 0 to 3, as BLOOM's
# BLOOM's pre-tokenizer: words with the space before them. The inner bracket is Oniguruma's nested
# class, so `(`, `)` and `|` are excluded too. What does not match forms pieces of its own.
SPLIT = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # noqa: RUF001

_MAX_BYTES = 200 << 20  # of a tokenizer file; BLOOM's has 14.5 MB
# Long texts are encoded in parts: in parallel, and because an encoder needs ~100 bytes of memory a
# character. A part ends at the first place after _PART characters where BLOOM's pre-tokenizer
# begins a new piece whatever stands around it, so parts change no id (a SentencePiece model may
# see a space between two parts); if there is no such place, it ends after _LIMIT characters.
_PART, _LIMIT = 1 << 16, 1 << 20
_CUT = re.compile(r"(?<=\w)(?= \w)|(?<=[\n。，、।۔،])(?=\w)")  # noqa: RUF001


def parts(blocks: Iterable[str]) -> Iterator[str]:
    """The text that `blocks` are pieces of, cut where it can be encoded part by part.

    The parts depend on the text only, not on its blocks; cutting a part again changes nothing.
    """
    text, start = "", 0
    for block in blocks:
        text, start = text[start:] + block, 0
        while len(text) - start > _LIMIT:
            end = _part_end(text, start)
            yield text[start:end]
            start = end
    while start < len(text):
        end = _part_end(text, start)
        yield text[start:end]
        start = end


def _part_end(text: str, start: int) -> int:
    limit = min(start + _LIMIT, len(text))
    cut = _CUT.search(text, start + _PART, limit)
    return cut.start() if cut else limit


class _Model(Protocol):
    """What a kind of tokenizer has to know."""

    vocab_size: int
    eos_id: int
    prefix: str  # what it puts before a text, and `decode` takes away again

    def encode(self, texts: list[str], special: bool) -> list[list[int]]: ...

    def piece(self, index: int) -> tuple[bytes, bool]:
        """The bytes of a token; whether it is special (a mark, not text)."""


class Tokenizer:
    """Made by `load_tokenizer`. All ids are below `vocab_size`, `eos_id` ends documents, and
    `fingerprint` is the sha256 (hex) of the file."""

    def __init__(self, model: _Model, fingerprint: str):
        self.vocab_size = model.vocab_size
        self.eos_id = model.eos_id
        self.fingerprint = fingerprint
        self._model = model
        self._piece = functools.cache(model.piece)

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt: nothing is added, and "</s>" in it becomes the special id."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Ids of each text, on all cores. `special=False` is for corpora, where "</s>" is text
        that somebody wrote and must not end a document."""
        owners, pieces = [], []
        for i, text in enumerate(texts):
            for part in parts([text]):
                owners.append(i)
                pieces.append(part)
        encoded: list[list[int]] = [[] for _ in texts]
        for i, ids in zip(owners, self._model.encode(pieces, special), strict=True):
            encoded[i].extend(ids)
        return encoded

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 (half a character) become U+FFFD.

        IndexError for an id that is not below `vocab_size`.
        """
        ids = list(ids)
        if wrong := [index for index in ids if not 0 <= index < self.vocab_size]:
            raise IndexError(f"token id {wrong[0]}: expected 0 to {self.vocab_size - 1}")
        stream = self.stream(skip_special)
        text = "".join(map(stream.feed, ids)) + stream.end()
        return text.removeprefix(self._model.prefix)

    def stream(self, skip_special: bool = True) -> "Stream":
        """To decode id by id what continues a text. An id beyond `vocab_size` has no text: a model
        may have, and draw, more ids than its tokenizer (BLOOM has 200 more)."""
        return Stream(functools.partial(self._bytes, skip_special))

    def _bytes(self, skip_special: bool, index: int) -> bytes:
        if index >= self.vocab_size:
            return b""
        piece, special = self._piece(int(index))
        return b"" if special and skip_special else piece


class Stream:
    """Feed ids, print what comes back; half a character waits for its other half."""

    def __init__(self, piece: Callable[[int], bytes]):
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, index: int) -> str:
        """The text that this id completes; may be empty."""
        return self._decoder.decode(self._piece(index))

    def end(self) -> str:
        """What is left when no more ids come: U+FFFD for half a character, or nothing."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a tokenizer.json, a SentencePiece .model, or a folder that holds one.

    InputError for a file that is missing, larger than 200 MiB, or neither of the two.
    """
    file = tokenizer_file(Path(path))
    if file.stat().st_size > _MAX_BYTES:
        raise InputError(f"{file}: expected a tokenizer, found over {_MAX_BYTES >> 20} MiB")
    return tokenizer_of(file.read_bytes(), file)


def tokenizer_of(raw: bytes, file: Path) -> Tokenizer:
    """The tokenizer in the bytes of `file`, whose name says which kind it is."""
    kind = _SentencePiece if file.suffix == ".model" else _ByteLevel
    return Tokenizer(kind(raw, file), hashlib.sha256(raw).hexdigest())


def tokenizer_file(path: Path) -> Path:
    """The file that `load_tokenizer(path)` reads. InputError if there is none."""
    names = ("tokenizer.json", "tokenizer.model")
    candidates = [path / name for name in names] if path.is_dir() else [path]
    for file in candidates:
        if file.is_file():
            return file
    found = "a folder without one" if path.is_dir() else "no such file"
    raise InputError(
        f"{path}: expected a tokenizer.json or a SentencePiece .model, found {found}; set "
        "data.tokenizer"
    )


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's table: a byte-level vocabulary writes byte b as a printable character."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class _ByteLevel:
    """A tokenizer.json whose tokens spell bytes."""

    prefix = ""

    def __init__(self, raw: bytes, file: Path):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(raw)
        except Exception as error:  # the library raises nothing narrower
            reason = " ".join(str(error).split())
            raise InputError(f"{file}: expected a tokenizer.json, found: {reason}") from error
        decoder = type(self._tokenizer.decoder).__name__
        if decoder != "ByteLevel":
            raise InputError(
                f"{file}: expected a byte-level tokenizer, as BLOOM's, found decoder {decoder}; "
                "use its SentencePiece .model"
            )
        self._tokenizer.no_truncation()  # settings for batches of fixed length, which some
        self._tokenizer.no_padding()  # files carry
        self._characters = _bytes_of_characters()
        self._added = self._tokenizer.get_added_tokens_decoder()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        eos = self._tokenizer.token_to_id("</s>")
        if eos is None:
            raise InputError(f"{file}: expected an end-of-text token </s>, found none; add it")
        self.eos_id = eos

    def encode(self, texts: list[str], special: bool) -> list[list[int]]:
        self._tokenizer.encode_special_tokens = not special
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def piece(self, index: int) -> tuple[bytes, bool]:
        if added := self._added.get(index):
            return added.content.encode(), added.special
        token = self._tokenizer.id_to_token(index) or ""  # a hole in the numbering has no text
        try:
            return bytes(self._characters[c] for c in token), False
        except KeyError:  # spelt as it is, like an added token
            return token.encode(), False


class _SentencePiece:
    """A SentencePiece .model; its normaliser may change the text before any id is made."""

    def __init__(self, raw: bytes, file: Path):
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(raw)
            self.vocab_size = self._processor.vocab_size()
        except (RuntimeError, OSError) as error:
            raise InputError(
                f"{file}: expected a SentencePiece model, found something else"
            ) from error
        if not self.vocab_size:
            raise InputError(f"{file}: expected a SentencePiece model, found an empty one")
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise InputError(f"{file}: expected an end-of-text token </s>, found none; add it")
        first = self.encode(["a"], False)[0][0]
        self.prefix = " " if self.piece(first)[0].startswith(b" ") else ""

    def encode(self, texts: list[str], special: bool) -> list[list[int]]:
        del special  # a control symbol has no spelling in the text
        return self._processor.encode(texts, num_threads=os.cpu_count())

    def piece(self, index: int) -> tuple[bytes, bool]:
        piece = self._processor.id_to_piece(index)
        if self._processor.is_byte(index):
            return bytes([int(piece[1:-1], 16)]), False  # "<0x0A>"
        return piece.replace("▁", " ").encode(), self._processor.is_control(index)


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | os.PathLike[str]) -> None:
    """Byte-level BPE with BLOOM's pre-tokenizer on `texts`, written to `path` (tokenizer.json).

    At most `vocab_size` ids, fewer if the texts offer no more merges; the same texts give the same
    file. ConfigError if not even the 256 bytes and the special tokens fit.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(alphabet) + len(SPECIALS)
    if vocab_size < least:
        raise ConfigError(f"model.vocab_size is {vocab_size}: a byte-level BPE needs {least}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator((part for text in texts for part in parts([text])), trainer)
    with replacing(Path(path)) as file:
        file.write(tokenizer.to_str(pretty=True).encode())
