"""What conversions read, and how they write: complete output, or none."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ngpt_jax.config import Config, ConfigError
from ngpt_jax.data.tokenizers.base import Tokenizer
from ngpt_jax.files import is_remote, reason


class Imported(NamedTuple):
    """The content of a run's folder, read from another format; ``config`` is resolved."""

    config: Config
    params: Any
    tokenizer: Tokenizer


def check_new(flag: str, path: str, remote: bool = False) -> None:
    """Refuses, before work starts, a path that is in use already or has no parent folder."""
    if is_remote(path):
        if not remote:
            raise ConfigError(f"--{flag}={path} must be a local path; copy the output yourself.")
        return
    target = Path(path).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        empty = ", and not empty" if target.is_dir() else ""
        raise ConfigError(f"--{flag}={path} exists already{empty}; choose another name.")
    if not target.parent.is_dir():
        raise ConfigError(f"--{flag}={path}: there is no folder {target.parent}.")


@contextlib.contextmanager
def new_output(flag: str, path: str) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` for a file or folder, and renames it on success.

    Raises ConfigError where the output cannot be written.
    """
    target = Path(path).expanduser()
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, target)  # which may be an empty folder
    except OSError as e:
        raise ConfigError(f"--{flag}={path} cannot be written: {reason(e)}.") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink() if temporary.is_file() else shutil.rmtree(temporary)
