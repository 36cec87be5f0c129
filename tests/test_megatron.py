"""Megatron-DeepSpeed's folders: what is written is read back bit for bit at any degrees, and what
BigScience's stack would have written gives the parameters and moments that it was made from."""

import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import model_config
from hostile import refused, survives
from oracles import megatron_tensors as made
from oracles.weights import hf_weights

from bloomjax.config import ModelConfig
from bloomjax.errors import ConfigError
from bloomjax.formats import megatron, torchfile, zero
from bloomjax.formats.megatron import MegatronReader
from bloomjax.formats.megatron_writer import MegatronWriter
from bloomjax.formats.tensors import KINDS, Progress, Stored, order
from bloomjax.formats.torchfile import Planned, TorchWriter, read_torch

BFLOAT16 = ml_dtypes.bfloat16
SHAPES = (
    {"layers": 3, "width": 20, "heads": 4, "vocab_size": 24},  # heads of 5
    {"layers": 2, "width": 36, "heads": 12, "vocab_size": 40},
)


def written(folder: Path, config: ModelConfig, tensors: dict, dtype: type, **kwargs: int) -> Path:
    """Rows of the tensors through a MegatronWriter into `folder`."""
    writer = MegatronWriter(
        folder, config, np.dtype(dtype), origin={"path": "somewhere"}, step=3, samples=96, **kwargs
    )
    for row, layer in order(config):
        for start, stop in writer.parts(row):
            writer.write(row, layer, start, tensors[row.hf.format(layer)][start:stop])
    writer.finish("1234")
    return folder


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=["heads4", "heads12"])
def test_round_trip(
    tmp_path: Path, shape: dict, dtype: type, tp: int, pp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # parts that straddle ranks
    monkeypatch.setattr("bloomjax.formats.megatron_writer.PART_BYTES", 300)
    config = model_config(**shape, layer_norm_epsilon=1e-6)
    tensors = hf_weights(shape["layers"], shape["width"], shape["vocab_size"], 0)
    tensors = {name: a.astype(dtype) for name, a in tensors.items()}
    reader = MegatronReader(written(tmp_path, config, tensors, dtype, tp=tp, pp=pp))
    assert reader.config == model_config(**shape, layer_norm_epsilon=1e-6, dtype="auto")
    assert reader.progress is None
    for row, layer in order(config):
        expected = tensors[row.hf.format(layer)]
        for start, stop in ((0, len(expected)), (1, 2), (3, len(expected) - 1), (2, 2)):
            rows = reader.read(row, layer, start, stop)
            assert rows.dtype == reader.dtype(row) == dtype
            assert np.array_equal(rows, expected[start:stop])


def test_degrees_must_divide(tmp_path: Path) -> None:
    config = model_config(**SHAPES[0])
    for degrees in ({"tp": 3, "pp": 1}, {"tp": 8, "pp": 1}, {"tp": 1, "pp": 4}, {"tp": 0, "pp": 1}):
        with pytest.raises(ConfigError, match="expected"):
            written(tmp_path, config, {}, np.float32, **degrees)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests/oracles/megatron_folder.py made with torch: TP 2 x PP 2 x DP 2."""
    path = tmp_path_factory.mktemp("megatron")
    with tarfile.open(Path(__file__).parent / "golden" / "megatron_folder.tar.xz") as tar:
        tar.extractall(path, filter="data")
    return path


@pytest.mark.parametrize("name", ["", "global_step7", "global_step7_universal"])
def test_moments_are_those_of_the_whole_model(folder: Path, name: str) -> None:
    reader = MegatronReader(folder / name)
    assert reader.config == model_config(
        layers=2, width=12, heads=4, vocab_size=20, dtype="auto", init_std=0.0048,
        hidden_dropout=0.1, attention_dropout=0.1,
    )  # fmt: skip
    assert reader.progress == Progress(made.STEP, made.SAMPLES)
    expected = made.tensors(made.LAYERS, made.WIDTH, made.VOCAB_SIZE)
    for kind, state in zip(KINDS, made.STATES, strict=True):
        for row, layer in order(reader.config):
            whole = expected[state][row.hf.format(layer)]
            for start, stop in ((0, len(whole)), (5, 6), (3, len(whole) - 1)):
                rows = reader.read(row, layer, start, stop, kind)
                assert rows.dtype == reader.dtype(row, kind) == np.float32
                assert np.array_equal(rows, whole[start:stop]), (kind, row.path)


@pytest.mark.parametrize("name", ["", "tp4"])
def test_layer_files_are_merged_as_the_hubs_converter_did(
    folder: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With optimizer files of fp16 ZeRO, which are left out: weights are those of layer files."""
    for file in (folder / name / "global_step7").iterdir():
        (tmp_path / file.name.removeprefix("bf16_")).write_bytes(file.read_bytes())
    reader = MegatronReader(tmp_path)
    (line,) = caplog.messages
    assert "fp16 ZeRO" in line and reader.progress is None
    expected = read_torch(folder / name / "converted.pt")
    for row, layer in order(reader.config):
        whole = expected[row.hf.format(layer)]
        whole = whole.rows(0, whole.shape[0])
        rows = reader.read(row, layer, 0, len(whole))
        assert rows.dtype == whole.dtype == BFLOAT16
        assert np.array_equal(rows, whole)


def _copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def test_a_lost_file_is_named(folder: Path, tmp_path: Path) -> None:
    step = _copy(folder, tmp_path) / "global_step7"
    for name, found in (
        ("layer_03-model_01-model_states.pt", "ranks 1, 1"),
        ("bf16_zero_pp_rank_1_mp_rank_02_optim_states.pt", "ranks 2, 1"),
        ("mp_rank_00_model_states.pt", "num_attention_heads"),
    ):
        data = (step / name).read_bytes()
        (step / name).unlink()
        refused(lambda: MegatronReader(step), "expected", found)
        (step / name).write_bytes(data)
    for rank in (0, 1):
        (step / f"layer_04-model_{rank:02d}-model_states.pt").unlink()
    refused(lambda: MegatronReader(step), "4.input_layernorm.weight is missing")


def test_a_lost_file_of_the_universal_form(folder: Path, tmp_path: Path) -> None:
    step = _copy(folder, tmp_path) / "global_step7_universal"
    (step / "zero" / "4.mlp.dense_4h_to_h.bias" / "exp_avg.pt").unlink()
    refused(lambda: MegatronReader(step), "4.mlp.dense_4h_to_h.bias is missing")


def test_pointers_stay_in_their_folder(folder: Path, tmp_path: Path) -> None:
    copy = _copy(folder, tmp_path)
    (tmp_path / "outside").mkdir()
    for tag in ("../outside", str(tmp_path / "outside"), "", ".", "..", "global_step8", "x" * 5000):
        (copy / "latest").write_text(tag)
        refused(lambda: MegatronReader(copy), "expected the name of a folder")
    (copy / "latest").unlink()
    assert MegatronReader(copy).origin["name"] == "global_step7_universal"


def test_other_folders_are_refused(tmp_path: Path) -> None:
    refused(lambda: MegatronReader(tmp_path), "neither layer files nor `latest`")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    refused(lambda: MegatronReader(tmp_path), "Megatron without DeepSpeed")


def _save(path: Path, tree: Any) -> None:
    """With zeros for tensors."""
    writer, leaves = TorchWriter(path, tree), [tree]
    while leaves:
        leaf = leaves.pop(0)
        if isinstance(leaf, Planned):
            writer.write(np.zeros(leaf.shape, leaf.dtype))
        elif isinstance(leaf, dict | list):
            leaves[:0] = leaf.values() if isinstance(leaf, dict) else leaf
    writer.finish()


@pytest.mark.parametrize(
    ("args", "found"),
    [
        ({"num_attention_heads": 10**9}, "heads"),
        ({"num_attention_heads": 5}, "divide"),
        ({"num_attention_heads": "4"}, "heads"),
        ({"num_attention_heads": 4, "layernorm_epsilon": 0.0}, "epsilon"),
        ({"num_attention_heads": 4, "layernorm_epsilon": float("nan")}, "layernorm_epsilon"),
        ({"num_attention_heads": 4, "hidden_dropout": [1]}, "hidden_dropout"),
        ({"num_attention_heads": 4}, "iteration"),
        ([], "num_attention_heads"),
    ],
)
def test_absurd_arguments(folder: Path, tmp_path: Path, args: Any, found: str) -> None:
    step = _copy(folder, tmp_path) / "global_step7"
    _save(step / "mp_rank_00_model_states.pt", {"args": args})
    refused(lambda: MegatronReader(step), found)


def _optimizer(**changes: Any) -> dict[str, Any]:
    flat = Planned(np.dtype(np.float32), (100,))
    fields = {
        "single_partition_of_fp32_groups": [flat],
        "base_optimizer_state": {"state": {0: {"exp_avg": flat, "exp_avg_sq": flat}}},
        "param_slice_mappings": [{}],
    }
    return {"optimizer_state_dict": fields | changes}


@pytest.mark.parametrize(
    ("tree", "found"),
    [
        ([], "another optimizer"),
        ({"optimizer_state_dict": 5}, "another optimizer"),
        (_optimizer(param_slice_mappings=7), "another optimizer"),
        (_optimizer(param_slice_mappings=[{"x": {"start": 0, "numel": 9}}]), "another optimizer"),
        (_optimizer(base_optimizer_state={"state": []}), "another optimizer"),
        (_optimizer(param_slice_mappings=[{5: None}]), "no name"),
        (_optimizer(), "elements of"),
    ],
)
def test_absurd_optimizer_files(folder: Path, tmp_path: Path, tree: Any, found: str) -> None:
    step = _copy(folder, tmp_path) / "global_step7"
    _save(step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", tree)
    refused(lambda: MegatronReader(step), found)


@pytest.mark.parametrize(
    "changes",
    [
        *({"numel": 10**9}, {"start": -1}, {"start": 10**9}, {"numel": -5}, {"numel": None}),
        *({"start": True}, {"start": "0"}, {"start": 1 << 70}),
    ],
    ids=str,
)
def test_pieces_stay_in_their_partition(
    folder: Path, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path) -> Any:
        tree = read_torch(path)
        if "optim" in path.name:
            mapping = tree["optimizer_state_dict"]["param_slice_mappings"][0]
            next(iter(mapping.values())).state.update(changes)
        return tree

    monkeypatch.setattr("bloomjax.formats.zero.read_torch", read)
    refused(lambda: MegatronReader(folder), "outside of its partition")


def test_layers_of_other_shapes(folder: Path, tmp_path: Path) -> None:
    step = _copy(folder, tmp_path) / "global_step7"
    f32, name = np.dtype(np.float32), "layer_06-model_01-model_states.pt"
    for tree, found in (
        ({"weight": Planned(f32, (12,)), "bias": Planned(f32, (13,))}, "6.bias in one shape"),
        ({"weight": Planned(f32, (12,)), "bias": Planned(f32, (12,))}, "the same in all layers"),
        ({"weight": Planned(f32, (12,)), "bias": "x"}, "tensors by name"),
        ([], "tensors by name"),
        ({"weight": Planned(f32, (12,))}, "6.bias in one shape"),
        ({"weight": Planned(f32, (12,)), "x": Planned(f32, (12,))}, "6.bias in one shape"),
    ):
        for file in step.glob("bf16_*"):
            file.unlink()
        _save(step / name, tree)
        refused(lambda: MegatronReader(step), found)


def test_where_it_came_from_is_kept(tmp_path: Path) -> None:
    tensors = hf_weights(3, 20, 24, 0)
    folder = written(tmp_path / "x", model_config(**SHAPES[0]), tensors, np.float32, tp=1, pp=1)
    assert MegatronReader(folder).origin == {
        "format": "megatron",
        "name": "global_step3",
        "iteration": 3,
        "source": {"path": "somewhere", "sha256": "1234"},
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16_zero_pp_rank_1_mp_rank_02_optim", "mp_rank_00_model"])
def test_mutated_pickles(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a damaged file gives is judged before it is used."""
    file = folder / "global_step7" / f"{name}_states.pt"
    step = tmp_path / "step"
    step.mkdir()
    shutil.copy(file, step / "mp_rank_00_model_states.pt")
    with zipfile.ZipFile(file) as archive:
        seed = archive.read(f"{file.stem}/data.pkl")

    def read(path: Path) -> None:
        data = {16: b"little", torchfile.PICKLE_BYTES: path.read_bytes()}
        monkeypatch.setattr(torchfile, "content", lambda path, member, limit: data[limit])
        if "optim" in name:
            list(zero._pieces(file))
        else:
            state = megatron._state(step)
            tensors = {
                f"6.{x}": [Stored(file, 0, np.dtype("f"), (12,))] for x in ("weight", "bias")
            }
            embed = Stored(file, 0, np.dtype("f"), (20, 12))
            tensors["tied_modules.embed.word_embeddings.weight"] = [embed]
            megatron._config(step, tensors, state)
            megatron._progress(step, state)
            megatron._origin(step, state)

    assert survives(read, [seed], tmp_path / "x.pkl") > 2000
