"""What stands beside the weights in a Hugging Face folder: read here, and written.

The invariant: an architecture that is read is one that a BLOOM can have, in whatever spelling; what
is written is what `transformers` reads today.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bloomjax.config import ModelConfig
from bloomjax.errors import InputError
from bloomjax.formats import tensors
from bloomjax.formats.untrusted import member, read_json

_SPELLINGS = {
    "layers": ("n_layer", "num_hidden_layers"),
    "width": ("hidden_size", "n_embed"),
    "heads": ("n_head", "num_attention_heads"),
}
ORIGIN = "bloomjax_origin.json"  # beside config.json: where the weights came from
_SPECIALS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_CARD = """---
{head}library_name: transformers
pipeline_tag: text-generation
tags:
- bloom
---
# BLOOM: {layers} layers of width {width}

{count:,} parameters in {dtype}, {heads} heads, {vocab_size:,} tokens; written by bloomjax.

## Licence

{licence}

## Where it comes from

```json
{origin}
```
"""
_RAIL = """The weights of BLOOM and BLOOMZ, and all that derives from them, are under the BigScience
BLOOM RAIL License 1.0: https://huggingface.co/spaces/bigscience/license. Whoever passes them on
passes on its use restrictions too (paragraph 5 and Attachment A) with a copy of the licence, and
says what was changed."""
_OWN = "Trained from random weights, so BLOOM's licence does not apply: state your own."


def read_config(folder: Path) -> ModelConfig:
    """The architecture that the config.json of a folder describes.

    `pretraining_tp` and `slow_but_exact` are no part of it: they ask for the same sums in another
    order (transformers then leaves two biases out, which the weights were not trained for).
    InputError if it is another model's, or describes what no BLOOM can be.
    """
    path = member(folder, "config.json")
    if path is None:
        raise InputError(f"{folder}: expected a config.json, found none: is it a model's folder?")
    config = read_json(path)
    if config.get("model_type") != "bloom":
        raise InputError(
            f"{path}: expected a model_type of bloom, found {config.get('model_type')!r:.40}"
        )

    def number(key: str, most: float, default: float) -> float:
        value = config.get(key, default)
        if type(value) not in (int, float) or not 0 <= value < most:
            raise InputError(f"{path}: expected {key} below {most}, found {value!r:.40}")
        return float(value)

    shape = {field: _one(path, config, names) for field, names in _SPELLINGS.items()}
    post = config.get("apply_residual_connection_post_layernorm", False)
    if type(post) is not bool:
        raise InputError(
            f"{path}: expected apply_residual_connection_post_layernorm true or false, found "
            f"{post!r:.40}"
        )
    model = tensors.model_config(
        path,
        **shape,
        vocab_size=config.get("vocab_size"),
        layer_norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
        apply_residual_connection_post_layernorm=post,
        hidden_dropout=number("hidden_dropout", 1, 0.0),
        attention_dropout=number("attention_dropout", 1, 0.0),
        init_std=number("initializer_range", 100, 0.02),
    )
    inner = config.get("n_inner")
    if inner not in (None, 4 * model.width):
        raise InputError(f"{path}: expected n_inner of {4 * model.width}, found {inner!r:.40}")
    return model


def read_dtype(folder: Path) -> np.dtype:
    """Of the weights, as the config.json of a folder has it; BLOOM's, of 16 bits, where it says
    nothing."""
    config = read_json(folder / "config.json")
    name = config.get("torch_dtype") or config.get("dtype")
    return tensors.DTYPES.get(str(name), tensors.DTYPES["float16"])


def read_context_length(folder: Path) -> int:
    """`seq_length` of the config.json of a folder; that of BLOOM's training if it has none."""
    found = read_json(folder / "config.json").get("seq_length")
    return found if type(found) is int and 0 < found < 1 << 24 else tensors.CONTEXT_LENGTH


def _one(path: Path, config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The value that goes by any of these names."""
    found = [config[name] for name in names if config.get(name) is not None]
    if not found or any(value != found[0] for value in found):
        raise InputError(f"{path}: expected one {' or '.join(names)}, found {found!r:.60}")
    return found[0]


def side_files(
    config: ModelConfig,
    dtype: np.dtype,
    tokenizer: Mapping[str, bytes],
    context_length: int,
    origin: Mapping[str, Any],
) -> dict[str, bytes]:
    """All files of a folder but the weights: config, generation config, the
    tokenizer's (with the settings of BLOOM's where they are missing), model card, origin."""
    ids = _special_ids(tokenizer)
    model = {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "torch_dtype": dtype.name,
        "n_layer": config.layers,
        "hidden_size": config.width,
        "n_head": config.heads,
        "vocab_size": config.vocab_size,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "apply_residual_connection_post_layernorm": config.apply_residual_connection_post_layernorm,
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.init_std,
        "attention_softmax_in_fp32": True,
        "masked_softmax_fusion": True,
        "pretraining_tp": 1,
        "seq_length": context_length,
        "slow_but_exact": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        **ids,
    }
    generation = {key: ids[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings = {"tokenizer_class": "BloomTokenizerFast", "padding_side": "left"}
    files: dict[str, Any] = {"config.json": model, "generation_config.json": generation}
    if "tokenizer.json" in tokenizer:
        files["tokenizer_config.json"] = settings | {"add_prefix_space": False} | _SPECIALS
        files["special_tokens_map.json"] = _SPECIALS
    files[ORIGIN] = dict(origin)
    terms = tensors.licence(origin)
    card = _CARD.format(
        head=f"license: {terms}\n" if terms else "",
        licence=_RAIL if terms else _OWN,
        count=config.parameter_count,
        dtype=dtype.name,
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        vocab_size=config.vocab_size,
        origin=json.dumps(origin, indent=2),
    )
    return {
        **{key: as_json(value) for key, value in files.items()},
        **tokenizer,
        "README.md": card.encode(),
    }


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _special_ids(tokenizer: Mapping[str, bytes]) -> dict[str, int]:
    """Of the special tokens: 0 to 3, as BLOOM's, unless a tokenizer.json numbers them otherwise."""
    ids = {"unk_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    try:
        added = json.loads(tokenizer.get("tokenizer.json", b"{}")).get("added_tokens", [])
        numbers = {token["content"]: int(token["id"]) for token in added}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise InputError(
            "tokenizer.json: expected added_tokens with content and id, found something else"
        ) from error
    return ids | {f"{k}_id": numbers[token] for k, token in _SPECIALS.items() if token in numbers}
