"""Records of array_record files, as bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from ngpt_jax.config import ConfigError
from ngpt_jax.data.list_files import stamp
from ngpt_jax.files import is_remote, reason


class RecordFile:
    """An array_record file. It is cheap to make and is opened where it is read.

    Args:
      file: to read.
      field: that names the file, for messages.

    Raises ConfigError: a remote file, or one without records.
    """

    def __init__(self, file: epath.Path, field: str):
        if is_remote(file):
            raise ConfigError(
                f"{field}: array_record files are read from local disks alone, not {str(file)!r};"
                " copy them, or use text or bin."
            )
        self.file, self.field, self.stamp = file, field, stamp(file)
        self._length = self._call(lambda reader: reader.num_records())
        if not self._length:
            raise ConfigError(
                f"{field}: {str(file)!r} holds no array_record records; mend or drop it."
            )

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> Sequence[bytes]:
        """Records [start, stop); raises ConfigError."""
        return self._call(lambda reader: reader.read(start, stop))

    def _call(self, fn: Callable[[Any], Any]) -> Any:
        try:
            return fn(_reader(str(self.file), self.stamp))
        except (RuntimeError, ValueError, OSError, IndexError) as e:
            raise ConfigError(
                f"{self.field}: {str(self.file)!r} cannot be read as array_record: {reason(e)};"
                " mend or drop it."
            ) from e


@functools.lru_cache(maxsize=64)  # each reader holds a file and its index
def _reader(path: str, stamp: str) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    del stamp  # in the key, so that a changed file is opened anew
    return ArrayRecordReader(path, "readahead_buffer_size:0")
