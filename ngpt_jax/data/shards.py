"""Token ids in files with random access: bin files (nanoGPT, llm.c) and array_record."""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
from etils import epath

from ngpt_jax.config import ConfigError
from ngpt_jax.data.list_files import stamp
from ngpt_jax.data.open_files import RecordFile, read_range
from ngpt_jax.files import digest_of, is_remote, reason

# llm.c's header is 256 int32: magic, version, number of tokens, zeros.
_HEADER_BYTES = 1024
_HEADERS = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
_SAMPLE_BYTES = 2**20
_LOOKED_AT = 2**13  # tokens of a file's start, middle and end that show a wrong type
_SMALL_HALF = 3  # upper half of ids below 2^18, more than vocabularies have
_TOKENS_AT_ONCE = 2**22


def token_dtype(vocab_size: int) -> np.dtype:
    """The smaller of uint16 and uint32 that holds ids below ``vocab_size``."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


@dataclass(frozen=True)
class BinShard:
    """Raw little-endian token ids after a header of ``offset`` bytes."""

    name: str
    dtype: np.dtype
    offset: int
    tokens: int
    stamp: str

    def __len__(self) -> int:
        return self.tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop): (stop - start,), uint16 or uint32."""
        size = self.dtype.itemsize
        first, last = self.offset + start * size, self.offset + stop * size
        try:
            if is_remote(self.name):
                data = read_range(self.name, first, last)
            else:
                file = _open_file(self.name, self.stamp)  # this reference keeps it open
                data = os.pread(file.fileno(), last - first, first)
        except OSError as e:
            raise ConfigError(f"data: {self.name!r} cannot be read: {reason(e)}.") from e
        if len(data) != last - first:
            raise ConfigError(f"data: {self.name!r} has become shorter; restore it.")
        return np.frombuffer(data, self.dtype)

    def fingerprint(self) -> str:
        """Hex SHA-256 that copies of a file share.

        It is of the size, the first and the last MiB: hashing the whole file may take hours.
        """
        return _fingerprint(self, self.dtype)


@functools.lru_cache(maxsize=64)  # "ulimit -n 256" is enough
def _open_file(path: str, stamp: str) -> IO[bytes]:
    """A file that stays open while it is cached or a thread reads it."""
    del stamp  # in the key, so that a changed file is opened anew
    return open(path, "rb", buffering=0)


