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


# A number, an array that broadcasts against the norms, or a tree of such, one for each leaf.
Radius = PyTree


class KeepParamsOnSphereState(NamedTuple):
    """State of :func:`keep_params_on_sphere` with ``radius="initial"``; else there is none.

    Attributes:
      norms: a tree like the parameters of the norms of their vectors, in at least float32 with kept
        dimensions; :class:`optax.MaskedNode` where a leaf is left alone.
    """

    norms: PyTree


def is_absent(leaf) -> bool:
    """Leaves that optax and Equinox leave out of a tree: they pass through."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


_FLAT = (
    "The parameters are one array here: put optax.flatten around the optimizer alone, not around"
    " this transformation."
)
_STATIC = 'inside optax.inject_hyperparams, pass static_args=("axes",)'


def _check_axis(axis, leaf, path):
    """Returns ``axis`` as None or a tuple of axes; refuses everything else."""
    if axis is None or is_absent(leaf):
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
            elif not jax.tree_util.all_leaves([a]):
                mend = " With nnx.Optimizer give axes as a function of the parameters."
            raise TypeError(
                f"{where} must be a Python int, a tuple of ints or None, got"
                f" {' '.join(repr(a).split()):.60} of type {type(a).__name__}.{mend}"
            )
        if not -jnp.ndim(leaf) <= a < jnp.ndim(leaf):
            raise ValueError(f"{where} = {a} is out of range for shape {jnp.shape(leaf)}.")
    if len({a % jnp.ndim(leaf) for a in axes}) < len(axes):
        raise ValueError(f"{where} = {axis} names an axis twice for shape {jnp.shape(leaf)}.")
    if not axes:
        raise ValueError(f"{where} is an empty tuple; use None to leave a leaf alone.")
    return axes


def map_with_axes(fn: Callable, axes: Axes, params: PyTree, *rest: PyTree) -> PyTree:
    """Maps a function over the leaves of parameters and their axes.

    Args:
      fn: called as ``fn(axis, param, *rest)``; axis is None or a tuple of ints.
      axes, params: as in :func:`keep_params_on_sphere`. Wrong axes are refused.
      rest: trees that have something, of any kind, for each leaf of params.

    Returns:
      A tree like ``params`` of what fn returns.
    """
    paths_leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_absent)
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


def check_number(name: str, x: Any, most: float = np.inf) -> None:
    """Refuses what is no number or array in [0, most], as far as a traced one can be known."""
    if not hasattr(x, "__array__") and not isinstance(x, int | float | complex):
        mend = " For a schedule use optax.inject_hyperparams." if callable(x) else ""
        known = ' (or "initial" in keep_params_on_sphere)' if name == "radius" else ""
        raise TypeError(f"{name} must be a number{known}, got {x!r}.{mend}")
    if jnp.iscomplexobj(x):
        raise TypeError(f"{name} must be real, got {x!r}.")
    if isinstance(x, jax.core.Tracer):
        return
    if not np.all(np.asarray(x) >= 0):
        raise ValueError(f"{name} must not be negative, got {x!r}.")
    if not np.all(np.asarray(x) <= most):
        raise ValueError(f"{name} must not be above {most}, got {x!r}.")


def _check_radius(radius: Radius) -> None:
    """Refuses what is no radius, nor a tree of radii."""
    for r in jax.tree.leaves(radius) or [radius] * (radius is None):
        check_number("radius", r)


def _radii(radius: Radius, params: PyTree) -> PyTree:
    """A radius for each leaf of params."""
    treedef = cast(Any, jax.tree.structure(params, is_leaf=is_absent))
    if hasattr(radius, "__array__") or isinstance(radius, int | float):
        return treedef.unflatten([radius] * treedef.num_leaves)
    try:
        treedef.flatten_up_to(radius)
        return radius
    except ValueError as e:
        raise ValueError(
            f"radius must be one number or array, or have the structure of params: {e}"
        ) from e


def as_norms(value: Any, x: jax.Array, axis: tuple[int, ...], name: str = "radius") -> jax.Array:
    """The option ``name`` in the dtype of the norms of x; refuses what has not their shape."""
    if is_absent(value):
        raise ValueError(f"{name} must have a number or an array for each leaf that has an axis.")
    r = jnp.asarray(value, jnp.finfo(x.dtype).dtype)
    kept = {a % x.ndim for a in axis}
    shape = tuple(1 if i in kept else n for i, n in enumerate(x.shape))
    if r.ndim > x.ndim or any(n not in (1, m) for n, m in zip(r.shape[::-1], shape[::-1])):
        raise ValueError(
            f"{name} must broadcast against the norms with kept dimensions, {shape}; got {r.shape}."
        )
    return r


def keep_params_on_sphere(
    axes: Axes,
    radius: Radius = 1.0,
    axis_name: sphere.AxisName = None,
    *,
    mode: str = "sphere",
    shares: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike] | None = None,
    retraction: str = "normalize",
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

    Two modes are softer. In a ball, vectors whose norm is at most :math:`r` are left alone. The
    brake keeps a share :math:`s` of each change of norm: the new norm is
    :math:`\|w_i\| + s (\|w_i + u_i\| - \|w_i\|)`. The exponential map goes along a great circle:
    the part of :math:`u_i` along :math:`w_i` is dropped, and the rest :math:`t_i` turns the vector
    by the angle :math:`\|t_i\| / r`.

    .. math::

      w_i + u_i' = r \left(\cos\frac{\|t_i\|}{r} \frac{w_i}{\|w_i\|}
      + \sin\frac{\|t_i\|}{r} \frac{t_i}{\|t_i\|}\right)

    In a chain of transformations, this should be the last one.

    Args:
      axes: a pytree with the structure of the parameters, an int or a tuple of ints (the
        axes along which one vector lies; all other axes count vectors) for each leaf, None
        for a leaf to be left alone; or a function from parameters to such a pytree.
        Inside :func:`optax.inject_hyperparams` pass ``static_args=("axes",)``. A leaf with an
        axis must be of a real or complex floating dtype. With all axes of a matrix its Frobenius
        norm is kept.
      radius: the norm to keep, not negative: a number, an array that broadcasts against the norms
        with kept dimensions, or a pytree of these with the structure of the parameters. Or
        ``"initial"``: the norms of the parameters that ``init`` was given, which the state keeps; a
        vector that is zero there is left free.
      axis_name: inside :func:`jax.shard_map`, the mesh axis or axes that cut each vector: norms
        are then summed over them. Without it each device there sees its own piece, and makes that
        a unit vector. Under :func:`jax.jit` alone vectors may be cut in any way.
      mode: ``"sphere"``, ``"ball"`` or ``"brake"``. The brake has no radius.
      shares: for the brake, the shares of a growing and of a falling norm, both in [0, 1]. With
        (0, 0) each vector keeps its norm, with (1, 1) it is free, with (0, 1) no norm ever grows.
      retraction: ``"normalize"``, or ``"exp"`` for the exponential map, on the sphere alone. A zero
        vector has no great circle: it is normalized, but where the square of the update is too
        small for its dtype it stays.

    Returns:
      A :class:`optax.GradientTransformation`. ``None`` and masked leaves pass through, and
      updates get the dtype of their parameter. Norms are kept to a few 1e-7 of the radius with
      float32 parameters near the sphere; of vectors far outside, to 1e-7 of their length at the
      first step. With bfloat16 parameters update and sum are rounded once
      each: the norm is off by at most 2^-8 (radius + the length of the step), and by much less
      where vectors have many entries. NaN and infinity in an update stay visible.

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

      The Frobenius norm that the kernel has, the root of 3:

      >>> tx = keep_params_on_sphere({"kernel": (0, 1), "bias": None}, radius="initial")
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> print(jnp.square(params["kernel"] + updates["kernel"]).sum().round(4))
      3.0

    References:
      Loshchilov et al, `nGPT: Normalized Transformer with Representation Learning on the
      Hypersphere <https://arxiv.org/abs/2410.01131>`_, 2024

      Wen et al, `Hyperball <https://arxiv.org/abs/2606.16899>`_, 2026: the initial Frobenius norm

    .. warning::
      Weights start on the sphere only if they are put there: see :func:`project_params`.
      Transformations after this one (weight decay, a learning rate) undo it. Wrappers that keep
      a copy or an average of the parameters of their own (schedule_free, lookahead, ema, mechanize)
      do not see it: put what they give for evaluation back with :func:`project_params`.
    """
    initial = isinstance(radius, str) and radius == "initial"
    _check_options(radius, initial, mode, shares, retraction)

    def init_fn(params):
        def first(axis, p):
            if axis is None:
                return optax.MaskedNode()
            return sphere.norms(p, axis, axis_name)

        if not jax.tree.leaves(params):  # none in the placeholder of optax.tree.map_params
            return KeepParamsOnSphereState(params) if initial else optax.EmptyState()
        if initial:
            return KeepParamsOnSphereState(map_with_axes(first, axes, params))
        # Wrong axes and radii are refused before training.
        map_with_axes(lambda axis, p, r: p, axes, params, _radii(radius, params))
        return optax.EmptyState()

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError(
                "keep_params_on_sphere needs the parameters: tx.update(updates, state, params)."
            )

        def keep(axis, p, u, r):
            if axis is None or is_absent(u):
                return u
            w = sphere.promote(p)
            change = u.astype(w.dtype)
            r = sphere.norms(w, axis, axis_name) if mode == "brake" else as_norms(r, w, axis)
            moved = w + change
            scaled, scale, square = sphere.rescale(moved, axis, axis_name)
            inverse = sphere.safe_rsqrt(square)
            moves = (inverse > 0) | ~jnp.isfinite(moved)  # a NaN or inf must stay visible
            kept = jnp.where(moves, r * scaled * inverse - w, 0)
            if mode == "ball":
                kept = jnp.where(jnp.sqrt(square) / scale > r, kept, change)
            if shares is not None:
                outward, inward = (as_norms(s, w, axis, "shares") for s in shares)
                share = jnp.where(jnp.sqrt(square) / scale > r, outward, inward)
                kept = share * change + (1 - share) * kept
            if retraction == "exp":
                kept = r * sphere.exponential(w, change, r, axis, axis_name) - w
            if initial:
                kept = jnp.where(r > 0, kept, change)
            return kept.astype(p.dtype)

        radii = state.norms if initial else _radii(radius, params)
        return map_with_axes(keep, axes, params, updates, radii), state

    return optax.GradientTransformation(init_fn, update_fn)


