"""Time and peak memory of the fused head and loss at BLOOM's vocabulary, beside plain logits.

    pip install .
    python benchmarks/loss_memory.py            (5 minutes, 14 GB of memory on CPU)

Both give the loss and its gradients by the hidden states and by the embedding, float32, at the
width of bloom-560m. Plain: all logits, log_softmax, autodiff. Rounds alternate, each in a process
of its own: XLA's plan of temporary buffers and the growth of resident memory are one way's alone.
The least time (`bound_s`) is that of three products of the head at the rate measured beside.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from typing import Any

import numpy as np
from facts import keep, machine, peak_memory
from train_step import timed

WIDTH, VOCAB_SIZE = 1024, 250_880


def measure(way: str, tokens: int, times: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from bloomjax.config import base_config, freeze
    from bloomjax.loss import cross_entropy
    from bloomjax.sharding import act, make_mesh, put, weight

    def plain(x_BTD: jax.Array, embed_VD: jax.Array, targets_BT: Any, weights_BT: Any) -> jax.Array:
        logprobs_BTV = jax.nn.log_softmax(jnp.einsum("BTD,VD->BTV", x_BTD, embed_VD))
        chosen_BT = jnp.take_along_axis(logprobs_BTV, targets_BT[..., None], -1)[..., 0]
        return -(weights_BT * chosen_BT).sum()

    random = np.random.default_rng(0)
    host = (
        ("BTD", random.standard_normal((1, tokens, WIDTH), np.float32)),
        ("VD", random.standard_normal((VOCAB_SIZE, WIDTH), np.float32) * np.float32(0.02)),
        ("BT", random.integers(0, VOCAB_SIZE, (1, tokens), np.int32)),
        ("BT", np.ones((1, tokens), np.float32)),
    )
    mesh = make_mesh(freeze(base_config()).mesh, jax.devices()[:1])
    with jax.set_mesh(mesh) if way == "fused" else contextlib.nullcontext():
        if way == "fused":
            specs = {"VD": weight("VD")}
            batch = [put(a, specs.get(axes, act(axes)), mesh) for axes, a in host]
        else:
            batch = [jnp.asarray(a) for _, a in host]
        del host
        loss = cross_entropy if way == "fused" else plain
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*batch).compile()
        before = peak_memory()
        values = []

        def run() -> None:
            value, gradients = compiled(*batch)
            jax.block_until_ready(gradients)
            values.append(float(value))

        seconds, cpu = timed(run, times)
        peak = peak_memory()
        x, embed = batch[0][0], batch[1]
        product = jax.jit(lambda x, embed: x @ embed.T)
        gemm, _ = timed(lambda: product(x, embed).block_until_ready(), times)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "gemm_gflops": 2e-9 * tokens * WIDTH * VOCAB_SIZE / statistics.median(gemm),
        "temporary_gib": compiled.memory_analysis().temp_size_in_bytes / 2**30,
        "resident_growth_gib": peak - before,
        "loss": values[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--way", choices=("fused", "plain"), help="run this one alone, here")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.tokens, args.times)))
        return
    rounds: dict[str, list[dict[str, Any]]] = {"fused": [], "plain": []}
    load_before = os.getloadavg()
    for _ in range(args.rounds):
        for way, done in rounds.items():
            command = [sys.executable, __file__, f"--way={way}", f"--tokens={args.tokens}"]
            command.append(f"--times={args.times}")
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            done.append(json.loads(out.splitlines()[-1]))
            print(way, done[-1], file=sys.stderr, flush=True)
    result: dict[str, Any] = {
        "what": "head and cross-entropy with gradients, float32",
        "shape": {"tokens": args.tokens, "width": WIDTH, "vocabulary": VOCAB_SIZE},
        "gradients_gib": 4 * (VOCAB_SIZE + args.tokens) * WIDTH / 2**30,
        "logits_gib": 4 * args.tokens * VOCAB_SIZE / 2**30,
    }
    for way, done in rounds.items():
        seconds = [s for r in done for s in r["seconds"]]
        median = statistics.median(seconds)
        rate = statistics.median(r["gemm_gflops"] for r in done)
        bound = 3 * 2e-9 * args.tokens * WIDTH * VOCAB_SIZE / rate
        result[way] = {
            "median_s": median,
            "least_s": min(seconds),
            "most_s": max(seconds),
            "median_cpu_s": statistics.median(s for r in done for s in r["cpu_seconds"]),
            "gemm_gflops": rate,
            "bound_s": bound,
            "share_of_bound": bound / median,
            **{k: max(r[k] for r in done) for k in ("temporary_gib", "resident_growth_gib")},
            "loss": done[0]["loss"],
        }
    result["time_ratio_fused_to_plain"] = result["fused"]["median_s"] / result["plain"]["median_s"]
    result["load_average_before"] = load_before
    result["machine"] = machine("jax", "numpy")
    keep("loss-memory", result)


if __name__ == "__main__":
    main()
