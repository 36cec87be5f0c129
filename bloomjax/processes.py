"""The processes of a run: how they start, act as one, and stop together."""

import atexit
import contextlib
import ctypes
import faulthandler
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

from bloomjax import cluster, errors
from bloomjax.cluster import Place
from bloomjax.errors import ConfigError, PeerLostError, UserError

T = TypeVar("T")

JOIN_SECONDS = 300  # for the slowest machine to come
HEARTBEAT_SECONDS = 30  # without a sign of life, after which JAX takes a process for dead
# Where the process that fails first writes its exit code, for the others to leave with.
_FAILED = "bloomjax/failed"
_DAY = 24 * 3600 * 1000  # in ms
_over = threading.Event()  # this process leaves by itself
_told = threading.Event()  # ... and has said why
_calls = itertools.count()  # of on_first: the same on all processes


def start() -> None:
    """Join the other processes of this run, if the environment says that there are any.

    To be called before anything else touches JAX. ConfigError where the environment contradicts
    itself or another process; PeerLostError where the others are not to be found: process 0 cannot
    listen, somebody does not come, or it is somebody else who listens.
    """
    if jax.distributed.is_initialized():
        return
    place = cluster.place(JOIN_SECONDS)
    if place is None:
        return
    if place.index == 0:
        check_port(place)
    _answer_abort(_cannot_join(place))
    late = threading.Timer(JOIN_SECONDS, _give_up, [place])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            place.address,
            place.count,
            place.index,
            local_device_ids=place.gpus,
            cluster_detection_method="deactivate",
            initialization_timeout=JOIN_SECONDS + 60,  # we say it in one line, JAX in twenty
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=60,
        )
    except RuntimeError as error:
        cause = str(error).splitlines()[0]
        raise PeerLostError(f"{_cannot_join(place)} ({cause})") from error
    finally:
        late.cancel()
    who = f"process {place.index} of {place.count}"
    _answer_abort(f"{who} lost another process of this run (JAX says more above)", stacks=True)
    _keep_stdout()
    follower = threading.Thread(target=_follow, args=(distributed.global_state,), daemon=True)
    follower.start()
    atexit.register(follower.join, 5)
    atexit.register(_over.set)  # runs before the line above, and that before JAX's goodbye
    client: Any = distributed.global_state.client
    if place.index == 0:
        client.key_value_set("bloomjax/count", str(place.count))
    elif (count := client.blocking_key_value_get("bloomjax/count", 60_000)) != str(place.count):
        raise ConfigError(
            f"{who}: expected the number that process 0 has, found {count} there: start all with "
            "the same"
        )


def check_port(place: Place) -> None:
    """PeerLostError unless this process can listen where the others will look for it."""
    address = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", place.address)
    port = int(address.rpartition(":")[2])
    try:
        with socket.create_server(("", port), family=socket.AF_INET):
            pass
    except (OSError, OverflowError) as error:
        raise PeerLostError(
            f"process 0 of {place.count} cannot listen at {place.address}: {error}: choose another "
            "port (JAX_COORDINATOR_PORT, or in JAX_COORDINATOR_ADDRESS)"
        ) from error


def _cannot_join(place: Place) -> str:
    return (
        f"process {place.index} of {place.count} cannot join the others at {place.address}: is "
        "that process 0, and the number of processes the same for all?"
    )


def _give_up(place: Place) -> NoReturn:
    host, _, port = place.address.rpartition(":")
    line = f"process {place.index} of {place.count}: after {JOIN_SECONDS} s "
    if place.index == 0:
        line += f"not all of the others have come to {place.address}: did they start, and look "
        line += "there?"
    else:
        try:
            socket.create_connection((host.strip("[]"), int(port)), 5).close()
            line += f"somebody listens at {place.address}, but it is not process 0 of this run, or "
            line += "not all have come to it"
        except OSError as error:
            line += f"process 0 is not to be found at {place.address} ({error}): did it start?"
    print(f"bloomjax: {line}", file=sys.stderr, flush=True)
    os._exit(PeerLostError.exit_code)


_handler: Any = None  # what C calls must not be collected


def _answer_abort(line: str, stacks: bool = False) -> None:
    """Make this process's abort() say `line` and leave with the exit code of a lost peer.

    That is how JAX ends a process when process 0 is gone or another one sends no heartbeats. It
    takes a callback for that moment, but cannot call one of Python's (0.11.2).
    """
    global _handler

    def answer(number: int) -> None:
        if not _told.is_set():
            if stacks:
                faulthandler.dump_traceback(2)
            os.write(2, f"bloomjax: {line}: start all again\n".encode())
        os._exit(PeerLostError.exit_code)

    # By C's own signal(): a handler of Python's would wait for the main thread, abort() does not.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(answer)
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    _handler = handler


def _keep_stdout() -> None:
    """Standard output is for results: Gloo, which announces each connection there, loses it."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.close(nothing)


def _follow(state: Any) -> None:
    """Leave soon after another process has failed: it would be waited for in vain."""
    failed = None
    while failed is None and not _over.wait(0.5):
        try:
            failed = state.client.key_value_try_get(_FAILED)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                return  # process 0 is gone, which JAX notices too
    if failed is None or _over.is_set():
        return
    code, _, line = failed.partition(" ")
    if line:
        _dump(line)
    if state.process_id == 0:
        time.sleep(2)  # it holds what connects the others: they leave first
    os._exit(int(code))


def _dump(line: str) -> None:
    """The stacks of all threads on stderr, and `line` below."""
    _over.set()
    _told.set()
    faulthandler.dump_traceback(2)
    os.write(2, f"{line}\n".encode())


def stuck(line: str) -> NoReturn:
    """Leave with the stacks of all threads and `line` on stderr; the others do so too.

    From any thread, whatever the others do: nothing here waits for long.
    """
    _dump(line)
    state: Any = distributed.global_state
    if state.client is not None:

        def tell() -> None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                state.client.key_value_set(_FAILED, f"{PeerLostError.exit_code} {line}")

        # Process 0, which would take the call, may be the one that is stopped. If it is this one,
        # the others need it for a moment longer.
        threading.Thread(target=tell, daemon=True).start()
        time.sleep(2)
    os._exit(PeerLostError.exit_code)


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
    if first and not _told.is_set():
        _told.set()
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
