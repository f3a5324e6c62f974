"""Files listed by patterns: local paths and gs://, folders and globs."""

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from etils import epath

from ngpt_jax.config import ConfigError, SourceConfig
from ngpt_jax.files import is_remote, reason


def parse_path(text: str, field: str) -> epath.Path:
    """A path with ``~`` expanded; raises ConfigError for an unknown kind of storage."""
    try:
        return epath.Path(text).expanduser()
    except (LookupError, ImportError) as e:
        raise ConfigError(
            f"{field}: {text!r} is on a storage that is not known ({reason(e)}); local paths and"
            " gs:// are."
        ) from e


def find_files(patterns: Iterable[str], field: str, suffixes: Sequence[str]) -> list[epath.Path]:
    """The files that ``patterns`` (files, folders or globs, ``~`` allowed) match.

    They come in the order of the patterns, sorted within each pattern, each file once.

    Args:
      patterns: to match.
      field: that holds the patterns, for messages.
      suffixes: allowed ends of a file's name, in lower case; ("",) allows every name.

    Raises ConfigError: a pattern without files, a file with another suffix or that is not regular.
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


def find_train_and_eval_files(
    config: SourceConfig, prefix: str, suffixes: Sequence[str]
) -> tuple[list[epath.Path], dict[str, list[epath.Path]]]:
    """The files of ``paths``, and those of each held-out set in ``eval_paths``.

    Args:
      config: of a source.
      prefix: of the names of its fields in messages.
      suffixes: as for :func:`find_files`.

    Raises ConfigError: as :func:`find_files`; a wrong name of a set; a file that is in both.
    """
    files = find_files(config.paths, f"{prefix}paths", suffixes)
    known = {real_path(file) for file in files}
    field = f"{prefix}eval_paths"
    held_out: dict[str, list[epath.Path]] = {}
    for item in config.eval_paths:
        name, _, pattern = (part.strip() for part in item.partition("="))
        # The folders of Hive have a "=" in their names: split=val/part-0.parquet.
        if _is_there(item) and not _is_there(pattern):
            raise ConfigError(
                f"{field}: {item[:99]!r} is a path without a name; put one before it, e.g."
                f" val={item[:99]}"
            )
        bad = name in ("", "train") or set(name) & set("/\\.") or len(name) > 64
        if bad or not pattern:
            raise ConfigError(
                f"{field} must be name=path, got {item[:99]!r}, e.g. val=held_out.txt; a name"
                " has no / or ., is short, and is not train."
            )
        if name in held_out:
            raise ConfigError(f"{field}: two sets are called {name!r}; rename one.")
        held_out[name] = find_files([pattern], field, suffixes)
        if both := {real_path(file) for file in held_out[name]} & known:
            raise ConfigError(
                f"{field}: {min(both)!r} of {name!r} is in {prefix}paths too; take it out of one"
                " of them."
            )
    return files, held_out


def _is_there(pattern: str) -> bool:
    """Whether a local file or folder has this name, or matches this glob."""
    if not pattern or is_remote(pattern):
        return False
    path = epath.Path(pattern).expanduser()
    with contextlib.suppress(OSError, ValueError, NotImplementedError):
        return path.exists() or bool(_glob(path))
    return False


def real_path(path: epath.Path) -> str:
    """The path without symbolic links: the same for two names of one file."""
    return str(path) if is_remote(path) else os.path.realpath(path)


def _matches(pattern: str, field: str, suffixes: Sequence[str]) -> list[epath.Path]:
    path = parse_path(pattern, field)
    try:
        if path.is_file() and pattern:  # tested first, because its name may look like a glob
            return [path]
        if path.is_dir() and pattern:
            if not (files := _files_below(path, suffixes)):
                raise ConfigError(
                    f"{field}: there is no {', '.join(suffixes)} file below the folder"
                    f" {pattern!r}; check the path."
                )
            return files
        files = []
        for match in _glob(path):
            files += _files_below(match, suffixes) if match.is_dir() else [match]
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
    """Sorted matches without hidden files; ``**`` does not follow links to folders."""
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


def _files_below(folder: epath.Path, suffixes: Sequence[str]) -> list[epath.Path]:
    """Sorted files of a folder and its subfolders, without hidden ones."""
    files = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            # Like os.walk, this does not follow links to folders: they may form a circle.
            if is_remote(entry) or not os.path.islink(entry):
                files += _files_below(entry, suffixes)
        elif entry.name.lower().endswith(tuple(suffixes)):
            files.append(entry)
    return sorted(files, key=lambda f: f.as_posix())


def stamp(path: epath.Path) -> str:
    """Path, size and time of change of a file; it changes when the file may have changed."""
    stat = path.stat()
    # epath gives whole seconds only.
    changed = stat.mtime if is_remote(path) else os.stat(path).st_mtime_ns
    return f"{path if is_remote(path) else os.path.abspath(path)} {stat.length} {changed}"
