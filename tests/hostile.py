"""Files that mean harm, and what is expected of whoever reads them: a refusal in one line, soon,
in little memory; never a hang, a crash, or an exception that is not ours."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from bloomjax.errors import UserError

SECONDS, BYTES = 1.0, 50 << 20


def _resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(x for x in status.read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def refused(read: Callable[[], object], *parts: str) -> None:
    """`read` raises a UserError of one line that has `parts` in it, within a second of CPU time and
    50 MB."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # VmHWM starts anew
    before, start = _resident("VmRSS"), time.process_time()
    with pytest.raises(UserError) as caught:
        read()
    seconds, grown = time.process_time() - start, _resident("VmHWM") - before
    line = str(caught.value)
    assert "\n" not in line and len(line) < 1200, line
    for part in parts:
        assert part in line, line
    assert seconds < SECONDS, (seconds, line)
    assert grown < BYTES, (grown, line)


def mutations(data: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` damaged copies: bits flipped, bytes replaced, pieces cut out, doubled or made huge
    numbers, ends cut off. Most damage falls on the first kilobytes, where headers are."""
    rng = random.Random(seed)
    big = [b"\xff" * 8, b"\x00" * 8, b"\xff" * 4 + b"\x7f" * 4, b"\x00" * 7 + b"\x80", b"9" * 12]
    for _ in range(count):
        out = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
            at = rng.randrange(min(len(out), rng.choice((64, 512, 4096, len(data)))) or 1)
            kind = rng.randrange(6)
            if not out:
                break
            if kind == 0:
                out[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                out[at] = rng.randrange(256)
            elif kind == 2:
                piece = rng.choice(big)
                out[at : at + len(piece)] = piece
            elif kind == 3:
                del out[at : at + rng.randrange(1, 16)]
            elif kind == 4:
                out[at:at] = out[at : at + rng.randrange(1, 32)]
            elif rng.random() < 0.1:
                del out[at:]
        yield bytes(out)


def survives(
    read: Callable[[Path], object], seeds: Sequence[bytes], path: Path, count: int = 10_000
) -> int:
    """`read(path)` of `count` mutations of `seeds` returns or raises a UserError of one line, each
    within two seconds. How many were refused."""
    refusals = 0
    for i, data in enumerate(seeds):
        for mutant in mutations(data, count // len(seeds), seed=i):
            path.write_bytes(mutant)
            start = time.process_time()
            try:
                read(path)
            except UserError as error:
                refusals += 1
                assert "\n" not in str(error), error
            assert time.process_time() - start < 2
    return refusals
