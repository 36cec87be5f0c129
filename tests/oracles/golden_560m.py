"""bloom-560m's golden text, from the Hub: for whoever has it.

    pip install .
    python tests/oracles/golden_560m.py            (1.1 GB to download, 6 GB of memory)

What transformers' own tests expect of bigscience/bloom-560m at the revision gs555750, greedy, in
float32 (tests/models/bloom/test_modeling_bloom.py), with the tokenizer of the main branch as there.
All rows are generated in one batch, so that equal prompts must give equal text and short ones
padding. The result is written to benchmarks/results/; leaves with 1 if a text or an id differs.
"""

import pathlib
import sys

from huggingface_hub import hf_hub_download

import bloomjax
from bloomjax.data.tokenizer import load_tokenizer

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

REPOSITORY, REVISION = "bigscience/bloom-560m", "gs555750"
DOG = (
    "I enjoy walking with my cute dog",
    ", and I love to watch the kids play with the kids. I am a very active person, and I enjoy "
    "working out, and I am a very active person. I am a very active person, and I",
)
TEXTS = (
    DOG,
    DOG,
    ("Hello what is", " the best way to get the data from the server? I have tried"),
    (
        "Running a quick test with the",
        " following command:\nsudo apt-get install python3\nsudo apt-get install python2",
    ),
)
IDS = {
    "Hello world": [59414, 8876],
    " Hello world": [86153, 8876],
    "The quick brown fox</s>": [2175, 23714, 73173, 144252, 2],
}


def main() -> None:
    from facts import keep, machine

    tokenizer = load_tokenizer(hf_hub_download(REPOSITORY, "tokenizer.json"))
    model = bloomjax.load(f"{REPOSITORY}@{REVISION}", dtype="float32")
    prompts = [tokenizer.encode(prompt) for prompt, _ in TEXTS]
    new: list[list[int]] = [[] for _ in TEXTS]
    for fresh in model.generate(prompts, max_new_tokens=48):
        for ids, row in zip(new, fresh, strict=True):
            ids += row.ids
    found = [tokenizer.decode(ids)[: len(text)] for ids, (_, text) in zip(new, TEXTS, strict=True)]
    ids = {text: tokenizer.encode(text) for text in IDS}
    holds = ids == IDS and found == [text for _, text in TEXTS]
    result = {
        "what": "golden text of bloom-560m, greedy, float32",
        "source": model.origin,
        "holds": holds,
        "texts": found,
        "ids": ids,
        "machine": machine("jax", "flax", "numpy", "tokenizers", "huggingface_hub"),
    }
    keep("golden-560m", result)
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
