"""Look at this machine before a run does, and name what is wrong, and what to do.

    python -m bloomjax.doctor --workdir=runs/quickstart

Takes less than ten seconds, whatever is broken: devices are asked for in a process of its own, and
nobody is joined. Exits with 0 if nothing is wrong, with 2 otherwise. On machines that act as one,
run it on each of them.
"""

import contextlib
import fcntl
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import flags
from jax._src import hardware_utils
from packaging.requirements import Requirement

from bloomjax import cli, cluster, memory, processes
from bloomjax.errors import UserError
from bloomjax.metrics import amount

SECONDS = 6.5  # for the devices to answer
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain")
PLUGINS = {
    "NVIDIA": ("jax-cuda13-plugin", "jax-cuda12-plugin"),
    "AMD": ("jax-rocm7-plugin", "jax-rocm60-plugin"),
    "TPU": ("libtpu",),
}
DRIVERS = {"jax-cuda13-plugin": 580, "jax-cuda12-plugin": 525}  # NVIDIA's release notes of CUDA
EXTRAS = {"NVIDIA": "cuda", "TPU": "tpu"}  # of setup.cfg
VARIABLES = (
    "JAX_",
    "XLA_",
    "SLURM_",
    "TPU_",
    "MEGASCALE_",
    "NCCL_",
    "CUDA_VISIBLE",
    "ROCR_",
    "HF_H",
)

# What a training does first, on one device.
PROBE = """
import json, jax, jax.numpy as jnp
devices = jax.local_devices()
assert float(jnp.ones(()) + 1) == 2
limit = (devices[0].memory_stats() or {}).get("bytes_limit")
kind = devices[0].device_kind
print(json.dumps([devices[0].platform, kind, len(devices), limit]))
"""


@dataclass
class Report:
    """What was found, a line a subject; what is wrong, and what to do; what may surprise."""

    found: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "runs", "the folder of runs to come", flag_values=values)
    flags.DEFINE_bool("json", False, "print one JSON object", flag_values=values)


def main(values: flags.FlagValues) -> None:
    report = Report({"devices": ""})  # the first line, though the last answer
    hardware = accelerators()
    devices = Devices()  # meanwhile the rest
    look: list[Callable[[Report], None]] = [
        lambda report: versions(report, hardware),
        room,
        place,
        network,
        lambda report: folders(report, Path(values.workdir)),
        lambda report: devices.tell(report, hardware),
    ]
    for part in look:
        part(report)
    if values.json:
        print(json.dumps(asdict(report)))
    else:
        for name, line in report.found.items():
            print(f"{name:12} {line}")
        for kind, lines in (("note", report.notes), ("WRONG", report.wrong)):
            for line in lines:
                print(f"{kind:12} {line}")
        print("all is well" if not report.wrong else f"{len(report.wrong)} to mend")
    if report.wrong:
        raise SystemExit(2)


def accelerators() -> dict[str, int]:
    """How many of each kind this machine shows, whatever JAX makes of them."""
    nvidia = len(list(Path("/dev").glob("nvidia[0-9]*")))
    found = {
        "NVIDIA": nvidia or int(hardware_utils.has_visible_nvidia_gpu()),
        "AMD": hardware_utils.num_available_amd_gpus(),
        "TPU": hardware_utils.num_available_tpu_chips_and_device_id()[0],
    }
    return {kind: count for kind, count in found.items() if count}


