"""Prefill and decoding, ours beside the peers, at the shapes of published BLOOMs, random weights.

    pip install '.[gguf]' torch==2.13.0 transformers==5.23.0 llama-cpp-python==0.3.36
    python benchmarks/decode.py                    (CPU, bloom-560m: 5 minutes a round, 12 GB)

On CPU every peer runs in processes of its own, rounds alternate, and each has as many threads as
there are: ours on the float16 file and made float32, int8 and int4; transformers in float32
(eager, its own cache); llama.cpp on F16 and Q8_0 files that our converter wrote. Prefill is of 512
tokens into an empty cache, decoding greedy behind 16 tokens. A step of 8 slots is timed where
weights are narrow.

A step's bound is the longer of two times: of the bytes of weights and cache, as fast as NumPy
multiplies a matrix by a vector; of two FLOPs a weight and slot, at the rate of XLA's float32
product of 512 rows. A virtual machine's rates change within seconds, so our processes time one such
product of each kind right before and after every dispatch: `over_bound` is the median of what a
dispatch took by the mean of its two bounds. `over_best_bound` is the median step by the bound of
the best of seven products before loading and behind the last step, which slow seconds do not reach.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

# Else a thread of NumPy spins for 0.1 s behind each product, beside what is timed next.
os.environ["OPENBLAS_THREAD_TIMEOUT"] = "4"

import numpy as np
from facts import keep, machine, peak_memory

ROOT = pathlib.Path(__file__).parents[1]
PROMPT, BEHIND, TOKENS, CONTEXT = 512, 16, 32, 1024
OUR_TOKENS = 48  # 12 dispatches
ROUNDS = 3


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.RandomState(seed).randint(0, 250_000, count).tolist()


def fields(size: str) -> dict[str, int]:
    from bloomjax.config import base_config, freeze

    model = freeze(base_config(size)).model
    shape = {"n_layer": model.layers, "hidden_size": model.width, "n_head": model.heads}
    return {"model_type": "bloom", **shape, "vocab_size": model.vocab_size}


def write_folder(path: pathlib.Path, size: str) -> None:
    """A model in Hugging Face's format, float16, of random weights."""
    from safetensors.numpy import save_file

    sys.path.insert(0, str(ROOT / "tests" / "oracles"))
    from weights import hf_weights

    shape = fields(size)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(shape))
    made = hf_weights(shape["n_layer"], shape["hidden_size"], shape["vocab_size"], 0)
    save_file({k: v.astype(np.float16) for k, v in made.items()}, path / "model.safetensors")


# The peers: each a process that prints one JSON object --------------------------------------------


def prefill(model: Any, length: int) -> float:
    """Milliseconds of `length` tokens into an empty cache; the best of three."""
    import jax

    from bloomjax.decode.engine import Request

    engine = model.engine(1, length + 2, prompt_tokens=length)

    def once() -> float:
        engine.submit(Request(ids(length + 1), 1))
        with jax.set_mesh(model.mesh):
            start = time.perf_counter()
            engine._admit()
            engine._take_prompts()
            jax.block_until_ready(engine._state)
            seconds = time.perf_counter() - start
        list(engine.run())
        return 1e3 * seconds

    once()
    return min(once() for _ in range(3))


