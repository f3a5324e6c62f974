"""Documents to token ids: in portions, in order, in this process or in several."""

import collections
import concurrent.futures
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ngpt_jax import signals
from ngpt_jax.config import ConfigError
from ngpt_jax.data.shards import token_dtype
from ngpt_jax.data.text.held_out import Split
from ngpt_jax.data.text.units import Doing, Unit
from ngpt_jax.data.tokenizers.base import Tokenizer, lost_characters, utf8
from ngpt_jax.data.workers import follow_parent
from ngpt_jax.files import reason

_CHARACTERS_AT_ONCE = 2**20  # of a portion: bounds the memory that a tokenizer's results take
# A small text is tokenized before a worker has started: by the bytes of its files, or its records,
_SMALL = 4 * 2**20
_PORTIONS_BEFORE_WORKERS = 16  # and no further than this, as files may be packed and records long.
_LEAST_SAMPLED = 2**12  # characters on which is measured what a tokenizer loses


class Group(NamedTuple):
    """Units whose documents go to the set ``name``, or to train and held_out by ``split``."""

    name: str
    units: Sequence[Unit]
    split: Split | None


class Place(NamedTuple):
    """Where the next document is: the number of its group, of the unit, and of the document."""

    group: int
    unit: int
    document: int


class Portion(NamedTuple):
    """Some consecutive documents of a group.

    Attributes:
      texts: the documents.
      after: the place of the document that follows.
      done: how much of the group's size has been read.
      empty: how many documents without text were left out on the way.
    """

    texts: list[str]
    after: Place
    done: int
    empty: int


class Tokens(NamedTuple):
    """Token ids of some documents of a set.

    Attributes:
      name: of the set.
      ids: (tokens,) uint16 or uint32, with ``eod`` after each document.
      ends: (documents,) where each document ends, its ``eod`` included.
      bytes: length of the documents in UTF-8; but in held-out sets, of what their tokens stand for.
      lost: characters that decoding does not give back, and all characters, both without white
        space and estimated from a sample.
    """

    name: str
    ids: np.ndarray
    ends: np.ndarray
    bytes: int
    lost: tuple[int, int]


def tokenized(
    groups: Sequence[Group],
    start: Place,
    tokenizer: Tokenizer,
    workers: int,
    doing: Doing,
    fetch: Callable[[Unit], None],
) -> Iterator[tuple[Portion, list[Tokens]]]:
    """Portions of all documents from ``start`` on, in order, each with its tokens by set.

    Args:
      groups: of units.
      start: where a portion ended, or Place(0, 0, 0).
      tokenizer: encodes; pickled for workers.
      workers: processes; 1: this one.
      doing: told what is being done; may raise, to stop.
      fetch: makes a unit readable.

    Raises ConfigError.
    """
    for number in range(start.group, len(groups)):
        group = groups[number]
        portions = _portions(group, start if number == start.group else Place(number, 0, 0), fetch)
        small = sum(unit.size for unit in group.units) < _SMALL
        in_process: int | None = _PORTIONS_BEFORE_WORKERS if small else 0
        if workers == 1 or tokenizer.name == "byte":  # bytes cost less than workers
            in_process = None  # all of them
        doing("reading")
        for portion in itertools.islice(portions, in_process):
            doing(_work(portion))
            yield portion, _tokenize(portion.texts, group.name, group.split, tokenizer)
            doing("reading")
        if (first := next(portions, None)) is not None:
            rest = itertools.chain([first], portions)
            yield from _in_workers(rest, group, tokenizer, workers, doing)


def _portions(group: Group, start: Place, fetch: Callable[[Unit], None]) -> Iterator[Portion]:
    """Documents of a group in portions.

    A portion depends on its start alone, so that a run that continues makes the same ones.
    """
    texts: list[str] = []
    characters, empty, place = 0, 0, start
    before = sum(unit.size for unit in group.units[: start.unit])
    done = before
    for number in range(start.unit, len(group.units)):
        unit = group.units[number]
        skip = start.document if number == start.unit else 0
        fetch(unit)
        document = 0  # those without text do not count
        for text, read in unit.read():
            document += bool(text)
            if document <= skip and (text or document < skip):
                continue  # an earlier run has dealt with it
            if not text:
                empty += 1
                continue
            texts.append(text)
            characters += len(text)
            place, done = Place(start.group, number, document), before + read
            if characters >= _CHARACTERS_AT_ONCE:
                yield Portion(texts, place, done, empty)
                texts, characters, empty = [], 0, 0
        before += unit.size
    if texts or empty:
        yield Portion(texts, place, done, empty)


