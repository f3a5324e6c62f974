"""Rows of numbers: how they are laid out, and sums over them, so that XLA makes few kernels."""

from typing import Any

import jax
import jax.numpy as jnp

from ngpt_jax import sphere
from ngpt_jax.parallel import rules

_MOST = 32  # numbers of a short reduction
_FEW = 2**15  # numbers; with more, a kernel costs little beside its work


def rows_shape(batch: int, length: int) -> tuple[int, ...]:
    """The shape of B * T rows, in which a product with a matrix takes and returns them.

    In any other shape XLA's CPU backend would compute a hidden state anew for each of its users:
    in later layers, from the outputs of all branches before.
    """
    if rules.current_mesh() is not None:
        return (batch, length)
    return (batch * length,) if batch * length > 1 else ()


def row_max(x: jax.Array) -> jax.Array:
    """The maximum over the last axis, which is kept; at least the smallest finite number."""
    return _reduce(jnp.max, x, jnp.finfo(x.dtype).min)


def row_sum(x: jax.Array) -> jax.Array:
    """The sum over the last axis, which is kept, of numbers that are not negative."""
    return _reduce(jnp.sum, x, 0)


def _reduce(function: Any, x: jax.Array, least: Any) -> jax.Array:
    """``function(x)`` over the last axis, which is kept, if it is not below ``least``.

    XLA's CPU backend makes two or three kernels of a reduction over more than 32 numbers. A shorter
    one is part of the kernel before or after it. So there the axis is reduced by parts, if x
    is small. The comparison changes nothing; without it XLA would make one reduction of all.
    """

    def at_once(x: jax.Array) -> jax.Array:
        return jnp.maximum(function(x, axis=-1, keepdims=True), least)

    def by_parts(x: jax.Array) -> jax.Array:
        while (n := x.shape[-1]) > _MOST:
            size = max(p for p in range(1, _MOST + 1) if n % p == 0)
            if size == 1:
                break
            x = at_once(x.reshape(*x.shape[:-1], -1, size))[..., 0]
        return at_once(x)

    if x.size > _FEW:
        return at_once(x)
    return jax.lax.platform_dependent(x, cpu=by_parts, default=at_once)


def square_norm(x: jax.Array) -> jax.Array:
    """||x||^2 over the last axis, which is kept, in at least float32."""
    return row_sum(jnp.square(sphere.promote(x)))


def inverse_norm(x: jax.Array) -> jax.Array:
    """1 / ||x|| over the last axis, which is kept, in at least float32.

    It is finite for a vector of zeros, and 0 where ||x||^2 is too large for the dtype. Both vectors
    times it are zero, as in :func:`ngpt_jax.model.norms.unit`.
    """
    square = square_norm(x)
    return jax.lax.rsqrt(jnp.maximum(square, jnp.finfo(square.dtype).tiny))
