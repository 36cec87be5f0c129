"""Folders of Megatron-DeepSpeed, which BLOOM was trained with: global_stepN and its universal form.

A file layer_II-model_TT-model_states.pt has layer II's tensors of tensor-parallel rank TT: a share
of the vocabulary, the heads or the ffn; what is not cut, every rank has, and as the ranks of
BLOOM's runs drifted apart, BigScience's converter averages it. The files of the optimizer are those
of `formats.zero`. The one invariant: tensors are merged as that converter does it, bit for bit.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bloomjax.config import SIZES, ModelConfig
from bloomjax.errors import InputError
from bloomjax.formats import zero
from bloomjax.formats.names import TABLE, Row
from bloomjax.formats.tensors import (
    CONTEXT_LENGTH,
    DTYPES,
    MU,
    PARAMS,
    Progress,
    Stored,
    check_tensors,
    model_config,
)
from bloomjax.formats.torchfile import read_torch
from bloomjax.formats.unpickle import Stub
from bloomjax.formats.untrusted import opened, parse_json

LAST_FILE = 4  # layers + 4 is the number of the last layer file
_LAYER = re.compile(r"layer_(\d{2,5})-model_(\d{2,5})-model_states\.pt")
_TIED = "tied_modules.embed."

# Their names of what ModelConfig has besides sizes.
FIELDS: dict[str, tuple[str, type]] = {
    "layer_norm_epsilon": ("layernorm_epsilon", float),
    "apply_residual_connection_post_layernorm": ("apply_residual_connection_post_layernorm", bool),
    "hidden_dropout": ("hidden_dropout", float),
    "attention_dropout": ("attention_dropout", float),
    "init_std": ("init_method_std", float),
}

log = logging.getLogger("bloomjax")


def parameter_name(row: Row, layer: int, layers: int) -> str:
    """The name that a parameter has in the pipeline: "3.input_layernorm.weight"."""
    number = row.megatron_file(layer, layers)
    return f"{_TIED if number == 1 else f'{number}.'}{row.megatron}"


class MegatronReader:
    """A Reader of a folder global_stepN, of global_stepN_universal, or of the folder above with a
    file `latest`; of any tensor, pipeline and data parallel degree.

    With the files of the BF16 optimizer, or in a universal folder, parameters are the optimizer's
    float32 weights, and the moments are there too. The vocabulary is that of the tensors: padded,
    but for the later dialects of the universal form, which leave the padding out.
    """

    format = "megatron"

    def __init__(self, folder: Path):
        """Reads all headers. InputError if the folder is none of those, or anything is missing."""
        self._folder = folder = _step_folder(folder)
        state = _state(folder)
        if (folder / "zero").is_dir():
            self._shards = zero.universal(folder / "zero")
        else:
            self._shards = {PARAMS: _layer_files(folder)}
        self.config = _config(folder, self._shards.get(PARAMS, {}), state)
        self._check()
        if not (folder / "zero").is_dir():
            self._shards |= zero.partitions(folder, self._shards[PARAMS])
            self._check()
            if MU not in self._shards and any(folder.glob("zero_pp_rank_*")):
                log.warning("%s: optimizer files of fp16 ZeRO are not read; weights only", folder)
        self.progress = _progress(folder, state) if MU in self._shards else None
        self.origin = _origin(folder, state)
        length = _whole(_args(state).get("seq_length")) or CONTEXT_LENGTH
        self.context_length = min(length, 1 << 20)

    def dtype(self, row: Row, kind: str = PARAMS) -> np.dtype:
        return self._of(row, 0, kind)[0].dtype

    def read(self, row: Row, layer: int, start: int, stop: int, kind: str = PARAMS) -> np.ndarray:
        shards = self._of(row, layer, kind)
        if row.split == 1:
            return np.concatenate([shard.rows(start, stop) for shard in shards], axis=1)
        if row.split == 0:
            cuts = np.arange(len(shards))[:, None] * shards[0].shape[0]
            cuts = np.clip(np.array([start, stop]) - cuts, 0, shards[0].shape[0]).tolist()
            return np.concatenate([x.rows(*cut) for x, cut in zip(shards, cuts, strict=True)])
        # Added and divided in the dtype of the file, as BigScience's converter does it.
        total = shards[0].rows(start, stop)
        for shard in shards[1:]:
            total += shard.rows(start, stop)
        return total / total.dtype.type(len(shards))

    def tokenizer(self) -> dict[str, bytes]:
        return {}

    def _of(self, row: Row, layer: int, kind: str) -> list[Any]:
        return self._shards[kind][parameter_name(row, layer, self.config.layers)]

    def _check(self) -> None:
        """InputError unless the tensors are those of the configuration, of one dtype for a row."""
        layers = self.config.layers
        names = {parameter_name(r, i, layers): r for r in TABLE for i in r.layers(self.config)}
        expected = {name: row.shape(self.config.sizes) for name, row in names.items()}
        for shards_by_name in self._shards.values():
            found: dict[str, tuple[int, ...]] = {}
            dtypes: dict[str | None, np.dtype] = {}
            for name, shards in shards_by_name.items():
                row, shape = names.get(name), list(shards[0].shape)
                if row and row.split is not None and row.split < len(shape):
                    shape[row.split] *= len(shards)
                found[name] = tuple(shape)
                same = dtypes.setdefault(row.path if row else None, shards[0].dtype)
                if any(x.dtype != same or same not in DTYPES.values() for x in shards):
                    raise InputError(
                        f"{self._folder}: expected {name} in float32, float16 or bfloat16, the "
                        f"same in all layers, found {shards[0].dtype}"
                    )
            check_tensors(self._folder, found, expected)


def _step_folder(folder: Path) -> Path:
    """`folder` itself, or that which its file `latest` names."""
    for pointer in ("latest", "latest_universal"):
        if (folder / pointer).is_file():
            with opened(folder / pointer) as (file, _):
                tag = file.read(256).decode(errors="replace").strip()
            if not re.fullmatch(r"\w[\w.-]{0,199}", tag) or not (folder / tag).is_dir():
                raise InputError(
                    f"{folder / pointer}: expected the name of a folder beside it, found {tag!r}"
                )
            return folder / tag
    if (folder / "zero").is_dir() or any(folder.glob("layer_*-model_states.pt")):
        return folder
    plain = any(folder.glob("mp_rank_*/model_optim_rng.pt")) or any(folder.glob("latest_check*"))
    found = "one of Megatron without DeepSpeed" if plain else "neither layer files nor `latest`"
    raise InputError(
        f"{folder}: expected a folder global_stepN of Megatron-DeepSpeed, or that above it, found "
        f"{found}: give the folder that holds layer_01-model_00-model_states.pt"
    )


def _layer_files(folder: Path) -> dict[str, list[Stored]]:
    """By the parameter's name, its shard on each tensor-parallel rank: all of one shape."""
    files = {}
    for path in folder.iterdir():
        if match := _LAYER.fullmatch(path.name):
            files[int(match[1]), int(match[2])] = path
    numbers = sorted({number for number, _ in files})
    ranks = zero.grid(
        {(numbers.index(n), t): path for (n, t), path in files.items()}, "layer files"
    )
    tensors: dict[str, list[Stored]] = {}
    for number in numbers:
        for rank in range(ranks[1]):
            tree = read_torch(files[number, rank])
            if type(tree) is not dict or not all(
                type(key) is str and type(leaf) is Stored for key, leaf in tree.items()
            ):
                raise InputError(f"{files[number, rank]}: expected tensors by name, found others")
            for key, leaf in tree.items():
                name = f"{_TIED if number == 1 else f'{number}.'}{key}"
                tensors.setdefault(name, []).append(leaf)
    for name, shards in tensors.items():
        shapes = [list(shard.shape) for shard in shards]
        if shapes != [shapes[0]] * ranks[1]:
            raise InputError(
                f"{folder}: expected {name} in one shape on {ranks[1]} ranks, found {shapes[:8]}"
            )
    return tensors


