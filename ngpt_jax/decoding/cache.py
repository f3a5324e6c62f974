"""The KV cache: keys and values of earlier tokens, kept for decoding token by token.

Prompts are padded on the left. So rows of different lengths begin in different slots and end in the
same one, and a step writes one slot for all rows.

The newest tokens lie in a small cache of their own, which is emptied into the large one after every
CHUNK tokens. A loop that writes to the large cache in each step copies it in each step, because XLA
sees it read and written at once. On a CPU with 2,000 slots a token then took 15 times as long.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ngpt_jax.config import ModelConfig
from ngpt_jax.parallel import rules

CHUNK = 16  # tokens that the small cache holds, and that one call of decoding draws at most


class KeysValues(NamedTuple):
    """Keys and values in the compute dtype, laid out for the two products of a step.

    A CPU takes five times as long with keys laid out as values are.
    """

    key: jax.Array  # (B, kv_heads, head_dim, slots)
    value: jax.Array  # (B, kv_heads, slots, head_dim)


class LayerCache(NamedTuple):
    """The cache of one layer: all slots, and the newest tokens, which are not in them yet."""

    all: KeysValues
    newest: KeysValues


Caches = tuple[LayerCache, ...]  # one a layer


class Slots(NamedTuple):
    """Which slots hold tokens.

    Attributes:
      first: (B,) the first slot of each row; before it there is padding.
      end: () how many slots are filled.
      newest: () how many tokens came after them and lie in the small cache.
    """

    first: jax.Array
    end: jax.Array
    newest: jax.Array | int = 0


def empty_cache(config: ModelConfig, batch: int, slots: int, newest: int) -> Caches:
    """A cache of zeros for each layer, laid out on the current mesh.

    Args:
      config: resolved.
      batch: rows.
      slots: tokens that the large cache has room for, besides one more load of the small one.
      newest: tokens that the small cache holds.
    """
    assert config.kv_heads is not None and config.head_dim is not None
    heads, dim = (batch, config.kv_heads), config.head_dim

    def zeros(size: int) -> KeysValues:
        key, value = jnp.zeros((*heads, dim, size)), jnp.zeros((*heads, size, dim))
        return _lay_out(KeysValues(key.astype(config.dtype), value.astype(config.dtype)))

    return tuple(LayerCache(zeros(slots + newest), zeros(newest)) for _ in range(config.layers))


def _lay_out(x: KeysValues) -> KeysValues:
    return KeysValues(
        rules.constrain(x.key, "batch", "kv_heads", "head_dim", None),
        rules.constrain(x.value, "batch", "kv_heads", None, "head_dim"),
    )


def _put(old: KeysValues, new: KeysValues, place: jax.Array | int) -> KeysValues:
    put = jax.lax.dynamic_update_slice_in_dim
    return _lay_out(
        KeysValues(put(old.key, new.key, place, 3), put(old.value, new.value, place, 2))
    )


def write(old: KeysValues, key: jax.Array, value: jax.Array, place: jax.Array | int) -> KeysValues:
    """A cache with keys and values (B, T, kv_heads, head_dim) in its T slots from ``place`` on."""
    dtype = old.key.dtype
    new = KeysValues(jnp.moveaxis(key, 1, 3).astype(dtype), jnp.moveaxis(value, 1, 2).astype(dtype))
    return _put(old, new, place)


def empty_newest(caches: Caches, slots: Slots) -> tuple[Caches, Slots]:
    """Moves the newest tokens into the large cache; returns the caches and their slots."""
    caches = tuple(c._replace(all=_put(c.all, c.newest, slots.end)) for c in caches)
    return caches, Slots(slots.first, slots.end + slots.newest)


def attend_to_cache(query: jax.Array, cache: LayerCache, scale: float, slots: Slots) -> jax.Array:
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
    kv_heads, size = cache.all.value.shape[1:3]
    group = heads // kv_heads
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    # Queries of a group share their keys: they are one matrix (B, kv_heads, group * T, head_dim).
    q = jnp.moveaxis(query, 2, 1).reshape(batch, kv_heads, group * length, head_dim)

    def logits(keys: jax.Array, visible: jax.Array) -> jax.Array:
        visible = jnp.tile(visible[:, None], (1, 1, group, 1))
        found = scale * jnp.matmul(q, keys, preferred_element_type=dtype)
        return jnp.where(visible, found, -jnp.inf)

    slot = jnp.arange(size)
    seen = (slot < slots.end) & (slot >= slots.first[:, None])  # (B, slots)
    seen = jnp.broadcast_to(seen[:, None], (batch, length, size))
    own = slots.newest + jnp.arange(length)[:, None]
    before = jnp.arange(cache.newest.value.shape[2]) <= own  # (T, newest)
    before = jnp.broadcast_to(before, (batch, *before.shape))
    both = [logits(cache.all.key, seen), logits(cache.newest.key, before)]
    probs = jax.nn.softmax(jnp.concatenate(both, axis=-1), axis=-1).astype(cache.all.value.dtype)
    out = probs[..., :size] @ cache.all.value + probs[..., size:] @ cache.newest.value
    return jnp.moveaxis(out.reshape(batch, heads, length, head_dim), 1, 2)
