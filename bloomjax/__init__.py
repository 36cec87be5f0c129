"""bloomjax: BLOOM on JAX meshes, from a laptop's CPU to pods of GPUs and TPUs.

import bloomjax

model = bloomjax.load("runs/quickstart")
logits_BTV = model(tokens_BT)
"""

from bloomjax.config import SIZES, Config, base_config, freeze
from bloomjax.decode.beam import Beams
from bloomjax.decode.sampling import Sampling
from bloomjax.errors import UserError
from bloomjax.model import Bloom
from bloomjax.source import Model, load

__all__ = [
    "SIZES",
    "Beams",
    "Bloom",
    "Config",
    "Model",
    "Sampling",
    "UserError",
    "base_config",
    "freeze",
    "load",
]
