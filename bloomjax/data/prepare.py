"""Sources of text, tokenised once into a folder: `train`, `heldout` (.bin/.idx), the tokenizer.

The invariant: prepared.json is written last and says what it was made from, so a folder holds all
of it or nothing; it is made again when a source, the tokenizer or the configuration changed.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bloomjax.config import DataConfig
from bloomjax.data.corpus import Corpus, Part
from bloomjax.data.files import Progress, replacing
from bloomjax.data.indexed import Indexed, IndexedWriter, is_indexed, paths
from bloomjax.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_file, train_tokenizer
from bloomjax.errors import ConfigError, InputError

_NAME = "prepared.json"
_BLOOM_EOS = 2  # of data that came as tokens, without a tokenizer
_BATCH = 1 << 22  # characters tokenised at a time; ~100 bytes of memory each


@dataclasses.dataclass(frozen=True)
class Split:
    """Documents as tokens, each ending with eos."""

    prefix: Path  # for `Indexed`
    documents: int
    tokens: int
    bytes: int | None  # of their text in UTF-8; None if they came as tokens
    sha256: str  # of the .bin, hex


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What `prepare` made; paths are absolute."""

    train: Split
    heldout: Split | None
    tokenizer: Path | None  # a copy, beside the tokens
    eos_id: int
    refused: int  # documents left out because they were no text
    fingerprint: str  # of what it was made from, hex


def prepare(data: DataConfig, vocab_size: int, folder: Path) -> Prepared:
    """Tokenise `data` into `folder`, or find that it holds just that already.

    One process does this; others call `open_prepared` afterwards. A source that is a .bin/.idx
    prefix is read once, to check its ids against `vocab_size` (the model's), and used where it is.
    ConfigError if ids do not fit or fields contradict each other, InputError for sources that
    cannot be read or hold too little.
    """
    folder = folder.absolute()
    if not data.train:
        raise ConfigError("data.train is empty: expected files, folders, globs or a .bin/.idx")
    heldout = _source("heldout", data) if data.heldout else None
    train = _source("train", data, heldout)
    every = 0 if heldout else data.heldout_every
    texts = [source for source in (train, heldout) if isinstance(source, Corpus)]
    if every and not isinstance(train, Corpus):
        raise ConfigError("data.heldout_every picks documents by name, tokens have none: 0 needed")
    if texts and not data.tokenizer:
        raise ConfigError("data.tokenizer is empty: expected a file, or 'train' to make one")
    training = data.tokenizer == "train"
    if training and not isinstance(train, Corpus):
        raise ConfigError("data.tokenizer is 'train', data.train holds tokens: expected text")
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer and not training else None
    if tokenizer and tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"tokenizer {data.tokenizer} has {tokenizer.vocab_size} ids, model.vocab_size is "
            f"{vocab_size}: raise it, or take the model's own tokenizer"
        )
    fingerprint = _fingerprint(data, vocab_size, [train, heldout], tokenizer)
    try:
        if (prepared := open_prepared(folder)).fingerprint == fingerprint:
            return prepared
    except InputError:
        pass  # nothing there, or broken off: made now
    (folder / _NAME).unlink(missing_ok=True)

    file = None
    if isinstance(train, Corpus) and training:
        file = folder / "tokenizer.json"
        train_tokenizer(_texts(train, every), vocab_size, file)
        tokenizer = load_tokenizer(file)
    elif tokenizer:
        given = tokenizer_file(Path(data.tokenizer))
        file = folder / ("tokenizer" + given.suffix)
        with replacing(file) as copy:
            copy.write(given.read_bytes())

    splits: dict[str, Split] = {}
    for name, source in (("heldout", heldout), ("train", train)):
        if isinstance(source, Corpus):
            assert tokenizer
            split_every = every if name == "train" else 0
            splits |= _tokenise(name, source, split_every, tokenizer, vocab_size, folder)
        elif source:
            splits[name] = _check(name, source, vocab_size)
    prepared = Prepared(
        train=splits["train"],
        heldout=splits.get("heldout"),
        tokenizer=file,
        eos_id=tokenizer.eos_id if tokenizer else _BLOOM_EOS,
        refused=sum(source.refused for source in texts),
        fingerprint=fingerprint,
    )
    with replacing(folder / _NAME) as out:
        saved = dataclasses.asdict(prepared)
        out.write(json.dumps(saved, indent=2, default=lambda path: _saved(path, folder)).encode())
    return open_prepared(folder)


def open_prepared(folder: Path) -> Prepared:
    """What `prepare` left in `folder`. InputError if that is nothing, or not whole."""
    folder = folder.absolute()
    try:
        saved = json.loads((folder / _NAME).read_bytes())
        for name in ("train", "heldout"):
            if saved[name]:
                saved[name] = Split(**saved[name] | {"prefix": folder / saved[name]["prefix"]})
        if saved["tokenizer"]:
            saved["tokenizer"] = folder / saved["tokenizer"]
        prepared = Prepared(**saved)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / _NAME}: expected what prepare() writes, found {error!r}; prepare again"
        ) from error
    for split in (prepared.train, prepared.heldout):
        if split and Indexed(split.prefix).tokens != split.tokens:
            raise InputError(f"{split.prefix}.bin: expected {split.tokens} tokens; prepare again")
    if prepared.tokenizer:
        tokenizer_file(prepared.tokenizer)
    return prepared


