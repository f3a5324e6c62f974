"""Query and key heads: normalization, RoPE and scale in one step. The forms:

    unit_after_rope   Norm(RoPE(x)) * scale                          nGPT, equations 15 and 16
    rms_before_rope   RoPE(x / sqrt(mean(x^2) + eps) * scale)        GPT with QK-norm
    none              RoPE(x) * scale                                GPT, where scale is None

All is computed in at least float32 and rounded once, at the end; on TPUs after each step too.
"""

import functools

import jax
import jax.numpy as jnp

from ngpt_jax import sphere
from ngpt_jax.model import norms
from ngpt_jax.model.rotary import apply_rope
from ngpt_jax.parallel import rules


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
      form: unit_after_rope, rms_before_rope or none. The second needs a scale.
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
      form: unit_after_rope, rms_before_rope or none. The second needs both scales.
      eps: for rms_before_rope.

    Returns:
      Queries (B, T, kv_heads, group, head_dim) and keys (B, T, kv_heads, head_dim), dtype of qk.
    """
    (q, q_scale), (k, k_scale) = _parts(qk, q_scale, k_scale)
    q = _rotated(q, cos, sin, q_scale, form, eps)
    return q.reshape(qk[..., :-1, :].shape), _rotated(k, cos, sin, k_scale, form, eps)


def _rotate_heads_forward(qk, cos, sin, q_scale, k_scale, form, eps):
    out = rotate_heads(qk, cos, sin, q_scale, k_scale, form, eps)
    return out, (qk, cos, sin, q_scale, k_scale)


def _rotate_heads_backward(form, eps, residuals, g):
    qk, cos, sin, *scales = norms.on_gpus_apart(residuals)
    (q, q_scale), (k, k_scale) = _parts(qk, *scales)
    gq, gk = g
    dq, dq_scale = _gradients(q, cos, sin, q_scale, gq.reshape(q.shape), form, eps)
    dk, dk_scale = _gradients(k, cos, sin, k_scale, gk, form, eps)
    if scales[0] is not None:
        dq_scale = dq_scale.reshape(scales[0].shape)
    # Autodiff would pad and add, for which XLA writes float32 arrays.
    dqk = jnp.concatenate([dq.reshape(gq.shape), dk[..., None, :]], axis=-2)
    return dqk, None, None, dq_scale, dk_scale


rotate_heads.defvjp(_rotate_heads_forward, _rotate_heads_backward)


def _parts(qk, q_scale, k_scale):
    """Queries (B, T, heads, head_dim) and keys (B, T, kv_heads, head_dim), each with its scale."""
    q = qk[..., :-1, :]
    if q_scale is not None and q_scale.ndim > 1:
        q_scale = q_scale.reshape(-1, q_scale.shape[-1])
    return (q.reshape(*q.shape[:2], -1, q.shape[-1]), q_scale), (qk[..., -1, :], k_scale)


def _rotated(x, cos, sin, scale, form, eps) -> jax.Array:
    dtype = x.dtype
    # XLA for TPUs stores what RoPE puts together: there in the dtype of x, elsewhere in float32.
    x = x if rules.platform() == "tpu" else sphere.promote(x)
    if form == "rms_before_rope":
        x = norms.rms_norm(x, scale, eps)
    x = apply_rope(x, (cos, sin))
    x = norms.unit(x) if form == "unit_after_rope" else x
    if form != "rms_before_rope" and scale is not None:
        x = sphere.promote(x) * scale
    return x.astype(dtype)


def _gradients(x, cos, sin, scale, g, form, eps) -> tuple[jax.Array, jax.Array | None]:
    """The cotangents of x and scale for g, that of the result."""
    _, pull = jax.vjp(lambda x, scale: _rotated(x, cos, sin, scale, form, eps), x, scale)
    return pull(g)
