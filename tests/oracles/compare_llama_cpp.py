"""llama.cpp and ours on the same GGUF files, whoever made them: logits, tokens, weights.

    pip install '.[gguf]' llama-cpp-python==0.3.36
    python -m bloomjax.train --config=configs/quickstart.py --workdir=DIR
    python tests/oracles/compare_llama_cpp.py DIR            (2 minutes)

The trained quickstart is written as GGUF by our writer, by llama.cpp's quantiser from our F32, and
by the `gguf` package's writer as llama.cpp's conversion/bloom.py uses it. Each file is then run by
llama.cpp, and by us in float32 on the weights that our reader makes of it, teacher-forced over four
stretches of 256 held-out tokens. What differs is llama.cpp's arithmetic: it rounds activations to
the kind of the weights that they meet (float16, bfloat16, or blocks of 8 bits). `LIMITS` are the
bounds on the mean KL divergence, in nats, ten times what was measured; and the most likely token is
the same wherever our top two differ by more than ten times the median difference of logits. The KV
cache is float32; llama.cpp's default of float16 is measured beside it. Where our writer and the
quantiser make the same kinds, all tensors are the same bit by bit.

A file that holds the embedding twice, in two kinds, is the exception: llama.cpp takes one copy for
its input and the other for its head, our tied model the finer one for both. Here the weights
differ, so the bound is wider, and both are compared with the model before it was quantised.

A model of random weights and width 256, whose every matrix takes K-quants, is the second: what our
reader makes of llama.cpp's blocks against what llama.cpp itself makes of them, and logits of the
whole again. Its embedding has more rows than the tokenizer has tokens, as BLOOM's.

The result is written to benchmarks/results/. Leaves with 1 if anything is not as stated.
"""

import ctypes
import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import llama_cpp
import numpy as np
from weights import hf_weights

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import bloomjax  # noqa: E402
from bloomjax.config import ModelConfig  # noqa: E402
from bloomjax.data.indexed import Indexed  # noqa: E402
from bloomjax.data.prepare import open_prepared  # noqa: E402
from bloomjax.data.tokenizer import load_tokenizer  # noqa: E402
from bloomjax.formats.gguf import HEAD, GGUFReader  # noqa: E402
from bloomjax.formats.gguf_file import GGUFFile  # noqa: E402
from bloomjax.formats.gguf_writer import FILE_TYPES, GGUFWriter  # noqa: E402
from bloomjax.formats.names import ROWS  # noqa: E402
from bloomjax.formats.tensors import order  # noqa: E402
from bloomjax.model import bind  # noqa: E402

