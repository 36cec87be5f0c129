"""A file of torch.save with everything that the reader knows: tests/golden/torch_save.pt.

    pip install torch==2.13.0 numpy
    python tests/oracles/torch_files.py

Values are counted up from 0, so that tests know them.
"""

import argparse
import pathlib
from collections import OrderedDict

import numpy as np
import torch

DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8")


def main() -> None:
    tensors = {name: torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in DTYPES}
    whole, odd = torch.arange(20.0), torch.arange(4.0)
    odd.partition_dim = 1  # Megatron gives attributes to tensors
    state = OrderedDict(weight=torch.arange(2.0))
    state._metadata = OrderedDict({"": {"version": 1}})
    tree = {
        "tensors": tensors,
        "bool": torch.tensor([False, True]),
        "parameter": torch.nn.Parameter(torch.arange(3.0)),
        "view": whole[4:10].reshape(2, 3),
        "same_storage": whole[12:],
        "one_row": torch.arange(6.0).reshape(2, 3).T[:, :1].T,  # odd strides where sizes are 1
        "attributes": odd,
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "state": state,
        "size": torch.Size([2, 3]),
        "plain": [None, True, -1, 300, 70_000, 2**40, -(2**70), 1.5, "é\n", (), (1,), b"\xff\x00"],
        "args": argparse.Namespace(layers=2, dtype=torch.bfloat16, device=torch.device("cpu")),
        "set": {"a"},
        "random": np.random.RandomState(0).get_state(),
        "scalars": [np.float64(1.5), np.int64(3)],
        5: "number",
    }
    path = pathlib.Path(__file__).parents[1] / "golden" / "torch_save.pt"
    torch.save(tree, path)
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
