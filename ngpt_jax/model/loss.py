"""Cross-entropy in chunks: the logits are never in memory as a whole.

The gradient is formed beside the loss, chunk by chunk, so that nothing is computed twice:
a chunk's logits are made, used for loss and gradients, and dropped.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def num_chunks(batch: int, length: int, chunk: int) -> int:
    """The least divisor of ``length`` that leaves at most ``chunk`` tokens in a chunk."""
    wanted = -(-batch * length // chunk)
    return next(n for n in range(min(wanted, length), length + 1) if length % n == 0)


def _scan_chunks(hidden, table, scale, targets, weights, vocab_size, chunk, with_grads):
    batch, length, width = hidden.shape
    n = num_chunks(batch, length, chunk)
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    real = jnp.arange(table.shape[0]) < vocab_size

    def split(x):  # (B, T, ...) -> (n, B, T/n, ...): every chunk has a part of every row
        return jnp.moveaxis(x.reshape(batch, n, length // n, *x.shape[2:]), 1, 0)

    def body(carry, chunk_inputs):
        h, y, w = chunk_inputs
        cosines = jnp.einsum("btd,vd->btv", h, table, preferred_element_type=dtype)
        logits = cosines if scale is None else cosines * scale
        logits = jnp.where(real, logits, -jnp.inf)
        top = jnp.max(logits, axis=-1, keepdims=True)
        exps = jnp.exp(logits - top)
        total = jnp.sum(exps, axis=-1, keepdims=True)
        picked = jnp.take_along_axis(logits, y[..., None], axis=-1)
        nats = jnp.sum((jnp.log(total) + top - picked)[..., 0] * w)
        if not with_grads:
            return carry + nats, None
        sum_nats, d_table, d_scale = carry
        hit = jnp.arange(table.shape[0]) == y[..., None]
        d_logits = (exps / total - hit) * w[..., None]
        d_cosines = d_logits
        if scale is not None:
            d_scale = d_scale + jnp.sum(d_logits * cosines, axis=(0, 1))
            d_cosines = d_logits * scale
        d_cosines = d_cosines.astype(hidden.dtype)
        d_h = jnp.einsum("btv,vd->btd", d_cosines, table)
        d_table = d_table + jnp.einsum("btv,btd->vd", d_cosines, h, preferred_element_type=dtype)
        return (sum_nats + nats, d_table, d_scale), d_h

    zero = jnp.zeros((), dtype)
    carry = zero
    if with_grads:
        carry = (
            zero,
            jnp.zeros(table.shape, dtype),
            None if scale is None else jnp.zeros_like(scale),
        )
    inputs = (split(hidden), split(targets), split(weights.astype(dtype)))
    if n == 1:  # no loop to pay for
        carry, d_hidden = body(carry, jax.tree.map(lambda x: x[0], inputs))
        d_hidden = None if d_hidden is None else d_hidden[None]
    else:
        carry, d_hidden = jax.lax.scan(body, carry, inputs)
    if not with_grads:
        return carry, None
    nats, d_table, d_scale = carry
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(batch, length, width)
    return nats, (d_hidden, d_table.astype(table.dtype), d_scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def cross_entropy(
    hidden: jax.Array,
    table: jax.Array,
    scale: jax.Array | None,
    targets: jax.Array,
    weights: jax.Array,
    vocab_size: int,
    chunk: int,
) -> jax.Array:
    """Weighted sum of -log softmax(scale * hidden table^T)[target], in nats.

    Args:
      hidden: (B, T, embed).
      table: (padded vocab, embed), in the dtype of ``hidden``.
      scale: s_z (padded vocab,) in at least float32, or None.
      targets: (B, T) token ids.
      weights: (B, T), 0 for a target that does not count. Not differentiated.
      vocab_size: rows of the table in use; the others get no probability and no gradient.
      chunk: tokens whose logits exist at one time.

    Returns:
      A scalar in at least float32. Matmuls run in the dtype of ``hidden`` and accumulate
      in at least float32.
    """
    return _scan_chunks(hidden, table, scale, targets, weights, vocab_size, chunk, False)[0]


def _forward(hidden, table, scale, targets, weights, vocab_size, chunk):
    return _scan_chunks(hidden, table, scale, targets, weights, vocab_size, chunk, True)


def _backward(vocab_size, chunk, grads, cotangent):
    del vocab_size, chunk
    d_hidden, d_table, d_scale = jax.tree.map(lambda g: (g * cotangent).astype(g.dtype), grads)
    return d_hidden, d_table, d_scale, None, None


cross_entropy.defvjp(_forward, _backward)
