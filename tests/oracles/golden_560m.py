"""bloom-560m's golden text, from the Hub: for whoever has it.

    pip install .
    python tests/oracles/golden_560m.py            (1.1 GB to download, 6 GB of memory)

What transformers' own tests expect of bigscience/bloom-560m at the revision gs555750, greedy, in
float32 (tests/models/bloom/test_modeling_bloom.py; `max_length` counts the prompt too). All rows
are generated in one batch, so that equal prompts must give equal text and short ones padding. The
result is written to benchmarks/results/; leaves with 1 if a text or an id differs.
"""

import pathlib
import sys

import bloomjax

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

SOURCE = "bigscience/bloom-560m@gs555750"
DOG = "I enjoy walking with my cute dog"
DOG_TEXT = (
    DOG + ", and I love to watch the kids play with the kids. I am a very active person, and I "
    "enjoy working out, and I am a very active person. I am a very active person, and I"
)
HELLO = "Hello what is"
HELLO_TEXT = HELLO + " the best way to get the data from the server? I have tried"
IDS = {
    "Hello world": [59414, 8876],
    " Hello world": [86153, 8876],
    "The quick brown fox</s>": [2175, 23714, 73173, 144252, 2],
}


def main() -> None:
    from facts import keep, machine

    model = bloomjax.load(SOURCE, dtype="float32")
    assert model.tokenizer
    encode, decode = model.tokenizer.encode, model.tokenizer.decode
    rows = [(DOG, DOG_TEXT, 50), (DOG, DOG_TEXT, 50), (HELLO, HELLO_TEXT, 20)]
    prompts = [encode(prompt) for prompt, _, _ in rows]
    new: list[list[int]] = [[] for _ in rows]
    for fresh in model.generate(prompts, max_new_tokens=50):
        for ids, row in zip(new, fresh, strict=True):
            ids += row.ids
    texts = [
        decode((prompt + ids)[:length])
        for prompt, ids, (_, _, length) in zip(prompts, new, rows, strict=True)
    ]
    ids = {text: encode(text) for text in IDS}
    holds = ids == IDS and texts == [text for _, text, _ in rows]
    result = {
        "what": "golden text of bloom-560m, greedy, float32",
        "source": SOURCE,
        "holds": holds,
        "texts": texts,
        "ids": ids,
        "machine": machine("jax", "flax", "numpy", "tokenizers", "huggingface_hub"),
    }
    keep("golden-560m", result)
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
