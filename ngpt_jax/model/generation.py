"""Text from a model: the prompts at once, then a token a step from a cache of keys and values."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ngpt_jax.config import ModelConfig
from ngpt_jax.model.cache import LayerCache, Slots, empty_cache
from ngpt_jax.model.embedding import embed_tokens
from ngpt_jax.model.rotary import rope_tables
from ngpt_jax.model.sampling import Sampling, draw
from ngpt_jax.model.transformer import Block, output_logits, rms_norm
from ngpt_jax.parallel import rules

_BUCKET = 64  # prompts and caches are padded to multiples of this: few programs for many lengths


def forward(
    config: ModelConfig,
    params: Any,
    tokens: jax.Array,
    caches: Sequence[LayerCache],
    slots: Slots,
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """Last hidden states (B, T, embed) of the tokens in the next T slots, and the caches with them.

    Args:
      config: of the parameters, folded_config's.
      params: from folding.for_inference.
      tokens: (B, T); those in slots before ``slots.first`` are padding.
      caches: a layer each.
      slots: before these tokens.
    """
    assert config.head_dim is not None
    length = tokens.shape[1]
    slot = (0 if slots.end is None else slots.end) + jnp.arange(length)
    positions = jnp.maximum(slot - slots.first[:, None], 0)  # (B, T)
    segment_ids = None
    if slots.empty:  # padding sees padding alone, tokens see tokens alone
        segment_ids = (slot >= slots.first[:, None]).astype(jnp.int32)
    dtype = jnp.promote_types(config.dtype, jnp.float32)
    tables = rope_tables(positions, config.head_dim, config.rope_base, dtype)
    h = embed_tokens(params["input_embedding"], tokens)
    block: Any = Block(config)
    new = []
    for layer, old in zip(params["layers"], caches, strict=True):
        h, cache = block.apply({"params": layer}, h, tables, segment_ids, old, slots)
        new.append(cache)
    if config.kind == "gpt":
        h = rms_norm(h, params["final_norm"], config.rms_eps)
    return h, tuple(new)


class Decoder(NamedTuple):
    """What a batch being generated is between steps."""

    caches: tuple[LayerCache, ...]
    slots: Slots
    logits: jax.Array  # (B, vocab) of the next token
    keys: jax.Array  # (B,) of the rows
    drawn: jax.Array  # () tokens of each row so far
    ended: jax.Array  # (B,) rows that have drawn ``eod``


@functools.partial(jax.jit, static_argnums=(0, 4))
def prefill(
    config: ModelConfig,
    params: Any,
    tokens: jax.Array,
    first: jax.Array,
    num_slots: int,
    keys: jax.Array,
) -> Decoder:
    """Reads prompts into a new cache.

    Args:
      config, params: as in :func:`forward`.
      tokens: (B, T), prompts at the right end of their rows.
      first: (B,) where each begins.
      num_slots: of the cache: T and as many as are to be generated.
      keys: (B,) random keys.
    """
    caches = empty_cache(config, tokens.shape[0], num_slots)
    tokens = rules.constrain(tokens, "batch", "length")
    h, caches = forward(config, params, tokens, caches, Slots(first, None))
    logits = output_logits(config, h[:, -1:], params["output_embedding"])[:, 0]
    slots = Slots(first, jnp.asarray(tokens.shape[1], jnp.int32))
    ended = jnp.zeros(tokens.shape[:1], bool)
    return Decoder(caches, slots, logits, keys, jnp.zeros((), jnp.int32), ended)


@functools.partial(jax.jit, static_argnums=(0, 4, 5), donate_argnums=2)
def decode(
    config: ModelConfig,
    params: Any,
    decoder: Decoder,
    count: jax.Array,
    size: int,
    how: Sampling,
    eod: jax.Array,
) -> tuple[Decoder, jax.Array, jax.Array]:
    """Draws tokens until ``count``, or until all rows have ended.

    Args:
      config, params: as in :func:`forward`.
      decoder: its buffers are taken.
      count: at most ``size``.
      size: of what is returned, static.
      how: static.
      eod: the id that ends a row, which then goes on with it; -1: none does.

    Returns:
      The decoder, the ids (B, size), and the log-probability of each (B, size) under the
      model itself, at temperature 1 and without filters; after those drawn there are -1 and 0.
    """
    batch = decoder.logits.shape[0]
    ids = jnp.full((batch, size), -1, jnp.int32)
    log_probs = jnp.zeros((batch, size), decoder.logits.dtype)

    def go_on(state):
        i, decoder, _, _ = state
        return (i < count) & ~jnp.all(decoder.ended)

    def step(state):
        i, d, ids, log_probs = state
        token = draw(d.logits, how, jax.vmap(jax.random.fold_in, (0, None))(d.keys, d.drawn))
        token = jnp.where(d.ended, eod, token).astype(jnp.int32)
        log_prob = jax.nn.log_softmax(d.logits, axis=-1)
        log_prob = jnp.take_along_axis(log_prob, token[:, None], axis=-1)[:, 0]
        h, caches = forward(config, params, token[:, None], d.caches, d.slots)
        logits = output_logits(config, h, params["output_embedding"])[:, 0]
        slots = d.slots._replace(end=d.slots.end + 1)
        new = Decoder(caches, slots, logits, d.keys, d.drawn + 1, d.ended | (token == eod))
        return i + 1, new, ids.at[:, i].set(token), log_probs.at[:, i].set(log_prob)

    state = (jnp.zeros((), jnp.int32), decoder, ids, log_probs)
    _, decoder, ids, log_probs = jax.lax.while_loop(go_on, step, state)
    whole = rules.constrain(ids, None, None), rules.constrain(log_probs, None, None)
    return decoder, *whole


def generate(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    count: int,
    how: Sampling,
    seed: int,
    eod: int = -1,
    chunk: int = 16,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Goes on from prompts, a chunk of tokens at a time.

    Row i draws from the key fold_in(key(seed), i): what it says does not depend on the others.

    Args:
      config, params: as in :func:`forward`.
      prompts: token ids, at least one each.
      count: tokens to draw for each.
      how: of the draw.
      seed: of the draw.
      eod: the id that ends a row, -1: none does.
      chunk: tokens drawn between two looks of the host.

    Yields:
      ids (B, n) and their log-probabilities (B, n); a row that has ended goes on with ``eod``. It
      ends early when all rows have ended, or when the caller no longer asks.
    """
    longest = max(map(len, prompts))
    width = -(-longest // _BUCKET) * _BUCKET
    slots = width + -(-count // _BUCKET) * _BUCKET
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[width - len(prompt) :] = prompt
    first = np.array([width - len(prompt) for prompt in prompts], np.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.arange(len(prompts)))
    decoder = prefill(config, params, tokens, first, slots, keys)
    done = 0
    while done < count:
        n = min(chunk, count - done)
        decoder, ids, log_probs = decode(config, params, decoder, n, chunk, how, eod)
        n, ended = int(decoder.drawn) - done, bool(decoder.ended.all())
        if n:
            yield np.asarray(ids)[:, :n], np.asarray(log_probs)[:, :n]
        done += n
        if ended:
            return
