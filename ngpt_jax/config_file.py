"""Experiment files and command-line overrides: FILE[:variant,...] and --config.a.b=value."""

from __future__ import annotations

import errno
import os
import re
import runpy
import sys
import tempfile
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import ml_collections
from absl import app, flags

from ngpt_jax import config as config_lib
from ngpt_jax.config import Config, ConfigError
from ngpt_jax.files import is_remote, reason

Edit = Callable[[ml_collections.ConfigDict], None]


def apply_variants(
    config: ml_collections.ConfigDict, variants: str, known: Mapping[str, Edit]
) -> ml_collections.ConfigDict:
    """Applies each of the comma-separated variants, functions that edit a config, in order."""
    for name in filter(None, variants.split(",")):
        if name not in known:
            raise ConfigError(
                f"Unknown variant {name!r}; known are {', '.join(known)}."
                f"{config_lib.did_you_mean(name, known)}"
            )
        known[name](config)
    return config


def call_in_file(flag: str, spec: str, name: str) -> Any:
    """What ``name(variants)`` of an experiment FILE[:variant,...], given by a flag, returns."""
    path, _, variants = spec.partition(":")
    if not Path(path).is_file():
        raise ConfigError(f"--{flag}: no file {path!r}; the repository has some in experiments/.")
    try:
        function = runpy.run_path(path).get(name)
        if function is None:
            raise ConfigError(f"it defines no function {name}(variants)")
        return function(variants)
    except Exception as e:  # a user's file may raise anything; the user wants one line
        raise ConfigError(f"--{flag}={spec}: {_first_line(e)}") from e


def _load_file(spec: str) -> ml_collections.ConfigDict:
    values = call_in_file("config", spec, "get_config")
    if not isinstance(values, Mapping | ml_collections.ConfigDict):
        raise ConfigError(f"--config={spec}: get_config returns no config (is a return missing?).")
    return values


def _first_line(error: Exception) -> str:
    """What an error says, in short; ml_collections tells of a wrong name in a page."""
    text = str(error.args[0] if error.args else "")
    unknown = re.search(r'instead of "(\w+)"|Key "(\w+)" does not exist', text)
    if unknown:
        names = [part for name, *_ in config_lib.fields(Config()) for part in name.split(".")]
        name = unknown[1] or unknown[2]
        return f"unknown field {name}.{config_lib.did_you_mean(name, names)} See --help_config."
    return text.splitlines()[0] if text else repr(error)


def _parse_value(text: str, hint: Any, name: str, old: Any) -> Any:
    optional = type(None) in typing.get_args(hint)
    plain = next((a for a in typing.get_args(hint) if a is not type(None)), hint)
    if optional and text == "None":
        return None
    if typing.get_origin(hint) is tuple:
        return (*old, text) if text else old
    try:
        if plain is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if plain is int:
            return int(text.replace("_", ""))
        return plain(text)
    except (ValueError, KeyError):
        wanted = config_lib.type_name(plain) + (" or None" if optional else "")
        raise ConfigError(
            f"--config.{name} wants a value of type {wanted}, got {text!r}."
        ) from None


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes ``--config.a.b=value`` (or ``--config.a.b value``) out of a command line.

    Returns:
      The other arguments, and (dotted name, text) for each override.
    """
    rest, overrides = [], []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not name.startswith(("--config.", "-config.")):
            rest.append(argument)
            continue
        if not equals:
            text = next(arguments, "")
            if not text or text.startswith("--"):
                raise ConfigError(f"{name} needs a value: {name}=value.")
        overrides.append((name.split(".", 1)[1], text))
    return rest, overrides


def load_config(
    source: str | ml_collections.ConfigDict, overrides: Sequence[tuple[str, str]] = ()
) -> Config:
    """The resolved Config of an experiment with overrides, later ones winning.

    Args:
      source: FILE[:variant,...], or the ConfigDict itself.
      overrides: (dotted name, text); a tuple of strings is replaced by all values given for it,
        an empty text is none.
    """
    values = _load_file(source) if isinstance(source, str) else source
    known = [name for name, *_ in config_lib.fields(Config())]
    tuples: dict[str, Any] = {}
    for name, text in overrides:
        hint = config_lib.field_hint(name)
        if hint is None:
            meant = config_lib.did_you_mean(name, known)
            raise ConfigError(f"Unknown field --config.{name}.{meant} See --help_config.")
        value = _parse_value(text, hint, name, tuples.get(name, ()))
        if isinstance(value, tuple):
            tuples[name] = value
        *path, leaf = name.split(".")
        section: Any = values
        for part in path:
            if part not in section:
                section[part] = {}
            section = section[part]
        section[leaf] = value
    return config_lib.from_config_dict(values)


def describe(config: Config) -> str:
    """Every field of a config with its value, type, meaning and default, one a line."""
    rows = list(config_lib.fields(config))
    defaults = {name: value for name, _, value, _ in config_lib.fields(Config())}
    left = [f"config.{name} = {value!r}" for name, _, value, _ in rows]
    width = min(60, max(map(len, left)))
    lines = []
    for text, (name, hint, value, meaning) in zip(left, rows):
        default = "" if value == defaults.get(name, value) else f" (default: {defaults[name]!r})"
        lines.append(f"{text:{width}}  # {config_lib.type_name(hint)}: {meaning}{default}")
    return "\n".join(lines)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as e:
        _fail(str(e).splitlines()[0])


def check_output(**files: str | None) -> None:
    """Refuses, before work starts, a file to be written (by flag) whose folder is not there."""
    for flag, file in files.items():
        if file and not Path(file).parent.is_dir():
            raise ConfigError(f"--{flag}={file}: there is no folder {Path(file).parent}.")


def output_folder(workdir: str, out: str | None, name: str) -> Path:
    """The folder of results about a run, made: --out, or WORKDIR/name by default."""
    if out is None and is_remote(workdir):
        raise ConfigError(f"--out is needed: results cannot be written to {workdir}.")
    folder = Path(out or Path(workdir) / name).expanduser()
    check_output(out=str(folder))
    try:
        folder.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise ConfigError(f"--out={folder} cannot be written: {reason(e)}.") from e
    return folder


def run_command(command: Callable[[list[tuple[str, str]]], int | None]) -> NoReturn:
    """Parses flags, runs ``command(overrides)`` and exits; bad input is told in one line.

    Exit code 2 for a ConfigError or a wrong flag, else what the command returns.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # silences XLA's notes on the CPU

    def checked(argv: list[str]) -> int | None:
        if len(argv) > 1:
            raise ConfigError(f"Unexpected argument {argv[1]!r}; options begin with --.")
        return command(overrides)

    try:
        rest, overrides = split_overrides(sys.argv)
        app.run(checked, argv=rest, flags_parser=_parse_flags)
    except ConfigError as e:
        _fail(str(e))
    except OSError as e:
        if e.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
            raise
        # What is said goes nowhere from here on: its flush at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if e.errno == errno.EPIPE:  # nobody reads it any more: `| head`
            sys.exit(1)
        _fail(f"{reason(e)}{'' if e.filename is None else f': {e.filename}'}.")
    raise AssertionError("app.run exits")
