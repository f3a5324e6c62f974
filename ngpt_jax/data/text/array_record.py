"""Text in array_record files, a document a record."""

import functools

from etils import epath

from ngpt_jax.config import SourceConfig
from ngpt_jax.data.list_files import real_path
from ngpt_jax.data.open_files import RecordFile
from ngpt_jax.data.text.units import TextSource, Unit, decode_records, source_of_files


def open_array_record(config: SourceConfig, prefix: str, download: bool) -> TextSource:
    """As :func:`ngpt_jax.data.text.sources.open_source`."""
    mend = f"set {prefix}token_dtype if it holds token ids"

    def unit(file: epath.Path, field: str) -> Unit:
        records, where = RecordFile(file, field), f"{field}: {str(file)!r}"
        read = functools.partial(decode_records, records, where, mend)
        return Unit(records.stamp, len(records), read, real_path(file))

    return source_of_files(config, prefix, ("",), unit)
