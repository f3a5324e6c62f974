"""The flags of the commands that read text: each field of a source is one."""

import dataclasses
import shlex
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from absl import flags

from ngpt_jax.config import ConfigError, SourceConfig, check_source
from ngpt_jax.config.sources import SOURCES


def _define_flag(name: str, default: Any, meaning: str) -> Any:
    if default == ():
        return flags.DEFINE_multi_string(name, [], meaning)
    if isinstance(default, float):
        return flags.DEFINE_float(name, default, meaning)
    return flags.DEFINE_string(name, default, meaning)


_FLAGS = {
    field.name: _define_flag(field.name, field.default, field.metadata["help"])
    for field in dataclasses.fields(SourceConfig)
}


def text_source() -> SourceConfig:
    """The source of text that the flags name; raises ConfigError."""
    given = {name: flag.value for name, flag in _FLAGS.items()}
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    source = SourceConfig(**given)
    check_source(source, "--", tuple(name for name in SOURCES if name != "bin"))
    if source.token_dtype is not None:
        raise ConfigError("--token_dtype: training reads token ids as they are; leave it out.")
    return source


def training_command(made: str, more: Iterable[str]) -> str:
    """The command that trains on what was made, ready to paste.

    Args:
      made: the file or folder; it names the run.
      more: flags.
    """
    command = ["python", "-m", "ngpt_jax.main", "--config=quickstart"]
    return shlex.join([*command, f"--workdir=runs/{PurePosixPath(made).stem}", *more])


def training_flags(source: SourceConfig) -> list[str]:
    """The flags by which training reads this source."""
    out = []
    for field in dataclasses.fields(source):
        value = getattr(source, field.name)
        if value != field.default:
            many = value if isinstance(value, tuple) else (value,)
            out += [f"--config.data.{field.name}={item}" for item in many]
    return out
