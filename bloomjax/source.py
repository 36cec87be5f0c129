"""A model from wherever it is, in whatever format, straight onto a mesh.

The one invariant: what will not fit is refused before any of it is fetched or allocated. How
tensors travel is `decode.reading`.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bloomjax import checkpoint, memory, model
from bloomjax.attention import attend
from bloomjax.config import ModelConfig
from bloomjax.data.tokenizer import Tokenizer, tokenizer_of
from bloomjax.decode import beam
from bloomjax.decode.beam import Beams, Hypothesis
from bloomjax.decode.cache import empty_cache
from bloomjax.decode.engine import Engine, Fresh, Request, check
from bloomjax.decode.params import bytes_per_device
from bloomjax.decode.programs import LogitsFn, round_up
from bloomjax.decode.reading import abstract_of, largest_tensor, read_params
from bloomjax.decode.sampling import GREEDY, Sampling
from bloomjax.decode.steps import CachedSteps
from bloomjax.errors import DoesNotFitError, InputError
from bloomjax.formats import hub
from bloomjax.formats.gguf import GGUFReader
from bloomjax.formats.hf import HFPromise, HFReader
from bloomjax.formats.megatron import MegatronReader
from bloomjax.formats.orbax import TOKENIZERS, OrbaxReader
from bloomjax.formats.tensors import Reader
from bloomjax.metrics import amount
from bloomjax.model import Params
from bloomjax.sharding import decode_mesh, on_cpu, split_of

log = logging.getLogger("bloomjax")

BEAMS = Beams()


def most_slots() -> int:
    """Texts that are written at a time, at most: of more, each gets slower on CPU."""
    return 8 if on_cpu() else 32


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

    def engine(self, slots: int, length: int, cache_dtype: str = "auto", **options: Any) -> Engine:
        """An engine for requests of up to `length` tokens; see `decode.engine.Engine`.

        DoesNotFitError if its cache is larger than the memory that is left.
        """
        cache = CacheSize(slots, length, cache_dtype)
        needed = cache_bytes(self.config, self.mesh, cache)
        free = memory.free(self.mesh.local_devices)
        if free is not None and needed > free:
            raise DoesNotFitError(
                f"expected {amount(needed)} of free memory on each device for the cache of {slots} "
                f"slots of {length} tokens, found {amount(free)}: take "
                + smaller_caches(self.config, self.mesh, cache, free)
            )
        options["cache_dtype"] = cache_dtype
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
        tokenizer's end of text. A `logits_fn` (see `decode.engine.Engine`) is compiled once for
        each function object. Raises InputError for an empty prompt, or ids out of range.
        """
        stops = self._stops(stop_ids)
        requests = [
            Request(prompt, max_new_tokens, sampling, seed + i, stops)
            for i, prompt in enumerate(prompts)
        ]
        length = max(map(len, prompts), default=0) + max_new_tokens
        slots = max(1, min(len(requests), most_slots()))
        for request in requests:
            check(request, self.config, length)
        engine = self.engine(slots, length, logits_fn=logits_fn)
        for request in requests:
            engine.submit(request)
        return engine.run()

    def search(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        beams: Beams = BEAMS,
        sampling: Sampling = GREEDY,
        *,
        stop_ids: Sequence[int] | None = None,
    ) -> list[list[Hypothesis]]:
        """The likeliest answers to each prompt, found by beam search; see `decode.beam.search`."""
        length = max(map(len, prompts), default=0) + max_new_tokens
        for prompt in prompts:
            check(Request(prompt, max_new_tokens, sampling), self.config, length)
        steps = CachedSteps(self.config, self.params, self.mesh, length)
        with jax.set_mesh(self.mesh):
            stops = self._stops(stop_ids)
            return beam.search(steps, prompts, max_new_tokens, beams, sampling, stops)

    def _stops(self, stop_ids: Sequence[int] | None) -> tuple[int, ...]:
        if stop_ids is None:
            return (self.tokenizer.eos_id,) if self.tokenizer else ()
        return tuple(stop_ids)


