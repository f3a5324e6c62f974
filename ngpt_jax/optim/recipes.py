"""One function per recipe, each an optax chain."""

import jax
import jax.numpy as jnp
import optax

from ngpt_jax.config import Config
from ngpt_jax.model.params import param_tree, unit_axes
from ngpt_jax.optim.schedules import make_schedule
from ngpt_jax.projection import keep_params_on_sphere


def clip_by_global_norm(max_norm: float, eps: float = 0.0) -> optax.GradientTransformation:
    """Scales all updates by min(1, max_norm / (global norm + eps)).

    ``eps = 0`` is :func:`optax.clip_by_global_norm`, ``eps = 1e-6`` PyTorch's
    ``clip_grad_norm_``, which the authors' code uses.
    """

    def update_fn(updates, state, params=None):
        del params
        factor = jnp.minimum(1, max_norm / (optax.tree.norm(updates) + eps))
        return jax.tree.map(lambda u: (u * factor).astype(u.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """:func:`optax.scale_by_adam` whose state stays, bit for bit, where ``ok`` is False.

    The updates come from the state that was chosen, not from the new one, so that the moments are
    changed in place. Chosen after the whole update instead, XLA's CPU backend copies the old ones.
    Where ``ok`` is False the updates mean nothing.
    """
    adam = optax.scale_by_adam(b1, b2, eps)

    def update_fn(updates, state, params=None, *, ok=True, **extra):
        del params, extra
        _, new = adam.update(updates, state)
        chosen = jax.tree.map(lambda n, old: jnp.where(ok, n, old), new, state)
        mean = optax.tree.bias_correction(chosen.mu, b1, chosen.count)
        square = optax.tree.bias_correction(chosen.nu, b2, chosen.count)
        return jax.tree.map(lambda m, s: m / (jnp.sqrt(s) + eps), mean, square), chosen

    return optax.GradientTransformationExtraArgs(adam.init, update_fn)


def scale_by_learning_rate(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Scales updates by -schedule(step), where ``step`` is an argument of ``update``.

    :func:`optax.scale_by_learning_rate` counts updates in its state; a skipped batch is none, but
    the schedule goes on.
    """

    def update_fn(updates, state, params=None, *, step, **extra):
        del params, extra
        rate = -schedule(step)
        return jax.tree.map(lambda u: jnp.asarray(rate, u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


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

    Besides the usual arguments its ``update`` takes ``step``, the batches consumed before, and
    ``ok`` (True): where it is False the state stays as it was, and the updates are not to be used.
    """
    assert config.train.steps is not None
    schedule = make_schedule(config.optimizer, config.train.steps)
    return adam(config, schedule), schedule
