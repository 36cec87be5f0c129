"""A model from wherever it is, straight onto a mesh.

A source is the workdir of a training run; the newest whole checkpoint counts.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from bloomjax import model
from bloomjax.checkpoint import restore
from bloomjax.config import MeshConfig, ModelConfig, freeze
from bloomjax.data.tokenizer import Tokenizer, load_tokenizer
from bloomjax.decode.engine import GREEDY, Engine, Fresh
from bloomjax.decode.sampling import Sampling
from bloomjax.errors import InputError
from bloomjax.model import Params
from bloomjax.sharding import make_mesh


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
    """The model of a training workdir on `mesh` (default: heads over as many devices as divide).

    `dtype` is that of compute: "auto" is float32 on CPU and bfloat16 elsewhere. Raises InputError
    if there is no model at `source`.
    """
    path = Path(source)
    if not (path / "config.json").is_file() or not (path / "checkpoints").is_dir():
        raise InputError(
            f"{source}: expected a training workdir (with config.json and checkpoints/), found "
            + ("another folder" if path.is_dir() else "nothing there")
        )
    saved = freeze(json.loads((path / "config.json").read_text())).model
    config = dataclasses.replace(saved, dtype=dtype)
    mesh = mesh or _tensor_mesh(config)
    like = {"params": model.abstract_params(config, mesh)}
    restored = restore(path / "checkpoints", like)
    if restored is None:
        raise InputError(f"{path}/checkpoints: expected a checkpoint, found none: train first")
    files = [path / "tokenizer.json", path / "tokenizer.model"]
    tokenizer = next((load_tokenizer(file) for file in files if file.is_file()), None)
    origin = f"{path} at step {restored.step}"
    return Model(config, restored.state["params"], mesh, tokenizer, origin)


def _tensor_mesh(config: ModelConfig) -> Mesh:
    sizes = config.sizes
    split = math.gcd(sizes["N"], sizes["F"], sizes["V"], jax.device_count())
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=split), jax.devices()[:split])
