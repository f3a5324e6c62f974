"""Turns tokens into text as they come: stop strings, and characters that are not whole yet."""

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ngpt_jax.data.tokenizers.base import Tokenizer

_UNFINISHED = "\ufffd"  # what the bytes of half a character decode to
_CONTEXT = 16  # tokens to decode again with new ones


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

    A decoder may treat the start of a text specially, and a character may be split between tokens.
    So new tokens are decoded together with a few before them, the context, whose text is then taken
    off: the time grows with the number of tokens. The result is decoded as a whole.

    Attributes:
      prompt: its token ids.
      stop_reason: as of :class:`Generation`; "" before the end.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stops: Sequence[str]):
        self.prompt, self.stop_reason = prompt, ""
        self._tokenizer, self._stops = tokenizer, stops
        self._most, self._full = 0, ""
        self._ids = list(prompt)  # of the prompt and of what was drawn
        self._log_probs: list[float] = []
        self._start, self._end = 0, len(prompt)  # of the context in _ids
        self._before = self._context = tokenizer.decode(prompt)
        self._pieces: list[str] = []  # text that is certain, and not told yet
        self._told = 0  # characters
        # The end of the certain text, in which a stop string may begin.
        self._recent, self._reach = "", max(map(len, stops), default=1) - 1

    def limit(self, tokens: int, context: int) -> int:
        """Sets and returns how many tokens may come: at most ``tokens`` that fit the context."""
        self._most = min(tokens, context - len(self.prompt))
        self._full = "tokens" if self._most == tokens else "context"
        return self._most

    def add(self, ids: list[int], log_probs: list[float]) -> None:
        """Adds tokens that were drawn; those after the end are ignored."""
        if self.stop_reason:
            return
        eod, room = self._tokenizer.eod, self._most - len(self._log_probs)
        ids = ids[:room]
        if eod in ids:
            ids, self.stop_reason = ids[: ids.index(eod) + 1], "document"
        elif len(ids) == room:
            self.stop_reason = self._full
        self._ids += ids
        self._log_probs += log_probs[: len(ids)]
        recent, size = self._read_new(), len(self._ids)
        maybe = self.stop_reason or any(stop in recent for stop in self._stops)
        if maybe and self._read(size)[1]:
            # The last token is the first of the new ones that completes a stop string.
            first = size - len(ids) + 1
            size = bisect.bisect_left(range(size), True, first, key=lambda n: self._read(n)[1])
            self.stop_reason = "stop"
            del self._ids[size:], self._log_probs[size - len(self.prompt) :]

    def _read(self, size: int) -> tuple[str, bool]:
        """The text of the first tokens up to a stop string, and whether there is one."""
        text = _rest(self._tokenizer.decode(self._ids[:size]), self._before)
        places = [p for stop in self._stops if (p := text.find(stop)) >= 0]
        return text[: min(places, default=len(text))], bool(places)

    def _read_new(self) -> str:
        """Decodes the tokens after the context, and moves it on, to the last certain place.

        Returns:
          Their text, with so much before it that a stop string may end in it.
        """
        decode, size = self._tokenizer.decode, len(self._ids)
        text = decode(self._ids[self._start :])
        recent = self._recent + self._after_context(text)
        for end in range(size, self._end, -1):
            head = text if end == size else decode(self._ids[self._start : end])
            # A character has at most four bytes: half of one, four tokens back, stays half.
            whole = not head.endswith(_UNFINISHED) or size - end >= 4
            if whole and text.startswith(head):
                self._pieces.append(self._after_context(head))
                certain = self._recent + self._pieces[-1]
                self._recent = certain[max(len(certain) - self._reach, 0) :]
                self._start, self._end = max(self._start, end - _CONTEXT), end
                self._context = decode(self._ids[self._start : end])
                break
        return recent

    def _after_context(self, text: str) -> str:
        if self._end == len(self.prompt):
            return _rest(text, self._context)
        return text[len(self._context) :]

    def news(self, last: bool = False) -> str:
        """Text since the last call that later tokens cannot change; with ``last`` all of it."""
        if last or self.stop_reason:
            news = self.result().text[self._told :]
        else:
            certain = "".join(self._pieces)
            held = max((_overlap(certain, stop) for stop in self._stops), default=0)
            news = certain[: len(certain) - held]
            self._pieces = [certain[len(news) :]]
        self._told += len(news)
        return news

    def result(self) -> Generation:
        """The text so far."""
        ids = self._ids[len(self.prompt) :]
        return Generation(self._read(len(self._ids))[0], ids, self._log_probs, self.stop_reason)


def _rest(text: str, before: str) -> str:
    """What follows ``before`` in a text."""
    if text.startswith(before):
        return text[len(before) :]
    # A prompt of ids may end inside a character, which changes once it is whole.
    pairs = enumerate(zip(before, text))
    return text[next((i for i, (a, b) in pairs if a != b), len(before)) :]


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
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
