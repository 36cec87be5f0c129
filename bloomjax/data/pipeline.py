"""Which tokens stand where in a batch.

Letters: T positions of a row, R rows of a microbatch, A microbatches of a step, r the rows that
this process holds.

The invariant: a training batch is a pure function of (seed, step): sample i, counted without end,
is row i mod n of epoch i div n, in an order that Grain's index shuffle computes from the seed and
the epoch alone. So neither hosts nor workers nor a resume can change it.
"""

from collections.abc import Callable, Generator, Sequence

import grain
import numpy as np
from absl import flags
from grain.experimental import index_shuffle

from bloomjax.data.indexed import Indexed
from bloomjax.data.prepare import Prepared
from bloomjax.errors import ConfigError, InputError

Batch = dict[str, np.ndarray]


class Rows:
    """The stream of a prefix as n = (tokens - 1) // T rows of T + 1 tokens, each beginning with
    the last token of the one before it; across documents, as Megatron's samples.

    InputError if the stream is shorter than a row.
    """

    def __init__(self, indexed: Indexed, sequence_length: int, seed: int):
        if not 0 <= seed < 2**32:
            raise ConfigError(f"run.seed is {seed}: expected 0 to {2**32 - 1}")
        self._indexed, self._T, self._seed = indexed, sequence_length, seed
        self._n = (indexed.tokens - 1) // sequence_length
        if self._n < 1:
            raise InputError(
                f"{indexed.bin_path}: {indexed.tokens} tokens are too few for a row of "
                f"data.sequence_length + 1 = {sequence_length + 1}: give more text"
            )

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self._n

    def sample(self, i: int) -> np.ndarray:
        """int32 [T + 1]: sample i >= 0 of the endless shuffled sequence."""
        epoch, place = divmod(i, self._n)
        seed = (self._seed + epoch) % 2**32
        row = index_shuffle(place, max_index=self._n - 1, seed=seed, rounds=4)
        return self._indexed.read(row * self._T, row * self._T + self._T + 1)


class _Steps:
    """Grain's random access source of batches: item k is step first_step + k."""

    def __init__(
        self,
        rows: Rows,
        eos_id: int,
        samples_of: Callable[[int], tuple[int, int]],
        shape: tuple[int, int],
        mine: Sequence[int],
        steps: range,
        sequence_length: int,
    ):
        self._rows, self._eos_id, self._samples_of = rows, eos_id, samples_of
        self._shape, self._mine, self._steps, self._T = shape, mine, steps, sequence_length

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, k: int) -> Batch:
        A, R = self._shape
        first, count = self._samples_of(self._steps[k])
        if count > A * R:
            raise ConfigError(f"a step of {count} samples does not fit {A} x {R} places")
        rows = np.full((A, len(self._mine), self._T + 1), self._eos_id, np.int32)
        weights = np.zeros((A, len(self._mine), self._T), np.float32)
        for a in range(A):
            for r, row in enumerate(self._mine):
                if (j := a * R + row) < count:
                    rows[a, r] = self._rows.sample(first + j)
                    weights[a, r] = 1
        return {"tokens": rows[..., :-1], "targets": rows[..., 1:], "weights": weights}


def train_batches(
    prepared: Prepared,
    *,
    sequence_length: int,
    seed: int,
    samples_of: Callable[[int], tuple[int, int]],
    shape: tuple[int, int],
    rows: Sequence[int],
    first_step: int,
    steps: int,
    workers: int,
) -> Generator[Batch, None, None]:
    """Batches of the steps first_step, ..., steps - 1: what this process holds of each.

    `samples_of(step)` gives the first sample of the step and their count, at most A * R for
    `shape` = (A, R); sample j of the step stands at (microbatch, row) = divmod(j, R). `rows` are
    the indices along R that this process holds. Places beyond the count have weight 0.
    tokens, targets: int32 [A, r, T]; weights: float32 [A, r, T]. `workers` processes prepare them
    (0: threads of this one); `samples_of` must then be picklable. `close()` ends them early.
    """
    source = _Steps(
        Rows(Indexed(prepared.train.prefix), sequence_length, seed),
        prepared.eos_id,
        samples_of,
        shape,
        [int(row) for row in rows],
        range(first_step, steps),
        sequence_length,
    )
    batches = grain.MapDataset.source(source).to_iter_dataset(
        grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    )
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads flags of its own, parsed or not by a main
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return _own(batches)


def _own(batches: grain.IterDataset[Batch]) -> Generator[Batch, None, None]:
    """Copies, since Grain's arrays lie in shared memory that must be gone before Python is."""
    for batch in batches:
        yield {name: np.array(array, order="C") for name, array in batch.items()}


class HeldoutBatches(Sequence[Batch]):
    """Every held-out document by itself, as [R, T] batches; made by `heldout_batches`."""

    def __init__(
        self, indexed: Indexed, eos_id: int, T: int, rows_per_batch: int, mine: Sequence[int]
    ):
        self._indexed, self._eos_id, self._T = indexed, eos_id, T
        self._rows_per_batch, self._mine = rows_per_batch, mine
        self._stride = max(1, T // 2)
        # A document of m tokens needs 1 + ceil((m - T) / stride) windows.
        beyond = np.maximum(0, indexed.sizes.astype(np.int64) - T)
        self._ends = np.cumsum(1 + -(-beyond // self._stride))  # windows up to each document

    def __len__(self) -> int:
        return -(-int(self._ends[-1]) // self._rows_per_batch)

    def __getitem__(self, k: int) -> Batch:  # type: ignore[override]  # no slices
        if not 0 <= k < len(self):
            raise IndexError(k)
        r, T = len(self._mine), self._T
        tokens = np.full((r, T), self._eos_id, np.int32)
        targets = np.full((r, T), self._eos_id, np.int32)
        weights = np.zeros((r, T), np.float32)
        for i, row in enumerate(self._mine):
            window = k * self._rows_per_batch + row
            if window >= self._ends[-1]:
                continue
            document = int(np.searchsorted(self._ends, window, side="right"))
            nth = window - (int(self._ends[document - 1]) if document else 0)
            start = nth * self._stride
            # Target p of a document is its token p, and input p the token before it.
            piece = self._indexed.document(document, max(0, start - 1), start + T)
            if start == 0:
                piece = np.concatenate([[self._eos_id], piece])
            m = len(piece) - 1
            tokens[i, :m], targets[i, :m] = piece[:-1], piece[1:]
            weights[i, T - self._stride if nth else 0 : m] = 1
        return {"tokens": tokens, "targets": targets, "weights": weights}


def heldout_batches(
    prepared: Prepared, *, sequence_length: int, rows_per_batch: int, rows: Sequence[int]
) -> HeldoutBatches:
    """A sequence (it has a length) of what this process holds of each held-out batch.

    A document has one eos as context before it and nothing of other documents. Windows of T
    tokens move by T // 2, and each token, the eos at the end too, has weight 1 in one of them:
    the first that reaches it. tokens, targets: int32 [r, T]; weights: float32 [r, T], for `rows`,
    the indices below `rows_per_batch` of this process; the last batch is filled with weight 0.
    InputError if nothing was held out.
    """
    if prepared.heldout is None:
        raise InputError("no documents are held out: set data.heldout or data.heldout_every")
    mine = [int(row) for row in rows]
    indexed = Indexed(prepared.heldout.prefix)
    return HeldoutBatches(indexed, prepared.eos_id, sequence_length, rows_per_batch, mine)
