"""What the entries share: flags, exit codes, and the line that an error is worth.

An entry defines its flags on a `FlagValues` of its own and hands `run` a main function; nothing
is global, so tests call entries in-process.
"""

import logging
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import jax
from absl import flags
from ml_collections import ConfigDict

from bloomjax import processes
from bloomjax.config import Config, freeze, read_value
from bloomjax.errors import ConfigError, PeerLostError, UserError
from bloomjax.folders import cache_folder

Define = Callable[[flags.FlagValues], None]


def define_config(values: flags.FlagValues) -> None:
    """The flags that `load_config` reads; `parse` turns --config.a.b=c into --set=a.b=c."""
    flags.DEFINE_string("config", None, "a file of configs/", flag_values=values)
    flags.DEFINE_multi_string(
        "set", [], "group.field=value; --config.group.field=value is the same", flag_values=values
    )


def load_config(values: flags.FlagValues) -> Config:
    """What the config file returns, with the overrides of the command line, checked and frozen.

    ConfigError in one line for whatever is wrong with either.
    """
    path = Path(values.config)
    if not path.is_file():
        raise ConfigError(f"--config={path}: expected a Python file, found nothing there")
    try:
        config = runpy.run_path(str(path))["get_config"]()
    except UserError:
        raise
    except Exception as error:
        what = f"no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        lines = [
            f.lineno
            for f in traceback.extract_tb(error.__traceback__)
            if f.filename == values.config
        ]
        where = f"{path}:{lines[-1]}" if lines else f"{path}"
        raise ConfigError(
            f"{where}: expected get_config() to return a ConfigDict, found {one_line(what)}"
        ) from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path}: expected get_config() to return a ConfigDict, found {config!r}")
    nested = config.to_dict()
    try:
        freeze(nested)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    for override in values.set:
        key, _, text = override.partition("=")
        group, _, field = key.partition(".")
        nested[group][field] = read_value(group, field, text)
    return freeze(nested)


def one_line(text: object) -> str:
    return " ".join(str(text).split())


def parse(
    argv: Sequence[str], define: Define, doc: str = "", operands: Sequence[str] = ()
) -> flags.FlagValues:
    """Command line -> flags; `operands` names those that are given by place.

    ConfigError in one line for anything unknown or unparsable."""
    values = flags.FlagValues()
    define(values)
    flags.DEFINE_bool("debug", False, "show the traceback of an error", flag_values=values)
    flags.DEFINE_bool("help", False, "show this help", flag_values=values, short_name="h")
    if "set" in values:
        argv = [re.sub("^--?config[.]", "--set=", arg) for arg in argv]
    try:
        rest = values(["bloomjax", *argv])
    except flags.Error as error:
        raise ConfigError(f"{one_line(error)} (--help lists the flags)") from error
    if values.help:
        print(doc.strip() + "\n\n" + values.get_help())
        raise SystemExit(0)
    given = rest[1:]
    if len(given) != len(operands):
        expected = f"{' '.join(map(str.upper, operands))} and --flag=value".removeprefix(" and ")
        found = f"{given[-1]!r} too" if len(given) > len(operands) else f"{len(given)} of them"
        raise ConfigError(f"expected {expected}, found {found} (--help lists the flags)")
    for name, value in zip(operands, given, strict=True):
        values[name].value = value
    return values


def run(
    main: Callable[[flags.FlagValues], None],
    define: Define,
    doc: str | None,
    argv: Sequence[str] | None = None,
    operands: Sequence[str] = (),
    join: bool = True,
) -> NoReturn:
    """Join the processes of this run (if `join`), parse, run, and leave with the exit code that the
    README lists."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if join:
            processes.start()
        with _log_on_stderr():
            main(parse(argv, define, doc or "", operands))
    except UserError as error:
        _leave(error, error.exit_code, f"bloomjax: {error}", argv)
    except BrokenPipeError as error:  # of `| head`, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the rest goes
        _leave(error, 141, "bloomjax: nobody reads what is written", argv)
    except KeyboardInterrupt as error:
        _leave(error, 130, "bloomjax: interrupted", argv)
    except SystemExit:
        raise
    except Exception as error:
        if processes.lost_another(error):
            line = f"lost another process of this run, or it got stuck: {one_line(error)[:200]}"
            _leave(error, PeerLostError.exit_code, f"bloomjax: {line}: start all again", argv)
        _leave(
            error, 1, f"bloomjax: a defect of ours: {type(error).__name__}: {one_line(error)}", argv
        )
    raise SystemExit(0)


def keep_compiled() -> str | None:
    """Keeps what is compiled from now on for the next start, and takes what is kept already; gives
    where. A folder that the user has given JAX stays; None: they want none, or have no home for it.

    The cache may be removed at any time. Every program counts, since on CPU they compile fast, and
    there are many.
    """
    folder = jax.config.values["jax_compilation_cache_dir"]
    if not folder:
        if (cache := cache_folder()) is None:
            return None
        folder = str(cache / "compiled")
        jax.config.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    return folder if jax.config.values["jax_enable_compilation_cache"] else None


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    log, handler = logging.getLogger("bloomjax"), logging.StreamHandler(sys.stderr)
    before = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False  # past absl's handler, which adds a prefix
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]


def _leave(error: BaseException, code: int, line: str, argv: Sequence[str]) -> NoReturn:
    if not {"--debug", "--debug=true"}.isdisjoint(argv):
        line = "".join(traceback.format_exception(error)) + line
    if jax.distributed.is_initialized():
        processes.abandon(code, line)
    print(line, file=sys.stderr, flush=True)
    raise SystemExit(code)
