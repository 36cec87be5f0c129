r"""BLOOM 176b by the published recipe on 512 v5p chips.

    python -m bloomjax.train --config=configs/bloom_176b_tpu.py --workdir=runs/176b \
        --config.data.train=PREFIX --config.data.tokenizer=tokenizer.json

What it takes, and how long:

    python -m bloomjax.plan --config=configs/bloom_176b_tpu.py --target=tpu-v5p:8x8x8
"""

from ml_collections import ConfigDict

from bloomjax.config import base_config

TARGET = "tpu-v5p:8x8x8"  # of the plan in benchmarks/results/


def get_config() -> ConfigDict:
    config = base_config("176b")
    config.mesh.update(fsdp=256, tensor=2)
    config.run.update(accumulation=4, remat="dots")
    return config
