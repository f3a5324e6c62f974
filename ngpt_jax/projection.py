"""Keeps chosen weights on a sphere: an optax transformation, jax and optax alone.

``optax.projections.projection_l2_sphere`` divides by the norm of the *whole tree* (and
gives NaN at zero). Here every leaf says along which axis its vectors lie.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
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


_FLAT = (
    "The parameters are one array here: put optax.flatten around the optimizer alone, not around"
    " this transformation."
)
_STATIC = 'inside optax.inject_hyperparams, pass static_args=("axes",)'


def _check_axis(axis, leaf, path):
    """Returns ``axis`` as None or a tuple of axes; refuses everything else."""
    if axis is None or _is_absent(leaf):
        return None
    axes = axis if isinstance(axis, tuple) else (axis,)
    where = f"axes{jax.tree_util.keystr(path)}"
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        raise TypeError(
            f"{where}: a parameter of dtype {jnp.result_type(leaf)} has no unit vectors; its axis"
            " must be None."
        )
    for a in axes:
        if not isinstance(a, int | np.integer) or isinstance(a, bool):
            mend = ""
            if isinstance(a, list):
                mend = " Give several axes as a tuple."
            elif not path and isinstance(a, Mapping):
                mend = f" {_FLAT}"
            elif isinstance(a, jax.Array):
                mend = f" {_STATIC[0].upper()}{_STATIC[1:]}."
            raise TypeError(
                f"{where} must be a Python int, a tuple of ints or None, got {a!r} of type"
                f" {type(a).__name__}.{mend}"
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
    # A function; not a tree of modules that can be called, as Equinox's can.
    if callable(axes) and jax.tree_util.all_leaves([axes]):
        axes = axes(params)
    treedef = cast(Any, treedef)  # mypy knows nothing of PyTreeDef
    try:
        # Whatever stands where params have a leaf is that leaf's axis, tuples included.
        flat_axes = treedef.flatten_up_to(axes)
    except ValueError as e:
        raise ValueError(
            f"axes must have the structure of params, one entry a leaf: {e} {_mend(axes, params)}"
        ) from e
    flat_rest = [treedef.flatten_up_to(tree) for tree in rest]
    out = []
    for (path, leaf), axis, *others in zip(paths_leaves, flat_axes, *flat_rest, strict=True):
        out.append(fn(_check_axis(axis, leaf, path), leaf, *others))
    return treedef.unflatten(out)


def _mend(axes: PyTree, params: PyTree) -> str:
    """What to do about axes whose structure is not that of the parameters."""
    if isinstance(params, jax.Array) and params.ndim == 1 and not isinstance(axes, int):
        return _FLAT
    number = isinstance(axes, jax.Array | int)  # what inject_hyperparams makes of a function
    return (
        "Make axes from the parameters: jax.tree.map(lambda p: ..., params), or give a function"
        " such as lambda params: jax.tree.map(lambda p: ..., params)"
        f"{f'; {_STATIC}' if number else ''}."
    )


def _check_radius(radius: jax.typing.ArrayLike) -> None:
    """Refuses what is no radius, as far as a traced one can be known."""
    if isinstance(radius, str) or (
        not hasattr(radius, "__array__") and not isinstance(radius, int | float | complex)
    ):
        raise TypeError(f"radius must be a number, got {radius!r} of type {type(radius).__name__}.")
    if jnp.iscomplexobj(radius):
        raise TypeError(f"radius must be real, got {radius!r}.")
    if not isinstance(radius, jax.core.Tracer) and not np.all(np.asarray(radius) >= 0):
        raise ValueError(f"radius must not be negative, got {radius!r}.")


def keep_params_on_sphere(
    axes: Axes, radius: jax.typing.ArrayLike = 1.0, axis_name: sphere.AxisName = None
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
        Inside :func:`optax.inject_hyperparams` pass ``static_args=("axes",)``. A leaf with an
        axis must be of a real or complex floating dtype.
      radius: the norm to keep, a number that is not negative.
      axis_name: inside :func:`jax.shard_map`, the mesh axis or axes that cut each vector: norms
        are then summed over them. Without it each device there sees its own piece, and makes that
        a unit vector. Under :func:`jax.jit` alone vectors may be cut in any way.

    Returns:
      A :class:`optax.GradientTransformation`. ``None`` and masked leaves pass through, and
      updates get the dtype of their parameter. Norms are kept to a few 1e-7 of the radius with
      float32 parameters, of any size. With bfloat16 parameters update and sum are rounded once
      each: the norm is off by at most 2^-8 (radius + the length of the step), and by much less
      where vectors have many entries.

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
      Transformations after this one (weight decay, a learning rate) undo it. Wrappers that keep
      a copy or an average of the parameters of their own (schedule_free, lookahead, ema, mechanize)
      do not see it: put what they give for evaluation back with :func:`project_params`.
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
            scaled, _, square = sphere.rescale(moved, axis, axis_name)
            inverse = sphere.safe_rsqrt(square)
            moves = (inverse > 0) | ~jnp.isfinite(moved)  # a NaN or inf must stay visible
            r = jnp.asarray(radius, inverse.dtype)
            return jnp.where(moves, r * scaled * inverse - w, 0).astype(p.dtype)

        return _map_with_axes(project, axes, params, updates), state

    _check_radius(radius)
    return optax.GradientTransformation(init_fn, update_fn)


def project_params(
    params: PyTree,
    axes: Axes,
    radius: jax.typing.ArrayLike = 1.0,
    axis_name: sphere.AxisName = None,
) -> PyTree:
    """Puts the chosen vectors of ``params`` on the sphere, for example after init.

    Args:
      params: a pytree of arrays.
      axes, axis_name: as in :func:`keep_params_on_sphere`.
      radius: the norm wanted.

    Returns:
      Parameters of the same structure, dtypes and shardings; zero vectors stay zero.
    """

    def project(axis, p):
        if axis is None:
            return p
        scaled, _, square = sphere.rescale(p, axis, axis_name)
        r = jnp.asarray(radius, square.dtype)
        return (r * (scaled * sphere.safe_rsqrt(square))).astype(p.dtype)

    _check_radius(radius)
    return _map_with_axes(project, axes, params)


def sphere_deviation(
    params: PyTree,
    axes: Axes,
    radius: jax.typing.ArrayLike = 1.0,
    axis_name: sphere.AxisName = None,
) -> PyTree:
    """How far each leaf is off its sphere.

    Args:
      params: a pytree of arrays.
      axes, axis_name: as in :func:`keep_params_on_sphere`.
      radius: the norm expected.

    Returns:
      A pytree like ``params`` with the largest ``| ||w_i|| - radius |`` of each leaf as a
      scalar in at least float32; None where ``axes`` is None.
    """

    def worst(axis, p):
        if axis is None:
            return None
        _, scale, square = sphere.rescale(p, axis, axis_name)
        norm = jnp.sqrt(square) / scale
        return jnp.max(jnp.abs(norm - jnp.asarray(radius, norm.dtype)))

    _check_radius(radius)
    return _map_with_axes(worst, axes, params)
