"""Query and key heads: normalization, RoPE and scale in one step.

The formulas work on the halves of a head: the pair of its channels 0 to head_dim/2 - 1 and of the
others, which RoPE rotates (:mod:`ngpt_jax.model.rotary`). The forms:

    unit_after_rope   Norm(RoPE(x)) * scale                          nGPT, equations 15 and 16
    rms_before_rope   RoPE(x / sqrt(mean(x^2) + eps) * scale)        GPT with QK-norm
    none              RoPE(x)                                        GPT

All is computed in at least float32 and rounded once, at the end.
"""

import functools

import jax
import jax.numpy as jnp

from ngpt_jax import sphere

Pair = tuple[jax.Array, jax.Array]  # the halves of heads, each (..., head_dim/2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def rotate(
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    scale: jax.Array | None,
    form: str,
    eps: float = 0.0,
) -> jax.Array:
    """Heads with RoPE, normalized and scaled as their form says, in the shape and dtype of x.

    The backward rule keeps the arguments alone and computes the rest again. Zero vectors, as
    :func:`ngpt_jax.model.norms.unit` has them, stay zero with a zero gradient. The tables get no
    gradient.

    Args:
      x: (B, T, heads, head_dim).
      cos, sin: (T, head_dim/2) or (B, T, head_dim/2), at least float32.
      scale: (heads, head_dim) or (head_dim,), at least float32. None: no factor.
      form: unit_after_rope, rms_before_rope or none. With none there is no scale.
      eps: for rms_before_rope.
    """
    return _rotated(x, cos, sin, scale, form, eps)


def _rotate_forward(x, cos, sin, scale, form, eps):
    return _rotated(x, cos, sin, scale, form, eps), (x, cos, sin, scale)


def _rotate_backward(form, eps, residuals, g):
    dx, dscale = _gradients(*residuals, g, form, eps)
    return dx, None, None, dscale


