"""What the entries share: flags, exit codes, the start of several processes, and how to stop.

An entry defines its flags on a `FlagValues` of its own and hands `run` a main function; nothing
is global, so tests call entries in-process.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import NoReturn

import jax
from absl import flags
from jax.experimental import multihost_utils

from bloomjax.errors import ConfigError, PeerLostError, UserError

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
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("bloomjax").setLevel(logging.INFO)
    try:
        main(parse(argv, define, doc or ""))
    except UserError as error:
        leave(error, error.exit_code, f"bloomjax: {error}", argv)
    except KeyboardInterrupt as error:
        leave(error, 130, "bloomjax: interrupted", argv)
    except SystemExit:
        raise
    except Exception as error:
        leave(error, 1, f"bloomjax: a defect of ours: {type(error).__name__}: {error}", argv)
    raise SystemExit(0)


def leave(error: BaseException, code: int, line: str, argv: Sequence[str]) -> NoReturn:
    if "--debug" in argv:
        raise error
    print(line, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        # The other processes wait for this one in a collective: an orderly shutdown would hang.
        os._exit(code)
    raise SystemExit(code)


def start_processes() -> None:
    """Join the other processes of this run, if the environment says that there are any.

    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID, as `launch/local.sh`
    sets them. To be called before anything else touches JAX.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address or jax.distributed.is_initialized():
        return
    try:
        count, index = (int(os.environ[f"JAX_{k}"]) for k in ("NUM_PROCESSES", "PROCESS_ID"))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            "JAX_COORDINATOR_ADDRESS is set: expected the integers JAX_NUM_PROCESSES and "
            f"JAX_PROCESS_ID beside it, found {error}"
        ) from error
    try:
        jax.distributed.initialize(address, count, index, initialization_timeout=120)
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        raise PeerLostError(
            f"process {index} of {count} cannot join {address}: {first_line}"
        ) from error


class Stop:
    """Whether SIGTERM or Ctrl-C asked to stop, agreed on by all processes; the second kills.

    with Stop() as stop:
        for step in ...:
            if stop.now(step): save and leave
    """

    def __enter__(self) -> "Stop":
        self._asked = False
        self._alone = jax.process_count() == 1
        self._before = {signal.SIGINT: signal.signal(signal.SIGINT, self._ask)}
        if self._alone:  # with several processes JAX itself listens to SIGTERM and tells the others
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            os._exit(130)
        self._asked = True
        print("\nstopping after this step (again: at once)", file=sys.stderr, flush=True)
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def now(self, step: int) -> bool:
        """To be called by every process once a step, with the same steps."""
        return self._asked if self._alone else multihost_utils.reached_preemption_sync_point(step)
