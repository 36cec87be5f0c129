"""What quantisation costs: perplexity of the quickstart's held-out files, in every form of weights.

    pip install '.[gguf]'
    python -m bloomjax.train --config=configs/quickstart.py --workdir=runs/quickstart
    python benchmarks/quality.py runs/quickstart

Each document is read by itself, in windows as training evaluates it, by the model as
`bloomjax.load` gives it: quantised from the checkpoint, and from GGUF files of our converter of
every kind, whose blocks stay as they are where `--quantize` has a form for them ("q4_0, int4") and
are widened otherwise. Compute is in float32, but for the row that says bfloat16. The tables of
these models are small: a vocabulary of 2,048 at width 128 is a quarter of the parameters.
"""

import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import facts
import jax
import jax.numpy as jnp
import numpy as np
from bloomjax_convert.job import transfer

import bloomjax
from bloomjax.config import read_config
from bloomjax.data.pipeline import heldout_batches
from bloomjax.data.prepare import open_prepared
from bloomjax.formats.gguf_writer import FILE_TYPES, GGUFWriter
from bloomjax.formats.tensors import PARAMS
from bloomjax.source import Model, open_source

ROWS = 32  # windows at a time
BLOCKS = {"q8_0": "int8", "q5_0": "int8", "q4_0": "int4"}


def models(workdir: Path, folder: Path) -> Iterator[tuple[str, Model]]:
    for dtype in ("float32", "bfloat16"):
        yield f"checkpoint, {dtype}", bloomjax.load(workdir, dtype=dtype)
    for quantize in ("int8", "int4"):
        yield f"checkpoint, {quantize}", bloomjax.load(workdir, quantize=quantize)
    reader = open_source(workdir)
    for kind in FILE_TYPES:
        path = folder / f"{kind}.gguf"
        files = reader.tokenizer()
        writer = GGUFWriter(
            path, reader.config, kind, tokenizer=files, name="quickstart", origin={}
        )
        writer.finish(transfer(reader, writer, (PARAMS,)))
        yield f"GGUF {kind}", bloomjax.load(path)
        if kind in BLOCKS:
            yield f"GGUF {kind}, {BLOCKS[kind]}", bloomjax.load(path, quantize=BLOCKS[kind])


def nats(model: Model, workdir: Path, length: int) -> float:
    """Of all held-out tokens together."""
    prepared, total = open_prepared(workdir / "data"), 0.0
    batches = heldout_batches(
        prepared, sequence_length=length, rows_per_batch=ROWS, rows=range(ROWS)
    )
    for batch in batches:
        logits = np.asarray(model(jnp.asarray(batch["tokens"])))
        chosen = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        largest = logits.max(-1)
        logits = np.exp(logits - largest[..., None])
        surprise = np.log(logits.sum(-1)) + largest - chosen
        total += float((surprise * batch["weights"]).sum())
    return total


def main(workdir: Path) -> None:
    split = open_prepared(workdir / "data").heldout
    length = read_config(workdir / "config.json")["data"]["sequence_length"]
    assert split and split.bytes
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models(workdir, Path(folder)):
            found = nats(model, workdir, length)
            weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
            results[name] = {
                "perplexity": math.exp(found / split.tokens),
                "bits_per_byte": found / math.log(2) / split.bytes,
                "bits_per_parameter": 8 * weights / model.config.parameter_count,
            }
            print(name, results[name], file=sys.stderr)
    plain = results["checkpoint, float32"]["perplexity"]
    for result in results.values():
        result["perplexity_ratio"] = result["perplexity"] / plain
    facts.keep(
        "quality",
        {
            "what": "held-out files of the quickstart, each by itself, in every form of weights",
            "tokens": split.tokens,
            "bytes": split.bytes,
            "documents": split.documents,
            "results": results,
            "machine": facts.machine("jax", "gguf", "tokenizers", "numpy"),
        },
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
