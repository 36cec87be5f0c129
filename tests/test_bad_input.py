"""What cannot be is refused in one line, with the right exit code, and nothing is lost."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import trial
from trial import TINY, Trial, inside, refused, saved, steps

from bloomjax import generate, train
from bloomjax.data.indexed import IndexedWriter

FEW = ("--config.optim.steps=2",)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    return Trial(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def trained(runs: Trial, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with a checkpoint; whatever is refused leaves every byte of it alone."""
    workdir = tmp_path_factory.mktemp("trained")
    runs.done(workdir, *FEW)
    return workdir


def config_file(folder: Path, body: str) -> Path:
    file = folder / "config.py"
    file.write_text(f"from bloomjax.config import base_config\n\n\ndef get_config():\n    {body}\n")
    return file


@pytest.mark.parametrize(
    ("flags", "code", "parts"),
    [
        (["--config.optim.stepz=3"], 2, ["unknown key 'stepz' in optim", "mean 'steps'"]),
        (["--config.optm.steps=3"], 2, ["unknown key 'optm'", "mean 'optim'"]),
        (["--config.optim=3"], 2, ["unknown key ''"]),
        (["--workdr=x"], 2, ["'workdr'", "workdir"]),
        (["--config.optim.steps=three"], 2, ["config.optim.steps is 'three': expected int"]),
        (["--config.optim.steps=1.5"], 2, ["'1.5': expected int"]),
        (["--config.data.train=(1,)"], 2, ["expected strings"]),
        (["extra"], 2, ["'extra'"]),
        (["--config.model.heads=3"], 2, ["config.model.heads is 3", "a divisor of width 32"]),
        (["--config.mesh.data=99"], 4, ["needs 99 devices, found 8"]),
        (["--config.mesh.data=0"], 2, ["data 0", "1 or more"]),
        (["--config.optim.steps=1"], 2, ["optim.steps: 2 -> 1", "choose another workdir"]),
        (["--config.optim.learning_rate=3", "--config.run.log_every=2"], 2, ["0.01 -> 3.0"]),
        (["--config.model.layers=3", "--config.data.batch_size=8"], 2, ["2 -> 3", "4 -> 8"]),
    ],
)
def test_refused_flags(
    runs: Trial,
    trained: Path,
    capfd: pytest.CaptureFixture[str],
    flags: list[str],
    code: int,
    parts: list[str],
) -> None:
    before = trial.tree(trained)
    argv = runs.train(trained, *FEW, *flags)[1:]
    refused(inside(train, argv, capfd), code, *parts)
    assert trial.tree(trained) == before


def test_missing_flags(runs: Trial, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command in (["bloomjax.train"], ["bloomjax.train", f"--workdir={tmp_path}"]):
        refused(runs.run(command)[0], 2, "--config is missing")
    refused(inside(train, [f"--config={TINY}"], capfd), 2, "--workdir is missing")
    assert not list(tmp_path.iterdir())
    argv = runs.train(tmp_path, "--config.data.train=")[1:]
    refused(inside(train, argv, capfd), 2, "data.train is empty")


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("c = base_config(); c.optim.stepz = 3; return c", ["'stepz' in optim", "mean 'steps'"]),
        ("c = base_config(); c.optim.steps = 'x'; return c", ["config.py:5", "steps"]),
        ("return base_config('7b')", ["unknown size '7b'", "7b1"]),
        ("return None", ["a ConfigDict, found None"]),
        ("return base_config(", ["SyntaxError"]),
    ],
)
def test_refused_config_files(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], body: str, parts: list[str]
) -> None:
    argv = [f"--config={config_file(tmp_path, body)}", f"--workdir={tmp_path / 'workdir'}"]
    refused(inside(train, argv, capfd), 2, *parts)
    assert not (tmp_path / "workdir").exists()


