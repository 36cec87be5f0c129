"""The processes of a run: how they start, act as one, and stop together."""

import json
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from bloomjax import errors
from bloomjax.errors import ConfigError, PeerLostError, UserError

T = TypeVar("T")


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


def on_first(action: Callable[[], T]) -> T:
    """What `action` gives on process 0 (JSON), on every process; its UserError is raised on all."""
    if jax.process_count() == 1:
        return action()
    answer: dict = {}
    if jax.process_index() == 0:
        try:
            answer["value"] = action()
        except UserError as error:
            answer["error"] = [type(error).__name__, str(error)]
    data = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    data = np.resize(data, size)
    answer = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(data))))
    if "error" in answer:
        name, text = answer["error"]
        raise getattr(errors, name)(text)
    return answer["value"]


class Stop:
    """Whether SIGTERM or Ctrl-C asked to stop, agreed on by all processes; a second one kills.

    with Stop() as stop:
        for step in ...:
            if stop.now(step): save and leave
    """

    def __enter__(self) -> "Stop":
        self.interrupted = False  # by Ctrl-C, here
        self._asked = False
        self._alone = jax.process_count() == 1
        self._before = {signal.SIGINT: signal.signal(signal.SIGINT, self._ask)}
        if self._alone:  # JAX itself listens to SIGTERM where it has other processes to tell
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
        self.interrupted = number == signal.SIGINT
        print("\nstopping after this step (again: at once)", file=sys.stderr, flush=True)
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def now(self, step: int) -> bool:
        """To be called by every process once a step, with the same steps."""
        return self._asked if self._alone else multihost_utils.reached_preemption_sync_point(step)
