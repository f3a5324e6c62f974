"""Optimizers: one function for each recipe, an optax chain."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from ngpt_jax.config import Config
from ngpt_jax.directions import cap_angle, tangent, unit_step
from ngpt_jax.model.parametrization import rate_factor
from ngpt_jax.model.params import Param, num_params, param_tree, unit_axes
from ngpt_jax.optim.muon import dimension_numbers, scale_by_muon
from ngpt_jax.optim.schedules import make_schedule
from ngpt_jax.optim.transformations import (
    clip_by_global_norm,
    keep_state_unless_ok,
    scale_by_adam,
    scale_by_learning_rate,
)
from ngpt_jax.projection import keep_params_on_sphere

# The default of eps_gate times the square root of the number of parameters. It is this project's:
# its authors' value was not published. d = sqrt(v) + eps of the matrices of the blocks was measured
# in runs of this recipe without the gate (bytes of Python code; 3 x 64 at 100 to 600 steps, 4 x 128
# at 100 to 300). A tenth of the entries were below 0.005 to 0.009 over sqrt(parameters), half below
# 0.014 to 0.019. So the gate is below 1/2 for about a tenth of the entries.
GATED = 0.006

Recipe = Callable[[Config, optax.Schedule], optax.GradientTransformationExtraArgs]


def adam(config: Config, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Recipes ngpt and adamw: Adam.

    With the preset of nGPT it is the paper's: Adam without weight decay, and the projection onto
    the sphere (https://arxiv.org/abs/2410.01131). With that of GPT it is AdamW, with weight decay
    on matrices (https://arxiv.org/abs/1711.05101).
    """
    return _chain(config, schedule, _adam(config))


