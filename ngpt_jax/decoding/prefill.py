"""Reads prompts into a new KV cache, all tokens at once."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngpt_jax.config import ModelConfig
from ngpt_jax.decoding.cache import Caches, KeysValues, Slots, empty_cache, write
from ngpt_jax.decoding.forward import forward, tables_of
from ngpt_jax.model.attention import causal_attention, kernel_of
from ngpt_jax.model.transformer import output_logits
from ngpt_jax.parallel import rules


class Decoder(NamedTuple):
    """The state of a batch between steps of decoding."""

    caches: Caches
    slots: Slots
    logits: jax.Array  # (B, vocab) of the next token
    keys: jax.Array  # (B,) random keys of the rows
    drawn: jax.Array  # () tokens of each row so far
    ended: jax.Array  # (B,) rows that have drawn ``eod``


def read_prompts(
    config: ModelConfig, params: Any, tokens: jax.Array, first: jax.Array, caches: Caches
) -> tuple[jax.Array, Caches]:
    """The last hidden states (B, T, embed) of prompts (B, T), and the caches with the prompts.

    Prompts end at the right end of their rows; ``first`` (B,) is where each begins. ``caches`` are
    empty. The other arguments are those of :func:`forward`.
    """
    slot = jnp.arange(tokens.shape[1])
    # Padding attends to padding alone, tokens to tokens alone.
    segment_ids = (slot >= first[:, None]).astype(jnp.int32)

    kernel = kernel_of(config, tokens.shape[1])

    def attend(cache: KeysValues, q, k, v, scale):
        cache = write(cache, k, v, 0)
        return causal_attention(q, k, v, scale, segment_ids, kernel), cache

    attends = [functools.partial(attend, cache) for cache in caches]
    return forward(config, params, tokens, tables_of(config, slot, first), attends)


@functools.partial(jax.jit, static_argnums=(0, 4))
def prefill(
    config: ModelConfig,
    params: Any,
    tokens: jax.Array,
    first: jax.Array,
    num_slots: int,
    keys: jax.Array,
) -> Decoder:
    """A decoder that has read the prompts.

    Args:
      config: of the model, folded or not.
      params: from folding.for_inference.
      tokens: (B, T); prompts end at the right end of their rows.
      first: (B,) where each prompt begins.
      num_slots: of the cache: T, and one for each token to be generated.
      keys: (B,) random keys.
    """
    caches = empty_cache(config, tokens.shape[0], num_slots)
    tokens = rules.constrain(tokens, "batch", "length")
    h, caches = read_prompts(config, params, tokens, first, caches)
    logits = output_logits(config, h[:, -1:], params["output_embedding"])[:, 0]
    slots = Slots(first, jnp.asarray(tokens.shape[1], jnp.int32))
    ended = jnp.zeros(tokens.shape[:1], bool)
    return Decoder(caches, slots, logits, keys, jnp.zeros((), jnp.int32), ended)