STRETCHES, TOKENS = 4, 256
LIMITS = {"F32": 1e-6, "F16": 1e-6, "BF16": 1e-4}
QUANTISED, TWO_COPIES = 1e-3, 1e-2
# llama.cpp's quantiser: names and numbers of include/llama.h, llama_ftype.
QUANTISER = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11}
QUANTISER |= {"Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17}
QUANTISER |= {"Q6_K": 18, "F16": 1, "BF16": 32}
TEXTS = [
    "def f(x, y=None):\n    return x|y  # a  b\n\n\nclass A(B): pass\n",
    "Hello  world, größe! ¿qué? 漢字、かな。 नमस्ते। مرحبا، كيف؟ … …a .b",
    "</s><s>text<pad> <unk>x\t\t\r\n 1234 don't e\u0301\u200b🤗",
    "",
    " ",
    "\n \n  a",
]

Weights = Mapping[str, np.ndarray]  # by Hugging Face's names


def write(path: pathlib.Path, config: ModelConfig, kind: str, hf: Weights, **files: bytes) -> None:
    writer = GGUFWriter(
        path,
        config,
        kind,
        tokenizer=files,
        context_length=TOKENS,
        name="oracle",
        origin={},
    )
    for row, layer in order(config):
        for start, stop in writer.parts(row):
            rows = hf[row.hf.format(layer)][start:stop]
            writer.write(row, layer, start, rows)
    writer.finish("0" * 64)


def write_elsewhere(path: pathlib.Path, source: pathlib.Path, hf: Weights, heads: int) -> None:
    """float16 with the package, as llama.cpp's conversion/bloom.py and base.py do it: the embedding
    twice, a context length that is wrong. The vocabulary is taken from the file `source`."""
    import gguf

    width = hf["ln_f.weight"].size
    writer = gguf.GGUFWriter(path, "bloom")
    writer.add_context_length(width)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(4 * width)
    writer.add_block_count(sum(name.endswith("input_layernorm.weight") for name in hf))
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    vocabulary = GGUFFile(source)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("bloom")
    writer.add_token_list(vocabulary.strings("tokenizer.ggml.tokens") or [])
    types = vocabulary.numbers("tokenizer.ggml.token_type")
    assert types is not None
    writer.add_token_types(types.tolist())
    writer.add_token_merges(vocabulary.strings("tokenizer.ggml.merges") or [])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BLOOM, 1000)
    for name, array in [*hf.items(), ("lm_head.weight", hf["word_embeddings.weight"])]:
        if "query_key_value" in name:
            triple = array.reshape(heads, 3, width // heads, *array.shape[1:])
            parts = [triple[:, i].reshape(width, *array.shape[1:]) for i in range(3)]
            array = np.concatenate(parts)
        mapped = names.get_name(name, (".weight", ".bias"))
        assert mapped, name
        writer.add_tensor(mapped, array.astype(np.float16) if array.ndim > 1 else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(source: pathlib.Path, path: pathlib.Path, ftype: int) -> None:
    """With llama.cpp; ftype 0 is back to float32."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = ftype, True, 2
    done = llama_cpp.llama_model_quantize(
        str(source).encode(), str(path).encode(), ctypes.byref(params)
    )
    assert done == 0, path


def read(reader: GGUFReader) -> dict[str, np.ndarray]:
    """float32, by Hugging Face's names."""
    found = {}
    for row, layer in order(reader.config):
        rows = reader.read(row, layer, 0, row.shape(reader.config.sizes)[0])
        found[row.hf.format(layer)] = rows.astype(np.float32)
    return found


def ours(path: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    from helpers import from_hf, on_mesh, one_device

    reader = GGUFReader(path)
    config = dataclasses.replace(reader.config, dtype="float32")
    with jax.set_mesh(one_device()):
        params = from_hf(read(reader), config)
        run = jax.jit(lambda params, ids: (m := bind(config, params)).logits(m(ids)))
        return np.asarray(run(params, on_mesh("BT", tokens)))


def theirs(path: pathlib.Path, tokens: np.ndarray, cache: int = 0) -> np.ndarray:
    """`cache` is the kind of keys and values, by ggml's numbers."""
    model = llama_cpp.Llama(
        str(path), n_ctx=TOKENS, n_batch=TOKENS, logits_all=True, verbose=False, type_k=cache,
        type_v=cache,
    )  # fmt: skip
    out = []
    for row in tokens:
        model.reset()
        model.eval(row.tolist())
        out.append(np.array(model.scores[: len(row)]))
    model.close()
    return np.stack(out)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    below = logits - logits.max(-1, keepdims=True)
    return below - np.log(np.exp(below).sum(-1, keepdims=True))


def compared(ours: np.ndarray, theirs: np.ndarray, limit: float) -> dict[str, Any]:
    """Of logits [.., V] over the same positions."""
    a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (ours, theirs))
    logp, logq = log_softmax(a), log_softmax(b)
    kl = (np.exp(logp) * (logp - logq)).sum(-1)
    difference = np.abs(a - b)
    second, first = np.partition(a, -2, -1)[:, -2:].T
    clear = first - second > 10 * np.median(difference)
    same = a.argmax(-1) == b.argmax(-1)
    result = {
        "mean_kl": float(kl.mean()),
        "limit": limit,
        "largest_kl": float(kl.max()),
        "median_difference": float(np.median(difference)),
        "largest_difference": float(difference.max()),
        "clear_positions": int(clear.sum()),
        "clear_but_another_token": int((clear & ~same).sum()),
        "same_most_likely_token": float(same.mean()),
    }
    result["ok"] = result["mean_kl"] <= limit and not result["clear_but_another_token"]
    return result


def kinds(path: pathlib.Path) -> str:
    """Of the matrices of a file."""
    found = [t.kind.name for t in GGUFFile(path).tensors.values() if len(t.shape) > 1]
    return " ".join(f"{kind}:{found.count(kind)}" for kind in sorted(set(found)))


def contents(path: pathlib.Path) -> dict[str, tuple[Any, bytes]]:
    """Kind, shape and bytes of each tensor."""
    data = path.read_bytes()
    tensors = GGUFFile(path).tensors
    return {k: (t[:2], data[t.offset : t.offset + t.nbytes]) for k, t in tensors.items()}


def trained(folder: pathlib.Path, workdir: str) -> Iterator[tuple[str, dict[str, Any]]]:
    from helpers import widened_hf

    model = bloomjax.load(workdir)
    config, hf = model.config, widened_hf(model.params, model.config)
    heldout = open_prepared(pathlib.Path(workdir) / "data").heldout
    assert heldout
    tokens = Indexed(heldout.prefix).read(0, STRETCHES * TOKENS).reshape(STRETCHES, TOKENS)
    tokens = tokens.astype(np.int32)
    files = {"tokenizer.json": (pathlib.Path(workdir) / "tokenizer.json").read_bytes()}

    made = []
    for kind in FILE_TYPES:
        made.append((f"ours, {kind}", folder / f"ours-{kind}.gguf", kind.upper()))
        write(made[-1][1], config, kind, hf, **files)
    source = made[0][1]
    for kind, number in QUANTISER.items():
        made.append((f"llama.cpp's quantiser, {kind}", folder / f"quantiser-{kind}.gguf", kind))
        quantise(source, made[-1][1], number)
    made.append(("conversion with the gguf package, F16", folder / "elsewhere.gguf", "F16"))
    write_elsewhere(made[-1][1], source, hf, config.heads)
    for name, path, kind in made:
        mine = ours(path, tokens)
        result = compared(mine, theirs(path, tokens), LIMITS.get(kind, QUANTISED))
        result["float16_cache_mean_kl"] = compared(mine, theirs(path, tokens, 1), 1)["mean_kl"]
        yield name, result | {"matrices": kinds(path)}

    original = ours(source, tokens)
    for kind in ("Q4_0", "Q3_K_M", "Q4_K_M"):
        both = folder / f"both-{kind}.gguf"
        quantise(made[-1][1], both, QUANTISER[kind])
        copies = [GGUFFile(both).tensors[name].kind.name for name in (ROWS["embed"].gguf, HEAD)]
        mine, llamas = ours(both, tokens), theirs(both, tokens)
        result = compared(mine, llamas, TWO_COPIES)
        result["ok"] = result["mean_kl"] <= TWO_COPIES
        result["mean_kl_of_ours_from_the_original"] = compared(original, mine, 1)["mean_kl"]
        result["mean_kl_of_llama_cpp_from_the_original"] = compared(original, llamas, 1)["mean_kl"]
        yield f"embedding twice, as {' and '.join(copies)}: {kind}", result

    same = {
        kind: contents(folder / f"ours-{kind.lower()}.gguf")
        == contents(folder / f"quantiser-{kind}.gguf")
        for kind in QUANTISER
        if kind.lower() in FILE_TYPES
    }
    yield (
        "tensors of our writer and of the quantiser, bit by bit",
        same | {"ok": all(same.values())},
    )
    exact = all(
        np.array_equal(found, hf[name].astype(np.float16) if found.ndim > 1 else hf[name])
        for name, found in read(GGUFReader(folder / "elsewhere.gguf")).items()
    )
    yield "weights of that conversion, bit by bit", {"ok": exact}

    vocabulary = llama_cpp.Llama(str(source), vocab_only=True, verbose=False)
    (folder / "tokenizer.json").write_bytes(GGUFReader(both).tokenizer()["tokenizer.json"])
    again, first = load_tokenizer(folder / "tokenizer.json"), load_tokenizer(workdir)
    texts = [*TEXTS, *(first.decode(row) for row in tokens)]
    rows = [
        (
            vocabulary.tokenize(text.encode(), add_bos=False, special=True),
            first.encode(text),
            again.encode(text),
        )
        for text in texts
    ]
    wrong = [text for text, (a, b, c) in zip(texts, rows, strict=True) if not a == b == c]
    yield (
        "tokens: llama.cpp's, ours, ours from a GGUF",
        {"texts": len(texts), "wrong": wrong} | {"ok": not wrong},
    )


def k_quants(folder: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from helpers import model_config

    V = 2112  # the tokenizer has 2048: the rest are padding rows
    config = model_config(layers=2, width=256, heads=4, vocab_size=V)
    source, bare, back = (folder / f"wide-{name}.gguf" for name in ("f32", "bare", "back"))
    hf, file = hf_weights(2, 256, V, 0), folder / "tokenizer.json"
    write(source, config, "f32", hf, **{file.name: file.read_bytes()})
    write(bare, config, "f32", hf)
    tokens = np.random.RandomState(1).randint(0, V, (1, TOKENS)).astype(np.int32)
    same = np.array_equal(theirs(bare, tokens), theirs(source, tokens))
    yield "logits without a tokenizer and with padding rows, bit by bit", {"ok": same}
    for kind, number in QUANTISER.items():
        path = folder / f"wide-{kind}.gguf"
        quantise(source, path, number)
        quantise(path, back, 0)
        mine, llamas = read(GGUFReader(path)), read(GGUFReader(back))
        difference = max(float(np.abs(mine[name] - llamas[name]).max()) for name in mine)
        result = {"matrices": kinds(path), "weights_largest_difference": difference}
        result |= {"weights_ok": difference <= 1e-6}
        logits = compared(ours(path, tokens), theirs(path, tokens), 1)
        yield (
            f"random weights, width 256, {kind}",
            result
            | {
                "mean_kl": logits["mean_kl"],
                "median_difference": logits["median_difference"],
                "ok": difference <= 1e-6 and not logits["clear_but_another_token"],
            },
        )


def main() -> None:
    from facts import keep, machine

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for steps in (trained(folder, sys.argv[1]), k_quants(folder)):
            for what, result in steps:
                results[what] = result
                print(what, result, file=sys.stderr)
    wrong = [what for what, result in results.items() if not result["ok"]]
    result = {
        "what": "GGUF files run by llama.cpp and by bloomjax: trained quickstart, random weights",
        "positions": STRETCHES * TOKENS,
        "results": results,
        "wrong": wrong,
        "machine": machine("jax", "gguf", "llama-cpp-python", "tokenizers", "numpy"),
    }
    keep("gguf-llama-cpp", result)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
