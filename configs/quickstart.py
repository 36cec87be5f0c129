"""A small BLOOM that learns to write Python in five minutes on two CPU cores, with no download.

    python -m bloomjax.train --config=configs/quickstart.py --workdir=runs/quickstart

The text is the source code of the running Python's own standard library; every fortieth file, by
hash of its path, is held out. Expected on two cores: under 300 s, 1.6 bits per byte held out.
"""

import sysconfig

from ml_collections import ConfigDict

from bloomjax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.model.update(layers=4, width=128, heads=4, vocab_size=2048, init_std=0.05)
    config.data.update(
        train=(sysconfig.get_path("stdlib") + "/**/*.py",),
        exclude=("test", "encodings", "pydoc_data", "site-packages", "dist-packages"),
        heldout_every=40,
        tokenizer="train",
        sequence_length=256,
        batch_size=4,
    )
    steps = 1800
    config.optim.update(
        steps=steps,
        learning_rate=3e-3,
        min_learning_rate=1e-5,
        warmup_samples=100 * 4,
        decay_samples=steps * 4,
        ramp_start=0,
    )
    config.run.update(log_every=25, eval_every=300, checkpoint_every=300)
    return config
