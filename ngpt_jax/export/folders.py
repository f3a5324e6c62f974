"""Folders that conversions read and write: a run opened for export, output that is whole or not."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ngpt_jax.config import Config, ConfigError
from ngpt_jax.data.tokenizers import Tokenizer
from ngpt_jax.files import is_remote, reason
from ngpt_jax.parallel.mesh import device_mesh
from ngpt_jax.training import opening
from ngpt_jax.training.loop import enable_x64_if_used
from ngpt_jax.training.run import with_tokenizer


class OpenedRun(NamedTuple):
    """A checkpoint of a run; ``config`` is resolved, with the vocabulary filled in."""

    config: Config
    tokenizer: Tokenizer
    params: Any
    step: int


class Imported(NamedTuple):
    """What a run's folder is made of; ``config`` is resolved."""

    config: Config
    params: Any
    tokenizer: Tokenizer


def open_run(path: str, step: int | None, overrides: Sequence[tuple[str, str]]) -> OpenedRun:
    """The run of ``--workdir``, on one device.

    Args:
      path: the folder.
      step: of the checkpoint; None: the newest.
      overrides: (dotted name, text), where the tokenizer lies here, say.

    Raises ConfigError.
    """
    config = opening.read_config("workdir", path, overrides)
    checkpoint = opening.find_checkpoint("workdir", path, step)
    config, tokenizer = with_tokenizer(config)
    enable_x64_if_used(config)
    mesh = device_mesh(config.mesh, jax.devices()[:1])
    params, progress = opening.read_params(path, config, checkpoint, mesh)
    check_tokenizer(f"--workdir={path}", config, tokenizer, progress["tokenizer"])
    return OpenedRun(config, tokenizer, params, int(checkpoint.name))


def check_tokenizer(where: str, config: Config, tokenizer: Tokenizer, saved: str) -> None:
    """Refuses a tokenizer that is not the one that the weights were trained with."""
    if tokenizer.fingerprint != saved:
        raise ConfigError(
            f"{where}: data.tokenizer ({config.data.tokenizer}) is not the one that it was trained"
            f" with ({saved[:8]}, not {tokenizer.fingerprint[:8]}); give that one with"
            " --config.data.tokenizer."
        )


def check_new(flag: str, path: str, remote: bool = False) -> None:
    """Refuses, before work starts, output that is there already or has no place to be."""
    if is_remote(path):
        if not remote:
            raise ConfigError(f"--{flag}={path} must be local; copy it from there.")
        return
    target = Path(path).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        empty = ", and not empty" if target.is_dir() else ""
        raise ConfigError(f"--{flag}={path} is there already{empty}; choose another name.")
    if not target.parent.is_dir():
        raise ConfigError(f"--{flag}={path}: there is no folder {target.parent}.")


@contextlib.contextmanager
def new_output(flag: str, path: str) -> Iterator[Path]:
    """A temporary place beside ``path``, for a file or folder; renamed to it at a good end.

    Raises ConfigError where it cannot be written.
    """
    target = Path(path).expanduser()
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, target)  # an empty folder may be there
    except OSError as e:
        raise ConfigError(f"--{flag}={path} cannot be written: {reason(e)}.") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink() if temporary.is_file() else shutil.rmtree(temporary)
