"""Checkpoints: whole and verified or not counted; killed, flipped, resharded; nothing silent."""

import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import processes
import pytest
from jax.sharding import Mesh
from states import exact, shapes, state

from bloomjax import manifests
from bloomjax.checkpoint import Checkpoints, newest_meta, restore
from bloomjax.config import MeshConfig
from bloomjax.errors import ConfigError, DoesNotFitError, InputError, UserError
from bloomjax.sharding import make_mesh

# How each child process begins.
CHILD = """
import jax, resource, sys
from pathlib import Path
from bloomjax.checkpoint import Checkpoints
from bloomjax.config import MeshConfig
from bloomjax.sharding import make_mesh
from states import exact, shapes, state
"""


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Checkpoints]]:
    """Opens the folder of the test; what a test leaves open is closed behind it."""
    all_opened: list[Checkpoints] = []

    def open_one(keep: int = 5) -> Checkpoints:
        all_opened.append(Checkpoints(tmp_path / "checkpoints", keep))
        return all_opened[-1]

    yield open_one
    for checkpoints in all_opened:
        checkpoints._pending = None
        checkpoints.close()


@pytest.fixture
def two(opened: Callable[..., Checkpoints], mesh: Mesh) -> Path:
    """A folder with the steps 9 and 10."""
    checkpoints = opened()
    for step in (9, 10):
        checkpoints.save(step, state(step, mesh), {"samples": step * 100})
    checkpoints.close()
    return checkpoints.folder


