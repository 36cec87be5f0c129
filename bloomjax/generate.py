"""Write text with a model.

    python -m bloomjax.generate --model=SOURCE --prompt="def main("

SOURCE is a training workdir or a checkpoint, a folder of Hugging Face or Megatron-DeepSpeed, a GGUF
file, or a repository of the hub: bigscience/bloom-560m@main.
"""

import json
import sys
import time

import jax
from absl import flags

from bloomjax import cli, source
from bloomjax.decode.sampling import Sampling
from bloomjax.errors import ConfigError


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("model", None, "where the model is", flag_values=values)
    flags.DEFINE_string("prompt", None, "text to continue", flag_values=values)
    flags.DEFINE_list("prompt_ids", None, "token ids to continue: 1,2,3", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 128, "tokens to add at most", flag_values=values)
    flags.DEFINE_float(
        "temperature", 0.0, "0: the likeliest token, always", lower_bound=0.0, flag_values=values
    )
    flags.DEFINE_integer("top_k", 0, "draw from the k likeliest; 0: all", 0, flag_values=values)
    flags.DEFINE_float(
        "top_p", 1.0, "draw from the fewest tokens of this mass", 0.0, 1.0, flag_values=values
    )
    flags.DEFINE_integer("seed", 0, "of the draws", flag_values=values)
    flags.DEFINE_enum(
        "dtype", "auto", ["auto", "float32", "bfloat16"], "of compute", flag_values=values
    )
    flags.DEFINE_bool("stream", True, "print text as it comes", flag_values=values)
    flags.DEFINE_bool("verbose", False, "tell sizes and times on stderr", flag_values=values)
    flags.DEFINE_bool("json", False, "one JSON object on stdout", flag_values=values)


def main(values: flags.FlagValues) -> None:
    if not values.model:
        raise ConfigError("--model is missing: expected a workdir, a folder, a file or a hub id")
    if (values.prompt is None) == (values.prompt_ids is None):
        raise ConfigError("expected either --prompt or --prompt_ids")
    if values.max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens is {values.max_new_tokens}: expected 1 or more")
    try:
        given_ids = [int(i) for i in values.prompt_ids or ()]
    except ValueError as error:
        raise ConfigError(f"--prompt_ids: expected integers, found {error}") from error
    if not (values.prompt or given_ids):
        raise ConfigError("the prompt is empty: expected at least one token")
    model = source.load(values.model, dtype=values.dtype)
    tokenizer = model.tokenizer
    if values.prompt_ids is None and tokenizer is None:
        raise ConfigError(f"{values.model} has no tokenizer: give --prompt_ids instead")
    prompt_ids = tokenizer.encode(values.prompt) if tokenizer and values.prompt else given_ids
    V = model.config.vocab_size
    if wrong := [i for i in prompt_ids if not 0 <= i < V]:
        raise ConfigError(f"--prompt_ids has {wrong[0]}: expected 0 to {V - 1}")
    if values.verbose:
        count = model.config.parameter_count
        print(f"{model.origin}: {count:,} parameters, mesh {model.mesh}", file=sys.stderr)

    speaks = jax.process_index() == 0
    streams = values.stream and not values.json and speaks
    stream = tokenizer.stream() if tokenizer and streams else None
    sampling = Sampling(values.temperature, values.top_k, values.top_p)
    start = time.perf_counter()
    first = 0.0
    ids: list[int] = []
    logprob = 0.0
    if stream and values.prompt is not None:
        print(values.prompt, end="", flush=True)
    for fresh in model.generate([prompt_ids], values.max_new_tokens, sampling, seed=values.seed):
        first = first or time.perf_counter() - start
        ids += fresh.ids
        logprob += sum(fresh.logprobs)
        if stream:
            print("".join(map(stream.feed, fresh.ids)), end="", flush=True)
    seconds = time.perf_counter() - start
    rate = (len(ids) - 1) / (seconds - first) if len(ids) > 1 else 0.0
    if values.verbose:
        print(f"first token after {first:.2f} s, then {rate:.1f} tokens/s", file=sys.stderr)
    if not speaks:
        return
    text = tokenizer.decode(ids) if tokenizer else None
    if values.json:
        record = {
            "prompt_ids": prompt_ids,
            "token_ids": ids,
            "text": text,
            "logprob": logprob,
            "tokens_per_second": rate,
            "seconds_to_first_token": first,
        }
        print(json.dumps(record))
    elif stream:
        print(stream.end())
    else:
        print(",".join(map(str, ids)) if text is None else (values.prompt or "") + text)


if __name__ == "__main__":
    cli.run(main, define, __doc__)
