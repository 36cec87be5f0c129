"""The quickstart's held-out figure beside gzip's, and the picture of its loss curve.

    pip install matplotlib
    python benchmarks/quickstart.py runs/quickstart [--picture=docs/quickstart.png]

gzip -9 compresses each held-out file by itself, as the model predicts each by itself. The bound of
the quickstart is 0.75 of what gzip needs.
"""

import gzip
import json
import sys
from collections import defaultdict
from pathlib import Path

import facts

from bloomjax.config import freeze
from bloomjax.data.corpus import Corpus
from bloomjax.data.prepare import is_held_out


def main(workdir: Path, picture: Path | None) -> None:
    config = freeze(json.loads((workdir / "config.json").read_text()))
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    evaluated = [r for r in records if "eval_bits_per_byte" in r]
    stepped = [r for r in records if "loss" in r]

    data = config.data
    texts: dict[str, bytes] = defaultdict(bytes)  # long files come in parts
    for part in Corpus(data.train, data.exclude, data.text_key):
        if is_held_out(part.name, data.heldout_every):
            texts[part.name] += part.text.encode()
    plain = sum(map(len, texts.values()))
    by_gzip = 8 * sum(len(gzip.compress(text, 9)) for text in texts.values()) / plain
    ours = evaluated[-1]["eval_bits_per_byte"]
    facts.keep(
        "quickstart",
        {
            "what": "bits per byte of the held-out files, each by itself",
            "documents": len(texts),
            "bytes": plain,
            "bloomjax": ours,
            "gzip -9": by_gzip,
            "ratio": ours / by_gzip,
            "parameters": config.model.parameter_count,
            "tokens": stepped[-1]["tokens"],
            "tokens_per_second": stepped[-1]["tokens_per_second"],
            "machine": facts.machine("jax", "flax", "tokenizers"),
        },
    )
    if picture:
        draw(picture, stepped, evaluated, by_gzip)


def draw(picture: Path, stepped: list[dict], evaluated: list[dict], by_gzip: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot([r["tokens"] / 1e6 for r in stepped], [r["loss"] for r in stepped], lw=1)
    left.set(xlabel="million tokens", ylabel="nats per token", title="training loss")
    tokens = {r["step"]: r["tokens"] / 1e6 for r in stepped}
    right.plot(
        [tokens[r["step"]] for r in evaluated],
        [r["eval_bits_per_byte"] for r in evaluated],
        marker="o",
        ms=4,
        label="bloomjax",
    )
    right.axhline(by_gzip, color="0.5", ls="--", label=f"gzip -9: {by_gzip:.2f}")
    right.axhline(0.75 * by_gzip, color="0.8", ls=":", label=f"0.75 of it: {0.75 * by_gzip:.2f}")
    right.set(xlabel="million tokens", ylabel="bits per byte", title="held-out files")
    right.legend()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    options = dict(a.removeprefix("--").split("=") for a in sys.argv[1:] if a.startswith("--"))
    paths = [a for a in sys.argv[1:] if not a.startswith("--")]
    main(Path(paths[0]), Path(options["picture"]) if "picture" in options else None)
