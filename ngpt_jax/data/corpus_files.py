"""Files of a corpus: found by patterns, told apart by size and time, opened."""

from __future__ import annotations

import gzip
import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, cast

from etils import epath

from ngpt_jax.config import ConfigError
from ngpt_jax.files import is_remote, reason


def parse_path(text: str, field: str) -> epath.Path:
    """A path, ``~`` expanded; raises ConfigError for a storage that is not known."""
    try:
        return epath.Path(text).expanduser()
    except (LookupError, ImportError) as e:
        raise ConfigError(
            f"{field}: {text!r} is on a storage that is not known ({reason(e)}); local paths and"
            " gs:// are."
        ) from e


def find_files(patterns: Iterable[str], field: str, suffixes: Sequence[str]) -> list[epath.Path]:
    """The files that ``patterns`` (files, folders or globs, ``~`` allowed) stand for.

    They come in the order of the patterns, sorted within one, each file once. Raises
    ConfigError, which names ``field``, for a pattern without files and for other suffixes.
    """
    found: dict[str, epath.Path] = {}
    for pattern in patterns:
        for file in _matches(pattern, field, suffixes):
            if not file.name.lower().endswith(tuple(suffixes)):
                raise ConfigError(
                    f"{field}: {str(file)!r} has none of the known suffixes {', '.join(suffixes)};"
                    " convert or rename it."
                )
            if not is_remote(file) and not os.path.isfile(file):
                raise ConfigError(
                    f"{field}: {str(file)!r} is a link to nothing, or no regular file; drop it."
                )
            found.setdefault(real_path(file), file)
    if not found:
        raise ConfigError(f"{field} is empty; give it a file, a folder or a glob.")
    return list(found.values())


def real_path(path: epath.Path) -> str:
    """Two names of one file have the same."""
    return str(path) if is_remote(path) else os.path.realpath(path)


def _matches(pattern: str, field: str, suffixes: Sequence[str]) -> list[epath.Path]:
    path = parse_path(pattern, field)
    try:
        if path.is_file() and pattern:  # first, as its name may look like a glob
            return [path]
        if path.is_dir() and pattern:
            if not (files := files_below(path, suffixes)):
                raise ConfigError(
                    f"{field}: there is no {', '.join(suffixes)} file below the folder"
                    f" {pattern!r}; check the path."
                )
            return files
        files = []
        for match in _glob(path):
            files += files_below(match, suffixes) if match.is_dir() else [match]
    except (OSError, ImportError, LookupError, ValueError, NotImplementedError) as e:
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(f"{field}: cannot list {pattern!r}: {reason(e)}.") from e
    if not files:
        what = "no file matches" if _has_magic(pattern) else "there is no file or folder"
        raise ConfigError(f"{field}: {what} {pattern!r}; check the path or the glob.")
    return files


def _has_magic(pattern: str) -> bool:
    return re.search(r"[*?[]", pattern) is not None


def _glob(path: epath.Path) -> list[epath.Path]:
    """Matches in sorted order, without hidden ones; ``**`` follows no links to folders."""
    if not _has_magic(str(path)):
        return []
    parts = str(path).split("/")
    fixed = next(i for i, part in enumerate(parts) if _has_magic(part))
    base, pattern = "/".join(parts[:fixed]) or "/", "/".join(parts[fixed:])
    if not path.is_absolute() and not fixed:
        base = "."
    if is_remote(path):
        return sorted(epath.Path(base).glob(pattern))
    hidden = any(part.startswith(".") for part in parts[fixed:])
    matches = sorted(Path(base).glob(pattern))
    if not hidden:
        above = len(Path(base).parts)
        matches = [m for m in matches if not any(p.startswith(".") for p in m.parts[above:])]
    return [epath.Path(match) for match in matches]


def files_below(folder: epath.Path, suffixes: Sequence[str]) -> list[epath.Path]:
    """Files in a folder and its subfolders, sorted; hidden ones are left out."""
    files = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            # As os.walk does, links to folders are not followed: they may lead in circles.
            if is_remote(entry) or not os.path.islink(entry):
                files += files_below(entry, suffixes)
        elif entry.name.lower().endswith(tuple(suffixes)):
            files.append(entry)
    return sorted(files, key=lambda f: f.as_posix())


def stamp(path: epath.Path) -> str:
    """Path, size and time of change: another stamp says that a file may be another."""
    stat = path.stat()
    # epath tells whole seconds only.
    changed = stat.mtime if is_remote(path) else os.stat(path).st_mtime_ns
    return f"{path if is_remote(path) else os.path.abspath(path)} {stat.length} {changed}"


def open_binary(path: epath.Path) -> IO[Any]:
    """A file open for reading bytes; Python's own where it can be, as that is faster."""
    return path.open("rb") if is_remote(path) else open(path, "rb")


class _Zstandard(io.RawIOBase):
    """The bytes that frames one after another stand for; EOFError where the last is cut short."""

    def __init__(self, raw: IO[Any]):
        import zstandard

        self._new = zstandard.ZstdDecompressor().decompressobj
        self._raw, self._frame, self._left = raw, self._new(), b""
        self._between = False  # the end of a frame is a place to end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._between = self._new(), True
            if not (data := data or self._raw.read(2**17)):
                if self._between:
                    return 0
                raise EOFError("it is cut short")
            self._between = False
            self._left = self._frame.decompress(data)
            self._between = self._frame.eof and not self._frame.unused_data
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


class Opened:
    """A file open for reading, unpacked by its suffix (.gz, .zst).

    Attributes:
      stream: of the unpacked bytes.
    """

    def __init__(self, path: epath.Path):
        self._raw: IO[Any] = open_binary(path)
        name = path.name.lower()
        self.stream: Any
        if name.endswith(".gz"):
            # A buffer of our own: lines are read from it without Python's help.
            self.stream = io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=self._raw)), 2**18)
        elif name.endswith(".zst"):
            self.stream = io.BufferedReader(_Zstandard(self._raw), 2**17)
        else:
            self.stream = self._raw

    def position(self) -> int:
        """Bytes of the file itself read so far."""
        return self._raw.tell()

    def text(self) -> io.TextIOWrapper:
        """Its lines as UTF-8, with or without a byte order mark; line ends become ``\\n``."""
        return io.TextIOWrapper(self.stream, encoding="utf-8-sig")

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()


def read_range(path: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a remote file."""
    import fsspec

    filesystem, name = fsspec.core.url_to_fs(path)
    return filesystem.cat_file(name, start=start, end=stop)
