r"""BLOOM 1b7 by the published recipe on eight H100s.

    python -m bloomjax.train --config=configs/bloom_1b7_gpu.py --workdir=runs/1b7 \
        --config.data.train=PREFIX --config.data.tokenizer=tokenizer.json

What it takes, and how long:

    python -m bloomjax.plan --config=configs/bloom_1b7_gpu.py --target=gpu-h100:1x8
"""

from ml_collections import ConfigDict

from bloomjax.config import base_config

TARGET = "gpu-h100:1x8"  # of the plan in benchmarks/results/


def get_config() -> ConfigDict:
    config = base_config("1b7")
    config.mesh.update(fsdp=8)
    config.run.update(accumulation=4, remat="dots")
    return config
