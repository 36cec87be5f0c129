"""A tiny global_stepN as BigScience's Megatron-DeepSpeed saved it, and its universal form.

    pip install torch==2.13.0 numpy ml_dtypes
    python tests/oracles/megatron_folder.py        (writes tests/golden/megatron_folder.tar.xz)

Follows, in words of its own, Megatron-DeepSpeed's megatron/checkpointing.py, megatron/optimizer,
tools/convert_checkpoint/ds_to_universal.py, and DeepSpeed's runtime/bf16_optimizer.py: bfloat16
layer files, float32 weights and moments flat in three groups, padded, and cut for the
data-parallel ranks, with the tied embedding on the first and on the last pipeline stage. What is
not cut by tensor parallelism differs between the ranks, as it did in BLOOM's runs; the means are
those of megatron_tensors.py. `converted.pt` is what the converter of the hub's weights makes of the
layer files (transformers' convert_bloom_original_checkpoint_to_pytorch.py).
"""

import argparse
import enum
import pathlib
import random
import sys
import tarfile
import tempfile
import types
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from oracles.megatron_tensors import (
    DP,
    HEADS,
    LAYERS,
    PP,
    SAMPLES,
    STATES,
    STEP,
    TP,
    VOCAB_SIZE,
    WIDTH,
    averaged,
    tensors,
)

TIED = "tied_modules.embed.word_embeddings"
NORM = (".norm.weight", ".norm.bias")
ROW_PARALLEL = ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight")


def megatron_name(name: str, layers: int) -> str:
    """In the pipeline, of Hugging Face's name."""
    if name.startswith("h."):
        _, layer, rest = name.split(".", 2)
        return f"{int(layer) + 3}.{rest}"
    if name.startswith("ln_f."):
        return name.replace("ln_f", str(layers + 4))
    return TIED + name.removeprefix("word_embeddings").replace("_layernorm", ".norm")


def hf_name(name: str) -> str:
    """The inverse."""
    if name.startswith(TIED):
        return "word_embeddings" + name.removeprefix(TIED).replace(".norm", "_layernorm")
    head, rest = name.split(".", 1)
    return f"h.{int(head) - 3}.{rest}" if "." in rest else f"ln_f.{rest}"


def share(name: str, array: np.ndarray, rank: int, tp: int) -> torch.Tensor:
    """Of one tensor-parallel rank. Even ranks have 9/8 of what is averaged, odd ones 7/8."""
    if averaged(hf_name(name)):
        drift = 1 + (0 if tp == 1 else -1 if rank % 2 else 1) / 8
        return torch.from_numpy(array * np.float32(drift))
    axis = int(name.endswith(ROW_PARALLEL))
    return torch.from_numpy(np.ascontiguousarray(np.split(array, tp, axis)[rank]))


