"""RMSNorm, alone or after the addition of a branch, as one kernel in each direction."""

import functools

import jax
import jax.numpy as jnp

from ngpt_jax.model.kernels.blocks import flat, over_rows, total


def rms_norm(
    x: jax.Array, gain: jax.Array, eps: float, *, copies: int = 1, interpret: bool = False
) -> tuple[jax.Array, ...]:
    """x / sqrt(mean(x^2) + eps) * gain over the last axis.

    Args:
      x: (..., d), bfloat16, float16 or float32.
      gain: (d,) float32.
      eps: added to the mean square.
      copies: how often the result is returned: once for each use of it, so that the backward
        kernel adds their cotangents.
      interpret: run the kernels on any platform.

    Returns:
      The result in the dtype of x, ``copies`` times.
    """
    out = _rms_norm(flat(x), gain, eps, copies, interpret)
    return tuple(y.reshape(x.shape) for y in out)


def add_rms_norm(
    h: jax.Array,
    f: jax.Array,
    gain: jax.Array,
    eps: float,
    *,
    copies: int = 1,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """h + f in the dtype of h, and then RMSNorm of that sum ``copies`` times.

    Arguments are those of :func:`rms_norm`; h and f (..., d) are of one dtype.
    """
    out = _add_rms_norm(flat(h), flat(f), gain, eps, copies, interpret)
    return tuple(y.reshape(h.shape) for y in out)


def _inverse(x, d, eps):
    """1 / sqrt(mean(x^2) + eps) of tiles (rows, width): what lies beyond d is zero."""
    return jax.lax.rsqrt(jnp.sum(x * x, 1, keepdims=True) / d + eps)


def _rms_backward(x, g, gain, eps, d):
    """Cotangents (of x, of gain in each row) from that of RMSNorm(x)."""
    inverse = _inverse(x, d, eps)
    y = x * inverse
    g_y = g * gain
    return inverse * (g_y - y * (jnp.sum(y * g_y, 1, keepdims=True) / d)), g * y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _rms_norm(x, gain, eps, copies, interpret):
    d = x.shape[-1]

    def body(x, gain):
        return [x * _inverse(x, d, eps) * gain], []

    (y,), _ = over_rows(body, [x], [gain], [x.dtype], name="rms_norm", interpret=interpret)
    return (y,) * copies


def _rms_norm_forward(x, gain, eps, copies, interpret):
    return _rms_norm(x, gain, eps, copies, interpret), (x, gain)


def _rms_norm_backward(eps, copies, interpret, residuals, cotangents):
    x, gain = residuals
    d = x.shape[-1]

    def body(x, *rest):
        *g, gain = rest
        d_x, d_gain = _rms_backward(x, total(g), gain, eps, d)
        return [d_x], [d_gain]

    (d_x,), (d_gain,) = over_rows(
        body,
        [x, *cotangents],
        [gain],
        [x.dtype],
        sums=1,
        name="rms_norm_backward",
        interpret=interpret,
    )
    return d_x, d_gain.astype(gain.dtype)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _add_rms_norm(h, f, gain, eps, copies, interpret):
    d, dtype = h.shape[-1], h.dtype

    def body(h, f, gain):
        x = (h + f).astype(dtype).astype(jnp.float32)
        return [x, x * _inverse(x, d, eps) * gain], []

    (x, y), _ = over_rows(
        body, [h, f], [gain], [dtype, dtype], name="add_rms_norm", interpret=interpret
    )
    return (x, *(y,) * copies)


def _add_rms_norm_forward(h, f, gain, eps, copies, interpret):
    out = _add_rms_norm(h, f, gain, eps, copies, interpret)
    return out, (out[0], gain)


def _add_rms_norm_backward(eps, copies, interpret, residuals, cotangents):
    x, gain = residuals
    d = x.shape[-1]

    def body(x, g_x, *rest):
        *g, gain = rest
        d_x, d_gain = _rms_backward(x, total(g), gain, eps, d)
        return [g_x + d_x], [d_gain]

    (d_x,), (d_gain,) = over_rows(
        body,
        [x, *cotangents],
        [gain],
        [x.dtype],
        sums=1,
        name="add_rms_norm_backward",
        interpret=interpret,
    )
    return d_x, d_x, d_gain.astype(gain.dtype)


_add_rms_norm.defvjp(_add_rms_norm_forward, _add_rms_norm_backward)
