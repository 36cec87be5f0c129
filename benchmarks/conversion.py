"""How fast a conversion is, and what memory it takes, beside `cp` of the same file.

    python benchmarks/conversion.py                 (560m there and back: 2 minutes, 5 GB of disk)
    python benchmarks/conversion.py --random_176b   (two blocks of the 176B: 25 GB of disk)
    python benchmarks/conversion.py --sparse_176b   (all 72 shards as holes: 20 minutes, 1 GB)

Every command is a process of its own, so its peak of resident memory is its own; the sources are
read from the page cache where they fit. The bound of a conversion is `cp`: it reads and writes the
same bytes.
"""

import argparse
import multiprocessing
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

from facts import keep, machine

ROOT = pathlib.Path(__file__).parents[1]
REPEATS = 3


def folder(
    path: pathlib.Path, size: str, fields: dict[str, int], dtype: str, shards: int, random: bool
) -> pathlib.Path:
    """A model in Hugging Face's format, in as many files as the published one; holes, or noise.

    Made in a process of its own: a child inherits the peak of memory of its parent's past.
    """
    made = multiprocessing.get_context("spawn").Process(
        target=_folder, args=(path, size, fields, dtype, shards, random)
    )
    made.start()
    made.join()
    assert made.exitcode == 0
    return path


def _folder(
    path: pathlib.Path, size: str, fields: dict[str, int], dtype: str, shards: int, random: bool
) -> None:
    import numpy as np

    from bloomjax.config import base_config, freeze
    from bloomjax.formats import safetensors
    from bloomjax.formats.hf import PREFIX
    from bloomjax.formats.hf_config import side_files
    from bloomjax.formats.tensors import DTYPES, order, parts

    base = base_config(size)
    base.model.update(fields)
    config, kind, rng = freeze(base).model, DTYPES[dtype], np.random.default_rng(0)
    path.mkdir(parents=True)
    by_file: dict[int, dict[str, Any]] = {}
    rows = {PREFIX + row.hf.format(layer): row for row, layer in order(config)}
    for row, layer in order(config):
        at = row.megatron_file(layer, config.layers) if shards > 1 else 0
        by_file.setdefault(at, {})[PREFIX + row.hf.format(layer)] = kind, row.shape(config.sizes)
    assert len(by_file) == shards
    for i, tensors in enumerate(by_file.values(), 1):
        name = f"model_{i:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        for tensor, stored in safetensors.create(path / name, tensors).items():
            for start, stop in parts(rows[tensor], config.sizes, 4, 64 << 20) if random else ():
                noise = rng.standard_normal((stop - start, *stored.shape[1:]), np.float32)
                safetensors.write_rows(stored, start, (noise * 0.02).astype(kind))
    for name, content in side_files(config, kind, {}, 2048, {"format": "hf"}).items():
        (path / name).write_bytes(content)
    os.sync()


def run(*command: object) -> dict[str, Any]:
    """Seconds and peak resident GiB of one process, and what it said last."""
    start = time.monotonic()
    child = subprocess.Popen(
        [*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert child.stdout
    said = child.stdout.read().splitlines()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit("\n".join(said))
    return {
        "seconds": time.monotonic() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gib": usage.ru_maxrss / 2**20,
        "said": [re.sub(r"/\S+/", "", line) for line in said[-3:]],  # without paths
    }


def convert(source: pathlib.Path, target: pathlib.Path, to: str, *flags: str) -> dict[str, Any]:
    return run(sys.executable, "-m", "convert", source, target, f"--to={to}", *flags)


def size(path: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def there_and_back(work: pathlib.Path, source: pathlib.Path) -> dict[str, Any]:
    """Hugging Face -> Orbax -> Hugging Face and `cp`, in turn."""
    total, kinds = size(source), ("cp", "to_orbax", "to_hf")
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for _ in range(REPEATS):
        for name in ("copy", "orbax", "back"):
            shutil.rmtree(work / name, ignore_errors=True)
        # the conversions sync what they write, so `cp` has to
        runs["cp"].append(run("sh", "-c", f"cp -r {source} {work / 'copy'} && sync {work}/copy/*"))
        runs["to_orbax"].append(convert(source, work / "orbax", "orbax"))
        runs["to_hf"].append(convert(work / "orbax", work / "back", "hf"))
    files = sorted(source.glob("*.safetensors"))
    if len(files) == 1:
        assert (work / "back" / files[0].name).read_bytes() == files[0].read_bytes()
    result: dict[str, Any] = {"bytes": total}
    base = sorted(r["seconds"] for r in runs["cp"])[REPEATS // 2]
    for kind, found in runs.items():
        seconds = sorted(r["seconds"] for r in found)
        middle = seconds[REPEATS // 2]
        result[kind] = {
            "seconds": seconds,
            "mb_per_second": total / middle / 1e6,
            "times_cp": middle / base,
            "cpu_seconds": [r["cpu_seconds"] for r in found],
            "peak_gib": max(r["peak_gib"] for r in found),
        }
    return result


def random_176b(work: pathlib.Path) -> dict[str, Any]:
    fields = {"layers": 2, "vocab_size": 1024}
    return there_and_back(work, folder(work / "hf", "176b", fields, "bfloat16", 4, random=True))


def sparse_176b(work: pathlib.Path) -> dict[str, Any]:
    source = folder(work / "hf", "176b", {}, "bfloat16", 72, random=False)
    # Zeros are not stored, so the disk need not hold what the plan asks for.
    program = (
        "import runpy, shutil; usage = shutil.disk_usage; "
        "shutil.disk_usage = lambda path: usage(path)._replace(free=10**15); "
        "runpy.run_module('convert', run_name='__main__')"
    )
    command = [sys.executable, "-c", program, source, work / "orbax", "--to=orbax"]
    return {
        "bytes": size(source),
        "shards": len(list(source.glob("*.safetensors"))),
        "dry_run": run(*command, "--dry_run"),
        "to_orbax": run(*command),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random_176b", action="store_true")
    parser.add_argument("--sparse_176b", action="store_true")
    parser.add_argument("--work", type=pathlib.Path, help="a folder on the disk to measure")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        work = pathlib.Path(name)
        if args.random_176b:
            what, result = "conversion-random-176b", random_176b(work)
        elif args.sparse_176b:
            what, result = "conversion-sparse-176b", sparse_176b(work)
        else:
            source = folder(work / "hf", "560m", {}, "float16", 1, random=True)
            what, result = "conversion-560m", there_and_back(work, source)
    keep(what, {"what": what} | result | {"machine": machine("jax", "tensorstore", "numpy")})


if __name__ == "__main__":
    main()
