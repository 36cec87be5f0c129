"""torch, and BigScience's way to Hugging Face's weights, on folders that MegatronWriter wrote; and
MegatronReader on folders of many degrees that torch wrote.

    pip install . torch==2.13.0
    python tests/oracles/megatron_roundtrip.py                              (1 minute)

Every file must load with `torch.load(weights_only=True)`, mapped too, under Megatron's names and in
the shapes of its ranks; the converter's algorithm (megatron_folder.convert) must give the source's
bits. The result is written to benchmarks/results/. Leaves with 1 if anything differs.
"""

import pathlib
import sys
import tempfile

import ml_dtypes
import numpy as np
import torch

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from facts import keep, machine  # noqa: E402
from helpers import model_config  # noqa: E402
from oracles.megatron_folder import convert, megatron_name, save_folder, save_universal  # noqa: E402
from oracles.megatron_tensors import SAMPLES, STATES, STEP, tensors  # noqa: E402
from oracles.weights import hf_weights  # noqa: E402

from bloomjax.formats.megatron import MegatronReader  # noqa: E402
from bloomjax.formats.megatron_writer import MegatronWriter  # noqa: E402
from bloomjax.formats.tensors import KINDS, Progress, order  # noqa: E402

NAMES = ("layers", "width", "heads", "vocabulary")
SHAPES = ((3, 20, 4, 24), (2, 36, 12, 40), (4, 64, 8, 100))
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
WRITTEN = [(tp, pp) for tp in (1, 2, 4) for pp in (1, 2)]
READ = [(1, 1, 1), (1, 2, 3), (2, 1, 2), (4, 2, 1), (2, 3, 4), (4, 1, 5)]  # tp, pp, dp


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def written(shape: tuple[int, ...], dtype: str, tp: int, pp: int) -> list[str]:
    """What is wrong with a folder of ours."""
    layers, width, heads, vocab = shape
    config = model_config(layers=layers, width=width, heads=heads, vocab_size=vocab)
    source = {k: a.astype(DTYPES[dtype]) for k, a in hf_weights(layers, width, vocab, 0).items()}
    wrong = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "out"
        writer = MegatronWriter(
            folder, config, np.dtype(DTYPES[dtype]), tp=tp, pp=pp, origin={}, step=5, samples=80
        )
        for row, layer in order(config):
            for start, stop in writer.parts(row):
                writer.write(row, layer, start, source[row.hf.format(layer)][start:stop])
        writer.finish("")
        step = folder / (folder / "latest").read_text()
        files = {path.name: torch.load(path, weights_only=True) for path in step.iterdir()}
        for path in step.iterdir():
            mapped = torch.load(path, weights_only=True, mmap=True)
            if path.name.startswith("layer_") and any(
                bits(mapped[k]) != bits(v) for k, v in files[path.name].items()
            ):
                wrong.append(f"{path.name} mapped")
        expected = {}
        for name, array in source.items():
            number, key = megatron_name(name, layers).removeprefix("tied_modules.").split(".", 1)
            number = "1" if number == "embed" else number
            size = list(array.shape)
            if any(x in key for x in ("word_embeddings.weight", "query_key_value", "h_to_4h")):
                size[0] //= tp
            elif key in ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight"):
                size[1] //= tp
            for rank in range(tp):
                file = f"layer_{int(number):02d}-model_{rank:02d}-model_states.pt"
                expected.setdefault(file, {})[key] = (size, getattr(torch, dtype))
        found = {
            file: {key: (list(x.shape), x.dtype) for key, x in tree.items()}
            for file, tree in files.items()
            if file.startswith("layer_")
        }
        if found != expected:
            wrong.append("names, shapes or dtypes")
        ranks = {f"mp_rank_{rank:02d}_model_states.pt" for rank in range(tp * pp)}
        if set(files) - set(expected) != ranks:
            wrong.append("files")
        for rank in ranks & set(files):
            info = files[rank]["checkpoint_info"]
            if files[rank]["iteration"] != 5 or info["padded_vocab_size"] != vocab:
                wrong.append(rank)
        converted = convert(step)
        if set(converted) != set(source):
            wrong.append("converted names")
        for name, array in source.items():
            if bits(converted[name]) != array.tobytes():
                wrong.append(f"converted {name}")
    return [f"{shape} {dtype} tp {tp} pp {pp}: {x}" for x in wrong]


def read(shape: tuple[int, ...], tp: int, pp: int, dp: int) -> list[str]:
    """What is wrong with what we read of a folder that torch wrote."""
    layers, width, heads, vocab = shape
    expected, wrong = tensors(layers, width, vocab), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        save_folder(folder, layers, width, heads, vocab, tp, pp, dp)
        save_universal(folder / f"global_step{STEP}", tp, pp, dp)
        for name in (f"global_step{STEP}", f"global_step{STEP}_universal"):
            reader = MegatronReader(folder / name)
            if reader.progress != Progress(STEP, SAMPLES):
                wrong.append("progress")
            for row, layer in order(reader.config):
                for kind, state in zip(KINDS, STATES, strict=True):
                    whole = expected[state][row.hf.format(layer)]
                    if reader.read(row, layer, 0, len(whole), kind).tobytes() != whole.tobytes():
                        wrong.append(f"{kind} {row.path} {layer}")
        step = folder / f"global_step{STEP}"
        for path in step.glob("bf16_zero_*"):  # and what the layer files have
            path.unlink()
        reader, converted = MegatronReader(step), convert(step)
        for row, layer in order(reader.config):
            rows = reader.read(row, layer, 0, row.shape(reader.config.sizes)[0])
            if rows.tobytes() != bits(converted[row.hf.format(layer)]):
                wrong.append(f"layer files {row.path} {layer}")
    return [f"{shape} tp {tp} pp {pp} dp {dp}: {x}" for x in wrong]


def main() -> None:
    wrong = []
    for shape in SHAPES:
        for dtype in DTYPES:
            for tp, pp in WRITTEN:
                wrong += written(shape, dtype, tp, pp)
        for degrees in READ:
            if degrees[1] <= shape[0]:
                wrong += read(shape, *degrees)
    result = {
        "what": "folders of MegatronWriter in torch and through the hub's converter's algorithm; "
        "folders of torch, with partitions of the BF16 optimizer and universal, in MegatronReader",
        "shapes": [dict(zip(NAMES, x, strict=True)) for x in SHAPES],
        "dtypes": list(DTYPES),
        "written_tp_pp": WRITTEN,
        "read_tp_pp_dp": READ,
        "bits_that_differ": wrong,
        "machine": machine("torch", "numpy", "ml_dtypes", "jax"),
    }
    keep("megatron-roundtrip", result)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