def _work(portion: Portion) -> str:
    longest = max(map(len, portion.texts), default=0)
    if longest < _CHARACTERS_AT_ONCE:
        return "tokenizing"
    return f"tokenizing a document of {longest / 1e6:,.1f} million characters"


def _tokenize(
    texts: Sequence[str], name: str, split: Split | None, tokenizer: Tokenizer
) -> list[Tokens]:
    """Tokens of documents by the set that they belong to."""
    sets: dict[str, list[str]] = {name: []}
    for text in texts:
        for part, piece in split(text).items() if split else ((name, text),):
            sets.setdefault(part, []).append(piece)
    dtype, out = token_dtype(tokenizer.vocab_size), []
    for part, pieces in sets.items():
        if not pieces:
            continue
        try:
            encoded = tokenizer.encode_batch(pieces)
        except Exception as e:  # the libraries raise plain Exceptions
            raise ConfigError(
                f"The tokenizer {tokenizer.name!r} cannot encode the text ({reason(e)}); give"
                " another."
            ) from e
        ends = np.cumsum([len(ids) + 1 for ids in encoded])
        ids = np.full(ends[-1], tokenizer.eod, dtype)
        for some, end in zip(encoded, ends):
            ids[end - 1 - len(some) : end - 1] = some
        if part == "train":
            num_bytes = sum(len(p) if p.isascii() else len(utf8(p)) for p in pieces)
        else:
            num_bytes = sum(tokenizer.text_bytes(p, i.tolist()) for p, i in zip(pieces, encoded))
        lost = (0, 0) if tokenizer.lossless else _lost(tokenizer, pieces)
        out.append(Tokens(part, ids, ends, num_bytes, lost))
    return out


def _lost(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[int, int]:
    """``Tokens.lost``, from the beginnings of some texts: all of them would double the time.

    1/64 of the characters or a little more, cut at white space. Which texts is random, with the
    same seed each time: texts that follow each other are often alike.
    """
    characters = sum(map(len, texts))
    sample, sampled = [], 0
    for number in np.random.default_rng(0).permutation(len(texts)):
        start = texts[number][: 2**12]
        whole = len(start) == len(texts[number])
        sample.append(start if whole else (start.rsplit(None, 1) or [""])[0])
        sampled += len(start)
        if sampled >= max(characters // 64, _LEAST_SAMPLED):
            break
    lost, of = lost_characters(tokenizer, sample)
    return round(lost * characters / sampled), round(of * characters / sampled)


# ------------------------------------------------------------------------------------- workers


def _in_workers(
    portions: Iterator[Portion],
    group: Group,
    tokenizer: Tokenizer,
    workers: int,
    doing: Doing,
) -> Iterator[tuple[Portion, list[Tokens]]]:
    # Spawned, not forked: the fork of a process with threads (jax has some) may hang.
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer,)
    )
    pending: collections.deque = collections.deque()
    try:
        for portion in portions:
            with signals.blocked():  # the first call starts the workers
                job = pool.submit(_tokenize_in_worker, portion.texts, group.name, group.split)
            pending.append((portion, job))
            if len(pending) > 2 * workers:  # bounds the memory
                portion, job = pending.popleft()
                doing(_work(portion))
                yield portion, job.result()
                doing("reading")
        for portion, job in pending:
            doing(_work(portion))
            yield portion, job.result()
    except concurrent.futures.process.BrokenProcessPool as e:
        raise ConfigError(
            "A worker was killed (out of memory?) or could not start (a program of your own needs"
            " if __name__ == '__main__'); the same command continues."
        ) from e
    finally:
        pool.shutdown(cancel_futures=True)


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    follow_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for each worker
    _worker_tokenizer = tokenizer


def _tokenize_in_worker(texts: Sequence[str], name: str, split: Split | None) -> list[Tokens]:
    return _tokenize(texts, name, split, _worker_tokenizer)
