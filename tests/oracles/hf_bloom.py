"""Golden logits and gradients of Hugging Face's BLOOM: writes tests/golden/hf_bloom.npz.

    pip install torch==2.13.0 transformers==5.23.0 numpy==2.4.6
    python tests/oracles/hf_bloom.py            (10 seconds on two CPU cores)

Made on 2026-11-22 with exactly these; versions and date stand in the file too. The reference is
`BloomForCausalLM` with eager attention, on CPU. The file holds inputs and outputs; the weights come
from `weights.hf_weights` on both sides. Its entry "meta" (JSON) lists the cases: shape, how the
inputs are padded, the weights' seed, and `float64`: the largest difference between the reference's
own float32 and float64 logits (for gradients ||difference|| / ||gradient||, the worst leaf), which
says how exact float32 is here.
"""

import argparse
import datetime
import json
import pathlib
import platform
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from transformers import BloomConfig, BloomForCausalLM
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor
from weights import hf_weights, random_qkv


def row(heads: int, head_dim: int, layers: int, tokens: int, *pads: tuple, **more: Any) -> dict:
    """pads: (left, right) of each row of the batch. every: store every n-th position's output.
    post: apply_residual_connection_post_layernorm."""
    shape = {"heads": heads, "head_dim": head_dim, "layers": layers, "tokens": tokens}
    return {**shape, "pads": pads, "every": 1, "post": False, **more}


KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "logits": {
        "4x8_left": row(4, 8, 3, 40, (0, 0), (7, 0), (33, 0)),
        "6x80_right": row(6, 80, 2, 64, (0, 0), (0, 9), (0, 50)),
        "16x64_512": row(16, 64, 2, 512, (0, 0), every=2),
        "12x96_both": row(12, 96, 1, 48, (0, 0), (5, 3), (20, 0), (0, 40)),
        "4x128_post": row(4, 128, 2, 72, (0, 0), (30, 0), post=True),
        "6x16_deep_512": row(6, 16, 12, 512, (101, 0), (0, 60), every=4),
    },
    "gradients": {
        "4x8": row(4, 8, 2, 24, (0, 0), (9, 0), (0, 5)),
        "6x8_post": row(6, 8, 2, 20, (4, 0), (0, 0), post=True),
    },
    "bfloat16": {
        "16x8_400": row(16, 8, 2, 400, (0, 0), every=4),
        "8x16_left": row(8, 16, 2, 384, (50, 0), every=4),
    },
    # One attention alone, in bfloat16: q, k, v in, attended values out.
    "attention": {
        "16x8_400": row(16, 8, 1, 400, (0, 0), (37, 0), every=8),
        "12x8_300": row(12, 8, 1, 300, (0, 0), (0, 20), every=8),
    },
}
VOCAB_SIZE = 64


