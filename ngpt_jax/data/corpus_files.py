"""Files of a corpus: found by patterns, told apart by size and time, opened."""

from __future__ import annotations

import gzip
import io
import os
import re
from collections.abc import Iterable, Sequence
from typing import IO, Any

from etils import epath

from ngpt_jax.config import ConfigError
from ngpt_jax.files import is_remote, reason


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
            found.setdefault(real_path(file), file)
    if not found:
        raise ConfigError(f"{field} is empty; give it a file, a folder or a glob.")
    return list(found.values())


def real_path(path: epath.Path) -> str:
    """Two names of one file have the same."""
    return str(path) if is_remote(path) else os.path.realpath(path)


def _matches(pattern: str, field: str, suffixes: Sequence[str]) -> list[epath.Path]:
    path = epath.Path(pattern).expanduser()
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
    except (OSError, ImportError, ValueError, NotImplementedError) as e:
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
    """Matches in sorted order; ``..`` after a wildcard is allowed."""
    if not _has_magic(str(path)):
        return []
    if not is_remote(path):
        import glob

        return [epath.Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    parts = str(path).split("/")
    fixed = next(i for i, part in enumerate(parts) if _has_magic(part))
    return sorted(epath.Path("/".join(parts[:fixed])).glob("/".join(parts[fixed:])))


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
            self.stream = gzip.GzipFile(fileobj=self._raw)
        elif name.endswith(".zst"):
            import zstandard

            reader = zstandard.ZstdDecompressor().stream_reader(self._raw, read_across_frames=True)
            self.stream = io.BufferedReader(reader)
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
