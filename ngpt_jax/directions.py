"""Edits of the updates of vectors before they are kept on a sphere: jax and optax alone.

The order in a chain: clip, tangent, Adam or another optimizer, tangent, unit_step, weight decay,
the learning rate, cap_angle, keep_params_on_sphere. Each may be left out.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import sphere  # relative: the files work as a copy in another package
from .projection import Axes, PyTree, as_norms, check_number, is_absent, map_with_axes


class CapAngleState(NamedTuple):
    """State of :func:`cap_angle` with a schedule: updates made without an argument ``step``."""

    count: jax.Array  # type: ignore[assignment]  # tuples have a method of this name


class Turned(NamedTuple):
    """Angles in radians, two trees of scalars; None where axes are."""

    largest: PyTree
    mean: PyTree


def _check_axes(axes: Axes, params: PyTree) -> None:
    """Refuses wrong axes before training."""
    if jax.tree.leaves(params):  # none in the placeholder of optax.tree.map_params
        map_with_axes(lambda axis, p: p, axes, params)


def _edit(name: str, edit: Callable, axes: Axes, updates: PyTree, params: PyTree) -> PyTree:
    """Maps ``edit(axis, w, u)`` over vectors and their updates, both in at least float32."""
    if params is None:
        raise ValueError(f"{name} needs the parameters: tx.update(updates, state, params).")

    def of_leaf(axis, p, u):
        if axis is None or is_absent(u):
            return u
        w = sphere.promote(p)
        return edit(axis, w, u.astype(w.dtype)).astype(u.dtype)

    return map_with_axes(of_leaf, axes, params, updates)


def _stateless(name: str, edit: Callable, axes: Axes) -> optax.GradientTransformation:
    def init_fn(params):
        _check_axes(axes, params)
        return optax.EmptyState()

    def update_fn(updates, state, params=None):
        return _edit(name, edit, axes, updates, params), state

    return optax.GradientTransformation(init_fn, update_fn)


def tangent(axes: Axes, axis_name: sphere.AxisName = None) -> optax.GradientTransformation:
    r"""Removes from each vector's update the part along the vector.

    For vectors :math:`w_i` of the parameters and incoming updates :math:`u_i`,

    .. math::

      u_i' = u_i - \frac{\langle w_i, u_i \rangle}{\langle w_i, w_i \rangle} w_i

    Before an optimizer it makes the gradient that of the sphere (the Riemannian gradient), after it
    the step tangent. Computed in at least float32. The update of a zero vector stays as it is.

    Args:
      axes: as in :func:`~ngpt_jax.projection.keep_params_on_sphere`.
      axis_name: as there.

    Returns:
      A :class:`optax.GradientTransformation`. Updates keep their dtype; ``None`` and masked leaves
      pass through.

    Examples:
      >>> import jax.numpy as jnp
      >>> from ngpt_jax.directions import tangent
      >>> params = {"kernel": jnp.array([[2.0], [0.0]])}
      >>> tx = tangent({"kernel": 0})
      >>> updates, _ = tx.update({"kernel": jnp.array([[3.0], [5.0]])}, tx.init(params), params)
      >>> print(updates["kernel"].ravel())
      [0. 5.]

    References:
      Absil et al, Optimization Algorithms on Matrix Manifolds, chapter 3, 2008
    """

    def edit(axis, w, u):
        scaled, scale, _ = sphere.rescale(u, axis, axis_name)
        return sphere.split(w, scaled, axis, axis_name).tangent / scale

    return _stateless("tangent", edit, axes)


def unit_step(
    axes: Axes, length: jax.typing.ArrayLike = 1.0, axis_name: sphere.AxisName = None
) -> optax.GradientTransformation:
    r"""Gives each vector's update a length relative to the vector.

    For vectors :math:`w_i` of the parameters and incoming updates :math:`u_i`,

    .. math::

      u_i' = \ell \, \|w_i\| \frac{u_i}{\|u_i\|}

    so that the learning rate after it is a relative step. Where updates are tangent, one of length
    :math:`\tan \alpha` turns its vector by :math:`\alpha` under
    :func:`~ngpt_jax.projection.keep_params_on_sphere`, and one of length :math:`\alpha` does with
    ``retraction="exp"``. After Adam, along all axes of a matrix and before ``radius="initial"``, it
    makes AdamH. A zero update stays zero. Computed in at least float32.

    Args:
      axes: as in :func:`~ngpt_jax.projection.keep_params_on_sphere`.
      length: :math:`\ell`, not negative.
      axis_name: as there.

    Returns:
      A :class:`optax.GradientTransformation`. Updates keep their dtype; ``None`` and masked leaves
      pass through. The update of a zero vector is zero.

    Examples:
      >>> import jax.numpy as jnp
      >>> from ngpt_jax.directions import unit_step
      >>> params = {"kernel": jnp.array([[2.0], [0.0]])}
      >>> tx = unit_step({"kernel": 0}, length=0.1)
      >>> updates, _ = tx.update({"kernel": jnp.array([[3.0], [4.0]])}, tx.init(params), params)
      >>> print(updates["kernel"].ravel().round(5))
      [0.12 0.16]

    References:
      Wen et al, `Hyperball <https://arxiv.org/abs/2606.16899>`_, 2026
    """
    check_number("length", length)

    def edit(axis, w, u):
        norm = sphere.norms(w, axis, axis_name)
        scaled, _, square = sphere.rescale(u, axis, axis_name)
        of_vectors = as_norms(length, w, axis, "length")
        return of_vectors * norm * (scaled * sphere.safe_rsqrt(square))

    return _stateless("unit_step", edit, axes)


def cap_angle(
    axes: Axes,
    max_angle: jax.typing.ArrayLike | optax.Schedule,
    axis_name: sphere.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Caps the angle between each vector and what its update makes of it.

    For vectors :math:`w_i` of the parameters and incoming updates :math:`u_i`, with :math:`t_i` the
    part of :math:`u_i` at right angles to :math:`w_i` and :math:`\phi_i` the angle between
    :math:`w_i` and :math:`w_i + u_i`, the update is left alone where
    :math:`\phi_i \le \theta`. Else it is such that

    .. math::

      w_i + u_i' = \|w_i\| \left(\cos\theta \frac{w_i}{\|w_i\|}
      + \sin\theta \frac{t_i}{\|t_i\|}\right)

    It comes after the learning rate and presupposes the sphere: directly after it goes
    :func:`~ngpt_jax.projection.keep_params_on_sphere`. A vector that its update would send through
    zero, without any part at right angles, stays where it is. Computed in at least float32.

    Args:
      axes: as in :func:`~ngpt_jax.projection.keep_params_on_sphere`.
      max_angle: :math:`\theta` in radians, from 0 to pi, where there is no cap. Or a schedule, a
        function from the step to such a number; where it is NaN or negative, so are the updates
        NaN.
      axis_name: as there.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`. Its ``update`` takes an argument ``step``
      for the schedule; without it the state counts the updates. Updates keep their dtype, below the
      cap each bit; ``None`` and masked leaves and the updates of zero vectors pass through.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from ngpt_jax.directions import angle_turned, cap_angle
      >>> from ngpt_jax.projection import keep_params_on_sphere
      >>> params, axes = {"kernel": jnp.array([[1.0], [0.0]])}, {"kernel": 0}
      >>> tx = optax.chain(optax.sgd(0.5), cap_angle(axes, 0.1), keep_params_on_sphere(axes))
      >>> grads = {"kernel": jnp.array([[0.0], [2.0]])}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> turned = angle_turned(params, optax.apply_updates(params, updates), axes)
      >>> print(f"{turned.largest['kernel']:.4f}")
      0.1000

    References:
      Loshchilov and Ginsburg, `Training nGPT <https://arxiv.org/abs/2608.01284>`_, 2026
    """
    if not callable(max_angle):
        check_number("max_angle", max_angle, most=3.1416)  # pi in float32, too; not degrees

    def init_fn(params):
        _check_axes(axes, params)
        return (
            CapAngleState(jnp.zeros([], jnp.int32)) if callable(max_angle) else optax.EmptyState()
        )

    def update_fn(updates, state, params=None, *, step=None, **extra):
        del extra
        angle = max_angle
        if callable(max_angle):
            angle = max_angle(state.count if step is None else step)
            if step is None:
                state = CapAngleState(optax.safe_increment(state.count))

        def edit(axis, w, u):
            scaled, scale, _ = sphere.rescale(u, axis, axis_name)
            parts = sphere.split(w, scaled, axis, axis_name)
            theta = as_norms(angle, w, axis, "max_angle")
            theta = jnp.where(theta >= 0, theta, jnp.nan)
            phi = jnp.arctan2(jnp.sqrt(parts.square), parts.norm * scale + parts.radial)
            # 1 - cos(theta) as 2 sin^2(theta / 2), which keeps its digits at small angles.
            back = 2 * jnp.square(jnp.sin(theta / 2)) * parts.direction
            turned = jnp.sin(theta) * (parts.tangent * sphere.safe_rsqrt(parts.square)) - back
            # What rounding leaves of an update along the vector has no direction.
            eps = 8 * float(jnp.finfo(theta.dtype).eps)
            straight = jnp.sqrt(parts.square) <= eps * (parts.norm * scale + abs(parts.radial))
            capped = jnp.where(straight, 0, parts.norm * turned)
            return jnp.where((phi <= theta) | (theta >= np.pi) | (parts.norm == 0), u, capped)

        return _edit("cap_angle", edit, axes, updates, params), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def angle_turned(
    before: PyTree, after: PyTree, axes: Axes, axis_name: sphere.AxisName = None
) -> Turned:
    r"""How far the vectors of each leaf turned between two trees of parameters.

    The angle is :math:`2 \operatorname{atan2}(\|a - b\|, \|a + b\|)` of the unit vectors a and b:
    exact to rounding near 0 and near pi. It is pi/2 where one of the vectors is zero, and 0 where
    both are.

    Args:
      before, after: pytrees of arrays.
      axes, axis_name: as in :func:`~ngpt_jax.projection.keep_params_on_sphere`.

    Returns:
      The largest and the mean angle of each leaf in radians, see :class:`Turned`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from ngpt_jax.directions import angle_turned
      >>> a, b = jnp.array([[1.0, 1.0], [0.0, 0.0]]), jnp.array([[3.0, 1.0], [0.0, 1.0]])
      >>> print(f"{angle_turned(a, b, 0).mean:.4f}")  # of 0 and pi/4
      0.3927
    """

    def angles(axis, p, q):
        if axis is None:
            return None
        directions = []
        for x in (p, q):
            scaled, _, square = sphere.rescale(x, axis, axis_name)
            directions.append(scaled * sphere.safe_rsqrt(square))
        a, b = directions
        return 2 * jnp.arctan2(*(sphere.norms(x, axis, axis_name) for x in (a - b, a + b)))

    of_vectors = map_with_axes(angles, axes, before, after)
    return Turned(jax.tree.map(jnp.max, of_vectors), jax.tree.map(jnp.mean, of_vectors))


