"""Files opened for reading: local or gs://, plain, .gz or .zst; array_record."""

import contextlib
import functools
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, TextIO, cast

from etils import epath

from ngpt_jax.config import ConfigError
from ngpt_jax.data.list_files import stamp
from ngpt_jax.files import is_remote, reason

RECORDS_AT_ONCE = 256
_PACKED_AT_ONCE = 2**13  # a block of zstd takes 4 bytes or more and unpacks to 128 KiB or less


def open_binary(path: epath.Path) -> IO[Any]:
    """A file opened for reading bytes; with Python's own ``open`` where possible: it is faster."""
    return path.open("rb") if is_remote(path) else open(path, "rb")


class _Zstandard(io.RawIOBase):
    """The decompressed bytes of consecutive frames, of any window (``zstd --long=31`` too).

    The memory is bounded: a frame's window, at most 2 GiB and no more than its text, and what
    ``_PACKED_AT_ONCE`` bytes unpack to, at most 256 MiB. Raises EOFError where the last frame is
    cut short.
    """

    def __init__(self, raw: IO[Any]):
        import zstandard

        self._new = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self._raw, self._frame, self._left = raw, self._new(), memoryview(b"")
        self._between = False  # between two frames, where a file may end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._between = self._new(), True
            if not (data := data or self._raw.read(_PACKED_AT_ONCE)):
                if self._between:
                    return 0
                raise EOFError("it is cut short")
            self._between = False
            self._left = memoryview(self._frame.decompress(data))
            self._between = self._frame.eof and not self._frame.unused_data
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


@contextlib.contextmanager
def open_text(path: epath.Path, field: str) -> Iterator[tuple[TextIO, Callable[[], int]]]:
    """Opens a text file, decompressed as its suffix says (.gz, .zst).

    Yields:
      The text (UTF-8, with or without a byte order mark; line ends become ``\\n``), and a function
      that returns how many bytes of the file itself have been read.

    Raises ConfigError, which names ``field`` and the file, also for what is read inside.
    """
    from zstandard import ZstdError

    try:
        with open_binary(path) as raw:
            yield io.TextIOWrapper(_unpacked(path, raw), encoding="utf-8-sig"), raw.tell
    except UnicodeDecodeError as e:
        raise ConfigError(f"{field}: {_first_bad_line(path)}") from e
    except (OSError, EOFError, zlib.error, ZstdError) as e:
        test = {".gz": "gzip -t", ".zst": "zstd -t --long=31"}.get(path.suffix.lower())
        whole = f"if {test} finds it whole, unpack it; else " if test else ""
        raise ConfigError(
            f"{field}: cannot read {str(path)!r}: {reason(e)}; {whole}mend or drop it."
        ) from e


def _unpacked(path: epath.Path, raw: IO[Any]) -> Any:
    """The bytes of a file's text, decompressed as its suffix says."""
    if path.name.lower().endswith(".gz"):
        if not raw.read(1):  # to the library that is no text
            raise EOFError("it is cut short")
        raw.seek(0)
        # With this buffer, lines are read without a call of Python code for each.
        return io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=raw)), 2**18)
    if path.name.lower().endswith(".zst"):
        return io.BufferedReader(_Zstandard(raw), 2**17)
    return raw


def bad_byte(error: UnicodeDecodeError, before: int = 0) -> str:
    """Which byte is not UTF-8, for a message; ``before`` are the bytes before those decoded."""
    return f"byte {error.object[error.start]:#04x} at offset {before + error.start:,}"


def _first_bad_line(path: epath.Path) -> str:
    """Where a file is not UTF-8, and what to do: the file is read once more."""
    lines = offset = 0
    with open_binary(path) as raw:
        for line in _unpacked(path, raw):
            if not offset and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                return f"{str(path)!r} is not UTF-8 but UTF-16; convert it to UTF-8."
            try:
                lines += _line_ends(line.decode())
            except UnicodeDecodeError as e:
                lines += _line_ends(line[: e.start].decode())
                return (
                    f"{str(path)!r}, line {lines + 1} is not UTF-8 ({bad_byte(e, offset)} of the"
                    " text); mend that line, or convert the file if all of it has another encoding."
                )
            offset += len(line)
    return f"{str(path)!r} is not UTF-8, or has changed; convert it to UTF-8."


def _line_ends(text: str) -> int:
    return text.count("\n") + text.count("\r") - text.count("\r\n")


def read_jsonl(
    path: epath.Path, field: str, like: str
) -> Iterator[tuple[str, dict[str, Any], int]]:
    """The objects of a .jsonl file, one a line; blank lines are left out.

    Args:
      path: the file, perhaps packed.
      field: that names the file, for messages.
      like: what an object should be like, for messages.

    Yields:
      (file and line, for messages; the object; bytes of the file read so far).

    Raises ConfigError.
    """
    with open_text(path, field) as (lines, position):
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            where = f"{field}: {str(path)!r}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise ConfigError(f"{where} is not JSON ({e}); mend or drop it.") from e
            if not isinstance(record, dict):
                raise ConfigError(f"{where} is not a JSON object {like}; mend it.")
            yield where, record, position()


def check_key(record: Mapping[str, Any], name: str, where: str, mend: str) -> None:
    """Refuses a record of :func:`read_jsonl` without this key; ``mend`` is for the message."""
    if name not in record:
        there = ", ".join(repr(key[:40]) for key in sorted(record)[:9]) or "nothing"
        raise ConfigError(f"{where} has no {name!r} but {there}; {mend}.")


def read_range(path: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file, fewer where it is shorter."""
    if is_remote(path):
        import fsspec

        filesystem, name = fsspec.core.url_to_fs(path)
        return filesystem.cat_file(name, start=start, end=stop)
    with open(path, "rb") as f:
        f.seek(start)
        return f.read(stop - start)


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

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self), RECORDS_AT_ONCE):
            yield from self.read(start, min(start + RECORDS_AT_ONCE, len(self)))

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
