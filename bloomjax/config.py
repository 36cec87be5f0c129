"""The configuration: five groups, every default in `base_config`, frozen at the door of `main`.

Letters (used everywhere: names, einsums, shapes, shardings): B batch, T query position, S key
position, D model, N heads, H head dim, F ffn, V vocabulary, L layers, 3 the q/k/v triple.
"""

import ast
import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from bloomjax.errors import ConfigError, InputError

# The six published models and the recipe that trained each (Megatron-DeepSpeed scripts tr11*).
# Ramp-up always starts at 192 sequences and lasts 9,765,625 samples; `steps` consumes the planned
# 220,000,000 samples (450B tokens).
_COLUMNS = ("layers", "width", "heads", "peak", "floor", "batch", "ramp_increment", "steps")
_ROWS = {
    "560m": (24, 1024, 16, 3.0e-4, 1e-5, 256, 32, 868_458),
    "1b1": (24, 1536, 16, 2.5e-4, 1e-5, 256, 16, 866_753),
    "1b7": (24, 2048, 16, 2.0e-4, 1e-5, 512, 16, 441_357),
    "3b": (30, 2560, 32, 1.6e-4, 1e-5, 512, 32, 442_197),
    "7b1": (30, 4096, 32, 1.2e-4, 1e-5, 512, 32, 442_197),
    "176b": (70, 14336, 112, 6.0e-5, 6e-6, 2048, 16, 115_312),
}
SIZES = {name: dict(zip(_COLUMNS, row, strict=True)) for name, row in _ROWS.items()}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    layers: int
    width: int
    heads: int
    vocab_size: int
    layer_norm_epsilon: float
    apply_residual_connection_post_layernorm: bool
    hidden_dropout: float
    attention_dropout: float
    init_std: float
    dtype: str
    alibi_dtype: str

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every letter that the architecture fixes."""
        return {
            "D": self.width,
            "N": self.heads,
            "H": self.width // self.heads,
            "F": 4 * self.width,
            "V": self.vocab_size,
            "L": self.layers,
            "3": 3,
        }

    @property
    def parameter_count(self) -> int:
        """V*D + 4D outside the blocks, 12D^2 + 13D in each."""
        D, V, L = self.width, self.vocab_size, self.layers
        return V * D + 4 * D + L * (12 * D * D + 13 * D)

    def flops_per_token(self, sequence_length: int, causal: bool) -> float:
        """FLOPs of training on one token, forward and backward, without recomputation.

        Six per weight of a matrix product (the head's too), and attention's 12 L D T, as PaLM
        (Chowdhery et al. 2022, appendix B) counts it; half of that if `causal`.
        """
        D, V, L = self.width, self.vocab_size, self.layers
        attention = 12 * L * D * sequence_length
        return 6 * (12 * L * D * D + V * D) + (attention / 2 if causal else attention)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    train: tuple[str, ...]
    heldout: tuple[str, ...]
    heldout_every: int
    exclude: tuple[str, ...]
    text_key: str
    tokenizer: str
    sequence_length: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    steps: int
    learning_rate: float
    min_learning_rate: float
    warmup_samples: int
    decay_samples: int
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    clip_norm: float
    ramp_start: int
    ramp_increment: int
    ramp_samples: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    stage: int = 1  # pipeline stages: of layers
    data: int = 1  # of the batch, each with weights of its own
    fsdp: int = 1  # of the batch, each with a share of the weights
    sequence: int = 1  # of the positions
    tensor: int = 1  # of heads, ffn and vocabulary


@dataclasses.dataclass(frozen=True)
class RunConfig:
    seed: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    keep_checkpoints: int
    remat: str
    accumulation: int
    workers: int
    profile_step: int
    watchdog: int


@dataclasses.dataclass(frozen=True)
class Config:
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    mesh: MeshConfig
    run: RunConfig

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain nested dictionaries, as `config.json` keeps them."""
        return dataclasses.asdict(self)


def base_config(size: str = "560m") -> ConfigDict:
    """All defaults: the published architecture and recipe of one of `SIZES`.

    Config files change what they need and return it. Raises ConfigError for an unknown size.
    """
    if size not in SIZES:
        raise ConfigError(f"unknown size {size!r}: expected one of {', '.join(SIZES)}")
    row = SIZES[size]
    return ConfigDict(
        {
            "model": {
                "layers": row["layers"],
                "width": row["width"],
                "heads": row["heads"],
                "vocab_size": 250_880,
                "layer_norm_epsilon": 1e-5,
                "apply_residual_connection_post_layernorm": False,
                "hidden_dropout": 0.0,  # as the published configs; Megatron's default was 0.1
                "attention_dropout": 0.0,
                "init_std": 0.0048,  # pretraining used sqrt(1 / (3 * 14336)) at every size
                "dtype": "auto",  # of compute: float32 on CPU, bfloat16 elsewhere
                "alibi_dtype": "float32",  # "compute" reproduces the reference's bf16 rounding
            },
            "data": {
                "train": (),  # files, folders, globs (text or JSONL), or one .bin/.idx prefix
                "heldout": (),  # the same, for held-out evaluation
                "heldout_every": 0,  # or: hold out every n-th document of `train`, by name's hash
                "exclude": (),  # globs over paths relative to a folder of `train` or `heldout`
                "text_key": "text",  # of JSONL rows
                "tokenizer": "",  # tokenizer.json, SentencePiece .model, or "train"
                "sequence_length": 2048,
                "batch_size": row["batch"],  # sequences a step
            },
            "optim": {
                "steps": row["steps"],
                "learning_rate": row["peak"],
                "min_learning_rate": row["floor"],
                "warmup_samples": 183_105,
                "decay_samples": 200_000_000,
                "beta1": 0.9,
                "beta2": 0.95,
                "epsilon": 1e-8,
                "weight_decay": 0.1,
                "clip_norm": 1.0,
                "ramp_start": 192,  # 0: no batch ramp-up
                "ramp_increment": row["ramp_increment"],
                "ramp_samples": 9_765_625,
            },
            # one axis may be -1: what remains
            "mesh": {"stage": 1, "data": 1, "fsdp": -1, "sequence": 1, "tensor": 1},
            "run": {
                "seed": 42,
                "log_every": 1,
                "eval_every": 1000,
                "checkpoint_every": 100,
                "keep_checkpoints": 2,
                "remat": "block",  # what the backward pass recomputes: none, dots, block
                "accumulation": 1,  # microbatches a step
                "workers": 0,  # processes that prepare batches; 0: threads of this one
                "profile_step": 0,  # trace this step for TensorBoard or xprof; 0: never
                "watchdog": 0,  # seconds without progress that end the run; 0: ten steps, 60 s
            },
        },
    )


def freeze(config: Mapping[str, Any]) -> Config:
    """ConfigDict or nested dictionaries -> a checked, frozen Config.

    Raises ConfigError, in one line, for unknown or missing keys and for values that cannot be.
    """
    groups = {f.name: f.type for f in dataclasses.fields(Config)}
    _same_keys("config", set(config), set(groups))
    built = {}
    for name, group in groups.items():
        assert isinstance(group, type)
        fields = {f.name: f.type for f in dataclasses.fields(group)}
        if not isinstance(config[name], Mapping | ConfigDict):
            raise ConfigError(f"config.{name} is {config[name]!r}: expected {', '.join(fields)}")
        values = dict(config[name])
        _same_keys(name, set(values), set(fields))
        built[name] = group(**{k: _typed(f"{name}.{k}", v, fields[k]) for k, v in values.items()})
    frozen = Config(**built)
    _check(frozen)
    return frozen


def read_value(group: str, field: str, text: str) -> Any:
    """`text` of a command line as the type of config.`group`.`field`.

    Several strings are separated by commas or written as Python does. ConfigError if there is no
    such field, with the nearest name, or if the text is no such value.
    """
    groups: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(Config)}
    _same_keys("config", {group}, set(groups), partly=True)
    fields: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(groups[group])}
    _same_keys(group, {field}, set(fields), partly=True)
    kind = fields[field]
    value: Any = text
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind in (int, float):
            return kind(text)
        if kind == tuple[str, ...]:
            written = text.startswith(("(", "["))
            value = ast.literal_eval(text) if written else tuple(filter(None, text.split(",")))
    except (ValueError, KeyError, SyntaxError) as error:
        name = "strings" if kind == tuple[str, ...] else kind.__name__
        raise ConfigError(f"config.{group}.{field} is {text!r}: expected {name}") from error
    return _typed(f"{group}.{field}", value, kind)