def radial_share(
    updates: PyTree, params: PyTree, axes: Axes, axis_name: sphere.AxisName = None
) -> PyTree:
    r"""The share of each leaf's squared update that lies along its vectors.

    It is :math:`\sum_i \langle w_i, u_i \rangle^2 / \|w_i\|^2` divided by :math:`\sum_i \|u_i\|^2`,
    of updates or gradients: 0 where they are tangent, about 1/n for random ones of n entries.

    Args:
      updates: a pytree like ``params``.
      params: a pytree of arrays.
      axes, axis_name: as in :func:`~ngpt_jax.projection.keep_params_on_sphere`.

    Returns:
      A pytree like ``params`` with a scalar in [0, 1] for each leaf, in at least float32; 0 where
      the update is zero, None where ``axes`` or the update are.

    Examples:
      >>> import jax.numpy as jnp
      >>> from ngpt_jax.directions import radial_share
      >>> print(f"{radial_share(jnp.array([3.0, 4.0]), jnp.array([2.0, 0.0]), 0):.2f}")
      0.36
    """

    def share(axis, p, u):
        if axis is None or is_absent(u):
            return None
        # One power of two for the whole leaf, so that the squares of its vectors can be added.
        scaled, _, _ = sphere.rescale(u, tuple(range(u.ndim)), axis_name)
        parts = sphere.split(p, scaled, axis, axis_name)
        radial = jnp.sum(jnp.square(parts.radial))
        whole = radial + jnp.sum(parts.square)
        return jnp.where(whole == 0, 0, radial / jnp.where(whole == 0, 1, whole))

    return map_with_axes(share, axes, params, updates)
