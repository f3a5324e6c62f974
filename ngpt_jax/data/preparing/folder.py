"""Prepares a folder: the documents of a source as shards of token ids, with a manifest.

A preparation that was stopped or killed continues after the last whole shard. What is finished is
told by progress.json until manifest.json takes its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from ngpt_jax.config import ConfigError
from ngpt_jax.data import manifest as manifest_lib
from ngpt_jax.data.manifest import Manifest, SetFacts, ShardFacts
from ngpt_jax.data.preparing.progress import Progress
from ngpt_jax.data.preparing.tokenize import Group, Place, Portion, Tokens, tokenized
from ngpt_jax.data.shards import token_dtype
from ngpt_jax.data.text.held_out import choose_split
from ngpt_jax.data.text.units import TextSource, Unit, read_texts
from ngpt_jax.data.tokenizers.base import Tokenizer, gives_back
from ngpt_jax.files import (
    digest_of,
    is_remote,
    lock,
    matching,
    reason,
    remove_leftovers,
    write_atomically,
)
from ngpt_jax.parallel.backend import available_cores
from ngpt_jax.terminal import Terminal

SHARD_TOKENS = 100_000_000
_PROGRESS = "progress.json"
_FETCHED = ".fetched"  # the file of a data set that is being read
_TEMPORARY = ".segment"  # start of the names of temporary folders


class Stopped(Exception):
    """The preparation was told to stop; finished shards are kept."""


def prepare_folder(
    source: TextSource,
    held_out: float,
    tokenizer: Tokenizer,
    out: epath.Path,
    *,
    format: str = "bin",
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    terminal: Terminal | None = None,
    stopped: Callable[[], bool] = lambda: False,
    cache: str | None = None,
) -> Manifest:
    """Writes the tokens of a source into a folder, or continues with that.

    The same text and tokenizer give the same bytes, whatever the number of workers.

    Args:
      source: of text.
      held_out: share of the documents to hold out where the source has no held-out sets.
      tokenizer: to encode with.
      out: the folder; a finished one is left as it is.
      format: of the shards: bin, or array_record with a document a record.
      shard_tokens: tokens of "train" after which a new shard begins.
      workers: processes that tokenize; None: one a core.
      terminal: shows progress.
      stopped: asked after each portion and while waiting; True raises Stopped.
      cache: the data.cache in which the folder is; None: the user named the folder itself.

    Returns:
      The manifest of the finished folder.

    Raises ConfigError: bad text, a folder that holds something else, a full disk.
    """
    key = source_key(source, held_out, tokenizer, format, shard_tokens)
    field = "--out" if cache is None else "data.cache"
    try:
        _refuse_occupied(out)
        out.mkdir(parents=True, exist_ok=True)
        with (
            _lock(out, terminal, stopped),
            Progress("preparing tokens", terminal) as progress,
            tempfile.TemporaryDirectory() as temporary,
        ):
            scratch = Path(temporary if is_remote(out) else out / _FETCHED)
            for left in matching(out, f"{_TEMPORARY}*"):
                left.rmtree()  # of a run that was killed
            remove_leftovers(out)
            if (out / manifest_lib.NAME).exists():
                done = manifest_lib.read_manifest(out, field)
                _check_key(done.source, key, "tokens", out)
                manifest_lib.check_shards(done, out, field)
                _tell_empty(done, terminal)
                return done
            facts = manifest_lib.tokenizer_facts(tokenizer)
            empty = Manifest(
                key, format, token_dtype(tokenizer.vocab_size).name, facts, {}, origin=source.origin
            )
            place, done, lost = _read_progress(out, empty, field)

            def waiting(what: str) -> None:
                progress.doing(what)
                if stopped():
                    raise Stopped

            def fetch(unit: Unit) -> None:
                unit.fetch(scratch, waiting)

            progress.doing("choosing what to hold out")
            groups = _groups(source, held_out, fetch)
            progress.begin([sum(unit.size for unit in group.units) for group in groups])
            _write_progress(out, place, done, lost)  # before any shard: whose folder it is
            workers = workers or len(available_cores())
            portions = tokenized(groups, place, tokenizer, workers, progress.doing, fetch)
            done = _write_shards(out, done, lost, portions, shard_tokens, progress, stopped)
            _tell_empty(done, terminal)
            for group in groups:
                if group.name not in done.sets:
                    raise ConfigError(f"{group.name}: there is no text in it; give some.")
            for name, some in done.sets.items():
                if some.bytes < 1:
                    raise ConfigError(f"{name}: the tokenizer loses all of its text; give another.")
            write_atomically(out / manifest_lib.NAME, done.to_json())
            (out / _PROGRESS).unlink(missing_ok=True)
            shutil.rmtree(scratch, ignore_errors=True)
            return done
    except (OSError, ImportError, LookupError) as e:  # LookupError: an unknown kind of storage
        where = repr(str(out)) if cache is None else f"{field} = {cache!r}"
        raise ConfigError(f"{where} cannot be written: {reason(e)}; give another folder.") from e


def source_key(
    source: TextSource, held_out: float, tokenizer: Tokenizer, format: str, shard_tokens: int
) -> str:
    """Fingerprint of everything that the prepared tokens depend on."""
    units = [("train", source.train), *source.held_out.items()]
    how = f"{manifest_lib.VERSION} {held_out} {format} {shard_tokens} {tokenizer.fingerprint}"
    how += "" if gives_back(tokenizer) else " decoded bytes"  # earlier versions counted others
    return digest_of([how, *(f"{name} {unit.stamp}" for name, some in units for unit in some)])


def _groups(source: TextSource, held_out: float, fetch: Callable[[Unit], None]) -> list[Group]:
    if source.held_out:
        sets = {"train": source.train, **source.held_out}
        return [Group(name, units, None) for name, units in sets.items()]
    split = choose_split(lambda: read_texts(source.train, fetch), held_out, source.field)
    return [Group("train", source.train, split)]


def _tell_empty(done: Manifest, terminal: Terminal | None) -> None:
    if done.empty and terminal is not None:
        terminal.say(f"left out {done.empty:,} documents without text (null or blank)")


def _refuse_occupied(out: epath.Path) -> None:
    """Refuses a folder that holds something else than a preparation."""
    try:
        names = {entry.name for entry in out.iterdir()}
    except FileNotFoundError:  # a new folder, also one of a bucket
        return
    if names - {".lock"} and not names & {manifest_lib.NAME, _PROGRESS}:
        if all(name.startswith((".lock", _TEMPORARY, _FETCHED, f".{_PROGRESS}")) for name in names):
            return  # a run was killed before it wrote progress.json
        raise ConfigError(f"{str(out)!r} is not empty; choose another --out, or delete it.")


def _check_key(found: str, key: str, what: str, out: epath.Path) -> None:
    if found != key:
        raise ConfigError(
            f"{str(out)!r} holds {what} of another text, tokenizer or split; choose another --out,"
            " or delete it."
        )


def _lock(
    out: epath.Path, terminal: Terminal | None, stopped: Callable[[], bool]
) -> contextlib.AbstractContextManager:
    """Lets one process at a time prepare a folder; raises Stopped. A bucket has no locks."""
    if is_remote(out):
        return contextlib.nullcontext()
    told = False

    def keep_waiting() -> bool:
        nonlocal told
        if terminal is not None and not told:
            terminal.say(f"waiting for another process, which prepares {out}")
        told = True
        return not stopped()

    try:
        return lock(out / ".lock", keep_waiting)
    except BlockingIOError:
        raise Stopped from None


def _write_shards(
    out: epath.Path,
    done: Manifest,
    lost: Sequence[int],
    portions: Iterable[tuple[Portion, list[Tokens]]],
    shard_tokens: int,
    progress: Progress,
    stopped: Callable[[], bool],
) -> Manifest:
    """Writes portions into shards; returns ``done`` with these.

    Args:
      out: the folder.
      done: what is finished.
      lost: ``Tokens.lost`` of that.
      portions: of all documents that are left, with their tokens.
      shard_tokens, stopped: as for :func:`prepare_folder`.
      progress: shows it.
    """
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(ShardWriter(out, done.format))
        for portion, some in portions:
            writer.add(some)
            lost = [sum(both) for both in zip(lost, *(tokens.lost for tokens in some))]
            manifest_lib.check_lost(lost, done, least=2**22)
            done = dataclasses.replace(done, empty=done.empty + portion.empty)
            progress.show(portion.after.group, portion.done, sum(len(t.ids) for t in some))
            if writer.tokens("train") >= shard_tokens:
                progress.doing("hashing shards")
                done = _with_shards(done, writer)
                _write_progress(out, portion.after, done, lost)
                writer = stack.enter_context(ShardWriter(out, done.format))
            if stopped():
                raise Stopped
        done = manifest_lib.check_lost(lost, done)
        return _with_shards(done, writer)


# ---------------------------------------------------------------------------------------- shards


class ShardWriter:
    """One new shard of each set; they get their final names together, when all are whole.

    Args:
      out: folder of the shards.
      format: bin or array_record.

    Raises OSError.
    """

    def __init__(self, out: epath.Path, format: str):
        self._out, self._format = out, format
        self._folder = tempfile.mkdtemp(
            prefix=_TEMPORARY, dir=None if is_remote(self._out) else str(self._out)
        )
        self._files: dict[str, Any] = {}
        self._facts: dict[str, list[int]] = {}  # documents, bytes of text, tokens

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            with contextlib.suppress(Exception):  # only after a failure, which is told already
                file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def tokens(self, name: str) -> int:
        """Tokens of a set so far."""
        return self._facts.get(name, [0, 0, 0])[2]

    def add(self, some: Iterable[Tokens]) -> None:
        for tokens in some:
            if tokens.name not in self._files:
                self._files[tokens.name] = _open_writer(self._path(tokens.name), self._format)
                self._facts[tokens.name] = [0, 0, 0]
            file = self._files[tokens.name]
            with _writing():
                if self._format == "bin":
                    file.write(tokens.ids.tobytes())
                else:
                    for start, end in itertools.pairwise([0, *tokens.ends]):
                        file.write(tokens.ids[start:end].tobytes())
            more = (len(tokens.ends), tokens.bytes, len(tokens.ids))
            self._facts[tokens.name] = [a + b for a, b in zip(self._facts[tokens.name], more)]

    def _path(self, name: str) -> epath.Path:
        return epath.Path(self._folder) / name

    def commit(self, numbers: Mapping[str, int]) -> dict[str, SetFacts]:
        """Moves the shards into the folder under their names.

        Args:
          numbers: how many shards each set has in the folder already.

        Returns:
          What was written of each set.
        """
        new = {}
        for name, file in self._files.items():
            with _writing():
                file.close()
            documents, num_bytes, tokens = self._facts[name]
            path = self._path(name)
            shard = f"{name}-{numbers.get(name, 0):05}.{self._format}"
            facts = ShardFacts(shard, tokens, path.stat().length, manifest_lib.sha256_of(path))
            if is_remote(self._out):
                path.copy(self._out / shard, overwrite=True)
            else:
                with open(path, "rb") as f:
                    os.fsync(f.fileno())
                os.replace(path, self._out / shard)
            new[name] = SetFacts(documents, num_bytes, (facts,))
        self._files = {}
        shutil.rmtree(self._folder, ignore_errors=True)
        return new


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Makes an OSError of the RuntimeError that array_record raises for a full disk."""
    try:
        yield
    except RuntimeError as e:
        raise OSError(reason(e)) from e


