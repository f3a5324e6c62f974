"""Experiment files and command-line overrides: FILE[:variant,...] and --config.a.b=value."""

from __future__ import annotations

import re
import runpy
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from ngpt_jax.config import resolve
from ngpt_jax.config.fields import Config
from ngpt_jax.errors import ConfigError

Edit = Callable[[ml_collections.ConfigDict], None]


def apply_variants(
    config: ml_collections.ConfigDict, variants: str, known: Mapping[str, Edit]
) -> ml_collections.ConfigDict:
    """Applies each of the comma-separated variants, functions that edit a config, in order."""
    for name in filter(None, variants.split(",")):
        if name not in known:
            raise ConfigError(
                f"Unknown variant {name!r}; known are {', '.join(known)}."
                f"{resolve.did_you_mean(name, known)}"
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
        names = [part for name, *_ in resolve.fields(Config()) for part in name.split(".")]
        name = unknown[1] or unknown[2]
        return f"unknown field {name}.{resolve.did_you_mean(name, names)} See --help_config."
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
        wanted = resolve.type_name(plain) + (" or None" if optional else "")
        raise ConfigError(
            f"--config.{name} wants a value of type {wanted}, got {text!r}."
        ) from None


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
    known = [name for name, *_ in resolve.fields(Config())]
    tuples: dict[str, Any] = {}
    for name, text in overrides:
        hint = resolve.field_hint(name)
        if hint is None:
            meant = resolve.did_you_mean(name, known)
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
    return resolve.from_config_dict(values)


def describe(config: Config) -> str:
    """Every field of a config with its value, type, meaning and default, one a line."""
    rows = list(resolve.fields(config))
    defaults = {name: value for name, _, value, _ in resolve.fields(Config())}
    left = [f"config.{name} = {value!r}" for name, _, value, _ in rows]
    width = min(60, max(map(len, left)))
    lines = []
    for text, (name, hint, value, meaning) in zip(left, rows):
        default = "" if value == defaults.get(name, value) else f" (default: {defaults[name]!r})"
        lines.append(f"{text:{width}}  # {resolve.type_name(hint)}: {meaning}{default}")
    return "\n".join(lines)
