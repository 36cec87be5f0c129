"""Convert a BLOOM from any format to any other, in the memory of a few slices.

    python -m convert SRC DST --to=orbax|hf|megatron|gguf        (installed: bloomjax-convert)

SRC is a training workdir or one of its checkpoints, a folder in Hugging Face's format, a GGUF file,
a Megatron-DeepSpeed folder, or a repository of the hub: bigscience/bloom-560m@main. DST must not
exist; it appears when it is complete. What has an optimizer's state becomes, with --to=orbax, a
training state that `bloomjax.train --workdir=DST` continues; with a --dtype, parameters alone.
"""

import functools
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from bloomjax import cli
from bloomjax.errors import ConfigError
from bloomjax.formats import hub
from bloomjax.formats.gguf_file import KINDS as GGUF_KINDS
from bloomjax.formats.gguf_writer import FILE_TYPES, GGUFWriter
from bloomjax.formats.hf import HFWriter
from bloomjax.formats.megatron_writer import MegatronWriter
from bloomjax.formats.names import ROWS, TABLE
from bloomjax.formats.orbax import OrbaxWriter
from bloomjax.formats.tensors import DTYPES, KINDS, PARAMS, Reader, Writer
from bloomjax.metrics import amount, duration
from bloomjax.source import open_source

from . import job

# Bytes that a conversion needs at most, beside a few slices: Python, JAX and its libraries.
MEMORY = 1 << 30
FORMATS = ("orbax", "hf", "megatron", "gguf")


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("src", None, "what is converted, by place", flag_values=values)
    flags.DEFINE_string("dst", None, "what it becomes, by place", flag_values=values)
    flags.DEFINE_enum("to", None, FORMATS, "the format of DST", flag_values=values)
    flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", *DTYPES],
        "of DST; auto: as in SRC, float32 if SRC has several",
        flag_values=values,
    )
    flags.DEFINE_integer("tp", 1, "tensor parallel ranks (megatron)", flag_values=values)
    flags.DEFINE_integer("pp", 1, "pipeline stages (megatron)", flag_values=values)
    flags.DEFINE_enum("gguf_type", "f16", FILE_TYPES, "kind of file (gguf)", flag_values=values)
    flags.DEFINE_bool(
        "verify", False, "compare, and print hashes, tensor by tensor", flag_values=values
    )
    flags.DEFINE_bool("dry_run", False, "tell sizes, memory and time only", flag_values=values)


def main(values: flags.FlagValues) -> None:
    if values.to is None:
        raise ConfigError(f"--to is missing: expected one of {', '.join(FORMATS)}")
    for name, owner in (("tp", "megatron"), ("pp", "megatron"), ("gguf_type", "gguf")):
        if values[name].present and values.to != owner:
            raise ConfigError(f"--{name} is of --to={owner}, found --to={values.to}: leave it out")
    if values.to == "gguf" and values.dtype != "auto":
        raise ConfigError("--dtype and --to=gguf: expected --gguf_type instead")
    if jax.process_count() > 1:
        raise ConfigError("a conversion runs in one process: start it without JAX_NUM_PROCESSES")
    path = Path(os.path.abspath(values.dst))
    job.check_absent(path)
    if path.is_relative_to(Path(values.src).absolute()):
        raise ConfigError(f"{path}: expected a place outside of {values.src}, found one in it")
    if values.dry_run and hub.is_id(values.src) and not Path(values.src).exists():
        print(f"{hub.find(values.src)}; once it is there, its headers tell more")
        return
    reader = open_source(values.src)
    target = Target.of(values, reader)
    say = functools.partial(print, file=sys.stdout if values.dry_run else sys.stderr, flush=True)
    say(describe(values.src, reader, target))
    if values.dry_run:
        total, speed = job.size(reader, target.kinds), job.rate(reader, nearest(path))
        say(f"time: about {duration(total / speed)}, at the {speed / 1e6:,.0f} MB/s of a trial")
        return
    with job.appearing(path, target.size(reader)) as new:
        writer = target.writer(new, reader)
        digest = job.transfer(reader, writer, target.kinds)
        writer.finish(digest)
        if values.verify:
            job.verify(reader, writer, open_source(new), target.kinds)
    say(f"{path}: complete; sha256 of what was read {digest}")


class Target(NamedTuple):
    """What becomes of a model."""

    format: str
    kinds: tuple[str, ...]  # parameters alone, or a whole training state
    dtype: np.dtype
    tp: int
    pp: int
    gguf_type: str

    @classmethod
    def of(cls, values: flags.FlagValues, reader: Reader) -> "Target":
        asked = DTYPES.get(values.dtype)
        state = reader.progress is not None and values.to == "orbax" and asked is None
        stored = {reader.dtype(row) for row in TABLE}  # vectors of a GGUF file are float32
        auto = stored.pop() if len(stored) == 1 else DTYPES["float32"]
        dtype = DTYPES["float32"] if state else asked or auto
        kinds = KINDS if state else (PARAMS,)
        return cls(values.to, kinds, dtype, values.tp, values.pp, values.gguf_type)

    def size(self, reader: Reader) -> int:
        """Bytes, about."""
        each: float = self.dtype.itemsize
        if self.format == "gguf":
            kind = GGUF_KINDS[self.gguf_type.upper()]
            each = kind.size / kind.block
        return int(len(self.kinds) * reader.config.parameter_count * each)

    def __str__(self) -> str:
        if self.format == "gguf":
            return f"gguf, {self.gguf_type}"
        what = "a training state" if len(self.kinds) > 1 else "parameters"
        ranks = f", tensor {self.tp} x pipeline {self.pp}" if self.format == "megatron" else ""
        return f"{self.format}, {what} in {self.dtype}{ranks}"

    def writer(self, path: Path, reader: Reader) -> Writer:
        config, origin, files = reader.config, reader.origin, reader.tokenizer()
        about: dict[str, Any] = {
            "tokenizer": files,
            "origin": origin,
            "context_length": reader.context_length,
        }
        if self.format == "orbax":
            progress = reader.progress if len(self.kinds) > 1 else None
            return OrbaxWriter(path, config, self.dtype, progress=progress, **about)
        if self.format == "hf":
            return HFWriter(path, config, self.dtype, **about)
        if self.format == "megatron":
            step, samples, _ = reader.progress or (0, 0, 0)
            degrees = {"tp": self.tp, "pp": self.pp, "step": step, "samples": samples}
            return MegatronWriter(path, config, self.dtype, **degrees, origin=origin)
        return GGUFWriter(path, config, self.gguf_type, name=path.stem, **about)


def describe(source: str, reader: Reader, target: Target) -> str:
    """What is about to happen, and what it takes, in a few lines."""
    config = reader.config
    total, needed = job.size(reader, target.kinds), target.size(reader)
    return (
        f"from: {source} ({reader.format}, {amount(total)} {reader.dtype(ROWS['embed'])})\n"
        f"model: {config.parameter_count:,} parameters, {config.layers} layers of width "
        f"{config.width}, {config.heads} heads, {config.vocab_size:,} rows of vocabulary\n"
        f"to: {target}, {amount(needed)}; memory: at most {amount(MEMORY)}"
    )


def nearest(path: Path) -> Path:
    """The folder that is there, in which `path` would be made."""
    return next(parent for parent in path.parents if parent.is_dir())


def entry() -> None:
    cli.run(main, define, __doc__, operands=("src", "dst"))


if __name__ == "__main__":
    entry()
