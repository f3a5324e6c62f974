"""Which documents are held out where a source has no held-out sets."""

import collections
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from ngpt_jax.config import ConfigError

_DOCUMENTS = 1000  # of fewer documents, the share is counted exactly


def text_digest(text: str) -> str:
    """sha256, as hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def hold_out(sizes: Mapping[str, int], share: float) -> set[str]:
    """The first keys in sorted order whose sizes add up closest to ``share`` of the total.

    It takes at least one key and leaves at least one, of two or more. With hashes as keys, a small
    change of the corpus hardly moves the cut: most of what is held out stays held out.
    """
    target = share * sum(sizes.values())
    held: set[str] = set()
    total = 0
    for key in sorted(sizes)[:-1]:
        if held and abs(total + sizes[key] - target) >= abs(total - target):
            break
        held.add(key)
        total += sizes[key]
    return held


class Split(NamedTuple):
    """Assigns a document to train or held_out by its text alone.

    The order of documents and files does not matter. Copies of a document stay together. A larger
    corpus holds out what a smaller one did, except for a few documents.

    Attributes:
      threshold: documents whose sha256 (hexadecimal digits) is at most this are held out.
      cut_share: where all documents are the same one, this share at its end is held out.
    """

    threshold: str
    cut_share: float | None = None

    def __call__(self, text: str) -> dict[str, str]:
        """{name of the set: the document, or its part}."""
        if self.cut_share is None:
            return {"held_out" if text_digest(text) <= self.threshold else "train": text}
        cut = _cut(text, self.cut_share)
        assert cut is not None
        return {"train": text[:cut], "held_out": text[cut:]}


def choose_split(read: Callable[[], Iterable[str]], share: float, field: str) -> Split:
    """A split that holds out about ``share`` of the documents; neither side is empty.

    Args:
      read: begins to read the documents, which are not blank.
      share: of the documents to hold out.
      field: that names the text, for messages.

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
            f"{field}: the only document is a single line, so nothing can be held out; give more"
            " text, or eval_paths."
        )
    return Split("", share)


def _cut(text: str, share: float) -> int | None:
    """Where to cut: after the line end closest to ``1 - share``, so that neither part is blank.

    None where there is no such line end.
    """
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    target = min(max(round(len(text) * (1 - share)), start), end)
    line_ends = (text.rfind("\n", start, target), text.find("\n", target, end))
    cuts = [position + 1 for position in line_ends if position >= 0]
    return min(cuts, key=lambda c: abs(c - target)) if cuts else None
