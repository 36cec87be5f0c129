"""The golden answers of transformers' `generate` (tests/oracles/generation.py): its models, and
what they were asked."""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
from helpers import from_hf, model_config
from oracles.weights import hf_weights, restless

from bloomjax.config import ModelConfig
from bloomjax.decode.beam import Beams
from bloomjax.decode.sampling import Sampling
from bloomjax.model import Params

FILE = np.load(pathlib.Path(__file__).parent / "golden" / "generation.npz")
META = json.loads(str(FILE["meta"]))
MODELS = sorted(META["models"])


class Case(NamedTuple):
    prompts: list[list[int]]
    max_new_tokens: int
    sampling: Sampling
    beams: Beams | None
    stop_ids: tuple[int, ...]
    ids: list[list[list[int]]]  # of each prompt, of each sequence, without the end
    scores: list[list[float]]


def model_of(name: str) -> tuple[ModelConfig, Params]:
    """The parameters are on the host, blocks stacked."""
    shape = META["models"][name]
    config = model_config(
        layers=shape["layers"],
        heads=shape["heads"],
        width=shape["heads"] * shape["head_dim"],
        vocab_size=META["vocab_size"],
    )
    weights = hf_weights(config.layers, config.width, config.vocab_size, shape["seed"])
    return config, from_hf(restless(weights), config)


def cases_of(name: str, beams: bool) -> list[Case]:
    """Those of a beam search, or the greedy ones."""
    return [
        _case(case) for case in META["cases"][name] if ("num_beams" in case["options"]) == beams
    ]


def _case(case: dict[str, Any]) -> Case:
    options = dict(case["options"])
    count, number = options.pop("max_new_tokens"), options.pop("num_beams", None)
    penalty = options.pop("length_penalty", 1.0)
    returned = options.pop("num_return_sequences", 1)
    beams = Beams(number, penalty, returned) if number else None
    stop_ids = tuple(case["stop_ids"])
    sampling = Sampling(**options)
    return Case(
        case["prompts"], count, sampling, beams, stop_ids, case["ids"], case.get("scores", [])
    )
