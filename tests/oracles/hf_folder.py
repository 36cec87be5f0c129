"""Folders that we write, in transformers; and folders that transformers and torch write, here.

    pip install . torch==2.13.0 transformers==5.23.0
    python tests/oracles/hf_folder.py            (1 minute, 1 GB of memory)

Small models of random weights (`weights.hf_weights`), float32, float16 and bfloat16, in one file
and in shards. What we write must load without a missing, unexpected or mismatched key and without a
warning, in the dtype that it is stored in, and its logits must be those of a BloomForCausalLM that
got the same weights in memory; so must ours of the same folder. What they write (save_pretrained,
and torch.save of a state dict, the head included or not) must read here bit for bit. The tokenizer
of a folder must give the ids that ours gives. The result is written to benchmarks/results/; leaves
with 1 if anything of this does not hold.
"""

import itertools
import logging
import pathlib
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import torch
import transformers
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM
from weights import hf_weights

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from facts import keep, machine  # noqa: E402
from foreign import Memory, copy  # noqa: E402
from helpers import model_config  # noqa: E402

import bloomjax  # noqa: E402
from bloomjax.data.tokenizer import load_tokenizer, train_tokenizer  # noqa: E402
from bloomjax.formats.hf import HFReader, HFWriter  # noqa: E402
from bloomjax.formats.tensors import DTYPES, order  # noqa: E402

SHAPES = (
    {"layers": 2, "width": 32, "heads": 4, "vocab_size": 320},
    {"layers": 3, "width": 42, "heads": 6, "vocab_size": 301},
)
SPECIALS = ("unk", "bos", "eos", "pad")
TEXT = "The quick brown fox (and the dog), 12 times: été, 你好!</s>"


def reference(shape: dict[str, int], dtype: str) -> BloomForCausalLM:
    """A BloomForCausalLM with the weights in memory."""
    config = BloomConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["width"],
        n_layer=shape["layers"],
        n_head=shape["heads"],
    )
    model = BloomForCausalLM(config)
    weights = hf_weights(shape["layers"], shape["width"], shape["vocab_size"], 0)
    state = {f"transformer.{name}": torch.from_numpy(a) for name, a in weights.items()}
    state["lm_head.weight"] = state["transformer.word_embeddings.weight"]
    model.load_state_dict(state)
    model.tie_weights()
    return model.to(getattr(torch, dtype)).eval()


@torch.no_grad()
def logits(model: BloomForCausalLM, tokens: np.ndarray) -> np.ndarray:
    return model.float()(torch.from_numpy(tokens).long()).logits.numpy()


@contextmanager
def heard() -> Iterator[list[str]]:
    """What transformers and torch warn of meanwhile."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    listener = Listener(logging.WARNING)
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(listener)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lines
    logger.removeHandler(listener)
    lines += [str(warning.message) for warning in caught]


def ours_in_theirs(
    folder: pathlib.Path, shape: dict[str, int], dtype: str, limit: int, tokenizer: bytes
) -> dict[str, Any]:
    """Loads in transformers what we write to `folder`."""
    files = {"tokenizer.json": tokenizer}
    memory = Memory(model_config(**shape), dtype)
    writer = HFWriter(
        folder,
        memory.config,
        DTYPES[dtype],
        tokenizer=files,
        origin=memory.origin,
        max_shard_bytes=limit,
    )
    copy(memory, writer)
    with heard() as lines:
        model, info = BloomForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True
        )
        theirs = AutoTokenizer.from_pretrained(folder)
    tokens = np.random.RandomState(1).randint(0, shape["vocab_size"], (2, 48)).astype(np.int32)
    stored = str(model.dtype) == f"torch.{dtype}"
    found = logits(model.eval(), tokens)
    expected = logits(reference(shape, dtype), tokens)
    own = np.asarray(bloomjax.load(folder)(jax.numpy.asarray(tokens)))
    return {
        "keys": {key: sorted(map(str, value)) for key, value in info.items()},
        "warnings": lines,
        "dtype_as_stored": stored,
        "files": len(list(folder.glob("*.safetensors"))),
        "largest_difference": float(np.abs(found - expected).max()),
        "largest_difference_ours": float(np.abs(own - expected).max()),
        "bound": 1e-4 * max(1, float(np.abs(expected).max()) / 10),
        "largest_logit": float(np.abs(expected).max()),
        "same_ids": theirs(TEXT)["input_ids"] == load_tokenizer(folder).encode(TEXT),
        "padding_side": theirs.padding_side,
        "special_ids": [getattr(theirs, f"{name}_token_id") for name in SPECIALS],
    }


def theirs_in_ours(folder: pathlib.Path, form: str, shape: dict[str, int], dtype: str) -> bool:
    """Whether what they write to `folder` reads here bit for bit."""
    model = reference(shape, dtype)
    if form == "safetensors":
        model.save_pretrained(folder)
    elif form == "safetensors shards":
        model.save_pretrained(folder, max_shard_size="20KB")
    else:
        model.config.save_pretrained(folder)
        state = model.state_dict()
        if form == "bin without prefix":
            state = model.transformer.state_dict()
        names = list(state)
        if form == "bin shards":
            for i in range(3):
                part = {name: state[name].clone() for name in names[i::3]}
                torch.save(part, folder / f"pytorch_model-{i + 1:05}-of-00003.bin")
        else:
            torch.save(state, folder / "pytorch_model.bin")
    reader = HFReader(folder)
    state = model.transformer.state_dict()
    for row, layer in order(reader.config):
        expected = state[row.hf.format(layer)]
        found = reader.read(row, layer, 0, expected.shape[0])
        if found.dtype != DTYPES[dtype] or found.shape != tuple(expected.shape):
            return False
        if found.tobytes() != expected.contiguous().view(torch.uint8).numpy().tobytes():
            return False
    return len(state) == sum(1 for _ in order(reader.config))


FORMS = ("safetensors", "safetensors shards", "bin", "bin without prefix", "bin shards")


def main() -> None:
    written, read = {}, {}
    with tempfile.TemporaryDirectory() as name:
        base = pathlib.Path(name)
        train_tokenizer([TEXT.removesuffix("</s>")], 300, base / "tokenizer.json")
        tokenizer = (base / "tokenizer.json").read_bytes()
        for i, shape in enumerate(SHAPES):
            for dtype, limit in itertools.product(DTYPES, (5_000_000_000, 20_000)):
                key = f"width {shape['width']}, {dtype}, {'shards' if limit < 1e9 else 'one file'}"
                folder = base / f"ours-{i}-{dtype}-{limit}"
                written[key] = ours_in_theirs(folder, shape, dtype, limit, tokenizer)
            for dtype, form in itertools.product(DTYPES, FORMS):
                folder = base / f"theirs-{i}-{dtype}-{form}"
                folder.mkdir()
                key = f"width {shape['width']}, {dtype}, {form}"
                read[key] = theirs_in_ours(folder, form, shape, dtype)
    good = all(read.values()) and all(
        not any(case["keys"].values())
        and not case["warnings"]
        and case["dtype_as_stored"]
        and case["largest_difference"] <= case["bound"]
        and case["largest_difference_ours"] <= case["bound"]
        and case["same_ids"]
        and case["padding_side"] == "left"
        and case["special_ids"] == [0, 1, 2, 3]
        for case in written.values()
    )
    result = {
        "what": "folders in Hugging Face's format, ours in transformers and theirs here",
        "holds": good,
        "ours_in_transformers": written,
        "theirs_read_bit_for_bit": read,
        "machine": machine("jax", "torch", "transformers", "safetensors", "numpy"),
    }
    keep("hf-folder", result)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
