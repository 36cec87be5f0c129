"""How the next token is chosen: what a request asks for, and the choice for all rows at once.

Letters: B rows (one a request), V vocabulary, S places of a row's history (its prompt and what
followed), E ids that end a request. Semantics and order are those of transformers (generation/
logits_process.py, 5.23): repetition penalty, n-grams that may not come again, minimum length;
then, for draws, temperature, top-k, top-p, min-p.

The one invariant: a row's token depends on its own logits, history and settings alone. Draws are
keyed by (seed of the request, position), and what a row does not ask for leaves it as it is.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bloomjax.errors import ConfigError
from bloomjax.sharding import act, on_cpu, on_devices


class Features(NamedTuple):
    """What a program has to do at all; static for the compiler. `a | b` does what either needs."""

    draws: bool = False
    top_k: bool = False
    top_p: bool = False
    history: bool = False  # repetition penalty, n-grams
    minimum: bool = False

    def __or__(self, other: "Features") -> "Features":
        return Features(*map(operator.or_, self, other))


class Sampling(NamedTuple):
    """What a request asks for; the defaults are greedy and change nothing."""

    temperature: float = 0.0  # 0: the likeliest token, always
    top_k: int = 0  # draw from the k likeliest; 0: from all
    top_p: float = 1.0  # draw from the fewest tokens of this probability together
    min_p: float = 0.0  # draw from tokens of this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # on tokens of the prompt and of the answer
    no_repeat_ngram_size: int = 0  # no n tokens come twice, prompt included; 0: they may
    min_new_tokens: int = 0  # nothing ends before

    @property
    def features(self) -> Features:
        return Features(
            draws=self.temperature > 0,
            top_k=self.top_k > 0,
            top_p=self.top_p < 1,
            history=self.repetition_penalty != 1 or self.no_repeat_ngram_size > 0,
            minimum=self.min_new_tokens > 0,
        )


GREEDY = Sampling()
GROUP = 512  # ids that are taken together: about the root of BLOOM's vocabulary


def check(sampling: Sampling, max_new_tokens: int | None = None) -> None:
    """ConfigError, in one line, for a value out of its range or one that another makes idle."""
    most_int = 2**31 - 1
    ranges = {
        "temperature": (0.0, math.inf, "0 (greedy) or more"),
        "top_k": (0, most_int, "0 (off) or more"),
        "top_p": (0.0, 1.0, "0 to 1"),
        "min_p": (0.0, 1.0, "0 to 1"),
        "repetition_penalty": (math.ulp(0.0), math.inf, "above 0 (1: off)"),
        "no_repeat_ngram_size": (0, most_int, "0 (off) or more"),
        "min_new_tokens": (0, most_int, "0 or more"),
    }
    for name, (least, most, expected) in ranges.items():
        value = getattr(sampling, name)
        if not least <= value <= most or value == math.inf:
            raise ConfigError(f"{name} is {value}: expected {expected}")
    if sampling.temperature == 0:
        for name in ("top_k", "top_p", "min_p"):
            value = getattr(sampling, name)
            if value != getattr(GREEDY, name):
                raise ConfigError(
                    f"{name} is {value}, but nothing is drawn at temperature 0: expected a "
                    f"temperature above 0 (1: the model's own), or no {name}"
                )
    if max_new_tokens is not None and sampling.min_new_tokens > max_new_tokens:
        raise ConfigError(
            f"min_new_tokens is {sampling.min_new_tokens}: expected max_new_tokens "
            f"({max_new_tokens}) at most"
        )


class Settings(NamedTuple):
    """The `Sampling` of every row, and what else of its request a choice depends on."""

    temperature_B: Any  # float32
    top_k_B: Any  # int32
    top_p_B: Any  # float32
    min_p_B: Any  # float32
    repetition_penalty_B: Any  # float32
    no_repeat_ngram_size_B: Any  # int32
    min_new_tokens_B: Any  # int32
    seeds_B: Any  # uint32
    prompt_lengths_B: Any  # int32
    stop_ids_BE: Any  # int32, -1 where a row has fewer


def settings_of(
    samplings: Sequence[Sampling],
    seeds: Sequence[int],
    prompt_lengths: Sequence[int],
    stop_ids: Sequence[Sequence[int]],
    places: int = 1,
) -> Settings:
    """Host arrays for as many rows; every row has room for `places` ids that end it, or for as
    many as the longest of `stop_ids` has. Any integer is a seed."""
    columns = zip(GREEDY, zip(*samplings, strict=True), strict=True)
    kinds = [
        np.array(values, np.int32 if isinstance(default, int) else np.float32)
        for default, values in columns
    ]
    stop_ids_BE = np.full((len(samplings), max(places, *map(len, stop_ids))), -1, np.int32)
    for row_E, ids in zip(stop_ids_BE, stop_ids, strict=True):
        row_E[: len(ids)] = ids
    seeds_B = np.array([seed % 2**32 for seed in seeds], np.uint32)
    return Settings(*[*kinds, seeds_B, np.array(prompt_lengths, np.int32), stop_ids_BE])


def choose(
    logits_BV: jax.Array,
    tokens_BS: jax.Array | None,
    lengths_B: jax.Array,
    settings: Settings,
    features: Features,
) -> tuple[jax.Array, jax.Array]:
    """The next token of each row, int32 [B], and its log-probability, float32 [B], in nats: under
    the model, before anything here.

    `logits_BV` are float32; `tokens_BS` is the history, valid up to `lengths_B`, and may be None
    without `features.history`. `features` are at least those of every row.
    """

    def rows(
        logits_BV: jax.Array, tokens_BS: jax.Array, lengths_B: jax.Array, settings: Settings
    ) -> tuple[jax.Array, jax.Array]:
        scores_BV = processed(logits_BV, tokens_BS, lengths_B, settings, features)
        next_B = _likeliest(scores_BV)
        if features.draws:
            kept_BV = filtered(scores_BV, settings, features)
            drawn_B = jax.vmap(_draw)(kept_BV, settings.seeds_B, lengths_B)
            next_B = jnp.where(settings.temperature_B > 0, drawn_B, next_B)
        next_B = next_B.astype(jnp.int32)
        chosen_B = jnp.take_along_axis(logits_BV, next_B[:, None], 1)[:, 0]
        return next_B, chosen_B - _total(logits_BV)

    layouts = act("B3"), act("B3"), act("B"), act("B")
    run = on_devices(rows, layouts, (act("B"), act("B")))
    return run(logits_BV, tokens_BS, lengths_B, settings)


# XLA:CPU finds a largest one by one, and adds up a row on one thread: groups first take a tenth of
# the time, and half.


def _likeliest(scores_BV: jax.Array) -> jax.Array:
    """jnp.argmax along rows."""
    if not on_cpu():
        return jnp.argmax(scores_BV, -1)
    groups_BGV = _in_groups(scores_BV)
    group_B = jnp.argmax(groups_BGV.max(-1), -1)
    return group_B * GROUP + jnp.argmax(jax.vmap(operator.getitem)(groups_BGV, group_B), -1)


def _total(logits_BV: jax.Array) -> jax.Array:
    """logsumexp along rows."""
    if not on_cpu():
        return jax.nn.logsumexp(logits_BV, -1)
    return jax.nn.logsumexp(jax.nn.logsumexp(_in_groups(logits_BV), -1), -1)


def _in_groups(x_BV: jax.Array) -> jax.Array:
    """[B, V / GROUP, GROUP], the last filled up with -inf."""
    padding = (0, 0), (0, -x_BV.shape[1] % GROUP)
    padded_BV = jnp.pad(x_BV, padding, constant_values=-jnp.inf)
    return padded_BV.reshape(len(x_BV), -1, GROUP)


def _draw(logits_V: jax.Array, seed: jax.Array, position: jax.Array) -> jax.Array:
    """An id of these log-probabilities (but for a constant): first its group, then the id among
    those of the group, each the largest after Gumbel noise; so other roundings of the logits hardly
    ever give another id. That takes 1,000 random numbers instead of 250,880, which on CPU cost as
    much as 10 ms."""
    groups_GV = _in_groups(logits_V[None])[0]
    G = len(groups_GV)
    key = jax.random.fold_in(jax.random.key(seed), position)
    noise = jax.random.gumbel(key, (G + GROUP,))
    group = jnp.argmax(jax.nn.logsumexp(groups_GV, -1) + noise[:G])
    return group * GROUP + jnp.argmax(groups_GV[group] + noise[G:])


def processed(
    scores_BV: jax.Array,
    tokens_BS: jax.Array | None,
    lengths_B: jax.Array,
    settings: Settings,
    features: Features,
) -> jax.Array:
    """Scores (logits, or log-probabilities of a beam search) after repetition penalty, n-grams and
    minimum length; what may not come is -inf. Arguments are those of `choose`."""

    def rows(
        scores_BV: jax.Array, tokens_BS: jax.Array, lengths_B: jax.Array, settings: Settings
    ) -> jax.Array:
        V = scores_BV.shape[1]
        if features.history:
            valid_BS = jnp.arange(tokens_BS.shape[1]) < lengths_B[:, None]
            penalty_B1 = settings.repetition_penalty_B[:, None]
            worse_BV = jnp.where(scores_BV < 0, scores_BV * penalty_B1, scores_BV / penalty_B1)
            scores_BV = jnp.where(_marked(tokens_BS, valid_BS, V), worse_BV, scores_BV)
            again_BS = valid_BS & _repeats(tokens_BS, lengths_B, settings.no_repeat_ngram_size_B)
            scores_BV = jnp.where(_marked(tokens_BS, again_BS, V), -jnp.inf, scores_BV)
        if features.minimum:
            young_B = lengths_B - settings.prompt_lengths_B < settings.min_new_tokens_B
            ends_BE = young_B[:, None] & (settings.stop_ids_BE >= 0)
            scores_BV = jnp.where(_marked(settings.stop_ids_BE, ends_BE, V), -jnp.inf, scores_BV)
        return scores_BV

    if not (features.history or features.minimum):
        return scores_BV
    layouts = act("B3"), act("B3"), act("B"), act("B")
    return on_devices(rows, layouts, act("B3"))(scores_BV, tokens_BS, lengths_B, settings)


def _marked(ids_BS: jax.Array, where_BS: jax.Array, V: int) -> jax.Array:
    """bool [B, V]: the ids that stand where `where_BS` is true."""
    ids_BS = jnp.where(where_BS, ids_BS, V)
    none_V = jnp.zeros(V, bool)
    return jax.vmap(lambda ids_S: none_V.at[ids_S].set(True, mode="drop"))(ids_BS)


def _repeats(tokens_BS: jax.Array, lengths_B: jax.Array, n_B: jax.Array) -> jax.Array:
    """bool [B, S]: the token here ends an n-gram whose other n - 1 tokens are the row's last."""
    at_S = jnp.arange(tokens_BS.shape[1])

    def same(back: jax.Array, alike_BS: jax.Array) -> jax.Array:
        here_BS = jnp.roll(tokens_BS, back, 1)  # of `back` places before
        last_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(lengths_B - back, 0)[:, None], 1)
        return alike_BS & ((here_BS == last_B1) | (back >= n_B[:, None]))

    begun_BS = (n_B[:, None] > 0) & (at_S >= n_B[:, None] - 1)
    return jax.lax.fori_loop(1, n_B.max(), same, begun_BS)


