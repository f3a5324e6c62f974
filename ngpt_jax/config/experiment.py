"""Experiment files and command-line overrides: FILE[:variant,...] and --config.a.b=value."""

import contextlib
import copy
import importlib
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ml_collections

from ngpt_jax.config import convert
from ngpt_jax.config.fields import Config
from ngpt_jax.config.presets import PRESETS
from ngpt_jax.config.resolve import from_config_dict
from ngpt_jax.errors import ConfigError

_T = TypeVar("_T")
Edit = Callable[[ml_collections.ConfigDict], None]


def apply_variants(
    config: ml_collections.ConfigDict, variants: str, known: Mapping[str, Edit]
) -> ml_collections.ConfigDict:
    """Edits a config by variants in their order, and returns it.

    Args:
      config: edited in place.
      variants: names, separated by commas.
      known: a function that edits a config, for each name.
    """
    for name in names_of(variants):
        variant(name, known)(config)
    return config


def names_of(variants: str) -> list[str]:
    """The variants of FILE:variant,..."""
    return [name for name in variants.split(",") if name]


def run_name(spec: str) -> str:
    """FILE-variant-..., the name of a folder for FILE[:variant,...]."""
    path, variants = split_spec(spec)
    return "-".join([Path(path).stem, *names_of(variants)])


def variant(name: str, known: Mapping[str, _T]) -> _T:
    """What ``known`` has under the name of a variant, "" for none; raises ConfigError."""
    if name not in known:
        raise ConfigError(
            f"Unknown variant {name!r}; known are {', '.join(filter(None, known))}."
            f"{convert.did_you_mean(name, known)}"
        )
    return known[name]


def one_run_of_many(config: ml_collections.ConfigDict) -> None:
    """For the small runs of a study: evaluated at the end alone, saved by the clock, no sample."""
    config.eval.every = 1_000_000
    config.checkpoint.every = 1_000_000
    config.checkpoint.minutes = 3.0
    config.checkpoint.keep = 1
    config.log.every = 50
    config.sample.tokens = 0


def split_spec(spec: str) -> tuple[str, str]:
    """The path and the variants of FILE[:variant,...]; the path may have a ":" too."""
    path, colon, variants = spec.rpartition(":")
    whole = not colon or re.search(r"/|\.py$", variants) or Path(spec).is_file()
    return (spec, "") if whole else (path, variants)


def shipped() -> dict[str, str]:
    """The experiments that come with the package: files by their short names."""
    package = Path(__file__).parents[1]
    # A clone that is not installed has them beside the package.
    folder = next(
        (f for f in (package / "experiments", package.parent / "experiments") if f.is_dir()),
        package,
    )
    files = sorted(folder.glob("*.py"))
    return {file.stem: str(file) for file in files if "get_config" in file.read_text("utf-8")}


def file_and_variants(spec: str) -> tuple[str, str]:
    """:func:`split_spec`, with the file of a short name."""
    path, variants = split_spec(spec)
    return shipped().get(path, path), variants


@contextlib.contextmanager
def _siblings_importable(path: str) -> Iterator[None]:
    """Lets a file import the files beside it, as ``python FILE`` does.

    These modules are forgotten afterwards: another folder may have others under the same names.
    """
    folder, known = os.path.dirname(os.path.realpath(path)), set(sys.modules)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()  # it may have been written a moment ago
    try:
        yield
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - known:
            top = name.partition(".")[0]  # installed packages may lie below the folder, but deeper
            files = [os.path.join(folder, f"{top}{end}") for end in (".py", "/__init__.py")]
            if top not in known and any(map(os.path.exists, files)):
                del sys.modules[name]


def call_in_file(flag: str, spec: str, name: str) -> Any:
    """Calls the function ``name(variants)`` of an experiment file and returns its result.

    Args:
      flag: that the file was given by, for error messages.
      spec: FILE[:variant,...].
      name: of the function: get_config or get_study.

    Raises ConfigError.
    """
    path, variants = file_and_variants(spec)
    if not Path(path).is_file():
        names = ", ".join(shipped())
        raise ConfigError(f"--{flag}: no file {path!r}; give one, or a name: {names}.")
    try:
        with _siblings_importable(path):
            function = runpy.run_path(path).get(name)
            if function is None:
                raise ConfigError(f"it defines no function {name}(variants)")
            return function(variants)
    except Exception as e:  # a file of the user's can raise anything
        raise ConfigError(f"--{flag}={spec}: {_first_line(e)}") from e


