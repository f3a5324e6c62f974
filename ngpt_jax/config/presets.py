"""What each ``model.kind`` stands for: independent choices, each filled in where it is None.

No layer of the model asks for the kind. A new variant of the model is an entry of PRESETS and,
where it needs a rule that does not exist yet, one function in the model.
"""

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

from ngpt_jax.config.fields import Config
from ngpt_jax.config.recipes import RECIPES, reads


def _alpha_form(config: Config) -> str:
    return "none" if config.model.residual == "add" else "vector"


def _where_read(option: str, value: Any) -> Any:
    """A value for the recipes that read the option, None for the others."""
    return lambda c: value if reads(c.optimizer.recipe, option) else None


def _of_2026(config: Config) -> bool:
    return config.optimizer.recipe == "ngpt2026"


def _adam_rate(config: Config) -> float | None:
    """A unit vector moves by about rate * sqrt(width) with Adam, and by the rate with Hyperball."""
    return config.model.width**-0.5 if reads(config.optimizer.recipe, "adam_rate") else None


def _momentum(config: Config) -> float | None:
    recipe = RECIPES.get(config.optimizer.recipe or "")
    return recipe.momentum if recipe else None


def _weight_decay(config: Config) -> float:
    """GPT's: 0.1, but 0 where the recipe keeps the norms of the weights."""
    recipe = config.optimizer.recipe
    keeps = config.model.weights == "sphere" and recipe not in ("ngpt", "adamw")
    return 0.0 if keeps or not reads(recipe, "weight_decay") else 0.1


# Choices that follow from others, whatever the kind.
_FOLLOW: Mapping[str, Any] = {
    "model.alpha_a.form": _alpha_form,
    "model.alpha_m.form": _alpha_form,
    "model.alpha_depth": "constant",
    "model.alpha_sign": "absolute",
    "optimizer.project": lambda c: c.model.weights == "sphere",
    "optimizer.schedule": lambda c: "log" if _of_2026(c) else "cosine",
    "optimizer.output_rate": lambda c: 0.5 if c.model.parametrization == "nugpt" else 1.0,
    "optimizer.adam_rate": _adam_rate,
    "optimizer.momentum": _momentum,
    "optimizer.muon_heads": _where_read("muon_heads", "together"),
    "optimizer.gate": _where_read("gate", 0.5),
    "optimizer.logit_gradient": lambda c: "preconditioned" if _of_2026(c) else "plain",
}

_SCALES = ("model.s_qk.form", "model.s_u.form", "model.s_v.form", "model.s_z.form")

# The fields that each kind fills in, with their values. A function gets the config in which the
# length of the run (train.steps) and all entries above its own are filled in.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "ngpt": {  # section 2 of the paper, summed up in its section 2.6
        "model.residual": "lerp",
        "model.pre_norm": "none",
        "model.branch_norm": "unit",
        "model.final_norm": "none",
        "model.qk_norm": True,
        "model.qk_form": "unit_after_rope",
        "model.softmax_scale": "sqrt",
        "model.weights": "sphere",
        "model.init_std": lambda c: c.model.width**-0.5,
        **dict.fromkeys(_SCALES, "vector"),
        "optimizer.recipe": "ngpt",
        "optimizer.warmup_steps": lambda c: c.train.steps // 10 if _of_2026(c) else 0,
        "optimizer.weight_decay": 0.0,
        **_FOLLOW,
    },
    "gpt": {  # the baseline of the paper
        "model.residual": "add",
        "model.pre_norm": "rms",
        "model.branch_norm": "none",
        "model.final_norm": "rms",
        "model.qk_norm": False,
        "model.qk_form": "rms_before_rope",
        "model.softmax_scale": "rsqrt",
        "model.weights": "free",
        "model.init_std": 0.02,
        **dict.fromkeys(_SCALES, "none"),
        "optimizer.recipe": "adamw",
        "optimizer.warmup_steps": lambda c: min(2000, c.train.steps // 10),
        "optimizer.weight_decay": _weight_decay,
        **_FOLLOW,
    },
}


def value_of_kind(config: Config, name: str, default: Any) -> Any:
    """What the config's kind fills in for a field by its name; the default where it does not."""
    return _value(config, PRESETS[config.model.kind].get(name, default))


def _value(config: Config, value: Any) -> Any:
    return value(config) if callable(value) else value


def fill_in(config: Config) -> Config:
    """The config with every field of its preset that is None set to the kind's value."""
    for name, value in PRESETS[config.model.kind].items():
        if operator.attrgetter(name)(config) is None:
            config = _replace(config, name, _value(config, value))
    return config


def of_kind(config: Config, kind: str) -> Config:
    """The config with another kind, and None in every field that a preset fills in; resolve it."""
    for name in PRESETS[kind]:
        config = _replace(config, name, None)
    return _replace(config, "model.kind", kind)


def title(config: Config) -> str:
    """The kind as people write it: nGPT or GPT."""
    return config.model.kind.replace("gpt", "GPT")


def _replace(section: Any, name: str, value: Any) -> Any:
    """A dataclass with another value in the field of a dotted name."""
    head, _, rest = name.partition(".")
    new = _replace(getattr(section, head), rest, value) if rest else value
    return dataclasses.replace(section, **{head: new})