def filtered(logits_BV: jax.Array, settings: Settings, features: Features) -> jax.Array:
    """float32 logits after temperature, top-k, top-p and min-p; what they exclude is -inf. Rows of
    temperature 0 keep the temperature of 1.

    Nothing is sorted: a threshold is found in a few looks at the row. Whatever equals a threshold
    stays: for top-k as in transformers; for top-p transformers keeps of equal tokens only as many
    as p needs, those that its sort happens to put last.
    """

    def rows(logits_BV: jax.Array, settings: Settings) -> jax.Array:
        temperature, top_k, top_p, min_p = (setting_B[:, None] for setting_B in settings[:4])
        x_BV = logits_BV / jnp.where(temperature > 0, temperature, 1)
        largest_B1 = x_BV.max(-1, keepdims=True)
        mass_BV = jnp.exp(x_BV - largest_B1)  # probabilities, but for a factor
        if features.top_k:
            k_B1 = jnp.where(top_k > 0, top_k, x_BV.shape[1]).astype(jnp.float32)
            mass_BV = jnp.where(x_BV >= _cut(x_BV, jnp.float32(1), k_B1), mass_BV, 0)
        if features.top_p:
            # at 0 too the likeliest stays
            enough_B1 = jnp.maximum(top_p * mass_BV.sum(-1, keepdims=True), 1e-30)
            cut_B1 = _cut(mass_BV, mass_BV, enough_B1)
            mass_BV = jnp.where((mass_BV >= cut_B1) | (top_p >= 1), mass_BV, 0)
        return jnp.where((mass_BV > 0) & (mass_BV >= min_p), x_BV, -jnp.inf)

    return on_devices(rows, (act("B3"), act("B")), act("B3"))(logits_BV, settings)


