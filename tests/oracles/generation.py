"""Golden answers of transformers' `generate`: writes tests/golden/generation.npz.

    pip install torch==2.13.0 transformers==5.23.0 numpy==2.4.6
    python tests/oracles/generation.py            (a minute on two CPU cores)

The reference is `BloomForCausalLM` in float32 on CPU, its weights those of `weights.restless` on
both sides. The file's entry "meta" (JSON) holds the models, and for each of them cases: prompts,
options as `generate` names them, and what came out: `ids` after the prompt up to the end, without
it (of a beam search, of each prompt's sequences), and `scores` of sequences.

Every case is one that rounding cannot change, nor padding: prompts are drawn again until `generate`
gives the same ids for the batch, padded on the left, for each prompt alone, and with noise
of 1e-4 on its scores. `distributions` are the probabilities that transformers would draw
from, of scores and histories that `scores_and_history` makes from a seed.
"""

import argparse
import datetime
import itertools
import json
import pathlib
import platform
from typing import Any

import numpy as np
import torch
import transformers
from transformers import BloomConfig, BloomForCausalLM, GenerationConfig, LogitsProcessorList
from weights import hf_weights, restless

VOCAB_SIZE = 96
PAD = 0  # is the end of nothing, and never in a prompt
NOISE = 1e-4
MODELS = {
    "4x8": {"heads": 4, "head_dim": 8, "layers": 2, "seed": 3},
    "6x8": {"heads": 6, "head_dim": 8, "layers": 2, "seed": 4},
    "7x4": {"heads": 7, "head_dim": 4, "layers": 2, "seed": 5},
    "16x4": {"heads": 16, "head_dim": 4, "layers": 1, "seed": 6},
}
PROMPT_LENGTHS = (3, 9, 1, 6)
GREEDY: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"no_repeat_ngram_size": 1},
    {"min_new_tokens": 9},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_new_tokens": 7},
]
BEAMS: list[dict[str, Any]] = [
    *({"num_beams": n, "length_penalty": p} for n in (2, 4) for p in (0.5, 1.0, 2.0, -1.0)),
    {"num_beams": 4, "num_return_sequences": 3},
    {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.0},
    {"num_beams": 4, "repetition_penalty": 1.3},
    {"num_beams": 2, "no_repeat_ngram_size": 2},
    {"num_beams": 4, "min_new_tokens": 8, "num_return_sequences": 2},
    {"num_beams": 4, "ends": 2, "length_penalty": 1.5, "num_return_sequences": 4},
    {
        "num_beams": 2,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 6,
        "length_penalty": 0.8,
    },
]
DISTRIBUTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 5000},
    {"top_k": 20, "ties": True},
    {"top_p": 0.9},
    {"top_p": 0.2},
    {"top_p": 0.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.7},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"min_new_tokens": 9},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.8},
    {"temperature": 1.5, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 0.8, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2},
    {"top_k": 60, "no_repeat_ngram_size": 2, "min_new_tokens": 20, "repetition_penalty": 1.1},
]


class Noise:
    """A logits processor that adds what rounding might, and more."""

    def __init__(self, seed: int):
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + NOISE * (2 * torch.rand(scores.shape, generator=self.random) - 1)