def test_a_mesh_that_does_not_divide(
    runs: Trial, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = runs.train(tmp_path, "--config.mesh.tensor=4", "--config.mesh.fsdp=2")[1:]
    refused(inside(train, argv, capfd), 2, "heads (N = 2)", "mesh.tensor = 4", "tensor 2")


def test_refused_texts(runs: Trial, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    for folder, content in ((empty, b""), (binary, b"\x7fELF\0\xff")):
        folder.mkdir()
        (folder / "one.txt").write_bytes(content)
    workdir = tmp_path / "workdir"
    for source, parts in (
        (tmp_path / "nowhere", ["nothing there"]),
        (empty, ["expected text", "only empty ones"]),
        (binary, [f"{binary / 'one.txt'}:", "NUL"]),
    ):
        argv = runs.train(workdir, *FEW, f"--config.data.train={source}")[1:]
        end = inside(train, argv, capfd)
        assert end.code == 3 and not end.out and "Traceback" not in end.err
        last = end.err.splitlines()[-1]
        assert last.startswith("bloomjax: ") and all(part in last for part in parts), end.err
    runs.done(workdir, *FEW)  # the folder is of use still
    assert saved(workdir) == [2]


def test_ids_above_the_vocabulary(
    runs: Trial, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = trained / "tokenizer.json"
    ids = len(json.loads(tokenizer.read_text())["model"]["vocab"])
    flags = (f"--config.data.tokenizer={tokenizer}", "--config.model.vocab_size=300")
    refused(
        inside(train, runs.train(tmp_path / "a", *flags)[1:], capfd),
        2,
        f"has {ids} ids",
        "model.vocab_size is 300",
    )

    with IndexedWriter(tmp_path / "tokens", 1000) as writer:
        writer.write([*range(200), 320, 7])
        writer.end_document()
    flags = (f"--config.data.train={tmp_path / 'tokens'}", "--config.data.heldout_every=0")
    flags += ("--config.data.tokenizer=",)
    refused(
        inside(train, runs.train(tmp_path / "b", *flags)[1:], capfd),
        2,
        "offset 400",
        "token id 320",
        "vocab_size = 320",
    )
    assert not saved(tmp_path / "b")


def test_another_configuration_of_run_and_mesh_resumes(
    runs: Trial, trained: Path, tmp_path: Path
) -> None:
    workdir = Path(shutil.copytree(trained, tmp_path / "copy"))
    flags = ("--config.optim.steps=4", "--config.mesh.fsdp=1", "--config.run.log_every=2")
    runs.done(workdir, *flags)
    assert [r["step"] for r in steps(workdir)] == [1, 2, 3, 4]  # 3: the first of this start


def test_other_data_or_tokenizer_do_not_resume(runs: Trial, tmp_path: Path) -> None:
    """Tokens that lie outside of the workdir change under the run, and come back."""
    workdir, prefix = tmp_path / "workdir", tmp_path / "tokens"

    def write(token: int) -> None:
        with IndexedWriter(prefix, 320) as writer:
            writer.write([*np.random.default_rng(0).integers(0, 320, 200).tolist(), token])
            writer.end_document()

    write(1)
    flags = [f"--config.data.train={prefix}", "--config.data.heldout_every=0"]
    flags.append("--config.data.tokenizer=")
    runs.done(workdir, *flags, *FEW)
    before = trial.tree(workdir / "checkpoints")
    write(2)
    end = runs.one(workdir, *flags, "--config.optim.steps=4")
    assert end.code == 3 and "expected the data of step 2" in end.err.splitlines()[-1], end.err
    assert trial.tree(workdir / "checkpoints") == before
    assert json.loads((workdir / "config.json").read_text())["optim"]["steps"] == 2
    write(1)
    runs.done(workdir, *flags, *FEW)


def test_texts_may_change_under_a_run(runs: Trial, trained: Path, tmp_path: Path) -> None:
    """Its tokens stay; without them, or with another tokenizer, it is refused."""
    workdir = Path(shutil.copytree(trained, tmp_path / "copy"))
    whole = {text: text.read_text() for text in runs.corpus.iterdir()}
    try:
        for text in whole:
            text.write_text(whole[text] + "more and more.\n")
        runs.done(workdir, "--config.optim.steps=3")
        shutil.rmtree(workdir / "data")
        end = runs.one(workdir, "--config.optim.steps=4")
        assert end.code == 3 and "expected the data of step 3" in end.err.splitlines()[-1]
    finally:
        for text in whole:
            text.write_text(whole[text])
    runs.done(workdir, "--config.optim.steps=4")  # made again from what it was made from
    assert [r["step"] for r in steps(workdir)] == [1, 2, 3, 4]


def test_a_broken_config_json(runs: Trial, trained: Path, tmp_path: Path) -> None:
    workdir = Path(shutil.copytree(trained, tmp_path / "copy"))
    (workdir / "config.json").write_text('{"model": ')
    command = ["bloomjax.generate", f"--model={workdir}", "--prompt_ids=5"]
    assert runs.run(command)[0].code == 0  # the checkpoint knows the model too
    runs.done(workdir, *FEW)  # and a start mends the file
    assert json.loads((workdir / "config.json").read_text())["optim"]["steps"] == 2


@pytest.mark.parametrize(
    ("flags", "code", "parts"),
    [
        (["--prompt=a"], 2, ["--model is missing"]),
        (["--model=/nowhere", "--prompt=a"], 3, ["/nowhere", "found nothing there"]),
        (["--model={}"], 2, ["--prompt_ids and --prompts_file, found none"]),
        (["--model={}", "--prompt=a", "--prompt_ids=1"], 2, ["found --prompt and --prompt_ids"]),
        (["--model={}", "--prompt="], 2, ["the prompt is empty"]),
        (["--model={}", "--prompt_ids="], 2, ["the prompt is empty"]),
        (["--model={}", "--prompt_ids=1,x"], 2, ["expected integers", "'x'"]),
        (["--model={}", "--prompt_ids=1,320"], 2, ["320: expected 0 to 319"]),
        (["--model={}", "--prompt_ids=1,-1"], 2, ["-1: expected 0 to 319"]),
        (["--model={}", "--prompt=a", "--max_new_tokens=0"], 2, ["max_new_tokens is 0"]),
        (["--model={}", "--prompt=a", "--temperature=-1"], 2, ["temperature"]),
        (["--model={}", "--prompt=a", "--top_p=2"], 2, ["top_p"]),
        (["--model={}", "--prompt=a", "--dtype=float16"], 2, ["dtype"]),
    ],
)
def test_refused_by_generate(
    trained: Path,
    capfd: pytest.CaptureFixture[str],
    flags: list[str],
    code: int,
    parts: list[str],
) -> None:
    end = inside(generate, [flag.format(trained) for flag in flags], capfd)
    *progress, last = end.err.splitlines(keepends=True)
    assert all(line.startswith("verifying checkpoint") for line in progress)
    refused(end._replace(err=last), code, *parts)
