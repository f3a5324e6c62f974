"""Documents to batches of windows: grain for training, plain loops for evaluation.

The order of training windows is a pure function of the seed. A run's place in it is one
integer, the windows consumed: no state of an iterator is ever saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import grain
import numpy as np

from ngpt_jax.config import ConfigError
from ngpt_jax.data.tokenizers import Tokenizer, utf8

Batch = dict[str, np.ndarray]

_CHARACTERS_AT_ONCE = 2**20  # given to the tokenizer: bounds what its results take in memory


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smaller of uint16 and uint32 that holds ids below ``vocab_size``."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def join_documents(documents: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """Tokens of all documents, ``eod`` after each: (tokens,) of ``token_dtype``."""
    dtype = token_dtype(tokenizer.vocab_size)
    eod = np.array([tokenizer.eod], dtype)
    pieces: list[np.ndarray] = [np.zeros(0, dtype)]
    for texts in _portions(documents):
        for ids in tokenizer.encode_batch(texts):
            pieces += [ids.astype(dtype), eod]
    return np.concatenate(pieces)


def _portions(documents: Iterable[str]) -> Iterator[list[str]]:
    texts: list[str] = []
    characters = 0
    for text in documents:
        texts.append(text)
        characters += len(text)
        if characters >= _CHARACTERS_AT_ONCE:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


# ------------------------------------------------------------------------------------ training


def train_dataset(tokens: np.ndarray, context: int, seed: int) -> grain.MapDataset:
    """Shuffled windows without end, each epoch in an order of its own.

    Windows of ``context + 1`` tokens start every ``context`` tokens: in an epoch each token
    but the first is a target once, save a tail that fills no window.

    Args:
      tokens: (tokens,) as :func:`join_documents` makes them.
      context: tokens of a window.
      seed: of the shuffle, not negative.

    Returns:
      A dataset of {"inputs", "targets"}, each (context,) int32.
    """
    windows = (len(tokens) - 1) // context
    if windows < 1:
        raise ConfigError(
            f"model.context = {context} needs a training text of {context + 1} tokens or more, but"
            f" there are {len(tokens)}; lower model.context or give more text."
        )
    if seed < 0:
        raise ConfigError(f"data.seed must not be negative, got {seed}.")

    def window(index: int) -> Batch:
        start = index * context
        piece = tokens[start : start + context + 1].astype(np.int32)
        return {"inputs": piece[:-1], "targets": piece[1:]}

    # grain shuffles epoch e with seed + e. Hashed, the epochs of seed 0 are not those of seed 1.
    hashed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return grain.MapDataset.range(windows).shuffle(seed=hashed).map(window).repeat()


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
) -> Iterator[Batch]:
    """Batches of consecutive elements of ``dataset``, read ahead in threads.

    Batch k holds elements ``position + k * batch_size`` and on, whatever ``threads`` and
    ``prefetch`` are; with ``rows``, those rows of it alone. The threads end with the
    iterator: when it is collected, or closed by its method ``close``.

    Args:
      dataset: without end, from :func:`train_dataset`.
      batch_size: windows a batch.
      position: windows consumed before.
      threads: that read ahead; 0 reads in the caller's.
      prefetch: batches read ahead.
      rows: of a batch, that this process needs; None: all.

    Returns:
      An iterator over {"inputs", "targets"}, each (rows, context) int32.
    """
    options = grain.ReadOptions(num_threads=min(threads, prefetch), prefetch_buffer_size=prefetch)
    rows = np.arange(batch_size) if rows is None else rows
    chosen = _Rows(dataset, position, batch_size, rows)
    return iter(chosen.batch(len(rows), drop_remainder=True).to_iter_dataset(options))


# ---------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True, eq=False)
class EvalSet:
    """Held-out text: ``tokens[1:]`` are its targets, ``num_bytes`` its length in UTF-8."""

    name: str
    tokens: np.ndarray
    num_bytes: int


def make_eval_set(name: str, documents: Iterable[str], tokenizer: Tokenizer) -> EvalSet:
    """[eod] + document + [eod] + document + [eod] ...: each token, eod too, is a target once."""
    documents = list(documents)
    tokens = join_documents(documents, tokenizer)
    first = np.array([tokenizer.eod], tokens.dtype)
    num_bytes = sum(len(utf8(text)) for text in documents)
    return EvalSet(name, np.concatenate([first, tokens]), num_bytes)


def num_eval_batches(eval_set: EvalSet, context: int, batch_size: int) -> int:
    """Batches that :func:`eval_batches` makes without a limit."""
    return -(-(len(eval_set.tokens) - 1) // (context * batch_size))


def eval_batches(
    eval_set: EvalSet, context: int, batch_size: int, limit: int | None = None
) -> Iterator[Batch]:
    """Windows side by side in the order of the text, at most ``limit`` batches.

    Returns:
      An iterator over {"inputs", "targets": int32, "weights": float32}, each of shape
      (batch_size, context); a weight is 1 for a target, 0 for the padding at the end.
    """
    shape, size = (batch_size, context), batch_size * context
    batches = num_eval_batches(eval_set, context, batch_size)
    for start in range(0, size * (batches if limit is None else min(limit, batches)), size):
        piece = eval_set.tokens[start : start + size + 1]
        inputs, targets = np.zeros(size, np.int32), np.zeros(size, np.int32)
        weights = np.zeros(size, np.float32)
        real = len(piece) - 1
        inputs[:real], targets[:real], weights[:real] = piece[:-1], piece[1:], 1
        yield {
            "inputs": inputs.reshape(shape),
            "targets": targets.reshape(shape),
            "weights": weights.reshape(shape),
        }