def _same_keys(where: str, found: set[str], expected: set[str], partly: bool = False) -> None:
    for key in sorted(found - expected):
        near = difflib.get_close_matches(key, expected, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(expected))}"
        raise ConfigError(f"unknown key {key!r} in {where}{hint}")
    if not partly and (missing := expected - found):
        raise ConfigError(f"{where} lacks {', '.join(sorted(missing))}: start from base_config()")


def _typed(name: str, value: Any, kind: Any) -> Any:
    if kind == tuple[str, ...]:
        values = (value,) if isinstance(value, str) else value
        if not isinstance(values, tuple | list) or not all(isinstance(v, str) for v in values):
            raise ConfigError(f"config.{name} is {value!r}: expected strings")
        return tuple(values)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"config.{name} is {value!r}: expected {kind.__name__}")
    return value


def _check(config: Config) -> None:
    model, data, optim, run = config.model, config.data, config.optim, config.run

    def need(ok: bool, name: str, expected: str) -> None:
        if not ok:
            group, field = name.split(".")
            found = getattr(getattr(config, group), field)
            raise ConfigError(f"config.{name} is {found!r}: expected {expected}")

    for name in ("layers", "width", "heads", "vocab_size"):
        need(getattr(model, name) >= 1, f"model.{name}", "at least 1")
    need(model.width % model.heads == 0, "model.heads", f"a divisor of width {model.width}")
    need(model.dtype in ("auto", "float32", "bfloat16"), "model.dtype", "auto, float32, bfloat16")
    need(model.alibi_dtype in ("float32", "compute"), "model.alibi_dtype", "float32 or compute")
    for name in ("hidden_dropout", "attention_dropout"):
        need(0 <= getattr(model, name) < 1, f"model.{name}", "a probability below 1")
    for name in ("sequence_length", "batch_size"):
        need(getattr(data, name) >= 1, f"data.{name}", "at least 1")
    need(optim.steps >= 1, "optim.steps", "at least 1")
    need(0 < model.layer_norm_epsilon < 1, "model.layer_norm_epsilon", "a number of 0 to 1")
    need(math.isfinite(optim.learning_rate), "optim.learning_rate", "a finite number")
    need(optim.decay_samples >= optim.warmup_samples, "optim.decay_samples", "warm-up or more")
    if optim.ramp_start:
        need(optim.ramp_start <= data.batch_size, "optim.ramp_start", "at most data.batch_size")
        need(optim.ramp_increment >= 1, "optim.ramp_increment", "at least 1")
        ramped = data.batch_size - optim.ramp_start
        need(
            ramped % optim.ramp_increment == 0,
            "optim.ramp_increment",
            f"a divisor of batch_size - ramp_start = {ramped}",
        )
    need(run.remat in ("none", "dots", "block"), "run.remat", "none, dots or block")
    for name in ("log_every", "checkpoint_every", "keep_checkpoints", "accumulation"):
        need(getattr(run, name) >= 1, f"run.{name}", "at least 1")
    for name in ("eval_every", "workers", "profile_step", "watchdog"):
        need(getattr(run, name) >= 0, f"run.{name}", "0 or more")


