"""What users and the house rely on: flags, config fields, shipped configs, who imports whom."""

import ast
import configparser
import dataclasses
import functools
import itertools
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl import flags
from bloomjax_convert import __main__ as convert

from bloomjax import aot, cli, cost, doctor, generate, machines, plan, train
from bloomjax.config import Config, freeze
from bloomjax.sharding import AXES

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "bloomjax"
CONFIGS = sorted((ROOT / "configs").glob("*.py"))

# From the top to the bottom: a room imports only from rooms below its own, and from its own.
ROOMS = [
    {"train", "generate", "evaluate", "serve", "doctor", "plan"},
    {"answers", "cli", "picture", "decode_plan", "stages"},
    {"aot"},
    {"search", "counts"},
    {"hlo"},
    {"cost", "decode_cost"},
    {"timing"},
    {"traffic"},
    {"software"},
    {""},  # the package itself: what `import bloomjax` offers
    {"source"},
    {"decode", "step"},
    {"pipeline", "formats"},
    {"loss", "optim", "data", "checkpoint"},
    {"model"},
    {"attention"},
    {"parallel"},
    {"kernels"},
    {"sharding"},
    {"watchdog"},
    {"metrics", "processes", "manifests", "memory", "folders"},
    {"machines"},
    {"cluster"},
    {"config"},
    {"errors"},
]
FLOOR = {room: -i for i, rooms in enumerate(ROOMS) for room in rooms}


@functools.cache
def modules() -> list[tuple[str, ast.Module]]:
    paths = {p: p.relative_to(PACKAGE).with_suffix("").parts for p in PACKAGE.rglob("*.py")}
    return [
        (".".join(p for p in parts if p != "__init__"), ast.parse(path.read_text()))
        for path, parts in sorted(paths.items())
    ]


def imported(tree: ast.Module) -> Iterator[str]:
    """Modules of the package that are imported anywhere in a file, without their "bloomjax."."""
    names = {name for name, _ in modules()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [n if n.removeprefix("bloomjax.") in names else str(node.module) for n in whole]
        else:
            continue
        yield from (n.partition(".")[2] for n in found if n.split(".")[0] == "bloomjax")


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_module_has_a_room() -> None:
    assert {room(name) for name, _ in modules()} <= set(FLOOR)


def test_imports_run_one_way() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, tree in modules()
        for other in imported(tree)
        if room(name) != room(other) and FLOOR[room(other)] >= FLOOR[room(name)]
    ]
    assert not wrong


def test_no_module_of_a_room_waits_for_itself() -> None:
    """Inside a room too nothing goes round."""
    left = {name: set(imported(tree)) - {name} for name, tree in modules()}
    while free := {name for name, others in left.items() if not others & set(left)}:
        left = {name: others for name, others in left.items() if name not in free}
    assert not left


def test_only_sharding_names_mesh_axes() -> None:
    """As an argument of what takes an axis: PartitionSpec, a collective, the shape of a mesh."""
    takes = {"P", "PartitionSpec", "psum", "pmax", "pmin", "pmean", "all_gather", "psum_scatter"}
    takes |= {"axis_index", "ppermute", "all_to_all", "shard_map", "make_mesh", "Mesh"}

    def names(node: ast.AST) -> bool:
        return any(isinstance(n, ast.Constant) and n.value in AXES for n in ast.walk(node))

    found = []
    for module, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                function = node.func
                called = function.attr if isinstance(function, ast.Attribute) else ""
                called = function.id if isinstance(function, ast.Name) else called
                keywords = [word.value for word in node.keywords if word.arg != "devices"]
                hit = called in takes and any(map(names, [*node.args, *keywords]))
            elif isinstance(node, ast.Subscript):  # mesh.shape["tensor"]
                value = node.value
                hit = isinstance(value, ast.Attribute) and value.attr == "shape"
                hit = hit and names(node.slice)
            else:
                continue
            if hit:
                found.append((module, node.lineno))
    assert not [place for place in found if place[0] != "sharding"]


