"""From the config to sequences to train on and held-out sets.

Text is first prepared into token ids in the cache folder. Everything is checked and fingerprinted.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from etils import epath

from ngpt_jax.config import ConfigError, DataConfig, SourceConfig
from ngpt_jax.data import packing, token_files
from ngpt_jax.data.cached_arrays import cached_arrays
from ngpt_jax.data.packing import Sequences
from ngpt_jax.data.preparing.folder import SHARD_TOKENS, prepare_folder, source_key
from ngpt_jax.data.preparing.progress import Progress
from ngpt_jax.data.text.sources import open_source
from ngpt_jax.data.text.units import TextSource
from ngpt_jax.data.token_files import EvalSet, SourceTokens
from ngpt_jax.data.tokenizers.base import Tokenizer
from ngpt_jax.files import digest_of, is_remote
from ngpt_jax.terminal import Terminal


class Corpus(NamedTuple):
    """What a run trains on and is evaluated on.

    Attributes:
      train: sequences of each source of a mixture by its name, or of the only source under "".
      held_out: at least one set.
      tokens: to train on, over all sources.
      fingerprint: of the tokens to train on: the same for copies at other places.
    """

    train: Mapping[str, Sequences]
    held_out: list[EvalSet]
    tokens: int
    fingerprint: str


def load_corpus(
    config: DataConfig,
    tokenizer: Tokenizer,
    context: int,
    terminal: Terminal | None = None,
    stopped: Callable[[], bool] = lambda: False,
    workers: int | None = None,
) -> Corpus:
    """Opens the data of ``config``; text is first prepared into ``config.cache``.

    Args:
      config: checked.
      tokenizer: of ``config``.
      context: tokens of a sequence.
      terminal: shows the progress of a preparation.
      stopped: asked during a preparation; True raises preparing.folder.Stopped.
      workers: processes of a preparation; None: one a core.

    Raises ConfigError.
    """
    check_corpus(config, tokenizer)
    texts = {  # all of them are found before any is prepared
        prefix: open_source(source, prefix, cache=config.cache)
        for _, prefix, source in sources(config)
        if not token_files.holds_tokens(source, prefix)
    }
    _refuse_shared((p, s, _files_of(texts[p])) for _, p, s in sources(config) if p in texts)
    cache = Path(config.cache).expanduser()
    train: dict[str, Sequences] = {}
    held_out: list[EvalSet] = []
    tokens, prints = 0, []
    for name, prefix, source in sources(config):
        if prefix not in texts:
            with Progress(f"reading tokens of {prefix}paths", terminal, "reading and hashing"):
                opened = token_files.open_tokens(source, prefix, tokenizer, cache)
        else:
            text, share = texts[prefix], source.held_out
            key = source_key(text, share, tokenizer, "bin", SHARD_TOKENS)
            folder = epath.Path(cache) / key[:32]  # complete if the text was prepared before
            prepare_folder(
                text, share, tokenizer, folder, terminal=terminal, stopped=stopped,
                workers=workers, cache=config.cache,
            )  # fmt: skip
            with Progress("reading prepared tokens", terminal, "hashing"):
                opened = token_files.open_prepared(folder, "data.cache", tokenizer, cache)
            opened = opened._replace(notes=[*text.left_out, *opened.notes])
        if terminal is not None:
            for line in opened.notes:
                terminal.say(line)
        with Progress("packing documents", terminal, "fitting them into sequences"):
            train[name] = _pack(opened, config, context, tokenizer.eod, cache)
        start = f"{name}/" if name else ""
        held_out += [held._replace(name=start + held.name) for held in opened.held_out]
        tokens += len(opened.train)
        prints.append(f"{name} {opened.fingerprint}")
    if not held_out:
        raise ConfigError("data: there is no held-out set; prepare the folder with one.")
    for eval_set in held_out:
        if eval_set.num_bytes < 1:
            raise ConfigError(f"data: the held-out set {eval_set.name!r} holds no text.")
    return Corpus(train, held_out, tokens, digest_of(prints))


def held_out_digest(corpus: Corpus) -> str:
    """Fingerprint of the held-out sets, their names included."""
    return digest_of(f"{held.name} {held.fingerprint}" for held in corpus.held_out)


def check_corpus(config: DataConfig, tokenizer: Tokenizer) -> None:
    """Refuses what is wrong with the data, as far as it shows without reading or preparing text.

    Missing files, another tokenizer, text that one source holds out and another trains on.
    """
    if is_remote(config.cache):
        raise ConfigError(f"data.cache = {config.cache!r} must be a folder of this machine.")
    _check_cache(config.cache)
    found = []
    for _, prefix, source in sources(config):
        if token_files.holds_tokens(source, prefix):
            files = token_files.check_tokens(source, prefix, tokenizer)
        else:
            files = _files_of(open_source(source, prefix, download=False, cache=config.cache))
        found.append((prefix, source, files))
    _refuse_shared(found)


_SPLIT_FIELDS = {"tfds": ("tfds_split", "tfds_eval_split"), "hub": ("hub_split", "hub_eval_split")}
_Files = tuple[set[str], set[str]]  # to train on and held out, as Unit.file has them


def _files_of(text: TextSource) -> _Files:
    held_out = (unit for units in text.held_out.values() for unit in units)
    return {u.file for u in text.train if u.file}, {u.file for u in held_out if u.file}


def _refuse_shared(found: Iterable[tuple[str, SourceConfig, _Files]]) -> None:
    """Refuses what one source holds out, or another share of it, and another one trains on.

    Args:
      found: the prefix of each source's fields, the source, and its files.
    """
    train: dict[str, str] = {}  # file -> field
    held_out: dict[str, str] = {}
    shares: dict[str, tuple[float, str]] = {}  # file -> share that is held out, prefix
    for prefix, source, (files, eval_files) in found:
        field, eval_field = _SPLIT_FIELDS.get(source.source, ("paths", "eval_paths"))
        train |= dict.fromkeys(files, prefix + field)
        held_out |= dict.fromkeys(eval_files, prefix + eval_field)
        share = 0.0 if eval_files else source.held_out
        for path in sorted(files):
            if shares.setdefault(path, (share, prefix))[0] != share:
                raise ConfigError(
                    f"{prefix}held_out: {path!r} is trained on by {shares[path][1][:-1]} too, which"
                    " holds out another part of it; give both the same held_out or eval_paths."
                )
    for path in sorted(train.keys() & held_out.keys()):
        raise ConfigError(
            f"{held_out[path]}: {path!r} is in {train[path]} too; take it out of one of them."
        )


def _check_cache(cache: str) -> None:
    """Refuses a folder that cannot be made or written, before any work is done for it."""
    folder = Path(os.path.abspath(Path(cache).expanduser()))
    there = next(f for f in (folder, *folder.parents) if os.path.lexists(f))
    if not there.is_dir():
        raise ConfigError(f"data.cache = {cache!r}: {str(there)!r} is no folder; give another.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"data.cache = {cache!r} cannot be written: {str(there)!r} is read-only for this user;"
            " give another folder."
        )


def sources(config: DataConfig) -> list[tuple[str, str, SourceConfig]]:
    """(name, prefix of the names of its fields, source) of each source."""
    if config.source != "mixture":
        return [("", "data.", config)]
    return [(name, f"data.mixture.{name}.", source) for name, source in config.mixture.items()]


def _pack(
    opened: SourceTokens, config: DataConfig, context: int, eod: int, cache: Path
) -> Sequences:
    stream = opened.train
    if config.packing == "concatenate":
        sequences: Sequences = packing.Concatenated(stream, context, eod, config.mask_documents)
    else:

        def index() -> list[np.ndarray]:
            return list(packing.best_fit(packing.document_lengths(stream, eod), context))

        key = digest_of(["best_fit", opened.fingerprint, stream.stamp(), str(context), str(eod)])
        arrays = packing.BestFitIndex(*cached_arrays(cache, key, index))
        sequences = packing.BestFit(stream, context, eod, arrays, config.mask_documents)
    packing.check_sequences(sequences, stream, context)
    return sequences
