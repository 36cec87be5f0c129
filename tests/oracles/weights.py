"""Random BLOOM weights from numpy alone, the same for the oracle's side and for ours.

`numpy.random.RandomState` never changes its streams, so golden files need not hold any weights.
Scales are chosen to make every detail count: scores of a few units before the softmax (attention
far from uniform), logits of a few units, activations on the bent part of the GELU, and biases and
layer norms that are neither 0 nor 1.
"""

from collections.abc import Iterator

import numpy as np

BIAS_STD = 0.3


def shapes(layers: int, width: int, vocab_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of each tensor, by Hugging Face's names without the prefix `transformer.`."""
    D = width
    yield "word_embeddings.weight", (vocab_size, D)
    linears = {
        "self_attention.query_key_value": (3 * D, D),
        "self_attention.dense": (D, D),
        "mlp.dense_h_to_4h": (4 * D, D),
        "mlp.dense_4h_to_h": (D, 4 * D),
    }
    norms = ["word_embeddings_layernorm", "ln_f"]
    for i in range(layers):
        norms += [f"h.{i}.input_layernorm", f"h.{i}.post_attention_layernorm"]
        for name, shape in linears.items():
            yield f"h.{i}.{name}.weight", shape
            yield f"h.{i}.{name}.bias", shape[:1]
    for name in norms:
        yield f"{name}.weight", (D,)
        yield f"{name}.bias", (D,)


def hf_weights(layers: int, width: int, vocab_size: int, seed: int) -> dict[str, np.ndarray]:
    """float32 tensors under the names of `shapes`."""
    random = np.random.RandomState(seed)
    tensors = {}
    for name, shape in shapes(layers, width, vocab_size):
        array = random.standard_normal(shape).astype(np.float32)
        if name == "word_embeddings.weight":
            array *= np.float32(3 / np.sqrt(width))  # logits of N(0, 3)
        elif len(shape) == 2:
            gain = 1.4 if "query_key_value" in name else 1.0  # scores of N(0, 2)
            array *= np.float32(gain / np.sqrt(shape[1]))
        elif name.endswith("bias"):
            array *= np.float32(BIAS_STD)
        else:
            array = 1 + np.float32(0.2) * array
        tensors[name] = array
    return tensors


def restless(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`hf_weights` of a model that says something, where random models with a tied head say their
    last token, or the biases' favourite, again and again: the last layer norm's scale is N(0, 1),
    so that an embedding is not like itself, its bias is small, and layers write more."""
    changed = {"ln_f.weight": (weights["ln_f.weight"] - 1) / np.float32(0.2)}
    changed["ln_f.bias"] = weights["ln_f.bias"] / np.float32(10)
    for name, array in weights.items():
        if name.endswith(("dense.weight", "dense_4h_to_h.weight")):
            changed[name] = 3 * array
    return weights | changed


def random_qkv(B: int, T: int, N: int, H: int, seed: int) -> np.ndarray:
    """float32 [B, T, N, 3, H], Hugging Face's order: q, k, v of N(0, 1.4)."""
    random = np.random.RandomState(seed)
    return (1.4 * random.standard_normal((B, T, N, 3, H))).astype(np.float32)
