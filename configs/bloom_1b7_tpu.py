r"""BLOOM 1b7 by the published recipe on sixteen v5e chips.

    python -m bloomjax.train --config=configs/bloom_1b7_tpu.py --workdir=runs/1b7 \
        --config.data.train=PREFIX --config.data.tokenizer=tokenizer.json

What it takes, and how long:

    python -m bloomjax.plan --config=configs/bloom_1b7_tpu.py --target=tpu-v5e:4x4
"""

from ml_collections import ConfigDict

from bloomjax.config import base_config

TARGET = "tpu-v5e:4x4"  # of the plan in benchmarks/results/


def get_config() -> ConfigDict:
    config = base_config("1b7")
    config.mesh.update(fsdp=16)
    config.run.update(accumulation=16, remat="dots")
    return config
