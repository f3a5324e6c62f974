"""Packs documents into training sequences: concatenated and cut, or by best fit.

Each token is predicted from the tokens before it; the first of a document follows the
end-of-document token of the document before. A sequence has ``context`` inputs and targets.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ngpt_jax.config import ConfigError
from ngpt_jax.data.shards import TokenStream

Batch = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Concatenated:
    """Sequences cut from the stream, one every ``context`` tokens.

    In an epoch each token is a target once, except the first token and a tail that is too short for
    a sequence.

    Attributes:
      stream: of documents, ``eod`` after each.
      context: tokens of a sequence.
      eod: id of the end-of-document token.
      mask_documents: also give segment_ids, a number for each document of a sequence, and positions
        within the document.
    """

    stream: TokenStream
    context: int
    eod: int
    mask_documents: bool = False

    def __len__(self) -> int:
        return (len(self.stream) - 1) // self.context

    def __getitem__(self, index: int) -> Batch:
        """{"inputs", "targets"} and, with a mask, "segment_ids", "positions": (context,) int32."""
        start = index * self.context
        tokens = self.stream.read(start, start + self.context + 1)
        sequence = {"inputs": tokens[:-1], "targets": tokens[1:]}
        if self.mask_documents:
            # As an input, an eod belongs to the next document, whose first token it predicts.
            sequence |= by_document(tokens[:-1] == self.eod)
        return sequence


def by_document(starts: np.ndarray) -> Batch:
    """{"segment_ids", "positions"}, (..., context) int32.

    A position counts from the start of the document, or of the sequence if the document began
    before it.

    Args:
      starts: (..., context) bool, where documents start.
    """
    indices = np.arange(starts.shape[-1])
    first = np.maximum.accumulate(np.where(starts, indices, 0), axis=-1)
    ids = np.cumsum(starts, axis=-1)
    return {"segment_ids": ids.astype(np.int32), "positions": (indices - first).astype(np.int32)}


class BestFitIndex(NamedTuple):
    """Pieces of the stream, grouped by sequence.

    Attributes:
      starts: (pieces,) int64, first target of each piece in the stream.
      lengths: (pieces,) int32, targets of each piece.
      offsets: (sequences + 1,) int64; sequence i holds pieces [offsets[i], offsets[i + 1]).
    """

    starts: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray


def document_lengths(stream: TokenStream, eod: int) -> np.ndarray:
    """Tokens of each document, its ``eod`` included, (documents,) int64; the last may lack it."""
    ends, position = [], 0
    for chunk in stream.chunks():
        ends.append(np.flatnonzero(chunk == eod) + position + 1)
        position += len(chunk)
    all_ends = np.concatenate([*ends, np.array([position])])
    if len(all_ends) > 1 and all_ends[-2] == position:
        all_ends = all_ends[:-1]
    return np.diff(all_ends, prepend=0)


def best_fit(lengths: np.ndarray, context: int) -> BestFitIndex:
    """Best-fit decreasing: each piece, longest first, goes where it leaves the least room.

    A document longer than a sequence is first cut into full sequences; the rest of it is a piece
    like any other. Each token is in exactly one piece.

    Args:
      lengths: (documents,) int64.
      context: tokens of a sequence.
    """
    ends = np.cumsum(lengths)
    starts = ends - lengths
    whole = lengths // context
    full_starts = np.repeat(starts, whole) + context * _ranks(whole)
    rest_lengths, rest_starts = lengths % context, starts + whole * context
    order = np.argsort(-rest_lengths, kind="stable")
    order = order[rest_lengths[order] > 0]
    rest_lengths, rest_starts = rest_lengths[order], rest_starts[order]
    owners = len(full_starts) + _assign(rest_lengths, context)
    number = int(owners.max(initial=len(full_starts) - 1)) + 1
    all_owners = np.concatenate([np.arange(len(full_starts)), owners])
    all_starts = np.concatenate([full_starts, rest_starts])
    all_lengths = np.concatenate([np.full(len(full_starts), context), rest_lengths])
    by_owner = np.argsort(all_owners, kind="stable")
    counts = np.bincount(all_owners, minlength=number)
    return BestFitIndex(
        starts=all_starts[by_owner].astype(np.int64),
        lengths=all_lengths[by_owner].astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )


def _ranks(counts: np.ndarray) -> np.ndarray:
    """[2, 3] -> [0, 1, 0, 1, 2]."""
    ends = np.cumsum(counts)
    return np.arange(int(counts.sum())) - np.repeat(ends - counts, counts)


def _assign(lengths: np.ndarray, context: int) -> np.ndarray:
    """The number of each piece's sequence, for lengths in descending order, each below context.

    Pieces of one length are placed together: a sequence with room r takes r // length of them and
    is then too full for another. So the work grows with the number of different lengths and rooms.
    """
    out = np.zeros(len(lengths), np.int64)
    room: dict[int, list[np.ndarray]] = {}  # room left -> sequences that have it
    opened = placed = 0
    for length, count in zip(*np.unique(-lengths, return_counts=True)):
        length, left = -int(length), int(count)
        for space in (*sorted(r for r in room if r >= length), context):
            each = space // length
            needed = -(-left // each)
            if space == context:
                sequences = np.arange(opened, opened + needed)
                opened += needed
            else:
                sequences = np.concatenate(room.pop(space))
            if len(sequences) > needed:
                sequences, room[space] = sequences[:needed], [sequences[needed:]]
            take = min(left, each * len(sequences))
            out[placed : placed + take] = np.repeat(sequences, each)[:take]
            left, placed = left - take, placed + take
            partly = take % each  # pieces in the last sequence, if it is not full
            full = sequences[:-1] if partly else sequences
            for some, pieces in ((full, each), (sequences[len(full) :], partly)):
                if len(some) and space > pieces * length:
                    room.setdefault(space - pieces * length, []).append(some)
            if not left:
                break
    return out


@dataclass(frozen=True, eq=False)
class BestFit:
    """Sequences of whole documents, grouped by :func:`best_fit`; the rest of each is padding.

    Attributes:
      stream, context, eod, mask_documents: as for :class:`Concatenated`.
      index: of this stream and context.
    """

    stream: TokenStream
    context: int
    eod: int
    index: BestFitIndex
    mask_documents: bool = False

    def __len__(self) -> int:
        return len(self.index.offsets) - 1

    def __getitem__(self, index: int) -> Batch:
        """A sequence, (context,) each.

        {"inputs", "targets": int32, "weights": float32 (0 for padding)} and, with a mask,
        "segment_ids" (0 for padding), "positions": int32.
        """
        shape, at = self.context, 0
        inputs, targets = np.full(shape, self.eod, np.int32), np.full(shape, self.eod, np.int32)
        segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        weights = np.zeros(shape, np.float32)
        pieces = range(self.index.offsets[index], self.index.offsets[index + 1])
        for number, piece in enumerate(pieces, start=1):
            start, length = int(self.index.starts[piece]), int(self.index.lengths[piece])
            tokens = self.stream.read(max(start - 1, 0), start + length)
            inputs[at + length - len(tokens) + 1 : at + length] = tokens[:-1]
            targets[at : at + length] = tokens[len(tokens) - length :]
            segments[at : at + length], weights[at : at + length] = number, 1
            positions[at : at + length] = np.arange(length)
            at += length
        sequence = {"inputs": inputs, "targets": targets, "weights": weights}
        if self.mask_documents:
            sequence |= {"segment_ids": segments, "positions": positions}
        return sequence


Sequences = Concatenated | BestFit


def check_sequences(sequences: Sequences, stream: TokenStream, context: int) -> None:
    """Refuses a text that is too short for one sequence."""
    if len(sequences) < 1:
        raise ConfigError(
            f"model.context = {context} needs a training text of {context + 1} tokens or more, but"
            f" there are {len(stream)}; lower model.context or give more text."
        )
