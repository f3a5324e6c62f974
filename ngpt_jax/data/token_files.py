"""Sources that hold token ids: prepared folders, bin files, array_record with token_dtype."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from etils import epath

from ngpt_jax.config import ConfigError, SourceConfig
from ngpt_jax.config.sources import TOKEN_FORMATS
from ngpt_jax.data import manifest as manifest_lib
from ngpt_jax.data import shards
from ngpt_jax.data.cached_arrays import cached_arrays
from ngpt_jax.data.list_files import (
    find_train_and_eval_files,
    is_prepared,
    parse_path,
    real_path,
    stamp,
)
from ngpt_jax.data.manifest import Manifest, ShardFacts
from ngpt_jax.data.open_files import RecordFile
from ngpt_jax.data.shards import Shard, TokenStream
from ngpt_jax.data.tokenizers.base import Tokenizer, gives_back, utf8
from ngpt_jax.files import digest_of, is_remote

_CUT_SEARCH = 2**24  # tokens before a cut in which the end of a document is looked for


class EvalSet(NamedTuple):
    """Held-out tokens.

    Attributes:
      stream: every token is a target once; the first is predicted from ``eod``.
      num_bytes: length of the text in UTF-8.
      fingerprint: of the tokens.
    """

    name: str
    stream: TokenStream
    num_bytes: int
    eod: int
    fingerprint: str = ""


class SourceTokens(NamedTuple):
    """The tokens of a source.

    Attributes:
      fingerprint: of those to train on.
      notes: lines for the user: files that are not read, text that the tokenizer loses.
    """

    train: TokenStream
    held_out: list[EvalSet]
    fingerprint: str
    notes: Sequence[str] = ()


def holds_tokens(source: SourceConfig, prefix: str) -> bool:
    """Whether a source holds token ids, not text."""
    if source.source != "array_record" or source.token_dtype is not None:
        return source.source in TOKEN_FORMATS
    return _prepared_folder(source, prefix) is not None


def check_tokens(
    source: SourceConfig, prefix: str, tokenizer: Tokenizer
) -> tuple[set[str], set[str]]:
    """Refuses what is wrong with a source of tokens, as far as it shows without reading them all.

    Returns:
      Real paths of the files to train on, and of the held-out ones; none for a prepared folder.
    """
    field = f"{prefix}paths"
    if (folder := _prepared_folder(source, prefix)) is not None:
        _check_prepared(source, prefix, folder, tokenizer)
        return set(), set()
    files, eval_files, _ = find_train_and_eval_files(source, prefix, _suffixes(source))
    if source.source == "bin":
        for file in files:
            shards.open_bin(file, field, source.token_dtype, tokenizer.vocab_size)
    eval_names = {real_path(file) for held in eval_files.values() for file in held}
    return {real_path(file) for file in files}, eval_names


def open_tokens(
    source: SourceConfig, prefix: str, tokenizer: Tokenizer, cache: Path
) -> SourceTokens:
    """Opens a source of tokens.

    Args:
      source: that holds tokens.
      prefix: of the names of its fields in messages.
      tokenizer: of the tokens.
      cache: folder of indices.

    Raises ConfigError.
    """
    if (folder := _prepared_folder(source, prefix)) is not None:
        return open_prepared(folder, f"{prefix}paths", tokenizer, cache)
    files, eval_files, left_out = find_train_and_eval_files(source, prefix, _suffixes(source))

    def open_shard(file: epath.Path, field: str) -> Shard:
        if source.source == "bin":
            return shards.open_bin(file, field, source.token_dtype, tokenizer.vocab_size)
        shard = _open_records(file, field, np.dtype(source.token_dtype), cache)
        shard.check_type(field, tokenizer.vocab_size)
        return shard

    def stream_of(some: Sequence[epath.Path], field: str) -> TokenStream:
        return TokenStream([open_shard(file, field) for file in some], tokenizer.vocab_size)

    train = stream_of(files, f"{prefix}paths")
    streams = {name: stream_of(held, f"{prefix}eval_paths") for name, held in eval_files.items()}
    if not streams:
        cut = _cut(train, source.held_out, tokenizer.eod, f"{prefix}paths")
        train, streams = train.part(0, cut), {"held_out": train.part(cut, len(train))}
    # Shows a wrong token_dtype or tokenizer before the work starts.
    for some in (train, *streams.values()):
        some.read(0, min(len(some), 2**16))
    held_out = []
    for name, some in streams.items():
        fingerprint = some.fingerprint()
        num_bytes = _count_bytes(some, fingerprint, tokenizer, cache)
        held_out.append(EvalSet(name, some, num_bytes, tokenizer.eod, fingerprint))
    return SourceTokens(train, held_out, train.fingerprint(), left_out)


def open_prepared(
    folder: epath.Path, field: str, tokenizer: Tokenizer, cache: Path
) -> SourceTokens:
    """Opens a prepared folder, as :func:`open_tokens`; ``field`` names it in messages."""
    manifest = manifest_lib.open_manifest(folder, tokenizer, field)
    if not is_remote(folder):
        _verify_once(manifest, folder, field, cache)
    dtype = np.dtype(manifest.dtype).newbyteorder("<")

    def open_shard(facts: ShardFacts) -> Shard:
        file = folder / facts.file
        if manifest.format == "bin":
            return shards.BinShard(str(file), dtype, 0, facts.tokens, stamp(file))
        return _open_records(file, field, dtype, cache)

    streams = {
        name: TokenStream([open_shard(shard) for shard in facts.shards], tokenizer.vocab_size)
        for name, facts in manifest.sets.items()
    }
    train = streams.pop("train")
    held_out = [
        EvalSet(name, some, manifest.sets[name].bytes, tokenizer.eod, manifest.fingerprint(name))
        for name, some in streams.items()
    ]
    notes = manifest_lib.notes(manifest)
    return SourceTokens(train, held_out, manifest.fingerprint("train"), notes)


def _suffixes(source: SourceConfig) -> tuple[str, ...]:
    return (".bin",) if source.source == "bin" else ("",)


def _prepared_folder(source: SourceConfig, prefix: str) -> epath.Path | None:
    """The prepared folder that the paths name, None where they name files."""
    folders = [parse_path(path, f"{prefix}paths") for path in source.paths]
    prepared = [folder for folder in folders if is_prepared(folder)]
    if not prepared:
        return None
    if len(folders) > 1:
        raise ConfigError(
            f"{prefix}paths: {str(prepared[0])!r} is a prepared folder and must be the only"
            " path; several go into data.mixture."
        )
    if source.eval_paths:
        raise ConfigError(
            f"{prefix}eval_paths: {str(prepared[0])!r} has held-out sets of its own; leave it out."
        )
    return prepared[0]


def _check_prepared(
    source: SourceConfig, prefix: str, folder: epath.Path, tokenizer: Tokenizer
) -> None:
    """Refuses a damaged folder, another tokenizer, and what the source says and is not so."""
    manifest = manifest_lib.open_manifest(folder, tokenizer, f"{prefix}paths")
    for name, said, is_ in (
        ("source", source.source, manifest.format),
        ("token_dtype", source.token_dtype or manifest.dtype, manifest.dtype),
    ):
        if said != is_:
            raise ConfigError(
                f"{prefix}{name}={said}, but {str(folder)!r} holds {is_}; set {prefix}{name}={is_}."
            )


def _verify_once(manifest: Manifest, folder: epath.Path, field: str, cache: Path) -> None:
    """Compares the sha256 of every shard, unless the same files were compared before."""
    stamps = [f"{stamp(folder / shard.file)} {shard.sha256}" for shard in manifest.shards()]

    def verify() -> list[np.ndarray]:
        manifest_lib.verify(manifest, folder, field)
        return []

    cached_arrays(cache, digest_of(["verified", *stamps]), verify)


def _open_records(
    file: epath.Path, field: str, dtype: np.dtype, cache: Path
) -> shards.ArrayRecordShard:
    records, dtype = RecordFile(file, field), dtype.newbyteorder("<")
    key = digest_of(["lengths", records.stamp, dtype.str])
    (lengths,) = cached_arrays(cache, key, lambda: [shards.record_lengths(records, dtype)])
    if not lengths.any():
        raise ConfigError(f"{field}: {str(file)!r} holds no tokens; drop it.")
    return shards.ArrayRecordShard(records, dtype, lengths)


def _cut(stream: TokenStream, share: float, eod: int, field: str) -> int:
    """Where the held-out end begins: after the end of a document, if one is near."""
    target = min(max(round(len(stream) * (1 - share)), 1), len(stream) - 1)
    if target < 1:
        raise ConfigError(f"{field}: there are too few tokens to hold any out.")
    start = max(target - min(_CUT_SEARCH, (len(stream) - target) // 2), 0)
    ends = np.flatnonzero(stream.read(start, target) == eod)
    return start + int(ends[-1]) + 1 if len(ends) else target


def _count_bytes(stream: TokenStream, fingerprint: str, tokenizer: Tokenizer, cache: Path) -> int:
    """Length in UTF-8 of what a stream stands for, which is decoded document by document."""

    def count() -> list[np.ndarray]:
        total = 0
        rest: list[np.ndarray] = []  # the document that has not ended
        for chunk in itertools.chain(stream.chunks(), [np.array([tokenizer.eod])]):
            ends = np.flatnonzero(chunk == tokenizer.eod)
            if len(ends):
                ids = np.concatenate([*rest, chunk[: ends[-1]]])
                total += len(utf8(tokenizer.stands_for(ids.tolist())))
                rest, chunk = [], chunk[ends[-1] :]
            rest.append(chunk)
        return [np.array(total)]

    known = [] if gives_back(tokenizer) else ["known"]  # earlier versions counted unknown tokens
    key = digest_of(["bytes", fingerprint, stream.stamp(), tokenizer.fingerprint, *known])
    return int(cached_arrays(cache, key, count)[0])