@jax.jit(static_argnums=0)
def _logits(config: ModelConfig, params: Params, tokens_BT: Any, segments_BT: Any) -> jax.Array:
    bloom = model.bind(config, params, unrolled=True)
    attention = functools.partial(
        attend, segments_BT=segments_BT, round_alibi=config.alibi_dtype == "compute"
    )
    return bloom.logits(
        bloom.decode(tokens_BT, lambda _, block, x_BSD: block(x_BSD, attention, letter="S"))
    )


class CacheSize(NamedTuple):
    """What an engine will need beside the weights; see `decode.engine.Engine`."""

    slots: int
    length: int
    dtype: str = "auto"


def load(
    source: str | Path,
    mesh: Mesh | None = None,
    dtype: str = "auto",
    quantize: str = "none",
    cache: CacheSize | None = None,
) -> Model:
    """The model at `source`, on the devices of `mesh` (default: all), laid out for decoding.

    `source` is what `open_source` takes. `dtype` is that of compute: "auto" is float32 on CPU and
    bfloat16 elsewhere. Matrices are held in it too, but for those that `quantize` makes int8 (a
    scale for every output) or int4 (for every 32 inputs; a GGUF file's blocks of as many bits stay
    as they are), and for 16-bit files on CPU with "auto", whose matrices stay in 16 bits.

    What this needs is logged, and compared with the memory there is, before any of it is taken;
    with the `cache` of an engine to come. Raises InputError if there is no model at `source`, or a
    broken one, and DoesNotFitError.
    """
    return opened(source, mesh, dtype, quantize).load(cache)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model before its weights are read: what it is, and what they need. Fields: see `load`."""

    source: str | Path
    reader: Reader
    config: ModelConfig
    mesh: Mesh
    quantize: str

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        return _tokenizer(self.reader.tokenizer(), Path(self.source))

    def room(self) -> int | None:
        """Bytes on each device that loading leaves free; below 0 if there are not enough, None if
        nobody says. Processes differ."""
        free = memory.free(self.mesh.local_devices)
        return None if free is None else free - sum(self._needs(self.quantize))

    def load(self, cache: CacheSize | None = None) -> Model:
        """See `load`."""
        needs = self.check_fits(cache)
        log.info(
            "%s: %s parameters; needs %s", self.source, f"{self.config.parameter_count:,}", needs
        )
        params = read_params(self.reader, self.config, self.mesh, self.quantize)
        commit = self.reader.origin.get("commit")
        origin = f"{self.source} (commit {commit})" if commit else str(self.source)
        return Model(self.config, params, self.mesh, self.tokenizer, origin)

    def _needs(self, quantize: str) -> tuple[int, int]:
        """Bytes on each device: of weights, and of what is beside them while they are read."""
        weights = abstract_of(self.reader, self.config, self.mesh, quantize)
        return bytes_per_device(weights), largest_tensor(self.reader, self.config, self.mesh)

    def check_fits(self, cache: CacheSize | None = None) -> str:
        """What the model needs, for people. DoesNotFitError if a device of this process has less,
        with what would fit: a smaller cache if the weights do."""
        weights, tensor = self._needs(self.quantize)
        slots = cache_bytes(self.config, self.mesh, cache) if cache else 0
        needed, free = weights + tensor + slots, memory.free(self.mesh.local_devices)
        what = f"{amount(weights)} of weights"
        what += f", {amount(slots)} of cache" if cache else ""
        what += f", {amount(tensor)} while they are read"
        where = f"on each of {self.mesh.size} devices"
        if free is None:
            return f"{what} {where}"
        if needed <= free:
            return f"{what} {where}, where {amount(free)} are free"
        room = free - weights - tensor
        if cache and room >= 0:
            advice = smaller_caches(self.config, self.mesh, cache, room)
        else:
            advice = f"{self._fewer_bits(free - slots)}a smaller model, or more devices"
        raise DoesNotFitError(
            f"{self.source}: expected {amount(needed)} of free memory {where} ({what}), found "
            f"{amount(free)}: take {advice}"
        )

    def _fewer_bits(self, room: int) -> str:
        """The flag, and a comma, of the most bits a weight that `room` bytes are enough for."""
        kinds = ("none", "int8", "int4")
        for quantize in kinds[kinds.index(self.quantize) + 1 :]:
            with contextlib.suppress(DoesNotFitError):  # int4, where groups do not divide
                if (needed := sum(self._needs(quantize))) <= room:
                    return f"--quantize={quantize} ({amount(needed)}), "
        return ""


def opened(
    source: str | Path, mesh: Mesh | None = None, dtype: str = "auto", quantize: str = "none"
) -> Opened:
    """What `load` does first: `open_source`, on a mesh. Weights of the Hub are not downloaded if by
    what is beside them they will not fit: DoesNotFitError."""
    devices = jax.devices() if mesh is None else list(mesh.devices.ravel())

    def on_mesh(reader: Reader) -> Opened:
        config = dataclasses.replace(reader.config, dtype=dtype)
        return Opened(source, reader, config, decode_mesh(config, devices), quantize)

    found = on_mesh(open_source(source, lambda promise: on_mesh(promise).check_fits()))
    if (used := found.mesh.size) < len(devices):
        log.info("%s does not divide over %d devices: %d are used", source, len(devices), used)
    return found


def cache_bytes(config: ModelConfig, mesh: Mesh, cache: CacheSize) -> int:
    """Of an engine's cache, on each device of `mesh`."""
    with jax.set_mesh(mesh):
        make = functools.partial(empty_cache, config, cache.slots, round_up(cache.length))
        return bytes_per_device(jax.eval_shape(functools.partial(make, cache.dtype)))


