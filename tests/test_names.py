"""The table of the formats is the model's own, and layouts are inverse to each other."""

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import model_config, one_device
from oracles.weights import shapes

from bloomjax.formats.names import TABLE, Row
from bloomjax.formats.tensors import order, parts
from bloomjax.model import Bloom

CONFIG = model_config(layers=3, width=42, heads=6, vocab_size=10)


def test_the_table_is_the_models_parameters() -> None:
    with jax.set_mesh(one_device()):
        state = nnx.state(nnx.eval_shape(lambda: Bloom(CONFIG, nnx.Rngs(0))))
    leaves = jax.tree_util.tree_leaves_with_path(
        state, is_leaf=lambda leaf: isinstance(leaf, nnx.Param)
    )
    declared = {".".join(key.key for key in path): leaf.axes for path, leaf in leaves}
    assert declared == {row.path: "L" * row.stacked + row.ours for row in TABLE}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.path)
def test_layouts_are_inverse(row: Row) -> None:
    n = CONFIG.sizes
    rows = np.random.default_rng(0).standard_normal(row.shape(n))
    ours = row.to_ours(rows, n)
    assert ours.shape == tuple(n[a] for a in row.ours)
    assert np.array_equal(row.to_theirs(ours, n), rows)
    for start, stop in parts(row, n, 8, 2000):  # and so are parts of them
        part = row.to_ours(rows[start:stop], n)
        assert part.size * 8 <= max(2000, row.unit(n) * rows[0].size * 8)
        assert np.array_equal(row.to_theirs(part, n), rows[start:stop])


def test_qkv_is_three_to_a_head() -> None:
    """Row n*3*H + i*H + h of query_key_value is feature h of the i-th of q, k, v of head n
    (transformers' modeling_bloom.py, _reshape)."""
    n, (row,) = CONFIG.sizes, [row for row in TABLE if row.path == "blocks.qkv_w"]
    rows = np.arange(3 * n["D"])[:, None] + np.zeros(n["D"])
    ours = row.to_ours(rows, n)
    for head, i, h in ((0, 0, 1), (2, 1, 0), (5, 2, 6)):
        assert (ours[:, head, i, h] == head * 3 * n["H"] + i * n["H"] + h).all()


def test_every_tensor_comes_once() -> None:
    names = [row.hf.format(layer) for row, layer in order(CONFIG)]
    assert len(names) == len(set(names)) == 12 * CONFIG.layers + 5
    assert names[0] == "word_embeddings.weight" and names[-1] == "ln_f.bias"


def test_megatron_cuts_vocabulary_heads_and_ffn() -> None:
    """tools/convert_checkpoint/deepspeed_to_transformers.py: what is averaged, and what is
    concatenated along dimension 1 ("row parallel") or 0."""
    averaged = {"word_embeddings.norm", "input_layernorm", "post_attention_layernorm"}
    averaged |= {"self_attention.dense.bias", "mlp.dense_4h_to_h.bias"}
    for row in TABLE:
        if row.path in ("ln_w", "ln_b") or any(row.megatron.startswith(name) for name in averaged):
            assert row.split is None
        else:
            second = row.megatron in ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight")
            assert row.split == int(second)


def test_names_are_those_of_the_gguf_package() -> None:
    """gguf.constants says which tensors llama.cpp asks of a BLOOM, and how it calls them."""
    from gguf.constants import MODEL_ARCH, MODEL_TENSOR, MODEL_TENSORS, TENSOR_NAMES

    known = {TENSOR_NAMES[t].replace("{bid}", "{}") for t in MODEL_TENSORS[MODEL_ARCH.BLOOM]}
    known.remove(
        TENSOR_NAMES[MODEL_TENSOR.OUTPUT]
    )  # a copy of the embedding, which may be left out
    assert {row.gguf.rpartition(".")[0] for row in TABLE} == known
    assert all(row.gguf.rpartition(".")[2] == row.hf.rpartition(".")[2] for row in TABLE)


def test_names_are_hugging_faces() -> None:
    """Those that transformers loads in tests/oracles/hf_bloom.py."""
    names = {name for name, _ in shapes(CONFIG.layers, CONFIG.width, CONFIG.vocab_size)}
    assert names == {row.hf.format(layer) for row, layer in order(CONFIG)}
