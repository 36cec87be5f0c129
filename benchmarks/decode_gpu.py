"""Decoding on one NVIDIA GPU beside transformers, at the shapes of published BLOOMs.

    pip install '.[cuda]' torch transformers
    python benchmarks/decode_gpu.py [--cases='7b1 none 1,7b1 int8 1,7b1 none 64']

A case is a size, how weights are held (none: bfloat16), and slots; random weights, greedy, each
slot behind 1,900 tokens, 16 tokens a dispatch; the median of six dispatches, with the host's part.
"none-xla" leaves the kernel of one launch out. transformers has bfloat16 and what its `generate`
makes of a static cache: a forward that torch.compile captured as a CUDA graph. Shares are of bytes
of weights and of filled places of the cache, over the time, in what the memory was measured to be
read at in the same process (XLA's sum over 4.3 GB), and in what it is sold for.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
from decode import fields
from facts import RESULTS, machine

BEHIND, TOKENS = 1900, 16
CASES = [
    *(f"{size} {kind} 1" for size in ("7b1", "3b", "1b7", "560m") for kind in ("none", "int8")),
    *(f"7b1 none {slots}" for slots in (8, 32, 64)),
    *(f"560m none {slots}" for slots in (8, 64)),
    *(f"{size} none-xla 1" for size in ("7b1", "560m")),
    *(f"{size} transformers 1" for size in ("7b1", "560m")),
]


def memory_rate() -> float:
    """GB/s at which XLA adds up 4.3 GB."""
    import jax
    import jax.numpy as jnp

    numbers = jnp.ones(2**31, jnp.bfloat16)
    add = jax.jit(lambda x: x.astype(jnp.float32).sum())
    times = []
    for _ in range(6):
        start = time.perf_counter()
        add(numbers).block_until_ready()
        times.append(time.perf_counter() - start)
    return numbers.nbytes / min(times[1:]) / 1e9


def draw(params: Any) -> Any:
    """Random weights as shaped: on constants a GPU draws less power, and is faster."""
    import jax
    import jax.numpy as jnp

    @functools.partial(jax.jit, static_argnums=(1, 2, 3))
    def numbers(seed: int, shape: Any, dtype: Any, layout: Any) -> jax.Array:
        key = jax.random.key(seed)
        if jnp.issubdtype(dtype, jnp.integer):
            values = jax.random.randint(key, shape, -127, 128, jnp.int32)
        else:
            values = 0.02 * jax.random.normal(key, shape, jnp.bfloat16)
        return jax.reshard(values.astype(dtype), layout)

    leaves, tree = jax.tree.flatten(params)
    drawn = [numbers(i, x.shape, x.dtype, x.sharding) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(tree, drawn)


def ours(size: str, kind: str, slots: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from bloomjax.config import base_config, freeze
    from bloomjax.decode import programs
    from bloomjax.decode.params import abstract_params
    from bloomjax.decode.sampling import Features
    from bloomjax.sharding import decode_mesh

    quantize, _, without = kind.partition("-")
    if without:
        programs.on_one_gpu = lambda: False
    config = dataclasses.replace(freeze(base_config(size)).model, dtype="bfloat16")
    mesh = decode_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = draw(abstract_params(config, mesh, quantize))
        empty = jax.jit(programs.empty_state, static_argnums=(0, 1, 2, 3))
        state = empty(config, slots, 2048, "auto")
        filled = jnp.full_like(state.lengths_B, BEHIND)
        state = state._replace(lengths_B=filled, limits_B=jnp.full_like(filled, 2048))
        ready_B, times = jnp.ones(slots, bool), []
        for _ in range(7):
            start = time.perf_counter()
            arguments = config, TOKENS, Features(), None, params, state, ready_B
            state, found = programs.decode(*arguments)
            jax.block_until_ready(found)
            times.append(1e3 * (time.perf_counter() - start) / TOKENS)
    places = BEHIND + 4 * TOKENS  # on the average of the dispatches that count
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    cache = slots * places * config.layers * config.width * 2 * 2
    return {
        "step_ms": statistics.median(times[1:]),
        "dispatches_ms": times[1:],
        "start_s": times[0] * TOKENS / 1e3,
        "weight_bytes": weights,
        "cache_bytes": cache,
        "ids": np.asarray(found[0])[:4, 0].tolist(),
    }


def transformers(size: str) -> dict[str, Any]:
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    shape = fields(size)
    shape.pop("model_type")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = BloomForCausalLM(BloomConfig(**shape)).eval()
    prompt = torch.randint(0, 250_000, (1, BEHIND), device="cuda")
    options = {"do_sample": False, "cache_implementation": "static", "pad_token_id": 3}

    def seconds(tokens: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, **options)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    begun = time.perf_counter()
    seconds(128)
    begun = time.perf_counter() - begun
    rounds = [1e3 * (seconds(128) - seconds(2)) / 126 for _ in range(3)]
    weights = sum(p.nbytes for p in model.parameters())
    cache = (BEHIND + 64) * model.config.n_layer * model.config.hidden_size * 2 * 2
    times = {"step_ms": statistics.median(rounds), "dispatches_ms": rounds, "start_s": begun}
    return times | {"weight_bytes": weights, "cache_bytes": cache}


def run(case: str) -> dict[str, Any]:
    size, kind, slots = case.split()
    if kind == "transformers":
        return transformers(size)
    return {"memory_GBps": memory_rate()} | ours(size, kind, int(slots))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--sold", type=float, default=4800, help="GB/s; an H200's")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run(args.child)))
        return
    names = ["--query-gpu=name,driver_version,clocks.max.sm", "--format=csv,noheader"]
    gpu = subprocess.run(["nvidia-smi", *names], capture_output=True, text=True).stdout.strip()
    facts = machine("jax", "jaxlib", "torch", "transformers") | {"gpu": gpu}
    results: dict[str, Any] = {"machine": facts, "sold_GBps": args.sold, "results": {}}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"decode-gpu-{datetime.date.today().isoformat()}.json"
    for case in args.cases.split(","):
        command = [sys.executable, __file__, f"--child={case}"]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            found = {"failed": ran.stderr.strip().splitlines()[-1][:300]}
        else:
            found = json.loads(ran.stdout.splitlines()[-1])
            rate = (found["weight_bytes"] + found["cache_bytes"]) / found["step_ms"] / 1e6
            found |= {"GBps": rate, "share_of_sold": rate / args.sold}
            if "memory_GBps" in found:
                found["share_of_measured"] = rate / found["memory_GBps"]
        results["results"][case] = found
        shown = {key: value for key, value in found.items() if "dispatches" not in key}
        print(case, json.dumps(shown), file=sys.stderr, flush=True)
        path.write_text(json.dumps(results, indent=2) + "\n")  # after each: a run may be cut


if __name__ == "__main__":
    main()
