r"""BLOOM 3b by the published recipe on sixteen v4 chips.

    python -m bloomjax.train --config=configs/bloom_3b_tpu.py --workdir=runs/3b \
        --config.data.train=PREFIX --config.data.tokenizer=tokenizer.json

What it takes, and how long:

    python -m bloomjax.plan --config=configs/bloom_3b_tpu.py --target=tpu-v4:2x2x4
"""

from ml_collections import ConfigDict

from bloomjax.config import base_config

TARGET = "tpu-v4:2x2x4"  # of the plan in benchmarks/results/


def get_config() -> ConfigDict:
    config = base_config("3b")
    config.mesh.update(fsdp=16)
    config.run.update(accumulation=8, remat="dots")
    return config
