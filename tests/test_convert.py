"""The job: every lossless way there and back is exact to the bit, and nothing half done is seen."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bloomjax_convert import __main__ as entry
from bloomjax_convert import job
from foreign import Memory, copy, same
from helpers import forward, from_hf, model_config
from safetensors.numpy import load_file, save_file
from trial import ROOT, Ended

import bloomjax
from bloomjax import cli
from bloomjax.data.tokenizer import train_tokenizer
from bloomjax.formats.hf import HFWriter
from bloomjax.formats.names import TABLE
from bloomjax.formats.orbax import OrbaxWriter
from bloomjax.formats.tensors import DTYPES, Progress, order
from bloomjax.source import open_source

# Heads that are no power of two, head dims that are, rows that no block of 32 divides: one that
# tensor parallelism of 4 cuts, and one that is odd in everything.
SHAPES = {
    "cut": {"layers": 3, "width": 80, "heads": 4, "vocab_size": 328},
    "odd": {"layers": 2, "width": 35, "heads": 5, "vocab_size": 331},
}
TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 9,
    "def f(x):\n    return x  # ünï\n",
] * 9


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(TEXTS, 300, path)
    return {path.name: path.read_bytes()}


def hf(folder: Path, shape: str, dtype: str, tokenizer: dict[str, bytes]) -> Memory:
    """A folder to convert."""
    source = Memory(model_config(**SHAPES[shape]), dtype, files=tokenizer)
    writer = HFWriter(
        folder, source.config, DTYPES[dtype], tokenizer=tokenizer, origin={"format": "memory"}
    )
    copy(source, writer)
    return source


def convert(capfd: pytest.CaptureFixture[str], *argv: object) -> Ended:
    """The command line, in this process."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as left:
        cli.run(entry.main, entry.define, entry.__doc__, [*map(str, argv)], ("src", "dst"))
    return Ended(left.value.code, *capfd.readouterr())  # type: ignore[arg-type]


def done(capfd: pytest.CaptureFixture[str], *argv: object) -> Ended:
    end = convert(capfd, *argv)
    assert end.code == 0, end.err
    return end