rotate.defvjp(_rotate_forward, _rotate_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def rotate_heads(
    qk: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    q_scale: jax.Array | None,
    k_scale: jax.Array | None,
    form: str,
    eps: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """:func:`rotate` of queries and keys that come as one array.

    Args:
      qk: (B, T, kv_heads, group + 1, head_dim): for each key head its query heads, then the key.
      cos, sin: (T, head_dim/2) or (B, T, head_dim/2), at least float32.
      q_scale: (kv_heads, group, head_dim) or (head_dim,), at least float32. None: no factor.
      k_scale: (kv_heads, head_dim) or (head_dim,), at least float32. None: no factor.
      form: unit_after_rope, rms_before_rope or none. With none there are no scales.
      eps: for rms_before_rope.

    Returns:
      Queries (B, T, kv_heads, group, head_dim) and keys (B, T, kv_heads, head_dim), dtype of qk.
    """
    q, k = _parts(qk)
    q, k = (
        _rotated(x, cos, sin, _by_head(scale), form, eps)
        for x, scale in ((q, q_scale), (k, k_scale))
    )
    return q.reshape(qk[..., :-1, :].shape), k


def _rotate_heads_forward(qk, cos, sin, q_scale, k_scale, form, eps):
    out = rotate_heads(qk, cos, sin, q_scale, k_scale, form, eps)
    return out, (qk, cos, sin, q_scale, k_scale)


def _rotate_heads_backward(form, eps, residuals, g):
    qk, cos, sin, q_scale, k_scale = residuals
    (q, k), (dq, dk) = _parts(qk), g
    shape = dq.shape
    dq, dq_scale = _gradients(q, cos, sin, _by_head(q_scale), dq.reshape(q.shape), form, eps)
    dk, dk_scale = _gradients(k, cos, sin, k_scale, dk, form, eps)
    if q_scale is not None:
        dq_scale = dq_scale.reshape(q_scale.shape)
    dqk = jnp.concatenate([dq.reshape(shape), dk[..., None, :]], axis=-2)
    return dqk, None, None, dq_scale, dk_scale


rotate_heads.defvjp(_rotate_heads_forward, _rotate_heads_backward)


def _parts(qk: jax.Array) -> Pair:
    """Queries (B, T, heads, head_dim) and keys (B, T, kv_heads, head_dim)."""
    q = qk[..., :-1, :]
    return q.reshape(*q.shape[:2], -1, q.shape[-1]), qk[..., -1, :]


def _by_head(scale: jax.Array | None) -> jax.Array | None:
    return scale.reshape(-1, scale.shape[-1]) if scale is not None and scale.ndim > 1 else scale


def _rotated(x, cos, sin, scale, form, eps) -> jax.Array:
    cos, sin = cos[..., None, :], sin[..., None, :]
    out = forward(_halves(x), cos, sin, _scale_halves(scale), form, eps, x.shape[-1])
    return jnp.concatenate(out, axis=-1).astype(x.dtype)


def _gradients(x, cos, sin, scale, g, form, eps) -> tuple[jax.Array, jax.Array | None]:
    """The cotangents of x and scale for that of the result."""
    cos, sin, factor = cos[..., None, :], sin[..., None, :], _scale_halves(scale)
    halves, dscale = backward(_halves(x), _halves(g), cos, sin, factor, form, eps, x.shape[-1])
    dx = jnp.concatenate(halves, axis=-1).astype(x.dtype)
    if dscale is None:
        return dx, None
    axes = tuple(range(x.ndim - scale.ndim))  # that the scale does not have
    return dx, jnp.concatenate([jnp.sum(d, axes) for d in dscale], axis=-1).astype(scale.dtype)


def _halves(x: jax.Array) -> Pair:
    a, b = jnp.split(sphere.promote(x), 2, axis=-1)
    return a, b


def _scale_halves(scale: jax.Array | None) -> Pair | None:
    return None if scale is None else _halves(scale)


def forward(
    x: Pair,
    cos: jax.Array,
    sin: jax.Array,
    scale: Pair | None,
    form: str,
    eps: float,
    head_dim: int,
) -> Pair:
    """The formula on halves in at least float32; the arguments broadcast against each other.

    The halves may be padded with zeros: ``head_dim`` is the number of true channels.
    """
    if form == "none":
        return _turn(x, cos, sin)
    if form == "unit_after_rope":
        return _times(_normalized(_turn(x, cos, sin), form, eps, head_dim)[0], scale)
    return _turn(_times(_normalized(x, form, eps, head_dim)[0], scale), cos, sin)


def backward(
    x: Pair,
    g: Pair,
    cos: jax.Array,
    sin: jax.Array,
    scale: Pair | None,
    form: str,
    eps: float,
    head_dim: int,
) -> tuple[Pair, Pair | None]:
    """The gradients of :func:`forward` for x, and for scale before the sum over tokens.

    With y = Norm(x) the gradient for x is (g - y <y, g>) / ||x||, and likewise for RMSNorm.
    """
    if form == "none":
        return _turn(g, cos, -sin), None
    if form == "unit_after_rope":
        x = _turn(x, cos, sin)
    else:
        g = _turn(g, cos, -sin)
    y, inverse = _normalized(x, form, eps, head_dim)
    (a, b), dscale = y, None if scale is None else (g[0] * y[0], g[1] * y[1])
    ga, gb = _times(g, scale)
    along = jnp.sum(a * ga + b * gb, axis=-1, keepdims=True)
    if form == "rms_before_rope":
        along = along / head_dim
    dx = inverse * (ga - a * along), inverse * (gb - b * along)
    return (_turn(dx, cos, -sin) if form == "unit_after_rope" else dx), dscale


def _turn(x: Pair, cos: jax.Array, sin: jax.Array) -> Pair:
    a, b = x
    return a * cos - b * sin, b * cos + a * sin


def _times(x: Pair, scale: Pair | None) -> Pair:
    return x if scale is None else (x[0] * scale[0], x[1] * scale[1])


def _normalized(x: Pair, form: str, eps: float, head_dim: int) -> tuple[Pair, jax.Array]:
    """The vectors divided by their norm, and what they were multiplied by."""
    a, b = x
    square = jnp.sum(a * a + b * b, axis=-1, keepdims=True)
    if form == "rms_before_rope":
        inverse = jax.lax.rsqrt(square / head_dim + eps)
    else:
        there = square >= jnp.finfo(square.dtype).tiny
        inverse = jnp.where(there, jax.lax.rsqrt(jnp.where(there, square, 1)), 0)
    return (a * inverse, b * inverse), inverse
