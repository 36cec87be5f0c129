r"""BLOOM 176b by the published recipe on 48 nodes of eight H200s.

    python -m bloomjax.train --config=configs/bloom_176b_gpu.py --workdir=runs/176b \
        --config.data.train=PREFIX --config.data.tokenizer=tokenizer.json

384 devices are 3 x 128, and 3 divides no axis of a weight: it splits the batch, which is 2,016 for
2,048.

What it takes, and how long:

    python -m bloomjax.plan --config=configs/bloom_176b_gpu.py --target=gpu-h200:48x8
"""

from ml_collections import ConfigDict

from bloomjax.config import base_config

TARGET = "gpu-h200:48x8"  # of the plan in benchmarks/results/


def get_config() -> ConfigDict:
    config = base_config("176b")
    config.data.batch_size = 2016
    config.optim.steps = 117_143  # as many samples
    config.mesh.update(data=3, fsdp=32, tensor=4)
    config.run.update(accumulation=7, remat="dots")
    return config
