"""The doctor: what it names, and that it is quick whatever is broken."""

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from trial import Ended, Trial, inside

from bloomjax import doctor


@pytest.fixture(autouse=True)
def healthy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without accelerators, whatever this one has."""
    monkeypatch.setattr(doctor, "accelerators", dict)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)


def look(capfd: pytest.CaptureFixture[str], *flags: str) -> tuple[Ended, dict[str, Any]]:
    begun = time.monotonic()
    end = inside(doctor, ["--json", *flags], capfd, join=False)
    assert time.monotonic() - begun < 10
    assert end.out.count("\n") == 1 and not end.err, end
    return end, json.loads(end.out)


def wrong(capfd: pytest.CaptureFixture[str], *parts: str) -> None:
    """Exactly one thing is."""
    end, report = look(capfd)
    assert end.code == 2 and len(report["wrong"]) == 1, report
    for part in parts:
        assert part in report["wrong"][0], report["wrong"]


def test_all_is_well(tmp_path: Path) -> None:
    """As a user calls it: from a shell, for eyes."""
    begun = time.monotonic()
    (end,) = Trial(tmp_path).run(["bloomjax.doctor", f"--workdir={tmp_path}"], devices=2, limit=20)
    assert time.monotonic() - begun < 15  # 5 where nothing else runs
    found = dict(line.split(maxsplit=1) for line in end.out.splitlines())
    if end.code == 0:  # else this machine's accelerators and their plugins do not agree
        assert found["devices"] == "CPU ONLY: 2 x cpu" and "all is well" in end.out, end
    assert "jaxlib" in found["packages"] and "alone" in found["processes"]
    assert str(tmp_path) in found["workdir"] and "JAX_PLATFORMS=cpu" in found["environment"]


def test_devices_that_never_answer(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "PROBE", "import time; time.sleep(99)")
    monkeypatch.setattr(doctor, "SECONDS", 2.0)
    wrong(capfd, "no answer within 2.0 s")


def test_flags_that_xla_does_not_know(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_no_such_flag=1")
    wrong(capfd, "xla_cpu_no_such_flag", "XLA_FLAGS")


@pytest.mark.parametrize(
    ("plugin", "platforms", "part"),
    [("", "", "pip install 'bloomjax[cuda]'"), ("0.10.2", "", "mend the driver")],
)
def test_an_accelerator_that_jax_does_not_use(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    plugin: str,
    platforms: str,
    part: str,
) -> None:
    whole = doctor.version
    monkeypatch.setattr(doctor, "accelerators", lambda: {"NVIDIA": 8})
    monkeypatch.setattr(doctor, "version", lambda p: plugin if "cuda" in p else whole(p))
    monkeypatch.setattr(doctor, "versions", lambda report, hardware: None)
    monkeypatch.setattr(doctor, "PROBE", 'print(\'["cpu", "cpu", 1, null]\')')
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    wrong(capfd, "8 x NVIDIA here", part)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    end, report = look(capfd)
    assert end.code == 0 and "JAX_PLATFORMS=cpu leaves 8 x NVIDIA unused" in report["notes"]


def test_packages_that_do_not_go_together(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = doctor.version
    monkeypatch.setattr(doctor, "version", lambda p: "0.1" if p == "optax" else whole(p))
    end, report = look(capfd)
    assert end.code == 2 and all("optax" in line for line in report["wrong"])
    assert any(line.startswith("flax") or line.startswith("bloomjax") for line in report["wrong"])


def test_a_port_that_is_taken(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
        monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
        monkeypatch.setenv("JAX_PROCESS_ID", "0")
        wrong(capfd, f"cannot listen at {address}", "choose another port")
        monkeypatch.delenv("JAX_PROCESS_ID")
        wrong(capfd, "JAX_PROCESS_ID")


def test_a_workdir_that_cannot_be(capfd: pytest.CaptureFixture[str]) -> None:
    end, report = look(capfd, "--workdir=/proc/runs")
    assert end.code == 2 and report["wrong"][0].startswith("workdir: cannot write in /proc")
