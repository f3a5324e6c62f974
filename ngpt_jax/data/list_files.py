"""Files listed by patterns: local paths and gs://, folders and globs."""

import contextlib
import fnmatch
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from etils import epath

from ngpt_jax.config import ConfigError, SourceConfig
from ngpt_jax.config.sources import TOKEN_FORMATS
from ngpt_jax.errors import install_hint
from ngpt_jax.files import is_remote, reason

PREPARED = "manifest.json"  # a file of prepared folders
_NAMED = 5  # files that a line names
_HELD_OUT_WORDS = (
    r"(^|[^a-z])(val(id(at(e|ion))?)?|dev|test(ing)?|h[eo]ld[-_ ]?out|eval(uation)?)([^a-z]|$)"
)
_TRAIN_WORDS = r"(^|[^a-z])train(ing)?([^a-z]|$)"


def parse_path(text: str, field: str) -> epath.Path:
    """A path with ``~`` expanded; raises ConfigError for a storage that cannot be used."""
    try:
        path = epath.Path(text).expanduser()
        if is_remote(path):
            import fsspec

            fsspec.get_filesystem_class(text.partition("://")[0])  # ImportError if not installed
        return path
    except (LookupError, ImportError, ValueError) as e:
        raise ConfigError(
            f"{field}: {text!r} is on a storage that cannot be used ({reason(e)}); local paths can,"
            f" and gs:// with {install_hint('gcs')}."
        ) from e


class Files(NamedTuple):
    """The files of a source.

    Attributes:
      train: files of ``paths``.
      held_out: files of each set in ``eval_paths``.
      left_out: a line for each field of which some files are not read.
    """

    train: list[epath.Path]
    held_out: dict[str, list[epath.Path]]
    left_out: list[str]


def any_file(file: epath.Path, field: str) -> bool:
    """The ``holds`` of :func:`find_files` that takes all files."""
    return True


def find_files(
    patterns: Iterable[str],
    field: str,
    suffixes: Sequence[str],
    holds: Callable[[epath.Path, str], bool] = any_file,
) -> tuple[list[epath.Path], list[str]]:
    """The files that ``patterns`` (files, folders or globs, ``~`` allowed) match.

    They come in the order of the patterns, sorted within each pattern, each file once. Links are
    followed. A file that is given by its own path has to be readable. Of folders and globs, hidden
    files and files that are not readable are left out.

    Args:
      patterns: to match.
      field: that holds the patterns, for messages.
      suffixes: of readable files, in lower case; ("",) allows every name.
      holds: whether a file with such a suffix is readable, from the file and ``field``.

    Returns:
      The files, and a line (or none) that counts and names what was left out.

    Raises ConfigError: a pattern without readable files, a file that is not regular.
    """
    found: dict[str, epath.Path] = {}
    left_out: dict[str, epath.Path] = {}
    for pattern in patterns:
        files, hidden = _matches(pattern, field)
        path, readable = parse_path(pattern, field), False
        left_out |= {real_path(file): file for file in hidden}
        for file in files:
            known = file.name.lower().endswith(tuple(suffixes))
            if known and not is_remote(file) and not os.path.isfile(file):
                raise ConfigError(
                    f"{field}: {str(file)!r} is a link to nothing, or no regular file; drop it."
                )
            reads = known and (holds(file, field) or file == path)
            (found if reads else left_out).setdefault(real_path(file), file)
            readable |= reads
        if not readable and path.is_dir():
            there = f" but {files[0].name!r}" if files else ""
            raise ConfigError(
                f"{field}: there is no {', '.join(suffixes)} file below the folder {pattern!r}"
                f"{there}; check the path."
            )
        if not readable:
            raise ConfigError(
                f"{field}: {str(files[0])!r} has none of the known suffixes {', '.join(suffixes)},"
                " or holds something else; convert or rename it."
            )
    if not found:
        raise ConfigError(f"{field} is empty; give it a file, a folder or a glob.")
    names = [str(file) for path, file in left_out.items() if path not in found]
    if not names:
        return list(found.values()), []
    many = "1 file or hidden folder" if len(names) == 1 else f"{len(names)} files or hidden folders"
    more = ", ..." if len(names) > _NAMED else ""
    line = f"{field} leaves out {many}: {', '.join(names[:_NAMED])}{more}"
    return list(found.values()), [line]


