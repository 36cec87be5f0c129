"""Write text with a model.

    python -m bloomjax.generate --model=SOURCE --prompt="def main("
    python -m bloomjax.generate --model=SOURCE --prompts_file=prompts.txt --json > answers.jsonl

SOURCE is a training workdir or a checkpoint, a folder of Hugging Face or Megatron-DeepSpeed, a GGUF
file, or a repository of the hub: bigscience/bloom-560m@main.

Texts go to stdout, in the order of the prompts, all else to stderr.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags

from bloomjax import cli, processes, source
from bloomjax.answers import Entry, Pieces, even, print_all, print_stream, rate, searched, together
from bloomjax.data.prompts import EMPTY, Prompt, read_prompts
from bloomjax.decode.beam import Beams, check_beams
from bloomjax.decode.engine import Request
from bloomjax.decode.engine import check as check_request
from bloomjax.decode.programs import CHUNK
from bloomjax.decode.sampling import Sampling, check
from bloomjax.decode.steps import CachedSteps
from bloomjax.decode.text import Answer, Text
from bloomjax.errors import ConfigError, InputError
from bloomjax.metrics import amount
from bloomjax.sharding import split_of
from bloomjax.source import CacheSize, Opened, cache_bytes, most_slots
from bloomjax.stages import Stages


def define(values: flags.FlagValues) -> None:
    def text(name: str, what: str) -> None:
        flags.DEFINE_string(name, None, what, flag_values=values)

    def integer(name: str, default: int, what: str) -> None:
        flags.DEFINE_integer(name, default, what, flag_values=values)

    def number(name: str, default: float, what: str) -> None:
        flags.DEFINE_float(name, default, what, flag_values=values)

    def one_of(name: str, names: list[str], what: str) -> None:
        flags.DEFINE_enum(name, names[0], names, what, flag_values=values)

    def switch(name: str, default: bool | None, what: str) -> None:
        flags.DEFINE_bool(name, default, what, flag_values=values)

    text("model", "where the model is")
    text("prompt", "text to continue")
    flags.DEFINE_list("prompt_ids", None, "token ids to continue: 1,2,3", flag_values=values)
    text(
        "prompts_file",
        'a text to continue in each line; or, in a .jsonl, {"prompt": "..."} or '
        '{"prompt_ids": [1, 2, 3]} in each',
    )
    integer("max_new_tokens", 128, "tokens to add at most")
    integer("min_new_tokens", 0, "tokens before which no end comes")
    number("temperature", 0.0, "0: the likeliest token, always; 1: drawn as likely as they are")
    integer("top_k", 0, "draw from the k likeliest; 0: all")
    number("top_p", 1.0, "draw from the fewest tokens of this mass")
    number("min_p", 0.0, "draw from tokens of this share of the likeliest one's probability")
    number("repetition_penalty", 1.0, "above 1, what is there already comes less likely again")
    integer("no_repeat_ngram_size", 0, "so many tokens in a row never come twice; 0: they may")
    integer("num_beams", 1, "above 1: the likeliest text, searched along so many")
    number("length_penalty", 1.0, "of beams: above 0 favours long texts")
    integer("num_return_sequences", 1, "texts for each prompt")
    flags.DEFINE_multi_string(
        "stop", [], "end before this text; may be given several times", flag_values=values
    )
    integer("seed", 0, "of the draws; of several texts the first")
    one_of("dtype", ["auto", "float32", "bfloat16"], "of compute")
    one_of("cache_dtype", ["auto", "bfloat16", "int8"], "of keys and values")
    one_of("quantize", ["none", "int8", "int4"], "weights")
    switch("stream", None, "print text as it comes; by default where there is but one")
    switch("verbose", False, "tell sizes and times on stderr")
    switch("json", False, "one JSON object for each text on stdout")


def main(values: flags.FlagValues) -> None:
    stages = Stages(values.verbose)
    stages.done("imports")
    sampling, beams = check_flags(values)
    prompts = given(values)
    with stages:
        opened = source.opened(values.model, None, values.dtype, values.quantize)
        limit = longest_of_file(opened, values) if values.prompts_file else sys.maxsize
        entries = []
        for index, prompt in enumerate(prompts):
            entries += entries_of(index, prompt, opened, values, sampling, limit)
        stages.done("open")
        answers = [entry.answer for entry in entries if entry.answer]
        length = max((len(a.request.prompt) for a in answers), default=0) + values.max_new_tokens
        slots = values.num_beams if beams else slots_for(len(answers), length, opened, values)
        cache = CacheSize(slots, length, values.cache_dtype)
        pieces: Pieces = ()
        note: Callable[[], str] = str
        if answers:
            stages.kept_in = cli.keep_compiled()
            model = opened.load(cache)
            stages.done("load")
        if answers and beams:
            steps = CachedSteps(model.config, model.params, model.mesh, length, cache.dtype)
            pieces = searched(steps, model.mesh, answers, beams)
        elif answers:
            engine = model.engine(*cache, prompt_tokens=sys.maxsize)
            stages.say(f"{slots} slots of {engine.length} tokens, {amount(engine.cache_bytes)}")
            pieces, note = together(engine, answers, slots), rate(engine)
        pieces = stages.first(pieces, "first token")
        if opened.tokenizer and values.stream is not False and not alone_not(values):
            print_stream(entries[0], pieces)
        else:
            print_all(entries, pieces, values.json, values.prompts_file or "", note)
        stages.done("the rest")
        each = statistics.median(a.tokens_per_second for a in answers) if answers else 0.0
        stages.say(f"{each:.1f} tokens/s of a text; of all, compiling too, {note()}")
        stages.tell_compiles()
    if bad := sum(bool(prompt.fault) for prompt in prompts):
        raise InputError(
            f"{values.prompts_file}: {bad} of {len(prompts)} lines were refused, as told in place"
        )


def check_flags(values: flags.FlagValues) -> tuple[Sampling, Beams | None]:
    """ConfigError, in one line, for flags that cannot be, or not together."""
    if not values.model:
        raise ConfigError("--model is missing: expected a workdir, a folder, a file or a hub id")
    ways = "prompt", "prompt_ids", "prompts_file"
    found = [f"--{name}" for name in ways if values[name].value is not None]
    if len(found) != 1:
        raise ConfigError(
            "expected one of --prompt, --prompt_ids and --prompts_file, found "
            + (" and ".join(found) or "none")
        )
    if values.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {values.max_new_tokens}: expected 1 or more")
    if "" in values.stop:
        raise ConfigError("--stop is empty: expected a text")
    if values.stream and (others := alone_not(values)):
        raise ConfigError(
            f"--stream with {others[0]}: expected one of the two; only a text alone can stream"
        )
    fields: list[Any] = [values[name].value for name in Sampling._fields]
    sampling = Sampling(*fields)
    count = values.num_return_sequences
    if values.num_beams != 1:
        beams = Beams(values.num_beams, values.length_penalty, count)
        check_beams(beams, sampling, values.max_new_tokens)
        if values.stop:
            raise ConfigError(
                f"--stop with num_beams {values.num_beams}: expected one of the two; a search "
                "compares texts that ended by themselves"
            )
        return sampling, beams
    check(sampling, values.max_new_tokens)
    if values.length_penalty != 1:
        raise ConfigError(
            f"length_penalty is {values.length_penalty}, but there are no beams: expected "
            "num_beams above 1, or no length_penalty"
        )
    if count < 1:
        raise ConfigError(f"num_return_sequences is {count}: expected 1 or more")
    if count > 1 and sampling.temperature == 0:
        raise ConfigError(
            f"num_return_sequences is {count}, but at temperature 0 all are the same: expected a "
            f"temperature above 0, or num_beams of {count} or more"
        )
    return sampling, None


def alone_not(values: flags.FlagValues) -> list[str]:
    """The flags by which there is not one text alone, to be printed as it comes."""
    flags_given = {
        "--json": values.json,
        "--prompts_file": values.prompts_file is not None,
        f"--num_beams={values.num_beams}": values.num_beams > 1,
        f"--num_return_sequences={values.num_return_sequences}": values.num_return_sequences > 1,
    }
    return [flag for flag, is_given in flags_given.items() if is_given]


def given(values: flags.FlagValues) -> list[Prompt]:
    """The prompt of the command line, or those of the file that it names."""
    if values.prompts_file is not None:
        return read_prompts(Path(values.prompts_file))
    try:
        ids = [int(i) for i in values.prompt_ids or ()]
    except ValueError as error:
        raise ConfigError(f"--prompt_ids: expected integers, found {error}") from error
    if not (values.prompt or ids):
        raise ConfigError(EMPTY)
    return [Prompt(text=values.prompt, ids=ids)]


def entries_of(
    index: int,
    prompt: Prompt,
    opened: Opened,
    values: flags.FlagValues,
    sampling: Sampling,
    limit: int,
) -> list[Entry]:
    """What is to be printed of a prompt, the `index`-th; `limit` is that of all its tokens.
    ConfigError for a fault of one that stands on the command line; InputError if a tokenizer is
    needed and there is none."""
    tokenizer, count = opened.tokenizer, values.num_return_sequences
    if tokenizer:
        prompt.encode(tokenizer)
    elif prompt.text is not None or values.stop:
        raise InputError(
            f"{opened.source} has no tokenizer: expected prompts of ids, and no --stop, found "
            "text; give --prompt_ids"
        )
    stop_ids = (tokenizer.eos_id,) if tokenizer else ()
    requests = [
        Request(prompt.ids, values.max_new_tokens, sampling, values.seed + n, stop_ids)
        for n in range(index * count, (index + 1) * count)
    ]
    try:
        if not prompt.fault:
            check_request(requests[0], opened.config, limit)
    except InputError as error:
        prompt.fault = str(error)
    if prompt.fault and not prompt.line:
        raise ConfigError(prompt.fault)
    if prompt.fault:
        return [Entry(prompt)]
    texts = [Text(tokenizer.stream(), values.stop) if tokenizer else None for _ in requests]
    written = map(Answer, requests, texts)
    return [Entry(prompt, sequence, answer) for sequence, answer in enumerate(written)]


def longest_of_file(opened: Opened, values: flags.FlagValues) -> int:
    """Tokens of a line, answer included, for whose cache there is memory beside the model. Where
    there is none even for the model, that is for `Opened.load` to say."""
    room, rows = processes.on_first(opened.room), values.num_beams
    if room is None or room < 0:
        return sys.maxsize
    chunk = CacheSize(rows, CHUNK, values.cache_dtype)
    return room // cache_bytes(opened.config, opened.mesh, chunk) * CHUNK


def slots_for(count: int, length: int, opened: Opened, values: flags.FlagValues) -> int:
    """As many as are of use, and have memory; 1 at least."""
    room = processes.on_first(opened.room)
    with jax.set_mesh(opened.mesh):
        split, most = split_of("C"), most_slots()  # devices have whole slots, or all of them
    for slots in range(-(-even(count, most) // split) * split, 1, -split):
        cache = CacheSize(slots, length, values.cache_dtype)
        if room is None or cache_bytes(opened.config, opened.mesh, cache) <= room:
            return slots
    return 1


if __name__ == "__main__":
    cli.run(main, define, __doc__)
