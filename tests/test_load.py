"""`bloomjax.load` of every format: the same weights on any mesh, quantised or not; every byte read
once; what does not fit is refused before it is read."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from foreign import Memory, copy
from helpers import forward, from_hf, model_config, widened_hf

import bloomjax
from bloomjax import memory
from bloomjax.config import MeshConfig, base_config, freeze
from bloomjax.decode.reading import read_params
from bloomjax.errors import ConfigError, DoesNotFitError, InputError
from bloomjax.formats.gguf import GGUFReader
from bloomjax.formats.gguf_writer import GGUFWriter
from bloomjax.formats.hf import HFWriter
from bloomjax.formats.megatron_writer import MegatronWriter
from bloomjax.formats.names import ROWS
from bloomjax.formats.orbax import OrbaxWriter
from bloomjax.formats.tensors import DTYPES, order
from bloomjax.kernels.packing import quantise
from bloomjax.sharding import decode_mesh, make_mesh
from bloomjax.source import CacheSize, open_source

CONFIG = model_config(layers=3, width=64, heads=8, vocab_size=96)
FLAT = model_config(layers=2, width=256, heads=2, vocab_size=80)  # 8 devices: 2 heads, 4 widths
ODD = model_config(layers=2, width=30, heads=3, vocab_size=31)
MESHES = [(CONFIG, 1), (CONFIG, 8), (FLAT, 8), (ODD, 3)]
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 24)).astype(np.int32)


def hf_folder(folder: Path, config: Any, dtype: str) -> Memory:
    source = Memory(config, dtype)
    copy(source, HFWriter(folder, config, DTYPES[dtype], tokenizer={}, origin={}))
    return source


def mesh_of(config: Any, devices: int) -> jax.sharding.Mesh:
    return decode_mesh(config, jax.devices()[:devices])


def matrices(params: Any) -> list[Any]:
    is_packed = lambda leaf: hasattr(leaf, "scales")  # noqa: E731
    return [leaf for leaf in jax.tree.leaves(params, is_leaf=is_packed) if is_packed(leaf)]


@pytest.mark.parametrize(("config", "devices"), MESHES)
@pytest.mark.parametrize(
    ("stored", "dtype", "held"),
    [
        ("float16", "auto", "float16"),  # compute is in float32 on CPU: nothing is lost
        ("float16", "float32", "float32"),
        ("float32", "auto", "float32"),
        ("float32", "bfloat16", "bfloat16"),
    ],
)
def test_parameters_are_placed_exactly(
    config: Any, devices: int, stored: str, dtype: str, held: str
) -> None:
    config = model_config(**{**vars(config), "dtype": dtype})
    source = Memory(config, stored)
    params = read_params(source, config, mesh_of(config, devices))
    assert {packed.values.dtype.name for packed in matrices(params)} == {held}
    found = widened_hf(params, config)
    for name, expected in source.tensors["params"].items():
        compute = "bfloat16" if dtype == "bfloat16" else "float32"
        like = DTYPES[held if expected.ndim == 2 else compute]
        assert found[name].dtype == like
        np.testing.assert_array_equal(found[name], expected.astype(like), name)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(("config", "devices"), [(FLAT, 8), (ODD, 3)])
def test_quantised_on_any_mesh_as_on_none(config: Any, devices: int, kind: str) -> None:
    source = Memory(config, "float16")
    if kind == "int4" and config is ODD:
        with pytest.raises(DoesNotFitError, match="inputs: int4 needs"):
            read_params(source, config, mesh_of(config, devices), kind)
        return
    params = read_params(source, config, mesh_of(config, devices), kind)
    for path in ("embed", "blocks.qkv_w", "blocks.down_w"):
        row = ROWS[path]
        packed = params["blocks"][1][path.partition(".")[2]] if row.stacked else params[path]
        whole = source.tensors["params"][row.hf.format(1)].astype(np.float32)
        values, scales = jax.jit(quantise, static_argnums=1)(jnp.asarray(whole), kind)
        np.testing.assert_allclose(packed.scales, scales, rtol=1e-6)
        same = np.asarray(packed.values) == np.asarray(values)  # but for ties, which may turn
        assert same.mean() > 0.99 and packed.values.dtype == values.dtype


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    ("kind", "quantize"), [("q8_0", "int8"), ("q5_0", "int8"), ("q4_0", "int4")]
)
def test_blocks_of_a_gguf_stay_what_they_are(
    tmp_path: Path, kind: str, quantize: str, devices: int
) -> None:
    """The weights are bit by bit what `gguf` makes of the file. The embedding, which such a file
    has in Q8_0, is quantised anew where that is not asked for."""
    path = tmp_path / "x.gguf"
    copy(Memory(FLAT), GGUFWriter(path, FLAT, kind, tokenizer={}, name="x", origin={}))
    reader = GGUFReader(path)
    params = read_params(reader, FLAT, mesh_of(FLAT, devices), quantize)
    found = widened_hf(params, FLAT)
    for row, layer in order(FLAT):
        if row is ROWS["embed"] and kind == "q4_0":
            continue
        name = row.hf.format(layer)
        expected = reader.read(row, layer, 0, row.shape(FLAT.sizes)[0])
        np.testing.assert_array_equal(found[name], expected, name)
    assert all(packed.scales.shape[1] > 1 for packed in matrices(params))


def test_every_format_gives_the_same(tmp_path: Path) -> None:
    source = hf_folder(tmp_path / "hf", CONFIG, "float16")
    half: Any = DTYPES["float16"]
    writers = {
        "gguf": GGUFWriter(tmp_path / "gguf", CONFIG, "f16", tokenizer={}, name="x", origin={}),
        "orbax": OrbaxWriter(
            tmp_path / "orbax", CONFIG, half, progress=None, tokenizer={}, origin={}
        ),
        "megatron": MegatronWriter(
            tmp_path / "megatron", CONFIG, half, tp=2, pp=1, origin={}, step=1, samples=0
        ),
    }
    for writer in writers.values():
        copy(source, writer)
    for quantize in ("none", "int8"):
        expected = bloomjax.load(tmp_path / "hf", quantize=quantize).params
        for name in writers:
            found = bloomjax.load(tmp_path / name, quantize=quantize)
            jax.tree.map(np.testing.assert_array_equal, found.params, expected)


FOUR = """
    import json, sys
    from pathlib import Path
    import jax, numpy as np
    import bloomjax
    from bloomjax.formats import tensors
    from bloomjax.sharding import act, put
    from test_load import TOKENS

    reads = []
    pread = tensors.pread_into

    def counted(file, offset, out):
        reads.append([Path(file).name, offset, out.nbytes])
        pread(file, offset, out)

    tensors.pread_into = counted
    model = bloomjax.load(sys.argv[1])
    logits = model(put(TOKENS, act("1S"), model.mesh))
    whole = jax.device_put(logits, jax.NamedSharding(model.mesh, jax.P()))
    # not on standard output, where Gloo speaks when it likes
    result = json.dumps([reads, np.asarray(whole)[:, ::6].tolist()])
    Path(sys.argv[2], str(jax.process_index())).write_text(result)
