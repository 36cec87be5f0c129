"""One more step of AdamW in torch, from the state that tests/golden/megatron_folder.tar.xz holds.

    pip install torch==2.13.0 transformers==5.23.0 numpy==2.4.6
    python tests/oracles/megatron_step.py          (writes tests/golden/megatron_step.npz)

The run that went on: transformers' BloomForCausalLM in float32 with the whole tensors of
megatron_tensors.py, their moments in torch.optim.AdamW at the step of the folder, BLOOM's betas,
epsilon and decay, gradients clipped as megatron/optimizer/clip_grads.py does. The file holds the
batch, and parameters and moments after the step.
"""

import pathlib
import sys

import numpy as np
import torch
from transformers import BloomConfig, BloomForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from oracles.megatron_tensors import HEADS, LAYERS, STEP, VOCAB_SIZE, WIDTH, tensors

RATE = 1e-3  # over ten times BLOOM's, so that a wrong moment shows
BATCH, TOKENS = 4, 16


def main() -> None:
    values = tensors(LAYERS, WIDTH, VOCAB_SIZE)
    model = BloomForCausalLM(
        BloomConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            attn_implementation="eager",
        )
    )
    state = {
        f"transformer.{name}": torch.from_numpy(a.copy()) for name, a in values["fp32"].items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected
    model.tie_weights()
    named = dict(model.transformer.named_parameters())
    assert named.keys() == values["fp32"].keys()
    norms = ("norm", "ln_f")
    decayed = [n for n in named if n.endswith("weight") and not any(x in n for x in norms)]
    optimizer = torch.optim.AdamW(
        [
            {"params": [named[n] for n in decayed], "weight_decay": 0.1},
            {"params": [p for n, p in named.items() if n not in decayed], "weight_decay": 0.0},
        ],
        lr=RATE,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for name, parameter in named.items():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(STEP)),
            **{
                key: torch.from_numpy(values[key][name].copy()) for key in ("exp_avg", "exp_avg_sq")
            },
        }
    rows = np.random.RandomState(5).randint(0, VOCAB_SIZE, (BATCH, TOKENS + 1))
    logits = model(torch.from_numpy(rows[:, :-1])).logits
    targets = torch.from_numpy(rows[:, 1:])
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets)
    loss.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in named.values()))
    factor = min(1.0, 1.0 / (norm.item() + 1e-6))
    for parameter in named.values():
        parameter.grad *= factor
    optimizer.step()
    after = {f"params/{name}": p.detach().numpy() for name, p in named.items()}
    for kind, key in (("moments.mu", "exp_avg"), ("moments.nu", "exp_avg_sq")):
        after |= {f"{kind}/{n}": optimizer.state[p][key].numpy() for n, p in named.items()}
    path = pathlib.Path(__file__).parents[1] / "golden" / "megatron_step.npz"
    np.savez_compressed(
        path, rows=rows.astype(np.int32), loss=loss.item(), norm=norm.item(), rate=RATE, **after
    )
    print(f"{path}: {path.stat().st_size:,} bytes; loss {loss.item():.6f}, norm {norm.item():.4f}")


if __name__ == "__main__":
    main()
