"""Rotary position embedding (RoPE) and its layout.

Channel j of a head is rotated together with channel j + head_dim/2. This is the "half" layout;
contiguous halves suit vector units. The authors' code and the golden numbers pair the channels
2j and 2j+1 instead. With the channels of the weights reordered by :func:`interleaved_to_half`,
both layouts give the same logits.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ngpt_jax import sphere


def rope_tables(
    positions: jax.Array, head_dim: int, base: float, dtype: jax.typing.DTypeLike = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of t * base^(-2j/head_dim), each (T, head_dim/2) or (B, T, head_dim/2).

    Args:
      positions: (T,) or (B, T) integer positions t.
      head_dim: channels of a head, even.
      base: 10000 in the paper.
      dtype: of the tables, at least float32.
    """
    frequencies = base ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = positions.astype(dtype)[..., None] * jnp.asarray(frequencies, dtype)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates x (B, T, heads, head_dim) by the angles of its positions."""
    cos, sin = (t[..., None, :] for t in tables)  # (T, 1, head_dim/2) or (B, T, 1, head_dim/2)
    a, b = jnp.split(sphere.promote(x), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def interleaved_to_half(head_dim: int) -> np.ndarray:
    """Indices p with ``half[j] = interleaved[p[j]]``. ``argsort(p)`` is the inverse."""
    return np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])