def muon(config: Config, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Recipe muon: Muon for the matrices of the blocks, Adam for tables, scales and gains.

    One learning rate serves both (https://arxiv.org/abs/2502.16982). GPT has weight decay, nGPT the
    projection. Muon itself: https://github.com/KellerJordan/modded-nanogpt.
    """
    return _chain(config, schedule, _muon(config))


def ngpt2026(config: Config, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Recipe ngpt2026: gated Adam, and what else optimizer.tangent and max_angle ask for.

    It is made after https://arxiv.org/abs/2608.01284, whose text was not at hand: the formulas are
    those that others reproduce. The preset gives it the preconditioned gradient of the logits
    (model/logit_gradient.py), a warm-up over a tenth of the steps and the logarithmic schedule.
    Values that nobody published are ours: eps_gate (GATED), log_rho, and no max_angle.
    """
    o = config.optimizer
    eps = GATED / num_params(config.model) ** 0.5 if o.eps_gate is None else o.eps_gate
    return _chain(config, schedule, scale_by_adam(o.b1, o.b2, o.eps, o.gate, eps))


def adamh(config: Config, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Recipe adamh: the norms of weights and of their updates are fixed, the update is Adam's.

    W <- R n(W - lr R n(u)) for the matrices of the blocks and the output table, with n(x) = x/||x||
    (https://arxiv.org/abs/2606.16899). With free weights a whole matrix of a layer is one vector,
    with its norm at the start as R. With weights on the sphere each unit vector is one. The input
    table, scales and gains make Adam's steps, with the rate times optimizer.adam_rate.
    """
    return _hyperball(config, schedule, _adam(config))


def muonh(config: Config, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Recipe muonh: :func:`adamh` with the update of :func:`muon`."""
    return _hyperball(config, schedule, _muon(config))


def lion(config: Config, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Recipe lion: the sign of an average of gradients (https://arxiv.org/abs/2302.06675)."""
    o = config.optimizer
    return _chain(config, schedule, keep_state_unless_ok(optax.scale_by_lion(o.b1, o.b2)))


def sgd(config: Config, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Recipe sgd: gradients with momentum, :func:`optax.trace`."""
    assert config.optimizer.momentum is not None
    trace = optax.trace(config.optimizer.momentum)
    return _chain(config, schedule, keep_state_unless_ok(trace, lambda state, _: state.trace))


RECIPES: dict[str, Recipe] = {
    "ngpt": adam,
    "adamw": adam,
    "muon": muon,
    "ngpt2026": ngpt2026,
    "adamh": adamh,
    "muonh": muonh,
    "lion": lion,
    "sgd": sgd,
}


# ------------------------------------------------------------------------------- what recipes share


def _chain(
    config: Config,
    schedule: optax.Schedule,
    direction: optax.GradientTransformation,
    unit_steps: optax.GradientTransformation | None = None,
    keep: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """All around the direction that a recipe steps in, in the one order.

    What its field turns off is left out: clipping with clip_norm = 0, weight decay (on matrices)
    with weight_decay = 0, the cap of the angle without max_angle, and so on. The cap is for the
    matrices of the blocks. ``keep`` takes the place of the projection onto unit vectors.
    """
    o, params, axes = config.optimizer, param_tree(config.model), unit_axes(config.model)
    matrices = jax.tree.map(lambda p: p.is_matrix, params)
    parts = [
        clip_by_global_norm(o.clip_norm, o.clip_eps) if o.clip_norm else None,
        tangent(axes) if o.tangent in ("gradient", "both") else None,
        direction,
        tangent(axes) if o.tangent in ("update", "both") else None,
        unit_steps,
        optax.add_decayed_weights(o.weight_decay, matrices) if o.weight_decay else None,
        scale_by_learning_rate(schedule, rate_factors(config)),
        None if o.max_angle is None else cap_angle(_axes_of_blocks(config), o.max_angle),
        keep_params_on_sphere(axes) if o.project and keep is None else keep,
    ]
    return optax.chain(*(part for part in parts if part is not None))


def _axes_of_blocks(config: Config) -> Any:
    """The axes of unit norm, but None for tables."""
    return jax.tree.map(
        lambda p: p.unit_axis if p.group == "block_matrix" else None, param_tree(config.model)
    )


def _hyperball(
    config: Config, schedule: optax.Schedule, direction: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Updates as long as their vectors, which keep the norms that they have at the start."""
    model, unit_vectors = config.model, config.optimizer.project

    def axes_of(p: Param) -> int | tuple[int, ...] | None:
        if p.group not in ("block_matrix", "output_table"):
            return None
        whole = tuple(i for i, axis in enumerate(p.axes) if axis != "layers")
        return p.unit_axis if unit_vectors else whole

    axes = jax.tree.map(axes_of, param_tree(model))
    keep = None if unit_vectors else keep_params_on_sphere(axes, "initial")
    return _chain(config, schedule, direction, unit_step(axes), keep)


def rate_factors(config: Config) -> Any:
    """A tree like the parameters of factors on the learning rate; None where all are 1."""
    factors = jax.tree.map(lambda p: rate_factor(config, p.group), param_tree(config.model))
    return factors if set(jax.tree.leaves(factors)) != {1.0} else None


def _adam(config: Config) -> optax.GradientTransformation:
    o = config.optimizer
    return scale_by_adam(o.b1, o.b2, o.eps)


def _muon(config: Config) -> optax.GradientTransformation:
    """Muon for the matrices of the blocks, Adam for all else."""
    o, model = config.optimizer, config.model
    assert o.momentum is not None and o.muon_heads is not None
    numbers = dimension_numbers(model, o.muon_heads)
    names = jax.tree.map(
        lambda p: "muon" if p.group == "block_matrix" else "adam", param_tree(model)
    )
    return optax.partition(
        {"muon": scale_by_muon(numbers, o.momentum), "adam": _adam(config)}, names
    )


def make_optimizer(
    config: Config,
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """The optimizer of a resolved config, and its learning-rate schedule.

    Besides the usual arguments, the optimizer's ``update`` takes two: ``step``, the number of
    batches consumed before, and ``ok``, True by default. Where ``ok`` is False the state stays as
    it was and the updates have no meaning.
    """
    assert config.train.steps is not None and config.optimizer.recipe is not None
    schedule = make_schedule(config.optimizer, config.train.steps)
    return RECIPES[config.optimizer.recipe](config, schedule), schedule