"""


@pytest.mark.slow
def test_four_processes_read_each_tensor_once(tmp_path: Path) -> None:
    """On 4 x 2 devices; vectors, which all devices hold, are read by all."""
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


def test_as_many_devices_as_divide_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two ways of 560m's heads, and of its width, whatever is left over; of processes, none is."""
    small = freeze(base_config("560m")).model
    found = {n: decode_mesh(small, jax.devices()[:n]).size for n in range(1, 9)}
    assert found == {1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 4, 8: 8}
    assert decode_mesh(ODD, jax.devices()[:7]).size == 6
    source = hf_folder(tmp_path / "hf", CONFIG, "float16")
    mesh = make_mesh(MeshConfig(data=3), jax.devices()[:3])
    with caplog.at_level(logging.INFO, "bloomjax"):
        model = bloomjax.load(tmp_path / "hf", mesh)
    (line,) = (r.getMessage() for r in caplog.records if "does not divide" in r.getMessage())
    assert "over 3 devices: 2 are used" in line
    expected = forward(from_hf(source.tensors["params"], CONFIG), CONFIG, TOKENS)
    np.testing.assert_allclose(model(TOKENS), expected, atol=1e-4)
    devices: Any = [SimpleNamespace(process_index=i // 2) for i in range(6)]
    with pytest.raises(ConfigError) as caught:
        decode_mesh(small, devices)
    line = str(caught.value)
    assert line.startswith("decoding on 6 devices: expected") and "have 4 devices" in line
    assert "data" not in line and "\n" not in line


@pytest.mark.parametrize("source", ["nowhere", "no/where/else", "a/b@c/d/../e"])
def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        bloomjax.load(source)
    assert "\n" not in str(caught.value) and source in str(caught.value)


def test_what_does_not_fit_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line that tells what there is, and what would fit."""
    hf_folder(tmp_path / "hf", FLAT, "float32")
    free = 8 * 2**20
    monkeypatch.setattr(memory, "host", lambda: memory.Host(2 * free, free, None))
    mesh = mesh_of(FLAT, 1)
    model = bloomjax.load(tmp_path / "hf", mesh, quantize="int8")
    with pytest.raises(DoesNotFitError, match=r"cache of 64 slots of 512 tokens, found 8\.39 MB"):
        model.engine(64, 512)
    with pytest.raises(
        DoesNotFitError, match=r"take fewer tokens .*, or --cache_dtype=int8 \(4\.3"
    ):
        model.engine(1, 4096)
    monkeypatch.setattr("bloomjax.source.read_params", lambda *_: pytest.fail("read"))
    with pytest.raises(DoesNotFitError) as caught:
        bloomjax.load(tmp_path / "hf", mesh, cache=CacheSize(8, 512))
    line = str(caught.value)
    assert "\n" not in line and "16.78 MB of cache" in line and "found 8.39 MB" in line
    # The weights fit: what helps is a smaller cache, though not one in eight bits here.
    assert line.endswith("fewer tokens (--max_new_tokens), or fewer prompts or beams at a time")
    with pytest.raises(DoesNotFitError, match=r"or --cache_dtype=int8 \(.* MB\)$"):
        bloomjax.load(tmp_path / "hf", mesh, quantize="int8", cache=CacheSize(1, 4096))
    monkeypatch.setattr(memory, "host", lambda: memory.Host(free, free - 3 * 2**20, None))
    with pytest.raises(DoesNotFitError, match=r"take --quantize=int8 .*, a smaller model"):
        bloomjax.load(tmp_path / "hf", mesh)
    monkeypatch.setattr(memory, "host", lambda: memory.Host(free, 2 * 2**20, None))
    for quantize in ("none", "int8"):
        with pytest.raises(DoesNotFitError, match="take --quantize=int4 "):
            bloomjax.load(tmp_path / "hf", mesh, quantize=quantize)
    monkeypatch.setattr(memory, "host", lambda: memory.Host(free, 2**20, None))
    with pytest.raises(DoesNotFitError, match=r"found 1\.05 MB: take a smaller model"):
        bloomjax.load(tmp_path / "hf", mesh)


PEAK = """
    import resource, sys
    import jax, numpy as np
    import bloomjax
    from bloomjax.decode.params import bytes_per_device
    from bloomjax.source import open_source

    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    jax.block_until_ready(jax.jit(lambda x: x + 1)(1))
    before = peak()
    model = bloomjax.load(sys.argv[1], quantize=sys.argv[2])
    jax.block_until_ready(model.params)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    print(peak() - before, held)
"""


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_memory_is_the_models_and_one_tensors(tmp_path: Path, quantize: str) -> None:
    config = model_config(layers=6, width=1024, heads=16, vocab_size=60_000)
    writer = HFWriter(tmp_path / "hf", config, DTYPES["float16"], tokenizer={}, origin={})
    writer.finish("0" * 64)  # of zeros, which take no disk
    (out,) = processes.launch(1, PEAK, tmp_path / "hf", quantize)
    grown, held = map(int, out.split())
    embedding = 2 * 1024 * 60_000
    assert held < 280e6 if quantize == "none" else held < 140e6
    assert grown < held + embedding + 50e6, (grown, held)


KEEP = """
    import jax
    from bloomjax import cli

    print(cli.keep_compiled())
    jax.jit(lambda x: 2 * x + 1)(1.5)
"""


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    theirs, home = tmp_path / "theirs", {"XDG_CACHE_HOME": str(tmp_path / "home")}
    for env, folder in (
        (home, tmp_path / "home" / "bloomjax" / "compiled"),
        ({**home, "JAX_COMPILATION_CACHE_DIR": str(theirs)}, theirs),
    ):
        kept = []
        for _ in range(2):
            child = processes.start(KEEP, env={"JAX_COMPILATION_CACHE_DIR": "", **env})
            assert child.communicate()[0].strip() == str(folder)
            kept.append({path.name: path.stat().st_mtime for path in folder.iterdir()})
        assert kept[0] == kept[1] and any("lambda" in name for name in kept[0])


@pytest.mark.parametrize(
    ("names", "limit"),
    [
        (("memory.max", "memory.current", "memory.stat"), "max"),
        (("memory.max", "memory.current", "memory.stat"), "4000000"),
        (memory._FILES[1], "9223372036854771712"),
        (memory._FILES[1], "4000000"),
    ],
)
def test_memory_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], limit: str
) -> None:
    """What files occupy in memory is free for whoever needs it."""
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    (tmp_path / "memory").mkdir()
    (tmp_path / "meminfo").write_text("MemTotal:  10000 kB\nMemAvailable:  8000 kB\n")
    stat = "anon 1000000\ninactive_file 700000\nactive_file 300000\n"
    for name, text in zip(names, (limit, "2500000", stat), strict=True):
        (tmp_path / name).write_text(text)
    expected = (4_000_000, 2_500_000) if limit == "4000000" else (None, 8_192_000)
    assert memory.host() == (10_240_000, expected[1], expected[0])
