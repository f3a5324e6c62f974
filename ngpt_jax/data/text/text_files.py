"""Files of text: a .txt is one document.

.jsonl, .ndjson and .json have a document a line, .parquet one a row, array_record one a record.
"""

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from ngpt_jax.config import ConfigError, SourceConfig
from ngpt_jax.data.list_files import real_path, stamp
from ngpt_jax.data.open_files import (
    RecordFile,
    bad_byte,
    check_key,
    open_binary,
    open_text,
    read_jsonl,
)
from ngpt_jax.data.text.units import (
    TextSource,
    Unit,
    decode_records,
    source_of_files,
    text_or_nothing,
)
from ngpt_jax.files import reason

PACKED = ("", ".gz", ".zst")
_KINDS = (".txt", ".jsonl", ".ndjson", ".json")
SUFFIXES = (*(f"{kind}{packed}" for kind in _KINDS for packed in PACKED), ".parquet")


def open_text_files(config: SourceConfig, prefix: str, download: bool, cache: str) -> TextSource:
    """As :func:`ngpt_jax.data.text.sources.open_source`."""

    def unit(file: epath.Path, field: str) -> Unit:
        read = functools.partial(read_documents, file, field, config.text_key, f"{prefix}text_key")
        stamps = f"{stamp(file)} {config.text_key}"
        return Unit(stamps, file.stat().length, read, real_path(file))

    def holds(file: epath.Path, field: str) -> bool:
        return holds_documents(file, field, config.text_key)

    return source_of_files(config, prefix, SUFFIXES, unit, holds)


def holds_documents(file: epath.Path, field: str, text_key: str) -> bool:
    """Whether a .json has objects with ``text_key`` a line; other kinds of files: True.

    Raises ConfigError for one JSON array of objects, which is text, but not a document a line.
    """
    if not file.name.lower().endswith(tuple(f".json{packed}" for packed in PACKED)):
        return True
    with open_text(file, field) as (stream, _):
        start = stream.read(2**12).lstrip()
        if re.match(r"\[\s*\{", start):
            raise ConfigError(
                f"{field}: {str(file)!r} is one JSON array; write a document a line, as jq -c '.[]'"
                " does."
            )
        line, end, _ = start.partition("\n")
        try:
            record = json.loads(line if end else line + stream.readline())
        except (ValueError, RecursionError):
            return False
    return isinstance(record, dict) and text_key in record


def open_array_record(config: SourceConfig, prefix: str, download: bool, cache: str) -> TextSource:
    """As :func:`ngpt_jax.data.text.sources.open_source`."""
    mend = f"set {prefix}token_dtype if it holds token ids"

    def unit(file: epath.Path, field: str) -> Unit:
        records, where = RecordFile(file, field), f"{field}: {str(file)!r}"
        read = functools.partial(decode_records, records, where, mend)
        return Unit(records.stamp, len(records), read, real_path(file))

    return source_of_files(config, prefix, ("",), unit)


def read_documents(
    file: epath.Path, field: str, text_key: str, key_field: str
) -> Iterator[tuple[str, int]]:
    """Documents of a file, each with the bytes of the file read so far.

    Text is UTF-8, with or without a byte order mark; line ends become ``\\n``. JSON can spell half
    a surrogate pair, which tokenizers encode as "?". A document that is null or blank is "".

    Args:
      file: with one of ``SUFFIXES``.
      field: that names the file, for messages.
      text_key: field of a line or column that holds the text.
      key_field: that names ``text_key``, for messages.

    Raises ConfigError, which names ``field``, the file and the line.
    """
    name = file.name.lower()
    if name.endswith(".parquet"):
        texts = _parquet_texts(file, field, text_key, key_field)
    elif name.split(".txt")[-1] in PACKED:
        texts = _whole_text(file, field)
    else:
        texts = _jsonl_texts(file, field, text_key, key_field)
    for text, position in texts:
        yield text_or_nothing(text), position


def _whole_text(file: epath.Path, field: str) -> Iterator[tuple[str | None, int]]:
    with open_text(file, field) as (stream, position):
        yield stream.read(), position()


def _jsonl_texts(
    file: epath.Path, field: str, text_key: str, key_field: str
) -> Iterator[tuple[str | None, int]]:
    for where, record, position in read_jsonl(file, field, f"such as {{{text_key!r}: ...}}"):
        check_key(record, text_key, where, f"set {key_field}")
        text = record[text_key]
        if not isinstance(text, str | None):
            kind = type(text).__name__
            raise ConfigError(f"{where} has {text_key!r} of type {kind}, not str; set {key_field}.")
        yield text, position


def _parquet_texts(
    file: epath.Path, field: str, text_key: str, key_field: str
) -> Iterator[tuple[str | None, int]]:
    import pyarrow
    from pyarrow import parquet

    where = f"{field}: {str(file)!r}"
    try:
        with open_binary(file) as stream:
            table = parquet.ParquetFile(stream)
            names = table.schema_arrow.names
            if text_key not in names:
                raise ConfigError(
                    f"{where} has no column {text_key!r} but {', '.join(map(repr, names[:9]))};"
                    f" set {key_field}."
                )
            if names.count(text_key) > 1:
                raise ConfigError(f"{where} has several columns {text_key!r}; rename all but one.")
            kind = table.schema_arrow.field(text_key).type
            if not _holds_text(kind):
                raise ConfigError(
                    f"{where}: column {text_key!r} holds {kind}, not strings; set {key_field}, or"
                    " cast the column to string."
                )
            size, rows, done = file.stat().length, max(table.metadata.num_rows, 1), 0
            for batch in table.iter_batches(batch_size=256, columns=[text_key]):
                for value in batch.column(0):
                    done += 1
                    text = value.as_py()
                    yield text.decode() if isinstance(text, bytes) else text, size * done // rows
    except UnicodeDecodeError as e:
        raise ConfigError(
            f"{where}, row {done} of column {text_key!r} is not UTF-8 ({bad_byte(e)}); mend that"
            f" row, or set {key_field}."
        ) from e
    except (OSError, LookupError, pyarrow.ArrowException) as e:
        raise ConfigError(f"{where} cannot be read: {reason(e)}; mend or drop it.") from e


def _holds_text(kind: Any) -> bool:
    """Whether a type of pyarrow is of strings, of bytes (of UTF-8), or of nulls alone."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    tests = "string large_string string_view binary large_binary binary_view null".split()
    return any(getattr(types, f"is_{test}")(kind) for test in tests)