class Devices:
    """JAX's devices, asked for in a process of its own: a broken one may never answer."""

    def __init__(self) -> None:
        # As a run of its own, and leaving the memory to those who use it.
        env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(
            [sys.executable, "-c", PROBE], env=env, stdout=pipe, stderr=pipe, text=True
        )
        self._killer = threading.Timer(SECONDS, self._child.kill)
        self._killer.start()

    def tell(self, report: Report, hardware: dict[str, int]) -> None:
        out, err = self._child.communicate()
        late = not self._killer.is_alive()
        self._killer.cancel()
        there = ", ".join(f"{count} x {kind}" for kind, count in hardware.items())
        asked = os.environ.get("JAX_PLATFORMS", "")
        if self._child.returncode:
            report.found["devices"] = "no answer"
            *_, last = "nothing", *filter(str.strip, err.splitlines())
            report.wrong.append(
                f"devices ({there or 'no accelerator in sight'}) gave no answer within "
                f"{SECONDS:.1f} s: end what else uses them, or restart the driver or the machine; "
                "on a TPU slice of several hosts, run this on all of them"
                if late
                else f"JAX cannot use its devices: {cli.one_line(last)[:300]}: mend the driver "
                "or the plugin, or look at JAX_PLATFORMS and XLA_FLAGS; JAX_PLATFORMS=cpu does "
                "without an accelerator"
            )
            return
        kind, name, count, limit = json.loads(out.splitlines()[-1])
        share = f", {amount(limit)} each for JAX" if limit else ""
        report.found["devices"] = f"{count} x {name}{share}"
        if kind != "cpu":
            if count < hardware.get("TPU" if kind == "tpu" else "NVIDIA", 0):
                report.notes.append(f"JAX uses {count} of {there}")
            return
        report.found["devices"] = f"CPU ONLY: {count} x {name}"
        for found in hardware:
            if asked and "cpu" in asked.split(","):
                report.notes.append(f"JAX_PLATFORMS={asked} leaves {there} unused")
            elif not any(version(plugin) for plugin in PLUGINS[found]):
                extra = EXTRAS.get(found)
                how = f"pip install 'bloomjax[{extra}]'" if extra else f"install JAX for {found}"
                report.wrong.append(
                    f"{there} here, but JAX has no plugin for {found} and uses the CPU: {how}"
                )
            else:
                said = cli.one_line(err)[-300:]
                report.wrong.append(
                    f"{there} here and a plugin for {found}, but JAX uses the CPU"
                    f"{': it says ' + said if said else ''}: mend the driver (nvidia-smi), or let "
                    "the container see the devices"
                )


def version(package: str) -> str:
    """ "" if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def versions(report: Report, hardware: dict[str, int]) -> None:
    plugins = [name for names in PLUGINS.values() for name in names]
    found = {name: version(name) for name in ("bloomjax", *PACKAGES, *plugins)}
    report.found["python"] = f"{platform.python_version()} on {platform.platform(terse=True)}"
    report.found["packages"] = ", ".join(f"{name} {v}" for name, v in found.items() if v)
    # What each of them says that it needs: pip upgrades one without asking the others.
    for name in found:
        for text in (metadata.requires(name) or []) if found[name] else []:
            needed = Requirement(text)
            if needed.marker and not needed.marker.evaluate({"extra": ""}):
                continue
            has = version(needed.name)
            if not has or not needed.specifier.contains(has, prereleases=True):
                report.wrong.append(
                    f"{name} {found[name]} needs {needed}, found {has or 'none'}: "
                    f"pip install '{needed.name}{needed.specifier}'"
                )
    cuda = [name for name in PLUGINS["NVIDIA"] if found[name]]
    for name in cuda:
        if found[name] != found["jaxlib"]:
            report.wrong.append(
                f"{name} {found[name]} and jaxlib {found['jaxlib']}: expected the same version: "
                f"pip install '{name}=={found['jaxlib']}'"
            )
    if len(cuda) > 1:
        report.wrong.append(f"{' and '.join(cuda)} are both installed: pip uninstall one of them")
    libraries = os.environ.get("LD_LIBRARY_PATH", "")
    if cuda and "cuda" in libraries:
        report.notes.append(
            f"LD_LIBRARY_PATH={libraries} may put other CUDA libraries before those of {cuda[0]}"
        )
    driver = nvidia_driver() if "NVIDIA" in hardware else None
    if driver:
        report.found["driver"] = f"NVIDIA {driver}"
        if cuda and int(driver.split(".")[0]) < DRIVERS[cuda[0]]:
            report.wrong.append(
                f"the NVIDIA driver is {driver}: {cuda[0]} needs {DRIVERS[cuda[0]]} or newer"
            )


def nvidia_driver() -> str | None:
    """ "580.65.06", as the kernel's module says."""
    with contextlib.suppress(OSError, IndexError):
        return Path("/sys/module/nvidia/version").read_text().split()[0]
    return None


