"""Causal attention over all heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array, scale: float) -> jax.Array:
    """softmax(scale * q k^T + causal mask) v, with the softmax in at least float32.

    Args:
      query: (B, T, heads, head_dim).
      key, value: (B, T, kv_heads, head_dim); key head i serves the heads / kv_heads query
        heads from i * heads / kv_heads on.
      scale: sqrt(head_dim) in nGPT, 1 / sqrt(head_dim) in GPT.

    Returns:
      (B, T, heads, head_dim) in the dtype of ``value``.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    # Heads before positions: then both products are batched matmuls without further copies.
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (query, key, value))
    q = q.reshape(batch, kv_heads, heads // kv_heads, length, head_dim)
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("bkgtc,bksc->bkgts", q, k, preferred_element_type=dtype)
    visible = jnp.tril(jnp.ones((length, length), bool))
    # -inf, not a large number: every row sees at least itself, and exp(-inf) is exactly 0.
    probs = jax.nn.softmax(jnp.where(visible, scale * logits, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgts,bksc->bkgtc", probs.astype(value.dtype), v)
    return jnp.moveaxis(out.reshape(batch, heads, length, head_dim), 1, 2)