def _check_options(radius, initial: bool, mode: str, shares, retraction: str) -> None:
    """Refuses options that are none, or that do not go together."""
    if mode not in ("sphere", "ball", "brake"):
        raise ValueError(f'mode must be "sphere", "ball" or "brake", got {mode!r}.')
    if retraction not in ("normalize", "exp"):
        raise ValueError(f'retraction must be "normalize" or "exp", got {retraction!r}.')
    if retraction == "exp" and mode != "sphere":
        raise ValueError(f'retraction="exp" keeps on the sphere, not with mode={mode!r}.')
    if (shares is None) == (mode == "brake"):
        raise ValueError('mode="brake" needs shares=(outward, inward), and no other mode does.')
    if shares is not None:
        if not isinstance(shares, tuple | list) or len(shares) != 2:
            raise ValueError(f"shares must be a pair (outward, inward), got {shares!r}.")
        for share in shares:
            check_number("shares", share, most=1.0)
    if not initial:
        _check_radius(radius)
    known = not isinstance(radius, jax.core.Tracer)
    if mode == "brake" and known and (initial or not np.array_equal(np.asarray(radius), 1)):
        raise ValueError('mode="brake" starts from the norm of each vector; leave out radius.')


def project_params(
    params: PyTree, axes: Axes, radius: Radius = 1.0, axis_name: sphere.AxisName = None
) -> PyTree:
    """Puts the chosen vectors of ``params`` on the sphere, for example after init.

    Args:
      params: a pytree of arrays.
      axes, axis_name: as in :func:`keep_params_on_sphere`.
      radius: the norm wanted, a number, an array or a pytree as there.

    Returns:
      Parameters of the same structure, dtypes and shardings; zero vectors stay zero.
    """

    def project(axis, p, r):
        if axis is None:
            return p
        scaled, _, square = sphere.rescale(p, axis, axis_name)
        r = as_norms(r, scaled, axis)
        return (r * (scaled * sphere.safe_rsqrt(square))).astype(p.dtype)

    _check_radius(radius)
    return map_with_axes(project, axes, params, _radii(radius, params))


def sphere_deviation(
    params: PyTree, axes: Axes, radius: Radius = 1.0, axis_name: sphere.AxisName = None
) -> PyTree:
    """How far each leaf is off its sphere.

    Args:
      params: a pytree of arrays.
      axes, axis_name: as in :func:`keep_params_on_sphere`.
      radius: the norm expected, a number, an array or a pytree as there.

    Returns:
      A pytree like ``params`` with the largest ``| ||w_i|| - radius |`` of each leaf as a
      scalar in at least float32; None where ``axes`` is None.
    """

    def worst(axis, p, r):
        if axis is None:
            return None
        scaled, scale, square = sphere.rescale(p, axis, axis_name)
        norm = jnp.sqrt(square) / scale
        return jnp.max(jnp.abs(norm - as_norms(r, scaled, axis)))

    _check_radius(radius)
    return map_with_axes(worst, axes, params, _radii(radius, params))
