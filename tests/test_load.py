"""`bloomjax.load` of every format: the same logits, on any mesh; every byte read once."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import processes
import pytest
from foreign import Memory, copy
from helpers import forward, from_hf, model_config

import bloomjax
from bloomjax.config import MeshConfig
from bloomjax.errors import InputError
from bloomjax.formats.hf import HFWriter
from bloomjax.formats.tensors import DTYPES
from bloomjax.sharding import make_mesh
from bloomjax.source import open_source, read_params

CONFIG = model_config(layers=3, width=64, heads=8, vocab_size=96)
ODD = model_config(layers=2, width=30, heads=3, vocab_size=31)
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 24)).astype(np.int32)


def hf_folder(folder: Path, config: Any, dtype: str) -> Memory:
    source = Memory(config, dtype)
    copy(source, HFWriter(folder, config, DTYPES[dtype], tokenizer={}, origin={}))
    return source


@pytest.mark.parametrize(
    ("config", "mesh"),
    [
        *((CONFIG, mesh) for mesh in [(1, 1, 1), (1, 2, 4), (8, 1, 1), (1, 8, 1)]),
        *((ODD, mesh) for mesh in [(1, 1, 1), (4, 2, 1), (1, 3, 1)]),
    ],
)
def test_parameters_are_placed_exactly(config: Any, mesh: Any) -> None:
    source = Memory(config, "float16")
    devices = jax.devices()[: int(np.prod(mesh))]
    layout = MeshConfig(data=mesh[0], fsdp=mesh[1], tensor=mesh[2])
    params = read_params(source, config, make_mesh(layout, devices))
    expected = from_hf(source.tensors["params"], config)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


FOUR = """
    import json, sys
    from pathlib import Path
    import jax, numpy as np
    import bloomjax
    from bloomjax.config import MeshConfig
    from bloomjax.formats import tensors
    from bloomjax.sharding import act, make_mesh, put
    from test_load import TOKENS

    reads = []
    pread = tensors.pread_into

    def counted(file, offset, out):
        reads.append([Path(file).name, offset, out.nbytes])
        pread(file, offset, out)

    tensors.pread_into = counted
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    model = bloomjax.load(sys.argv[1], mesh, dtype="float32")
    logits = model(put(TOKENS, act("BT"), mesh))
    whole = jax.device_put(logits, jax.NamedSharding(mesh, jax.P()))
    # not on standard output, where Gloo speaks when it likes
    result = json.dumps([reads, np.asarray(whole)[:, ::6].tolist()])
    Path(sys.argv[2], str(jax.process_index())).write_text(result)
"""


def test_four_processes_read_each_tensor_once(tmp_path: Path) -> None:
    """2 fsdp x 4 tensor on 4 x 2 devices; vectors, which all devices hold, are read by all."""
    source = hf_folder(tmp_path / "hf", CONFIG, "float16")
    processes.launch(4, FOUR, tmp_path / "hf", tmp_path, devices=2, limit=240)
    results = [json.loads((tmp_path / str(i)).read_text()) for i in range(4)]
    (reads, logits), *others = results
    expected = forward(from_hf(source.tensors["params"], CONFIG), CONFIG, TOKENS)[:, ::6]
    for found in (logits, *(other[1] for other in others)):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    reads += [read for other in others for read in other[0]]
    size = (tmp_path / "hf" / "model.safetensors").stat().st_size
    times = np.zeros(size, np.int64)
    for _, offset, count in reads:
        times[offset : offset + count] += 1
    stored = open_source(tmp_path / "hf")
    assert len(stored._stored) == 12 * CONFIG.layers + 5  # type: ignore[attr-defined]
    for tensor in stored._stored.values():  # type: ignore[attr-defined]
        count = int(np.prod(tensor.shape)) * tensor.dtype.itemsize
        often = times[tensor.offset : tensor.offset + count]
        assert (often == (1 if len(tensor.shape) == 2 else 4)).all()


@pytest.mark.parametrize("source", ["nowhere", "no/where/else", "a/b@c/d/../e"])
def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        bloomjax.load(source)
    assert "\n" not in str(caught.value) and source in str(caught.value)
