"""Optimizers: one function for each recipe, an optax chain."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from ngpt_jax.config import Config
from ngpt_jax.model.parametrization import rate_factor
from ngpt_jax.model.params import param_tree, unit_axes
from ngpt_jax.optim.muon import dimension_numbers, scale_by_muon
from ngpt_jax.optim.schedules import make_schedule
from ngpt_jax.optim.transformations import (
    clip_by_global_norm,
    keep_state_unless_ok,
    scale_by_adam,
    scale_by_learning_rate,
)
from ngpt_jax.projection import keep_params_on_sphere

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


def lion(config: Config, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Recipe lion: the sign of an average of gradients (https://arxiv.org/abs/2302.06675)."""
    o = config.optimizer
    return _chain(config, schedule, keep_state_unless_ok(optax.scale_by_lion(o.b1, o.b2)))


def sgd(config: Config, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Recipe sgd: gradients with momentum, :func:`optax.trace`."""
    assert config.optimizer.momentum is not None
    return _chain(config, schedule, keep_state_unless_ok(optax.trace(config.optimizer.momentum)))


RECIPES: dict[str, Recipe] = {
    "ngpt": adam,
    "adamw": adam,
    "muon": muon,
    "lion": lion,
    "sgd": sgd,
}


# ------------------------------------------------------------------------------- what recipes share


def _chain(
    config: Config, schedule: optax.Schedule, direction: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """All around the direction that a recipe steps in, in the one order.

    Clipping is left out with clip_norm = 0, weight decay (on matrices) with weight_decay = 0, and
    the projection without optimizer.project.
    """
    o, model = config.optimizer, config.model
    matrices = jax.tree.map(lambda p: p.is_matrix, param_tree(model))
    return optax.chain(
        *([clip_by_global_norm(o.clip_norm, o.clip_eps)] if o.clip_norm else []),
        direction,
        *([optax.add_decayed_weights(o.weight_decay, matrices)] if o.weight_decay else []),
        scale_by_learning_rate(schedule, rate_factors(config)),
        *([keep_params_on_sphere(unit_axes(model))] if o.project else []),
    )


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
