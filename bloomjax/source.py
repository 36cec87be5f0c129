"""A model from wherever it is, in whatever format, straight onto a mesh.

The one invariant: of a tensor of a foreign file, every process reads the rows that its devices
take, once; the devices turn them into our layout among themselves. No host ever holds more than
its share of one tensor.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bloomjax import checkpoint, model
from bloomjax.config import MeshConfig, ModelConfig
from bloomjax.data.tokenizer import Tokenizer, tokenizer_of
from bloomjax.decode.engine import Engine, Fresh
from bloomjax.decode.sampling import GREEDY, Sampling
from bloomjax.errors import ConfigError, InputError
from bloomjax.formats import hub
from bloomjax.formats.gguf import GGUFReader
from bloomjax.formats.hf import HFReader
from bloomjax.formats.megatron import MegatronReader
from bloomjax.formats.names import TABLE, Row, nest
from bloomjax.formats.orbax import TOKENIZERS, OrbaxReader, model_of_step, tokenizers
from bloomjax.formats.tensors import Reader
from bloomjax.model import Params
from bloomjax.sharding import check_divides, make_mesh, put


@dataclasses.dataclass(frozen=True)
class Model:
    """Parameters on a mesh, the architecture, and the tokenizer where the source has one."""

    config: ModelConfig
    params: Params
    mesh: Mesh
    tokenizer: Tokenizer | None
    origin: str  # what was loaded, for people

    def __call__(self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None) -> jax.Array:
        """float32 logits [B, T, V]. Segments keep sequences apart; 0 is padding, left or right."""
        with jax.set_mesh(self.mesh):
            return _logits(self.config, self.params, tokens_BT, segments_BT)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> Iterator[list[Fresh]]:
        """New tokens of each prompt as they come; see `decode.engine.Engine.generate`."""
        eos = self.tokenizer.eos_id if self.tokenizer else None
        engine = Engine(self.config, self.params, self.mesh)
        return engine.generate(prompts, max_new_tokens, sampling, seed=seed, eos_id=eos)


@jax.jit(static_argnums=0)
def _logits(config: ModelConfig, params: Params, tokens_BT: Any, segments_BT: Any) -> jax.Array:
    bloom = model.bind(config, params)
    return bloom.logits(bloom(tokens_BT, segments_BT=segments_BT))


def load(source: str | Path, mesh: Mesh | None = None, dtype: str = "auto") -> Model:
    """The model at `source`, on `mesh` (default: heads over as many devices as divide).

    `source` is what `open_source` takes. `dtype` is that of compute and of the parameters: "auto"
    is float32 on CPU and bfloat16 elsewhere. Raises InputError if there is no model at `source`,
    or a broken one.
    """
    path = Path(source)
    if checkpoint.is_run(path):
        return _load_run(path, mesh, dtype)
    reader = open_source(source)
    config = dataclasses.replace(reader.config, dtype=dtype)
    mesh = mesh or _tensor_mesh(config)
    params = read_params(reader, config, mesh)
    commit = reader.origin.get("commit")
    origin = f"{source} (commit {commit})" if commit else str(source)
    return Model(config, params, mesh, _tokenizer(reader.tokenizer(), path), origin)


def open_source(source: str | Path) -> Reader:
    """What reads `source`: a training workdir or one of its checkpoints, a folder in Hugging Face's
    format, a GGUF file, a Megatron-DeepSpeed folder, or the id of a repository of the hub, with a
    revision if you like: "bigscience/bloom-560m-intermediate@global_step100000".

    Headers are read, and of our own checkpoints every byte verified. InputError if there is no
    model there.
    """
    path = Path(source)
    if checkpoint.is_run(path):
        return OrbaxReader(path)
    if path.is_file():
        return GGUFReader(path)
    if path.is_dir():
        return HFReader(path) if (path / "config.json").is_file() else MegatronReader(path)
    if isinstance(source, str) and hub.is_id(source):
        return HFReader(*hub.fetch(source))
    raise InputError(
        f"{source}: expected a training workdir, a folder of Hugging Face or Megatron-DeepSpeed, a "
        "GGUF file or the id of a repository (organisation/name), found nothing there"
    )


def _load_run(path: Path, mesh: Mesh | None, dtype: str) -> Model:
    """Orbax reads our own layout as it is: every process its own shards."""
    folder, step = checkpoint.locate(path)
    _, meta = checkpoint.newest_meta(folder, step) or (0, {})
    config = model_of_step(meta, folder)
    config = dataclasses.replace(config, dtype=dtype)
    mesh = mesh or _tensor_mesh(config)
    shapes = model.abstract_params(config, mesh)

    def like(meta: dict[str, Any]) -> dict[str, Params]:
        return {"params": model.with_dtype(shapes, meta.get("params", "float32"))}

    restored = checkpoint.restore(folder, like, step)
    if restored is None:
        raise InputError(f"{folder}: expected a checkpoint, found none: train first")
    with jax.set_mesh(mesh):
        params = _cast(restored.state["params"], model.compute_dtype(config))
    files = tokenizers(folder)
    origin = f"{folder.parent} at step {restored.step}"
    return Model(config, params, mesh, _tokenizer(files, folder.parent), origin)


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def _cast(params: Params, dtype: Any) -> Params:
    return jax.tree.map(lambda p: p.astype(dtype), params)


def _tokenizer(files: dict[str, bytes], folder: Path) -> Tokenizer | None:
    for name in TOKENIZERS:
        if name in files:
            return tokenizer_of(files[name], folder / name)
    return None


def read_params(reader: Reader, config: ModelConfig, mesh: Mesh) -> Params:
    """All parameters on `mesh`, in the layout of training and the dtype of compute.

    Every process calls it. Of each tensor it reads the rows that fall to its devices, in the order
    of the mesh, so all of them read it once; vectors, which are small, are read by all.
    """
    check_divides(config, mesh)
    shapes, dtype = model.abstract_params(config, mesh), model.compute_dtype(config)
    flat = {}
    for row in TABLE:
        target: Any = functools.reduce(lambda node, key: node[key], row.path.split("."), shapes)
        spec = target.sharding.spec
        if not row.stacked:
            flat[row.path] = _on_mesh(reader, row, 0, config, mesh, spec, dtype)
            continue
        with jax.set_mesh(mesh):
            stack = jnp.zeros(target.shape, dtype, out_sharding=P(None, *spec[1:]))
        for layer in row.layers(config):
            value = _on_mesh(reader, row, layer, config, mesh, P(*spec[1:]), dtype)
            with jax.set_mesh(mesh):
                stack = _set_layer(stack, layer, value)
        flat[row.path] = jax.device_put(stack, target.sharding)
    return nest(flat)


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, layer: jax.Array, value: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)


def _on_mesh(
    reader: Reader, row: Row, layer: int, config: ModelConfig, mesh: Mesh, spec: P, dtype: Any
) -> jax.Array:
    """One layer's tensor in our layout, sharded by `spec`."""
    n, shape = config.sizes, row.shape(config.sizes)
    if len(shape) == 1:
        return put(row.to_ours(reader.read(row, layer, 0, shape[0]), n).astype(dtype), spec, mesh)
    # Rows are dealt to all devices alike, the last ones padded. How they come from there to where
    # they belong is left to the compiler, so these meshes are not explicit.
    flat = Mesh(mesh.devices.reshape(-1), ("rows",), axis_types=(AxisType.Auto,))
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    each = -(-shape[0] // mesh.size)
    by_rows = NamedSharding(flat, P("rows"))

    def rows(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(each * mesh.size)
        found = reader.read(row, layer, min(start, shape[0]), min(stop, shape[0]))
        missing = stop - start - len(found)
        return np.pad(found, ((0, missing), (0, 0))) if missing else found

    whole = each * mesh.size, shape[1]
    dealt = jax.make_array_from_callback(whole, by_rows, rows, dtype=reader.dtype(row))
    with jax.set_mesh(flat):
        value = _to_ours(row, tuple(n.items()), dtype, NamedSharding(auto, spec))(dealt)
    return jax.device_put(value, NamedSharding(mesh, spec))


@functools.cache
def _to_ours(
    row: Row, sizes: tuple[tuple[str, int], ...], dtype: Any, layout: NamedSharding
) -> Callable[[jax.Array], jax.Array]:
    n = dict(sizes)

    def to_ours(rows: jax.Array) -> jax.Array:
        return row.to_ours(rows[: row.shape(n)[0]].astype(dtype), n)

    return jax.jit(to_ours, out_shardings=layout)


def _tensor_mesh(config: ModelConfig) -> Mesh:
    sizes = config.sizes
    split = math.gcd(sizes["N"], sizes["F"], sizes["V"], jax.device_count())
    if split < jax.device_count() and jax.process_count() > 1:
        raise ConfigError(
            f"heads, ffn and vocabulary divide over {split} of {jax.device_count()} devices, so "
            "some processes would hold nothing: load onto a mesh of your own"
        )
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=split), jax.devices()[:split])
