r"""BLOOM 560m by the published recipe on sixteen v5e chips.

    python -m bloomjax.train --config=configs/bloom_560m_tpu.py --workdir=runs/560m \
        --config.data.train=PREFIX --config.data.tokenizer=tokenizer.json

What it takes, and how long:

    python -m bloomjax.plan --config=configs/bloom_560m_tpu.py --target=tpu-v5e:4x4
"""

from ml_collections import ConfigDict

from bloomjax.config import base_config

TARGET = "tpu-v5e:4x4"  # of the plan in benchmarks/results/


def get_config() -> ConfigDict:
    config = base_config("560m")
    config.mesh.update(fsdp=16)
    config.run.update(accumulation=2, remat="dots")
    return config
