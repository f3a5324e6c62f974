"""Where documents of raw text come from: the standard library, text files, tfds, array_record.

A source is a list of units, each read in order from any document on, so that preparation can
be stopped and gone on with.
"""

from __future__ import annotations

import functools
import itertools
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from ngpt_jax.config import ConfigError, SourceConfig
from ngpt_jax.data.corpus_files import find_files, parse_path, real_path, stamp
from ngpt_jax.data.text.stdlib import StdlibCorpus, stdlib_corpus, stdlib_files
from ngpt_jax.data.text.text_files import SUFFIXES, read_documents
from ngpt_jax.files import is_remote, reason

_RECORDS_AT_ONCE = 256


@dataclass(frozen=True)
class Unit:
    """A part of a source that is read in order: a file, a split.

    Attributes:
      stamp: another one says that the documents may be others.
      size: bytes or records, for progress.
      read: documents that are not blank, each with how much of ``size`` has been read.
    """

    stamp: str
    size: int
    read: Callable[[], Iterator[tuple[str, int]]]


@dataclass(frozen=True)
class RawSource:
    """Text to train on, and held-out text under the name of its set.

    Attributes:
      held_out: empty where a share of the documents to train on is to be held out.
      field: of the config, for messages.
    """

    train: Sequence[Unit]
    held_out: Mapping[str, Sequence[Unit]]
    field: str


def open_source(config: SourceConfig, prefix: str = "data") -> RawSource:
    """Finds what a source of raw text consists of, without reading it; raises ConfigError.

    Args:
      config: checked.
      prefix: of its fields in messages.
    """
    if config.source == "stdlib":
        return _stdlib(config)
    if config.source == "tfds":
        return _tfds(config, prefix)
    if config.source == "text":
        suffixes: Sequence[str] = SUFFIXES

        def unit(file: epath.Path, field: str) -> Unit:
            read = functools.partial(read_documents, file, field, config.text_key)
            stamps = f"{stamp(file)} {config.text_key}"
            return Unit(stamps, file.stat().length, read)

    else:
        suffixes = ("",)

        def unit(file: epath.Path, field: str) -> Unit:
            records = open_array_record(file, field)
            return Unit(stamp(file), len(records), functools.partial(_texts, records))

    files, held_out = find_all_files(config, prefix, suffixes)
    return RawSource(
        train=[unit(file, f"{prefix}.paths") for file in files],
        held_out={
            name: [unit(file, f"{prefix}.eval_paths") for file in held]
            for name, held in held_out.items()
        },
        field=f"{prefix}.paths",
    )


def find_all_files(
    config: SourceConfig, prefix: str, suffixes: Sequence[str]
) -> tuple[list[epath.Path], dict[str, list[epath.Path]]]:
    """The files to train on, and those of each held-out set; raises ConfigError."""
    files = find_files(config.paths, f"{prefix}.paths", suffixes)
    known = {real_path(file) for file in files}
    field = f"{prefix}.eval_paths"
    held_out: dict[str, list[epath.Path]] = {}
    for item in config.eval_paths:
        name, _, pattern = (part.strip() for part in item.partition("="))
        bad = not name or name == "train" or set(name) & set("/\\.") or len(name) > 64
        if bad or not pattern:
            raise ConfigError(
                f"{field} must be name=path, got {item[:99]!r}, e.g. val=held_out.txt; a name"
                " has no / or ., is short, and is not train."
            )
        if name in held_out:
            raise ConfigError(f"{field}: two sets are called {name!r}; rename one.")
        held_out[name] = find_files([pattern], field, suffixes)
        if both := {real_path(file) for file in held_out[name]} & known:
            raise ConfigError(
                f"{field}: {min(both)!r} of {name!r} is in {prefix}.paths too; take it out of one"
                " of them."
            )
    return files, held_out


# ------------------------------------------------------------------------ the standard library


