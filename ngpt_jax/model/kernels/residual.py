"""nGPT's step of the hidden state as one kernel in each direction."""

import functools

import jax

from ngpt_jax.model.kernels.blocks import flat, inverse_norm, over_rows, total, unit_backward


def residual_step(
    h: jax.Array,
    f: jax.Array,
    alpha: jax.Array,
    *,
    normalize_h: bool,
    copies: int = 1,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Norm(x + alpha (Norm(f) - x)), where x is Norm(h) or h (equations 10 and 11).

    Norm is :func:`norms.unit`. From reading to writing all is float32. The forward kernel reads h
    and f and writes the result; the backward kernel reads h, f and the cotangents, computes the
    norms again, and writes the cotangents of h and f.

    Args:
      h: (..., d), bfloat16, float16 or float32.
      f: of the same shape; its dtype may be another.
      alpha: (d,) float32.
      normalize_h: whether x is Norm(h).
      copies: how often the result is returned. With one copy for each use of it, the backward
        kernel adds their cotangents, and no pass over them is needed for the sum. A copy without
        a use costs reading zeros.
      interpret: run the kernels on any platform.

    Returns:
      The result in the dtype of h, ``copies`` times.
    """
    out = _step(flat(h), flat(f), alpha, normalize_h, copies, interpret)
    return tuple(x.reshape(h.shape) for x in out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _step(h, f, alpha, normalize_h, copies, interpret):
    def body(h, f, alpha):
        if normalize_h:
            h = h * inverse_norm(h)
        moved = h + alpha * (f * inverse_norm(f) - h)
        return [moved * inverse_norm(moved)], []

    (out,), _ = over_rows(
        body, [h, f], [alpha], [h.dtype], name="residual_step", interpret=interpret
    )
    return (out,) * copies


def _forward(h, f, alpha, normalize_h, copies, interpret):
    return _step(h, f, alpha, normalize_h, copies, interpret), (h, f, alpha)


def _backward(normalize_h, copies, interpret, residuals, cotangents):
    h, f, alpha = residuals

    def body(h, f, *rest):
        *g, alpha = rest
        inverse_f = inverse_norm(f)
        f = f * inverse_f
        if normalize_h:
            inverse_h = inverse_norm(h)
            h = h * inverse_h
        moved = h + alpha * (f - h)
        inverse = inverse_norm(moved)
        d_moved = unit_backward(moved * inverse, inverse, total(g))
        d_alpha = d_moved * (f - h)
        d_f = alpha * d_moved
        d_h = d_moved - d_f
        if normalize_h:
            d_h = unit_backward(h, inverse_h, d_h)
        return [d_h, unit_backward(f, inverse_f, d_f)], [d_alpha]

    (d_h, d_f), (d_alpha,) = over_rows(
        body,
        [h, f, *cotangents],
        [alpha],
        [h.dtype, f.dtype],
        sums=1,
        name="residual_step_backward",
        interpret=interpret,
    )
    return d_h, d_f, d_alpha.astype(alpha.dtype)


_step.defvjp(_forward, _backward)
