"""Transformations of gradients that optax has in another form, or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ngpt_jax.sphere import promote


def global_norm(tree: Any) -> jax.Array:
    """The norm of all leaves together, in at least float32."""
    return optax.tree.norm(jax.tree.map(promote, tree))


def clip_by_global_norm(max_norm: float, eps: float = 0.0) -> optax.GradientTransformation:
    """Scales all updates by min(1, max_norm / (global norm + eps)).

    With ``eps = 0`` it is :func:`optax.clip_by_global_norm`, with ``eps = 1e-6`` PyTorch's
    ``clip_grad_norm_``, which the authors' code uses.
    """

    def update_fn(updates, state, params=None):
        del params
        factor = jnp.minimum(1, max_norm / (global_norm(updates) + eps))
        return jax.tree.map(lambda u: (u * factor).astype(u.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def scale_by_adam(
    b1: float, b2: float, eps: float, gate: float | None = None, eps_gate: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    r""":func:`optax.scale_by_adam`, with an argument ``ok`` of ``update``, True by default.

    See :func:`keep_state_unless_ok`. With ``gate`` it is the gated Adam of
    https://arxiv.org/abs/2608.01284, as others reproduce it: with
    :math:`d = \sqrt{\hat v} + \epsilon` the update :math:`\hat m / d` is multiplied by

    .. math::

      \frac{d^a}{d^a + \epsilon_g^a} = \frac{1}{1 + (\epsilon_g / d)^a}

    which is small where gradients are small. With a = 1 it is Adam with
    :math:`\epsilon + \epsilon_g` in place of :math:`\epsilon`.

    Args:
      b1, b2, eps: of Adam.
      gate: the exponent a; None: Adam without a gate.
      eps_gate: the d at which the gate is 1/2. No value was published; see GATED in
        :mod:`.recipes` for that of this project.
    """
    adam = optax.scale_by_adam(b1, b2, eps)

    def step(m, s):
        d = jnp.sqrt(s) + eps
        return m / d if gate is None else m / d / (1 + (eps_gate / d) ** gate)

    def updates_of(state, gradients):
        del gradients
        mean = optax.tree.bias_correction(state.mu, b1, state.count)
        square = optax.tree.bias_correction(state.nu, b2, state.count)
        return jax.tree.map(step, mean, square)

    return keep_state_unless_ok(adam, updates_of)


def keep_state_unless_ok(
    inner: optax.GradientTransformation, updates_of: Callable[[Any, Any], Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    """A transformation with an argument ``ok`` of ``update``, True by default.

    Where ``ok`` is False the state stays the same bit for bit, and the updates have no meaning.

    Args:
      inner: the transformation.
      updates_of: a function (new state, gradients) -> updates, for transformations that have one.
        It gets the state that was chosen, so that XLA changes the state in place. If the choice
        came after the updates, XLA's CPU backend would copy the old state.
    """

    def update_fn(updates, state, params=None, *, ok=True, **extra):
        del extra
        out, new = inner.update(updates, state, params)
        new = jax.tree.map(lambda n, old: jnp.where(ok, n, old), new, state)
        return out if updates_of is None else updates_of(new, updates), new

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
