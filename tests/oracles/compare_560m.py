"""Logits of Hugging Face's BLOOM and of ours at the real shape of bloom-560m, float32, CPU.

    pip install . torch==2.13.0 transformers==5.23.0
    python tests/oracles/compare_560m.py            (1 minute, 8 GB of memory, 2.3 GB of disk)

Random weights (`weights.hf_weights`, seed 0) go through one safetensors file with the published
names. Three prompts of unequal length, padded on the left, make a batch of 96 tokens a row. The
result is written to benchmarks/results/. Leaves with 1 if a logit differs by more than
1e-4 x max(1, max|logit| / 10).
"""

import gc
import json
import pathlib
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file, save_file
from weights import hf_weights

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
LAYERS, WIDTH, HEADS, VOCAB_SIZE = 24, 1024, 16, 250_880
TOKENS, LEFT = 96, (0, 31, 85)


def theirs(file: pathlib.Path, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = BloomForCausalLM(config)
    state = {f"transformer.{k}": torch.from_numpy(a) for k, a in load_file(file).items()}
    state["lm_head.weight"] = state["transformer.word_embeddings.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    with torch.no_grad():
        ids, seen = torch.from_numpy(tokens).long(), torch.from_numpy(mask).long()
        return model.eval()(ids, attention_mask=seen).logits.numpy()


def ours(file: pathlib.Path, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    import jax

    import bloomjax
    from bloomjax.config import base_config, freeze
    from bloomjax.sharding import act, make_mesh, put

    sizes = {"n_layer": LAYERS, "hidden_size": WIDTH, "n_head": HEADS, "vocab_size": VOCAB_SIZE}
    (file.parent / "config.json").write_text(json.dumps({"model_type": "bloom", **sizes}))
    mesh = make_mesh(freeze(base_config("560m")).mesh, jax.devices()[:1])
    model = bloomjax.load(file.parent, mesh, dtype="float32")
    return np.asarray(model(put(tokens, act("BT"), mesh), put(mask, act("BT"), mesh)))


def main() -> None:
    from facts import keep, machine

    tokens = np.random.RandomState(1).randint(0, VOCAB_SIZE, (len(LEFT), TOKENS)).astype(np.int32)
    mask = (np.arange(TOKENS) >= np.array(LEFT)[:, None]).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "model.safetensors"
        save_file(hf_weights(LAYERS, WIDTH, VOCAB_SIZE, 0), file)
        gc.collect()
        expected = theirs(file, tokens, mask)[mask > 0]
        gc.collect()
        found = ours(file, tokens, mask)[mask > 0]
    largest = float(np.abs(expected).max())
    difference, bound = float(np.abs(found - expected).max()), 1e-4 * max(1, largest / 10)
    result = {
        "what": "logits, ours against transformers' BloomForCausalLM (eager), float32",
        "shape": {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "vocabulary": VOCAB_SIZE},
        "rows": len(LEFT),
        "tokens": TOKENS,
        "left_padding": LEFT,
        "largest_difference": difference,
        "bound": bound,
        "largest_logit": largest,
        "root_mean_square_difference": float(np.sqrt(np.square(found - expected).mean())),
        "same_most_likely_token": float((found.argmax(-1) == expected.argmax(-1)).mean()),
        "machine": machine("jax", "flax", "torch", "transformers", "numpy"),
    }
    keep("logits-560m", result)
    sys.exit(0 if difference <= bound else 1)


if __name__ == "__main__":
    main()
