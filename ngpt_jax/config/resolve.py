"""Checks of a config, and the values that follow from others.

Experiment files build an ``ml_collections.ConfigDict``, the command line overrides single fields,
and :func:`from_config_dict` turns the result into the checked, frozen :class:`Config` that the
rest of the program reads.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import ml_collections

from ngpt_jax.config.convert import build, did_you_mean, fields
from ngpt_jax.config.facts import Allowed, one_of
from ngpt_jax.config.fields import (
    SCALES,
    Config,
    DataConfig,
    ModelConfig,
    SourceConfig,
)
from ngpt_jax.config.optimizer import OptimizerConfig
from ngpt_jax.config.presets import PRESETS, fill_in
from ngpt_jax.config.recipes import OPTIONS, RECIPES, reads
from ngpt_jax.config.sources import SOURCES
from ngpt_jax.errors import ConfigError


def from_config_dict(values: Mapping[str, Any] | ml_collections.ConfigDict) -> Config:
    """The config of a ConfigDict or a nested dict, resolved; raises ConfigError."""
    return resolve(build(Config, values))


def from_saved(text: str) -> Config:
    """The config of a run from the text of its config.json.

    Files from before the presets have optimizer.project=true for GPT, where it did nothing.

    Raises ValueError, AttributeError or TypeError.
    """
    values = json.loads(text)
    if "residual" not in values["model"] and values["model"]["kind"] == "gpt":
        values["optimizer"]["project"] = None
    return from_config_dict(values)


def resolve(config: Config) -> Config:
    """Checks every field and fills in those that follow from others; raises ConfigError."""
    _check_each(config)
    _check("model.kind", config.model.kind, one_of(*PRESETS))
    _check_data(config.data)
    mesh = config.mesh
    _require(
        [mesh.data, mesh.fsdp, mesh.tensor, mesh.context].count(-1) <= 1,
        "Only one of mesh.data, mesh.fsdp, mesh.tensor, mesh.context can be -1 (the rest).",
    )
    steps = _steps(config)
    train = dataclasses.replace(config.train, steps=steps)
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=_warmup_steps(config, steps))
    eval_size = config.eval.batch_size or train.batch_size
    evaluation = dataclasses.replace(config.eval, batch_size=eval_size)
    config = dataclasses.replace(config, train=train, optimizer=optimizer, eval=evaluation)
    config = fill_in(dataclasses.replace(config, model=_with_sizes(config.model)))
    o = config.optimizer
    _require(
        o.schedule == "constant" or (o.warmup_steps or 0) < steps,
        f"optimizer.warmup_steps = {o.warmup_steps} must be below the {steps} steps of the run.",
    )
    _check_choices(config)
    _check_recipe(config)
    _check_parametrization(config)
    return config


# ------------------------------------------------------------------------------- each field alone


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _check(name: str, value: Any, allowed: Allowed) -> None:
    if not allowed.holds(value):
        meant = did_you_mean(str(value), allowed.choices)
        raise ConfigError(f"{name} {allowed.must}, got {value!r}.{meant}")


def _check_each(section: Any, prefix: str = "") -> None:
    """Refuses values that a field does not allow."""
    for f in fields(section, prefix):
        finite = not isinstance(f.value, float) or math.isfinite(f.value)
        _require(finite, f"{f.name} must be finite, got {f.value}.")
        if f.value is not None:
            _check(f.name, f.value, f.allowed)


# ---------------------------------------------------------------------------------- length, model


def _steps(config: Config) -> int:
    """The length of the run."""
    t = config.train
    _require(
        t.batch_size % t.accumulate == 0,
        f"train.batch_size = {t.batch_size} is not divisible by train.accumulate = {t.accumulate}.",
    )
    if t.tokens is None:
        if t.steps is None:
            raise ConfigError("Give the length of the run: train.steps or train.tokens.")
        return t.steps
    steps = -(-t.tokens // (t.batch_size * config.model.context))
    _require(
        t.steps in (None, steps),
        f"train.steps = {t.steps} and train.tokens = {t.tokens} ({steps} steps) disagree;"
        " set one of them to None.",
    )
    return steps


def _warmup_steps(config: Config, steps: int) -> int | None:
    """None where the kind's preset gives them."""
    o = config.optimizer
    if o.warmup_share is None:
        return o.warmup_steps
    warmup = round(o.warmup_share * steps)
    _require(
        o.warmup_steps in (None, warmup),
        f"optimizer.warmup_steps = {o.warmup_steps} and warmup_share = {o.warmup_share}"
        f" ({warmup} steps) disagree; set one of them to None.",
    )
    return warmup