WAYS = {
    "orbax": ("cut", ["--to=orbax"]),
    "orbax odd": ("odd", ["--to=orbax"]),
    "megatron 1x1": ("odd", ["--to=megatron"]),
    "megatron 2x1": ("cut", ["--to=megatron", "--tp=2"]),
    "megatron 4x2": ("cut", ["--to=megatron", "--tp=4", "--pp=2"]),
    "megatron 1x2": ("odd", ["--to=megatron", "--pp=2"]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_there_and_back_is_exact(
    tmp_path: Path, capfd: Any, tokenizer: dict[str, bytes], way: str, dtype: str
) -> None:
    shape, flags = WAYS[way]
    source = hf(tmp_path / "a", shape, dtype, tokenizer)
    done(capfd, tmp_path / "a", tmp_path / "b", *flags)
    end = done(capfd, tmp_path / "b", tmp_path / "c", "--to=hf", "--verify")
    weights = [(tmp_path / x / "model.safetensors").read_bytes() for x in "ac"]
    assert weights[0] == weights[1]
    same(open_source(tmp_path / "b"), source)
    assert len(end.out.splitlines()) == 12 * source.config.layers + 5
    if "megatron" not in way:  # which has no place for a tokenizer
        assert (
            open_source(tmp_path / "c").tokenizer()["tokenizer.json"]
            == source.tokenizer()["tokenizer.json"]
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_gguf_there_and_back_is_exact(
    tmp_path: Path, capfd: Any, tokenizer: dict[str, bytes], shape: str
) -> None:
    source = hf(tmp_path / "a", shape, "float16", tokenizer)
    done(capfd, tmp_path / "a", tmp_path / "b.gguf", "--to=gguf", "--gguf_type=f16", "--verify")
    done(capfd, tmp_path / "b.gguf", tmp_path / "c", "--to=hf", "--dtype=float16")
    weights = [(tmp_path / x / "model.safetensors").read_bytes() for x in "ac"]
    assert weights[0] == weights[1]
    text = "the lazy dog (jumps)\n\n  twice!"
    before, after = (bloomjax.load(tmp_path / x).tokenizer for x in "ac")
    assert before and after and before.encode(text) == after.encode(text)
    del source


@pytest.mark.parametrize(
    ("to", "kind"),
    [
        ("hf", ""),
        ("orbax", ""),
        ("megatron", ""),
        ("gguf", "f32"),
        ("gguf", "q8_0"),
        ("gguf", "q4_0"),
    ],
)
def test_logits_are_the_sources(
    tmp_path: Path, capfd: Any, tokenizer: dict[str, bytes], to: str, kind: str
) -> None:
    """For a quantised file: those of the same weights dequantised by the gguf package."""
    config = model_config(layers=2, width=64, heads=4, vocab_size=320)
    source = Memory(config, files=tokenizer)
    copy(
        source, HFWriter(tmp_path / "a", config, DTYPES["float32"], tokenizer=tokenizer, origin={})
    )
    path = tmp_path / "b"
    done(capfd, tmp_path / "a", path, f"--to={to}", *([f"--gguf_type={kind}"] if kind else []))
    weights = dict(source.tensors["params"])
    if kind.startswith("q"):
        from gguf import GGMLQuantizationType as Kind
        from gguf.quants import dequantize, quantize

        for row, layer in order(config):
            name, of = row.hf.format(layer), Kind["Q8_0" if row.path == "embed" else kind.upper()]
            if weights[name].ndim == 2:
                weights[name] = dequantize(quantize(weights[name], of), of)
    tokens = np.random.default_rng(0).integers(0, 320, (2, 20)).astype(np.int32)
    expected = forward(from_hf(weights, config), config, tokens)
    found = np.asarray(bloomjax.load(path, dtype="float32")(tokens))
    assert np.abs(expected).max() > 5
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_training_state_travels(tmp_path: Path, capfd: Any) -> None:
    """Whole by default; parameters alone if a dtype is asked for, or the format knows no more."""
    source = Memory(model_config(**SHAPES["cut"]), progress=Progress(7, 99))
    kwargs: Any = {"progress": source.progress, "tokenizer": {}, "origin": {"format": "orbax"}}
    copy(source, OrbaxWriter(tmp_path / "a", source.config, DTYPES["float32"], **kwargs))
    done(capfd, tmp_path / "a", tmp_path / "b", "--to=orbax", "--verify")
    same(open_source(tmp_path / "b"), source)
    done(capfd, tmp_path / "a", tmp_path / "c", "--to=orbax", "--dtype=bfloat16")
    alone = open_source(tmp_path / "c")
    assert alone.progress is None and alone.dtype(TABLE[0]) == DTYPES["bfloat16"]
    done(capfd, tmp_path / "b", tmp_path / "d", "--to=hf")
    card = (tmp_path / "d" / "README.md").read_text()
    assert "license:" not in card  # a run of ours that began with nothing
    origin = open_source(tmp_path / "d").origin
    assert origin["source"]["step"] == 7 and origin["source"]["source"]["format"] == "orbax"


def test_several_dtypes_become_the_widest(tmp_path: Path, capfd: Any) -> None:
    """Of an embedding in float16 and blocks in float32 nothing is rounded."""
    source = Memory(model_config(**SHAPES["cut"]))
    weights = source.tensors["params"]
    weights["word_embeddings.weight"] = weights["word_embeddings.weight"].astype(np.float16)
    copy(
        source, HFWriter(tmp_path / "a", source.config, DTYPES["float32"], tokenizer={}, origin={})
    )
    save_file(weights, tmp_path / "a" / "model.safetensors")
    done(capfd, tmp_path / "a", tmp_path / "b", "--to=hf")
    for name, found in load_file(tmp_path / "b" / "model.safetensors").items():
        np.testing.assert_array_equal(found, weights[name.removeprefix("transformer.")])


def test_a_dry_run_tells_and_leaves_nothing(
    tmp_path: Path, capfd: Any, tokenizer: dict[str, bytes]
) -> None:
    hf(tmp_path / "a", "cut", "float16", tokenizer)
    end = done(capfd, tmp_path / "a", tmp_path / "b", "--to=orbax", "--dry_run")
    assert all(word in end.out for word in ("parameters", "MB", "memory", "time: about"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_verify_finds_a_wrong_bit(
    tmp_path: Path, capfd: Any, tokenizer: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hf(tmp_path / "a", "cut", "float16", tokenizer)
    write = HFWriter.write

    def wrong(self: Any, row: Any, layer: int, start: int, rows: np.ndarray, *more: Any) -> None:
        if row.path == "blocks.up_w" and layer == 1:
            rows = rows.copy()
            rows.view(np.uint16)[3, 5] ^= 1
        write(self, row, layer, start, rows, *more)

    monkeypatch.setattr(HFWriter, "write", wrong)
    end = convert(capfd, tmp_path / "a", tmp_path / "b", "--to=hf", "--verify")
    assert end.code == 3 and "h.1.mlp.dense_h_to_4h.weight" in end.err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("argv", "code", "parts"),
    [
        (["a", "b"], 2, ["--to is missing", "orbax, hf"]),
        (["a", "--to=hf"], 2, ["expected SRC DST", "1 of them"]),
        (["a", "b", "c", "--to=hf"], 2, ["'c' too"]),
        (["a", "b", "--to=pt"], 2, ["to", "orbax"]),
        (["a", "b", "--to=hf", "--tp=2"], 2, ["--tp is of --to=megatron"]),
        (["a", "b", "--to=gguf", "--dtype=float16"], 2, ["--gguf_type"]),
        (["a", "b", "--to=megatron", "--tp=3"], 2, ["tp is 3", "heads, 4"]),
        (["a", "a", "--to=hf"], 2, ["expected nothing there"]),
        (["a", "a/b", "--to=hf"], 2, ["outside of a"]),
        (["a", "file/b", "--to=hf"], 3, ["file/b", "can be written"]),
        (["no", "b", "--to=hf"], 3, ["no: expected", "nothing there"]),
        (["empty", "b", "--to=hf"], 3, ["empty: expected"]),
        (["file", "b", "--to=hf"], 3, ["file: expected", "GGUF"]),
    ],
)
def test_refused(
    tmp_path: Path,
    capfd: Any,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: dict[str, bytes],
    argv: list[str],
    code: int,
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    hf(tmp_path / "a", "cut", "float16", tokenizer)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    end = convert(capfd, *argv)
    assert end.code == code, end
    last = end.err.splitlines()[-1]
    assert last.startswith("bloomjax: ") and "Traceback" not in end.err and not end.out
    assert all(part in last for part in parts), last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty", "file"]


def test_no_room(
    tmp_path: Path, capfd: Any, tokenizer: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hf(tmp_path / "a", "cut", "float16", tokenizer)
    usage = job.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(job.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    end = convert(capfd, tmp_path / "a", tmp_path / "b", "--to=orbax")
    assert end.code == 4 and "of free disk, found 0.00 MB" in end.err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# Slow enough to be killed anywhere: every write waits a little.
KILLED = """
import sys, time
from bloomjax_convert import __main__ as entry, job
from bloomjax import cli

write = job._write

def slow(*args):
    time.sleep(0.03)
    return write(*args)

job._write = slow
print("go", flush=True)
cli.run(entry.main, entry.define, "", sys.argv[1:], ("src", "dst"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "gguf", "orbax", "megatron"])
def test_killed_at_any_moment(
    tmp_path: Path, capfd: Any, tokenizer: dict[str, bytes], to: str
) -> None:
    """The destination is absent or complete, and the next conversion starts anew."""
    source, rng = hf(tmp_path / "a", "cut", "float16", tokenizer), random.Random(to)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a"), str(tmp_path / "b"), f"--to={to}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    absent = 0
    for _ in range(5):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, env=env, cwd=tmp_path)
        assert child.stdout and child.stdout.readline() == b"go\n"
        time.sleep(rng.uniform(0, 0.9))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if (tmp_path / "b").exists():
            break
        absent += 1
        assert {path.name for path in tmp_path.iterdir()} <= {"a", ".b.converting"}
    assert absent
    if not (tmp_path / "b").exists():
        done(capfd, tmp_path / "a", tmp_path / "b", f"--to={to}")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == ["a", "b"]
    found = open_source(tmp_path / "b")
    for row, layer in order(source.config):
        a, b = (r.read(row, layer, 0, row.shape(source.config.sizes)[0]) for r in (source, found))
        np.testing.assert_array_equal(a, b)


def test_one_at_a_time(
    tmp_path: Path, capfd: Any, tokenizer: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hf(tmp_path / "a", "cut", "float16", tokenizer)
    with job.appearing(tmp_path / "b", 0) as new:
        new.write_text("x")
        end = convert(capfd, tmp_path / "a", tmp_path / "b", "--to=hf")
        assert end.code == 2 and "another conversion" in end.err.splitlines()[-1]
    assert (tmp_path / "b").read_text() == "x"


@pytest.mark.skipif(not (ROOT / "convert").is_dir(), reason="away from the checkout")
def test_in_a_clone_it_is_called_convert(tmp_path: Path, tokenizer: dict[str, bytes]) -> None:
    hf(tmp_path / "a", "odd", "float16", tokenizer)
    command = [sys.executable, "-m", "convert", tmp_path / "a", tmp_path / "b", "--to=orbax"]
    end = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert end.returncode == 0 and "complete; sha256" in end.stderr, end.stderr
    meta = json.loads(next(tmp_path.rglob("manifest.json")).read_text())["meta"]
    assert meta["origin"]["sha256"] in end.stderr and meta["params"] == "float16"
