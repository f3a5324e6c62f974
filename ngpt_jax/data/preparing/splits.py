"""Which documents are held out, where a source does not say."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ngpt_jax.config import ConfigError
from ngpt_jax.data.text.stdlib import hold_out, text_digest

_DOCUMENTS = 1000  # of a text with fewer, a share is counted out exactly


@dataclass(frozen=True)
class Split:
    """Assigns a document to train or held_out by its own text alone.

    The order of documents and files does not count, copies of a document stay together, and a
    larger corpus holds out what a smaller one did, but for a few.

    Attributes:
      threshold: documents with a sha256 up to it, as hexadecimal digits, are held out.
      cut_share: where all are one and the same document, its end is held out: this share.
    """

    threshold: str
    cut_share: float | None = None

    def __call__(self, text: str) -> dict[str, str]:
        """The document, or its parts, by the name of their set."""
        if self.cut_share is None:
            return {"held_out" if text_digest(text) <= self.threshold else "train": text}
        cut = _cut(text, self.cut_share)
        assert cut is not None
        return {"train": text[:cut], "held_out": text[cut:]}


def choose_split(read: Callable[[], Iterable[str]], share: float, field: str) -> Split:
    """A split that holds out about ``share`` of the documents, and leaves both sides some.

    Args:
      read: begins to read the documents, which are not blank.
      share: of the documents.
      field: of the config, for messages.

    Raises ConfigError: no documents, or a single one without a line end to cut it at.
    """
    counts: dict[str, int] = collections.Counter()
    few = max(_DOCUMENTS, math.ceil(min(50 / share, 1e6)))
    only = ""
    for text in read():
        only = only or text
        counts[text_digest(text)] += 1
        if len(counts) > few:
            return Split(f"{int(share * 2**64):016x}")
    if not counts:
        raise ConfigError(f"{field}: there is no text; give files with text.")
    if len(counts) > 1:
        return Split(max(hold_out(counts, share)))
    if _cut(only, share) is None:
        raise ConfigError(
            f"{field}: the only document is a single line, of which nothing can be held out;"
            " give more text or eval_paths."
        )
    return Split("", share)


def _cut(text: str, share: float) -> int | None:
    """Where to cut: after the line end closest to ``1 - share`` of it; neither part is blank."""
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    target = min(max(round(len(text) * (1 - share)), start), end)
    line_ends = (text.rfind("\n", start, target), text.find("\n", target, end))
    cuts = [position + 1 for position in line_ends if position >= 0]
    return min(cuts, key=lambda c: abs(c - target)) if cuts else None
