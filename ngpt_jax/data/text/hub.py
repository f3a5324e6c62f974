"""Text of data sets of the Hugging Face Hub: their parquet and jsonl files, one at a time."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from ngpt_jax.config import ConfigError, SourceConfig
from ngpt_jax.data import hub
from ngpt_jax.data.hub import Repository
from ngpt_jax.data.text.text_files import PACKED, SUFFIXES, read_documents
from ngpt_jax.data.text.units import Doing, TextSource, Unit, held_out_name

# Where a split has such files, others are read only if the card names them.
_SURE = (".parquet", *(f"{kind}{packed}" for kind in (".jsonl", ".ndjson") for packed in PACKED))
_NO_TEXT = re.compile(  # files about the set
    r"(.*/)?(dataset_infos?|config|licen[cs]e|readme|requirements|notice|citation)\.(json|txt)",
    re.IGNORECASE,
)
_CONVERTED = "refs/convert/parquet"  # the hub's own copy, also of data sets that are programs
_SPLITS = {  # how the names of files tell it
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|eval|evaluation",
}


def open_hub(config: SourceConfig, prefix: str, download: bool, cache: str) -> TextSource:
    """As :func:`ngpt_jax.data.text.sources.open_source`; files are fetched where they are read."""
    field = f"{prefix}paths"
    if len(config.paths) != 1:
        raise ConfigError(f"{field}: give one data set as OWNER/NAME, or OWNER/NAME@REVISION.")
    if not download:
        return TextSource([], {}, field)
    (spec,) = config.paths
    repo = hub.find_repository("dataset", spec, cache, field)
    if not any(map(_is_text, repo.files)) and "@" not in spec:
        repo = hub.find_repository("dataset", f"{spec}@{_CONVERTED}", cache, field)
    splits = _splits(repo, config.hub_config, prefix)

    def units(split: str, name: str) -> list[Unit]:
        if not splits.get(split):
            known = ", ".join(sorted(splits)) or "nothing that can be read"
            raise ConfigError(f"{prefix}{name}: {repo.name} has no split {split!r} but {known}.")
        return [_unit(repo, path, config.text_key, prefix) for path in splits[split]]

    held_out, split = {}, config.hub_eval_split
    if split is not None:
        if split == config.hub_split:
            raise ConfigError(
                f"{prefix}hub_eval_split is the split to train on; name another, or None."
            )
        held_out = {held_out_name(split): units(split, "hub_eval_split")}
    notes = [repo.note] if repo.note else []
    used = {path for some in splits.values() for path in some}
    if left := sorted(path for path in repo.files if _is_text(path) and path not in used):
        more = ", ..." if len(left) > 5 else ""
        notes.append(f"{repo.name}: not read are {', '.join(left[:5])}{more}")
    origin = f"{repo.name}@{repo.commit}"
    return TextSource(units(config.hub_split, "hub_split"), held_out, field, notes, origin)


def _readable(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def _is_text(path: str) -> bool:
    return _readable(path) and not _NO_TEXT.fullmatch(path)


def _unit(repo: Repository, path: str, text_key: str, prefix: str) -> Unit:
    size, digest = repo.files[path]
    field, file = f"{prefix}paths", Path()

    def fetch(folder: Path, doing: Doing) -> None:
        nonlocal file
        file = hub.fetch(repo, path, folder, field, doing)

    def read() -> Iterator[tuple[str, int]]:
        return read_documents(epath.Path(file), field, text_key, f"{prefix}text_key")

    stamp = f"hub {repo.name} {path} {digest} {text_key}"
    return Unit(stamp, size, read, f"{repo.name}/{path}", fetch)


def _splits(repo: Repository, config: str | None, prefix: str) -> dict[str, list[str]]:
    """The readable files of each split of a config, by the data set's card or by their names."""
    readable = sorted(filter(_readable, repo.files))
    paths = [path for path in readable if _is_text(path)]
    named = {
        str(c.get("config_name", "default")): c
        for c in repo.configs
        if isinstance(c, dict) and _files(c)
    }
    if not named and paths and all(p.count("/") > 1 for p in paths):  # as in the hub's own copy
        named = {p.split("/")[0]: {"data_dir": p.split("/")[0]} for p in paths}
    if not named:
        if config is not None:
            raise ConfigError(f"{prefix}hub_config: {repo.name} has no configs; leave it out.")
        return _by_name(paths)
    default = [name for name, c in named.items() if c.get("default") or name == "default"]
    choice = config or (default or list(named))[0]
    if choice not in named or (config is None and not default and len(named) > 1):
        known = ", ".join(named)
        raise ConfigError(f"{prefix}hub_config: give one of the configs of {repo.name}: {known}.")
    files = _files(named[choice])
    if not isinstance(files, dict):
        return _by_name(_matching(readable, files), named=True)
    return {split: _matching(readable, patterns) for split, patterns in files.items()}


def _files(config: dict[str, Any]) -> dict[str, list[str]] | list[str]:
    """Patterns of a card's config: by split, or of all its files."""

    def patterns(value: Any) -> list[str]:
        return [value] if isinstance(value, str) else [str(v) for v in value or ()]

    folder = str(config.get("data_dir") or "").strip("/")
    files = config.get("data_files") or f"{folder}/**"
    if isinstance(files, dict):
        return {str(split): patterns(value) for split, value in files.items()}
    if isinstance(files, list) and files and isinstance(files[0], dict):
        return {str(f.get("split")): patterns(f.get("path", ())) for f in files}
    return [] if files == "/**" else patterns(files)


def _by_name(paths: Sequence[str], named: bool = False) -> dict[str, list[str]]:
    """Files by the split that their names tell; all are train where none does.

    Those of kinds that are surely data, unless the card has ``named`` them all.
    """
    out: dict[str, list[str]] = {}
    for path in paths:
        for split, words in _SPLITS.items():
            if re.search(rf"(?<![a-z0-9])({words})(?![a-z0-9])", path.lower()):
                out.setdefault(split, []).append(path)
                break
        else:
            out.setdefault("", []).append(path)
    rest = out.pop("", [])
    if rest and "train" not in out:
        out["train"] = rest
    sure = {split: [p for p in some if p.lower().endswith(_SURE)] for split, some in out.items()}
    return out if named else {split: sure[split] or some for split, some in out.items()}


def _matching(paths: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Paths that one of the patterns of a card matches: ``*`` within a folder, ``**`` any, and
    ``[0-9]`` one of some characters.
    """

    def regex(pattern: str) -> str:
        parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]/]+\])", pattern)
        words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
        words |= {part: part.replace("[!", "[^", 1) for part in parts[1::2] if part[0] == "["}
        return "".join(words.get(part) or re.escape(part) for part in parts)

    return [p for p in paths if any(re.fullmatch(regex(pattern), p) for pattern in patterns)]