def open_bin(file: epath.Path, field: str, dtype: str | None, vocab_size: int) -> BinShard:
    """A bin file with or without llm.c's header.

    Args:
      file: to read.
      field: that names the file, for messages.
      dtype: of a file without a header; None: as :func:`token_dtype`.
      vocab_size: ids have to be below it.

    Raises ConfigError: the file is empty, cut short, of an unknown kind, or seems to hold ids of
    another type.
    """
    size, name = file.stat().length, str(file)
    try:
        head = read_range(name, 0, 12)
    except OSError as e:
        raise ConfigError(f"{field}: {name!r} cannot be read: {reason(e)}; mend or drop it.") from e
    magic, version, count = struct.unpack("<3i", head) if len(head) == 12 else (0, 0, 0)
    if magic in (known for known, _ in _HEADERS):
        if (magic, version) not in _HEADERS:
            raise ConfigError(f"{field}: {name!r} has llm.c's header in version {version}.")
        kind, offset = np.dtype(_HEADERS[magic, version]).newbyteorder("<"), _HEADER_BYTES
        if dtype not in (None, kind.name):
            raise ConfigError(f"{field}: {name!r} holds {kind.name}, not token_dtype={dtype}.")
        tokens = max(size - offset, 0) // kind.itemsize
        if size != offset + count * kind.itemsize:
            raise ConfigError(
                f"{field}: {name!r} should hold {count:,} tokens but holds {tokens:,}; it is cut"
                " short or damaged."
            )
    else:
        kind, offset = np.dtype(dtype or token_dtype(vocab_size)).newbyteorder("<"), 0
        tokens = size // kind.itemsize
        if size % kind.itemsize:
            raise ConfigError(
                f"{field}: the size of {name!r}, {size:,} bytes, is no multiple of"
                f" {kind.itemsize} ({kind.name}); it is cut short, or set token_dtype."
            )
    if not tokens:
        raise ConfigError(f"{field}: {name!r} holds no tokens; drop it.")
    shard = BinShard(name, kind, offset, tokens, stamp(file))
    if not offset:
        size = min(tokens, _LOOKED_AT) // 4 * 4
        starts = sorted({0, (tokens - size) // 8 * 4, (tokens - size) // 4 * 4})
        some = np.concatenate([shard.read(start, start + size) for start in starts])
        meant = dtype == "uint16" and vocab_size <= 2**16
        check_type(some, name, field, vocab_size, meant)
    return shard


def check_type(
    ids: np.ndarray, name: str, field: str, vocab_size: int, meant: bool = False
) -> None:
    """Refuses ids that look as if they were read as the wrong type.

    Args:
      ids: (a multiple of 4,) some of a file, from such a place on.
      name: of the file.
      field: that names the file, for messages.
      vocab_size: ids have to be below it.
      meant: the user says that the ids are uint16.

    Raises ConfigError.
    """
    if len(ids) <= 16:
        return
    # Parts of wider ids: nearly all the upper ones are 0, or small in a large vocabulary.
    narrow = ids.dtype.itemsize == 2
    small = (ids.reshape(-1, 4) <= (_SMALL_HALF if narrow else 0)).mean(axis=0)
    for kind, upper, lower in (("", [1, 3], 0), ("big-endian ", [0, 2], 3)):
        if not meant and small[upper].min() > 0.9 and small[lower] < 0.5:
            kind += "uint32" if narrow and (small > 0.9).sum() == 2 else "int64"
            mend = "write it as little-endian uint16 or uint32"
            mend = "set token_dtype=uint32" if kind == "uint32" else mend
            or_else = " (or uint16, if it does not)" if narrow and vocab_size <= 2**16 else ""
            raise ConfigError(
                f"{field}: every second token of {name!r} is 0 or near 0: it seems to hold {kind};"
                f" {mend}{or_else}."
            )
    # In the right order the upper bytes vary less than the lower ones.
    low, high = (_entropy(ids.astype("<u4") >> shift & 255) for shift in (0, 8))
    odd = ids.max() >= vocab_size or (len(ids) > 1000 and low + 1 < high)
    if ids.byteswap().max() < vocab_size and odd:
        raise ConfigError(f"{field}: {name!r} seems to be big-endian; write it as little-endian.")


def _entropy(values: np.ndarray) -> float:
    """Bits a value, for values below 256."""
    shares = np.bincount(values, minlength=256) / len(values)
    return -float(np.sum(shares * np.log2(np.maximum(shares, 1e-9))))


def _fingerprint(shard: Shard, dtype: np.dtype, more: bytes = b"") -> str:
    tokens, ends = len(shard), min(len(shard), _SAMPLE_BYTES // dtype.itemsize)
    digest = hashlib.sha256(f"{dtype} {tokens} ".encode() + more)
    digest.update(shard.read(0, ends).tobytes())
    digest.update(shard.read(tokens - ends, tokens).tobytes())
    return digest.hexdigest()


class ArrayRecordShard:
    """Little-endian token ids in records, a document a record.

    Args:
      records: of the file.
      dtype: of the ids.
      lengths: (records,) tokens of each record, as :func:`record_lengths` makes them.
    """

    def __init__(self, records: RecordFile, dtype: np.dtype, lengths: np.ndarray):
        self.name, self.stamp = str(records.file), records.stamp
        self._records, self._dtype = records, dtype
        self._ends = np.cumsum(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """As of :class:`BinShard`."""
        if start >= stop:
            return np.zeros(0, self._dtype)
        first = int(np.searchsorted(self._ends, start, "right"))
        last = int(np.searchsorted(self._ends, stop, "left"))
        tokens = np.frombuffer(b"".join(self._records.read(first, last + 1)), self._dtype)
        start -= int(self._ends[first - 1]) if first else 0
        stop -= int(self._ends[first - 1]) if first else 0
        if len(tokens) < stop:
            raise ConfigError(f"data: {self.name!r} has changed; restore it.")
        return tokens[start:stop]

    def check_type(self, field: str, vocab_size: int) -> None:
        """As the function :func:`check_type`, for the first records."""
        odd = bool((np.diff(self._ends, prepend=0) % 2).any())  # then they are no halves of uint32
        stop = int(self._ends[:64][self._ends[:64] <= 2**20].max(initial=0))
        check_type(self.read(0, stop // 4 * 4), self.name, field, vocab_size, meant=odd)

    def fingerprint(self) -> str:
        """Of the lengths of records, the first and the last MiB."""
        return _fingerprint(self, self._dtype, self._ends.tobytes())


def record_lengths(records: RecordFile, dtype: np.dtype) -> np.ndarray:
    """Tokens of each record, (records,) int64; reads the whole file. Raises ConfigError."""
    sizes = np.fromiter(map(len, records), np.int64, len(records))
    if (sizes % dtype.itemsize).any():
        raise ConfigError(
            f"{records.field}: a record of {str(records.file)!r} is no whole number of"
            f" {dtype.name}; set token_dtype (None: the records are text)."
        )
    return sizes // dtype.itemsize


Shard = BinShard | ArrayRecordShard


def _changed(path: str) -> int:
    """When a local file was last changed, in nanoseconds; no program can set this time back."""
    return 0 if is_remote(path) else os.stat(path).st_ctime_ns


class TokenStream:
    """The tokens of shards one after another, or a part of them.

    Args:
      shards: at least one.
      vocab_size: ids have to be below it.
      start, stop: of the part; all tokens by default.
    """

    def __init__(
        self, shards: Sequence[Shard], vocab_size: int, start: int = 0, stop: int | None = None
    ):
        self.shards, self.vocab_size = list(shards), vocab_size
        self._ends = list(itertools.accumulate(len(shard) for shard in shards))
        self._start, self._stop = start, self._ends[-1] if stop is None else stop

    def __len__(self) -> int:
        return self._stop - self._start

    def part(self, start: int, stop: int) -> TokenStream:
        """Tokens [start, stop) as a stream."""
        return TokenStream(self.shards, self.vocab_size, self._start + start, self._start + stop)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop): (stop - start,) int32. Raises ConfigError for ids out of range."""
        out = np.empty(stop - start, np.int32)
        start, stop, filled = start + self._start, stop + self._start, 0
        i = bisect.bisect_right(self._ends, start)
        while start < stop:
            shard = self.shards[i]
            base = self._ends[i] - len(shard)
            piece = shard.read(start - base, min(stop, self._ends[i]) - base)
            if int(piece.max()) >= self.vocab_size:
                raise ConfigError(
                    f"data: {shard.name!r} has the token id {piece.max()}, but data.tokenizer"
                    f" knows ids below {self.vocab_size}; give the tokenizer of these files, or"
                    " set token_dtype."
                )
            out[filled : filled + len(piece)] = piece
            start, filled, i = start + len(piece), filled + len(piece), i + 1
        return out

    def chunks(self) -> Iterator[np.ndarray]:
        """All tokens in order, in arrays (tokens,) int32."""
        for start in range(0, len(self), _TOKENS_AT_ONCE):
            yield self.read(start, min(start + _TOKENS_AT_ONCE, len(self)))

    def stamp(self) -> str:
        """Changes when a file may have changed anywhere; for what is kept about its tokens."""
        shards = [f"{shard.stamp} {_changed(shard.name)}" for shard in self.shards]
        return digest_of([f"{self._start} {self._stop}", *shards])

    def fingerprint(self) -> str:
        """Hex SHA-256 that streams of copies of the files share."""
        shards = [shard.fingerprint() for shard in self.shards]
        return digest_of([f"{self._start} {self._stop}", *shards])