def _stdlib(config: SourceConfig) -> RawSource:
    root = Path(sysconfig.get_paths()["stdlib"])
    if not (files := stdlib_files(root)):
        raise ConfigError(
            f"data.source=stdlib: this Python has no source files below {str(root)!r} (zipped or"
            " stripped?); use data.source=text with data.paths."
        )
    stamps = "\n".join([f"held out {config.held_out}", *(stamp(epath.Path(f)) for f in files)])
    size = sum(file.stat().st_size for file in files)
    corpus = functools.cache(lambda: stdlib_corpus(root, config.held_out))

    def unit(side: Callable[[StdlibCorpus], Sequence[str]]) -> Unit:
        def read() -> Iterator[tuple[str, int]]:
            texts = side(corpus())
            return ((text, size * i // len(texts)) for i, text in enumerate(texts, start=1))

        return Unit(stamps, size, read)

    held_out = unit(lambda corpus: corpus.held_out["stdlib"])
    return RawSource([unit(lambda corpus: corpus.train)], {"stdlib": [held_out]}, "data.source")


# -------------------------------------------------------------------------------- array_record


class ArrayRecord:
    """Records of one file, as bytes. Cheap to make: a file is opened where it is read."""

    def __init__(self, file: epath.Path, field: str):
        self.file, self.field = file, field
        self.stamp = stamp(file)
        self._length: int | None = None

    def __len__(self) -> int:
        if self._length is None:
            self._length = self._call(lambda reader: reader.num_records())
            if not self._length:
                raise ConfigError(
                    f"{self.field}: {str(self.file)!r} holds no array_record records; mend or"
                    " drop it."
                )
        return self._length

    def read(self, start: int, stop: int) -> Sequence[bytes]:
        """Records [start, stop)."""
        return self._call(lambda reader: reader.read(start, stop))

    def _call(self, fn: Callable[[Any], Any]) -> Any:
        try:
            return fn(_array_record_reader(str(self.file), self.stamp))
        except (RuntimeError, ValueError, OSError, IndexError) as e:
            raise ConfigError(
                f"{self.field}: {str(self.file)!r} cannot be read as array_record: {reason(e)};"
                " mend or drop it."
            ) from e


@functools.lru_cache(maxsize=64)  # each reader holds a file and its index
def _array_record_reader(path: str, stamp: str) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    del stamp  # another file under the same name is opened anew
    return ArrayRecordReader(path, "readahead_buffer_size:0")


def open_array_record(file: epath.Path, field: str) -> ArrayRecord:
    """A file and that it has records; raises ConfigError."""
    if is_remote(file):
        raise ConfigError(
            f"{field}: array_record files are read from local disks alone, not {str(file)!r}; copy"
            " them, or use text or bin."
        )
    records = ArrayRecord(file, field)
    len(records)
    return records


def _texts(records: ArrayRecord) -> Iterator[tuple[str, int]]:
    starts = range(0, len(records), _RECORDS_AT_ONCE)
    read = (records.read(i, min(i + _RECORDS_AT_ONCE, len(records))) for i in starts)
    where = f"{records.field}: {str(records.file)!r}"
    return _decode(itertools.chain.from_iterable(read), where)


def _decode(
    records: Iterable[Any], where: str, advice: str = "set token_dtype if it holds token ids"
) -> Iterator[tuple[str, int]]:
    """Texts that are not blank, with how many records were read."""
    for number, record in enumerate(records, start=1):
        try:
            text = record if isinstance(record, str) else record.decode()
        except (UnicodeDecodeError, AttributeError):
            raise ConfigError(f"{where}, record {number} is not UTF-8 text; {advice}.") from None
        if text.strip():
            yield text, number


# ----------------------------------------------------------------------------------------- tfds


def _tfds(config: SourceConfig, prefix: str) -> RawSource:
    builder = tfds_builder(config, prefix, download=True)

    def unit(split: str, field: str) -> Unit:
        if split not in builder.info.splits:
            known = ", ".join(builder.info.splits)
            raise ConfigError(f"{prefix}.{field}: {split!r} is none of the splits {known}.")
        if config.text_key not in (builder.info.features or {}):
            known = ", ".join(sorted(builder.info.features or ()))
            raise ConfigError(f"{prefix}.text_key: {config.text_key!r} is none of {known}.")
        info = builder.info.splits[split]
        try:
            files = [stamp(epath.Path(file)) for file in info.filepaths]
        except OSError as e:
            name = f"{prefix}.{field}"
            raise ConfigError(f"{name}: {e.filename} cannot be read: {reason(e)}.") from e

        where = f"{prefix}.{field}: split {split!r}"
        mend = "set text_key, or prepare the set anew"

        def records() -> Iterator[Any]:
            try:
                source = builder.as_data_source(split)
                for start in range(0, len(source), _RECORDS_AT_ONCE):
                    rows = range(start, min(start + _RECORDS_AT_ONCE, len(source)))
                    yield from (row[config.text_key] for row in source.__getitems__(rows))
            except Exception as e:  # of many kinds
                raise ConfigError(
                    f"{where} cannot be read: {reason(e)}; prepare the set anew, as array_record."
                ) from e

        stamps = "\n".join([config.text_key, *files])
        return Unit(stamps, info.num_examples, lambda: _decode(records(), where, mend))

    held_out = {}
    if (split := config.tfds_eval_split) is not None:
        if split == config.tfds_split:
            raise ConfigError(
                f"{prefix}.tfds_eval_split is the split to train on; name another, or None."
            )
        held_out = {split: [unit(split, "tfds_eval_split")]}
    return RawSource([unit(config.tfds_split, "tfds_split")], held_out, f"{prefix}.tfds_split")


def tfds_builder(config: SourceConfig, prefix: str, download: bool = False) -> Any:
    """The builder of a set; with ``download`` it is prepared on this machine if it is not yet.

    Raises ConfigError.
    """
    import tensorflow_datasets as tfds

    folder = parse_path(config.paths[0], f"{prefix}.paths") if config.paths else None
    field = f"{prefix}.tfds_name" if config.tfds_name else f"{prefix}.paths"
    try:
        if config.tfds_name is None:
            assert folder is not None
            return tfds.builder_from_directory(_tfds_folder(folder, field))
        builder = tfds.builder(config.tfds_name, data_dir=folder, file_format="array_record")
        if download:
            builder.download_and_prepare()  # nothing where that is done
        return builder
    except ConfigError:
        raise
    except Exception as e:  # of many kinds, most with a page of text
        name = config.tfds_name or str(folder)
        raise ConfigError(f"{field}: {name!r} cannot be opened with tfds: {reason(e)}.") from e


def _tfds_folder(folder: epath.Path, field: str) -> epath.Path:
    """The folder with dataset_info.json: the given one, or the only one below it."""
    if (folder / "dataset_info.json").exists():
        return folder
    below = [  # NAME/CONFIG/VERSION at most
        found.parent
        for depth in range(1, 4)
        for found in folder.glob("*/" * depth + "dataset_info.json")
    ]
    if len(below) != 1:
        told = f"{len(below)} data sets" if below else "no dataset_info.json"
        raise ConfigError(
            f"{field}: there is {told} below {str(folder)!r}; give the folder of one version."
        )
    return below[0]