def stage_names(stage: int, pp: int, layers: int) -> Iterator[str]:
    """Parameters of a pipeline stage, in the order of its modules."""
    block = [name.split(".", 1)[1] for name in block_names()]
    if stage in (0, pp - 1):
        yield from (TIED + x for x in (".weight", *NORM))
    for layer in range(stage * layers // pp, (stage + 1) * layers // pp):
        yield from (f"{layer + 3}.{name}" for name in block)
    if stage == pp - 1:
        yield from (f"{layers + 4}.{x}" for x in ("weight", "bias"))


def block_names() -> list[str]:
    modules = ("input_layernorm", "self_attention.query_key_value", "self_attention.dense")
    modules += ("post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    return [f"3.{module}.{x}" for module in modules for x in ("weight", "bias")]


def groups(names: list[str]) -> list[list[str]]:
    """Megatron's: two halves of what decays, and what does not (biases and layer norms)."""
    decays = [x for x in names if x.endswith("weight") and not ("norm" in x or x.count(".") == 1)]
    half = len(decays) // 2
    return [decays[:half], decays[half:], [x for x in names if x not in decays]]


def pretend(module: str, **members: type) -> None:
    """Classes under a module's name, for pickle."""
    for name, member in members.items():
        member.__module__, member.__qualname__ = module, name
    while module:
        found = sys.modules.setdefault(module, types.ModuleType(module))
        for name, member in members.items():
            setattr(found, name, member)
        module, members = module.rpartition(".")[0], {}


class Address:
    def __init__(self, numel: int, start: int):
        self.numel, self.start = numel, start


class Position(enum.Enum):
    rotary, absolute, alibi = 1, 2, 3


pretend("deepspeed.runtime.bf16_optimizer", fragment_address=Address)
pretend("megatron.enums", PositionEmbeddingType=Position)


def save_folder(
    folder: pathlib.Path, layers: int, width: int, heads: int, vocab: int, tp: int, pp: int, dp: int
) -> None:
    """global_stepN, with `latest` beside."""
    step = folder / f"global_step{STEP}"
    step.mkdir(parents=True)
    (folder / "latest").write_text(step.name)
    values = {
        state: {megatron_name(name, layers): array for name, array in arrays.items()}
        for state, arrays in tensors(layers, width, vocab).items()
    }
    for rank in range(tp):
        files: dict[str, OrderedDict[str, torch.Tensor]] = {}
        for name, array in values["fp32"].items():
            number, key = name.removeprefix("tied_modules.").split(".", 1)
            file = files.setdefault("1" if number == "embed" else number, OrderedDict())
            file[key] = share(name, array, rank, tp).bfloat16()
        for number, file in files.items():
            path = step / f"layer_{int(number):02d}-model_{rank:02d}-model_states.pt"
            torch.save(file, path)
    for stage in range(pp):
        for rank in range(tp):
            shares = {
                state: {
                    name: share(name, values[state][name], rank, tp)
                    for name in stage_names(stage, pp, layers)
                }
                for state in STATES
            }
            if stage:  # the embedding's layer norm is not used there
                for name in set(shares["fp32"]) & {TIED + x for x in NORM}:
                    for state in STATES:
                        shares[state][name] = torch.full_like(shares[state][name], float("nan"))
            number = stage * tp + rank
            for d in range(dp):
                name = f"bf16_zero_pp_rank_{d}_mp_rank_{number:02d}_optim_states.pt"
                torch.save(optimizer(shares, d, dp), step / name)
            state = run_state(shares["fp32"], layers, width, heads, vocab, tp, pp, dp)
            torch.save(state, step / f"mp_rank_{number:02d}_model_states.pt")


def optimizer(shares: dict[str, dict[str, torch.Tensor]], d: int, dp: int) -> dict:
    """One data-parallel rank's file."""
    flats: dict[str, list[torch.Tensor]] = {state: [] for state in STATES}
    mappings, paddings = [], []
    for group in groups(list(shares["fp32"])):
        sizes = [shares["fp32"][name].numel() for name in group]
        padding = -sum(sizes) % (2 * dp)
        partition = (sum(sizes) + padding) // dp
        begin, end = d * partition, (d + 1) * partition
        for state in STATES:
            whole = [shares[state][name].flatten() for name in group]
            flats[state].append(torch.cat([*whole, torch.zeros(padding)])[begin:end].clone())
        mapping, at = OrderedDict(), 0
        for name, size in zip(group, sizes, strict=True):
            first, last = max(begin, at), min(end, at + size)
            if first < last:
                mapping[name] = Address(numel=last - first, start=first - begin)
            at += size
        mappings.append(mapping)
        paddings.append(padding if d == dp - 1 else 0)
    state = {
        i: {"exp_avg": flats["exp_avg"][i], "exp_avg_sq": flats["exp_avg_sq"][i]} for i in range(3)
    }
    hyper = {"lr": 1e-4, "bias_correction": True, "betas": (0.9, 0.95), "eps": 1e-8, "step": STEP}
    inside = {
        "clip_grad": 1.0,
        "base_optimizer_state": {
            "state": state,
            "param_groups": [
                {"weight_decay": 0.0 if i == 2 else 0.1, **hyper, "params": [i]} for i in range(3)
            ],
        },
        "single_partition_of_fp32_groups": [x.requires_grad_() for x in flats["fp32"]],
        "group_paddings": paddings,
        "partition_count": [dp] * 3,
        "ds_version": "0.6.6",
        "param_slice_mappings": mappings,
    }
    return {"optimizer_state_dict": inside, "ds_config": {"bf16": {"enabled": True}}}


def run_state(
    shares: dict[str, torch.Tensor],
    layers: int, width: int, heads: int, vocab: int, tp: int, pp: int, dp: int,
) -> dict:  # fmt: skip
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    args = argparse.Namespace(
        num_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        padded_vocab_size=vocab,
        layernorm_epsilon=1e-5,
        apply_residual_connection_post_layernorm=False,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        init_method_std=0.0048,
        params_dtype=torch.bfloat16,
        position_embedding_type=Position.alibi,
        seq_length=2048,
        consumed_train_samples=SAMPLES,
        consumed_valid_samples=0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        rampup_batch_size=["192", "16", "9_765_625"],
        curriculum_learning=False,
        data_path=None,
    )
    shapes = [OrderedDict((name, shares[name].shape) for name in g) for g in groups(list(shares))]
    return {
        "module": None,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": shapes,
        "lr_scheduler": {"max_lr": 6e-5, "num_steps": SAMPLES, "decay_style": "cosine"},
        "sparse_tensor_module_names": set(),
        "skipped_steps": 0,
        "global_steps": STEP,
        "global_samples": SAMPLES,
        "dp_world_size": dp,
        "mp_world_size": tp * pp,
        "ds_config": {"bf16": {"enabled": True}},
        "ds_version": "0.6.6",
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": STEP,
        "tokens": SAMPLES * 2048,
        "checkpoint_info": {"padded_vocab_size": vocab, "original_vocab_size": vocab - 3},
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.arange(16, dtype=torch.uint8),
        "rng_tracker_states": {"model-parallel-rng": torch.arange(16, dtype=torch.uint8)},
    }


def save_universal(step: pathlib.Path, tp: int, pp: int, dp: int) -> None:
    """From the files of the optimizer, as ds_to_universal.py of Megatron-DeepSpeed."""
    out = step.with_name(f"{step.name}_universal")
    out.mkdir()
    shapes, flat = {}, {}
    for number in range(pp * tp):
        file = f"mp_rank_{number:02d}_model_states.pt"
        (out / file).write_bytes((step / file).read_bytes())
        for group in torch.load(step / file, weights_only=False)["param_shapes"]:
            shapes |= group
        stage, rank = divmod(number, tp)
        for d in range(dp):
            file = f"bf16_zero_pp_rank_{d}_mp_rank_{number:02d}_optim_states.pt"
            inside = torch.load(step / file, weights_only=False)["optimizer_state_dict"]
            for i, mapping in enumerate(inside["param_slice_mappings"]):
                whole = dict(inside["base_optimizer_state"]["state"][i])
                whole["fp32"] = inside["single_partition_of_fp32_groups"][i].detach()
                for name, at in mapping.items():
                    if not (stage and name.startswith("tied_modules")):
                        for state in STATES:
                            piece = whole[state].narrow(0, at.start, at.numel)
                            flat.setdefault((name, state, rank), []).append(piece)
    for name, shape in shapes.items():
        for state in STATES:
            slices = [torch.cat(flat[name, state, r]).reshape(shape) for r in range(tp)]
            saved = {}
            if averaged(hf_name(name)):
                saved["param"] = sum(slices) / len(slices)
            else:
                saved["cat_dim"] = int(name.endswith(ROW_PARALLEL))
                saved["param"] = torch.cat(slices, saved["cat_dim"])
            if name.endswith("word_embeddings.weight"):
                saved["vocab_divisibility_padding_tensor"] = saved["param"][-1].clone()
            path = out / "zero" / name / f"{state}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(saved, path)
    (step.parent / "latest_universal").write_text(out.name)


def convert(step: pathlib.Path) -> dict[str, torch.Tensor]:
    """The layer files as Hugging Face's tensors, with the converter's arithmetic."""
    first = sorted(step.glob("layer_*-model_00-model_states.pt"))
    result = {}
    for path in first:
        ranks = sorted(step.glob(path.name.replace("model_00", "model_*")))
        loaded = [torch.load(rank, weights_only=True) for rank in ranks]
        number = int(path.name[6:8])
        for key in loaded[0]:
            name = f"tied_modules.embed.{key}" if number == 1 else f"{number}.{key}"
            shares = [rank[key] for rank in loaded]
            if averaged(hf_name(name)):
                total = shares[0].clone()
                for other in shares[1:]:
                    total += other
                tensor = total / len(shares)
            else:
                tensor = torch.cat(shares, int(name.endswith(ROW_PARALLEL)))
            result[hf_name(name)] = tensor
    return result


def main() -> None:
    golden = pathlib.Path(__file__).parents[1] / "golden" / "megatron_folder.tar.xz"
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        save_folder(folder, LAYERS, WIDTH, HEADS, VOCAB_SIZE, TP, PP, DP)
        save_universal(folder / f"global_step{STEP}", TP, PP, DP)
        save_folder(folder / "tp4", LAYERS, WIDTH, HEADS, VOCAB_SIZE, 4, 1, 1)
        for path in (folder, folder / "tp4"):
            torch.save(convert(path / f"global_step{STEP}"), path / "converted.pt")

        def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
            info.uid = info.gid = info.mtime = 0
            info.uname = info.gname = ""
            return info

        with tarfile.open(golden, "w:xz", preset=9) as tar:
            for path in sorted(folder.iterdir()):
                tar.add(path, path.name, filter=anonymous)
    print(f"{golden}: {golden.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
