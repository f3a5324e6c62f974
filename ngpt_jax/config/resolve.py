"""The configuration of a run: from a ConfigDict to checked dataclasses, and back.

Experiment files build an ``ml_collections.ConfigDict`` with :func:`default_config`, the
command line overrides single fields, and :func:`from_config_dict` turns the result into
the typed, checked :class:`Config` that the rest of the program reads.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from ngpt_jax.config.fields import (
    SCALES,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Scale,
    SourceConfig,
)
from ngpt_jax.config.presets import PRESETS, fill_in
from ngpt_jax.errors import ConfigError

# --------------------------------------------------------------------- ConfigDict and back


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _is_optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _plain_type(hint: Any) -> Any:
    """float | None -> float, tuple[str, ...] -> tuple."""
    if isinstance(hint, types.UnionType):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    return typing.get_origin(hint) or hint


def entry_type(hint: Any) -> type | None:
    """The dataclass of the entries of a field that maps free names to sections, else None."""
    if typing.get_origin(hint) is Mapping:
        return typing.get_args(hint)[1]
    return None


def field_hint(name: str) -> Any:
    """The type of a field by its dotted name, None where there is no such field."""
    hint: Any = Config
    for part in name.split("."):
        if entry := entry_type(hint):
            hint = entry
        elif dataclasses.is_dataclass(hint):
            hint = _hints(typing.cast(type, hint)).get(part)
        else:
            return None
    return None if entry_type(hint) or dataclasses.is_dataclass(hint) else hint


def type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """A locked ConfigDict with the fields of a dataclass; None fields can still be set."""
    out = ml_collections.ConfigDict()
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            out[name] = to_config_dict(value)
        elif entry_type(hint):
            out[name] = ml_collections.ConfigDict({k: to_config_dict(v) for k, v in value.items()})
        elif _is_optional(hint):
            out[name] = config_dict.placeholder(_plain_type(hint))
            out[name] = value
        else:
            out[name] = value
    return out.lock()


def default_config() -> ml_collections.ConfigDict:
    """The defaults as a locked ConfigDict, for experiment files to edit.

    ``data.mixture`` takes sections under any name, each a dict of fields of MixtureConfig.
    """
    out = to_config_dict(Config())
    out.data.mixture.unlock()
    return out


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    """' Did you mean ...?' for a mistyped name, or the empty string."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:  # the right leaf in the wrong section
        close = [k for k in known if k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:1]
    return f" Did you mean {close[0]}?" if close else ""


def _convert(value: Any, hint: Any, name: str) -> Any:
    if value is None and _is_optional(hint):
        return None
    plain = _plain_type(hint)
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if plain is tuple and isinstance(value, list | tuple):
        if bad := [v for v in value if not isinstance(v, str)]:
            raise ConfigError(f"{name} must be strings, got {bad[0]!r}.")
        return tuple(value)
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise ConfigError(f"{name} must be of type {type_name(hint)}, got {value!r}.")
    return value


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    hints = _hints(cls)
    for name in values:
        if name not in hints:
            known = [prefix + h for h in hints]
            raise ConfigError(f"Unknown field {prefix}{name}.{did_you_mean(prefix + name, known)}")
    out: dict[str, Any] = {}
    for name, hint in hints.items():
        if name not in values:
            continue
        value = values[name]
        entry = entry_type(hint)
        is_section = entry or dataclasses.is_dataclass(hint)
        if is_section and not isinstance(value, Mapping | ml_collections.ConfigDict):
            raise ConfigError(f"{prefix}{name} is a section of fields, got {value!r}.")
        if entry:
            out[name] = _build_entries(entry, value, f"{prefix}{name}.")
        elif dataclasses.is_dataclass(hint):
            out[name] = _build(typing.cast(type, hint), value, f"{prefix}{name}.")
        else:
            out[name] = _convert(value, hint, prefix + name)
    return cls(**out)