def _with_sizes(m: ModelConfig) -> ModelConfig:
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
    kv_heads = m.kv_heads or m.heads
    _require(
        m.heads % kv_heads == 0,
        f"model.heads = {m.heads} is not divisible by model.kv_heads = {kv_heads}.",
    )
    usual = NUGPT_SCALE if m.parametrization == "nugpt" else m.width**-0.5
    scales = {
        name: dataclasses.replace(getattr(m, name), scale=getattr(m, name).scale or usual)
        for name in SCALES
    }
    mlp_width = m.mlp_width or 4 * m.width
    return dataclasses.replace(
        m, kv_heads=kv_heads, head_dim=head_dim, mlp_width=mlp_width, **scales
    )


def _check_choices(config: Config) -> None:
    """Refuses choices that do not go together; those of the kind's preset are filled in."""
    m = config.model
    for name in ("alpha_a", "alpha_m"):
        form = getattr(m, name).form
        _require(
            (form == "none") == (m.residual == "add"),
            f"model.{name}.form = {form} does not go with model.residual = {m.residual}: add has no"
            " alpha, the others need one.",
        )
    for name, value, usual in (
        ("alpha_depth", m.alpha_depth, "constant"),
        ("alpha_sign", m.alpha_sign, "absolute"),
    ):
        _require(
            m.residual != "add" or value == usual,
            f"model.{name} = {value} does not go with model.residual = add, which has no alpha;"
            " leave it out.",
        )
    for name in SCALES:
        scale = getattr(m, name)
        _require(
            scale.form not in ("vector", "scalar") or scale.init != 0,
            f"model.{name}.init = 0 would stay 0, as a learned scale is a multiple of it; give"
            f" another value, or set model.{name}.form to fixed.",
        )
    _require(
        m.residual != "slerp" or m.branch_norm == "unit",
        "model.residual = slerp needs model.branch_norm = unit: it turns h towards a unit vector.",
    )
    project, on_read = config.optimizer.project, m.normalize_on_read
    for name, wanted in (("optimizer.project", project), ("model.normalize_on_read", on_read)):
        _require(
            m.weights == "sphere" or not wanted,
            f"{name} needs model.weights = sphere, not {m.weights}; leave it out.",
        )
    scaled = any(getattr(m, name).form != "none" for name in ("s_qk", "s_u", "s_v", "s_z"))
    _require(
        not m.folded or (scaled and not m.normalize_on_read),
        "model.folded needs scales to fold (s_qk, s_u, s_v or s_z) and no normalize_on_read.",
    )


# -------------------------------------------------------------------------------------- optimizer

NUGPT_SCALE = 0.03  # the stored value at the start of alpha, s_qk and s_z (about 1/sqrt(1020))


def _check_recipe(config: Config) -> None:
    """Refuses options that the recipe does not read, and those that lack what they need."""
    o, recipe = config.optimizer, config.optimizer.recipe
    usual = OptimizerConfig(weight_decay=0.0)
    for name in OPTIONS:
        value = getattr(o, name)
        readers = ", ".join(r for r in RECIPES if reads(r, name))
        _require(
            reads(recipe, name) or value == getattr(usual, name),
            f"optimizer.{name} = {value} is for optimizer.recipe = {readers}, not {recipe}; leave"
            " it out.",
        )
    keeps = recipe in ("adamh", "muonh", "ngpt2026")
    _require(
        config.model.weights != "sphere" or bool(o.project) or not keeps,
        f"optimizer.project must not be false with optimizer.recipe = {recipe}, which keeps the"
        " norms of weights.",
    )
    _require(
        bool(o.project) or recipe != "ngpt2026",
        "optimizer.recipe = ngpt2026 is for unit vectors: it needs model.weights = sphere, not"
        f" {config.model.weights}.",
    )
    for name, given in (("tangent", o.tangent != "none"), ("max_angle", o.max_angle is not None)):
        _require(
            bool(o.project) or not given,
            f"optimizer.{name} is for unit vectors: it needs optimizer.project; leave it out.",
        )
    _require(
        not (o.weight_decay and o.project) or recipe in ("ngpt", "adamw"),
        f"optimizer.weight_decay = {o.weight_decay} pulls along unit vectors, which"
        f" optimizer.project undoes; optimizer.recipe = {recipe} has none there; leave it out.",
    )
    preconditioned = o.logit_gradient == "preconditioned"
    _require(
        not preconditioned or config.model.s_z.form != "none",
        "optimizer.logit_gradient = preconditioned needs model.s_z.",
    )
    _require(
        preconditioned or o.logit_power == usual.logit_power,
        f"optimizer.logit_power = {o.logit_power} is for optimizer.logit_gradient ="
        " preconditioned; leave it out.",
    )
    decays = ("wsd", "wsd_sqrt")
    for name, schedules in (
        ("log_rho", ("log",)),
        ("decay_fraction", decays),
        ("final_fraction", ("cosine", *decays, "log")),
    ):
        value = getattr(o, name)
        _require(
            o.schedule in schedules or value == getattr(usual, name),
            f"optimizer.{name} = {value} is for optimizer.schedule = {', '.join(schedules)}, not"
            f" {o.schedule}; leave it out.",
        )


