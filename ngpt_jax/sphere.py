"""Geometry of the unit hypersphere: pure functions on arrays, jax alone.

Every function reads its input in at least float32, that is in
``promote_types(x.dtype, float32)``. Points and vectors come back in the dtype that they
had (whole numbers in float32), so that bfloat16 stays bfloat16 outside and float64 stays
float64 throughout; norms come in at least float32. Norms of complex
vectors are those of ``|x|``.

``axis`` is the axis (an int) or the axes (a tuple of ints) along which one vector
lies; all other axes count vectors. Equation numbers are those of the nGPT paper,
https://arxiv.org/abs/2410.01131.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

Axis = int | tuple[int, ...]
AxisName = str | tuple[str, ...] | None


def promote(x: jax.typing.ArrayLike) -> jax.Array:
    """Casts ``x`` to at least float32; float64 and complex numbers are left alone."""
    x = jnp.asarray(x)
    wide = jnp.issubdtype(x.dtype, jnp.inexact) and jnp.finfo(x.dtype).bits >= 32
    return x if wide else x.astype(jnp.float32)


def _like(x: jax.Array, a: jax.Array) -> jax.Array:
    """``x`` in the dtype of ``a``, where that is no whole number."""
    return x.astype(a.dtype) if jnp.issubdtype(a.dtype, jnp.inexact) else x


def _dot(a: jax.Array, b: jax.Array, axis: Axis, keepdims: bool = True) -> jax.Array:
    """Real inner products; those of complex vectors are the real part of sum(conj(a) b)."""
    return jnp.sum((jnp.conj(a) * b).real, axis=axis, keepdims=keepdims)


def rescale(
    x: jax.Array, axis: Axis = -1, axis_name: AxisName = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Vectors times a power of two, so that no square of an entry over- or underflows.

    A power of two changes no digit. Gradients go through the vectors, not through the power.

    Args:
      x: any array.
      axis: the axis or axes along which a vector lies.
      axis_name: inside :func:`jax.shard_map`, the mesh axis or axes that cut a vector.

    Returns:
      ``x`` in at least float32 times 2^k, with the largest entry of each vector in [1, 2), or in
      [2, 4) at the upper end of the dtype; 2^k; and the squared norm of the first. The last two
      have kept dimensions. Where the device takes subnormal numbers for zero, so does this
      function.
    """
    x = promote(x)
    parts = (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
    top = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(p), axis, keepdims=True) for p in parts))
    top = jax.lax.stop_gradient(top)
    top = top if axis_name is None else jax.lax.pmax(top, axis_name)
    # By the bits: jnp.ldexp computes 2^k as a power, which is not exact in fused programs.
    info = jnp.finfo(top.dtype)
    exponents = 2 * info.maxexp - 2  # 254 in float32: that of 1 is 127
    bits = jax.lax.bitcast_convert_type(top, jnp.dtype(f"int{info.bits}"))
    exponent = jnp.minimum(bits >> info.nmant, exponents - 1)  # 2^k is a normal number too
    scale = jax.lax.bitcast_convert_type((exponents - exponent) << info.nmant, top.dtype)
    scaled = x * scale
    square = _dot(scaled, scaled, axis)
    return scaled, scale, square if axis_name is None else jax.lax.psum(square, axis_name)


def safe_rsqrt(square: jax.Array) -> jax.Array:
    """``1 / sqrt(square)``, and 0 (gradient 0) at 0."""
    return jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def norms(x: jax.Array, axis: Axis = -1, axis_name: AxisName = None) -> jax.Array:
    """Norms with kept dimensions in at least float32, for no gradients; see :func:`rescale`."""
    _, scale, square = rescale(x, axis, axis_name)
    return jnp.sqrt(square) / scale


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def safe_norm(x: jax.Array, axis: Axis = -1, keepdims: bool = False) -> jax.Array:
    """Euclidean norm in at least float32, with gradient zero at the zero vector."""
    norm = norms(x, axis)
    return norm if keepdims else jnp.squeeze(norm, axis)


@safe_norm.defjvp
def _safe_norm_jvp(axis, keepdims, primals, tangents):
    (x,), (dx,) = primals, tangents
    return safe_norm(x, axis, keepdims), _dot(
        normalize(promote(x), axis), promote(dx), axis, keepdims
    )


