"""The processes of a run: how they start, act as one, and stop together."""

import atexit
import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

from bloomjax import errors
from bloomjax.errors import ConfigError, PeerLostError, UserError

T = TypeVar("T")

# Where the process that fails first writes its exit code, for the others to leave with.
_FAILED = "bloomjax/failed"
_DAY = 24 * 3600 * 1000  # in ms
_over = threading.Event()  # this process leaves by itself
_calls = itertools.count()  # of on_first: the same on all processes


def start() -> None:
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
        cause = str(error).splitlines()[0]
        raise PeerLostError(f"process {index} of {count} cannot join {address}: {cause}") from error
    _keep_stdout()
    follower = threading.Thread(target=_follow, args=(distributed.global_state,), daemon=True)
    follower.start()
    atexit.register(follower.join)
    atexit.register(_over.set)  # runs before the line above, and that before JAX's goodbye


def _keep_stdout() -> None:
    """Standard output is for results: Gloo, which announces each connection there, loses it."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.close(nothing)


def _follow(state: Any) -> None:
    """Leave soon after another process has failed: it would be waited for in vain."""
    code = None
    while code is None and not _over.wait(0.5):
        try:
            code = state.client.key_value_try_get(_FAILED)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                return  # process 0 is gone, which JAX notices too
    if code is None or _over.is_set():
        return
    if state.process_id == 0:
        time.sleep(2)  # it holds what connects the others: they leave first
    os._exit(int(code))


def abandon(code: int, line: str) -> NoReturn:
    """Leave with `line` on stderr, after the others: for a process that has joined others.

    They may wait for this one in a collective, so an orderly shutdown would hang; they follow with
    the same code. Of several that fail together, one speaks.
    """
    state: Any = distributed.global_state
    _over.set()
    try:
        state.client.key_value_set(_FAILED, str(code))
        first = True
    except jax.errors.JaxRuntimeError as error:
        first = "ALREADY_EXISTS" not in str(error)
    if state.process_id == 0:
        time.sleep(2)  # the others leave first, in silence
    if first:
        print(line, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def lost_another(error: Exception) -> bool:
    """Whether `error` is how JAX says that another process does not answer."""
    signs = ("Gloo", "gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat")
    joined = distributed.global_state.client is not None
    known = isinstance(error, jax.errors.JaxRuntimeError)
    return joined and known and any(sign in str(error) for sign in signs)


def on_first(action: Callable[[], T]) -> T:
    """What `action` gives on process 0 (JSON), on every process; its UserError is raised on all.

    It may take hours: the others wait for an entry of the coordinator's table, not in a collective,
    for which Gloo waits 30 s.
    """
    state: Any = distributed.global_state
    if state.client is None:
        return action()
    key = f"bloomjax/first/{next(_calls)}"
    if state.process_id == 0:
        answer: dict[str, Any] = {}
        try:
            answer["value"] = action()
        except UserError as error:
            answer["error"] = [type(error).__name__, str(error)]
        text = json.dumps(answer)
        state.client.key_value_set(key, text)
    else:
        text = state.client.blocking_key_value_get(key, _DAY)
    answer = json.loads(text)
    if "error" in answer:
        name, line = answer["error"]
        raise getattr(errors, name)(line)
    return answer["value"]


class Stop:
    """Whether SIGTERM or Ctrl-C asked to stop, agreed on by all processes; a second one kills.

    stop = Stop()  # listens from here on
    with stop:
        for step in ...:
            if stop.now(step): save and leave
    """

    def __init__(self) -> None:
        self.interrupted = False  # by Ctrl-C, here
        self._asked = False
        self._alone = jax.process_count() == 1
        self._before = {signal.SIGINT: signal.signal(signal.SIGINT, self._ask)}
        if self._alone:  # JAX itself listens to SIGTERM where it has other processes to tell
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._ask)

    def __enter__(self) -> "Stop":
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
        self.interrupted = number == signal.SIGINT
        print("\nstopping after this step (again: at once)", file=sys.stderr, flush=True)
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def now(self, step: int) -> bool:
        """To be called by every process once a step, with the same steps."""
        return self._asked if self._alone else multihost_utils.reached_preemption_sync_point(step)