def read_config(path: Path) -> dict[str, Any]:
    """What a run's config.json holds, to be frozen or compared. InputError if it cannot be read."""
    try:
        saved = json.loads(path.read_text())
        if not isinstance(saved, dict):
            raise ValueError(f"not {type(saved).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: expected the configuration of a run, found {error}: bring it back from a "
            'copy, or from "config" in the manifest.json of a checkpoint'
        ) from error
    return saved


# What makes two models the same function of the same parameters; the rest is how they are run.
ARCHITECTURE = (
    *("layers", "width", "heads", "vocab_size", "layer_norm_epsilon"),
    "apply_residual_connection_post_layernorm",
)


# Nothing is allocated, or looped over, because a file says so: no BLOOM is larger than this.
LARGEST = {"layers": 1000, "width": 1 << 17, "heads": 1 << 10, "vocab_size": 1 << 24}


def architecture(model: ModelConfig) -> dict[str, Any]:
    """What a checkpoint has to say of its model; `read_model` takes it back."""
    return {name: getattr(model, name) for name in ARCHITECTURE}


def read_model(run: Path) -> ModelConfig:
    """The model of a run's config.json. What that does not say is as `base_config` has it.

    InputError if it cannot be read.
    """
    path = run / "config.json"
    saved = read_config(path).get("model")
    if not isinstance(saved, dict):
        raise InputError(f"{path}: expected the configuration of a run, found no model in it")
    return model_of(saved, path)


def model_of(saved: Mapping[str, Any], source: object) -> ModelConfig:
    """The ModelConfig of the group `model` of a saved configuration. InputError if it is none."""
    base = base_config()
    try:
        model = freeze(base.to_dict() | {"model": base.model.to_dict() | dict(saved)}).model
    except ConfigError as error:
        raise InputError(f"{source}: {error}") from error
    for name, most in LARGEST.items():
        if getattr(model, name) > most:
            raise InputError(
                f"{source}: expected model.{name} of at most {most}, found {getattr(model, name)}"
            )
    return model


def resume_differences(saved: Mapping[str, Any], now: Config) -> list[str]:
    """What forbids to continue a run of config `saved` (as `to_dict` gave it) with config `now`.

    `run.*`, `mesh.*`, a larger `optim.steps`, and what `saved` does not say (a converted checkpoint
    knows no data) may change; every other difference is returned as a line
    `group.key: saved -> now`.
    """
    lines = []
    for group, values in now.to_dict().items():
        before = saved.get(group)
        if group in ("mesh", "run") or before is None:
            continue
        # A converted checkpoint says what its model is, and no more of it.
        keys = set(before) if set(before) == set(ARCHITECTURE) else set(before) | set(values)
        for key in sorted(keys):
            old: Any = before.get(key)
            new: Any = values.get(key)
            old = tuple(old) if isinstance(old, list) else old
            longer = f"{group}.{key}" == "optim.steps" and isinstance(old, int) and new > old
            if old == new or longer:
                continue
            lines.append(f"{group}.{key}: {old!r} -> {new!r}")
    return lines