def normalize(x: jax.typing.ArrayLike, axis: Axis = -1) -> jax.Array:
    """Norm(x) = x / ||x||_2, the paper's Norm (section 2.1).

    The gradient is (g - y <y, g>) / ||x|| with y = Norm(x), formed so that nothing on the way
    overflows.

    Args:
      x: any array.
      axis: the axis or axes along which a vector lies.

    Returns:
      An array like ``x``, or in float32 for whole numbers, whose vectors have norm 1, whatever
      their size. A zero vector stays zero and has a zero gradient; nothing is ever NaN for finite
      input.
    """
    x = jnp.asarray(x)
    return _normalize(x if jnp.issubdtype(x.dtype, jnp.inexact) else promote(x), axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _normalize(x: jax.Array, axis: Axis) -> jax.Array:
    scaled, _, square = rescale(x, axis)
    return (scaled * safe_rsqrt(square)).astype(x.dtype)


@_normalize.defjvp
def _normalize_jvp(axis, primals, tangents):
    (x,), (dx,) = primals, tangents
    scaled, scale, square = rescale(x, axis)
    inverse = safe_rsqrt(square)
    y, dx = scaled * inverse, promote(dx)
    dy = (dx - y * _dot(y, dx, axis)) * inverse * scale
    return y.astype(x.dtype), dy.astype(x.dtype)


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
    return _like(normalize(a32 + promote(t) * (promote(b) - a32), axis), a)


def angle(a: jax.Array, b: jax.Array, axis: Axis = -1, keepdims: bool = False) -> jax.Array:
    """Angle between unit vectors in radians, in [0, pi].

    Kahan's ``2 atan2(||a - b||, ||a + b||)``: exact to rounding at 0 and at pi, where
    the arccos of a dot product loses half of the digits.
    """
    a32, b32 = promote(a), promote(b)
    opposite = safe_norm(a32 - b32, axis, keepdims)
    adjacent = safe_norm(a32 + b32, axis, keepdims)
    both_zero = (opposite == 0) & (adjacent == 0)  # then arctan2 has no derivative
    theta = 2 * jnp.arctan2(opposite, jnp.where(both_zero, 1, adjacent))
    return _like(theta, a)


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

    return _like(normalize(weight(1 - t32) * a32 + weight(t32) * b32, axis), a)


def tangent(x: jax.Array, v: jax.Array, axis: Axis = -1) -> jax.Array:
    """The part of ``v`` in the tangent space at ``x``: ``v - <x, v> x``.

    Args:
      x: unit vectors along ``axis``.
      v: vectors of the same shape, for example gradients.
      axis: the axis of a vector.
    """
    x32, v32 = promote(x), promote(v)
    return _like(v32 - _dot(x32, v32, axis) * x32, v)


class Parts(NamedTuple):
    """What :func:`split` returns, in at least float32.

    Attributes:
      direction: unit vectors w / ||w||, zero where w is.
      norm: ||w||, with kept dimensions.
      radial: <w / ||w||, u>, with kept dimensions.
      tangent: the rest of u, at right angles to w to rounding.
      square: the squared norm of ``tangent``, with kept dimensions.
    """

    direction: jax.Array
    norm: jax.Array
    radial: jax.Array
    tangent: jax.Array
    square: jax.Array


def split(w: jax.Array, u: jax.Array, axis: Axis = -1, axis_name: AxisName = None) -> Parts:
    """The parts of u along w and at right angles to it.

    Args:
      w: vectors along ``axis``, of any size; where one is zero, u has no part along it.
      u: vectors of the same shape; where the square matters, :func:`rescale` them before.
      axis: the axis or axes of a vector.
      axis_name: inside :func:`jax.shard_map`, the mesh axis or axes that cut a vector.
    """

    def dot(a, b):
        out = _dot(a, b, axis)
        return out if axis_name is None else jax.lax.psum(out, axis_name)

    scaled, scale, square = rescale(w, axis, axis_name)
    inverse, norm, u = safe_rsqrt(square), jnp.sqrt(square) / scale, promote(u)
    direction = scaled * inverse
    radial = inverse * dot(scaled, u)
    tangent = u - radial * direction
    left = dot(direction, tangent)  # what rounding left along w; one pass makes both sums
    square = dot(tangent, tangent) - left * left
    square = jnp.where(square < 0, 0, square)  # jnp.maximum would halve derivatives at 0
    return Parts(direction, norm, radial + left, tangent - left * direction, square)


def exponential(
    w: jax.Array,
    u: jax.Array,
    radius: jax.typing.ArrayLike = 1.0,
    axis: Axis = -1,
    axis_name: AxisName = None,
) -> jax.Array:
    """Where the exponential map of a sphere takes w along u, as unit vectors.

    With t the part of u at right angles to w, over the radius, it is
    ``cos(||t||) w / ||w|| + sin(||t||) t / ||t||``. At t = 0 its derivatives of every order are
    exact. For w and u of any size it is finite, and so is its gradient where w is not tiny.

    Args:
      w: vectors along ``axis``.
      u: vectors of the same shape.
      radius: of the sphere, broadcast against the norms with kept dimensions.
      axis, axis_name: as in :func:`split`.

    Returns:
      Vectors in at least float32, of norm 1 to rounding. A zero w lies on no great circle: there
      it is the direction of u, and 0 where u is zero too, or its squared norm is.
    """
    radius = jnp.asarray(radius, jnp.finfo(promote(u).dtype).dtype)
    u = promote(u) / jnp.where(radius > 0, radius, 1)
    most = float(jnp.finfo(radius.dtype).max) ** 0.4  # such an angle has no digits
    u = u * (most / jnp.maximum(jnp.abs(u), most))  # infinity becomes NaN
    parts = split(w, u, axis, axis_name)
    # Near 0 by series in the squared angle, which is smooth where the angle is not.
    near = parts.square < 0.25
    small, square = (jnp.where(near, x, 0) for x in (parts.tangent, parts.square))
    cos = sinc = jnp.ones_like(square)
    for n in (12, 10, 8, 6, 4, 2):
        cos, sinc = 1 - square / (n * (n - 1)) * cos, 1 - square / (n * (n + 1)) * sinc
    alone = parts.norm == 0
    square = jnp.where(near & ~alone, 0, parts.square)
    inverse = safe_rsqrt(square)
    far, angle = parts.tangent * inverse, square * inverse
    turned = jnp.where(
        near,
        cos * parts.direction + sinc * small,
        jnp.cos(angle) * parts.direction + jnp.sin(angle) * far,
    )
    return jnp.where(alone, far, turned)


def retract(x: jax.Array, v: jax.Array, axis: Axis = -1) -> jax.Array:
    """Norm(x + v): leaves the sphere along ``v`` and comes back (appendix A.3)."""
    return _like(normalize(promote(x) + promote(v), axis), x)


def deviation(x: jax.Array, axis: Axis = -1, radius: jax.typing.ArrayLike = 1.0) -> jax.Array:
    """``| ||x|| - radius |`` of every vector, in at least float32; 0 on the sphere."""
    return jnp.abs(safe_norm(x, axis) - radius)
