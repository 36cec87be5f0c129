"""Checkpoints written slice by slice: Orbax restores them, on any mesh, and they read back."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from foreign import Memory, copy, same
from helpers import from_hf, model_config
from hostile import refused

import bloomjax
from bloomjax import checkpoint, manifests
from bloomjax.config import MeshConfig, read_model
from bloomjax.errors import InputError
from bloomjax.formats import orbax
from bloomjax.formats.names import ROWS
from bloomjax.formats.orbax import OrbaxReader, OrbaxWriter
from bloomjax.formats.tensors import DTYPES, Progress
from bloomjax.model import abstract_params, with_dtype
from bloomjax.sharding import make_mesh

SHAPES = [
    {"layers": 3, "width": 40, "heads": 8, "vocab_size": 48},
    {"layers": 1, "width": 21, "heads": 3, "vocab_size": 17},
]
DONE = Progress(step=7, samples=99, skipped=2)


def written(folder: Path, source: Memory) -> Path:
    writer = OrbaxWriter(
        folder,
        source.config,
        source.dtype(None),  # type: ignore[arg-type]
        progress=source.progress,
        tokenizer=source.tokenizer(),
        origin=source.origin,
    )
    copy(source, writer)
    return folder


@pytest.mark.parametrize("slice_bytes", [1, 3000, 64 << 20])
@pytest.mark.parametrize("shape", SHAPES, ids=["divides", "odd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_reads_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, shape: Any, slice_bytes: int
) -> None:
    monkeypatch.setattr(orbax, "SLICE_BYTES", slice_bytes)
    monkeypatch.setattr(orbax, "BLOCK_BYTES", max(1, slice_bytes // 4))
    source = Memory(model_config(**shape), dtype, files={"tokenizer.json": b"{}", "x": b""})
    found = OrbaxReader(written(tmp_path / "run", source))
    same(found, source)
    assert found.tokenizer() == {"tokenizer.json": b"{}"}
    assert found.origin["source"] == {"format": "memory", "sha256": "5a" * 32}
    assert found.origin["step"] == 0 and found.context_length == 2048


def test_a_training_state_reads_back(tmp_path: Path) -> None:
    source = Memory(model_config(**SHAPES[0]), progress=DONE)
    same(OrbaxReader(written(tmp_path / "run", source)), source)


@pytest.mark.parametrize("dtype", DTYPES)
def test_orbax_restores_it_on_a_mesh(tmp_path: Path, dtype: str) -> None:
    config = model_config(**SHAPES[0])
    source = Memory(config, dtype)
    run = written(tmp_path / "run", source)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    shapes = {"params": with_dtype(abstract_params(config, mesh), dtype)}
    found = checkpoint.restore(run / "checkpoints", shapes)
    assert found is not None and found.step == 0 and found.meta["params"] == dtype
    plain = ocp.StandardCheckpointer().restore(run / "checkpoints" / "0", shapes)
    expected = from_hf(source.tensors["params"], config)
    for state in (found.state, plain):
        jax.tree.map(np.testing.assert_array_equal, state["params"], expected)


def test_a_broken_step_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = model_config(**SHAPES[0])
    old, new = Memory(config, seed=1), Memory(config, seed=2, progress=DONE)
    run = written(tmp_path / "run", old)
    written(tmp_path / "other", new)
    (tmp_path / "other" / "checkpoints" / "7").rename(run / "checkpoints" / "7")
    same(OrbaxReader(run), new)
    file = next((run / "checkpoints" / "7" / "moments.mu.blocks.up_w").rglob("c/2/*/*"))
    data = bytearray(file.read_bytes())
    data[11] ^= 1
    file.write_bytes(data)
    same(OrbaxReader(run), old)
    assert str(file.relative_to(run / "checkpoints")) in caplog.text
    with pytest.raises(InputError, match="only broken ones"):
        OrbaxReader(run / "checkpoints" / "7")


def test_the_run_knows_its_model(tmp_path: Path) -> None:
    config = model_config(**SHAPES[1], layer_norm_epsilon=1e-6, dtype="auto")
    run = written(tmp_path / "run", Memory(config))
    assert read_model(run) == config
    (run / "config.json").write_text(json.dumps({"model": {"heads": 0}}))
    with pytest.raises(InputError, match=r"config.json: config.model.heads is 0"):
        read_model(run)


def test_a_step_that_goes_away_is_not_read_as_zeros(tmp_path: Path) -> None:
    """tensorstore fills in for files that are missing."""
    run = written(tmp_path / "run", Memory(model_config(**SHAPES[0])))
    reader = OrbaxReader(run)
    row = ROWS["blocks.up_w"]
    reader.read(row, 0, 0, 8)
    (run / "checkpoints" / "0").rename(run / "checkpoints" / "0.deleting")
    with pytest.raises(InputError, match="removed while it was read"):
        reader.read(row, 1, 0, 8)


def test_a_step_alone_has_no_tokenizer(tmp_path: Path) -> None:
    files = {"tokenizer.json": b"{}"}
    run = written(tmp_path / "run", Memory(model_config(**SHAPES[0]), files=files))
    (run / "checkpoints" / "0").rename(run / "0")
    (tmp_path / "tokenizer.json").write_text("somebody else's")
    assert OrbaxReader(run / "0").tokenizer() == {}


HOSTILE: dict[str, Any] = {
    "a way out": lambda m: m["files"].update({"../../../../../../dev/zero": [9, "0" * 64]}),
    "an absolute way out": lambda m: m["files"].update({"/dev/zero": [9, "0" * 64]}),
    "no files": lambda m: m.pop("files"),
    "no leaves": lambda m: m.pop("leaves"),
    "no step": lambda m: m.pop("step"),
    "meta": lambda m: m.update(meta=[1]),
    "a leaf that is none": lambda m: m["leaves"].update(embed=5),
    "a size that is none": lambda m: m["leaves"].update({"params.embed": ["float32", [-1, 40]]}),
    "a dtype that is none": lambda m: m["leaves"].update({"params.embed": [[1], [48, 40]]}),
    "another shape": lambda m: m["leaves"].update({"params.embed": ["float32", [40, 48]]}),
    "another dtype": lambda m: m["leaves"].update({"params.embed": ["int16", [48, 40]]}),
    "a million layers": lambda m: m["meta"]["config"]["model"].update(layers=10**6),
    "a huge vocabulary": lambda m: m["meta"]["config"]["model"].update(vocab_size=10**12),
    "an epsilon below 0": lambda m: m["meta"]["config"]["model"].update(layer_norm_epsilon=-5.0),
    "a model that is none": lambda m: m["meta"]["config"].update(model={"layers": "many"}),
    "moments without a step": lambda m: m["leaves"].update(
        {
            k.replace("params", f"moments.{x}"): v
            for k, v in m["leaves"].items()
            for x in ("mu", "nu")
        }
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests(tmp_path: Path, name: str) -> None:
    """Anybody can write a manifest with the right digest."""
    run = written(tmp_path / "run", Memory(model_config(**SHAPES[0])))
    path = run / "checkpoints" / "0"
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["digest"], manifest["version"]
    HOSTILE[name](manifest)
    manifests.write(path, manifest)
    refused(lambda: OrbaxReader(run))
    if name != "moments without a step":
        refused(lambda: bloomjax.load(run))


def test_hostile_arrays(tmp_path: Path) -> None:
    run = written(tmp_path / "run", Memory(model_config(**SHAPES[0])))
    path = run / "checkpoints" / "0"
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["digest"], manifest["version"]
    array = path / "params.ln_w" / "zarr.json"
    good = array.read_text()
    for bad in ("{", "[" * 100_000, good.replace("[40]", "[3]"), good.replace("float32", "int16")):
        array.write_text(bad)
        manifest["files"]["params.ln_w/zarr.json"] = manifests.entry(array)
        manifests.write(path, manifest)
        refused(lambda: OrbaxReader(run), "params.ln_w")
    array.unlink()
    os.mkfifo(array)
    refused(lambda: OrbaxReader(run), "params.ln_w/zarr.json cannot be read")


def test_a_full_disk_is_told_as_one() -> None:
    """What tensorstore raises then, as seen on a full tmpfs."""

    class Future:
        def result(self) -> None:
            raise ValueError('RESOURCE_EXHAUSTED: Error writing "x": No space left on device')

    with pytest.raises(OSError) as caught:
        orbax._done(Future())
    assert caught.value.errno == errno.ENOSPC
