"""One table: every parameter of BLOOM, its name in each format, and how the layouts differ.

Letters as everywhere. A tensor of another format is a vector or a matrix whose dimensions are
groups of letters: torch's linear layers are [out, in], so the fused QKV, which we keep as DN3H, is
"N3H.D", a matrix of N*3*H rows. The one invariant: what travels between formats is rows of these
matrices in Hugging Face's layout (`theirs`). Megatron's is the same; GGUF's has the same letters in
another order where all queries come before all keys ("3NH.D").
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from bloomjax.config import ModelConfig

Sizes = Mapping[str, int]  # of letters, as ModelConfig.sizes


class Row(NamedTuple):
    path: str  # ours: keys of the parameter tree joined by dots; blocks are stacked along L
    ours: str  # letters of one layer's tensor
    theirs: str  # letters of Hugging Face's and Megatron's, a "." between the dimensions
    hf: str  # without the optional prefix `transformer.`; {} is the layer
    megatron: str  # in the layer file of number `megatron_file`
    gguf: str  # {} is the layer

    @property
    def stacked(self) -> bool:
        return self.path.startswith("blocks.")

    def layers(self, config: ModelConfig) -> range:
        return range(config.layers if self.stacked else 1)

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Of `theirs`."""
        return tuple(math.prod(sizes[a] for a in group) for group in self.theirs.split("."))

    def unit(self, sizes: Sizes) -> int:
        """Rows of `theirs` that belong to one index of its first letter: 3H in "N3H.D"."""
        return math.prod(sizes[a] for a in self.theirs.split(".")[0][1:])

    @property
    def split(self) -> int | None:
        """The dimension of `theirs` that tensor parallelism cuts: that which begins with the
        vocabulary, the heads or the ffn. None: every rank has the whole."""
        groups = self.theirs.split(".")
        return next((i for i, group in enumerate(groups) if group[0] in "VNF"), None)

    def to_ours(self, rows: Any, sizes: Sizes) -> Any:
        """Rows of `theirs`, in whole units, in our layout. Works on numpy and JAX arrays."""
        letters = self.theirs.replace(".", "")
        lettered = rows.reshape(-1, *(sizes[a] for a in letters[1:]))
        return lettered.transpose([letters.index(a) for a in self.ours])

    def to_theirs(self, array: Any, sizes: Sizes) -> Any:
        """The inverse of `to_ours`; here too `array` may hold a part of the first letter."""
        letters = self.theirs.replace(".", "")
        lettered = array.transpose([self.ours.index(a) for a in letters])
        return lettered.reshape(-1, *self.shape(sizes)[1:])

    def megatron_file(self, layer: int, layers: int) -> int:
        """The II of layer_II-model_TT-model_states.pt: 00, 02 and 03+L are functions of the
        pipeline without parameters (megatron/model/gpt_model.py, GPTModelPipe)."""
        return 3 + layer if self.stacked else 4 + layers if self.path.startswith("ln_") else 1


def _block(name: str, ours: str, theirs: str, hf: str, gguf: str) -> Row:
    return Row(f"blocks.{name}", ours, theirs, f"h.{{}}.{hf}", hf, f"blk.{{}}.{gguf}")


_EMBED, _LN = "word_embeddings", "word_embeddings_layernorm"

TABLE = (
    Row("embed", "VD", "V.D", f"{_EMBED}.weight", f"{_EMBED}.weight", "token_embd.weight"),
    Row("embed_ln_w", "D", "D", f"{_LN}.weight", f"{_EMBED}.norm.weight", "token_embd_norm.weight"),
    Row("embed_ln_b", "D", "D", f"{_LN}.bias", f"{_EMBED}.norm.bias", "token_embd_norm.bias"),
    _block("ln1_w", "D", "D", "input_layernorm.weight", "attn_norm.weight"),
    _block("ln1_b", "D", "D", "input_layernorm.bias", "attn_norm.bias"),
    _block("qkv_w", "DN3H", "N3H.D", "self_attention.query_key_value.weight", "attn_qkv.weight"),
    _block("qkv_b", "N3H", "N3H", "self_attention.query_key_value.bias", "attn_qkv.bias"),
    _block("out_w", "NHD", "D.NH", "self_attention.dense.weight", "attn_output.weight"),
    _block("out_b", "D", "D", "self_attention.dense.bias", "attn_output.bias"),
    _block("ln2_w", "D", "D", "post_attention_layernorm.weight", "ffn_norm.weight"),
    _block("ln2_b", "D", "D", "post_attention_layernorm.bias", "ffn_norm.bias"),
    _block("up_w", "DF", "F.D", "mlp.dense_h_to_4h.weight", "ffn_up.weight"),
    _block("up_b", "F", "F", "mlp.dense_h_to_4h.bias", "ffn_up.bias"),
    _block("down_w", "FD", "D.F", "mlp.dense_4h_to_h.weight", "ffn_down.weight"),
    _block("down_b", "D", "D", "mlp.dense_4h_to_h.bias", "ffn_down.bias"),
    Row("ln_w", "D", "D", "ln_f.weight", "weight", "output_norm.weight"),
    Row("ln_b", "D", "D", "ln_f.bias", "bias", "output_norm.bias"),
)
ROWS = {row.path: row for row in TABLE}

# Second names of the tied embedding, which a file may hold as a copy: Hugging Face's and GGUF's.
HEADS = ("lm_head.weight", "output.weight")


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"blocks.up_w": a} -> {"blocks": {"up_w": a}}."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
