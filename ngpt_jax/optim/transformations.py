"""Transformations of gradients that optax has in another form, or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def clip_by_global_norm(max_norm: float, eps: float = 0.0) -> optax.GradientTransformation:
    """Scales all updates by min(1, max_norm / (global norm + eps)).

    With ``eps = 0`` it is :func:`optax.clip_by_global_norm`, with ``eps = 1e-6`` PyTorch's
    ``clip_grad_norm_``, which the authors' code uses.
    """

    def update_fn(updates, state, params=None):
        del params
        factor = jnp.minimum(1, max_norm / (optax.tree.norm(updates) + eps))
        return jax.tree.map(lambda u: (u * factor).astype(u.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """:func:`optax.scale_by_adam`, with an argument ``ok`` of ``update``, True by default.

    Where ``ok`` is False the state stays the same bit for bit, and the updates have no meaning.
    The updates are computed from the state that was chosen, so that XLA changes the moments in
    place. If the choice came after the updates, XLA's CPU backend would copy the old moments.
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

    :func:`optax.scale_by_learning_rate` counts updates in its state instead. A skipped batch makes
    no update, but it is a step of the schedule.
    """

    def update_fn(updates, state, params=None, *, step, **extra):
        del params, extra
        rate = -schedule(step)
        return jax.tree.map(lambda u: jnp.asarray(rate, u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
