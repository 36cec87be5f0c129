"""BLOOM's tokenizer as GGUF's metadata and as Hugging Face's files, both ways.

GGUF keeps tokens, their types and merges, and names the pre-tokenizer instead of describing it
("bloom"); rows of the embedding without a token are filled up as [PADn]. The invariant: a tokenizer
that went there and back gives the same ids.
"""

import json
from collections.abc import Mapping
from typing import Any

from bloomjax.data.tokenizer import SPECIALS, SPLIT
from bloomjax.errors import InputError
from bloomjax.formats.gguf_file import BOOL, INT32, STRING, UINT32, GGUFFile

FILE = "tokenizer.json"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # llama.cpp's token types
# Names that llama.cpp has for BLOOM's pre-tokenizer (src/llama-vocab.cpp); files from before it had
# any say nothing or "default", and only a BLOOM's tokenizer can be meant.
_PRE = ("bloom", "poro-chat", "gpt3-finnish", "default")
# The same without a nested class, for engines that know none.
_SPLITS = (SPLIT, SPLIT.replace("|[", "|").replace("])]", ")]"))
_IDS = {"bos": "<s>", "eos": "</s>", "unknown": "<unk>", "padding": "<pad>"}


def to_gguf(
    source: object, files: Mapping[str, bytes], vocab_size: int
) -> dict[str, tuple[int, Any]]:
    """Metadata of a tokenizer.json among `files`, with [PADn] up to `vocab_size` tokens; of no
    tokenizer if there are no files.

    InputError if it is not a byte-level BPE with BLOOM's pre-tokenizer, or has other ids.
    """
    size = {"bloom.vocab_size": (UINT32, vocab_size)}
    if not files:
        return size | {"tokenizer.ggml.model": (STRING, "none")}
    try:
        spec = json.loads(files[FILE])
        model = spec["model"]
        vocab: dict[str, int] = dict(model["vocab"])
        merges = [m if type(m) is str else " ".join(m) for m in model["merges"]]
        added = {t["content"]: (t["id"], t["special"]) for t in spec["added_tokens"]}
        known = (model["type"], spec["normalizer"], _is_blooms(spec["pre_tokenizer"]))
        "".join([*vocab, *merges, *added]).encode()  # half a surrogate pair is no text
    except (KeyError, ValueError, TypeError, RecursionError):
        known = None
    if known != ("BPE", None, True):
        raise InputError(
            f"{source}: expected a {FILE} with a byte-level BPE and BLOOM's pre-tokenizer, the "
            "only one that GGUF has a name for, found another tokenizer"
        )
    vocab |= {token: index for token, (index, _) in added.items()}
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for token, index in vocab.items():
        if type(index) is not int or not 0 <= index < vocab_size:
            raise InputError(
                f"{source}: expected token ids below the embedding's {vocab_size} rows, found "
                f"{index!r}: is it this model's tokenizer?"
            )
        tokens[index], types[index] = token, _NORMAL
        if token in added:
            types[index] = _CONTROL if added[token][1] else _USER_DEFINED
    prefix = "tokenizer.ggml."
    values = {
        "model": (STRING, "gpt2"),
        "pre": (STRING, "bloom"),
        "tokens": (STRING, tokens),
        "token_type": (INT32, types),
        "merges": (STRING, merges),
        "add_bos_token": (BOOL, False),
        "add_eos_token": (BOOL, False),
    }
    for name, token in _IDS.items():
        if token in vocab:
            values[f"{name}_token_id"] = (UINT32, vocab[token])
    return size | {prefix + key: value for key, value in values.items()}


def _is_blooms(pre: Mapping[str, Any]) -> bool:
    split, level = pre["pretokenizers"]
    return (
        split["type"] == "Split"
        and split["pattern"]["Regex"] in _SPLITS
        and (split["behavior"], split["invert"]) == ("Isolated", False)
        and level["type"] == "ByteLevel"
        and (level["add_prefix_space"], level["use_regex"]) == (False, False)
    )


def from_gguf(file: GGUFFile, vocab_size: int) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a file's metadata; {} if it has no tokenizer.

    InputError if it is not BLOOM's kind of tokenizer, or has more ids than the model.
    """
    prefix = "tokenizer.ggml."
    kind = file.get(prefix + "model", str, "none")
    if kind in ("none", "no_vocab"):
        return {}
    pre = file.get(prefix + "pre", str, "default")
    if kind != "gpt2" or pre not in _PRE:
        raise InputError(
            f"{file.path}: expected BLOOM's tokenizer (gpt2, {' or '.join(_PRE)}), found "
            f"{kind[:40]!r}, {pre[:40]!r}"
        )
    tokens, merges = file.strings(prefix + "tokens") or [], file.strings(prefix + "merges") or []
    stored = file.numbers(prefix + "token_type")
    if stored is None:
        types = [_CONTROL if token in SPECIALS else _NORMAL for token in tokens]
    else:
        types = stored.tolist()
    vocab, added = {}, []
    used = [
        (index, token, number)
        for index, (token, number) in enumerate(zip(tokens, types, strict=False))
        if number != _UNUSED and token != f"[PAD{index}]"
    ]
    for index, token, number in used:
        vocab[token] = index
        if number in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            special = number != _USER_DEFINED
            added.append({"id": index, "content": token, **flags, "special": special})
    pairs = [merge.split(" ") for merge in merges]
    fits = len(types) == len(tokens) <= vocab_size and len(vocab) == len(used)
    if not fits or not all(len(pair) == 2 for pair in pairs):
        raise InputError(
            f"{file.path}: expected at most {vocab_size} different tokens, a type for each, and "
            "merges of two, found others: get the file again"
        )
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, level | {"trim_offsets": True}],
        },
        "post_processor": level | {"add_prefix_space": True, "trim_offsets": False},
        "decoder": level | {"add_prefix_space": True, "trim_offsets": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": pairs},
    }
    # As BigScience's: batches are padded on the left.
    config = {"tokenizer_class": "BloomTokenizerFast", "padding_side": "left"}
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    config |= {key: token for key, token in names.items() if token in vocab}
    return {
        FILE: json.dumps(spec, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
