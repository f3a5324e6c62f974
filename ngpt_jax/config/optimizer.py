"""The fields of the section ``optimizer`` of a config, see :mod:`.fields`."""

import dataclasses

from ngpt_jax.config.facts import (
    ANGLE,
    ANY,
    BELOW_1,
    FRACTION,
    NOT_NEGATIVE,
    OWN,
    POSITIVE,
    SCHEDULE,
    field,
    one_of,
)
from ngpt_jax.config.recipes import RECIPES


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    recipe: str | None = field(
        None, one_of(*RECIPES), OWN,
        "; ".join(f"{name}: {recipe.meaning}" for name, recipe in RECIPES.items()),
    )  # fmt: skip
    learning_rate: float = field(1e-3, POSITIVE, SCHEDULE, "peak")
    base_steps: int | None = field(
        None, POSITIVE, SCHEDULE,
        "with model.parametrization=nugpt: the train.steps that the rate is given for; None: any",
    )  # fmt: skip
    output_rate: float | None = field(
        None, POSITIVE, OWN, "factor on the rate of the output table, 1/2 with nugpt, else 1"
    )
    adam_rate: float | None = field(
        None, POSITIVE, OWN,
        "adamh, muonh: factor on the rate of what Adam steps, that is the input table, scales and"
        " gains; None: 1/sqrt(width)",
    )  # fmt: skip
    schedule: str | None = field(
        None, one_of("cosine", "wsd", "wsd_sqrt", "log", "constant"), SCHEDULE,
        "of the learning rate, after the warm-up. wsd: constant, then a linear decay; wsd_sqrt:"
        " constant, then by 1 - sqrt(progress); log: logarithmic, see log_rho. By default cosine,"
        " and log with recipe=ngpt2026",
    )  # fmt: skip
    warmup_steps: int | None = field(
        None, NOT_NEGATIVE, SCHEDULE, "steps of warm-up; see warmup_share", always_in_digest=True
    )
    warmup_share: float | None = field(
        None, BELOW_1, SCHEDULE, "warm-up over the length of the run; give this or warmup_steps"
    )
    final_fraction: float = field(
        0.0, FRACTION, SCHEDULE, "learning rate at the end over the peak (all but constant)"
    )
    decay_fraction: float = field(
        0.2, FRACTION, SCHEDULE, "share of the steps in which wsd and wsd_sqrt decay"
    )
    log_rho: float = field(
        0.1, POSITIVE, SCHEDULE, "log: the smaller, the faster the rate falls at first"
    )
    b1: float = field(0.9, BELOW_1, OWN, "Adam's decay of the first moment; lion's of the update")
    b2: float = field(0.95, BELOW_1, OWN, "Adam's decay of the second moment; lion's of the state")
    eps: float = field(1e-8, POSITIVE, OWN, "Adam's epsilon, outside the root")
    momentum: float | None = field(
        None, BELOW_1, OWN, "decay of momentum, by default 0.95 for muon and muonh, 0.9 for sgd"
    )
    muon_heads: str | None = field(
        None, one_of("together", "apart"), OWN,
        "what Muon takes for one matrix in attention: all heads together, or each head",
    )  # fmt: skip
    gate: float | None = field(
        None,
        POSITIVE,
        OWN,
        "exponent a of gated Adam: times d^a/(d^a + eps_gate^a), by default 0.5",
    )
    eps_gate: float | None = field(
        None,
        NOT_NEGATIVE,
        OWN,
        "of gated Adam, where d = sqrt(v) + eps; None: 0.006/sqrt(parameters), measured here",
    )
    logit_gradient: str | None = field(
        None, one_of("plain", "preconditioned"), OWN,
        "below the logits z = s_z u. preconditioned: dL/du = (s_z/mean(s_z))^logit_power dL/dz"
        " in place of s_z dL/dz",
    )  # fmt: skip
    logit_power: float = field(1.0, NOT_NEGATIVE, OWN, "with logit_gradient=preconditioned")
    tangent: str = field(
        "none", one_of("none", "gradient", "update", "both"), OWN,
        "remove the part along each unit vector from the gradient, from the update, or from both",
    )  # fmt: skip
    max_angle: float | None = field(
        None, ANGLE, OWN,
        "radians by which a step turns each unit vector of the blocks at most; None: any",
    )  # fmt: skip
    weight_decay: float | None = field(
        None, NOT_NEGATIVE, OWN, "weight decay of matrices", always_in_digest=True
    )
    clip_norm: float = field(
        1.0, NOT_NEGATIVE, OWN, "gradient clipping: largest global norm; 0: no clipping"
    )
    clip_eps: float = field(
        0.0, NOT_NEGATIVE, OWN, "added to the norm to clip: 0 as in optax, 1e-6 as in PyTorch"
    )
    project: bool | None = field(
        None, ANY, OWN, "put matrices back onto the sphere after each step (model.weights=sphere)"
    )
