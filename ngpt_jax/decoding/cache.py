"""Keys and values of earlier positions, kept for decoding token by token.

Slot i of a row holds its token i, counted from the row's first one: rows of different lengths end
in the same slot and begin in different ones (padding is on the left), so that a step writes one
slot for all rows.

The newest tokens lie in a small cache of their own, which is emptied into the large one every few
steps: a loop that wrote to the large one in each step would copy it, as XLA sees that it is read
and written at once (on a CPU a token took 15 times as long with 2,000 slots).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ngpt_jax.config import ModelConfig
from ngpt_jax.parallel import rules


class KeysValues(NamedTuple):
    """In the compute dtype, laid out for the two products of a step.

    A CPU takes five times as long where keys lie as values do.
    """

    key: jax.Array  # (B, kv_heads, head_dim, slots)
    value: jax.Array  # (B, kv_heads, slots, head_dim)


class LayerCache(NamedTuple):
    """Of one layer: the slots, and the newest tokens, which are not in them yet."""

    all: KeysValues
    newest: KeysValues


class Slots(NamedTuple):
    """Which slots hold tokens.

    ``first`` (B,) is each row's first one, ``end`` () how many are filled, ``newest`` () how many
    tokens came after them; ``end`` None: the cache is empty, and attention needs no more than the
    call itself.
    """

    first: jax.Array
    end: jax.Array | None
    newest: jax.Array | int = 0

    @property
    def empty(self) -> bool:
        return self.end is None


def empty_cache(config: ModelConfig, batch: int, slots: int, newest: int) -> tuple[LayerCache, ...]:
    """A cache a layer, laid out on the current mesh.

    Args:
      config: resolved.
      batch: rows.
      slots: room for that many tokens, and for a spill of ``newest``.
      newest: tokens until it has to be emptied.
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


def write(cache: LayerCache, key: jax.Array, value: jax.Array, slots: Slots) -> LayerCache:
    """The cache with keys and values (B, T, kv_heads, head_dim) of the next T tokens."""
    dtype = cache.all.key.dtype
    new = KeysValues(jnp.moveaxis(key, 1, 3).astype(dtype), jnp.moveaxis(value, 1, 2).astype(dtype))
    if slots.empty:
        return cache._replace(all=_put(cache.all, new, 0))
    return cache._replace(newest=_put(cache.newest, new, slots.newest))


def empty_newest(
    caches: tuple[LayerCache, ...], slots: Slots
) -> tuple[tuple[LayerCache, ...], Slots]:
    """Moves the newest tokens into the slots."""
    assert slots.end is not None
    end = slots.end
    caches = tuple(c._replace(all=_put(c.all, c.newest, end)) for c in caches)
    return caches, Slots(slots.first, end + slots.newest, 0)


def attend_to_cache(query: jax.Array, cache: LayerCache, scale: float, slots: Slots) -> jax.Array:
    """softmax(scale * q k^T) v over the tokens that each position can see, its own among them.

    Args:
      query: (B, T, heads, head_dim), of the T tokens after those that ``slots`` tells of.
      cache: with the keys and values of these positions already written.
      scale: of the logits.
      slots: before these positions.

    Returns:
      (B, T, heads, head_dim); the softmax is in at least float32.
    """
    assert slots.end is not None
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
