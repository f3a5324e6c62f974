"""The norms of the model, without a second pass over the data."""

import functools

import jax
import jax.numpy as jnp

from ngpt_jax import sphere


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
    return (x32 * _inverse_norm(x32, axis)).astype(x.dtype)


@unit.defjvp
def _unit_jvp(axis, primals, tangents):
    (x,), (dx,) = primals, tangents
    x32, dx = sphere.promote(x), sphere.promote(dx)
    inverse = _inverse_norm(x32, axis)
    y = x32 * inverse
    dy = inverse * (dx - y * jnp.sum(y * dx, axis=axis, keepdims=True))
    return y.astype(x.dtype), dy.astype(x.dtype)


def _inverse_norm(x: jax.Array, axis: int) -> jax.Array:
    square = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    there = square >= jnp.finfo(x.dtype).tiny
    return jnp.where(there, jax.lax.rsqrt(jnp.where(there, square, 1)), 0)


def lerp(h: jax.Array, f: jax.Array, alpha: jax.Array) -> jax.Array:
    """Norm(h + alpha (f - h)) (equations 10 and 11), in the dtype of h."""
    h32 = sphere.promote(h)
    return unit(h32 + alpha * (sphere.promote(f) - h32)).astype(h.dtype)


def rms_norm(x: jax.Array, gain: jax.Array | None, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * gain over the last axis, computed in at least float32.

    Where gain is None the model has no such norm, and x is returned.
    """
    if gain is None:
        return x
    x32 = sphere.promote(x)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean_square + eps) * gain).astype(x.dtype)
