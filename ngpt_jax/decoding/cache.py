"""The KV cache: keys and values of earlier tokens, kept for decoding token by token.

Prompts are padded on the left. So rows of different lengths begin in different slots and end in the
same one, and a step writes one slot for all rows.

Rows and heads are one axis, so that the products of a step take the cache as it is. With two axes
XLA's CPU backend would write each cache twice, in two shapes, and copy it in each step of a loop.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ngpt_jax.config import ModelConfig
from ngpt_jax.decoding.rows import row_max, row_sum
from ngpt_jax.parallel import rules

CHUNK = 16  # tokens that one call of decoding draws at most


class KeysValues(NamedTuple):
    """Keys and values of one layer in the compute dtype, laid out for the two products of a step.

    N is B * kv_heads; on a mesh, each device has those of its rows and heads. A CPU takes five
    times as long with keys laid out as values are.
    """

    key: jax.Array  # (N, head_dim, slots)
    value: jax.Array  # (N, slots, head_dim)


Caches = tuple[KeysValues, ...]  # one a layer


class Slots(NamedTuple):
    """Which slots hold tokens.

    Attributes:
      first: (B,) the first slot of each row; before it there is padding.
      end: () how many slots are filled.
    """

    first: jax.Array
    end: jax.Array | int


def _specs(batch: int, kv_heads: int) -> tuple[Any, P, Any]:
    """How an array (B,), one (B, T, heads, head_dim) and a cache are cut over the current mesh."""
    mesh = rules.current_mesh()
    if mesh is None:
        return P(), P(), P()
    rows, heads = rules.activation_spec(("batch", "kv_heads"), (batch, kv_heads), mesh)
    both: Any = P(rules.spec_axes(P(rows, heads)), None, None)
    return P(rows), P(rows, None, heads, None), KeysValues(both, both)


def _on_devices(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """The function on each device's rows and heads."""
    if rules.current_mesh() is None:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def empty_cache(config: ModelConfig, batch: int, slots: int) -> Caches:
    """A cache of zeros for each layer, laid out on the current mesh.

    Args:
      config: resolved.
      batch: rows.
      slots: tokens that the cache has room for.
    """
    assert config.kv_heads is not None and config.head_dim is not None
    n, dim = batch * config.kv_heads, config.head_dim
    key, value = (jnp.zeros((n, *size), config.dtype) for size in ((dim, slots), (slots, dim)))
    empty = KeysValues(key, value)
    if rules.current_mesh() is not None:
        empty = jax.lax.with_sharding_constraint(empty, _specs(batch, config.kv_heads)[2])
    return (empty,) * config.layers


def write(old: KeysValues, key: jax.Array, value: jax.Array, place: jax.Array | int) -> KeysValues:
    """A cache with keys and values (B, T, kv_heads, head_dim) in its T slots from ``place`` on."""

    def put(old, key, value, place):
        key, value = jnp.moveaxis(key, 1, 3), jnp.moveaxis(value, 1, 2)
        key, value = (x.reshape(-1, *x.shape[2:]).astype(old.key.dtype) for x in (key, value))
        update = jax.lax.dynamic_update_slice_in_dim
        return KeysValues(update(old.key, key, place, 2), update(old.value, value, place, 1))

    _, heads, cache = _specs(key.shape[0], key.shape[2])
    put = _on_devices(put, (cache, heads, heads, P()), cache)
    return put(old, key, value, jnp.asarray(place))


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
    batch = query.shape[0]
    first, heads, kv = _specs(batch, cache.key.shape[0] // batch)
    attend = _on_devices(functools.partial(_attend, scale), (heads, kv, first, P()), heads)
    return attend(query, cache, slots.first, jnp.asarray(slots.end))


def _attend(
    scale: float, query: jax.Array, cache: KeysValues, first: jax.Array, end: jax.Array
) -> jax.Array:
    batch, length, heads, head_dim = query.shape
    rows, size, _ = cache.value.shape
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    # Queries of a group share their keys: they are one matrix (N, group * T, head_dim). Where that
    # is one row, they are vectors: of a matrix XLA's CPU backend would copy the probabilities.
    matrix = batch * heads * length > rows
    q = jnp.moveaxis(query, 2, 1).reshape(rows, *((-1,) if matrix else ()), head_dim)
    n = "m" if matrix else ""
    product = functools.partial(jnp.einsum, preferred_element_type=dtype)
    logits = scale * product(f"n{n}d,nds->n{n}s", q, cache.key)
    slot, own = jnp.arange(size), end + jnp.arange(length)
    visible = (slot <= own[:, None]) & (slot >= first[:, None, None])  # (B, T, slots)
    visible = jnp.broadcast_to(visible[:, None], (batch, heads, length, size))
    logits = jnp.where(visible.reshape(logits.shape), logits, -jnp.inf)
    probs = jnp.exp(logits - row_max(logits))
    total = row_sum(probs)
    out = product(f"n{n}s,nsd->n{n}d", probs.astype(cache.value.dtype), cache.value)
    out = (out / total).astype(query.dtype)
    return jnp.moveaxis(out.reshape(batch, heads, length, head_dim), 1, 2)
