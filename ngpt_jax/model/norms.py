"""Norms, the residual step and SwiGLU, each with a rule of its own for gradients.

The rules of all but :func:`unit` keep their inputs as they are and compute the rest again, so that
little is kept between the passes. They give first derivatives backward only;
:mod:`ngpt_jax.sphere` has all.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ngpt_jax import sphere
from ngpt_jax.parallel import rules


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def unit(x: jax.Array, axis: int = -1) -> jax.Array:
    """Norm(x): unit vectors in the dtype of x, computed in at least float32.

    The backward rule is (g - y <y, g>) / ||x|| with y = Norm(x). Autodiff would form ||x||^-3,
    which overflows long before the gradient does.

    :func:`sphere.normalize` is for vectors of any size and reads them twice. Here a vector whose
    squared norm is below the smallest normal number, or above the largest number of its dtype
    (float32: norms below 1e-19 and above 1e19), counts as zero; near the lower end it loses digits.
    A zero vector stays zero with a zero gradient.
    """
    x32 = sphere.promote(x)
    return (x32 * inverse_root(_sum(x32 * x32, axis))).astype(x.dtype)


@unit.defjvp
def _unit_jvp(axis, primals, tangents):
    (x,), (dx,) = primals, tangents
    x32, dx = sphere.promote(x), sphere.promote(dx)
    inverse = inverse_root(_sum(x32 * x32, axis))
    y = x32 * inverse
    dy = inverse * (dx - y * _sum(y * dx, axis))
    return y.astype(x.dtype), dy.astype(x.dtype)


def on_gpus_apart(x: Any) -> Any:
    """x, behind a barrier on GPUs.

    Without it XLA for GPUs stores float32 values of the forward pass for the backward rules, and
    the float32 result beside the rounded one. TPUs have no use for it: it only hinders fusion.
    """
    return jax.lax.optimization_barrier(x) if rules.platform() == "gpu" else x


def _sum(x: jax.Array, axis: int = -1) -> jax.Array:
    return jnp.sum(x, axis=axis, keepdims=True)


def inverse_root(square: jax.Array) -> jax.Array:
    """1 / sqrt(square), and 0 where that is not a normal number."""
    there = square >= jnp.finfo(square.dtype).tiny
    return jnp.where(there, jax.lax.rsqrt(jnp.where(there, square, 1)), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def residual_step(
    h: jax.Array, f: jax.Array, alpha: jax.Array, normalize_h: bool = True
) -> jax.Array:
    """Norm(x + alpha (Norm(f) - x)) with x = Norm(h) (equations 10 and 11).

    Computed in at least float32. The backward rule keeps h, f and alpha in their own dtypes.

    Every inner product of a row is put together from sums over h, f and the gradient as they are
    read. So one pass reads them for all sums, and a second one for the result. With the norms one
    after the other there would be a pass for each, and arrays in float32 between the passes.

    The price: where x and alpha (Norm(f) - x) cancel, the norm of the result is off by about
    eps / ||m||^2, with m the vector before the last norm. In float32 that is 1e-5 for ||m|| = 0.1,
    1e-3 for 0.01, and below 3e-4 the result may be zero. With one alpha it takes an f that is
    nearly -h and an alpha near 1/2, because ||m|| is at least |1 - 2 alpha|. With one for each
    channel it takes Norm(f) = (1 - 1 / alpha) x in each of them.

    Args:
      h, f: (..., embed), the hidden state and what a branch returns.
      alpha: (embed,) in at least float32, of any sign.
      normalize_h: False: x = h, for an h that is a unit vector but for rounding.

    Returns:
      Unit vectors in the dtype of h.
    """
    h32, f32 = sphere.promote(h), sphere.promote(f)
    p, q, inverse, _, _ = _step_factors(h32, f32, alpha, normalize_h)
    moved = (inverse * (p * ((1 - alpha) * h32) + q * (alpha * f32))).astype(h.dtype)
    return on_gpus_apart(moved)


def _step_factors(h, f, alpha, normalize_h):
    """For x = p h, n = q f and m = (1 - alpha) x + alpha n, each of them (..., 1):

    p, q, 1 / ||m||, <(1 - alpha) x, m> and <alpha n, m>.
    """
    p = inverse_root(_sum(h * h)) if normalize_h else jnp.ones((), h.dtype)
    q = inverse_root(_sum(f * f))
    a, b = (1 - alpha) * h, alpha * f
    both = _times(p, _times(q, _sum(a * b)))
    of_h, of_f = p * _times(p, _sum(a * a)) + both, q * _times(q, _sum(b * b)) + both
    return p, q, inverse_root(of_h + of_f), of_h, of_f


def _times(inverse: jax.Array, total: jax.Array) -> jax.Array:
    """inverse * total; 0 for a vector that counts as zero, whose sums may be infinite."""
    return jnp.where(inverse > 0, inverse * total, 0)


def _step_forward(h, f, alpha, normalize_h):
    return residual_step(h, f, alpha, normalize_h), (h, f, alpha)


def _step_backward(normalize_h, kept, g):
    h, f, alpha = on_gpus_apart(kept)
    h32, f32, g = (sphere.promote(x) for x in (h, f, g))
    p, q, inverse, of_h, of_f = _step_factors(h32, f32, alpha, normalize_h)
    a, b = (1 - alpha) * h32, alpha * f32
    a_g, b_g = _times(p, _sum(a * g)), _times(q, _sum(b * g))  # <(1 - alpha) x, g> and <alpha n, g>
    radial = inverse * inverse * (a_g + b_g)  # <y, g> / ||m|| with y = m / ||m||
    d_m = inverse * (g - radial * (p * a + q * b))
    x, n = p * h32, q * f32
    # The radial parts <x, (1 - alpha) d_m> and <n, alpha d_m> of the two norms' gradients.
    d_h = (1 - alpha) * d_m
    if normalize_h:
        d_h = p * (d_h - inverse * (a_g - radial * of_h) * x)
    d_f = q * (alpha * d_m - inverse * (b_g - radial * of_f) * n)
    d_alpha = jnp.sum(d_m * (n - x), axis=tuple(range(d_m.ndim - 1)))
    return d_h.astype(h.dtype), d_f.astype(f.dtype), d_alpha.astype(alpha.dtype)


residual_step.defvjp(_step_forward, _step_backward)


def lerp(h: jax.Array, f: jax.Array, alpha: jax.Array) -> jax.Array:
    """Norm(h + alpha (f - h)) (equations 10 and 11), in the dtype of h."""
    h32 = sphere.promote(h)
    return unit(h32 + alpha * (sphere.promote(f) - h32)).astype(h.dtype)


def exponential_step(h: jax.Array, f: jax.Array, alpha: jax.Array) -> jax.Array:
    """The exponential map of alpha times the part of f that is tangent at h (arXiv 2601.22095).

    With v = f - <x, f> x, x = Norm(h) and one number alpha this is GeoNorm's step on the unit
    sphere, cos(|alpha v|) x + sin(|alpha v|) alpha v / |alpha v|: along the great circle by
    |alpha v|. It is :func:`sphere.slerp` by the share alpha sin(t) / t for a unit f at the angle t.

    GeoNorm has one alpha a layer. With one for each channel, alpha v is made tangent once more,
    which is a choice of this project: with P the projection onto the tangent space the step is
    P alpha P f. It vanishes for an f along h, as GeoNorm's does, and P alpha P is symmetric.

    Args:
      h: (..., embed), not zero.
      f: (..., embed), of any norm.
      alpha: (embed,) in at least float32, of any sign.

    Returns:
      Unit vectors in the dtype of h.
    """
    x = unit(sphere.promote(h))
    v = sphere.tangent(x, sphere.promote(f))
    return sphere.exponential(x, alpha * v).astype(h.dtype)


def rms_norm(x: jax.Array, gain: jax.Array | None, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * gain over the last axis, computed in at least float32.

    Where gain is None the model has no such norm, and x is returned. The backward rule keeps x and
    gain.
    """
    return x if gain is None else _rms_norm(x, gain, eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x, gain, eps):
    x32 = sphere.promote(x)
    return (x32 * _inverse_rms(x32, eps) * gain).astype(x.dtype)