def _open_writer(path: epath.Path, format: str) -> Any:
    if format == "bin":
        return open(path, "wb")
    from array_record.python.array_record_module import ArrayRecordWriter

    return ArrayRecordWriter(str(path), "group_size:1")


# ------------------------------------------------------------------------ what is finished


def _with_shards(done: Manifest, writer: ShardWriter) -> Manifest:
    """``done`` with the writer's shards, which get their final names."""
    new = writer.commit({name: len(facts.shards) for name, facts in done.sets.items()})
    nothing = SetFacts(0, 0, ())
    both = {name: (done.sets.get(name, nothing), facts) for name, facts in new.items()}
    sums = {
        name: SetFacts(a.documents + b.documents, a.bytes + b.bytes, a.shards + b.shards)
        for name, (a, b) in both.items()
    }
    return dataclasses.replace(done, sets={**done.sets, **sums})


def _write_progress(out: epath.Path, place: Place, done: Manifest, lost: Sequence[int]) -> None:
    sets = {name: dataclasses.asdict(facts) for name, facts in done.sets.items()}
    body = {
        "source": done.source, "place": place, "sets": sets, "empty": done.empty, "lost": lost
    }  # fmt: skip
    text = json.dumps(body)
    write_atomically(out / _PROGRESS, text)


def _read_progress(
    out: epath.Path, empty: Manifest, field: str
) -> tuple[Place, Manifest, list[int]]:
    """The place to continue at, what is finished, and its ``Tokens.lost``; raises ConfigError.

    Args:
      out: the folder, perhaps without progress.json.
      empty: the manifest without any set.
      field: that names the folder, for messages.
    """
    file = out / _PROGRESS
    if not file.exists():
        return Place(0, 0, 0), empty, [0, 0]
    try:
        progress = json.loads(file.read_text())
        _check_key(progress["source"], empty.source, "the beginning", out)
        place = Place(*progress["place"])
        number = progress.get("empty", 0)  # older versions did not count
        lost = list(progress.get("lost", (0, 0)))
        if any(type(n) is not int or n < 0 for n in (*place, number, *lost)) or len(lost) != 2:
            raise ValueError("place")
        sets = manifest_lib.parse_sets(progress["sets"], empty.format, empty.dtype)
    except ConfigError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise ConfigError(f"{str(file)!r} is damaged; delete {str(out)!r}.") from e
    done = dataclasses.replace(empty, sets=sets, empty=number)
    manifest_lib.check_shards(done, out, field)
    return place, done, lost