def _first_line(error: Exception) -> str:
    """The message of an error in one line; that of ml_collections about a wrong name is a page."""
    text = str(error.args[0] if error.args else "")
    unknown = re.search(r'instead of "(\w+)"|Key "(\w+)" does not exist', text)
    if unknown:
        names = [part for f in convert.fields(Config()) for part in f.name.split(".")]
        name = unknown[1] or unknown[2]
        return f"unknown field {name}.{convert.did_you_mean(name, names)} See --help_config."
    return text.splitlines()[0] if text else repr(error)


def _parse_value(text: str, type_: Any, name: str, old: Any) -> Any:
    plain = convert.plain_type(type_)
    if convert.is_optional(type_) and text in ("None", "auto"):
        return None
    if plain is tuple:
        return () if text == "None" else (*old, text)
    try:
        if plain is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if plain is int:
            return int(text.replace("_", ""))
        return plain(text)
    except (ValueError, KeyError):
        raise ConfigError(
            f"--config.{name} wants a value of type {convert.type_name(type_)}, got {text!r}."
        ) from None


def load_config(
    source: str | ml_collections.ConfigDict, overrides: Sequence[tuple[str, str]] = ()
) -> Config:
    """The resolved config of an experiment with overrides; raises ConfigError.

    Args:
      source: FILE[:variant,...], or the ConfigDict itself.
      overrides: (dotted name, text) pairs; of two for one field the last one counts. For a field
        of several strings, each pair adds one, and None removes all.
    """
    values = call_in_file("config", source, "get_config") if isinstance(source, str) else source
    if not isinstance(values, Mapping | ml_collections.ConfigDict):
        raise ConfigError(
            f"--config={source}: get_config returns no config (is a return missing?)."
        )
    values = copy.deepcopy(values)  # references within stay references
    with contextlib.ExitStack() as stack:
        if isinstance(values, ml_collections.ConfigDict):  # which refuses 0.1 in place of 0
            stack.enter_context(values.ignore_type())
            stack.enter_context(values.unlocked())
        _override(values, overrides)
    return from_config_dict(values)


def _override(values: Any, overrides: Sequence[tuple[str, str]]) -> None:
    tuples: dict[str, Any] = {}
    for name, text in overrides:
        field = convert.field_named(name)
        if field is None:
            meant = convert.did_you_mean(name, [f.name for f in convert.fields(Config())])
            raise ConfigError(f"Unknown field --config.{name}.{meant} See --help_config.")
        value = _parse_value(text, field.type, name, tuples.get(name, ()))
        if isinstance(value, tuple):
            tuples[name] = value
        *path, leaf = name.split(".")
        section = values
        for depth, part in enumerate(path, start=1):
            if part not in section:
                section[part] = {}
            section = section[part]
            convert.check_section(section, ".".join(path[:depth]) + ".")
        section[leaf] = value


def load_pair(spec: str, overrides: Sequence[tuple[str, str]]) -> dict[str, Config]:
    """nGPT of an experiment, and GPT as its variant gpt has it, as :func:`load_config`."""
    path, variants = split_spec(spec)
    names = names_of(variants)
    if "gpt" in names:
        raise ConfigError("--config: leave out the variant gpt; both models are trained.")
    specs = {"ngpt": spec, "gpt": f"{path}:{','.join([*names, 'gpt'])}"}
    configs = {kind: load_config(spec, overrides) for kind, spec in specs.items()}
    for kind, config in configs.items():
        if config.model.kind != kind:
            raise ConfigError(
                f"model.kind: {specs[kind]} is {config.model.kind}, not {kind}; leave the field out"
                " of the flags: both models are trained."
            )
    return configs


def describe(config: Config) -> str:
    """Every field of a config with its value, allowed values, meaning and default, one per line."""
    defaults = {f.name: f.value for f in convert.fields(Config())}
    left = {f"config.{f.name} = {f.value!r}": f for f in convert.fields(config)}
    width = min(60, max(map(len, left)))
    lines = []
    for text, f in left.items():
        meaning = f.help + ("; None: the kind's" if f.name in PRESETS[config.model.kind] else "")
        changed = f.value != defaults.get(f.name, f.value)
        default = f" (default: {defaults[f.name]!r})" if changed else ""
        kind = convert.type_name(f.type, f.allowed)
        lines.append(f"{text:{width}}  # {kind}: {meaning}{default}")
    return "\n".join(lines)
