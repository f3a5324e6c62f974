"""Sequences to batches: with grain for training, with a plain loop for evaluation.

The order of training sequences is a pure function of the seed. A run's position in it is one
integer, the number of sequences consumed: no iterator state is ever saved.
"""

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import grain
import numpy as np
from absl import flags

from ngpt_jax import signals
from ngpt_jax.config import DataConfig
from ngpt_jax.config.facts import check_seed
from ngpt_jax.data.corpus import Corpus
from ngpt_jax.data.packing import Batch, Sequences, by_document
from ngpt_jax.data.token_files import EvalSet
from ngpt_jax.data.workers import follow_parent

# ------------------------------------------------------------------------------------ training


def make_dataset(config: DataConfig, corpus: Corpus) -> grain.MapDataset:
    """A corpus' training sequences without end, in the order of ``data.seed``."""
    if config.source == "mixture":
        weights = {name: source.weight for name, source in config.mixture.items()}
        return mixed_dataset(corpus.train, weights, config.seed)
    return train_dataset(corpus.train[""], config.seed)


def train_dataset(sequences: Sequences, seed: int) -> grain.MapDataset:
    """Sequences without end: each once in an epoch, every epoch in a new order.

    Args:
      sequences: at least one, of {"inputs", "targets", ...}, each (context,).
      seed: of the shuffle, below 2^32.
    """
    # grain shuffles epoch e with seed + e. The hash keeps seeds 0 and 1 from sharing epochs.
    hashed = int(np.random.SeedSequence(check_seed("seed", seed)).generate_state(1)[0])
    indices = grain.MapDataset.range(len(sequences)).shuffle(seed=hashed)
    return indices.map(sequences.__getitem__).repeat()


def mixed_dataset(
    sources: Mapping[str, Sequences], weights: Mapping[str, float], seed: int
) -> grain.MapDataset:
    """Sequences of several sources in turn: of any n, close to n * share come from each.

    Each source has epochs of its own.

    Args:
      sources: sequences by the name of their source.
      weights: by the same names; a share is a weight divided by their sum.
      seed: of the shuffles, below 2^32.
    """
    # Each source has its own seed, so that two sources of one length differ in order.
    names = sorted(sources)
    seeds = np.random.SeedSequence(check_seed("seed", seed)).generate_state(len(names))
    datasets = [train_dataset(sources[name], int(s)) for name, s in zip(names, seeds)]
    return _Mixed(datasets, [weights[name] for name in names])


class _Mixed(grain.MapDataset):
    """A mixture of datasets with random access.

    Element i comes from the first dataset if floor(i * share) and floor((i + 1) * share) differ,
    else from the mixture of the other datasets. So an element is found without counting up to it.
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
    """Some rows of every batch of a dataset: elements first + k * batch_size + rows[j]."""

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

    Batch k begins with element ``position + k * batch_size``, whatever ``threads``, ``workers`` and
    ``prefetch`` are. Threads and processes end when the iterator is garbage-collected or its method
    ``close`` is called.

    Args:
      dataset: without end, from :func:`train_dataset` or :func:`mixed_dataset`.
      batch_size: sequences a batch.
      position: sequences consumed before.
      threads: that read ahead, in each worker if there are any; 0: the caller's thread reads.
      prefetch: batches read ahead.
      rows: of each batch that this process reads; None: all.
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
            flags.FLAGS.mark_as_parsed()  # grain's workers read them; a script may not parse any
        each = max(1, prefetch // workers)
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(workers, each), follow_parent)
    with signals.blocked():  # the workers are started here
        return iter(batches)


# ---------------------------------------------------------------------------------- evaluation


def num_eval_batches(eval_set: EvalSet, context: int, batch_size: int) -> int:
    """How many batches :func:`eval_batches` gives without a limit."""
    return -(-len(eval_set.stream) // (context * batch_size))


def num_eval_tokens(
    eval_set: EvalSet, context: int, batch_size: int, limit: int | None = None
) -> int:
    """How many targets :func:`eval_batches` gives, all rows together."""
    tokens = len(eval_set.stream)
    return tokens if limit is None else min(limit * context * batch_size, tokens)


def eval_batches(
    eval_set: EvalSet,
    context: int,
    batch_size: int,
    limit: int | None = None,
    mask_documents: bool = False,
    rows: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Batches of sequences in the order of the text.

    Args:
      eval_set: held-out tokens, each a target once.
      context: tokens of a sequence.
      batch_size: sequences a batch.
      limit: only the first so many batches; None: all.
      mask_documents: also give segment_ids and positions.
      rows: of each batch, ascending, which alone are read; None: all.

    Returns:
      An iterator over {"inputs", "targets": int32, "weights": float32} and, with
      ``mask_documents``, "segment_ids", "positions": int32, each (rows, context). The weight of a
      target is 1, of the padding at the end 0.
    """
    rows = np.arange(batch_size) if rows is None else rows
    runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)  # each is read at once
    stream, size = eval_set.stream, batch_size * context
    batches = num_eval_batches(eval_set, context, batch_size)
    for first in range(0, size * (batches if limit is None else min(limit, batches)), size):
        shape = len(rows) * context
        batch: Batch = {name: np.zeros(shape, np.int32) for name in ("inputs", "targets")}
        batch["weights"], at = np.zeros(shape, np.float32), 0
        for run in runs:
            start = first + int(run[0]) * context
            stop = min(start + len(run) * context, len(stream))
            if start < stop:
                tokens = stream.read(max(start - 1, 0), stop)
                if start == 0:
                    tokens = np.concatenate([np.array([eval_set.eod], np.int32), tokens])
                real = slice(at, at + stop - start)
                batch["inputs"][real], batch["targets"][real] = tokens[:-1], tokens[1:]
                batch["weights"][real] = 1
            at += len(run) * context
        batch = {name: x.reshape(len(rows), context) for name, x in batch.items()}
        if mask_documents:
            batch |= by_document(batch["inputs"] == eval_set.eod)
        yield batch
