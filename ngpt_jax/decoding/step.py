"""Draws tokens one after the other. Each attends to the KV cache."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ngpt_jax.config import ModelConfig
from ngpt_jax.decoding import cache as kv
from ngpt_jax.decoding.cache import CHUNK, Caches, LayerCache, Slots
from ngpt_jax.decoding.forward import forward
from ngpt_jax.decoding.prefill import Decoder
from ngpt_jax.decoding.sampling import Sampling, draw
from ngpt_jax.model.transformer import output_logits
from ngpt_jax.parallel import rules


def read_next(
    config: ModelConfig, params: Any, tokens: jax.Array, caches: Caches, slots: Slots
) -> tuple[jax.Array, Caches]:
    """The last hidden states (B, T, embed) of the next tokens (B, T), and the caches with them.

    ``slots`` are those before these tokens. The other arguments are those of :func:`forward`.
    """

    def attend(cache: LayerCache, q, k, v, scale):
        cache = cache._replace(newest=kv.write(cache.newest, k, v, slots.newest))
        return kv.attend_to_cache(q, cache, scale, slots), cache

    slot = slots.end + slots.newest + jnp.arange(tokens.shape[1])
    attends = [functools.partial(attend, cache) for cache in caches]
    return forward(config, params, tokens, slot, slots.first, attends)


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
    slots = [c.all for c in decoder.caches]  # read in the loop, written after it

    def go_on(state):
        i, _, ended, *_ = state
        return (i < count) & ~jnp.all(ended)

    def step(state):
        i, logits, ended, newest, ids, log_probs = state
        keys = jax.vmap(jax.random.fold_in, (0, None))(decoder.keys, decoder.drawn + i)
        token = jnp.where(ended, eod, draw(logits, how, keys)).astype(jnp.int32)
        log_prob = jax.nn.log_softmax(logits, axis=-1)
        log_prob = jnp.take_along_axis(log_prob, token[:, None], axis=-1)
        caches = tuple(LayerCache(*both) for both in zip(slots, newest))
        before = decoder.slots._replace(newest=i)
        h, caches = read_next(config, params, token[:, None], caches, before)
        logits = output_logits(config, h, params["output_embedding"])[:, 0]
        put = jax.lax.dynamic_update_slice_in_dim
        ids, log_probs = put(ids, token[:, None], i, 1), put(log_probs, log_prob, i, 1)
        return i + 1, logits, ended | (token == eod), [c.newest for c in caches], ids, log_probs

    newest = [c.newest for c in decoder.caches]
    state = (jnp.zeros((), jnp.int32), decoder.logits, decoder.ended, newest, ids, log_probs)
    i, logits, ended, newest, ids, log_probs = jax.lax.while_loop(go_on, step, state)
    caches = tuple(LayerCache(*both) for both in zip(slots, newest))
    caches, after = kv.empty_newest(caches, decoder.slots._replace(newest=i))
    decoder = Decoder(caches, after, logits, decoder.keys, decoder.drawn + i, ended)
    whole = rules.constrain(ids, None, None), rules.constrain(log_probs, None, None)
    return decoder, *whole
