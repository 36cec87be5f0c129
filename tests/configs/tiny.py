"""A BLOOM that fits a test. The tests bring the text: `--config.data.train=FOLDER`.

python -m bloomjax.train --config=tests/configs/tiny.py --workdir=DIR --config.data.train=FOLDER
"""

from ml_collections import ConfigDict

from bloomjax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.model.update(layers=2, width=32, heads=2, vocab_size=320, init_std=0.05)
    config.data.update(heldout_every=5, tokenizer="train", sequence_length=16, batch_size=4)
    config.optim.update(
        steps=80,
        learning_rate=1e-2,
        min_learning_rate=1e-4,
        warmup_samples=8,
        decay_samples=320,
        ramp_start=0,
    )
    config.run.update(eval_every=30, checkpoint_every=4, remat="none")
    return config
