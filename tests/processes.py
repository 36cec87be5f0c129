"""Real processes for tests: N of them on loopback, or one to be killed; never past a limit."""

import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def start(
    source: str, *args: object, devices: int = 1, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """One Python process running `source` with `devices` CPU devices; sys.argv[1:] is `args`."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        **(env or {}),
    }
    command = [sys.executable, "-c", textwrap.dedent(source), *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def launch(
    count: int, source: str, *args: object, devices: int = 1, limit: float = 60
) -> list[str]:
    """Runs `source` on `count` processes joined by jax.distributed; their standard outputs.

    AssertionError, with what they wrote, when one fails or is not done after `limit` seconds.
    """
    prelude = ""
    if count > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        prelude = (
            "import jax, os\n"
            f"jax.distributed.initialize({address!r}, {count}, int(os.environ['PROCESS']))\n"
        )
    source = prelude + textwrap.dedent(source)
    children = [
        start(source, *args, devices=devices, env={"PROCESS": str(i)}) for i in range(count)
    ]
    deadline, outputs, failures = time.monotonic() + limit, [], []
    try:
        for i, child in enumerate(children):
            out, err = child.communicate(timeout=max(0.1, deadline - time.monotonic()))
            lines = out.splitlines(keepends=True)
            # Gloo announces itself on standard output.
            outputs.append("".join(line for line in lines if not line.startswith("[Gloo]")))
            if child.returncode:
                failures.append(f"process {i} left with {child.returncode}:\n{out}\n{err[-3000:]}")
    except subprocess.TimeoutExpired:
        failures.append(f"process {i} was not done after {limit} s")
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert not failures, "\n".join(failures)
    return outputs
