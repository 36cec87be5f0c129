"""DeepSpeed itself on folders of ours, and ours on folders of DeepSpeed, in tiny, on CPU.

    pip install . torch==2.13.0
    DS_BUILD_OPS=0 pip install deepspeed==0.19.8
    python tests/oracles/real_deepspeed.py                                  (2 minutes)

1. Its pipeline engine loads what MegatronWriter wrote, without an optimizer, bit for bit.
2. After one step of its BF16 optimizer it saves; MegatronReader finds its weights and moments.
3. Its BF16 optimizer on three data-parallel processes takes three steps; MegatronReader finds the
   weights and moments of torch's AdamW on whole float32 tensors, bit for bit.
4. Its ds_to_universal.py (dialect 0.2) makes of megatron_folder.py's folders what they are made of.

The result is written to benchmarks/results/. Leaves with 1 if anything differs.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import types
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import ml_dtypes
import numpy as np
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.utils.tensor_fragment import fragment_address
from torch import nn

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from facts import keep, machine  # noqa: E402
from helpers import model_config  # noqa: E402
from oracles import megatron_folder  # noqa: E402
from oracles.megatron_folder import groups, megatron_name, stage_names  # noqa: E402
from oracles.megatron_tensors import (  # noqa: E402
    HEADS,
    LAYERS,
    STATES,
    STEP,
    VOCAB_SIZE,
    WIDTH,
    tensors,
)
from oracles.weights import hf_weights  # noqa: E402

from bloomjax.formats.megatron import MegatronReader  # noqa: E402
from bloomjax.formats.megatron_writer import MegatronWriter  # noqa: E402
from bloomjax.formats.tensors import KINDS, Progress, order  # noqa: E402

CONFIG = model_config(layers=LAYERS, width=WIDTH, heads=HEADS, vocab_size=VOCAB_SIZE)
ADAM = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
GRIDS = ((2, 2, 2), (2, 1, 3), (4, 2, 1))  # tp, pp, dp
INFO = {
    "universal_checkpoint_version": 0.2,
    "vocabulary_parameter_patterns": [r"tied_modules.embed.word_embeddings.weight$"],
    "pipeline_replicated_parameter_patterns": [r"tied_modules"],
    "parameter_to_average_patterns": [
        *(r"tied_modules.embed.word_embeddings.norm", r"\d+.weight", r"\d+.bias"),
        *(r"\d+.input_layernorm", r"\d+.post_attention_layernorm"),
        *(r"\d+.self_attention.dense.bias", r"\d+.mlp.dense_4h_to_h.bias"),
    ],
    "parameter_with_row_parallelism_patterns": [
        *(r"\d+.self_attention.dense.weight", r"\d+.mlp.dense_4h_to_h.weight"),
    ],
    "original_vocab_size": VOCAB_SIZE,
    "padded_vocab_size": VOCAB_SIZE,
}


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCAB_SIZE, WIDTH)
        self.word_embeddings.norm = nn.LayerNorm(WIDTH)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(WIDTH)
        self.self_attention, self.mlp = nn.Module(), nn.Module()
        self.self_attention.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.self_attention.dense = nn.Linear(WIDTH, WIDTH)
        self.post_attention_layernorm = nn.LayerNorm(WIDTH)
        self.mlp.dense_h_to_4h = nn.Linear(WIDTH, 4 * WIDTH)
        self.mlp.dense_4h_to_h = nn.Linear(4 * WIDTH, WIDTH)


class Schedule:
    """Takes what Megatron's learning rate schedule takes from a checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key in ("max_lr", "min_lr", "warmup_steps", "decay_steps", "decay_style", "num_steps"):
            state[key]

    def state_dict(self) -> dict[str, Any]:
        return {}