def _build_entries(cls: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Sections under names of the user's."""
    for name, value in values.items():
        if not name.isidentifier():
            raise ConfigError(f"{prefix}{name}: a name is made of letters, digits and _.")
        if not isinstance(value, Mapping | ml_collections.ConfigDict):
            raise ConfigError(f"{prefix}{name} is a section of fields, got {value!r}.")
    return {name: _build(cls, values[name], f"{prefix}{name}.") for name in sorted(values)}


def from_config_dict(values: Mapping[str, Any] | ml_collections.ConfigDict) -> Config:
    """Typed config from a ConfigDict or a nested dict; raises ConfigError."""
    return resolve(_build(Config, values, ""))


def from_saved(text: str) -> Config:
    """The config of a run from its config.json; raises ValueError, AttributeError or TypeError.

    Those written before kinds were presets have optimizer.project=true for GPT, which did nothing.
    """
    values = json.loads(text)
    if "residual" not in values["model"] and values["model"]["kind"] == "gpt":
        values["optimizer"]["project"] = None
    return from_config_dict(values)


def fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """(dotted name, type, value, meaning) of every field below a config dataclass."""
    hints = _hints(type(config))
    for f in dataclasses.fields(config):
        value, name = getattr(config, f.name), prefix + f.name
        if dataclasses.is_dataclass(value):
            above = "" if isinstance(value, Scale) is False else f.metadata["help"] + ": "
            for n, t, v, meaning in fields(value, name + "."):
                yield n, t, v, above + meaning
        elif entry_type(hints[f.name]):
            for key, entry in value.items():
                yield from fields(entry, f"{name}.{key}.")
        else:
            yield name, hints[f.name], value, f.metadata["help"]


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def differences(a: Any, b: Any) -> list[str]:
    """'name: value in a -> value in b' for each field in which two configs differ."""
    old, new = ({name: value for name, _, value, _ in fields(c)} for c in (a, b))
    missing = "not there"  # a section under a name of the user's
    return [
        f"{name}: {old.get(name, missing)!r} -> {new.get(name, missing)!r}"
        for name in {**old, **new}
        if name not in old or name not in new or old[name] != new[name]
    ]


# --------------------------------------------------------------------- derived and checked


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    _require(
        value in known,
        f"{name} must be one of {', '.join(known)}, got {value!r}.{did_you_mean(value, known)}",
    )


def resolve(config: Config) -> Config:
    """Checks every field and fills in those that follow from others."""
    m, o, d, t = config.model, config.optimizer, config.data, config.train
    _one_of("model.kind", m.kind, tuple(PRESETS))
    for name, known in _CHOICES.items():
        value = getattr(m, name)
        if value is not None:
            _one_of(f"model.{name}", value, known)
    for name in SCALES:
        form = getattr(m, name).form
        if form is not None:
            _one_of(f"model.{name}.form", form, ("none", "vector"))
    _one_of("model.dtype", m.dtype, ("float32", "bfloat16", "float64"))
    _one_of("model.param_dtype", m.param_dtype, ("float32", "bfloat16", "float64"))
    _one_of("model.remat", m.remat, ("none", "attention", "dots", "full"))
    _one_of("model.attention", m.attention, ("auto", "splash", "cudnn", "xla"))
    _one_of("runtime.xla_flags", config.runtime.xla_flags, ("overlap", "none"))
    _one_of("optimizer.schedule", o.schedule, ("cosine", "wsd", "constant"))
    _one_of("data.packing", d.packing, ("concatenate", "best_fit"))
    _one_of("checkpoint.on_error", config.checkpoint.on_error, ("stop", "continue"))
    for name, _, value, _ in fields(config):
        leaf = name.rsplit(".", 1)[-1]
        if isinstance(value, float):
            _require(math.isfinite(value), f"{name} must be finite, got {value}.")
        if leaf in _POSITIVE and value is not None:
            _require(value > 0, f"{name} must be positive, got {value}.")
        if leaf in _NOT_NEGATIVE and value is not None:
            _require(value >= 0, f"{name} must not be negative, got {value}.")
    for name in ("final_fraction", "decay_fraction"):
        value = getattr(o, name)
        _require(0 <= value <= 1, f"optimizer.{name} must lie in [0, 1], got {value}.")
    for name in ("b1", "b2"):
        value = getattr(o, name)
        _require(0 <= value < 1, f"optimizer.{name} must lie in [0, 1), got {value}.")
    _require(d.seed >= 0, f"data.seed must not be negative, got {d.seed}.")
    _require(bool(d.cache), "data.cache must name a folder.")
    _check_data(d)

    mesh = dataclasses.asdict(config.mesh)
    for name, size in mesh.items():
        _require(size > 0 or size == -1, f"mesh.{name} must be positive or -1, got {size}.")
    _require(
        list(mesh.values()).count(-1) <= 1,
        "Only one of mesh.data, mesh.fsdp, mesh.tensor, mesh.context can be -1 (the rest).",
    )
    _require(
        t.batch_size % t.accumulate == 0,
        f"train.batch_size = {t.batch_size} is not divisible by train.accumulate = {t.accumulate}.",
    )

    kv_heads = m.kv_heads or m.heads
    _require(
        m.head_dim is not None or m.width % m.heads == 0,
        f"model.width = {m.width} is not divisible by model.heads = {m.heads};"
        " change one of them, or set model.head_dim.",
    )
    head_dim = m.head_dim or m.width // m.heads
    _require(
        head_dim % 2 == 0,
        f"model.head_dim = {head_dim} must be even: RoPE rotates pairs of channels.",
    )
    _require(
        m.heads % kv_heads == 0,
        f"model.heads = {m.heads} is not divisible by model.kv_heads = {kv_heads}.",
    )
    tokens_per_step = t.batch_size * m.context
    _require(
        t.steps is not None or t.tokens is not None,
        "Give the length of the run: train.steps or train.tokens.",
    )
    from_tokens = -(-t.tokens // tokens_per_step) if t.tokens is not None else None
    _require(
        t.steps is None or from_tokens in (None, t.steps),
        f"train.steps = {t.steps} and train.tokens = {t.tokens} ({from_tokens} steps) disagree;"
        " set one of them to None.",
    )
    steps = t.steps if t.steps is not None else typing.cast(int, from_tokens)
    _require(steps > 0, f"train.tokens must be positive, got {t.tokens}.")
    train = dataclasses.replace(t, steps=steps)

    if o.warmup_share is not None:
        _require(
            0 <= o.warmup_share < 1,
            f"optimizer.warmup_share must lie in [0, 1), got {o.warmup_share}.",
        )
        share = round(o.warmup_share * steps)
        _require(
            o.warmup_steps in (None, share),
            f"optimizer.warmup_steps = {o.warmup_steps} and warmup_share = {o.warmup_share}"
            f" ({share} steps) disagree; set one of them to None.",
        )
        o = dataclasses.replace(o, warmup_steps=share)
    config = fill_in(dataclasses.replace(config, train=train, optimizer=o))
    m, o = config.model, config.optimizer
    _require(
        o.schedule == "constant" or typing.cast(int, o.warmup_steps) < steps,
        f"optimizer.warmup_steps = {o.warmup_steps} must be below the {steps} steps of the run.",
    )
    _check_choices(m, o)
    scales = {
        name: dataclasses.replace(getattr(m, name), scale=getattr(m, name).scale or m.width**-0.5)
        for name in SCALES
    }
    model = dataclasses.replace(
        m, kv_heads=kv_heads, head_dim=head_dim, mlp_width=m.mlp_width or 4 * m.width, **scales
    )
    evaluation = dataclasses.replace(config.eval, batch_size=config.eval.batch_size or t.batch_size)
    return dataclasses.replace(config, model=model, eval=evaluation)


_CHOICES = {
    "residual": ("add", "lerp", "slerp"),
    "pre_norm": ("none", "rms"),
    "branch_norm": ("none", "unit"),
    "final_norm": ("none", "rms"),
    "qk_form": ("rms_before_rope", "unit_after_rope"),
    "softmax_scale": ("sqrt", "rsqrt"),
    "weights": ("free", "sphere"),
}


def _check_choices(m: ModelConfig, o: OptimizerConfig) -> None:
    """Refuses choices, the kind's filled in, that do not go together."""
    for name in ("alpha_a", "alpha_m"):
        form = getattr(m, name).form
        _require(
            (form == "none") == (m.residual == "add"),
            f"model.{name}.form = {form} does not go with model.residual = {m.residual}: add has no"
            " alpha, the others need one.",
        )
    _require(
        m.residual != "slerp" or m.branch_norm == "unit",
        "model.residual = slerp needs model.branch_norm = unit: it turns h towards a unit vector.",
    )
    for name, wanted in (
        ("optimizer.project", o.project),
        ("model.normalize_on_read", m.normalize_on_read),
    ):
        _require(
            m.weights == "sphere" or not wanted,
            f"{name} needs model.weights = sphere, not {m.weights}; leave it out.",
        )
    scaled = any(getattr(m, name).form != "none" for name in ("s_qk", "s_u", "s_v", "s_z"))
    _require(
        not m.folded or (scaled and not m.normalize_on_read),
        "model.folded needs scales to fold (s_qk, s_u, s_v or s_z) and no normalize_on_read.",
    )


SOURCES = ("stdlib", "text", "tfds", "array_record", "bin")


def _check_data(data: DataConfig) -> None:
    if data.source != "mixture":
        _require(not data.mixture, f"data.mixture is for data.source=mixture, not {data.source}.")
        check_source(data, "data", (*SOURCES, "mixture"))
        return
    _require(
        bool(data.mixture),
        "data.source=mixture needs sources, e.g. --config.data.mixture.web.source=text"
        " --config.data.mixture.web.paths=web.jsonl --config.data.mixture.web.weight=0.7",
    )
    for name, _, value, _ in fields(SourceConfig(source="mixture")):
        _require(
            getattr(data, name) == value,
            f"data.{name} is not read where data.source=mixture; set data.mixture.NAME.{name}"
            f"{_taken_back(f'data.{name}', value)}.",
        )
    for name, source in data.mixture.items():
        check_source(source, f"data.mixture.{name}", SOURCES)


def _taken_back(name: str, value: Any) -> str:
    """How a list that an experiment file gives is emptied on the command line."""
    return f" (--config.{name}= empties it)" if isinstance(value, tuple) else ""


def check_source(s: SourceConfig, prefix: str, known: tuple[str, ...]) -> None:
    """Refuses fields that do not belong together, and those that the source does not read."""
    _one_of(f"{prefix}.source", s.source, known)
    _require(0 < s.held_out < 1, f"{prefix}.held_out must lie between 0 and 1, got {s.held_out}.")
    if s.token_dtype is not None:
        _one_of(f"{prefix}.token_dtype", s.token_dtype, ("uint16", "uint32"))
    given = {name for name, _, value, _ in fields(SourceConfig()) if getattr(s, name) != value}
    reads = {
        "stdlib": "held_out",
        "text": "paths eval_paths text_key held_out",
        "tfds": "paths text_key held_out tfds_name tfds_split tfds_eval_split",
        "array_record": "paths eval_paths held_out token_dtype",
        "bin": "paths eval_paths held_out token_dtype",
    }
    for name in sorted(given - {"source", *reads[s.source].split()}):
        readers = ", ".join(source for source, names in reads.items() if name in names.split())
        raise ConfigError(
            f"{prefix}.{name} is for {prefix}.source={readers}, not {s.source}; leave it out"
            f"{_taken_back(f'{prefix}.{name}', getattr(s, name))}, or change the source."
        )
    example = {"text": "book.txt", "array_record": "DIR", "bin": "train.bin"}.get(s.source)
    if example is not None:
        _require(
            bool(s.paths),
            f"{prefix}.source={s.source} needs {prefix}.paths, e.g."
            f" --config.{prefix}.paths={example}",
        )
    if s.source == "tfds":
        _require(
            bool(s.paths or s.tfds_name) and len(s.paths) < 2,
            f"{prefix}.source=tfds needs {prefix}.tfds_name, or the folder of one data set in"
            f" {prefix}.paths, or both.",
        )
    for item in s.eval_paths:
        _require(
            "=" in item,
            f"{prefix}.eval_paths must be name=path, got {item!r}, e.g. val=held_out.txt",
        )


_POSITIVE = frozenset(
    "layers width heads kv_heads head_dim mlp_width context vocab_size vocab_multiple rope_base"
    " init_std scale loss_chunk learning_rate eps threads prefetch steps batch_size batches"
    " every keep keep_every accumulate max_skipped weight".split()
)
_NOT_NEGATIVE = frozenset(
    "rms_eps warmup_steps weight_decay clip_norm clip_eps temperature tokens"
    " hang_seconds first_step num_steps workers minutes keep_best spike_deviations".split()
)
