"""What a program does besides its products: ours, and the one that trained BLOOM, to calibrate by.

Everything is bytes through memory for one element (or one parameter), counted from the operations
of the program: a read or a write of a bfloat16 is 2, of a float32 4. Constants of hardware are in
`machines`; a program differs from another only in what stands here, each with its reason.
"""

import dataclasses

from bloomjax.attention import CHUNK


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes an element, or parameter: of the forward pass, of the backward pass, and of what the
    backward pass computes again."""

    forward: float
    backward: float
    again: float


@dataclasses.dataclass(frozen=True)
class Software:
    name: str
    split_stream: bool  # the residual stream is split over `tensor` between the products
    gathers_weights: bool  # weights rest split over fsdp; else only the optimizer's state does
    lockstep: bool  # all stages of a pipeline wait for each other at every tick
    slots: bool  # embedding and head count as layers where layers are dealt to stages
    spreads_head: bool  # every stage computes a share of the head where layers divide evenly
    reruns_all: bool  # recomputation runs a layer's last product too
    stream: Traffic  # an element of the residual stream (norms, sums, dropout)
    ffn: Traffic  # of the widened activation (bias, GELU)
    qkv: Traffic  # of queries, keys, values (bias, transposes)
    scores: Traffic  # of attention's scores that are computed; a flash kernel: none
    chunk: int  # queries whose later keys are skipped together; 0: no key is skipped
    attention_share: float  # of the products' rate that attention's products reach
    logits: float  # of the head's logits
    weight: float  # a parameter, every microbatch: sums of gradients, copies of weights
    gradient_bytes: int  # of a gradient that devices exchange, in a pipeline
    transfer_exposed: float  # share of a transfer between stages that nothing hides
    weights_hidden: float  # share of the time to gather and scatter that products may hide
    launches: float  # seconds between the kernels of a layer and a microbatch, in all


# Counted in the text of the step that XLA compiles for an H200 (the width of 7b1, two and four
# layers, 16 and 32 heads, "dots"): 59 bytes a score, and 370 a token, layer and unit of width
# beside scores and products; their split is by reasoning. Stream: two norms, whose float32 passes
# are not all one, and two sums with a bias. Q, k, v: transposes for the batched products, and
# gradients of the chunks' keys, padded and added. Scores are float32 in memory, chunk by chunk:
# written by the product, read by the softmax, written and read as bfloat16; backward they are made
# again, and four products read or write them. Weights inside a pipeline: a slice of the stack is
# copied for each of two passes (8), a gradient is written (2) and added (10). Some 80 kernels a
# layer, 1.5 us apart (Hazy Research measured 1.3 us in CUDA graphs on an H100).
OURS = Software(
    name="bloomjax",
    split_stream=True,
    gathers_weights=True,
    lockstep=True,
    slots=True,
    spreads_head=True,
    reruns_all=False,
    stream=Traffic(24, 40, 20),
    ffn=Traffic(6, 12, 6),
    qkv=Traffic(17, 36, 10),
    scores=Traffic(18, 41, 18),
    chunk=CHUNK,
    attention_share=0.7,
    logits=14,
    weight=20,
    gradient_bytes=4,
    transfer_exposed=0.5,
    weights_hidden=0.9,
    launches=80 * 1.5e-6,
)

# The same where a flash kernel keeps scores on the chip, reads q, k, v as they lie and skips keys
# in blocks of 128: what `attention` does not do yet.
FLASH = dataclasses.replace(
    OURS,
    name="bloomjax with a flash kernel",
    qkv=Traffic(4, 6, 4),
    scores=Traffic(0, 0, 0),
    chunk=128,
)

# Megatron-DeepSpeed of early 2022 (megatron/model/transformer.py; deepspeed/runtime/pipe/engine.py
# and bf16_optimizer.py). Stream: it is whole on every device of `tensor`; two norms (8), twice
# dropout with its mask and the sum (14); backward also the biases' sums. Scores: all T x T of them
# in bfloat16: alibi copied and added by the product (6), fused softmax (4), dropout with its mask
# (5), read by the product (2). Gradients: written (2), cast to float32 (6), added (12). Transfers
# block, and their pieces are gathered over `tensor` again. Its runs on many nodes hung without
# CUDA_LAUNCH_BLOCKING=1 (tr11-176B-ml.slurm), so each of a layer's some 110 kernels (22 forward and
# again, 42 backward, 24 for gradients) waits for the host.
MEGATRON = Software(
    name="Megatron-DeepSpeed 2022, bfloat16",
    split_stream=False,
    gathers_weights=False,
    lockstep=False,
    slots=True,
    spreads_head=False,
    reruns_all=True,
    stream=Traffic(22, 38, 22),
    ffn=Traffic(4, 8, 4),
    qkv=Traffic(5.3, 5.3, 5.3),
    scores=Traffic(17, 19, 17),
    chunk=0,
    attention_share=0.7,
    logits=52,
    weight=20,
    gradient_bytes=4,
    transfer_exposed=1.0,
    weights_hidden=0.0,
    launches=110 * 20e-6,
)

# Its float16 of the trials of February 2022: gradients are summed in float16 (2 + 6), and layers
# were dealt to stages without a thought for embedding and head.
MEGATRON_FP16 = dataclasses.replace(
    MEGATRON,
    name="Megatron-DeepSpeed 2022, float16",
    slots=False,
    weight=8,
    gradient_bytes=2,
)