def _cut(x_BV: jax.Array, amount_BV: Any, enough_B1: jax.Array) -> jax.Array:
    """float32 [B, 1]: the largest t such that the amounts of what is t or more add up to enough;
    -inf if not even all of them do.

    Found digit by digit of a number whose order is that of the floats: their bits, with the sign
    turned round, and all bits of negative ones. A digit is a bit on CPU, where the additions count;
    elsewhere it is four, because there looking at the row counts.
    """
    width = 1 if on_cpu() else 4

    def to_float(u_B1: jax.Array) -> jax.Array:
        u_B1 = jnp.maximum(u_B1, np.uint32(0x007FFFFF))  # that of -inf; below it are only NaNs
        bits_B1 = jnp.where(u_B1 >> 31 == 1, u_B1 ^ np.uint32(1 << 31), ~u_B1)
        return jax.lax.bitcast_convert_type(bits_B1, jnp.float32)

    def one_more(digit: jax.Array, u_B1: jax.Array) -> jax.Array:
        shift = (32 - width * (digit + 1)).astype(jnp.uint32)
        tries = [to_float(u_B1 | (jnp.uint32(i) << shift)) for i in range(1, 2**width)]
        amounts = [jnp.where(x_BV >= t_B1, amount_BV, 0.0) for t_B1 in tries]
        zeros = [jnp.float32(0)] * len(tries)
        # all in one look at the row, which as many sums would not be
        sums = jax.lax.reduce(amounts, zeros, lambda a, b: jax.tree.map(jnp.add, a, b), (1,))
        hits_B1 = sum((sum_B[:, None] >= enough_B1).astype(jnp.uint32) for sum_B in sums)
        return u_B1 | (hits_B1 << shift)

    zeros_B1 = jnp.zeros(enough_B1.shape, jnp.uint32)
    return to_float(jax.lax.fori_loop(0, 32 // width, one_more, zeros_B1))
