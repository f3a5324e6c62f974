"""What a source of text is: units of documents to train on, and held-out ones."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from ngpt_jax.config import ConfigError, SourceConfig
from ngpt_jax.data.list_files import any_file, find_train_and_eval_files
from ngpt_jax.data.open_files import bad_byte

Doing = Callable[[str], None]  # is told what is being done; may raise, to stop it


def _nothing(folder: Path, doing: Doing) -> None:
    """Fetches nothing."""


class Unit(NamedTuple):
    """A part of a source whose documents are read in order: a file, a split.

    Attributes:
      stamp: changes when the documents may have changed.
      size: bytes or records, to show progress.
      read: returns the documents, each with how much of ``size`` was read; "" stands for one
        without text: null, or blank.
      file: what it is read from, its real path or the folder and split of a data set; None where
        that cannot be told.
      fetch: makes ``read`` possible. It may use a folder, for one unit at a time, and often calls
        its second argument with what it is doing.
    """

    stamp: str
    size: int
    read: Callable[[], Iterator[tuple[str, int]]]
    file: str | None = None
    fetch: Callable[[Path, Doing], None] = _nothing


class TextSource(NamedTuple):
    """Text to train on, and held-out text by the name of its set.

    Attributes:
      held_out: empty where a share of the documents to train on is to be held out.
      field: that names the text, for messages.
      left_out: lines that tell which files are not read.
      origin: the commit of a data set that others may change.
    """

    train: Sequence[Unit]
    held_out: Mapping[str, Sequence[Unit]]
    field: str
    left_out: Sequence[str] = ()
    origin: str = ""


def held_out_name(split: str) -> str:
    """What the held-out set made of a split is called: a split may be called train, a set not."""
    return "held_out" if split == "train" else split


def read_texts(units: Iterable[Unit], fetch: Callable[[Unit], None]) -> Iterator[str]:
    """The documents of units that are not blank; ``fetch`` makes a unit readable."""
    for unit in units:
        fetch(unit)
        yield from (text for text, _ in unit.read() if text)


def source_of_files(
    config: SourceConfig,
    prefix: str,
    suffixes: Sequence[str],
    unit: Callable[[epath.Path, str], Unit],
    holds: Callable[[epath.Path, str], bool] = any_file,
) -> TextSource:
    """A source whose units are the files of ``paths`` and ``eval_paths``; raises ConfigError.

    Args:
      config: of the source.
      prefix: of the names of its fields in messages.
      suffixes, holds: as for :func:`ngpt_jax.data.list_files.find_files`.
      unit: makes a unit from a file and the name of the field that gave it.
    """
    files, eval_files, left_out = find_train_and_eval_files(config, prefix, suffixes, holds)
    field, eval_field = f"{prefix}paths", f"{prefix}eval_paths"
    held_out = {name: [unit(f, eval_field) for f in some] for name, some in eval_files.items()}
    return TextSource([unit(file, field) for file in files], held_out, field, left_out)


def decode_records(records: Iterable[Any], where: str, mend: str) -> Iterator[tuple[str, int]]:
    """Texts of records, "" for a blank one, each with how many records were read.

    Args:
      records: strings, or UTF-8 bytes; None is refused: so tfds gives what it cannot read.
      where: they lie, for messages.
      mend: what to do where they are not text, for messages.

    Raises ConfigError.
    """
    for number, record in enumerate(records, start=1):
        try:
            text = record if isinstance(record, str) else record.decode()
        except (UnicodeDecodeError, AttributeError) as e:
            why = bad_byte(e) if isinstance(e, UnicodeDecodeError) else type(record).__name__
            raise ConfigError(
                f"{where}, record {number} is not UTF-8 text ({why}); {mend}."
            ) from None
        yield text_or_nothing(text), number


def text_or_nothing(text: str | None) -> str:
    """A document's text, or "" where it is null or blank."""
    return text if text and not text.isspace() else ""