def files_of(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def falls_back(folder: Path, mesh: Mesh, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """`restore` of a folder whose step 10 is broken gives 9 exactly and names the file."""
    caplog.clear()
    found = restore(folder, shapes(mesh))
    assert found is not None and found.step == 9 and found.meta == {"samples": 900}
    exact(found.state, 9)
    assert f"10/{name} " in caplog.text and "falling back" in caplog.text


def one_line(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


def test_every_flipped_bit_is_found_and_named(
    two: Path, mesh: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    rng, files = random.Random(0), files_of(two / "10")
    picks = files + rng.choices(files, k=max(0, 40 - len(files)))  # each file at least once
    for file in picks:
        whole = file.read_bytes()
        bit = rng.randrange(8 * len(whole))
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        falls_back(two, mesh, file.relative_to(two / "10").as_posix(), caplog)
        file.write_bytes(whole)
    found = restore(two, shapes(mesh))
    assert found is not None and found.step == 10


def test_every_missing_or_cut_file_is_found_and_named(
    two: Path, mesh: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    for file in files_of(two / "10"):
        whole, name = file.read_bytes(), file.relative_to(two / "10").as_posix()
        file.unlink()
        falls_back(two, mesh, name, caplog)
        file.write_bytes(whole[:-1])
        falls_back(two, mesh, name, caplog)
        file.write_bytes(b"")
        falls_back(two, mesh, name, caplog)
        file.write_bytes(whole)


def test_a_file_nobody_wrote_is_harmless(two: Path, mesh: Mesh) -> None:
    (two / "10" / "notes.txt").write_text("mine")
    (two / "10" / "params.wte" / ".nfs0001").write_text("left over")
    (two / "old").mkdir()
    found = restore(two, shapes(mesh))
    assert found is not None and found.step == 10
    exact(found.state, 10)


def test_a_broken_step_is_set_aside_and_can_be_saved_again(
    two: Path, opened: Callable[..., Checkpoints], mesh: Mesh
) -> None:
    checkpoints = opened()
    for aside in ("10.corrupt", "10.corrupt1"):
        (two / "10" / "_METADATA").unlink()
        found = checkpoints.restore(shapes(mesh))
        assert found is not None and found.step == 9
        assert (two / aside / "params.wte").is_dir() and not (two / "10").exists()
        checkpoints.save(10, state(10, mesh), {})
        checkpoints.wait()
    found = checkpoints.restore(shapes(mesh))
    assert found is not None and found.step == 10
    exact(found.state, 10)


def test_no_whole_step_is_an_error_each_time_and_never_a_start_from_zero(
    two: Path, opened: Callable[..., Checkpoints], mesh: Mesh
) -> None:
    (two / "10" / "manifest.json").unlink()
    (two / "9" / "params.wte/c/0/1").write_bytes(b"")
    checkpoints = opened()
    for _ in range(2):  # a supervisor starts the command again
        with pytest.raises(InputError) as error:
            checkpoints.restore(shapes(mesh))
        one_line(error, "10/manifest.json is missing", "9/params.wte/c/0/1 has another length")
    for step in ("9", "10"):
        (two / step).rename(two / f"{step}.corrupt")
    with pytest.raises(InputError) as error:
        checkpoints.restore(shapes(mesh))
    one_line(error, "9.corrupt")


def test_a_new_folder_has_nothing(
    tmp_path: Path, opened: Callable[..., Checkpoints], mesh: Mesh
) -> None:
    assert restore(tmp_path / "none", shapes(mesh)) is None
    assert newest_meta(tmp_path / "none") is None
    assert opened().restore(shapes(mesh)) is None


KILLED = (
    CHILD
    + """
mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
checkpoints = Checkpoints(Path(sys.argv[1]), keep=1)
found = checkpoints.restore(shapes(mesh, 4096))
step = found.step if found else 0
if found:
    exact(found.state, step, 4096)
print("start", step, flush=True)
while True:
    step += 1
    checkpoints.save(step, state(step, mesh, 4096), {"samples": step})
    print("saving", step, flush=True)
    checkpoints.wait()
    print("announced", step, flush=True)
"""
)


def survive(folder: Path, mesh: Mesh, trials: int, seed: int) -> None:
    rng, announced = random.Random(seed), 0
    for _ in range(trials):
        child = processes.start(KILLED, folder, devices=4)
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == f"start {announced}\n", child.communicate()[1]
            lines = []
            for _ in range(rng.choice((1, 3, 5))):  # saving, announced, saving, ...
                lines.append(child.stdout.readline())
            time.sleep(rng.random() * 0.1)
        finally:
            child.kill()
        lines += child.communicate()[0].splitlines()
        said = [int(line.split()[1]) for line in lines if line.startswith("announced")]
        announced = max([announced, *said])
        found = restore(folder, shapes(mesh, 4096))
        # The kill may fall between the end of a save and its announcement.
        at = found.step if found else 0
        assert at in (announced, announced + 1)
        if found:
            assert found.meta == {"samples": at}
            exact(found.state, at, 4096)
        announced = at
    Checkpoints(folder, 1).close()
    # The last kill may have fallen before the step that was one too many had gone.
    left = {p.name for p in folder.iterdir()} - {str(announced - 1)}
    assert left == {str(announced), "lock"}


def test_a_kill_loses_at_most_the_save_under_way(tmp_path: Path, mesh: Mesh) -> None:
    survive(tmp_path / "checkpoints", mesh, trials=5, seed=int(time.time()))


@pytest.mark.slow
def test_many_kills(tmp_path: Path, mesh: Mesh) -> None:
    survive(tmp_path / "checkpoints", mesh, trials=50, seed=0)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 1), (1, 1, 4), (8, 1, 1), (2, 2, 2)])
def test_restores_onto_any_mesh(two: Path, sizes: tuple[int, int, int]) -> None:
    config = MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    other = make_mesh(config, jax.devices()[: int(np.prod(sizes))])
    target = shapes(other)
    found = restore(two, target)
    assert found is not None and found.step == 10
    exact(found.state, 10)
    jax.tree.map(lambda got, want: got.sharding == want.sharding or pytest.fail(), found[1], target)


SAVE = (
    CHILD
    + """
mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
with jax.set_mesh(mesh):  # as a training does
    checkpoints = Checkpoints(Path(sys.argv[1]), keep=5)
    for step in (9, 10):
        checkpoints.save(step, state(step, mesh), {"samples": step * 100})
    checkpoints.close()
"""
)
READ = (
    CHILD
    + """
data, fsdp, tensor = map(int, sys.argv[3:6])
mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
checkpoints = Checkpoints(Path(sys.argv[1]), keep=5)
found = checkpoints.restore(shapes(mesh))
assert found.step == int(sys.argv[2]) and found.meta == {"samples": found.step * 100}
exact(found.state, found.step)
try:
    checkpoints.restore({"params": {}})
except Exception as error:
    print(type(error).__name__, error)
checkpoints.close()
"""
)


def test_two_processes_then_one_then_four(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    processes.launch(2, SAVE, folder, devices=2)
    assert sorted(p.name for p in folder.iterdir()) == ["10", "9", "lock"]
    processes.launch(1, READ, folder, 10, 1, 4, 1, devices=4)
    file = folder / "10" / "mu.wte" / "c" / "1" / "0"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    refusals = processes.launch(4, READ, folder, 9, 2, 1, 2)
    # All took the same decision, and all refuse the same thing in the same words.
    assert len(set(refusals)) == 1 and refusals[0].startswith("InputError"), refusals
    assert sorted(p.name for p in folder.iterdir()) == ["10.corrupt", "9", "lock"]


READ_HALF = (
    CHILD
    + """
from test_checkpoint import read_bytes
from bloomjax.checkpoint import restore
target = shapes(make_mesh(MeshConfig(fsdp=2)), 4096)
restore(Path(sys.argv[1]), target)  # the first call also reads Python modules
before = read_bytes()
found = restore(Path(sys.argv[1]), target)
print(read_bytes() - before)
exact(found.state, 1, 4096)
"""
)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes through /proc")
def test_a_process_reads_and_verifies_only_its_share(
    opened: Callable[..., Checkpoints], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bloomjax.checkpoint._FILE_BYTES", 2**18)
    checkpoints = opened()
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    checkpoints.save(1, state(1, one, 4096), {})
    checkpoints.close()
    size = 2 * 4 * 16 * 8 * 4096
    for read in processes.launch(2, READ_HALF, checkpoints.folder):
        assert 0.9 < int(read) / size < 1.1  # half of it to verify, half of it to load


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t | {"params": _as(t["params"], jnp.bfloat16)}, ("bfloat16", "float32")),
        (lambda t: t | {"params": _as(t["params"], jnp.int8)}, ("int8[8]", "float32[8]")),
        (lambda t: t | {"count": t["params"]["wte"]}, ("float32[16, 8]", "int32[]", "count")),
        (lambda t: t | {"nu": t["mu"]}, ("expected float32[8] at nu.head.bias, found nothing",)),
        (
            lambda t: t | {"mu": {"wte": t["mu"]["wte"]}},
            ("expected nothing at mu.head.bias, found float32[8]",),
        ),
    ],
)
def test_nothing_is_cast_or_left_out(
    two: Path, mesh: Mesh, change: Callable[[Any], Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as error:
        restore(two, change(shapes(mesh)))
    one_line(error, *parts)


def _as(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), tree)


def read_bytes() -> int:
    match = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    assert match is not None
    return int(match[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes through /proc")
def test_a_sub_tree_reads_only_its_own_bytes(
    opened: Callable[..., Checkpoints], mesh: Mesh
) -> None:
    checkpoints = opened()
    checkpoints.save(1, state(1, mesh, 4096), {})
    checkpoints.close()
    (checkpoints.folder / "1" / "mu.wte/c/0/0").write_bytes(b"not looked at")
    size = 4 * 16 * 8 * 4096
    before = read_bytes()
    found = restore(checkpoints.folder, {"params": shapes(mesh, 4096)["params"]})
    read = read_bytes() - before
    assert found is not None and found.state.keys() == {"params"}
    exact(found.state, 1, 4096)
    assert read < 2.2 * size, read / size  # once to verify, once to load


def test_the_arrays_may_be_donated_as_soon_as_save_returns(
    opened: Callable[..., Checkpoints], mesh: Mesh
) -> None:
    @jax.jit
    def fresh(tree: Any) -> Any:
        return jax.tree.map(lambda x: x + 0, tree)

    checkpoints = opened()
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    for step in range(1, 4):
        now = jax.block_until_ready(fresh(state(step, mesh, 4096)))
        checkpoints.save(step, now, {})
        jax.block_until_ready(spoil(now))
        found = checkpoints.restore(shapes(mesh, 4096))
        assert found is not None and found.step == step
        exact(found.state, step, 4096)


def test_an_error_of_the_background_is_raised_by_the_next_save(
    opened: Callable[..., Checkpoints], mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = opened()
    checkpoints.save(1, state(1, mesh), {})
    checkpoints.wait()
    aside = checkpoints.folder.with_name("moved")
    checkpoints.save(2, state(2, mesh), {})
    checkpoints.wait()
    monkeypatch.setattr(manifests, "entries", _fail)
    checkpoints.save(3, state(3, mesh), {})
    with pytest.raises(DoesNotFitError) as error:
        checkpoints.save(4, state(4, mesh), {})
    one_line(error, "3: the disk is full", "steps before are intact")
    monkeypatch.undo()
    assert not list(checkpoints.folder.glob("3*"))  # a full disk is not kept full
    checkpoints.folder.rename(aside)
    checkpoints.folder.write_text("not a folder any more")
    with pytest.raises(InputError) as error:
        checkpoints.save(4, state(4, mesh), {})
        checkpoints.wait()
    one_line(error, "expected a writable folder")
    checkpoints.folder.unlink()
    aside.rename(checkpoints.folder)
    checkpoints.save(4, state(4, mesh), {})
    found = checkpoints.restore(shapes(mesh))
    assert found is not None and found.step == 4


def _fail(*args: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_write_that_fails_midway_leaves_the_step_before(tmp_path: Path, mesh: Mesh) -> None:
    source = (
        CHILD
        + """
mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
checkpoints = Checkpoints(Path(sys.argv[1]), keep=1)
checkpoints.save(1, state(1, mesh, 4096), {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # files end here, mid-write
checkpoints.save(2, state(2, mesh, 4096), {})
try:
    checkpoints.close()
except Exception as error:
    print(type(error).__name__, error)
"""
    )
    (said,) = processes.launch(1, source, tmp_path, devices=4)
    assert said.startswith("InputError") and len(said.splitlines()) == 1, said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "lock"]
    found = restore(tmp_path, shapes(mesh, 4096))
    assert found is not None
    exact(found.state, 1, 4096)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as error:
        Checkpoints(tmp_path / "file" / "checkpoints", 1)
    one_line(error, "expected a writable folder")


def test_one_run_a_folder(opened: Callable[..., Checkpoints]) -> None:
    first = opened()
    with pytest.raises(ConfigError) as error:
        opened()
    one_line(error, f"process {os.getpid()} on", "another workdir")
    first.close()
    opened().close()


def test_the_newest_by_number_stay_whatever_the_clock_said(
    opened: Callable[..., Checkpoints], mesh: Mesh
) -> None:
    checkpoints = opened(keep=2)
    for step in (8, 9, 10, 11):
        checkpoints.save(step, state(step, mesh), {})
        checkpoints.wait()
        os.utime(checkpoints.folder / str(step), (1e9 - step * 86400,) * 2)
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["10", "11", "lock"]
    found = checkpoints.restore(shapes(mesh))
    assert found is not None and found.step == 11
    with pytest.raises(ValueError, match="already"):
        checkpoints.save(11, state(11, mesh), {})


def test_what_a_killed_run_left_is_removed_and_nothing_else(
    two: Path, opened: Callable[..., Checkpoints]
) -> None:
    for name in ("11.saving", "11.saving.orbax-checkpoint-tmp", "8.deleting", "7.corrupt", "mine"):
        (two / name / "d").mkdir(parents=True)
    opened().close()
    assert sorted(p.name for p in two.iterdir()) == ["10", "7.corrupt", "9", "lock", "mine"]


def test_a_disk_too_small_is_refused_before_the_first_save(
    opened: Callable[..., Checkpoints], mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, size = opened(keep=2), 2 * 4 * (8 + 16 * 8) + 4
    usage = shutil.disk_usage(checkpoints.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * size - 1))
    with pytest.raises(DoesNotFitError) as error:
        checkpoints.check_room(shapes(mesh))
    one_line(error, "3 checkpoints", "run.keep_checkpoints")
    with pytest.raises(DoesNotFitError):
        checkpoints.save(1, state(1, mesh), {})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * size))
    checkpoints.save(1, state(1, mesh), {})


def test_meta_comes_back_and_may_decide_the_shapes(two: Path, mesh: Mesh) -> None:
    assert newest_meta(two) == (10, {"samples": 1000})
    seen: list[Any] = []

    def like(meta: dict[str, Any]) -> Any:
        seen.append(meta)
        return shapes(mesh)

    found = restore(two, like)
    assert found is not None and seen == [found.meta] == [{"samples": 1000}]


def test_plain_orbax_reads_our_steps(two: Path, mesh: Mesh) -> None:
    exact(ocp.StandardCheckpointer().restore(two / "10", shapes(mesh)), 10)


def test_a_step_under_another_number_does_not_count(two: Path, mesh: Mesh) -> None:
    (two / "10").rename(two / "20")
    found = restore(two, shapes(mesh))
    assert found is not None and found.step == 9


def test_a_newer_manifest_names_its_version(
    two: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((two / "10" / "manifest.json").read_text())
    del manifest["digest"], manifest["version"]
    monkeypatch.setattr(manifests, "VERSION", 7)
    manifests.write(two / "10", manifest)
    monkeypatch.undo()
    with pytest.raises(InputError) as error:
        restore(two, shapes(mesh))
    one_line(error, "expected manifest version 1, found 7")


def test_a_user_sees_only_our_lines(tmp_path: Path) -> None:
    source = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        + CHILD
        + (
            "mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))\n"
            "checkpoints = Checkpoints(Path(sys.argv[1]), keep=1)\n"
            "checkpoints.save(1, state(1, mesh), {})\n"
            "checkpoints.restore(shapes(mesh))\n"
            "checkpoints.close()\n"
        )
    )
    child = processes.start(source, tmp_path, devices=4)
    said = [line for line in child.communicate(timeout=60)[1].splitlines() if "xla" not in line]
    assert len(said) == 1 and said[0].startswith("INFO:bloomjax:checkpoint 1: "), said


def test_shares_are_a_partition_and_even() -> None:
    sizes = {f"f{i}": random.Random(i).randrange(100) for i in range(50)}
    shares = [manifests.share(sizes, me, 4) for me in range(4)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= 100
