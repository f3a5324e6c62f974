"""Draws tokens one after the other. Each attends to the KV cache."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ngpt_jax.config import ModelConfig
from ngpt_jax.decoding.cache import (
    CHUNK,
    Caches,
    KeysValues,
    Slots,
    attend_to_cache,
    write,
)
from ngpt_jax.decoding.forward import Tables, forward, tables_of
from ngpt_jax.decoding.prefill import Decoder
from ngpt_jax.decoding.sampling import Sampling, draw
from ngpt_jax.model.transformer import output_logits
from ngpt_jax.parallel import rules


def read_next(
    config: ModelConfig,
    params: Any,
    tokens: jax.Array,
    caches: Caches,
    slots: Slots,
    tables: Tables,
) -> tuple[jax.Array, Caches]:
    """The last hidden states (B, T, embed) of the next tokens (B, T), and the caches with them.

    ``slots`` are those before these tokens. The other arguments are those of :func:`forward`.
    """

    def attend(cache: KeysValues, q, k, v, scale):
        cache = write(cache, k, v, slots.end)
        return attend_to_cache(q, cache, scale, slots), cache

    attends = [functools.partial(attend, cache) for cache in caches]
    return forward(config, params, tokens, tables, attends)


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def decode(
    config: ModelConfig,
    params: Any,
    decoder: Decoder,
    count: jax.Array,
    how: Sampling,
    eod: jax.Array,
) -> tuple[Decoder, jax.Array, jax.Array]:
    """Draws ``count`` tokens for each row, or fewer if all rows have ended.

    Args:
      config: of the model, folded or not.
      params: from folding.for_inference.
      decoder: donated, and not usable afterwards.
      count: at most CHUNK.
      how: static.
      eod: the id that ends a row; the row goes on with this id. -1: no id does.

    Returns:
      The decoder, the ids (B, CHUNK) and their log-probabilities (B, CHUNK) in nats, at temperature
      1 and without filters. After the tokens drawn, ids are -1 and log-probabilities 0.
    """
    batch = decoder.logits.shape[0]
    ids = jnp.full((batch, CHUNK), -1, jnp.int32)
    log_probs = jnp.zeros((batch, CHUNK), decoder.logits.dtype)
    first, end = decoder.slots
    tables = tables_of(config, end + jnp.arange(CHUNK), first)  # (B, CHUNK, head_dim/2)

    def go_on(state):
        i, _, ended, *_ = state
        return (i < count) & ~jnp.all(ended)

    def step(state):
        i, logits, ended, caches, ids, log_probs = state
        keys = jax.vmap(jax.random.fold_in, (0, None))(decoder.keys, decoder.drawn + i)
        token = jnp.where(ended, eod, draw(logits, how, keys)).astype(jnp.int32)
        log_prob = jax.nn.log_softmax(logits, axis=-1)
        log_prob = jnp.take_along_axis(log_prob, token[:, None], axis=-1)
        now = tuple(jax.lax.dynamic_slice_in_dim(table, i, 1, 1) for table in tables)
        h, caches = read_next(config, params, token[:, None], caches, Slots(first, end + i), now)
        logits = output_logits(config, h, params["output_embedding"])[:, 0]
        put = jax.lax.dynamic_update_slice_in_dim
        ids, log_probs = put(ids, token[:, None], i, 1), put(log_probs, log_prob, i, 1)
        return i + 1, logits, ended | (token == eod), caches, ids, log_probs

    zero = jnp.zeros((), jnp.int32)
    state = (zero, decoder.logits, decoder.ended, decoder.caches, ids, log_probs)
    i, logits, ended, caches, ids, log_probs = jax.lax.while_loop(go_on, step, state)
    slots = Slots(first, end + i)
    decoder = Decoder(caches, slots, logits, decoder.keys, decoder.drawn + i, ended)
    whole = rules.constrain(ids, None, None), rules.constrain(log_probs, None, None)
    return decoder, *whole
