"""Tokens to text while they come: stop strings, and characters that are not whole yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ngpt_jax.data.tokenizers.base import Tokenizer

_UNFINISHED = "\ufffd"  # what the bytes of half a character decode to


class Generation(NamedTuple):
    """What a model said after a prompt.

    Attributes:
      text: without the prompt, up to the stop string where one was met.
      ids: of all tokens drawn, the one that ends the document and those of a stop string too.
      log_probs: of each of them, in nats, at temperature 1 and without filters.
      stop_reason: tokens (as many as asked for), context (no room for more), document (it ended),
        or stop (a stop string was met).
    """

    text: str
    ids: list[int]
    log_probs: list[float]
    stop_reason: str


class TextStream:
    """What comes after one prompt.

    Attributes:
      prompt: its token ids.
      stop_reason: "" as long as it goes on.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stops: Sequence[str]):
        self.prompt, self.stop_reason = prompt, ""
        self._tokenizer, self._stops = tokenizer, stops
        self._most, self._full = 0, ""
        self._ids: list[int] = []
        self._log_probs: list[float] = []
        # A tokenizer may treat the start of a text in a way of its own: decode from the start.
        self._before = tokenizer.decode(prompt)
        self._text, self._told = "", 0

    def limit(self, tokens: int, context: int) -> int:
        """Sets how many tokens may come: as many as asked for, or as the context has room for."""
        self._most = min(tokens, context - len(self.prompt))
        self._full = "tokens" if self._most == tokens else "context"
        return self._most

    def add(self, ids: Sequence[int], log_probs: Sequence[float]) -> None:
        """Takes what was drawn; nothing after its end."""
        for i, log_prob in zip(ids, log_probs):
            if self.stop_reason:
                break
            self._ids.append(i)
            self._log_probs.append(log_prob)
            if i == self._tokenizer.eod:
                self.stop_reason = "document"
            elif len(self._ids) == self._most:
                self.stop_reason = self._full
            if self._stops:
                self._find_stop()
        if not self._stops:
            self._text = self._decode()

    def _decode(self) -> str:
        text = self._tokenizer.decode(self.prompt + self._ids)
        if text.startswith(self._before):
            return text[len(self._before) :]
        # A prompt of ids may end within a character, which comes out otherwise once it is whole.
        pairs = enumerate(zip(self._before, text))
        return text[next((i for i, (a, b) in pairs if a != b), len(self._before)) :]

    def _find_stop(self) -> None:
        self._text = self._decode()
        places = [p for stop in self._stops if (p := self._text.find(stop)) >= 0]
        if places:
            self._text, self.stop_reason = self._text[: min(places)], "stop"

    def news(self, last: bool = False) -> str:
        """Text since the last call that nothing to come can change; all of it with ``last``."""
        certain = self._text
        if not (last or self.stop_reason):
            certain = certain.rstrip(_UNFINISHED)
            held = max((_overlap(certain, stop) for stop in self._stops), default=0)
            certain = certain[: len(certain) - held]
        news = certain[self._told :]
        self._told += len(news)
        return news

    def result(self) -> Generation:
        return Generation(self._text, self._ids, self._log_probs, self.stop_reason)


class Streamed:
    """Pieces of the text after one prompt; when they have ended, ``result`` is all of it."""

    def __init__(self, text: TextStream, draws: Iterator[None]):
        self._text, self._draws = text, draws

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        for _ in self._draws:
            if piece := self._text.news():
                return piece
        if piece := self._text.news(last=True):
            return piece
        raise StopIteration

    @property
    def result(self) -> Generation:
        return self._text.result()


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text with which a stop string may begin."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
