"""Documents of text files: .txt is one, .jsonl has one a line, .parquet one a row."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from typing import TextIO

from etils import epath

from ngpt_jax.config import ConfigError
from ngpt_jax.data.corpus_files import Opened, open_binary
from ngpt_jax.files import reason

_PACKED = ("", ".gz", ".zst")
SUFFIXES = (*(f"{kind}{packed}" for kind in (".txt", ".jsonl") for packed in _PACKED), ".parquet")


def read_documents(file: epath.Path, field: str, text_key: str) -> Iterator[tuple[str, int]]:
    """Documents of a file that are not blank, each with the bytes of the file read so far.

    Text is UTF-8, with or without a byte order mark; line ends become ``\\n``. Raises
    ConfigError, which names ``field``, the file and the line. JSON can spell half a surrogate pair,
    which is "?" to tokenizers.
    """
    name = file.name.lower()
    if name.endswith(".parquet"):
        texts = _parquet_texts(file, field, text_key)
    else:
        texts = _packed_texts(file, field, text_key, name.split(".txt")[-1] in _PACKED)
    for text, position in texts:
        if text and not text.isspace():
            yield text, position


def _packed_texts(
    file: epath.Path, field: str, text_key: str, whole: bool
) -> Iterator[tuple[str, int]]:
    from zstandard import ZstdError

    try:
        with Opened(file) as opened:
            lines = opened.text()
            if whole:
                yield lines.read(), opened.position()
                return
            for text in _json_texts(lines, file, field, text_key):
                yield text, opened.position()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{field}: {str(file)!r} is not UTF-8; convert it to UTF-8.") from error
    except (OSError, EOFError, zlib.error, ZstdError) as error:
        raise ConfigError(
            f"{field}: cannot read {str(file)!r}: {reason(error)}; mend or drop it."
        ) from error


def _json_texts(stream: TextIO, file: epath.Path, field: str, text_key: str) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        try:
            text = json.loads(line)[text_key]
        except (ValueError, RecursionError, LookupError, TypeError) as error:
            if not line.strip():
                continue
            text = error
        if not isinstance(text, str):
            where = f"{field}: {str(file)!r}, line {number}"
            raise ConfigError(f"{where} {_why_no_text(line, text, text_key)}.")
        yield text


def _why_no_text(line: str, found: object, text_key: str) -> str:
    if isinstance(found, ValueError | RecursionError):
        return f"is not JSON ({found}); mend or drop it"
    record = json.loads(line)
    if not isinstance(record, dict):
        return f"is not a JSON object, e.g. {{{text_key!r}: ...}}; mend it"
    if text_key not in record:
        keys = ", ".join(repr(key[:40]) for key in sorted(record)[:9]) or "nothing"
        return f"has no {text_key!r} but {keys}; set data.text_key"
    return f"has {text_key!r} of type {type(found).__name__}, not str; set data.text_key"


def _parquet_texts(file: epath.Path, field: str, text_key: str) -> Iterator[tuple[str, int]]:
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
                    " set data.text_key."
                )
            kind = table.schema_arrow.field(text_key).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise ConfigError(
                    f"{where}: column {text_key!r} holds {kind}, not strings; set data.text_key."
                )
            size, rows, done = file.stat().length, max(table.metadata.num_rows, 1), 0
            for batch in table.iter_batches(batch_size=256, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    done += 1
                    yield text or "", size * done // rows
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8; convert it to UTF-8.") from error
    except (OSError, LookupError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{where} cannot be read: {reason(error)}; mend or drop it.") from error
