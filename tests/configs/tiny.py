"""A BLOOM that fits a test: two layers, and bloomjax's own sources as text.

python -m bloomjax.train --config=tests/configs/tiny.py --workdir=DIR
"""

from pathlib import Path

from ml_collections import ConfigDict

from bloomjax.config import base_config

SOURCES = Path(__file__).resolve().parents[2] / "bloomjax"


def get_config() -> ConfigDict:
    config = base_config()
    config.model.update(layers=2, width=32, heads=2, vocab_size=320, init_std=0.05)
    config.data.update(
        train=(f"{SOURCES}/*.py",),
        heldout_every=5,
        tokenizer="train",
        sequence_length=16,
        batch_size=4,
    )
    config.optim.update(
        steps=6,
        learning_rate=1e-2,
        min_learning_rate=1e-4,
        warmup_samples=8,
        decay_samples=400,
        ramp_start=0,
    )
    config.run.update(eval_every=0, checkpoint_every=2, remat="none")
    return config