def steps(
    model: Any, slots: int, behind: int, tokens: int, read: Callable[[], dict[str, float]] = dict
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Milliseconds of a step of all slots, each behind a prompt, in a cache of what they need; and
    of each dispatch, with what `read` gave right before and after."""
    from bloomjax.decode.engine import Request

    engine = model.engine(slots, behind + tokens + 64)
    for seed in range(slots):
        engine.submit(Request(ids(behind, seed), tokens + 2 * engine._per_dispatch))
    dispatches, before = [], read()
    while engine.busy:
        start = time.perf_counter()
        fresh = engine.step()
        milliseconds = 1e3 * (time.perf_counter() - start) / engine._per_dispatch
        after = read()
        if len(fresh) == slots and not any(f.done for f in fresh):
            dispatches.append({"step_ms": milliseconds, "bounds": [before, after]})
        before = after
    dispatches = dispatches[1:]  # the first compiles, or follows a prompt
    step = statistics.median(d["step_ms"] for d in dispatches)
    return {"step_ms": step, "per_dispatch": engine._per_dispatch}, dispatches


def run_ours(source: str, slots: int, options: dict[str, Any]) -> dict[str, Any]:
    import jax

    import bloomjax

    before = bounds()
    start = time.perf_counter()
    model = bloomjax.load(source, **options)
    jax.block_until_ready(model.params)
    found: dict[str, Any] = {"load_s": time.perf_counter() - start}
    found["weight_bytes"] = sum(a.nbytes for a in jax.tree.leaves(model.params))
    found |= {"prefill_ms": prefill(model, PROMPT)} if slots == 1 else {}
    step, dispatches = steps(model, slots, BEHIND, OUR_TOKENS, meter(32_768, 1024))
    found |= step | {"bounds": [before, bounds()]}

    layers, width = model.config.layers, model.config.width
    cached = slots * (BEHIND + OUR_TOKENS // 2) * 2 * layers * width * 4  # float32
    flops = 2 * slots * width * (12 * layers * width + model.config.vocab_size)

    def least(rates: dict[str, float]) -> float:
        """Milliseconds of a step at these rates: of its bytes or of its FLOPs."""
        memory = (found["weight_bytes"] + cached) / rates["memory_GBps"]
        return max(memory, flops / rates["float32_GFLOPs"]) / 1e6

    for d in dispatches:
        d["bound_ms"] = statistics.mean(map(least, d["bounds"]))
    best = {name: max(rates[name] for rates in found["bounds"]) for name in before}
    found["over_bound"] = statistics.median(d["step_ms"] / d["bound_ms"] for d in dispatches)
    found["over_best_bound"] = found["step_ms"] / least(best)
    return found | {"dispatches": dispatches}


def run_transformers(source: str, slots: int, _: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig, BloomForCausalLM, DynamicCache

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = AutoConfig.from_pretrained(source)
    config._attn_implementation = "eager"
    model = BloomForCausalLM.from_pretrained(source, config=config, dtype=torch.float32).eval()
    with torch.no_grad():

        def prefill(length: int) -> tuple[float, Any]:
            cache = DynamicCache(config=config)
            tokens = torch.tensor([ids(length, seed) for seed in range(slots)])
            start = time.perf_counter()
            model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return 1e3 * (time.perf_counter() - start), cache

        found = {"prefill_ms": min(prefill(PROMPT)[0] for _ in range(3))} if slots == 1 else {}
        _, cache = prefill(BEHIND)
        token, steps = torch.zeros(slots, 1, dtype=torch.long), []
        for _ in range(TOKENS):
            start = time.perf_counter()
            logits = model(token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
            steps.append(1e3 * (time.perf_counter() - start))
    return found | {"step_ms": statistics.median(steps[1:])}


def run_llama_cpp(source: str, slots: int, _: dict[str, Any]) -> dict[str, Any]:
    import llama_cpp as api

    threads = len(os.sched_getaffinity(0))
    api.llama_backend_init()
    options = api.llama_model_default_params()
    options.n_gpu_layers = 0
    model = api.llama_model_load_from_file(source.encode(), options)
    settings = api.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = CONTEXT, PROMPT, PROMPT
    settings.n_threads = settings.n_threads_batch = threads
    settings.n_seq_max = slots
    context = api.llama_init_from_model(model, settings)
    memory = api.llama_get_memory(context)

    def decode(rows: list[list[int]], place: int) -> float:
        """Milliseconds of `rows`, of as many sequences, from `place` on."""
        count = sum(map(len, rows))
        batch = api.llama_batch_init(count, 0, 1)
        batch.n_tokens, n = count, 0
        for sequence, row in enumerate(rows):
            for i, token in enumerate(row):
                batch.token[n], batch.pos[n], batch.n_seq_id[n] = token, place + i, 1
                batch.seq_id[n][0], batch.logits[n] = sequence, i == len(row) - 1
                n += 1
        start = time.perf_counter()
        assert api.llama_decode(context, batch) == 0
        for row_index in range(len(rows)):
            found = api.llama_get_logits_ith(context, row_index - len(rows))
            np.ctypeslib.as_array(found, shape=(250_880,)).argmax()
        seconds = time.perf_counter() - start
        api.llama_batch_free(batch)
        return 1e3 * seconds

    found = {}
    if slots == 1:
        times = []
        for _ in range(4):
            api.llama_memory_clear(memory, True)
            times.append(decode([ids(PROMPT)], 0))
        found["prefill_ms"] = min(times[1:])
    api.llama_memory_clear(memory, True)
    decode([ids(BEHIND, seed) for seed in range(slots)], 0)
    steps = [decode([[7]] * slots, BEHIND + i) for i in range(TOKENS)]
    return found | {"step_ms": statistics.median(steps[1:])}


def meter(rows: int, outputs: int) -> Callable[[], dict[str, float]]:
    """Times both products once a call: GB/s of `rows` by a vector, GFLOP/s of 512 rows by 4096 x
    `outputs`."""
    import jax
    import jax.numpy as jnp

    def rate(work: int, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return work / (time.perf_counter() - start) / 1e9

    w, x = np.ones((rows, 4096), np.float32), np.ones(4096, np.float32)
    a, b = jnp.ones((512, 4096)), jnp.ones((4096, outputs))
    product = jax.jit(jnp.matmul)

    def read() -> dict[str, float]:
        memory = rate(w.nbytes, lambda: w @ x)
        flops = rate(2 * 512 * b.size, lambda: product(a, b).block_until_ready())
        return {"memory_GBps": memory, "float32_GFLOPs": flops}

    read()  # compiles
    return read


def bounds() -> dict[str, float]:
    """The best of seven."""
    read = meter(65_536, 4096)
    found = [read() for _ in range(7)]
    return {name: max(rates[name] for rates in found) for name in found[0]}


RUNS = {"ours": run_ours, "transformers": run_transformers, "llama.cpp": run_llama_cpp}


def cpu(size: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_folder(folder / "hf", size)
        for kind in ("f16", "q8_0"):
            command = [sys.executable, "-m", "convert", folder / "hf", folder / kind]
            subprocess.run([*command, "--to=gguf", f"--gguf_type={kind}"], check=True, cwd=ROOT)
        hf = str(folder / "hf")
        peers: dict[str, tuple[str, str, dict[str, Any]]] = {
            "ours, float16 as in the file": ("ours", hf, {}),
            "ours, float32": ("ours", hf, {"dtype": "float32"}),
            "ours, int8": ("ours", hf, {"quantize": "int8"}),
            "ours, int4": ("ours", hf, {"quantize": "int4"}),
            "transformers, float32": ("transformers", hf, {}),
            "llama.cpp, F16": ("llama.cpp", str(folder / "f16"), {}),
            "llama.cpp, Q8_0": ("llama.cpp", str(folder / "q8_0"), {}),
        }
        rounds: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for _ in range(ROUNDS):
            for peer, (kind, source, options) in peers.items():
                for slots in (1,) if "float32" in peer or "int4" in peer else (1, 8):
                    found = _child(kind, source, slots, options)
                    rounds.setdefault(peer, {}).setdefault(f"batch {slots}", []).append(found)
    return {"size": size, "rounds": rounds}


def _child(kind: str, source: str, slots: int, options: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, f"--child={json.dumps([kind, source, slots, options])}"]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(ran.stdout.splitlines()[-1]) | {"load_average": os.getloadavg()[0]}
    print(kind, source, slots, options, found, file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, source, slots, options = json.loads(args.child)
        found = RUNS[kind](source, slots, options)
        print(json.dumps(found | {"peak_GiB": peak_memory()}))
        return
    result = cpu("560m")
    packages = "jax", "jaxlib", "torch", "transformers", "llama-cpp-python"
    keep("decode", {"machine": machine(*packages), **result})


if __name__ == "__main__":
    main()