def join(rank: int, size: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")


def wrong(reader: MegatronReader, expected: dict[str, dict[str, np.ndarray]]) -> list[str]:
    """Tensors of the reader that are not `expected`, by state and Megatron's name."""
    return [
        f"{kind} {row.path} {layer}"
        for row, layer in order(reader.config)
        for kind, state in zip(KINDS, STATES, strict=True)
        for whole in [expected[state][megatron_name(row.hf.format(layer), LAYERS)]]
        if reader.read(row, layer, 0, len(whole), kind).tobytes() != whole.tobytes()
    ]


def engine(_: int, folder: pathlib.Path) -> None:
    join(0, 1, 29517)
    weights = hf_weights(LAYERS, WIDTH, VOCAB_SIZE, 0)
    source = {name: array.astype(ml_dtypes.bfloat16) for name, array in weights.items()}
    kind, run = np.dtype(ml_dtypes.bfloat16), {"origin": {}, "step": 5, "samples": 80}
    writer = MegatronWriter(folder / "ours", CONFIG, kind, tp=1, pp=1, **run)
    for row, layer in order(CONFIG):
        for start, stop in writer.parts(row):
            writer.write(row, layer, start, source[row.hf.format(layer)][start:stop])
    writer.finish("")

    def function(x: Any, *_: Any) -> Any:
        return x

    specs = [function, TiedLayerSpec("embed", Embedding), function]
    specs += [LayerSpec(Block) for _ in range(LAYERS)]
    specs += [function, LayerSpec(nn.LayerNorm, WIDTH)]
    specs += [TiedLayerSpec("embed", Embedding, forward_fn=lambda embedding, x: x)]
    module = PipelineModule(
        specs,
        topology=PipeModelDataParallelTopology(1, 1, 1),
        loss_fn=function,
        partition_method="uniform",
    )
    params = dict(module.named_parameters())
    split = groups(list(params))
    optimizer = torch.optim.AdamW([{"params": [params[x] for x in g]} for g in split], **ADAM)
    it, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        lr_scheduler=Schedule(),
        config={"train_batch_size": 1, "bf16": {"enabled": True}},
    )
    _, client = it.load_checkpoint(str(folder / "ours"), load_optimizer_states=False)
    result = [] if client["iteration"] == it.global_steps == 5 else ["step"]
    for name, array in source.items():
        found = params[megatron_name(name, LAYERS)].detach().view(torch.int16).numpy()
        if found.tobytes() != array.tobytes():
            result.append(f"loaded {name}")
    for param in params.values():
        param.grad = torch.randn_like(param)
    it.optimizer.backward_epilogue(clear_lp_grads=True)
    it.optimizer.step()
    args = argparse.Namespace(num_attention_heads=HEADS, consumed_train_samples=96)
    it.save_checkpoint(str(folder / "theirs"), client_state={"args": args, "iteration": 6})
    expected = {state: {} for state in STATES}
    for name, param in params.items():
        expected["fp32"][name] = param._hp_mapping.get_hp_fragment().detach().numpy()
        for state in STATES[1:]:
            expected[state][name] = param._hp_mapping.get_hp_fragment(state).detach().numpy()
    expected = {
        state: {name: x.reshape(params[name].shape) for name, x in arrays.items()}
        for state, arrays in expected.items()
    }
    reader = MegatronReader(folder / "theirs")
    result += [] if reader.progress == Progress(6, 96) else ["progress"]
    torch.save(result + wrong(reader, expected), folder / "engine.pt")