def find_train_and_eval_files(
    config: SourceConfig,
    prefix: str,
    suffixes: Sequence[str],
    holds: Callable[[epath.Path, str], bool] = any_file,
) -> Files:
    """The files of ``paths``, and those of each held-out set in ``eval_paths``.

    Args:
      config: of a source.
      prefix: of the names of its fields in messages.
      suffixes, holds: as for :func:`find_files`.

    Raises ConfigError: as :func:`find_files`; a wrong name of a set; a file that is in both; files
    to train on whose names say that they are held out.
    """
    files, left_out = find_files(config.paths, f"{prefix}paths", suffixes, holds)
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
        held_out[name], more = find_files([pattern], field, suffixes, holds)
        left_out += more
        if both := {real_path(file) for file in held_out[name]} & known:
            raise ConfigError(
                f"{field}: {min(both)!r} of {name!r} is in {prefix}paths too; take it out of one"
                " of them."
            )
    if config.source in TOKEN_FORMATS:
        _refuse_prepared(files, f"{prefix}paths")
        for some in held_out.values():
            _refuse_prepared([f for f in some if f.name.startswith("train-")], field)
    _refuse_held_out(files, prefix)
    return Files(files, held_out, left_out)


def _refuse_prepared(files: Sequence[epath.Path], field: str) -> None:
    for file in {file.parent: file for file in files}.values():
        if is_prepared(file.parent):
            mend = f"give {str(file.parent)!r} itself"
            if field.endswith("eval_paths"):
                mend = "give its held-out files alone"
            if field.startswith("--"):  # of a command that reads text alone
                mend = "give the text that it was made from"
            raise ConfigError(
                f"{field}: {str(file)!r} is of a prepared folder, which knows its tokenizer and"
                f" what is held out; {mend}."
            )


def is_prepared(folder: epath.Path) -> bool:
    """Whether a folder has a manifest: PREPARED, and not one that another program wrote."""
    file = folder / PREPARED
    if not file.exists():
        return False
    with contextlib.suppress(ValueError, OSError, RecursionError):  # the reader tells more
        values = json.loads(file.read_text())
        if isinstance(values, dict) and values.keys() - {"version"}:
            return bool(values.keys() & {"sets", "tokenizer"})
    return True


def _refuse_held_out(files: Sequence[epath.Path], prefix: str) -> None:
    """Nobody wants to train on test.parquet because it lies in the same folder.

    What counts is the name of a file and those of the folders that not all files share. Files are
    refused beside others that are not held out by their names; a .txt, which is one document and
    may be called anything, only beside files that are called train.
    """
    depth = _common([file.parts[:-1] for file in files])
    names = ["/".join(file.parts[depth:]) for file in files]
    names = [re.sub("(?<=[a-z])(?=[A-Z])", "-", name).lower() for name in names]  # as in myTest
    trained = [re.search(_TRAIN_WORDS, name) is not None for name in names]
    words = [None if t else re.search(_HELD_OUT_WORDS, name) for name, t in zip(names, trained)]
    if all(words):
        return
    sets: dict[str, list[epath.Path]] = {}
    for file, word in zip(files, words):
        if word and (any(trained) or ".txt" not in file.name.lower()):
            sets.setdefault(word[2], []).append(file)
    if sets:
        option = prefix if prefix.startswith("--") else f"--config.{prefix}"
        flags = [f"{option}eval_paths={name}={_pattern_of(some)}" for name, some in sets.items()]
        file = next(iter(sets.values()))[0]
        raise ConfigError(
            f"{prefix}paths: {str(file)!r} looks like held-out data; give a glob without it, and"
            f" {' '.join(flags)} (or rename it, to train on it)"
        )


def _pattern_of(files: Sequence[epath.Path]) -> str:
    """A path or glob of these files; a glob may match others of the same beginning and end."""
    names = [str(file) for file in files]
    if len(names) == 1:
        return names[0]
    start = names[0][: _common(names)]
    rest = [name[len(start) :] for name in names]
    end = rest[0][len(rest[0]) - _common([name[::-1] for name in rest]) :]
    if any("/" in name for name in rest):
        return f"{start.rpartition('/')[0]}/**/*{end.rpartition('/')[2]}"
    return f"{start}*{end}"


def _common(rows: Sequence[Sequence[str]]) -> int:
    """How many first items all rows share."""
    return sum(1 for _ in itertools.takewhile(lambda items: len({*items}) == 1, zip(*rows)))