def test_config_fields() -> None:
    groups = {f.name: f.type for f in dataclasses.fields(Config)}
    fields = {
        name: " ".join(f.name for f in dataclasses.fields(group))  # type: ignore[arg-type]
        for name, group in groups.items()
    }
    assert fields == {
        "model": "layers width heads vocab_size layer_norm_epsilon "
        "apply_residual_connection_post_layernorm hidden_dropout attention_dropout init_std dtype "
        "alibi_dtype",
        "data": "train heldout heldout_every exclude text_key tokenizer sequence_length batch_size",
        "optim": "steps learning_rate min_learning_rate warmup_samples decay_samples beta1 beta2 "
        "epsilon weight_decay clip_norm ramp_start ramp_increment ramp_samples",
        "mesh": "stage data fsdp sequence tensor",
        "run": "seed log_every eval_every checkpoint_every keep_checkpoints remat accumulation "
        "workers profile_step watchdog",
    }


@pytest.mark.parametrize(
    ("define", "expected"),
    [
        (train.define, "config workdir set"),
        (
            generate.define,
            "model prompt prompt_ids prompts_file max_new_tokens min_new_tokens temperature top_k "
            "top_p min_p repetition_penalty no_repeat_ngram_size num_beams length_penalty "
            "num_return_sequences stop seed dtype cache_dtype quantize stream verbose json",
        ),
        (doctor.define, "workdir json"),
        (plan.define, "config target search plot json set decode quantize slots"),
        (convert.define, "src dst to dtype tp pp gguf_type verify dry_run"),
    ],
)
def test_flags(define: cli.Define, expected: str) -> None:
    values = flags.FlagValues()
    define(values)
    assert sorted(values) == sorted(expected.split())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc
    first, *rest = doc.splitlines()
    assert first.endswith(".") and first[0].isupper()
    commands = [line.strip() for line in rest if line.strip().startswith("python -m bloomjax.")]
    assert f"--config=configs/{path.name}" in commands[0]
    argv = [f"--config={path}", "--config.optim.steps=9", "--config.data.train=a.txt,b/**/*.py"]
    config = cli.load_config(cli.parse(argv, train.define))
    assert config.optim.steps == 9 and config.data.train == ("a.txt", "b/**/*.py")


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_fits_its_target(path: Path) -> None:
    """By count; the compiler's own figures are in benchmarks/results/plans-*.json."""
    file = runpy.run_path(str(path))
    if "TARGET" not in file:
        return
    target, config = aot.target(file["TARGET"]), freeze(file["get_config"]())
    found = cost.estimate(config, machines.machine(target.kind), target.devices)
    assert found.fits and found.padding == 0
    assert f"--target={target}" in path.read_text()


def test_overrides_are_typed() -> None:
    argv = [
        f"--config={ROOT / 'configs' / 'quickstart.py'}",
        "--config.data.exclude=('a,b', 'c')",
        "--config.data.heldout=",
        "--config.optim.learning_rate=1",
        "--config.model.apply_residual_connection_post_layernorm=true",
        "--config.data.text_key=a=b",
        "--config.mesh.fsdp=-1",
    ]
    config = cli.load_config(cli.parse(argv, train.define))
    assert config.data.exclude == ("a,b", "c") and config.data.heldout == ()
    assert config.optim.learning_rate == 1.0 and type(config.optim.learning_rate) is float
    assert config.model.apply_residual_connection_post_layernorm is True
    assert config.data.text_key == "a=b" and config.mesh.fsdp == -1


@pytest.mark.skipif(not PACKAGE.is_dir(), reason="away from the checkout")
def test_every_folder_of_code_is_installed() -> None:
    """setup.cfg lists them, since the folder convert/ is installed under another name."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = {file.parent.relative_to(PACKAGE.parent) for file in PACKAGE.rglob("*.py")}
    expected = {".".join(folder.parts) for folder in folders} | {"bloomjax_convert"}
    assert set(setup["options"]["packages"].split()) == expected


def test_no_two_rooms_are_one() -> None:
    everything = list(itertools.chain(*ROOMS))
    assert len(everything) == len(set(everything))
