"""Models of every choice, for tests: the choices with their values, and a sample of all pairs."""

import functools
import itertools
import random

from ngpt_jax import config as config_lib
from ngpt_jax.config import Config, ConfigError

CHOICES = {
    "residual": ("add", "exp", "lerp", "slerp"),
    "alpha_a.form": ("fixed", "scalar", "vector"),
    "alpha_m.form": ("fixed", "scalar", "vector"),
    "alpha_depth": ("constant", "harmonic", "root"),
    "alpha_sign": ("absolute", "signed"),
    "pre_norm": ("none", "rms"),
    "branch_norm": ("none", "unit"),
    "final_norm": ("none", "rms"),
    "qk_norm": (False, True),
    "qk_form": ("rms_before_rope", "unit_after_rope"),
    "softmax_scale": ("sqrt", "rsqrt"),
    "weights": ("free", "sphere"),
    "normalize_on_read": (False, True),
    "s_qk.form": ("fixed", "none", "scalar", "vector"),
    "s_u.form": ("fixed", "none", "scalar", "vector"),
    "s_v.form": ("fixed", "none", "scalar", "vector"),
    "s_z.form": ("fixed", "none", "scalar", "vector"),
}


def make(fields: dict, **more) -> Config:
    """The config of a small model with these fields of ``model``; raises ConfigError."""
    values = config_lib.default_config()
    values.model.update(
        layers=2, width=16, heads=4, kv_heads=2, head_dim=6, context=16, vocab_size=20,
        loss_chunk=64,
    )  # fmt: skip
    values.train.update(steps=8, batch_size=2)
    for name, value in (fields | more).items():
        *above, leaf = name.split(".")
        node = values.model
        for part in above:
            node = node[part]
        node[leaf] = value
    return config_lib.from_config_dict(values)


def accepted(fields: dict) -> bool:
    try:
        make(fields)
    except ConfigError:
        return False
    return True


def single() -> list[dict]:
    """Each kind with each value of one choice."""
    found = [
        {"kind": kind, name: value}
        for kind in ("ngpt", "gpt")
        for name, values in CHOICES.items()
        for value in values
    ]
    return [fields for fields in found if accepted(fields)]


@functools.cache
def pairwise() -> list[dict]:
    """Few models in which every two choices meet with every pair of values that goes together.

    In pairs all forms of a scale count as one, and so do the factors by depth. Each has a model.
    """
    rng = random.Random(0)
    rows = [{name: rng.choice(values) for name, values in CHOICES.items()} for _ in range(600)]
    rows = [row for row in map(_without_alpha, rows) if accepted(row)]
    left = set().union(*map(_pairs, rows))
    out = []
    while left:
        out.append(max(rows, key=lambda row: len(left & _pairs(row))))
        left -= _pairs(out[-1])
    return out


def _without_alpha(row: dict) -> dict:
    """The row; for ``add`` without the choices that ask for an alpha."""
    return {n: v for n, v in row.items() if row["residual"] != "add" or "alpha" not in n}


def _pairs(row: dict) -> set:
    many = ("form", "depth")
    coarse = {n: v in ("none", "constant") if n.endswith(many) else v for n, v in row.items()}
    return set(itertools.combinations(coarse.items(), 2)) | set(row.items())


def label(fields: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in fields.items())
