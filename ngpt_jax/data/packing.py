"""Documents into training windows: concatenated and cut, or packed by best fit.

A token is predicted from the one before it in the stream; the first of a document from the
end-of-document token before it. A window is ``context`` such pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ngpt_jax.config import ConfigError
from ngpt_jax.data.shards import TokenStream

Batch = dict[str, np.ndarray]


class Concatenated:
    """Windows of ``context + 1`` tokens that start every ``context`` tokens.

    In an epoch each token but the first is a target once, save a tail that fills no window.

    Args:
      stream: of documents, ``eod`` after each.
      context: pairs of a window.
      eod: id of the end-of-document token.
      mask_documents: also give segment_ids, another number for each document of a window, and
        positions within it.
    """

    def __init__(self, stream: TokenStream, context: int, eod: int, mask_documents: bool = False):
        self._stream, self._context, self._eod = stream, context, eod
        self._mask_documents = mask_documents

    def __len__(self) -> int:
        return (len(self._stream) - 1) // self._context

    def __getitem__(self, index: int) -> Batch:
        """{"inputs", "targets"} and, with a mask, "segment_ids", "positions": (context,) int32."""
        start = index * self._context
        tokens = self._stream.read(start, start + self._context + 1)
        window = {"inputs": tokens[:-1], "targets": tokens[1:]}
        if self._mask_documents:
            # As an input, the end of a document belongs to the next one, which it predicts.
            window |= by_document(tokens[:-1] == self._eod)
        return window


def by_document(starts: np.ndarray) -> Batch:
    """{"segment_ids", "positions"}, (..., context) int32, from where documents start.

    Positions are those within a document, or within the window where it began before.
    """
    indices = np.arange(starts.shape[-1])
    first = np.maximum.accumulate(np.where(starts, indices, 0), axis=-1)
    ids = np.cumsum(starts, axis=-1)
    return {"segment_ids": ids.astype(np.int32), "positions": (indices - first).astype(np.int32)}


class BestFitIndex(NamedTuple):
    """Pieces of the stream, grouped by window.

    Attributes:
      starts: (pieces,) int64, first target of each piece in the stream.
      lengths: (pieces,) int32, targets of each piece.
      offsets: (windows + 1,) int64; window w holds pieces [offsets[w], offsets[w + 1]).
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

    Documents longer than a window are first cut into whole windows; what remains of them is a
    piece like any other. Each token is in one piece.

    Args:
      lengths: (documents,) int64.
      context: room of a window.
    """
    ends = np.cumsum(lengths)
    starts = ends - lengths
    whole = lengths // context
    full_starts = np.repeat(starts, whole) + context * _ranks(whole)
    rest_lengths, rest_starts = lengths % context, starts + whole * context
    order = np.argsort(-rest_lengths, kind="stable")
    order = order[rest_lengths[order] > 0]
    rest_lengths, rest_starts = rest_lengths[order], rest_starts[order]
    windows = len(full_starts) + _assign(rest_lengths, context)
    number = int(windows.max(initial=len(full_starts) - 1)) + 1
    all_windows = np.concatenate([np.arange(len(full_starts)), windows])
    all_starts = np.concatenate([full_starts, rest_starts])
    all_lengths = np.concatenate([np.full(len(full_starts), context), rest_lengths])
    by_window = np.argsort(all_windows, kind="stable")
    counts = np.bincount(all_windows, minlength=number)
    return BestFitIndex(
        starts=all_starts[by_window].astype(np.int64),
        lengths=all_lengths[by_window].astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )


def _ranks(counts: np.ndarray) -> np.ndarray:
    """[2, 3] -> [0, 1, 0, 1, 2]."""
    ends = np.cumsum(counts)
    return np.arange(int(counts.sum())) - np.repeat(ends - counts, counts)


def _assign(lengths: np.ndarray, context: int) -> np.ndarray:
    """The window of each piece, for lengths in descending order, 1 to context - 1 each.

    Pieces of one length are placed together: a window with room r takes r // length of them, and
    is then too full for another. So the work grows with the numbers of lengths and of rooms.
    """
    out = np.zeros(len(lengths), np.int64)
    room: dict[int, list[np.ndarray]] = {}  # room left -> windows that have it
    opened = placed = 0
    for length, count in zip(*np.unique(-lengths, return_counts=True)):
        length, left = -int(length), int(count)
        for space in sorted(r for r in room if r >= length):
            if not left:
                break
            windows, each = np.concatenate(room.pop(space)), space // length
            needed = -(-left // each)
            if len(windows) > needed:
                room[space] = [windows[needed:]]
            left, placed = _fill(out, placed, windows[:needed], each, left, length, space, room)
        if left:
            each = context // length
            windows = np.arange(opened, opened + -(-left // each))
            opened += len(windows)
            left, placed = _fill(out, placed, windows, each, left, length, context, room)
    return out


def _fill(out, placed, windows, each, left, length, space, room):
    """Puts up to ``each`` pieces into each window; returns pieces left over and placed."""
    take = min(left, each * len(windows))
    out[placed : placed + take] = np.repeat(windows, each)[:take]
    partly = take % each
    full = windows[:-1] if partly else windows
    for some, filled in ((full, each), (windows[len(full) :], partly)):
        if len(some) and space - filled * length:
            room.setdefault(space - filled * length, []).append(some)
    return left - take, placed + take


class BestFit:
    """Windows of whole documents, as :func:`best_fit` groups them; what stays empty is padding.

    Args:
      stream, context, eod, mask_documents: as for :class:`Concatenated`.
      index: of this stream and context.
    """

    def __init__(
        self,
        stream: TokenStream,
        context: int,
        eod: int,
        index: BestFitIndex,
        mask_documents: bool = False,
    ):
        self._stream, self._context, self._eod = stream, context, eod
        self._index, self._mask_documents = index, mask_documents

    def __len__(self) -> int:
        return len(self._index.offsets) - 1

    def __getitem__(self, index: int) -> Batch:
        """{"inputs", "targets": int32, "weights": float32 (0 where there is padding)} and, with
        a mask, "segment_ids" (0 where there is padding), "positions": int32; (context,) each.
        """
        shape, at = self._context, 0
        inputs, targets = np.full(shape, self._eod, np.int32), np.full(shape, self._eod, np.int32)
        segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        weights = np.zeros(shape, np.float32)
        pieces = range(self._index.offsets[index], self._index.offsets[index + 1])
        for number, piece in enumerate(pieces, start=1):
            start, length = int(self._index.starts[piece]), int(self._index.lengths[piece])
            tokens = self._stream.read(max(start - 1, 0), start + length)
            inputs[at + length - len(tokens) + 1 : at + length] = tokens[:-1]
            targets[at : at + length] = tokens[len(tokens) - length :]
            segments[at : at + length], weights[at : at + length] = number, 1
            positions[at : at + length] = np.arange(length)
            at += length
        window = {"inputs": inputs, "targets": targets, "weights": weights}
        if self._mask_documents:
            window |= {"segment_ids": segments, "positions": positions}
        return window


def check_windows(windows: Concatenated | BestFit, stream: TokenStream, context: int) -> None:
    """Refuses a text that fills no window."""
    if len(windows) < 1:
        raise ConfigError(
            f"model.context = {context} needs a training text of {context + 1} tokens or more, but"
            f" there are {len(stream)}; lower model.context or give more text."
        )
