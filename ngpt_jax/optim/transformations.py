"""Transformations of gradients that optax has in another form, or not."""

from __future__ import annotations

from typing import Any

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


def scale_by_adam(
    b1: float, b2: float, eps: float, gate: float | None = None, eps_gate: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    r""":func:`optax.scale_by_adam`, with an argument ``ok`` of ``update``, True by default.

    Where ``ok`` is False the state stays the same bit for bit, and the updates have no meaning.
    The updates are computed from the state that was chosen, so that XLA changes the moments in
    place. If the choice came after the updates, XLA's CPU backend would copy the old moments.

    With ``gate`` it is the gated Adam of https://arxiv.org/abs/2608.01284, as others tell it: with
    :math:`d = \sqrt{\hat v} + \epsilon` the update :math:`\hat m / d` is multiplied by

    .. math::

      \frac{d^a}{d^a + \epsilon_g^a} = \frac{1}{1 + (\epsilon_g / d)^a}

    which is small where gradients are small. With a = 1 it is Adam with
    :math:`\epsilon + \epsilon_g` in place of :math:`\epsilon`.

    Args:
      b1, b2, eps: of Adam.
      gate: the exponent a; None: Adam without a gate.
      eps_gate: the d at which the gate is 1/2. No value was published. The default of this
        project's recipe, config/presets.py, was measured here.
    """
    adam = optax.scale_by_adam(b1, b2, eps)

    def step(m, s):
        d = jnp.sqrt(s) + eps
        return m / d if gate is None else m / d / (1 + (eps_gate / d) ** gate)

    def update_fn(updates, state, params=None, *, ok=True, **extra):
        del params, extra
        _, new = adam.update(updates, state)
        chosen = jax.tree.map(lambda n, old: jnp.where(ok, n, old), new, state)
        mean = optax.tree.bias_correction(chosen.mu, b1, chosen.count)
        square = optax.tree.bias_correction(chosen.nu, b2, chosen.count)
        return jax.tree.map(step, mean, square), chosen

    return optax.GradientTransformationExtraArgs(adam.init, update_fn)


def keep_state_unless_ok(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """A transformation with an argument ``ok`` of ``update``, True by default.

    Where ``ok`` is False the state stays the same bit for bit, and the updates have no meaning. A
    state that its updates do not depend on, but on the old one, is chosen in place.
    """
    inner = optax.with_extra_args_support(inner)

    def update_fn(updates, state, params=None, *, ok=True, **extra):
        updates, new = inner.update(updates, state, params, **extra)
        return updates, jax.tree.map(lambda n, old: jnp.where(ok, n, old), new, state)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def scale_by_learning_rate(
    schedule: optax.Schedule, factors: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Scales updates by -schedule(step), where ``step`` is an argument of ``update``.

    :func:`optax.scale_by_learning_rate` counts updates in its state instead. A skipped batch makes
    no update, but it is a step of the schedule.

    Args:
      schedule: from the step to the learning rate.
      factors: a tree like the updates of numbers that multiply it; None: 1.
    """

    def update_fn(updates, state, params=None, *, step, **extra):
        del params, extra
        rate = -schedule(step)
        if factors is None:
            return jax.tree.map(lambda u: jnp.asarray(rate, u.dtype) * u, updates), state
        scaled = jax.tree.map(lambda u, f: jnp.asarray(f * rate, u.dtype) * u, updates, factors)
        return scaled, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
