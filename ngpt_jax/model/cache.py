"""Keys and values of earlier positions, kept for decoding token by token.

Slot i of a row holds its token i, counted from the row's first one: rows of different lengths end
in the same slot and begin in different ones (padding is on the left), so that a step writes one
slot for all rows.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ngpt_jax.config import ModelConfig
from ngpt_jax.parallel import rules


class LayerCache(NamedTuple):
    """Of one layer: (B, kv_heads, slots, head_dim), in the compute dtype."""

    key: jax.Array
    value: jax.Array


class Slots(NamedTuple):
    """Which slots hold tokens.

    ``first`` (B,) is each row's first one, ``end`` () the first free one before the positions of
    this call; None: the cache is empty, and attention needs no more than the call itself.
    """

    first: jax.Array
    end: jax.Array | None

    @property
    def empty(self) -> bool:
        return self.end is None


def empty_cache(config: ModelConfig, batch: int, slots: int) -> tuple[LayerCache, ...]:
    """A cache a layer, laid out on the current mesh."""
    assert config.kv_heads is not None and config.head_dim is not None
    shape = (batch, config.kv_heads, slots, config.head_dim)

    def zeros() -> jax.Array:
        return _lay_out(jnp.zeros(shape, config.dtype))

    return tuple(LayerCache(zeros(), zeros()) for _ in range(config.layers))


def _lay_out(x: jax.Array) -> jax.Array:
    return rules.constrain(x, "batch", "kv_heads", None, "head_dim")


def write(cache: LayerCache, key: jax.Array, value: jax.Array, slots: Slots) -> LayerCache:
    """The cache with keys and values (B, T, kv_heads, head_dim) in the next T slots."""
    end = 0 if slots.end is None else slots.end

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        new = jnp.moveaxis(new, 2, 1).astype(old.dtype)
        return _lay_out(jax.lax.dynamic_update_slice_in_dim(old, new, end, axis=2))

    return LayerCache(put(cache.key, key), put(cache.value, value))


def attend_to_cache(query: jax.Array, cache: LayerCache, scale: float, slots: Slots) -> jax.Array:
    """softmax(scale * q k^T) v over the slots that each position can see, its own among them.

    Args:
      query: (B, T, heads, head_dim), of the T slots from ``slots.end`` on.
      cache: with the keys and values of these positions already written.
      scale: of the logits.
      slots: before these positions.

    Returns:
      (B, T, heads, head_dim); the softmax is in at least float32.
    """
    assert slots.end is not None
    batch, length, heads, head_dim = query.shape
    kv_heads, size = cache.key.shape[1:3]
    group = heads // kv_heads
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    # Queries of a group share their keys: they are one matrix (B, kv_heads, group * T, head_dim).
    q = jnp.moveaxis(query, 2, 1).reshape(batch, kv_heads, group * length, head_dim)
    logits = scale * jnp.matmul(q, cache.key.mT, preferred_element_type=dtype)
    slot = jnp.arange(size)
    own = slots.end + jnp.arange(length)
    visible = (slot <= own[:, None]) & (slot >= slots.first[:, None, None])  # (B, T, slots)
    visible = jnp.tile(visible[:, None], (1, 1, group, 1))
    probs = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
    out = probs.astype(cache.value.dtype) @ cache.value
    return jnp.moveaxis(out.reshape(batch, heads, length, head_dim), 1, 2)
