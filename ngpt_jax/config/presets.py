"""What each ``model.kind`` stands for: a set of independent choices, filled in where none is given.

This is the one place that knows the kinds. A new variant of the model is an entry of PRESETS and,
where it needs a rule that is not there yet, one function in the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ngpt_jax.config.fields import SCALES, Config

Choices = Mapping[str, Any]

_NO_SCALES = {f"model.{name}.form": "none" for name in SCALES}
_ALL_SCALES = dict.fromkeys(_NO_SCALES, "vector")

# For each kind the value of every field that it fills in. A function gets the config, in which the
# length of the run (train.steps) is known.
PRESETS: Mapping[str, Choices] = {
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
        **_ALL_SCALES,
        "optimizer.warmup_steps": 0,
        "optimizer.weight_decay": 0.0,
        "optimizer.project": True,
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
        **_NO_SCALES,
        "optimizer.warmup_steps": lambda c: min(2000, c.train.steps // 10),
        "optimizer.weight_decay": 0.1,
        "optimizer.project": False,
    },
}


def preset_value(config: Config, name: str) -> Any:
    """What the kind of a config fills in for a field, by its dotted name."""
    value = PRESETS[config.model.kind][name]
    return value(config) if callable(value) else value


def fill_in(config: Config) -> Config:
    """The config with each field of its preset that is None set to the kind's value."""
    for name in PRESETS[config.model.kind]:
        config = _set_if_none(config, config, name.split("."), name)
    return config


def _set_if_none(config: Config, section: Any, path: list[str], name: str) -> Any:
    head, *rest = path
    old = getattr(section, head)
    if rest:
        new = _set_if_none(config, old, rest, name)
    else:
        new = preset_value(config, name) if old is None else old
    return section if new is old else dataclasses.replace(section, **{head: new})
