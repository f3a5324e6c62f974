"""The KV cache: keys and values of earlier tokens, kept for decoding token by token.

Prompts are padded on the left. So rows of different lengths begin in different slots and end in the
same one, and a step writes one slot for all rows.

A loop that writes to the cache in each step does so in place: without the barrier in
:func:`write`, XLA would write it twice, in two shapes, and copy it in each step.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ngpt_jax.config import ModelConfig
from ngpt_jax.decoding.rows import row_max, row_sum
from ngpt_jax.parallel import rules

CHUNK = 16  # tokens that one call of decoding draws at most


class KeysValues(NamedTuple):
    """Keys and values in the compute dtype, laid out for the two products of a step.

    A CPU takes five times as long with keys laid out as values are.
    """

    key: jax.Array  # (B, kv_heads, head_dim, slots)
    value: jax.Array  # (B, kv_heads, slots, head_dim)


Caches = tuple[KeysValues, ...]  # one a layer


class Slots(NamedTuple):
    """Which slots hold tokens.

    Attributes:
      first: (B,) the first slot of each row; before it there is padding.
      end: () how many slots are filled.
    """

    first: jax.Array
    end: jax.Array


def empty_cache(config: ModelConfig, batch: int, slots: int) -> Caches:
    """A cache of zeros for each layer, laid out on the current mesh.

    Args:
      config: resolved.
      batch: rows.
      slots: tokens that the cache has room for.
    """
    assert config.kv_heads is not None and config.head_dim is not None
    heads, dim = (batch, config.kv_heads), config.head_dim
    if rules.current_mesh() is None:
        heads = (math.prod(heads),)
    key, value = (jnp.zeros((*heads, *size), config.dtype) for size in ((dim, slots), (slots, dim)))
    return tuple(_lay_out(KeysValues(key, value)) for _ in range(config.layers))


def _lay_out(x: KeysValues) -> KeysValues:
    if rules.current_mesh() is None:
        return x
    return KeysValues(
        rules.constrain(x.key, "batch", "kv_heads", "head_dim", None),
        rules.constrain(x.value, "batch", "kv_heads", None, "head_dim"),
    )


def write(old: KeysValues, key: jax.Array, value: jax.Array, place: jax.Array | int) -> KeysValues:
    """A cache with keys and values (B, T, kv_heads, head_dim) in its T slots from ``place`` on."""
    heads, put = old.key.shape[:-2], jax.lax.dynamic_update_slice_in_dim
    key, value = jnp.moveaxis(key, 1, 3), jnp.moveaxis(value, 1, 2)
    key, value = (x.reshape(*heads, *x.shape[2:]).astype(old.key.dtype) for x in (key, value))
    return _lay_out(KeysValues(put(old.key, key, place, -1), put(old.value, value, place, -2)))


def attend_to_cache(query: jax.Array, cache: KeysValues, scale: float, slots: Slots) -> jax.Array:
    """softmax(scale * q k^T) v over each position's own token and all tokens before it.

    Args:
      query: (B, T, heads, head_dim), of the T tokens that follow those of ``slots``.
      cache: with the keys and values of these T tokens already written.
      scale: of q k^T.
      slots: before these T tokens.

    Returns:
      (B, T, heads, head_dim); the softmax is in at least float32.
    """
    batch, length, heads, head_dim = query.shape
    *rows, size, _ = cache.value.shape
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    # Queries of a group share their keys: they are one matrix (..., group * T, head_dim), or a
    # vector, because a CPU would copy the probabilities of a matrix with one row.
    n = batch * length * heads // math.prod(rows)
    q = jnp.moveaxis(query, 2, 1).reshape(*rows, *((n,) if n > 1 else ()), head_dim)
    product = functools.partial(jnp.einsum, preferred_element_type=dtype)
    n = "n" if n > 1 else ""
    logits = scale * product(f"...{n}d,...ds->...{n}s", q, cache.key)
    slot, own = jnp.arange(size), slots.end + jnp.arange(length)
    visible = (slot <= own[:, None]) & (slot >= slots.first[:, None, None])  # (B, T, slots)
    visible = jnp.broadcast_to(visible[:, None], (batch, heads, length, size))
    logits = jnp.where(visible.reshape(logits.shape), logits, -jnp.inf)
    probs = jnp.exp(logits - row_max(logits))
    total = row_sum(probs)
    out = product(f"...{n}s,...sd->...{n}d", probs.astype(cache.value.dtype), cache.value)
    out = (out / total).astype(query.dtype)
    return jnp.moveaxis(out.reshape(batch, heads, length, head_dim), 1, 2)