def reference(heads: int, head_dim: int, layers: int, seed: int) -> BloomForCausalLM:
    width = heads * head_dim
    config = BloomConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        n_layer=layers,
        n_head=heads,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
        attn_implementation="eager",
    )
    model = BloomForCausalLM(config)
    weights = restless(hf_weights(layers, width, VOCAB_SIZE, seed))
    state = {f"transformer.{name}": torch.from_numpy(a) for name, a in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def generate(
    model: BloomForCausalLM,
    prompts: list[list[int]],
    stop_ids: list[int],
    options: dict[str, Any],
    noise: int | None = None,
) -> tuple[list[list[list[int]]], list[list[float]]]:
    """The ids after each prompt, of each sequence, without the end; the scores of sequences."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    config = GenerationConfig(
        **{k: v for k, v in options.items() if k != "ends"},
        do_sample=False,
        eos_token_id=stop_ids or None,
        pad_token_id=PAD,
        output_scores=True,
        return_dict_in_generate=True,
    )
    out = model.generate(
        tokens,
        attention_mask=mask,
        generation_config=config,
        logits_processor=LogitsProcessorList([] if noise is None else [Noise(noise)]),
    )
    each = options.get("num_return_sequences", 1)
    rows = [cut(row[longest:], stop_ids) for row in out.sequences.tolist()]
    scores = out.sequences_scores.tolist() if "num_beams" in options else []
    group = [rows[i : i + each] for i in range(0, len(rows), each)]
    return group, [scores[i : i + each] for i in range(0, len(scores), each)]


def cut(ids: list[int], stop_ids: list[int]) -> list[int]:
    ends = [i for i, token in enumerate(ids) if token in stop_ids]
    return ids[: ends[0]] if ends else ids


def case(model: BloomForCausalLM, options: dict[str, Any], seed: int) -> dict[str, Any] | None:
    """A case with prompts of this seed; None where rounding or padding could change it, or where
    what comes says little."""
    random = np.random.RandomState(seed)
    prompts = [random.randint(1, VOCAB_SIZE, n).tolist() for n in PROMPT_LENGTHS]
    options = {"max_new_tokens": 14, **options}
    free, _ = generate(model, prompts, [], {**options, "min_new_tokens": 0})
    # ends are ids that come without them
    common = [i for i, _ in sorted(counts(free).items(), key=lambda item: -item[1]) if i != PAD]
    stop_ids = common[1 : 1 + options.get("ends", 1)]
    ids, scores = generate(model, prompts, stop_ids, options)
    answers = [row for rows in ids for row in rows]
    if len({*map(len, answers)}) < 3 or len({*itertools.chain(*answers)}) < 8:
        return None
    alone = [generate(model, [prompt], stop_ids, options)[0][0] for prompt in prompts]
    others = [alone] + [generate(model, prompts, stop_ids, options, noise)[0] for noise in range(3)]
    if any(other != ids for other in others):
        return None
    options.pop("ends", None)
    found = {"prompts": prompts, "stop_ids": stop_ids, "options": options, "ids": ids}
    return {**found, "scores": scores} if scores else found


def counts(ids: list[list[list[int]]]) -> dict[int, int]:
    """In how many sequences each id comes."""
    found: dict[int, int] = {}
    for token in (t for rows in ids for row in rows for t in dict.fromkeys(row)):
        found[token] = found.get(token, 0) + 1
    return found


def scores_and_history(ties: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 [B, V] and ids int32 [B, S] in which n-grams repeat."""
    random = np.random.RandomState(seed)
    scores = (3 * random.standard_normal((4, 300))).astype(np.float32)
    if ties:
        scores = np.round(scores)
    return scores, random.randint(0, 6, (4, 24)).astype(np.int32)


@torch.no_grad()
def distribution(model: BloomForCausalLM, options: dict[str, Any], seed: int) -> np.ndarray:
    """What transformers draws from, float32 [B, V]; the prompt is the first 10 of the history, and
    the end is id 7."""
    options = dict(options)
    scores, history = scores_and_history(options.pop("ties", False), seed)
    config = GenerationConfig(**{"top_k": 0, **options}, do_sample=True, eos_token_id=7)
    model._prepare_special_tokens(config, device=torch.device("cpu"))
    processors = model._get_logits_processor(config, input_ids_seq_length=10)
    out = processors(torch.from_numpy(history).long(), torch.from_numpy(scores))
    return torch.softmax(out, -1).numpy()


def main() -> None:
    default = pathlib.Path(__file__).parents[1] / "golden" / "generation.npz"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=default)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    cases: dict[str, list[dict[str, Any]]] = {}
    for name, shape in MODELS.items():
        model = reference(**shape)
        cases[name] = []
        for options in GREEDY + BEAMS:
            seeds = range(200)
            found = ((seed, case(model, options, seed)) for seed in seeds)
            seed, chosen = next((seed, c) for seed, c in found if c)
            cases[name].append(chosen)
            lengths = [[len(row) for row in rows] for rows in chosen["ids"]]
            print(name, options, "prompts", seed, "lengths", lengths, flush=True)
    arrays = {
        f"distributions/{i}": distribution(model, options, i)
        for i, options in enumerate(DISTRIBUTIONS)
    }
    meta = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "vocab_size": VOCAB_SIZE,
        "models": MODELS,
        "cases": cases,
        "distributions": DISTRIBUTIONS,
    }
    np.savez_compressed(out, meta=np.array(json.dumps(meta)), **arrays)
    print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
