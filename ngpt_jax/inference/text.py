"""Turns tokens into text as they come: stop strings, and characters that are not whole yet."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ngpt_jax.data.tokenizers.base import Tokenizer

_UNFINISHED = "\ufffd"  # what the bytes of half a character decode to


class Generation(NamedTuple):
    """The text that a model generated after a prompt.

    Attributes:
      text: without the prompt, up to the stop string where one was met.
      ids: of all tokens drawn, including the end-of-document token and those of a stop string.
      log_probs: of each of them, in nats, at temperature 1 and without filters.
      stop_reason: why it ended: tokens (as many as asked for), context (no room for more),
        document (the end-of-document token), or stop (a stop string).
    """

    text: str
    ids: list[int]
    log_probs: list[float]
    stop_reason: str


class TextStream:
    """The text after one prompt, as it grows.

    Attributes:
      prompt: its token ids.
      stop_reason: as of :class:`Generation`; "" before the end.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stops: Sequence[str]):
        self.prompt, self.stop_reason = prompt, ""
        self._tokenizer, self._stops = tokenizer, stops
        self._most, self._full = 0, ""
        self._ids: list[int] = []
        self._log_probs: list[float] = []
        # A tokenizer may treat the start of a text specially: always decode from the start.
        self._before = tokenizer.decode(prompt)
        self._text, self._told = "", 0

    def limit(self, tokens: int, context: int) -> int:
        """Sets and returns how many tokens may come: at most ``tokens`` that fit the context."""
        self._most = min(tokens, context - len(self.prompt))
        self._full = "tokens" if self._most == tokens else "context"
        return self._most

    def add(self, ids: Sequence[int], log_probs: Sequence[float]) -> None:
        """Adds tokens that were drawn; those after the end are ignored."""
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
        # A prompt of ids may end inside a character, which changes once it is whole.
        pairs = enumerate(zip(self._before, text))
        return text[next((i for i, (a, b) in pairs if a != b), len(self._before)) :]

    def _find_stop(self) -> None:
        self._text = self._decode()
        places = [p for stop in self._stops if (p := self._text.find(stop)) >= 0]
        if places:
            self._text, self.stop_reason = self._text[: min(places)], "stop"

    def news(self, last: bool = False) -> str:
        """Text since the last call that later tokens cannot change; with ``last`` all of it."""
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
    """An iterator over pieces of the text after one prompt; afterwards ``result`` has all of it."""

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
    """How many characters at the end of a text may be the beginning of a stop string."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