def _saved(path: Path, folder: Path) -> str:
    """Relative inside the folder, which can then be moved."""
    return path.name if path.parent == folder else str(path)


def _source(name: str, data: DataConfig, other: "Corpus | Path | None" = None) -> "Corpus | Path":
    """The corpus of data.`name`, or the prefix that it is."""
    sources = getattr(data, name)
    tokens = [s for s in sources if is_indexed(s) or s.endswith((".bin", ".idx"))]
    if tokens and len(sources) > 1:
        raise ConfigError(
            f"data.{name} has {len(sources)} sources, one of them {tokens[0]}: expected texts, or "
            "a single .bin/.idx"
        )
    if tokens:
        Indexed(tokens[0])  # refuses early
        return paths(tokens[0])[0].with_suffix("").resolve()
    without = other.files if isinstance(other, Corpus) else ()
    return Corpus(sources, data.exclude, data.text_key, without)


def _fingerprint(
    data: DataConfig,
    vocab_size: int,
    sources: "Sequence[Corpus | Path | None]",
    tokenizer: Tokenizer | None,
) -> str:
    fields = dataclasses.asdict(data)
    del fields["sequence_length"], fields["batch_size"], fields["tokenizer"]
    made_from: list[Any] = [fields, vocab_size, tokenizer.fingerprint if tokenizer else "train"]
    for source in sources:
        files: list[tuple[str, Path]] = []
        if isinstance(source, Corpus):
            files = [(file.name, file.path) for file in source.files]
        elif source:
            files = [(str(path), path) for path in paths(source)]
        stats = [(name, path.stat()) for name, path in files]
        made_from.append([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def is_held_out(name: str, every: int) -> bool:
    """By a hash of the name, so that it depends on nothing else."""
    if not every:
        return False
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") % every == 0


def _texts(corpus: Corpus, every: int) -> Iterator[str]:
    """What a tokenizer may learn from: the documents that are not held out."""
    progress = Progress("training a tokenizer", corpus.bytes)
    for part in corpus:
        progress.update(corpus.read)
        if not is_held_out(part.name, every):
            yield part.text
    progress.done(f"read {corpus.bytes / 1e6:,.1f} MB")


def _tokenise(
    name: str, corpus: Corpus, every: int, tokenizer: Tokenizer, vocab_size: int, folder: Path
) -> dict[str, Split]:
    """The split `name`, and "heldout" with every n-th document if `every` says so."""
    names = [name, "heldout"] if every else [name]
    bytes_of = dict.fromkeys(names, 0)
    progress = Progress(f"tokenising {name}", corpus.bytes)
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(IndexedWriter(folder / name, vocab_size)) for name in names
        }
        for batch in _batches(corpus):
            encoded = tokenizer.encode_batch([part.text for part in batch], special=False)
            for part, ids in zip(batch, encoded, strict=True):
                split = names[is_held_out(part.name, every)]
                bytes_of[split] += len(part.text.encode())
                writers[split].write(ids)
                if part.last:
                    writers[split].write([tokenizer.eos_id])
                    writers[split].end_document()
            progress.update(corpus.read)
    documents = sum(writer.documents for writer in writers.values())
    for split, writer in writers.items():
        if not writer.documents:
            raise InputError(
                f"none of {documents} documents is left for {split} with data.heldout_every = "
                f"{every}: change it, or set data.heldout"
            )
    tokens = sum(writer.tokens for writer in writers.values())
    progress.done(f"{documents:,} documents, {corpus.bytes / 1e6:,.1f} MB, {tokens:,} tokens")
    return {
        split: Split(folder / split, w.documents, w.tokens, bytes_of[split], w.sha256)
        for split, w in writers.items()
    }


def _batches(corpus: Corpus) -> Iterator[list[Part]]:
    batch: list[Part] = []
    characters = 0
    for part in corpus:
        batch.append(part)
        characters += len(part.text)
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check(name: str, prefix: Path, vocab_size: int) -> Split:
    """The split that a .bin/.idx made elsewhere is."""
    indexed = Indexed(prefix)
    if not indexed.tokens:
        raise InputError(f"{indexed.bin_path}: expected tokens, found none; set data.{name}")
    progress = Progress(f"checking {name}", indexed.bin_path.stat().st_size)
    sha256 = indexed.check_ids(vocab_size, progress.update)
    progress.done(f"{len(indexed):,} documents, {indexed.tokens:,} tokens")
    return Split(prefix, len(indexed), indexed.tokens, None, sha256)
