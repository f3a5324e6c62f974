"""RMSNorm after the addition of a branch, as one kernel in each direction."""

import functools

import jax
import jax.numpy as jnp

from ngpt_jax.model.kernels.blocks import flat, over_rows


def add_rms_norm(
    h: jax.Array, f: jax.Array, gain: jax.Array, eps: float, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The sum h + f, and its RMSNorm: x / sqrt(mean(x^2) + eps) * gain over the last axis.

    Args:
      h, f: (..., d), both bfloat16, float16 or float32.
      gain: (d,) float32.
      eps: added to the mean square.
      interpret: run the kernels on any platform.

    Returns:
      Both in the dtype of h. The norm is that of the sum as it is rounded.
    """
    x, y = _add_rms_norm(flat(h), flat(f), gain, eps, interpret)
    return x.reshape(h.shape), y.reshape(h.shape)


def _inverse(x, d, eps):
    """1 / sqrt(mean(x^2) + eps) of tiles (rows, width): what lies beyond d is zero."""
    return jax.lax.rsqrt(jnp.sum(x * x, 1, keepdims=True) / d + eps)


def _rms_backward(x, g, gain, eps, d):
    """Cotangents (of x, of gain in each row) from that of RMSNorm(x)."""
    inverse = _inverse(x, d, eps)
    y = x * inverse
    g_y = g * gain
    return inverse * (g_y - y * (jnp.sum(y * g_y, 1, keepdims=True) / d)), g * y


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _add_rms_norm(h, f, gain, eps, interpret):
    d, dtype = h.shape[-1], h.dtype

    def body(h, f, gain):
        x = (h + f).astype(dtype).astype(jnp.float32)
        return [x, x * _inverse(x, d, eps) * gain], []

    (x, y), _ = over_rows(
        body, [h, f], [gain], [dtype, dtype], name="add_rms_norm", interpret=interpret
    )
    return x, y


def _add_rms_norm_forward(h, f, gain, eps, interpret):
    out = _add_rms_norm(h, f, gain, eps, interpret)
    return out, (out[0], gain)


def _add_rms_norm_backward(eps, interpret, residuals, cotangents):
    x, gain = residuals
    d = x.shape[-1]

    def body(x, g_x, g, gain):
        d_x, d_gain = _rms_backward(x, g, gain, eps, d)
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
