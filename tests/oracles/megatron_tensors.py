"""What the tiny folder of megatron_folder.py is made of, from numpy alone, as weights.py."""

import ml_dtypes
import numpy as np
from oracles.weights import hf_weights

LAYERS, WIDTH, HEADS, VOCAB_SIZE = 2, 12, 4, 20
TP, PP, DP = 2, 2, 2
STEP, SAMPLES = 7, 1344
STATES = ("fp32", "exp_avg", "exp_avg_sq")


def tensors(layers: int, width: int, vocab_size: int) -> dict[str, dict[str, np.ndarray]]:
    """float32 by state and Hugging Face's name. What tensor parallelism does not cut has as few
    bits as bfloat16, so that ranks may differ from it by an eighth and have an exact mean."""
    result: dict[str, dict[str, np.ndarray]] = {}
    for seed, state in enumerate(STATES):
        result[state] = {}
        for name, array in hf_weights(layers, width, vocab_size, seed).items():
            if state == "exp_avg":
                array = array * np.float32(1e-3)
            elif state == "exp_avg_sq":
                array = np.square(array * np.float32(1e-3))
            if averaged(name):
                array = array.astype(ml_dtypes.bfloat16).astype(np.float32)
            result[state][name] = array
    return result


def averaged(name: str) -> bool:
    """Whether every tensor-parallel rank has the whole of it."""
    return any(x in name for x in ("norm.", "ln_f.", "dense.bias", "dense_4h_to_h.bias"))
