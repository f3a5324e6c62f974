"""From the config to windows and held-out sets: prepared where need be, checked, fingerprinted."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from etils import epath

from ngpt_jax.config import ConfigError, DataConfig, SourceConfig
from ngpt_jax.data import manifest as manifest_lib
from ngpt_jax.data import packing
from ngpt_jax.data.corpus_files import parse_path, real_path, stamp
from ngpt_jax.data.manifest import Manifest
from ngpt_jax.data.preparing.preparation import SHARD_TOKENS, prepare, source_key
from ngpt_jax.data.shards import (
    ArrayRecordShard,
    BinShard,
    Shard,
    TokenStream,
    open_bin,
    record_lengths,
)
from ngpt_jax.data.text import sources
from ngpt_jax.data.text.text_files import SUFFIXES
from ngpt_jax.data.tokenizers.loading import Tokenizer, utf8
from ngpt_jax.files import digest_of, is_remote, reason, write_atomically
from ngpt_jax.terminal import Terminal

_CUT_SEARCH = 2**24  # tokens before a cut in which the end of a document is looked for
_HELD_OUT_WORDS = r"(^|[^a-z])(val|valid|validation|test|held_?out|eval)([^a-z]|$)"

Windows = packing.Concatenated | packing.BestFit


@dataclass(frozen=True, eq=False)
class EvalSet:
    """Held-out text.

    Attributes:
      stream: all of its tokens are targets; the first is predicted from ``eod``.
      num_bytes: its length in UTF-8.
      fingerprint: of its tokens.
    """

    name: str
    stream: TokenStream
    num_bytes: int
    eod: int
    fingerprint: str = ""


@dataclass(frozen=True, eq=False)
class Corpus:
    """What a run trains on and is evaluated on.

    Attributes:
      train: windows of each source of a mixture by its name; else of the only one, under "".
      tokens: to train on, over all sources.
      fingerprint: of the tokens to train on: the same for copies at other places.
    """

    train: Mapping[str, Windows]
    held_out: list[EvalSet]
    tokens: int
    fingerprint: str


def load_corpus(
    config: DataConfig,
    tokenizer: Tokenizer,
    context: int,
    terminal: Terminal | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Corpus:
    """Opens what ``config`` names; text is first prepared into ``config.cache``.

    Args:
      config: checked.
      tokenizer: of ``config``.
      context: targets of a window.
      terminal: shows the progress of a preparation.
      stopped: polled by a preparation; raises preparation.Stopped.

    Raises ConfigError.
    """
    check_corpus(config, tokenizer)
    cache = Path(config.cache).expanduser()
    train: dict[str, Windows] = {}
    held_out: list[EvalSet] = []
    tokens, prints = 0, []
    for name, source in _named_sources(config).items():
        opened = _Opened(source, name, config, tokenizer, cache, terminal, stopped)
        stream = opened.train
        fingerprint = digest_of([opened.fingerprint, config.packing])
        train[name] = _windows(stream, config, context, tokenizer.eod, cache, fingerprint)
        prefix = f"{name}/" if name else ""
        held_out += [dataclasses.replace(s, name=prefix + s.name) for s in opened.held_out]
        tokens += len(stream)
        prints.append(f"{name} {opened.fingerprint}")
    if not held_out:
        raise ConfigError("data: there is no held-out set; prepare the folder anew with one.")
    for eval_set in held_out:
        if eval_set.num_bytes < 1:
            raise ConfigError(f"data: the held-out set {eval_set.name!r} holds no text.")
    return Corpus(train, held_out, tokens, digest_of(prints))


def check_corpus(config: DataConfig, tokenizer: Tokenizer) -> None:
    """Refuses what can be seen to be wrong without reading or preparing text.

    Files that are not there, another tokenizer, text that is held out here and trained on there.
    """
    if is_remote(config.cache):
        raise ConfigError(f"data.cache = {config.cache!r} must be a folder of this machine.")
    train: dict[str, str] = {}  # real path -> field
    held_out: dict[str, str] = {}
    for name, source in _named_sources(config).items():
        prefix = _prefix(name)
        if source.source == "tfds":
            sources.tfds_builder(source, prefix)
        elif source.source == "stdlib":
            sources.open_source(source, prefix)
        elif _is_tokens(source) and (folder := _prepared_folder(source, prefix)) is not None:
            _check_prepared(folder, source, prefix, tokenizer)
        else:
            files, eval_files = sources.find_all_files(source, prefix, _suffixes(source))
            train |= {real_path(file): f"{prefix}.paths" for file in files}
            held_out |= {
                real_path(f): f"{prefix}.eval_paths" for held in eval_files.values() for f in held
            }
            if source.source == "bin":
                for file in files:
                    open_bin(file, f"{prefix}.paths", source.token_dtype)
    for path in sorted(train.keys() & held_out.keys()):
        raise ConfigError(
            f"{held_out[path]}: {path!r} is in {train[path]} too; take it out of one of them."
        )


def _check_prepared(
    folder: epath.Path, source: SourceConfig, prefix: str, tokenizer: Tokenizer
) -> None:
    manifest = manifest_lib.read_manifest(folder, f"{prefix}.paths")
    if source.source != manifest.format:
        raise ConfigError(
            f"{prefix}.source={source.source}, but {str(folder)!r} holds {manifest.format}; set"
            f" {prefix}.source={manifest.format}."
        )
    manifest_lib.check_manifest(manifest, folder, tokenizer, f"{prefix}.paths")


def _named_sources(config: DataConfig) -> Mapping[str, SourceConfig]:
    return config.mixture if config.source == "mixture" else {"": config}


def _prefix(name: str) -> str:
    return f"data.mixture.{name}" if name else "data"


def _suffixes(source: SourceConfig) -> tuple[str, ...]:
    return {"bin": (".bin",), "text": SUFFIXES}.get(source.source, ("",))


def _prepared_folder(source: SourceConfig, prefix: str) -> epath.Path | None:
    """The folder of data.prepare that the paths name, if they do."""
    folders = [parse_path(path, f"{prefix}.paths") for path in source.paths]
    prepared = [folder for folder in folders if (folder / manifest_lib.NAME).exists()]
    if not prepared:
        return None
    if len(folders) > 1:
        raise ConfigError(
            f"{prefix}.paths: {str(prepared[0])!r} is a prepared folder and must be the only"
            " path; several go into data.mixture."
        )
    if source.eval_paths:
        raise ConfigError(
            f"{prefix}.eval_paths: {str(prepared[0])!r} has held-out sets of its own; leave it out."
        )
    return prepared[0]


def _is_tokens(source: SourceConfig) -> bool:
    """Whether a source holds token ids already."""
    if source.source == "array_record":
        return source.token_dtype is not None or any(
            (parse_path(path, "data.paths") / manifest_lib.NAME).exists() for path in source.paths
        )
    return source.source == "bin"


class _Opened:
    """One source: its stream, held-out sets and fingerprint."""

    train: TokenStream
    held_out: list[EvalSet]
    fingerprint: str

    def __init__(
        self,
        source: SourceConfig,
        name: str,
        config: DataConfig,
        tokenizer: Tokenizer,
        cache: Path,
        terminal: Terminal | None,
        stopped: Callable[[], bool],
    ):
        self._source, self._prefix = source, _prefix(name)
        self._field = f"{self._prefix}.paths"
        self._tokenizer, self._cache = tokenizer, cache
        if not _is_tokens(source):
            raw = sources.open_source(source, self._prefix)
            key = source_key(raw, source.held_out, tokenizer, "bin", SHARD_TOKENS)
            folder = epath.Path(cache) / key[:32]
            prepare(raw, source.held_out, config, folder, terminal=terminal, stopped=stopped)
            self._open_folder(folder)
        elif (prepared := _prepared_folder(source, self._prefix)) is not None:
            self._open_folder(prepared)
        else:
            self._open_files()

    def _open_folder(self, folder: epath.Path) -> None:
        manifest = manifest_lib.read_manifest(folder, self._field)
        manifest_lib.check_manifest(manifest, folder, self._tokenizer, self._field)
        if not is_remote(folder):
            self._verify(manifest, folder)
        dtype, streams = np.dtype(manifest.dtype).newbyteorder("<"), {}
        for name, facts in manifest.sets.items():
            shards: list[Shard] = []
            for shard in facts.shards:
                file = folder / shard.file
                if manifest.format == "bin":
                    shards.append(BinShard(str(file), dtype, 0, shard.tokens, stamp(file)))
                else:
                    shards.append(self._array_record(file, self._field, dtype))
            streams[name] = TokenStream(shards, self._tokenizer.vocab_size)
        self.train = streams.pop("train")
        self.held_out = [
            self._eval_set(name, stream, manifest.sets[name].bytes, manifest.fingerprint(name))
            for name, stream in streams.items()
        ]
        self.fingerprint = manifest.fingerprint("train")

    def _open_files(self) -> None:
        source, vocab_size = self._source, self._tokenizer.vocab_size
        files, eval_files = sources.find_all_files(source, self._prefix, _suffixes(source))
        self._refuse_held_out_files(files)
        stream = TokenStream([self._shard(file, self._field) for file in files], vocab_size)
        field = f"{self._prefix}.eval_paths"
        held_out = {
            name: TokenStream([self._shard(file, field) for file in held], vocab_size)
            for name, held in eval_files.items()
        }
        if not held_out:
            cut = self._cut(stream, source.held_out)
            stream, held_out = stream.part(0, cut), {"held_out": stream.part(cut, len(stream))}
        # A wrong token_dtype or tokenizer shows in the first tokens: before work starts.
        for some in (stream, *held_out.values()):
            some.read(0, min(len(some), 2**16))
        self.train, self.held_out = stream, []
        for name, some in held_out.items():
            fingerprint = some.fingerprint()
            num_bytes = self._count_bytes(some, fingerprint)
            self.held_out.append(self._eval_set(name, some, num_bytes, fingerprint))
        self.fingerprint = stream.fingerprint()

    def _eval_set(
        self, name: str, stream: TokenStream, num_bytes: int, fingerprint: str
    ) -> EvalSet:
        return EvalSet(name, stream, num_bytes, self._tokenizer.eod, fingerprint)

    def _verify(self, manifest: Manifest, folder: epath.Path) -> None:
        """Compares the sha256 of every shard, once for a file of this name, size and time."""
        shards = [shard for facts in manifest.sets.values() for shard in facts.shards]
        stamps = [f"{stamp(folder / shard.file)} {shard.sha256}" for shard in shards]

        def verify() -> list[np.ndarray]:
            manifest_lib.verify(manifest, folder, self._field)
            return []

        cached_arrays(self._cache, digest_of(["verified", *stamps]), verify)

    def _refuse_held_out_files(self, files: list[epath.Path]) -> None:
        """Nobody wants to train on val.bin because it lies in the same folder."""
        for file in files:
            if (file.parent / manifest_lib.NAME).exists():
                raise ConfigError(
                    f"{self._field}: {str(file)!r} is of a prepared folder, which knows what is"
                    f" held out; give {str(file.parent)!r} itself."
                )
            if re.search(_HELD_OUT_WORDS, file.stem.lower()) and len(files) > 1:
                raise ConfigError(
                    f"{self._field}: {str(file)!r} looks like held-out tokens; give a glob without"
                    f" it, and --config.{self._prefix}.eval_paths=val={file}"
                )

    def _shard(self, file: epath.Path, field: str) -> Shard:
        dtype = self._source.token_dtype
        if self._source.source == "bin":
            return open_bin(file, field, dtype)
        assert dtype is not None
        return self._array_record(file, field, np.dtype(dtype).newbyteorder("<"))

    def _array_record(self, file: epath.Path, field: str, dtype: np.dtype) -> ArrayRecordShard:
        records = sources.open_array_record(file, field)
        key = digest_of(["lengths", records.stamp, dtype.str])
        (lengths,) = cached_arrays(self._cache, key, lambda: [record_lengths(records, dtype)])
        return ArrayRecordShard(records, dtype, lengths)

    def _cut(self, stream: TokenStream, share: float) -> int:
        """Where the held-out end begins: after the end of a document, if one is near."""
        target = min(max(round(len(stream) * (1 - share)), 1), len(stream) - 1)
        if target < 1:
            raise ConfigError(f"{self._field}: there are too few tokens to hold any out.")
        start = max(target - min(_CUT_SEARCH, (len(stream) - target) // 2), 0)
        ends = np.flatnonzero(stream.read(start, target) == self._tokenizer.eod)
        return start + int(ends[-1]) + 1 if len(ends) else target

    def _count_bytes(self, stream: TokenStream, fingerprint: str) -> int:
        """UTF-8 bytes that a stream stands for, document by document."""

        def count() -> list[np.ndarray]:
            total, rest = 0, np.zeros(0, np.int32)
            for chunk in stream.chunks():
                rest = np.concatenate([rest, chunk])
                ends = np.flatnonzero(rest == self._tokenizer.eod)
                cut = int(ends[-1]) + 1 if len(ends) else 0
                total += len(utf8(self._tokenizer.decode(rest[:cut].tolist())))
                rest = rest[cut:]
            return [np.array(total + len(utf8(self._tokenizer.decode(rest.tolist()))))]

        key = digest_of(["bytes", fingerprint, self._tokenizer.fingerprint])
        return int(cached_arrays(self._cache, key, count)[0])


def _windows(
    stream: TokenStream, config: DataConfig, context: int, eod: int, cache: Path, fingerprint: str
) -> Windows:
    if config.packing == "concatenate":
        windows: Windows = packing.Concatenated(stream, context, eod, config.mask_documents)
    else:

        def index() -> list[np.ndarray]:
            return list(packing.best_fit(packing.document_lengths(stream, eod), context))

        key = digest_of(["best_fit", fingerprint, str(context), str(eod)])
        arrays = packing.BestFitIndex(*cached_arrays(cache, key, index))
        windows = packing.BestFit(stream, context, eod, arrays, config.mask_documents)
    packing.check_windows(windows, stream, context)
    return windows


def cached_arrays(
    cache: Path, key: str, compute: Callable[[], list[np.ndarray]]
) -> list[np.ndarray]:
    """What ``compute`` gave the first time, mapped from files; a damaged copy is made anew."""
    folder = cache / "indices" / key[:32]
    try:
        return _load_arrays(folder)
    except (OSError, ValueError, EOFError, TypeError):
        arrays = compute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, array in enumerate(arrays):
            temporary = folder / f".{number}.{secrets.token_hex(8)}.npy"
            with open(temporary, "wb") as f:
                np.save(f, array)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, folder / f"{number}.npy")
        crcs = [zlib.crc32((folder / f"{n}.npy").read_bytes()) for n in range(len(arrays))]
        write_atomically(folder / "crc32.json", json.dumps(crcs))
        return _load_arrays(folder)
    except OSError as e:
        raise ConfigError(f"data.cache: {str(folder)!r} cannot be written: {reason(e)}.") from e


def _load_arrays(folder: Path) -> list[np.ndarray]:
    arrays = []
    for number, crc in enumerate(json.loads((folder / "crc32.json").read_text())):
        file = folder / f"{number}.npy"
        if zlib.crc32(file.read_bytes()) != crc:
            raise ValueError("damaged")
        arrays.append(np.load(file, mmap_mode="r"))
    return arrays
