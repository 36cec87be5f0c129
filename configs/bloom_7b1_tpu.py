r"""BLOOM 7b1 by the published recipe on 32 v4 chips.

    python -m bloomjax.train --config=configs/bloom_7b1_tpu.py --workdir=runs/7b1 \
        --config.data.train=PREFIX --config.data.tokenizer=tokenizer.json

What it takes, and how long:

    python -m bloomjax.plan --config=configs/bloom_7b1_tpu.py --target=tpu-v4:2x4x4
"""

from ml_collections import ConfigDict

from bloomjax.config import base_config

TARGET = "tpu-v4:2x4x4"  # of the plan in benchmarks/results/


def get_config() -> ConfigDict:
    config = base_config("7b1")
    config.mesh.update(fsdp=32)
    config.run.update(accumulation=8, remat="dots")
    return config