def _state(folder: Path) -> dict[Any, Any]:
    """What mp_rank_00_model_states.pt says of the run: {} without the file."""
    path = folder / "mp_rank_00_model_states.pt"
    if not path.exists():
        return {}
    state = read_torch(path)
    if type(state) is not dict:
        raise InputError(f"{path}: expected a dictionary, found {type(state).__name__}")
    return state


def _args(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Megatron's arguments; a folder that we wrote has some of them under our own name."""
    args = state.get("args", state.get("bloomjax"))
    args = args.state if type(args) is Stub else args
    return args if type(args) is dict else {}


def _config(folder: Path, tensors: zero.Names, state: Mapping[Any, Any]) -> ModelConfig:
    """Sizes are those of the tensors; the rest is in the arguments, if these are there."""
    args = _args(state)
    numbers = [int(name.split(".")[0]) for name in tensors if re.match(r"\d{1,5}\.", name)]
    embed = tensors.get(_TIED + "word_embeddings.weight")
    if not numbers or not embed or len(embed[0].shape) != 2:
        raise InputError(
            f"{folder}: expected the layers of a BLOOM, found no embedding, or no layers: is it a "
            "whole folder?"
        )
    layers, width = max(numbers) - LAST_FILE, embed[0].shape[1]
    heads = args.get("num_attention_heads")
    if heads is None:
        known = {(x["layers"], x["width"]): x["heads"] for x in SIZES.values()}
        if (layers, width) not in known:
            raise InputError(
                f"{folder}: expected mp_rank_00_model_states.pt with the argument "
                f"num_attention_heads, found none, and no BLOOM of {layers} layers of {width}"
            )
        heads = known[layers, width]
    fields = {}
    for field, (name, kind) in FIELDS.items():
        if name in args:
            fields[field] = args[name]
            if type(args[name]) is not kind or not 0 <= args[name] <= 1:
                raise InputError(
                    f"{folder}: expected {name} as {kind.__name__} of 0 to 1 among the arguments, "
                    f"found {type(args[name]).__name__}"
                )
    vocab_size = embed[0].shape[0] * len(embed)
    return model_config(
        folder, layers=layers, width=width, heads=heads, vocab_size=vocab_size, **fields
    )


def _progress(folder: Path, state: Mapping[Any, Any]) -> Progress:
    step = _whole(state.get("iteration"))
    samples = _whole(_args(state).get("consumed_train_samples"))
    if step is None or samples is None:
        raise InputError(
            f"{folder}: expected iteration and consumed_train_samples beside the optimizer's "
            "state, in mp_rank_00_model_states.pt, found none"
        )
    return Progress(step, samples)


def _origin(folder: Path, state: Mapping[Any, Any]) -> dict[str, Any]:
    origin: dict[str, Any] = {"format": "megatron", "name": folder.absolute().name}
    origin["iteration"] = _whole(state.get("iteration"))
    match state.get("bloomjax"):
        case {"origin": str(source)}:
            origin["source"] = parse_json(source.encode(errors="replace"), folder)
    return origin


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 60 else None