def _inverse_rms(x: jax.Array, eps: float) -> jax.Array:
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def _rms_forward(x, gain, eps):
    return _rms_norm(x, gain, eps), (x, gain)


def _rms_backward(eps, kept, g):
    x, gain = kept
    x32, g = sphere.promote(x), sphere.promote(g)
    inverse = _inverse_rms(x32, eps)
    along = inverse * jnp.mean(x32 * (g * gain), axis=-1, keepdims=True)
    y = x32 * inverse
    d_gain = jnp.sum(g * y, axis=tuple(range(g.ndim - 1)))
    d_x = inverse * (g * gain - along * y)
    return d_x.astype(x.dtype), d_gain.astype(gain.dtype)


_rms_norm.defvjp(_rms_forward, _rms_backward)


@jax.custom_vjp
def swiglu(u: jax.Array, v: jax.Array) -> jax.Array:
    """u SiLU(v), computed in at least float32, in the dtype of u. The rule keeps u and v."""
    return (sphere.promote(u) * jax.nn.silu(sphere.promote(v))).astype(u.dtype)


def _swiglu_gradients(u, v, g):
    u, v, g = (sphere.promote(x) for x in (u, v, g))
    gate = jax.nn.sigmoid(v)
    silu = v * gate
    return g * silu, g * u * (gate + silu * (1 - gate))


def _swiglu_backward(kept, g):
    return tuple(d.astype(g.dtype) for d in _swiglu_gradients(*kept, g))


swiglu.defvjp(lambda u, v: (swiglu(u, v), (u, v)), _swiglu_backward)


@jax.custom_vjp
def joined_swiglu(up_gate: jax.Array) -> jax.Array:
    """:func:`swiglu` of the two halves of one product.

    Args:
      up_gate: (..., 2, mlp), u and v.

    Returns:
      (..., mlp) in the dtype of ``up_gate``.
    """
    return swiglu(up_gate[..., 0, :], up_gate[..., 1, :])


def _joined_swiglu_backward(up_gate, g):
    up_gate = on_gpus_apart(up_gate)
    d_u, d_v = _swiglu_gradients(up_gate[..., 0, :], up_gate[..., 1, :], g)
    # Not jnp.stack: XLA would store the sigmoid for its two operands.
    first = jax.lax.broadcasted_iota(jnp.int32, up_gate.shape, up_gate.ndim - 2) == 0
    return (jnp.where(first, d_u[..., None, :], d_v[..., None, :]).astype(g.dtype),)


joined_swiglu.defvjp(lambda up_gate: (joined_swiglu(up_gate), up_gate), _joined_swiglu_backward)
