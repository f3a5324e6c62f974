"""Experiment files and command-line overrides: FILE[:variant,...] and --config.a.b=value."""

from __future__ import annotations

import os
import runpy
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import ml_collections
from absl import app, flags

from ngpt_jax import config as config_lib
from ngpt_jax.config import Config, ConfigError

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


def _load_file(spec: str) -> ml_collections.ConfigDict:
    path, _, variants = spec.partition(":")
    if not Path(path).is_file():
        raise ConfigError(f"--config: no file {path!r}; the repository has some in experiments/.")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise ConfigError("it defines no function get_config(variants)")
        return get_config(variants)
    except (
        Exception
    ) as e:  # whatever a user's file raises, the user wants the file's name and one line
        raise ConfigError(
            f"--config={spec}: {str(e).splitlines()[0] if str(e) else repr(e)}"
        ) from e


def _parse_value(text: str, hint: Any, name: str, old: Any) -> Any:
    optional = type(None) in typing.get_args(hint)
    plain = next((a for a in typing.get_args(hint) if a is not type(None)), hint)
    if optional and text == "None":
        return None
    if typing.get_origin(hint) is tuple:
        return (*old, text)
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
      overrides: (dotted name, text); a tuple of strings is replaced by all values given for it.
    """
    values = _load_file(source) if isinstance(source, str) else source
    defaults = {name: (hint, value) for name, hint, value, _ in config_lib.fields(Config())}
    tuples: dict[str, Any] = {}
    for name, text in overrides:
        if name not in defaults:
            hint = config_lib.did_you_mean(name, defaults)
            raise ConfigError(f"Unknown field --config.{name}.{hint} See --help_config.")
        hint, _ = defaults[name]
        value = _parse_value(text, hint, name, tuples.get(name, ()))
        if isinstance(value, tuple):
            tuples[name] = value
        *path, leaf = name.split(".")
        section = values
        for part in path:
            section = section[part]
        section[leaf] = value
    return config_lib.from_config_dict(values)


def describe(config: Config) -> str:
    """Every field of a config with its type, value and meaning, one a line."""
    rows = list(config_lib.fields(config))
    left = [f"config.{name} = {value!r}" for name, _, value, _ in rows]
    width = min(60, max(map(len, left)))
    return "\n".join(
        f"{text:{width}}  # {config_lib.type_name(hint)}: {meaning}"
        for text, (_, hint, _, meaning) in zip(left, rows)
    )


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as e:
        _fail(str(e).splitlines()[0])


def run_command(command: Callable[[list[str], list[tuple[str, str]]], int | None]) -> NoReturn:
    """Runs ``command(arguments, overrides)`` and exits; bad input is told in one line.

    Exit code 2 for a ConfigError or a wrong flag, else what the command returns.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # silences XLA's notes on the CPU
    try:
        rest, overrides = split_overrides(sys.argv)
        app.run(lambda argv: command(argv, overrides), argv=rest, flags_parser=_parse_flags)
    except ConfigError as e:
        _fail(str(e))
    raise AssertionError("app.run exits")
