"""Evaluation tasks in local files: a context, and continuations to choose from.

A file NAME.jsonl or NAME.jsonl.gz holds an example a line. All are of one of these kinds:

  choices     {"id", "context", "continuations": [two or more], "label"}
  completion  {"id", "context", "continuations": [one], "label": 0}, as LAMBADA's last word
  contexts    {"id", "contexts": [two or more], "continuation", "label"}: the continuation is scored
              under each context, as in WinoGrande

"label" is the index of the right continuation or context.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from ngpt_jax.config import ConfigError
from ngpt_jax.config.convert import did_you_mean
from ngpt_jax.data.list_files import parse_path
from ngpt_jax.data.open_files import check_key, read_jsonl

SUFFIXES = (".jsonl", ".jsonl.gz")


class Example(NamedTuple):
    """One line of a task's file.

    Attributes:
      id: a number or a text.
      pairs: (context, continuation) of each choice; a completion has one.
      label: index of the right pair.
    """

    id: int | str
    pairs: tuple[tuple[str, str], ...]
    label: int


class Task(NamedTuple):
    """The examples of a file.

    Attributes:
      name: of the file, without its suffix.
      path: of the file.
      kind: choices, completion or contexts.
      examples: at least one.
      delimiter: " " where each continuation begins with one, else "". The harness treats it as
        part of the prompt's format: it is scored, but not counted in a continuation's length.
    """

    name: str
    path: epath.Path
    kind: str
    examples: list[Example]
    delimiter: str


def find_tasks(
    names: Sequence[str], folder: str | None, limit: int | None, harness: bool
) -> tuple[list[Task], list[str]]:
    """The tasks that are local files, and the names that are left to the harness.

    Args:
      names: of tasks in ``folder``, or paths.
      folder: of the files; None: all names are paths, or left to the harness.
      limit: only the first so many examples of each; None: all.
      harness: whether names that are no file are left to it, and not refused.

    Raises ConfigError.
    """
    found, others = [], []
    for name in names:
        path = find_task(name, folder)
        if path is not None:
            found.append(read_task(path, limit))
        elif harness:
            others.append(name)
        else:
            raise unknown_task(name, folder)
    several = [*(task.name for task in found), *others]
    if twice := [name for name in several if several.count(name) > 1]:
        raise ConfigError(f"--tasks: {twice[0]} is given twice; rename a file, or drop one.")
    return found, others


def find_task(name: str, folder: str | None) -> epath.Path | None:
    """The file of a task: a path, or NAME.jsonl or NAME.jsonl.gz in ``folder``.

    None where the folder has no such file. Raises ConfigError for a path or a folder that is
    missing.
    """
    if "/" in name or name.lower().endswith(SUFFIXES):
        path = parse_path(name, "--tasks")
        if not path.is_file():
            raise ConfigError(f"--tasks: there is no file {name!r}; check the path.")
        if not name.lower().endswith(SUFFIXES):
            raise ConfigError(f"--tasks: {name!r} is no {' or '.join(SUFFIXES)} file; convert it.")
        return path
    if folder is None:
        return None
    paths = [_folder(folder) / f"{name}{suffix}" for suffix in SUFFIXES]
    return next((path for path in paths if path.is_file()), None)


def _folder(folder: str) -> epath.Path:
    path = parse_path(folder, "--tasks_dir")
    if not path.is_dir():
        raise ConfigError(f"--tasks_dir={folder}: there is no such folder.")
    return path


def unknown_task(name: str, folder: str | None) -> ConfigError:
    """The error for a task that was not found; it names the tasks that exist."""
    if folder is None:
        return ConfigError(
            f"--tasks={name}: there is no such file; give --tasks_dir, the folder of"
            f" {name}.jsonl, or the path of a .jsonl file."
        )
    names = (p.name for p in _folder(folder).iterdir() if not p.name.startswith("."))
    known = sorted({_stem(name) for name in names if name.endswith(SUFFIXES)})
    there = f"there are {', '.join(known)}" if known else f"there is no {SUFFIXES[0]} file at all"
    return ConfigError(
        f"--tasks={name}: --tasks_dir={folder} holds no {name}.jsonl or {name}.jsonl.gz;"
        f" {there}.{did_you_mean(name, known)}"
    )


def _stem(name: str) -> str:
    return name[: name.lower().rindex(".jsonl")]


def read_task(path: epath.Path, limit: int | None = None) -> Task:
    """Reads the file of a task.

    Args:
      path: .jsonl or .jsonl.gz, UTF-8.
      limit: read only the first so many examples; None: all.

    Raises ConfigError, with the file, the line and the field.
    """
    examples: list[Example] = []
    kind = ""
    records = read_jsonl(path, "--tasks", "with id, context and so on")
    for where, record, _ in itertools.islice(records, limit):
        found, example = _parse(record, where)
        kind = kind or found
        if found != kind:
            raise ConfigError(
                f"{where} is of the kind {found!r}, those above are {kind!r}; a file holds one"
                " kind: one continuation each, or several, or contexts."
            )
        examples.append(example)
    if not examples:
        raise ConfigError(f"--tasks: {str(path)!r} holds no examples; give another file.")
    return Task(_stem(path.name), path, kind, examples, _delimiter(examples))


def _delimiter(examples: Sequence[Example]) -> str:
    texts = (text for example in examples for _, text in example.pairs)
    return " " if all(text.startswith(" ") and len(text) > 1 for text in texts) else ""


def _parse(record: Mapping[str, Any], where: str) -> tuple[str, Example]:
    """Kind and example of a line."""
    several = "contexts" in record
    names = ("contexts", "continuation") if several else ("context", "continuations")
    for name in ("id", *names, "label"):
        check_key(record, name, where, "see the format in --help")
    if isinstance(record["id"], bool) or not isinstance(record["id"], int | str):
        raise ConfigError(f"{where}: 'id' must be a number or a text, got {record['id']!r}.")
    if re.search("[\ud800-\udfff]", str(record["id"])):
        raise ConfigError(f"{where}: 'id' holds half a surrogate pair, {record['id']!r}; mend it.")
    if several:
        contexts, continuation = _texts(record, "contexts", where), record["continuation"]
        if len(contexts) < 2:
            raise ConfigError(f"{where}: 'contexts' must be two or more, got {len(contexts)}.")
        _check_text(continuation, "continuation", where)
        pairs = tuple((context, continuation) for context in contexts)
    else:
        context, continuations = record["context"], _texts(record, "continuations", where)
        if not isinstance(context, str):
            raise ConfigError(f"{where}: 'context' must be a text, got {context!r:.60}.")
        for continuation in continuations:
            _check_text(continuation, "continuations", where)
        pairs = tuple((context, continuation) for continuation in continuations)
    label = record["label"]
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(pairs):
        last = len(pairs) - 1
        raise ConfigError(f"{where}: 'label' must be an index from 0 to {last}, got {label!r:.60}.")
    kind = "contexts" if several else "choices" if len(pairs) > 1 else "completion"
    return kind, Example(record["id"], pairs, label)


def _texts(record: Mapping[str, Any], name: str, where: str) -> list[str]:
    texts = record[name]
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise ConfigError(f"{where}: {name!r} must be a list of texts, got {texts!r:.60}.")
    return texts


def _check_text(text: object, name: str, where: str) -> None:
    if not isinstance(text, str) or not text:
        raise ConfigError(f"{where}: {name!r} must be text, and not empty, got {text!r:.60}.")