def smaller_caches(config: ModelConfig, mesh: Mesh, cache: CacheSize, room: int) -> str:
    """What to take where `cache` needs more than the `room` bytes that each device has for it."""
    ways = ["fewer tokens (--max_new_tokens)"]
    eight = cache._replace(dtype="int8")
    if cache != eight and (size := cache_bytes(config, mesh, eight)) <= room:
        ways.append(f"--cache_dtype=int8 ({amount(size)})")
    if cache.slots > 1:
        ways.append("fewer prompts or beams at a time")
    return ", or ".join(ways)


def open_source(
    source: str | Path, before_weights: Callable[[Reader], object] | None = None
) -> Reader:
    """What reads `source`: a training workdir or one of its checkpoints, a folder in Hugging Face's
    format, a GGUF file, a Megatron-DeepSpeed folder, or the id of a repository of the hub, with a
    revision if you like: "bigscience/bloom-560m-intermediate@global_step100000".

    Of files, headers are read; of our own checkpoints every byte, to be verified; and what the Hub
    has is downloaded first: `before_weights` is called when all but the weights is there, and may
    raise. InputError if there is no model there, and what `hub.fetch` raises.
    """
    path = Path(source)
    if checkpoint.is_run(path):
        return OrbaxReader(path)
    if path.is_file():
        return GGUFReader(path)
    if path.is_dir():
        return HFReader(path) if (path / "config.json").is_file() else MegatronReader(path)
    if isinstance(source, str) and hub.is_id(source):
        check = before_weights
        return HFReader(*hub.fetch(source, check and (lambda folder: check(HFPromise(folder)))))
    raise InputError(
        f"{source}: expected a training workdir, a folder of Hugging Face or Megatron-DeepSpeed, a "
        "GGUF file or the id of a repository (organisation/name), found nothing there"
    )


def _tokenizer(files: dict[str, bytes], folder: Path) -> Tokenizer | None:
    for name in TOKENIZERS:
        if name in files:
            return tokenizer_of(files[name], folder / name)
    return None