def _check_parametrization(config: Config) -> None:
    m = config.model
    bases = {
        "model.base_width": (m.base_width, ("nugpt", "root_width")),
        "model.base_layers": (m.base_layers, ("nugpt",)),
        "optimizer.base_steps": (config.optimizer.base_steps, ("nugpt",)),
    }
    for name, (value, readers) in bases.items():
        _require(
            value is None or m.parametrization in readers,
            f"{name} = {value} is for model.parametrization = {', '.join(readers)}, not"
            f" {m.parametrization}; leave it out.",
        )
    _require(
        m.parametrization == "ngpt" or m.weights == "sphere",
        f"model.parametrization = {m.parametrization} is for unit vectors: it needs model.weights ="
        f" sphere, not {m.weights}.",
    )
    _require(
        m.parametrization != "root_width" or m.base_width is not None,
        "model.parametrization = root_width needs model.base_width; with 1 the learning rate is"
        " that over sqrt(width).",
    )


# ------------------------------------------------------------------------------------------- data


def _check_data(data: DataConfig) -> None:
    if data.source != "mixture":
        _require(not data.mixture, f"data.mixture is for data.source=mixture, not {data.source}.")
        check_source(data, "data.", tuple(SOURCES))
        return
    _require(
        bool(data.mixture),
        "data.source=mixture needs sources, e.g. --config.data.mixture.web.source=text"
        " --config.data.mixture.web.paths=web.jsonl --config.data.mixture.web.weight=0.7",
    )
    for f in fields(SourceConfig(source="mixture")):
        _require(
            getattr(data, f.name) == f.value,
            f"data.{f.name} is not read where data.source=mixture; set data.mixture.NAME.{f.name}"
            f"{_how_to_empty(f'--config.data.{f.name}', f.value)}.",
        )
    for name, source in data.mixture.items():
        check_source(source, f"data.mixture.{name}.", tuple(SOURCES))


def _how_to_empty(flag: str, value: Any) -> str:
    """How the command line removes strings that an experiment file gives, for a message."""
    many = isinstance(value, tuple) and flag.startswith("--config.")
    return f" ({flag}=None empties it)" if many else ""


def check_source(s: SourceConfig, prefix: str, known: tuple[str, ...]) -> None:
    """Refuses values that a field does not allow, and fields that the source does not read.

    Args:
      s: the source.
      prefix: of the names of its fields: "data." for example, or "--" where they are flags.
      known: names that s.source may have here.
    """
    flag = prefix if prefix == "--" else f"--config.{prefix}"
    _check(f"{prefix}source", s.source, one_of(*known))
    _check_each(s, prefix)
    source = SOURCES[s.source]
    given = {f.name for f in fields(SourceConfig()) if getattr(s, f.name) != f.value}
    for name in sorted(given - {"source", *source.reads.split()}):
        readers = ", ".join(k for k in known if name in SOURCES[k].reads.split())
        raise ConfigError(
            f"{prefix}{name} is for {prefix}source={readers}, not {s.source}; leave it out"
            f"{_how_to_empty(f'{flag}{name}', getattr(s, name))}, or change the source."
        )
    _require(
        source.example is None or bool(s.paths),
        f"{prefix}source={s.source} needs {prefix}paths, e.g. {flag}paths={source.example}",
    )
    _require(
        s.source != "tfds" or (bool(s.paths or s.tfds_name) and len(s.paths) < 2),
        f"{prefix}source=tfds needs {prefix}tfds_name, or the folder of one data set in"
        f" {prefix}paths, or both.",
    )
    for item in s.eval_paths:
        message = f"{prefix}eval_paths must be name=path, got {item!r}, e.g. val=held_out.txt"
        _require("=" in item, message)
