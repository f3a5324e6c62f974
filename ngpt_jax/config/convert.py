"""The fields of a config as a list, differences of two configs; ConfigDict and JSON."""

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_collections
from ml_collections import config_dict

from ngpt_jax.config.facts import ANY, Allowed, Effect
from ngpt_jax.config.fields import Config, DataConfig, MixtureConfig, Scale
from ngpt_jax.errors import ConfigError

# ------------------------------------------------------------------------------------------ types


def is_optional(type_: Any) -> bool:
    """Whether a field of this type can be None."""
    return type(None) in typing.get_args(type_)


def plain_type(type_: Any) -> Any:
    """float | None -> float, tuple[str, ...] -> tuple."""
    if isinstance(type_, types.UnionType):
        type_ = next(a for a in typing.get_args(type_) if a is not type(None))
    return typing.get_origin(type_) or type_


def type_name(type_: Any, allowed: Allowed = ANY) -> str:
    """What a field takes, in words: "int > 0 or None", "'none', 'rms' or None", "strings"."""
    name = "strings" if plain_type(type_) is tuple else plain_type(type_).__name__
    text = allowed.short if allowed.choices else f"{name} {allowed.short}".rstrip()
    return text + (" or None" if is_optional(type_) else "")


def _entry_type(type_: Any) -> Any:
    """The dataclass of the values of a Mapping, whose keys the user chooses; else None."""
    return typing.get_args(type_)[1] if typing.get_origin(type_) is Mapping else None


# ----------------------------------------------------------------------------------------- fields


class Field(NamedTuple):
    """A field of a config, with its value there and its facts (facts.py)."""

    name: str  # with dots: model.s_z.init
    type: Any
    value: Any
    help: str
    allowed: Allowed
    effect: Effect
    set_by_study: bool
    always_in_digest: bool
    digest_default: Any


def fields(section: Any, prefix: str = "") -> Iterator[Field]:
    """Every field of a config or of one of its sections.

    Args:
      section: the dataclass.
      prefix: of the names, e.g. "data." for a DataConfig.
    """
    for f in dataclasses.fields(section):
        value, name = getattr(section, f.name), prefix + f.name
        if isinstance(value, Scale):
            for field in fields(value, f"{name}."):
                yield field._replace(help=f"{f.metadata['help']}: {field.help}")
        elif dataclasses.is_dataclass(value):
            yield from fields(value, f"{name}.")
        elif _entry_type(f.type):
            for key, entry in value.items():
                yield from fields(entry, f"{name}.{key}.")
        else:
            yield Field(name, f.type, value, **f.metadata)


def field_named(name: str) -> Field | None:
    """The field with this dotted name and its default, or None if there is no such field."""
    in_mixture = re.match(r"data\.mixture\.([^.]+)\.", name)
    mixture = {in_mixture[1]: MixtureConfig()} if in_mixture else {}
    config = Config(data=DataConfig(mixture=mixture))
    return next((f for f in fields(config) if f.name == name), None)


class Difference(NamedTuple):
    """A field in which two configs differ; "not there" is the value in a section that one lacks."""

    field: Field
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field.name}: {self.old!r} -> {self.new!r}"


def differences(a: Any, b: Any) -> list[Difference]:
    """The fields in which two configs differ, with the values in a and b."""
    old, new = ({f.name: f for f in fields(config)} for config in (a, b))
    found = []
    for name, field in (old | new).items():
        values = [side[name].value if name in side else "not there" for side in (old, new)]
        if values[0] != values[1]:
            found.append(Difference(field, *values))
    return found


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?' with the known name that is most like a mistyped one, or ''."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:  # the right leaf in the wrong section
        close = [k for k in known if k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:1]
    return f" Did you mean {close[0]}?" if close else ""


# ------------------------------------------------------------------------------ ConfigDict and JSON


def to_config_dict(section: Any) -> ml_collections.ConfigDict:
    """A locked ConfigDict with the fields of a dataclass; those that are None can still be set."""
    out = ml_collections.ConfigDict()
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            value = to_config_dict(value)
        elif _entry_type(f.type):
            value = ml_collections.ConfigDict({k: to_config_dict(v) for k, v in value.items()})
        elif is_optional(f.type):
            out[f.name] = config_dict.placeholder(plain_type(f.type))
        out[f.name] = value
    return out.lock()


def default_config() -> ml_collections.ConfigDict:
    """The defaults as a locked ConfigDict, for experiment files to edit.

    ``data.mixture`` takes sections under any name, each a dict of fields of MixtureConfig.
    """
    out = to_config_dict(Config())
    out.data.mixture.unlock()
    return out


def build(section: type, values: Any, prefix: str = "") -> Any:
    """A dataclass from a ConfigDict or a nested dict, with names and types checked.

    Args:
      section: the dataclass.
      values: of some fields; the others have their defaults.
      prefix: of names in error messages.

    Raises ConfigError.
    """
    check_section(values, prefix)
    known = {f.name: f.type for f in dataclasses.fields(section)}
    for name in values:
        if name not in known:
            meant = did_you_mean(prefix + name, [prefix + k for k in known])
            raise ConfigError(f"Unknown field {prefix}{name}.{meant}")
    out = {}
    for name, type_ in known.items():
        if name not in values:
            continue
        value, path = values[name], prefix + name
        if entry := _entry_type(type_):
            out[name] = _build_entries(entry, value, path + ".")
        elif dataclasses.is_dataclass(type_):
            out[name] = build(typing.cast(type, type_), value, path + ".")
        else:
            out[name] = _convert(value, type_, path)
    return section(**out)


def check_section(values: Any, prefix: str) -> None:
    """Raises ConfigError for what is no mapping; ``prefix`` is its name with a dot, or empty."""
    if not isinstance(values, Mapping | ml_collections.ConfigDict):
        raise ConfigError(f"{prefix[:-1] or 'A config'} is a section of fields, got {values!r}.")


def _build_entries(entry: type, values: Any, prefix: str) -> dict[str, Any]:
    """Sections under names that the user chose, in alphabetical order."""
    check_section(values, prefix)
    for name in values:
        if not name.isidentifier():
            raise ConfigError(f"{prefix}{name}: a name is made of letters, digits and _.")
    return {name: build(entry, values[name], f"{prefix}{name}.") for name in sorted(values)}


def _convert(value: Any, type_: Any, name: str) -> Any:
    if value is None and is_optional(type_):
        return None
    plain = plain_type(type_)
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if plain is tuple and isinstance(value, list | tuple):
        if bad := [v for v in value if not isinstance(v, str)]:
            raise ConfigError(f"{name} must be strings, got {bad[0]!r}.")
        return tuple(value)
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise ConfigError(f"{name} must be of type {type_name(type_)}, got {value!r}.")
    return value


def to_json(config: Config) -> str:
    """The text of the config.json in a run's folder."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"
