"""Geometry of the unit hypersphere: pure functions on arrays, jax alone.

Every function reads its input in at least float32, that is in
``promote_types(x.dtype, float32)``, and returns the dtype of its first argument,
so that bfloat16 stays bfloat16 outside and float64 stays float64 throughout.

``axis`` is the axis (an int) or the axes (a tuple of ints) along which one vector
lies; all other axes count vectors. Equation numbers are those of the nGPT paper,
https://arxiv.org/abs/2410.01131.
"""

import jax
import jax.numpy as jnp

Axis = int | tuple[int, ...]


def promote(x: jax.typing.ArrayLike) -> jax.Array:
    """Casts ``x`` to at least float32; float64 is left alone."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def safe_norm(x: jax.Array, axis: Axis = -1, keepdims: bool = False) -> jax.Array:
    """Euclidean norm in at least float32, with gradient zero at the zero vector."""
    square = jnp.sum(jnp.square(promote(x)), axis=axis, keepdims=keepdims)
    nonzero = square > 0
    return jnp.where(nonzero, jnp.sqrt(jnp.where(nonzero, square, 1)), 0)


def inverse_norm(x: jax.Array, axis: Axis = -1) -> jax.Array:
    """``1 / ||x||`` with kept dimensions, and 0 (gradient 0) for a zero vector.

    A vector whose squared norm is below the smallest normal number of its dtype, or beyond
    the largest (float32: a norm below about 1e-19, or above 1e19), counts as zero.
    """
    x = promote(x)
    square = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    nonzero = square >= jnp.finfo(x.dtype).tiny
    return jnp.where(nonzero, jax.lax.rsqrt(jnp.where(nonzero, square, 1)), 0)


def normalize(x: jax.typing.ArrayLike, axis: Axis = -1) -> jax.Array:
    """Norm(x) = x / ||x||_2, the paper's Norm (section 2.1).

    Args:
      x: any array.
      axis: the axis or axes along which a vector lies.

    Returns:
      An array like ``x`` whose vectors have norm 1. A zero vector stays zero and
      has a finite (zero) gradient; nothing is ever NaN for finite input.
    """
    x = jnp.asarray(x)
    y = promote(x)
    return (y * inverse_norm(y, axis)).astype(x.dtype)


def lerp(a: jax.Array, b: jax.Array, t: jax.typing.ArrayLike, axis: Axis = -1) -> jax.Array:
    """Norm(a + t (b - a)): the straight step from a towards b, back on the sphere.

    Equations 10 and 11 with ``a = h``, ``b = h_A`` or ``h_M`` and ``t = alpha``, the
    cheap replacement of :func:`slerp`.

    Args:
      a, b: unit vectors along ``axis``, of one shape.
      t: step size, broadcast against ``a``; elementwise in nGPT.
      axis: the axis of a vector.
    """
    a32 = promote(a)
    return normalize(a32 + promote(t) * (promote(b) - a32), axis).astype(a.dtype)


def angle(a: jax.Array, b: jax.Array, axis: Axis = -1, keepdims: bool = False) -> jax.Array:
    """Angle between unit vectors in radians, in [0, pi].

    Kahan's ``2 atan2(||a - b||, ||a + b||)``: exact to rounding at 0 and at pi, where
    the arccos of a dot product loses half of the digits.
    """
    a32, b32 = promote(a), promote(b)
    theta = 2 * jnp.arctan2(
        safe_norm(a32 - b32, axis, keepdims), safe_norm(a32 + b32, axis, keepdims)
    )
    return theta.astype(a.dtype)


def _sinc(x: jax.Array) -> jax.Array:
    """sin(x) / x. Unlike jnp.sinc it has exact derivatives at small x, from a series below 1/2."""
    square = jnp.square(x)
    small = square < 0.25
    series = jnp.ones_like(x)
    for n in (156, 110, 72, 42, 20, 6):
        series = 1 - square / n * series
    x = jnp.where(small, 1, x)
    return jnp.where(small, series, jnp.sin(x) / x)


def slerp(a: jax.Array, b: jax.Array, t: jax.typing.ArrayLike, axis: Axis = -1) -> jax.Array:
    """Spherical interpolation along the great circle from a (t=0) to b (t=1).

    Equation 6: ``sin((1-t) theta)/sin(theta) a + sin(t theta)/sin(theta) b``.

    Args:
      a, b: unit vectors along ``axis``, of one shape.
      t: share of the way, broadcast against ``a``; a number for each vector has length 1 along
        ``axis``. With a number for each entry, both weights of an entry are those of its own t,
        and the result is off the great circle.
      axis: the axis of a vector.

    Returns:
      Unit vectors. Exact for a = b, with exact derivatives. Antipodal points have no single great
      circle: the result is finite and of no defined direction.
    """
    a32, b32, t32 = promote(a), promote(b), promote(t)
    theta = angle(a32, b32, axis, keepdims=True)

    # sin(s theta) = theta s sinc(s theta), smooth at 0. The positive factor sin(theta) / theta
    # of both weights is left to the norm: it is 0 at antipodes.
    def weight(s):
        return s * _sinc(s * theta)

    return normalize(weight(1 - t32) * a32 + weight(t32) * b32, axis).astype(a.dtype)


def tangent(x: jax.Array, v: jax.Array, axis: Axis = -1) -> jax.Array:
    """The part of ``v`` in the tangent space at ``x``: ``v - <x, v> x``.

    Args:
      x: unit vectors along ``axis``.
      v: vectors of the same shape, for example gradients.
      axis: the axis of a vector.
    """
    x32, v32 = promote(x), promote(v)
    radial = jnp.sum(x32 * v32, axis=axis, keepdims=True)
    return (v32 - radial * x32).astype(v.dtype)


def retract(x: jax.Array, v: jax.Array, axis: Axis = -1) -> jax.Array:
    """Norm(x + v): leaves the sphere along ``v`` and comes back (appendix A.3)."""
    return normalize(promote(x) + promote(v), axis).astype(x.dtype)


def deviation(x: jax.Array, axis: Axis = -1, radius: jax.typing.ArrayLike = 1.0) -> jax.Array:
    """``| ||x|| - radius |`` of every vector, in at least float32; 0 on the sphere."""
    return jnp.abs(safe_norm(x, axis) - radius)