def steps(rank: int, size: int, folder: pathlib.Path) -> None:
    """Three steps of the BF16 optimizer on `size` processes, and of AdamW on each."""
    join(rank, size, 29518)
    names = list(stage_names(0, 1, LAYERS))
    initial = {
        megatron_name(name, LAYERS): torch.from_numpy(array).bfloat16()
        for name, array in tensors(LAYERS, WIDTH, VOCAB_SIZE)["fp32"].items()
    }
    params = {name: nn.Parameter(initial[name].clone()) for name in names}
    whole = {name: nn.Parameter(initial[name].float()) for name in names}

    def adam(of: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        decay = (0.1, 0.1, 0.0)
        return torch.optim.AdamW(
            [{"params": [of[x] for x in g], "weight_decay": w}
             for g, w in zip(groups(names), decay, strict=True)], **ADAM,
        )  # fmt: skip

    theirs = BF16_Optimizer(
        adam(params),
        param_names={param: name for name, param in params.items()},
        bfloat16_config=types.SimpleNamespace(enabled=True, immediate_grad_update=False),
        dp_process_group=torch.distributed.group.WORLD,
        grad_acc_dtype=torch.float32,
    )
    plain, random = adam(whole), torch.Generator().manual_seed(0)
    for _ in range(3):
        for name in names:
            gradient = torch.randn(initial[name].shape, generator=random).bfloat16()
            params[name].grad, whole[name].grad = gradient, gradient.float()
        theirs.backward_epilogue(clear_lp_grads=True)
        theirs.step()
        plain.step()
    saved = {"optimizer_state_dict": theirs.state_dict(), "ds_version": deepspeed.__version__}
    torch.save(saved, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    if rank:
        return
    files: dict[int, dict[str, torch.Tensor]] = {}
    for name in names:
        number, key = name.removeprefix("tied_modules.").split(".", 1)
        file = files.setdefault(1 if number == "embed" else int(number), {})
        file[key] = params[name].detach().clone()
    for number, file in files.items():
        torch.save(file, folder / f"layer_{number:02d}-model_00-model_states.pt")
    args = argparse.Namespace(num_attention_heads=HEADS, consumed_train_samples=9)
    torch.save({"args": args, "iteration": 3}, folder / "mp_rank_00_model_states.pt")
    expected = {"fp32": whole} | {
        state: {name: plain.state[whole[name]][state] for name in names} for state in STATES[1:]
    }
    expected = {
        state: {name: x.detach().numpy() for name, x in arrays.items()}
        for state, arrays in expected.items()
    }
    np.save(folder / "expected.npy", expected, allow_pickle=True)


def universal(folder: pathlib.Path, tp: int, pp: int, dp: int) -> list[str]:
    sys.modules["deepspeed.runtime.bf16_optimizer"].fragment_address = fragment_address
    megatron_folder.Address = fragment_address
    megatron_folder.save_folder(folder, LAYERS, WIDTH, HEADS, VOCAB_SIZE, tp, pp, dp)
    step = folder / f"global_step{STEP}"
    for path in step.glob("mp_rank_*"):
        state = torch.load(path, weights_only=False)
        torch.save(state | {"universal_checkpoint_info": INFO}, path)
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(step),
            output_folder=f"{step}_universal",
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
    )
    expected = {
        state: {megatron_name(name, LAYERS): x for name, x in arrays.items()}
        for state, arrays in tensors(LAYERS, WIDTH, VOCAB_SIZE).items()
    }
    return [
        f"{name} {x}"
        for name in (step.name, f"{step.name}_universal")
        for x in wrong(MegatronReader(folder / name), expected)
    ]


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for grid in GRIDS:
            found[f"universal {grid}"] = universal(folder / "-".join(map(str, grid)), *grid)
        (folder / "steps").mkdir()
        torch.multiprocessing.spawn(steps, (3, folder / "steps"), nprocs=3)
        expected = np.load(folder / "steps" / "expected.npy", allow_pickle=True).item()
        found["three steps on three processes"] = wrong(MegatronReader(folder / "steps"), expected)
        torch.multiprocessing.spawn(engine, (folder,), nprocs=1)
        found["engine loads, steps, saves"] = torch.load(folder / "engine.pt")
    result = {
        "what": "folders of MegatronWriter in DeepSpeed, and of DeepSpeed in MegatronReader",
        "bits_that_differ": found,
        "machine": machine("deepspeed", "torch", "numpy", "jax"),
    }
    keep("real-deepspeed", result)
    sys.exit(1 if any(found.values()) else 0)


if __name__ == "__main__":
    main()
