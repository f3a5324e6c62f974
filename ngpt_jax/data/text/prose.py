"""English prose that everybody can make again: speeches and documentation from two packages.

``python -m ngpt_jax.data.corpora prose`` makes it, with the bytes that ``SHA256`` names.
"""

import functools
import hashlib
import shlex
from pathlib import Path

from etils import epath

from ngpt_jax.config import ConfigError, DataConfig, SourceConfig
from ngpt_jax.data.list_files import parse_path, real_path, stamp
from ngpt_jax.data.text.text_files import read_documents
from ngpt_jax.data.text.units import TextSource, Unit
from ngpt_jax.files import is_remote, reason

# Files of the corpus: the first one is to train on, the others are held-out sets.
FILES = ("train.jsonl", "speeches.jsonl", "documentation.jsonl")
SHA256 = "8359e7e2b6a0db3ec0c1a1d794db64e72a8cd1449aa5d102ab5df36863e89e52"
SHA256_FILE = "sha256.txt"


def open_prose(config: SourceConfig, prefix: str, download: bool, cache: str) -> TextSource:
    """As :func:`ngpt_jax.data.text.sources.open_source`; a missing corpus is refused."""
    field = f"{prefix}paths" if config.paths else f"{prefix}source"
    if len(config.paths) > 1 or any(map(is_remote, config.paths)):
        raise ConfigError(f"{field}: give the one folder of this machine that data.corpora made.")
    folder = Path(parse_path(config.paths[0], field)) if config.paths else usual_folder(cache)
    _check_made(folder, field)

    def unit(name: str) -> Unit:
        file = epath.Path(folder / name)
        read = functools.partial(read_documents, file, field, "text", field)
        return Unit(f"{SHA256} {name}", file.stat().length, read, real_path(file))

    train, *held_out = FILES
    sets = {name.removesuffix(".jsonl"): [unit(name)] for name in held_out}
    return TextSource([unit(train)], sets, field)


def usual_folder(cache: str | None = None) -> Path:
    """Where the corpus lies, unless data.paths names another folder: in data.cache."""
    return Path(cache or DataConfig().cache).expanduser() / "prose"


def _check_made(folder: Path, field: str) -> None:
    """Raises ConfigError where the folder has not the very corpus of this version."""
    out = "" if folder == usual_folder() else f" --out={shlex.quote(str(folder))}"
    mend = f"python -m ngpt_jax.data.corpora prose{out}"
    if field.endswith("paths"):
        mend += f", or leave {field} out"
    if not (folder / SHA256_FILE).exists():
        raise ConfigError(f"{field}: there is no corpus in {str(folder)!r}; make it once: {mend}")
    try:
        digest = _digest(tuple(stamp(epath.Path(folder / name)) for name in FILES), folder)
    except OSError as e:
        raise ConfigError(f"{field}: {e.filename} cannot be read: {reason(e)}; {mend}") from e
    if digest != SHA256:
        raise ConfigError(f"{field}: {str(folder)!r} is another corpus; make it anew: {mend}")


@functools.cache  # a study asks for each of its models
def _digest(stamps: tuple[str, ...], folder: Path) -> str:
    """sha256 of the files, one after the other; ``stamps`` change when they do."""
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in FILES)).hexdigest()
