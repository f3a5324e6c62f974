"""Text in array_record files, a document a record."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

from etils import epath

from ngpt_jax.config import SourceConfig
from ngpt_jax.data.list_files import real_path
from ngpt_jax.data.record_files import RecordFile
from ngpt_jax.data.text.units import (
    RECORDS_AT_ONCE,
    TextSource,
    Unit,
    decode_records,
    source_of_files,
)


def open_array_record(config: SourceConfig, prefix: str, download: bool) -> TextSource:
    """As :func:`ngpt_jax.data.text.sources.open_source`."""
    del download

    def unit(file: epath.Path, field: str) -> Unit:
        records = RecordFile(file, field)
        read = functools.partial(_texts, records, f"set {prefix}token_dtype if it holds token ids")
        return Unit(records.stamp, len(records), read, real_path(file))

    return source_of_files(config, prefix, ("",), unit)


def _texts(records: RecordFile, mend: str) -> Iterator[tuple[str, int]]:
    starts = range(0, len(records), RECORDS_AT_ONCE)
    read = (records.read(i, min(i + RECORDS_AT_ONCE, len(records))) for i in starts)
    where = f"{records.field}: {str(records.file)!r}"
    return decode_records(itertools.chain.from_iterable(read), where, mend)
