"""Plans of the README's targets and of every shipped config, for hardware that is not here.

    pip install -e '.[plan]' && python benchmarks/plans.py [--only=TEXT]

Compiles each with the real compiler (a minute or two on two cores), and keeps what
`bloomjax.plan --json` says, dated, in benchmarks/results/. Prints the README's table.
"""

import argparse
import datetime
import json
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).parent))
from facts import machine  # noqa: E402

# The layout is chosen by the plan itself.
FREE = [
    ("176b", "tpu-v5p:8x8x8"),
    ("176b", "tpu-v5p:8x16x16"),
    ("176b", "gpu-a100-80g:48x8"),
    ("176b", "gpu-h200:48x8"),
    ("7b1", "gpu-h200:1x1"),
    ("7b1", "tpu-v5e:4x4"),
]
BASE = (
    'from bloomjax.config import base_config\n\ndef get_config():\n    return base_config("{}")\n'
)


def plan(config: Path, target: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bloomjax.plan", f"--config={config}", f"--target={target}"]
    done = subprocess.run([*command, "--json"], cwd=ROOT, stdout=subprocess.PIPE, check=False)
    return json.loads(done.stdout) if done.stdout else {"target": target, "fits": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    only = parser.parse_args().only
    path = ROOT / f"benchmarks/results/plans-{datetime.date.today()}.json"
    found = json.loads(path.read_text()) if path.exists() else {"plans": {}}
    with tempfile.TemporaryDirectory() as folder:
        jobs: list[tuple[str, Path, str]] = []
        for size, target in FREE:
            config = Path(folder) / f"{size}.py"
            config.write_text(BASE.format(size))
            jobs.append((f"{size} on {target}", config, target))
        for config in sorted((ROOT / "configs").glob("bloom_*.py")):
            jobs.append((config.name, config, runpy.run_path(str(config))["TARGET"]))
        for name, config, target in jobs:
            if only in name:
                found["plans"][name] = plan(config, target)
                path.write_text(
                    json.dumps(found | {"machine": machine("jax", "jaxlib")}, indent=1) + "\n"
                )
    for name, p in found["plans"].items():
        print(row(name, p))


def row(name: str, p: dict[str, Any]) -> str:
    if "mesh" not in p:
        return f"| {name} | {p['target']} | does not fit |"
    mesh = " x ".join(f"{axis} {n}" for axis, n in p["mesh"].items() if n > 1) or "one device"
    memory = f"{p['memory']['total'] / 1e9:.0f} of {p['capacity'] / 1e9:.0f} GB"
    batch = f"{p['batch_size']:,} in {p['microbatches']}"
    speed = f"{p['step_seconds']:.1f} s, {p['tokens_per_second']:,.0f}"
    mfu = f"{p['mfu']:.1%} / {p['mfu_causal']:.1%}"
    cells = name, p["target"], f"{mesh}; {p['remat']}", batch, memory, speed, mfu, p["bound_by"]
    return f"| {' | '.join(cells)} | {p['compile_seconds']:.0f} s |"


if __name__ == "__main__":
    main()
