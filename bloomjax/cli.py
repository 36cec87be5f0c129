"""What the entries share: flags, exit codes, and the line that an error is worth.

An entry defines its flags on a `FlagValues` of its own and hands `run` a main function; nothing
is global, so tests call entries in-process.
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax
from absl import flags

from bloomjax.errors import ConfigError, UserError

Define = Callable[[flags.FlagValues], None]


def parse(argv: Sequence[str], define: Define, doc: str = "") -> flags.FlagValues:
    """Command line -> flags. ConfigError in one line for anything unknown or unparsable."""
    values = flags.FlagValues()
    define(values)
    flags.DEFINE_bool("debug", False, "show the traceback of an error", flag_values=values)
    flags.DEFINE_bool("help", False, "show this help", flag_values=values, short_name="h")
    try:
        rest = values(["bloomjax", *argv])
    except (flags.Error, KeyError, AttributeError, OSError) as error:
        # config_flags answers a misspelt override with the nearest key, in an error of two lines
        words = " ".join(str(error.args[0] if error.args else error).split())
        kind = "unknown key " if isinstance(error, KeyError | AttributeError) else ""
        raise ConfigError(f"{kind}{words} (--help lists the flags)") from error
    if values.help:
        print(doc.strip() + "\n\n" + values.get_help())
        raise SystemExit(0)
    if len(rest) > 1:
        raise ConfigError(f"expected only --flag=value, found {rest[1]!r}")
    return values


def run(
    main: Callable[[flags.FlagValues], None],
    define: Define,
    doc: str | None,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Parse, run, and leave with the exit code that the README lists."""
    argv = sys.argv[1:] if argv is None else argv
    log = logging.getLogger("bloomjax")
    log.setLevel(logging.INFO)
    log.propagate = False  # past absl's handler, which adds a prefix
    log.addHandler(logging.StreamHandler(sys.stderr))
    try:
        main(parse(argv, define, doc or ""))
    except UserError as error:
        _leave(error, error.exit_code, f"bloomjax: {error}", argv)
    except KeyboardInterrupt as error:
        _leave(error, 130, "bloomjax: interrupted", argv)
    except SystemExit:
        raise
    except Exception as error:
        _leave(error, 1, f"bloomjax: a defect of ours: {type(error).__name__}: {error}", argv)
    raise SystemExit(0)


def _leave(error: BaseException, code: int, line: str, argv: Sequence[str]) -> NoReturn:
    if "--debug" in argv:
        raise error
    print(line, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        # The other processes wait for this one in a collective: an orderly shutdown would hang.
        os._exit(code)
    raise SystemExit(code)
