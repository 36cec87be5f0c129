"""Ends a process that makes no progress: JAX notices processes that died, never those that hang.

Every process watches itself. When one hangs, the others wait for it in a collective, so all come
to their limit, and all show where they are.
"""

import contextlib
import faulthandler
import statistics
import threading
import time
from collections import deque

import jax

from bloomjax import processes

SHORTEST = 60.0  # seconds
# What may take long once in a while, and says nothing meanwhile: to compile, restore, save.
SLOW = 1800.0
_PERIOD = 0.5


class Watchdog(contextlib.AbstractContextManager["Watchdog"]):
    """with Watchdog(seconds) as watchdog: the body reports what it begins, which ends the thing
    before. What does not end within the limit ends the process, as `processes.stuck` does.

    The limit is `seconds`; if that is 0, ten median steps, and 60 s at least. For what is `slow`,
    and until a step was complete, it is half an hour if that is more.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._steps: deque[float] = deque(maxlen=101)  # how long each took
        self._step_began: float | None = None
        self._over = threading.Event()
        self._alone = jax.process_count() == 1
        self._clock = 0.0
        self.begin("the start", slow=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        if not self._alone:
            faulthandler.cancel_dump_traceback_later()

    def begin(self, what: str, slow: bool = False) -> None:
        self._step_began = None
        self._begin(what, slow)

    def step(self, number: int) -> None:
        """Step `number` begins."""
        now = time.monotonic()
        if self._step_began is not None:
            self._steps.append(now - self._step_began)
        self._step_began = now
        self._begin(f"step {number}", slow=not self._steps)

    def _begin(self, what: str, slow: bool) -> None:
        limit = self._seconds
        if not limit and self._steps:
            limit = max(SHORTEST, 10 * statistics.median(self._steps))
        if slow or not limit:
            limit = max(SLOW, limit)
        self._state = what, self._clock, limit
        if not self._alone:
            # Should some C code keep the lock that Python's threads need, as the one below does,
            # this thread of C's needs none; it leaves with 1.
            faulthandler.dump_traceback_later(limit + 60, exit=True, file=2)

    def _watch(self) -> None:
        tick = time.monotonic()
        while not self._over.wait(_PERIOD):
            now = time.monotonic()
            # A run that is alone may be stopped (Ctrl-Z) for as long as one likes. Of several
            # processes the others would have gone on.
            self._clock += min(now - tick, 5 * _PERIOD) if self._alone else now - tick
            tick = now
            what, since, limit = self._state
            if self._clock - since > limit:
                process = f"process {jax.process_index()} of {jax.process_count()}"
                processes.stuck(
                    f"bloomjax: {process}: no progress in {what} for {limit:.0f} s "
                    "(config.run.watchdog): the stacks of all threads are above; start again to "
                    "go on from the last checkpoint"
                )