def reference(case: dict[str, Any], dtype: torch.dtype) -> BloomForCausalLM:
    width = case["heads"] * case["head_dim"]
    config = BloomConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        n_layer=case["layers"],
        n_head=case["heads"],
        apply_residual_connection_post_layernorm=case["post"],
        attn_implementation="eager",
    )
    model = BloomForCausalLM(config)
    weights = hf_weights(case["layers"], width, VOCAB_SIZE, case["seed"])
    state = {f"transformer.{name}": torch.from_numpy(a) for name, a in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model.eval().to(dtype)


def softmax_in_float64() -> Any:
    """The reference asks for a float32 softmax whatever the model's dtype; within this, it gets
    float64."""
    softmax = torch.nn.functional.softmax
    return mock.patch.object(torch.nn.functional, "softmax", lambda x, dim, dtype: softmax(x, dim))


def inputs(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and the 0/1 mask, int32 [B, T]."""
    B, T = len(case["pads"]), case["tokens"]
    tokens = np.random.RandomState(case["seed"] + 1).randint(0, VOCAB_SIZE, (B, T))
    mask = np.ones((B, T), np.int32)
    for row, (left, right) in zip(mask, case["pads"], strict=True):
        row[:left] = 0
        row[T - right :] = 0
    return tokens.astype(np.int32), mask


@torch.no_grad()
def logits(case: dict[str, Any], dtype: torch.dtype) -> np.ndarray:
    """[B, T / every, V]; positions of padding hold what the reference happens to give."""
    tokens, mask = (torch.from_numpy(a).long() for a in inputs(case))
    out = reference(case, dtype)(tokens, attention_mask=mask).logits
    out = out[:, :: case["every"]]
    return (out if dtype == torch.float64 else out.float()).numpy()


def gradients(case: dict[str, Any], dtype: torch.dtype) -> tuple[float, dict[str, np.ndarray]]:
    """Mean cross-entropy over weighted positions, and its gradient by every tensor."""
    tokens, mask = (torch.from_numpy(a).long() for a in inputs(case))
    targets, weights = (torch.from_numpy(a) for a in labels(case))
    model = reference(case, dtype)
    out = model(tokens, attention_mask=mask).logits
    nll = torch.nn.functional.cross_entropy(out.transpose(1, 2), targets.long(), reduction="none")
    loss = (weights * nll).sum() / weights.sum()
    loss.backward()
    named = model.transformer.named_parameters()
    return loss.item(), {name: p.grad.numpy() for name, p in named}


@torch.no_grad()
def attention(case: dict[str, Any]) -> np.ndarray:
    """[B, T / every, N * H] in bfloat16 arithmetic, of the q, k, v of `weights.random_qkv`."""
    N, H, T = (case[key] for key in ("heads", "head_dim", "tokens"))
    qkv = torch.from_numpy(random_qkv(len(case["pads"]), T, N, H, case["seed"])).bfloat16()
    mask = torch.from_numpy(inputs(case)[1])
    layer = BloomAttention(BloomConfig(hidden_size=N * H, n_head=N), layer_idx=0).eval()
    layer.query_key_value = layer.dense = torch.nn.Identity()
    alibi = build_alibi_tensor(mask, N, torch.bfloat16)
    seen = torch.ones(T, T).tril().bool() & (mask[:, None, None, :] > 0)
    hidden = torch.where(seen, 0.0, torch.finfo(torch.bfloat16).min).bfloat16()
    values, _ = layer(qkv.flatten(2), torch.zeros(()).bfloat16(), alibi, hidden)
    return values[:, :: case["every"]].float().numpy()


def labels(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Random targets, int32, and weights of 0, 0.5 or 1, float32; padding weighs 0. [B, T]."""
    _, mask = inputs(case)
    random = np.random.RandomState(case["seed"] + 2)
    targets = random.randint(0, VOCAB_SIZE, mask.shape).astype(np.int32)
    return targets, (random.randint(0, 3, mask.shape) / 2 * mask).astype(np.float32)


def main() -> None:
    default = pathlib.Path(__file__).parents[1] / "golden" / "hf_bloom.npz"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=default)
    out = parser.parse_args().out
    torch.manual_seed(0)
    arrays: dict[str, np.ndarray] = {}
    for seed, (kind, name) in enumerate((k, n) for k, cases in KINDS.items() for n in cases):
        case = KINDS[kind][name]
        case["seed"] = 100 * seed
        at = f"{kind}/{name}"
        arrays[f"{at}/tokens"], arrays[f"{at}/mask"] = inputs(case)
        if kind == "attention":
            arrays[f"{at}/values"] = attention(case)
        elif kind == "gradients":
            arrays[f"{at}/targets"], arrays[f"{at}/weights"] = labels(case)
            loss, grads = gradients(case, torch.float32)
            arrays[f"{at}/loss"] = np.float64(loss)
            arrays.update({f"{at}/grad/{k}": g for k, g in grads.items()})
            with softmax_in_float64():
                _, exact = gradients(case, torch.float64)
            norm = np.linalg.norm
            case["float64"] = max(float(norm(grads[k] - g) / norm(g)) for k, g in exact.items())
        else:
            single = logits(case, torch.float32)
            with softmax_in_float64():
                double = logits(case, torch.float64)
            real = arrays[f"{at}/mask"][:, :: case["every"]] > 0
            case["float64"] = float(np.abs(single - double)[real].max())
            if kind == "bfloat16":
                arrays[f"{at}/logits_float32"] = single
                single = logits(case, torch.bfloat16)
            arrays[f"{at}/logits"] = single
        print(at, case, flush=True)
    meta = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "vocab_size": VOCAB_SIZE,
        **KINDS,
    }
    np.savez_compressed(out, meta=np.array(json.dumps(meta)), **arrays)
    print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