def _is_there(pattern: str) -> bool:
    """Whether a local file or folder has this name, or matches this glob."""
    if not pattern or is_remote(pattern):
        return False
    path = epath.Path(pattern).expanduser()
    with contextlib.suppress(OSError, ValueError, NotImplementedError):
        return path.exists() or bool(_glob(path, []))
    return False


def real_path(path: epath.Path) -> str:
    """The path without symbolic links: the same for two names of one file."""
    return str(path) if is_remote(path) else os.path.realpath(path)


def _matches(pattern: str, field: str) -> tuple[list[epath.Path], list[epath.Path]]:
    """Sorted files that a pattern matches, and what was left out because it is hidden."""
    path = parse_path(pattern, field)
    hidden: list[epath.Path] = []
    try:
        if path.is_file() and pattern:  # tested first, because its name may look like a glob
            return [path], []
        if path.is_dir() and pattern:
            return _files_below(path, hidden), hidden
        files = []
        for match in _glob(path, hidden):
            files += _files_below(match, hidden) if match.is_dir() else [match]
    except (OSError, ImportError, LookupError, ValueError, NotImplementedError) as e:
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(f"{field}: cannot list {pattern!r}: {reason(e)}.") from e
    if not files:
        what = "no file matches" if _has_magic(pattern) else "there is no file or folder"
        raise ConfigError(f"{field}: {what} {pattern!r}; check the path or the glob.")
    return files, hidden


def _has_magic(pattern: str) -> bool:
    return re.search(r"[*?[]", pattern) is not None


def _glob(path: epath.Path, hidden: list[epath.Path]) -> list[epath.Path]:
    """Sorted matches; what ``*`` and ``**`` leave out because it is hidden goes to ``hidden``."""
    if not _has_magic(str(path)):
        return []
    parts = str(path).split("/")
    fixed = next(i for i, part in enumerate(parts) if _has_magic(part))
    base = epath.Path("/".join(parts[:fixed]) or ("/" if path.is_absolute() else "."))
    return sorted(_expand(base, parts[fixed:], hidden)) if base.is_dir() else []


def _expand(
    folder: epath.Path, parts: Sequence[str], hidden: list[epath.Path]
) -> Iterator[epath.Path]:
    """What a glob, given in its parts, matches below a folder."""
    part, rest, magic = parts[0], parts[1:], _has_magic(parts[0])
    if part == "**":
        for some, _ in _folders_below(folder):
            if rest:
                yield from _expand(some, rest, hidden)
        if not rest:
            yield folder
        return
    for entry in sorted(folder.iterdir()) if magic else [folder / part]:
        if magic and entry.name.startswith(".") and not part.startswith("."):
            hidden += [entry] if part == "*" else []
        elif magic and not fnmatch.fnmatchcase(entry.name, part):
            continue
        elif rest and entry.is_dir():
            yield from _expand(entry, rest, hidden)
        elif not rest and (magic or entry.exists() or os.path.islink(entry)):
            yield entry


def _folders_below(folder: epath.Path) -> list[tuple[epath.Path, list[epath.Path]]]:
    """A folder and its subfolders without hidden ones, each with what is in it.

    Links are followed, to each folder once. Paths without links go first: a folder that has one is
    called by it.
    """
    folders, links, seen = [], [folder], set()
    while links:
        some = [links.pop(0)]
        while some:
            here = some.pop()
            if real_path(here) in seen:
                continue
            seen.add(real_path(here))
            folders.append((here, sorted(here.iterdir())))
            for entry in folders[-1][1]:
                if entry.is_dir() and not entry.name.startswith("."):
                    linked = not is_remote(entry) and os.path.islink(entry)
                    (links if linked else some).append(entry)
    return folders


def _files_below(folder: epath.Path, hidden: list[epath.Path]) -> list[epath.Path]:
    """Sorted files of a folder and its subfolders; hidden files and folders go to ``hidden``."""
    files = []
    for _, entries in _folders_below(folder):
        for entry in entries:
            if entry.name.startswith("."):
                hidden.append(entry)
            elif not entry.is_dir():
                files.append(entry)
    return sorted(files, key=lambda f: f.as_posix())


def stamp(path: epath.Path) -> str:
    """Path, size and time of change of a file; it changes when the file may have changed."""
    stat = path.stat()
    # epath gives whole seconds only.
    changed = stat.mtime if is_remote(path) else os.stat(path).st_mtime_ns
    return f"{path if is_remote(path) else os.path.abspath(path)} {stat.length} {changed}"
