"""What an entry spends its time on: stages, one after the other, and compiles among them.

The one invariant: all goes to stderr, and but for a long compile nothing is said unasked.
"""

import os
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax

_LONG = 5.0  # seconds after which a compile is worth a word
_BEGUN = "/jax/compilation_cache/compile_requests_use_cache"
_COMPILED = "/jax/core/compile/backend_compile_duration"
_TRACED = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
)


T = TypeVar("T")


class Stages:
    """Inside of its `with`, compiles are noticed; `loud`, everything is told as it ends."""

    def __init__(self, loud: bool):
        self.kept_in: str | None = None  # where compiled programs are kept, if they are
        self._speaks = jax.process_index() == 0
        self._loud = loud and self._speaks
        self._last = time.perf_counter() - _age()
        self._seconds: defaultdict[str, float] = defaultdict(float)  # of each program's compile
        self._counts: Counter[str] = Counter()  # a program is compiled for each shape
        self._timer, self._said = threading.Timer(0, lambda: None), False

    def __enter__(self) -> "Stages":
        jax.monitoring.register_event_listener(self._event)
        jax.monitoring.register_event_duration_secs_listener(self._duration)
        return self

    def __exit__(self, *_: Any) -> None:
        self._timer.cancel()
        jax.monitoring.unregister_event_listener(self._event)
        jax.monitoring.unregister_event_duration_listener(self._duration)

    def done(self, stage: str) -> None:
        """A stage ends here; it began where the one before it ended."""
        now = time.perf_counter()
        self.say(f"{stage}: {now - self._last:.2f} s")
        self._last = now

    def first(self, given: Iterable[T], stage: str) -> Iterator[T]:
        """All that is given; with the first of it a stage ends."""
        for n, one in enumerate(given):
            if n == 0:
                self.done(stage)
            yield one

    def say(self, line: str) -> None:
        if self._loud:
            print(line, file=sys.stderr, flush=True)

    def tell_compiles(self) -> None:
        """What part of the stages they were."""
        whole = sum(self._seconds[name] for name in self._counts)
        self.say(f"{self._counts.total()} programs to trace and compile, or to find: {whole:.2f} s")
        for name in sorted(self._counts, key=lambda name: -self._seconds[name]):
            if self._seconds[name] >= 0.05:
                self.say(f"  {name}, of {self._counts[name]} shapes: {self._seconds[name]:.2f} s")

    def _event(self, event: str, **_: Any) -> None:
        if event == _BEGUN and self._speaks:
            self._timer.cancel()
            self._timer = threading.Timer(_LONG, self._long)
            self._timer.daemon = True
            self._timer.start()

    def _duration(self, event: str, duration_secs: float, **more: str | int) -> None:
        name = str(more.get("fun_name", "")).removeprefix("jit(").removesuffix(")").strip("_")
        if event == _COMPILED:
            self._timer.cancel()
            self._counts[name] += 1
        if event == _COMPILED or event in _TRACED:
            self._seconds[name] += duration_secs

    def _long(self) -> None:
        if not self._said:
            kept = f"; kept for the next start in {self.kept_in}" if self.kept_in else ""
            print(f"compiling takes a while{kept}", file=sys.stderr, flush=True)
        self._said = True


def _age() -> float:
    """Seconds since this process began; where nothing tells, those that it worked."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        begun = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - begun
    except (OSError, AttributeError):
        return time.process_time()
