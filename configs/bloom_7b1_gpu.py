r"""BLOOM 7b1 by the published recipe on two nodes of eight H100s.

    python -m bloomjax.train --config=configs/bloom_7b1_gpu.py --workdir=runs/7b1 \
        --config.data.train=PREFIX --config.data.tokenizer=tokenizer.json

What it takes, and how long:

    python -m bloomjax.plan --config=configs/bloom_7b1_gpu.py --target=gpu-h100:2x8
"""

from ml_collections import ConfigDict

from bloomjax.config import base_config

TARGET = "gpu-h100:2x8"  # of the plan in benchmarks/results/


def get_config() -> ConfigDict:
    config = base_config("7b1")
    config.mesh.update(fsdp=16)
    config.run.update(accumulation=4, remat="dots")
    return config
