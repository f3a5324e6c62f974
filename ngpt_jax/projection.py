"""Keeps chosen weights on a sphere: an optax transformation, jax and optax alone.

``optax.projections.projection_l2_sphere`` divides by the norm of the *whole tree* (and
gives NaN at zero). Here every leaf says along which axis its vectors lie.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from . import sphere  # relative: the two files work as a copy in another package

PyTree = Any
# An int or a tuple of ints for each leaf of params, None = leave it alone.
Axes = PyTree | Callable[[PyTree], PyTree]


class KeepParamsOnSphereState(NamedTuple):
    """Empty state."""


def _is_absent(leaf) -> bool:
    """Leaves that optax and Equinox leave out of a tree: they pass through."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def _check_axis(axis, leaf, path):
    """Returns ``axis`` as None or a tuple of axes; refuses everything else."""
    if axis is None or _is_absent(leaf):
        return None
    axes = axis if isinstance(axis, tuple) else (axis,)
    where = f"axes{jax.tree_util.keystr(path)}"
    for a in axes:
        if not isinstance(a, int) or isinstance(a, bool):
            raise TypeError(
                f"{where} must be a Python int, a tuple of ints or None, got {a!r} of type"
                f" {type(a).__name__}. Inside optax.inject_hyperparams, pass"
                ' static_args=("axes",).'
            )
        if not -jnp.ndim(leaf) <= a < jnp.ndim(leaf):
            raise ValueError(f"{where} = {a} is out of range for shape {jnp.shape(leaf)}.")
    if len({a % jnp.ndim(leaf) for a in axes}) < len(axes):
        raise ValueError(f"{where} = {axis} names an axis twice for shape {jnp.shape(leaf)}.")
    if not axes:
        raise ValueError(f"{where} is an empty tuple; use None to leave a leaf alone.")
    return axes


def _map_with_axes(fn: Callable, axes: Axes, params: PyTree, *rest: PyTree) -> PyTree:
    """Maps ``fn(axis, param, *rest)`` over params; axis is None or a tuple of ints."""
    paths_leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_absent)
    for path, _ in paths_leaves:
        if path and str(getattr(path[-1], "key", "")).startswith("folded_"):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} marks weights that have their scales"
                " multiplied in, for inference: they are not on the sphere; project the raw ones."
            )
    if callable(axes):
        axes = axes(params)
    treedef = cast(Any, treedef)  # mypy knows nothing of PyTreeDef
    try:
        # Whatever stands where params have a leaf is that leaf's axis, tuples included.
        flat_axes = treedef.flatten_up_to(axes)
    except ValueError as e:
        raise ValueError(f"axes must have the structure of params, one entry a leaf: {e}") from e
    flat_rest = [treedef.flatten_up_to(tree) for tree in rest]
    out = []
    for (path, leaf), axis, *others in zip(paths_leaves, flat_axes, *flat_rest, strict=True):
        out.append(fn(_check_axis(axis, leaf, path), leaf, *others))
    return treedef.unflatten(out)


def keep_params_on_sphere(
    axes: Axes, radius: jax.typing.ArrayLike = 1.0
) -> optax.GradientTransformation:
    r"""Modifies the updates so that chosen vectors of the parameters keep a given norm.

    For a parameter :math:`w`, seen as a set of vectors :math:`w_i` along the given axes,
    and an incoming update :math:`u`, the outgoing update is

    .. math::

      u_i' = r \frac{w_i + u_i}{\|w_i + u_i\|_2} - w_i

    so that :func:`optax.apply_updates` puts each vector on the sphere of radius
    :math:`r`. It is the projection of nGPT (the weights are normalized after every
    optimizer step), and the retraction of Riemannian descent. Computed in at least
    float32. A vector that an update would send exactly to zero has every point of the
    sphere as its nearest one: it stays where it is.

    In a chain of transformations, this should be the last one.

    Args:
      axes: a pytree with the structure of the parameters, an int or a tuple of ints (the
        axes along which one vector lies; all other axes count vectors) for each leaf, None
        for a leaf to be left alone; or a function from parameters to such a pytree.
        Inside :func:`optax.inject_hyperparams` pass ``static_args=("axes",)``.
      radius: the norm to keep, a number.

    Returns:
      A :class:`optax.GradientTransformation`. ``None`` and masked leaves pass through, and
      updates get the dtype of their parameter. With float32 parameters norms are kept to
      a few 1e-7; with bfloat16 parameters to about 2^-9, the rounding of the entries.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from ngpt_jax.projection import keep_params_on_sphere, project_params
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> axes = {"kernel": 0, "bias": None}  # each column is a unit vector
      >>> params = project_params(params, axes)
      >>> tx = optax.chain(optax.adam(1e-2), keep_params_on_sphere(axes))
      >>> state = tx.init(params)
      >>> grads = {"kernel": jnp.arange(12.0).reshape(4, 3), "bias": jnp.ones(3)}
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(jnp.linalg.norm(params["kernel"], axis=0).round(5))
      [1. 1. 1.]

    References:
      Loshchilov et al, `nGPT: Normalized Transformer with Representation Learning on the
      Hypersphere <https://arxiv.org/abs/2410.01131>`_, 2024

    .. warning::
      Weights start on the sphere only if they are put there: see :func:`project_params`.
      Transformations after this one (weight decay, a learning rate) undo it.
    """

    def init_fn(params):
        if jax.tree.leaves(params):  # none in the placeholder of optax.tree.map_params
            _map_with_axes(lambda axis, p: p, axes, params)  # refuses wrong axes before training
        return KeepParamsOnSphereState()

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError(
                "keep_params_on_sphere needs the parameters: tx.update(updates, state, params)."
            )

        def project(axis, p, u):
            if axis is None or _is_absent(u):
                return u
            w = sphere.promote(p)
            moved = w + u.astype(w.dtype)
            inverse = sphere.inverse_norm(moved, axis)
            moves = (inverse > 0) | ~jnp.isfinite(moved)  # a NaN or inf must stay visible
            projected = jnp.where(moves, radius * moved * inverse - w, 0)
            return projected.astype(p.dtype)

        return _map_with_axes(project, axes, params, updates), state

    return optax.GradientTransformation(init_fn, update_fn)


def project_params(params: PyTree, axes: Axes, radius: jax.typing.ArrayLike = 1.0) -> PyTree:
    """Puts the chosen vectors of ``params`` on the sphere, for example after init.

    Args:
      params: a pytree of arrays.
      axes: as in :func:`keep_params_on_sphere`.
      radius: the norm wanted.

    Returns:
      Parameters of the same structure, dtypes and shardings; zero vectors stay zero.
    """

    def project(axis, p):
        if axis is None:
            return p
        return (radius * sphere.normalize(sphere.promote(p), axis)).astype(p.dtype)

    return _map_with_axes(project, axes, params)


def sphere_deviation(params: PyTree, axes: Axes, radius: jax.typing.ArrayLike = 1.0) -> PyTree:
    """How far each leaf is off its sphere.

    Args:
      params: a pytree of arrays.
      axes: as in :func:`keep_params_on_sphere`.
      radius: the norm expected.

    Returns:
      A pytree like ``params`` with the largest ``| ||w_i|| - radius |`` of each leaf as a
      scalar in at least float32; None where ``axes`` is None.
    """

    def worst(axis, p):
        return None if axis is None else jnp.max(sphere.deviation(p, axis, radius))

    return _map_with_axes(worst, axes, params)
