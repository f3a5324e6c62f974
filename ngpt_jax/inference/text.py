"""Turns tokens into text as they come: stop strings, and characters that are not whole yet."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ngpt_jax.data.tokenizers.base import Tokenizer

_UNFINISHED = "\ufffd"  # what the bytes of half a character decode to
_CONTEXT = 32  # most tokens to decode again with a new one


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
    off: the time grows with the number of tokens. The result is decoded once more as a whole.

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
        self._text = ""  # of the result
        self._pieces: list[str] = []  # text that is certain, and not told yet
        self._told = 0  # characters
        # The end of the certain text, in which a stop string may begin.
        self._recent, self._reach = "", max(map(len, stops), default=1) - 1

    def limit(self, tokens: int, context: int) -> int:
        """Sets and returns how many tokens may come: at most ``tokens`` that fit the context."""
        self._most = min(tokens, context - len(self.prompt))
        self._full = "tokens" if self._most == tokens else "context"
        return self._most

    def add(self, ids: Sequence[int], log_probs: Sequence[float]) -> None:
        """Adds tokens that were drawn; those after the end are ignored."""
        for i, log_prob in zip(ids, log_probs):
            if self.stop_reason:
                return
            self._ids.append(i)
            self._log_probs.append(log_prob)
            if i == self._tokenizer.eod:
                self.stop_reason = "document"
            elif len(self._log_probs) == self._most:
                self.stop_reason = self._full
            if not self.stop_reason and self._stops:
                recent = self._read_new()
                if not any(stop in recent for stop in self._stops):
                    continue
            if self.stop_reason or self._stops:
                self._read_all()
        if not (self.stop_reason or self._stops):
            self._read_new()

    def _read_all(self) -> None:
        """Decodes the whole text, and ends it where it holds a stop string."""
        self._text = _rest(self._tokenizer.decode(self._ids), self._before)
        places = [p for stop in self._stops if (p := self._text.find(stop)) >= 0]
        if places:
            self._text, self.stop_reason = self._text[: min(places)], "stop"
        self._recent = _last(self._text, self._reach)

    def _read_new(self) -> str:
        """Decodes the tokens after the context, and moves it on, to the last certain place.

        Returns:
          Their text, with so much before it that a stop string may end in it.
        """
        decode, start, size = self._tokenizer.decode, self._start, len(self._ids)
        text = decode(self._ids[start:])
        recent = self._recent + self._after_context(text)
        for end in range(size, self._end, -1):
            head = text if end == size else decode(self._ids[start:end])
            # A character has at most four bytes: half of one, four tokens back, stays half.
            whole = not head.endswith(_UNFINISHED) or size - end >= 4
            if whole and text.startswith(head):
                piece = self._after_context(head)
                self._pieces.append(piece)
                self._recent = _last(self._recent + piece, self._reach)
                self._move_context(end, head)
                break
        return recent

    def _after_context(self, text: str) -> str:
        if self._end == len(self.prompt):
            return _rest(text, self._context)
        return text[len(self._context) :]

    def _move_context(self, end: int, head: str) -> None:
        """Moves the context to ``end``, and its start to where it holds more than white space."""
        for start in (self._end, end - 16, end - _CONTEXT):
            if start <= self._start:
                continue
            context = self._tokenizer.decode(self._ids[start:end])
            if context.replace(_UNFINISHED, " ").strip() or start == end - _CONTEXT:
                self._start, head = start, context
                break
        self._end, self._context = end, head

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
        if not self.stop_reason:
            self._read_all()
        ids = self._ids[len(self.prompt) :]
        return Generation(self._text, ids, self._log_probs, self.stop_reason)


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


def _last(text: str, count: int) -> str:
    return text[max(len(text) - count, 0) :]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