def room(report: Report) -> None:
    found = memory.host()
    if found is None:
        return
    group = f"; this container may use {amount(found.limit)}" if found.limit else ""
    cores = len(os.sched_getaffinity(0))
    report.found["host"] = (
        f"{cores} cores, {amount(found.total)} of memory, {amount(found.free)} free{group}"
    )
    if found.free < 2e9:
        report.notes.append(f"only {amount(found.free)} of this machine's memory are free")


def place(report: Report) -> None:
    """Which process of which run this is, as it would be found; nobody is joined."""
    shown = {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)}
    shown.pop("TPU_SKIP_MDS_QUERY", None)  # JAX sets it where there is no TPU
    secret = ("TOKEN", "KEY", "SECRET", "PASSWORD")
    report.found["environment"] = (
        " ".join(f"{k}={v}" for k, v in shown.items() if not any(s in k for s in secret)) or "-"
    )
    here = None
    try:
        here = within(3, lambda: cluster.place(2))
        report.found["processes"] = (
            f"{here.index} of {here.count} ({here.kind}), process 0 at {here.address}"
            + (f", GPUs {here.gpus}" if here.gpus else "")
            if here
            else "alone: no launcher, no cluster in the environment"
        )
    except (UserError, TimeoutError) as error:
        report.found["processes"] = "unclear"
        report.wrong.append(str(error) or "the cluster's name or metadata server does not answer")
    if here and here.index == 0:
        try:
            processes.check_port(here)
        except UserError as error:
            report.wrong.append(str(error))
    proxies = [k for k in os.environ if k.lower() in ("http_proxy", "https_proxy", "all_proxy")]
    if here and proxies and not os.environ.get("no_proxy", os.environ.get("NO_PROXY")):
        report.notes.append(f"{', '.join(proxies)}: process 0 is looked for through the proxy")


def network(report: Report) -> None:
    name = socket.gethostname()
    try:
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
        address = within(3, lambda: socket.gethostbyname(name))
        report.found["network"] = f"{name} is {address}; can listen (tried port {port})"
    except TimeoutError:
        report.wrong.append(f"no name server says who {name} is: add it to /etc/hosts")
    except socket.gaierror as error:
        report.wrong.append(f"{name}, this machine, has no address ({error}): add it to /etc/hosts")
    except OSError as error:
        report.wrong.append(f"cannot listen on any port ({error}): several processes need one")


def within(seconds: float, ask: Callable[[], Any]) -> Any:
    """What `ask` returns or raises; TimeoutError if that takes longer."""
    answer: list[Any] = []

    def run() -> None:
        try:
            answer.append((ask(), None))
        except Exception as error:
            answer.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answer:
        raise TimeoutError
    value, error = answer[0]
    if error:
        raise error
    return value


def folders(report: Report, workdir: Path) -> None:
    """Where a run writes: its workdir, the hub's cache, the cache of compiled programs."""
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    for name, path in (("workdir", workdir), ("HF_HOME", hub)):
        report.found[name] = ", ".join(states(report, name, path, locks=name == "workdir"))
    if not compiled:
        report.found["compiled"] = "kept nowhere"
        report.notes.append(
            "every start compiles anew: JAX_COMPILATION_CACHE_DIR=FOLDER keeps what was compiled"
        )
    elif "://" in compiled:
        report.found["compiled"] = compiled
    else:
        report.found["compiled"] = ", ".join(
            states(report, "JAX_COMPILATION_CACHE_DIR", Path(compiled))
        )


def states(report: Report, name: str, path: Path, locks: bool = False) -> Iterator[str]:
    """What is to be said of a folder that is to be written to; it may not be there yet."""
    path = path.absolute()
    yield str(path)
    there = next(p for p in (path, *path.parents) if p.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there) as file:
            if locks:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        report.wrong.append(f"{name}: cannot write in {there} ({error.strerror}): choose another")
        return
    free = shutil.disk_usage(there).free
    yield f"{amount(free)} free"
    if free < 1e9:
        report.wrong.append(f"{name}: {amount(free)} free in {there}: make room, or choose another")


if __name__ == "__main__":
    cli.run(main, define, __doc__, join=False)
