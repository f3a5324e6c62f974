"""Windows to batches: grain for training, a plain loop for evaluation.

The order of training windows is a pure function of the seed. A run's place in it is one
integer, the windows consumed: no state of an iterator is ever saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import grain
import numpy as np
from absl import flags

from ngpt_jax.data.corpus import EvalSet, Windows
from ngpt_jax.data.packing import by_document
from ngpt_jax.data.workers import follow_parent

Batch = dict[str, np.ndarray]


# ------------------------------------------------------------------------------------ training


def train_dataset(windows: Windows, seed: int) -> grain.MapDataset:
    """Shuffled windows without end, each epoch in an order of its own; each once an epoch.

    Args:
      windows: at least one, of {"inputs", "targets", ...}, each (context,).
      seed: of the shuffle, not negative.
    """
    # grain shuffles epoch e with seed + e. Hashed, the epochs of seed 0 are not those of seed 1.
    hashed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    indices = grain.MapDataset.range(len(windows)).shuffle(seed=hashed)
    return indices.map(windows.__getitem__).repeat()


def mixed_dataset(
    sources: Mapping[str, Windows], weights: Mapping[str, float], seed: int
) -> grain.MapDataset:
    """Windows of several sources in turn: of n windows, close to n * weight are of each.

    Each source has epochs of its own.
    """
    # Another seed each: two sources of one length must not be in step.
    names = sorted(sources)
    seeds = np.random.SeedSequence(seed).generate_state(len(names))
    datasets = [train_dataset(sources[name], int(s)) for name, s in zip(names, seeds)]
    return _Mixed(datasets, [weights[name] for name in names])


class _Mixed(grain.MapDataset):
    """Element i is of the first dataset where floor(i * share) takes a step, else of the rest.

    The rest is a mixture again, so that each index is found without counting up to it.
    """

    def __init__(self, parents: Sequence[grain.MapDataset], weights: Sequence[float]):
        super().__init__(parents)
        exact = [Fraction(weight) for weight in weights]
        self._shares = [w / sum(exact[i:]) for i, w in enumerate(exact)]

    def __len__(self) -> int:
        return min(len(parent) for parent in self._parents)

    def __getitem__(self, index):
        for parent, share in zip(self._parents, self._shares):
            here = index * share.numerator // share.denominator
            if (index + 1) * share.numerator // share.denominator > here:
                return parent[here]
            index -= here
        raise AssertionError("the last share is 1")


class _Rows(grain.MapDataset):
    """Chosen rows of every batch of a dataset: elements first + k * batch_size + rows[j]."""

    def __init__(self, parent: grain.MapDataset, first: int, batch_size: int, rows: np.ndarray):
        super().__init__(parent)
        self._first, self._batch_size, self._rows = first, batch_size, rows

    def __len__(self) -> int:
        return (len(self._parent) - self._first) // self._batch_size * len(self._rows)

    def __getitem__(self, index):
        batch, row = divmod(index, len(self._rows))
        return self._parent[self._first + batch * self._batch_size + int(self._rows[row])]


def train_batches(
    dataset: grain.MapDataset,
    batch_size: int,
    position: int,
    threads: int,
    prefetch: int,
    rows: np.ndarray | None = None,
    workers: int = 0,
) -> grain.DatasetIterator:
    """Batches of consecutive elements of ``dataset``, read ahead in threads or processes.

    Batch k holds elements ``position + k * batch_size`` and on, whatever ``threads``,
    ``workers`` and ``prefetch`` are; with ``rows``, those rows of it alone. Threads and processes
    end with the iterator: when it is collected, or closed by its method ``close``.

    Args:
      dataset: without end, from :func:`train_dataset`.
      batch_size: windows a batch.
      position: windows consumed before.
      threads: that read ahead, in each worker if there are any; 0 reads in the caller's.
      prefetch: batches read ahead.
      rows: of a batch, that this process needs; None: all.
      workers: processes that read ahead; 0: none.

    Returns:
      An iterator over {"inputs", "targets", ...}, each (rows, context).
    """
    options = grain.ReadOptions(num_threads=min(threads, prefetch), prefetch_buffer_size=prefetch)
    rows = np.arange(batch_size) if rows is None else rows
    chosen = _Rows(dataset, position, batch_size, rows)
    batches = chosen.batch(len(rows), drop_remainder=True).to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's workers read flags: in a script there are none
        each = max(1, prefetch // workers)
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(workers, each), follow_parent)
    return iter(batches)


# ---------------------------------------------------------------------------------- evaluation


def num_eval_batches(eval_set: EvalSet, context: int, batch_size: int) -> int:
    """Batches that :func:`eval_batches` makes without a limit."""
    return -(-len(eval_set.stream) // (context * batch_size))


def eval_batches(
    eval_set: EvalSet,
    context: int,
    batch_size: int,
    limit: int | None = None,
    mask_documents: bool = False,
) -> Iterator[Batch]:
    """Windows side by side in the order of the text, at most ``limit`` batches.

    Returns:
      An iterator over {"inputs", "targets": int32, "weights": float32} and, with
      ``mask_documents``, "segment_ids", "positions": int32, each (batch_size, context); a weight
      is 1 for a target, 0 for the padding at the end.
    """
    shape, size, stream = (batch_size, context), batch_size * context, eval_set.stream
    batches = num_eval_batches(eval_set, context, batch_size)
    for start in range(0, size * (batches if limit is None else min(limit, batches)), size):
        tokens = stream.read(max(start - 1, 0), min(start + size, len(stream)))
        if start == 0:
            tokens = np.concatenate([np.array([eval_set.eod], np.int32), tokens])
        inputs, targets = np.zeros(size, np.int32), np.zeros(size, np.int32)
        weights = np.zeros(size, np.float32)
        real = len(tokens) - 1
        inputs[:real], targets[:real], weights[:real] = tokens[:-1], tokens[1:], 1
        batch = {"inputs": inputs, "targets": targets, "weights": weights}
        batch = {name: x.reshape(shape) for name, x in batch.items()}
        if mask_documents:
            batch |= by_document(batch["inputs"] == eval_set.eod)
        yield batch
