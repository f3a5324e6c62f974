"""Documents into shards of token ids: in order, in parallel, resumable from shard to shard."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from ngpt_jax.config import ConfigError, DataConfig
from ngpt_jax.data import manifest as manifest_lib
from ngpt_jax.data.manifest import Manifest, SetFacts, ShardFacts
from ngpt_jax.data.preparing.shard_writer import SEGMENT, ShardWriter, Tokens
from ngpt_jax.data.preparing.splits import Split, choose_split
from ngpt_jax.data.shards import token_dtype
from ngpt_jax.data.text.sources import RawSource, Unit
from ngpt_jax.data.tokenizers.loading import Tokenizer, load_tokenizer, utf8
from ngpt_jax.data.workers import follow_parent
from ngpt_jax.files import digest_of, is_remote, reason, remove_leftovers, write_atomically
from ngpt_jax.terminal import Terminal, format_duration

SHARD_TOKENS = 100_000_000
_CHARACTERS_AT_ONCE = 2**20  # given to the tokenizer: bounds what its results take in memory
# A small text is done before a worker has started.
_SMALL = 4 * 2**20  # bytes of files, or records
_PORTIONS_BEFORE_WORKERS = 16  # where less than that is packed, or records are long
_PROGRESS = "progress.json"


class Stopped(Exception):
    """Told to stop; what was finished is kept."""


class _Flow(NamedTuple):
    """Documents of units in order, for one set, or split into train and held_out."""

    name: str
    units: Sequence[Unit]
    split: Split | None


class _Place(NamedTuple):
    """Where the next document is: a flow, a unit of it, a document of that."""

    flow: int
    unit: int
    document: int


class _Portion(NamedTuple):
    texts: list[str]
    after: _Place
    done: int  # how much of the flow's size has been read


def prepare(
    source: RawSource,
    held_out: float,
    config: DataConfig,
    out: epath.Path,
    *,
    format: str = "bin",
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    terminal: Terminal | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Manifest:
    """Writes the tokens of a source into a folder, or goes on with that.

    Args:
      source: of raw text.
      held_out: share of the documents where the source names no held-out sets.
      config: its tokenizer and end_of_document are read.
      out: the folder; one that is already complete is left as it is.
      format: bin, or array_record with a document a record.
      shard_tokens: tokens of "train" after which a new shard begins.
      workers: processes that tokenize; None: one a core.
      terminal: shows progress.
      stopped: polled; raises Stopped.

    Raises ConfigError: bad text, a folder that holds something else, a disk that is full.
    """
    tokenizer = load_tokenizer(config)
    key = source_key(source, held_out, tokenizer, format, shard_tokens)
    try:
        _refuse_occupied(out)
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out, terminal, stopped):
            for left in out.glob(f"{SEGMENT}*"):
                left.rmtree()  # of a run that was killed
            remove_leftovers(out)
            if (out / manifest_lib.NAME).exists():
                done = manifest_lib.read_manifest(out, "--out")
                if done.source != key:
                    raise ConfigError(
                        f"{str(out)!r} holds tokens of another text, tokenizer or split; choose"
                        " another --out, or delete it."
                    )
                manifest_lib.check_manifest(done, out, tokenizer, "--out")
                return done
            job = _Job(source, held_out, config, tokenizer, out, format, shard_tokens, key)
            return job.run(workers or os.cpu_count() or 1, terminal, stopped)
    except (OSError, ImportError, LookupError) as e:  # the last for a storage that is not known
        raise ConfigError(f"{str(out)!r} cannot be written: {reason(e)}.") from e


def _refuse_occupied(out: epath.Path) -> None:
    """A folder of something else is not touched."""
    try:
        names = {entry.name for entry in out.iterdir()}
    except FileNotFoundError:  # also a new "folder" of a bucket
        return
    if names - {".lock"} and not names & {manifest_lib.NAME, _PROGRESS}:
        if all(name.startswith((".lock", SEGMENT, f".{_PROGRESS}")) for name in names):
            return  # a run was killed before its first words
        raise ConfigError(f"{str(out)!r} is not empty; choose another --out, or delete it.")


def source_key(
    source: RawSource, held_out: float, tokenizer: Tokenizer, format: str, shard_tokens: int
) -> str:
    """Fingerprint of all that prepared tokens depend on."""
    units = [("train", source.train), *source.held_out.items()]
    return digest_of(
        [
            f"{manifest_lib.VERSION} {held_out} {format} {shard_tokens} {tokenizer.fingerprint}",
            *(f"{name} {unit.stamp}" for name, some in units for unit in some),
        ]
    )


@contextlib.contextmanager
def _locked(
    out: epath.Path, terminal: Terminal | None, stopped: Callable[[], bool]
) -> Iterator[None]:
    """One preparation of a folder at a time; the lock ends with its process."""
    if is_remote(out):
        yield
        return
    with open(out / ".lock", "w") as f:
        told = False
        while True:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if terminal is not None and not told:
                    terminal.say(f"waiting for another process, which prepares {out}")
                told = True
                if stopped():
                    raise Stopped from None
                time.sleep(0.2)
        yield


class _Job:
    """One preparation: what is done, and what is left to do."""

    def __init__(
        self,
        source: RawSource,
        held_out: float,
        config: DataConfig,
        tokenizer: Tokenizer,
        out: epath.Path,
        format: str,
        shard_tokens: int,
        key: str,
    ):
        self.config, self.tokenizer, self.out, self.key = config, tokenizer, out, key
        self.format, self.shard_tokens = format, shard_tokens
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.place, self.sets = _Place(0, 0, 0), dict[str, SetFacts]()
        if (out / _PROGRESS).exists():
            self._read_progress()
        if source.held_out:
            self.flows = [_Flow("train", source.train, None)]
            self.flows += [_Flow(name, units, None) for name, units in source.held_out.items()]
        else:
            split = choose_split(
                lambda: (text for unit in source.train for text, _ in unit.read()),
                held_out,
                source.field,
            )
            self.flows = [_Flow("train", source.train, split)]
        self._write_progress()  # before the first shard: so it is known whose that is

    def run(self, workers: int, terminal: Terminal | None, stopped: Callable[[], bool]) -> Manifest:
        report = _Report(self.flows, terminal)
        with contextlib.ExitStack() as stack:
            segment = stack.enter_context(ShardWriter(self.out, self.format))
            for portion, some in self._tokenized(workers):
                segment.add(some)
                report.show(portion, sum(len(tokens.ids) for tokens in some))
                if segment.tokens("train") >= self.shard_tokens:
                    self._commit(segment, portion.after)
                    segment = stack.enter_context(ShardWriter(self.out, self.format))
                if stopped():
                    raise Stopped
            self._commit(segment, _Place(len(self.flows), 0, 0))
        for flow in self.flows:
            if flow.name not in self.sets:
                raise ConfigError(f"{flow.name}: there is no text in it; give files with text.")
        manifest = self._manifest()
        write_atomically(self.out / manifest_lib.NAME, manifest.to_json())
        (self.out / _PROGRESS).unlink(missing_ok=True)
        return manifest

    def _tokenized(self, workers: int) -> Iterator[tuple[_Portion, list[Tokens]]]:
        """Portions from the place on, in order, with their tokens."""
        for number in range(self.place.flow, len(self.flows)):
            flow = self.flows[number]
            start = self.place if number == self.place.flow else _Place(number, 0, 0)
            portions = _portions(flow, start)
            small = sum(unit.size for unit in flow.units) < _SMALL
            for portion in itertools.islice(portions, _PORTIONS_BEFORE_WORKERS if small else 0):
                yield portion, _tokenize(portion.texts, flow.name, flow.split, self.tokenizer)
            if workers == 1 or self.tokenizer.name == "byte":  # bytes cost less than workers
                for portion in portions:
                    yield portion, _tokenize(portion.texts, flow.name, flow.split, self.tokenizer)
            elif (first := next(portions, None)) is not None:
                yield from self._in_workers(itertools.chain([first], portions), flow, workers)

    def _in_workers(
        self, portions: Iterator[_Portion], flow: _Flow, workers: int
    ) -> Iterator[tuple[_Portion, list[Tokens]]]:
        # Spawned: a fork of a process with threads, jax's among them, may hang.
        pool = concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _start_worker, (self.config,)
        )
        pending: collections.deque = collections.deque()
        try:
            for portion in portions:
                job = pool.submit(_tokenize_in_worker, portion.texts, flow.name, flow.split)
                pending.append((portion, job))
                if len(pending) > 2 * workers:  # so that memory stays bounded
                    portion, job = pending.popleft()
                    yield portion, job.result()
            for portion, job in pending:
                yield portion, job.result()
        except concurrent.futures.process.BrokenProcessPool as e:
            raise ConfigError(
                "A worker was killed (out of memory?) or could not start (a program of your own"
                " needs if __name__ == '__main__'); the same command goes on."
            ) from e
        finally:
            pool.shutdown(cancel_futures=True)

    # What is done lies in progress.json, from one shard to the next.

    def _read_progress(self) -> None:
        file = self.out / _PROGRESS
        try:
            progress = json.loads(file.read_text())
            if progress["source"] != self.key:
                raise ConfigError(
                    f"{str(self.out)!r} holds the beginning of another text, tokenizer or split;"
                    " choose another --out, or delete it."
                )
            self.place = _Place(*progress["place"])
            if any(type(n) is not int or n < 0 for n in self.place):
                raise ValueError("place")
            for name, facts in progress["sets"].items():
                shards = tuple(ShardFacts(**shard) for shard in facts["shards"])
                self.sets[name] = SetFacts(facts["documents"], facts["bytes"], shards)
            for facts in self.sets.values():
                manifest_lib.check_set(facts, self._manifest())
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
            if isinstance(e, ConfigError):
                raise
            raise ConfigError(f"{str(file)!r} is damaged; delete {str(self.out)!r}.") from e
        manifest_lib.check_manifest(self._manifest(), self.out, self.tokenizer, "--out")

    def _commit(self, writer: ShardWriter, after: _Place) -> None:
        """Adds finished shards to what is done."""
        new = writer.commit({name: len(facts.shards) for name, facts in self.sets.items()})
        for name, facts in new.items():
            old = self.sets.get(name, SetFacts(0, 0, ()))
            self.sets[name] = SetFacts(
                old.documents + facts.documents, old.bytes + facts.bytes, old.shards + facts.shards
            )
        self.place = after
        self._write_progress()

    def _write_progress(self) -> None:
        sets = {name: dataclasses.asdict(facts) for name, facts in self.sets.items()}
        text = json.dumps({"source": self.key, "place": self.place, "sets": sets})
        write_atomically(self.out / _PROGRESS, text)

    def _manifest(self) -> Manifest:
        facts = manifest_lib.tokenizer_facts(self.tokenizer)
        return Manifest(self.key, self.format, self.dtype.name, facts, dict(self.sets))


def _portions(flow: _Flow, start: _Place) -> Iterator[_Portion]:
    """Documents of a flow in portions, each with the place after it.

    A portion depends on where it starts alone, so a run that goes on makes the same ones.
    """
    texts: list[str] = []
    characters, place = 0, start
    before = sum(unit.size for unit in flow.units[: start.unit])
    done = before
    for number in range(start.unit, len(flow.units)):
        unit = flow.units[number]
        skip = start.document if number == start.unit else 0
        for document, (text, read) in enumerate(itertools.islice(unit.read(), skip, None), skip):
            texts.append(text)
            characters += len(text)
            place, done = _Place(start.flow, number, document + 1), before + read
            if characters >= _CHARACTERS_AT_ONCE:
                yield _Portion(texts, place, done)
                texts, characters = [], 0
        before += unit.size
    if texts:
        yield _Portion(texts, place, done)


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
        except Exception as e:  # the libraries raise nothing more special
            raise ConfigError(
                f"data.tokenizer: {tokenizer.name!r} cannot encode the text ({reason(e)}); give"
                " another."
            ) from e
        ends = np.cumsum([len(ids) + 1 for ids in encoded])
        ids = np.full(ends[-1], tokenizer.eod, dtype)
        for some, end in zip(encoded, ends):
            ids[end - 1 - len(some) : end - 1] = some
        num_bytes = sum(len(p) if p.isascii() else len(utf8(p)) for p in pieces)
        out.append(Tokens(part, ids, ends, num_bytes))
    return out


_worker_tokenizer: Tokenizer


def _start_worker(config: DataConfig) -> None:
    global _worker_tokenizer
    follow_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core each
    _worker_tokenizer = load_tokenizer(config)


def _tokenize_in_worker(texts: Sequence[str], name: str, split: Split | None) -> list[Tokens]:
    return _tokenize(texts, name, split, _worker_tokenizer)


class _Report:
    """Progress on the terminal, with what is left."""

    def __init__(self, flows: Sequence[_Flow], terminal: Terminal | None):
        self._terminal = terminal
        self._sizes = [sum(unit.size for unit in flow.units) for flow in flows]
        self._start, self._first, self._tokens = time.monotonic(), -1.0, 0

    def show(self, portion: _Portion, tokens: int) -> None:
        if self._terminal is None:
            return
        done = sum(self._sizes[: portion.after.flow]) + portion.done
        share = min(done / max(sum(self._sizes), 1), 1.0)
        self._first = share if self._first < 0 else self._first
        self._tokens += tokens
        seconds = max(time.monotonic() - self._start, 1e-9)
        status = f"{self._tokens / seconds:,.0f} tokens/s"
        if share > self._first:
            left = (1 - share) / (share - self._first) * seconds
            status += f"  eta {format_duration(left)}"
        label = f"preparing tokens {share:4.0%}"
        self._terminal.show(label, share, status)
        if seconds > 5:
            self._terminal.tell(f"{label}  {status}", seconds=10)
