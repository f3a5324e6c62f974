"""Optimizers: one function for each recipe, an optax chain."""

import jax
import optax

from ngpt_jax.config import Config
from ngpt_jax.model.params import param_tree, unit_axes
from ngpt_jax.optim.schedules import make_schedule
from ngpt_jax.optim.transformations import (
    clip_by_global_norm,
    scale_by_adam,
    scale_by_learning_rate,
)
from ngpt_jax.projection import keep_params_on_sphere


def adam(config: Config, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Gradient clipping, Adam, weight decay on matrices, and the projection onto the sphere.

    Clipping is left out with clip_norm = 0, weight decay with weight_decay = 0, and the projection
    without optimizer.project. With the preset of GPT it is AdamW, with that of nGPT Adam and
    the projection.
    """
    o, model = config.optimizer, config.model
    matrices = jax.tree.map(lambda p: p.is_matrix, param_tree(model))
    return optax.chain(
        *([clip_by_global_norm(o.clip_norm, o.clip_eps)] if o.clip_norm else []),
        scale_by_adam(o.b1, o.b2, o.eps),
        *([optax.add_decayed_weights(o.weight_decay, matrices)] if o.weight_decay else []),
        scale_by_learning_rate(schedule),
        *([keep_params_on_sphere(unit_axes(model))] if o.project else []),
    )


def make_optimizer(
    config: Config,
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """The optimizer of a resolved config, and its learning-rate schedule.

    Besides the usual arguments, the optimizer's ``update`` takes two: ``step``, the number of
    batches consumed before, and ``ok``, True by default. Where ``ok`` is False the state stays as
    it was and the updates have no meaning.
    """
    assert config.train.steps is not None
    schedule = make_schedule(config.optimizer, config.train.steps)
    return adam(config, schedule), schedule
