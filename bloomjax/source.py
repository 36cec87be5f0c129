"""A model from wherever it is, in whatever format, straight onto a mesh.

The one invariant: of a tensor of a foreign file, every process reads the rows that its devices
take, once; the devices turn them into our layout among themselves. No host ever holds more than
its share of one tensor.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bloomjax import checkpoint, model
from bloomjax.attention import attend
from bloomjax.config import ModelConfig
from bloomjax.data.tokenizer import Tokenizer, tokenizer_of
from bloomjax.decode.engine import Engine, Fresh, Request
from bloomjax.decode.params import abstract_params, tree
from bloomjax.decode.programs import LogitsFn
from bloomjax.decode.sampling import GREEDY, Sampling
from bloomjax.errors import InputError
from bloomjax.formats import hub
from bloomjax.formats.gguf import GGUFReader
from bloomjax.formats.hf import HFReader
from bloomjax.formats.megatron import MegatronReader
from bloomjax.formats.names import Row
from bloomjax.formats.orbax import TOKENIZERS, OrbaxReader
from bloomjax.formats.tensors import Reader
from bloomjax.kernels.packed import Packed
from bloomjax.model import Params
from bloomjax.sharding import decode_mesh, put, split_of

# Prompts of `Model.generate` that run at a time.
MOST_SLOTS = 8


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
        T = tokens_BT.shape[1]
        with jax.set_mesh(self.mesh):
            more = [(0, 0), (0, -T % split_of("T"))]  # at the end, where no token sees it
            tokens_BT = jnp.pad(tokens_BT, more)
            segments_BT = None if segments_BT is None else jnp.pad(segments_BT, more)
            return _logits(self.config, self.params, tokens_BT, segments_BT)[:, :T]

    def engine(self, slots: int, length: int, **options: Any) -> Engine:
        """An engine for requests of up to `length` tokens; see `decode.engine.Engine`."""
        return Engine(self.config, self.params, self.mesh, slots=slots, length=length, **options)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        *,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
        logits_fn: LogitsFn | None = None,
    ) -> Iterator[Fresh]:
        """New tokens of each prompt as they come, `number` saying whose; the prompts run together.

        Prompt i is drawn with `seed` + i. A sequence ends before any of `stop_ids`, by default the
        tokenizer's end of text. Raises InputError for an empty prompt, or ids out of range.
        """
        if stop_ids is None:
            stop_ids = [self.tokenizer.eos_id] if self.tokenizer else []
        requests = [
            Request(prompt, max_new_tokens, sampling, seed + i, tuple(stop_ids))
            for i, prompt in enumerate(prompts)
        ]
        longest = max((len(prompt) for prompt in prompts), default=0) + max_new_tokens
        slots = min(len(requests), MOST_SLOTS)
        engine = self.engine(slots, longest, logits_fn=logits_fn)
        for request in requests:
            engine.submit(request)
        while engine.busy:
            yield from engine.step()


@jax.jit(static_argnums=0)
def _logits(config: ModelConfig, params: Params, tokens_BT: Any, segments_BT: Any) -> jax.Array:
    bloom = model.bind(config, params, unrolled=True)
    attention = functools.partial(
        attend, segments_BT=segments_BT, round_alibi=config.alibi_dtype == "compute"
    )
    return bloom.logits(bloom.decode(tokens_BT, lambda _: attention))


def load(source: str | Path, mesh: Mesh | None = None, dtype: str = "auto") -> Model:
    """The model at `source`, on the devices of `mesh` (default: all), laid out for decoding.

    `source` is what `open_source` takes. `dtype` is that of compute and of the parameters: "auto"
    is float32 on CPU and bfloat16 elsewhere. Raises InputError if there is no model at `source`,
    or a broken one.
    """
    reader = open_source(source)
    config = dataclasses.replace(reader.config, dtype=dtype)
    mesh = decode_mesh(config, jax.devices() if mesh is None else mesh.devices.ravel())
    params = read_params(reader, config, mesh)
    commit = reader.origin.get("commit")
    origin = f"{source} (commit {commit})" if commit else str(source)
    return Model(config, params, mesh, _tokenizer(reader.tokenizer(), Path(source)), origin)


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


def _tokenizer(files: dict[str, bytes], folder: Path) -> Tokenizer | None:
    for name in TOKENIZERS:
        if name in files:
            return tokenizer_of(files[name], folder / name)
    return None


def read_params(reader: Reader, config: ModelConfig, mesh: Mesh) -> Params:
    """All parameters on `mesh`, as decoding has them (`decode.params`).

    Every process calls it. Of each matrix it reads the rows that fall to its devices, in the order
    of the mesh, so all of them read it once; vectors, which are small, are read by all.
    """
    shapes = abstract_params(config, mesh)

    def leaf(row: Row, layer: int) -> Any:
        key = row.path.partition(".")[2]
        like: Any = shapes["blocks"][layer][key] if row.stacked else shapes[row.path]
        if isinstance(like, Packed):
            values = _matrix(reader, row, layer, config, mesh, like.values)
            return dataclasses.replace(like, values=values)
        vector = reader.read(row, layer, 0, row.shape(config.sizes)[0])
        ours = row.to_ours(vector, config.sizes).astype(like.dtype)
        return put(ours, like.sharding.spec, mesh)

    return tree(config, leaf)


def _matrix(
    reader: Reader, row: Row, layer: int, config: ModelConfig, mesh: Mesh, like: Any
) -> jax.Array:
    """One layer's matrix as `like` is, in shape, dtype and layout."""
    J, K = row.shape(config.sizes)
    # Rows are dealt to all devices alike, the last ones padded. How they come from there to where
    # they belong is left to the compiler, so these meshes are not explicit.
    flat = Mesh(mesh.devices.reshape(-1), ("rows",), axis_types=(AxisType.Auto,))
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    each = -(-J // mesh.size)

    def rows(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(each * mesh.size)
        found = reader.read(row, layer, min(start, J), min(stop, J))
        missing = stop - start - len(found)
        return np.pad(found, ((0, missing), (0, 0))) if missing else found

    by_rows = NamedSharding(flat, P("rows"))
    dealt = jax.make_array_from_callback(
        (each * mesh.size, K), by_rows, rows, dtype=reader.dtype(row)
    )
    with jax.set_mesh(flat):
        value = _placed(J, like.dtype, NamedSharding(auto, like.sharding.spec))(dealt)
    return jax.device_put(value, like.sharding)


@functools.cache
def _placed(J: int, dtype: Any, layout: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda rows: rows[:J].astype(dtype), out_shardings=layout)
