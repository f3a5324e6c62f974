"""Text from a model: the prompts at once, then a token a step from a cache of keys and values."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ngpt_jax.config import ModelConfig
from ngpt_jax.decoding.cache import KeysValues, LayerCache, Slots, empty_cache, empty_newest
from ngpt_jax.decoding.sampling import Sampling, draw
from ngpt_jax.model.embedding import embed_tokens
from ngpt_jax.model.rotary import rope_tables
from ngpt_jax.model.transformer import Block, output_logits, rms_norm
from ngpt_jax.parallel import rules

_BUCKET = 64  # prompts and caches are padded to multiples of this: few programs for many lengths
CHUNK = 16  # tokens, at most, between two looks of the host


def forward(
    config: ModelConfig,
    params: Any,
    tokens: jax.Array,
    caches: Sequence[LayerCache],
    slots: Slots,
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """Last hidden states (B, T, embed) of the next T tokens, and the caches with them.

    Args:
      config: of the parameters, folded_config's.
      params: from folding.for_inference.
      tokens: (B, T); in an empty cache those before ``slots.first`` are padding.
      caches: a layer each.
      slots: before these tokens.
    """
    assert config.head_dim is not None
    length = tokens.shape[1]
    slot = (0 if slots.end is None else slots.end + slots.newest) + jnp.arange(length)
    positions = jnp.maximum(slot - slots.first[:, None], 0)  # (B, T)
    segment_ids = None
    if slots.empty:  # padding sees padding alone, tokens see tokens alone
        segment_ids = (slot >= slots.first[:, None]).astype(jnp.int32)
    dtype = jnp.promote_types(config.dtype, jnp.float32)
    tables = rope_tables(positions, config.head_dim, config.rope_base, dtype)
    h = embed_tokens(params["input_embedding"], tokens)
    new = []
    for i, (layer, old) in enumerate(zip(params["layers"], caches, strict=True)):
        block: Any = Block(config, after_first=i > 0)
        h, cache = block.apply({"params": layer}, h, tables, segment_ids, old, slots)
        new.append(cache)
    return rms_norm(h, params.get("final_norm"), config.rms_eps), tuple(new)


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
    caches = empty_cache(config, tokens.shape[0], num_slots, CHUNK)
    tokens = rules.constrain(tokens, "batch", "length")
    h, caches = forward(config, params, tokens, caches, Slots(first, None))
    logits = output_logits(config, h[:, -1:], params["output_embedding"])[:, 0]
    slots = Slots(first, jnp.asarray(tokens.shape[1], jnp.int32))
    ended = jnp.zeros(tokens.shape[:1], bool)
    return Decoder(caches, slots, logits, keys, jnp.zeros((), jnp.int32), ended)


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def decode(
    config: ModelConfig,
    params: Any,
    decoder: Decoder,
    count: jax.Array,
    how: Sampling,
    eod: jax.Array,
) -> tuple[Decoder, jax.Array, jax.Array]:
    """Draws ``count`` tokens, or fewer where all rows have ended.

    Args:
      config, params: as in :func:`forward`.
      decoder: its buffers are taken.
      count: at most CHUNK.
      how: static.
      eod: the id that ends a row, which then goes on with it; -1: none does.

    Returns:
      The decoder, the ids (B, CHUNK), and the log-probability of each (B, CHUNK) under the
      model itself, at temperature 1 and without filters; after those drawn there are -1 and 0.
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
        caches = [LayerCache(*both) for both in zip(slots, newest)]
        where = decoder.slots._replace(newest=i)
        h, caches = forward(config, params, token[:, None], caches, where)
        logits = output_logits(config, h, params["output_embedding"])[:, 0]
        put = jax.lax.dynamic_update_slice_in_dim
        ids, log_probs = put(ids, token[:, None], i, 1), put(log_probs, log_prob, i, 1)
        return i + 1, logits, ended | (token == eod), [c.newest for c in caches], ids, log_probs

    newest: list[KeysValues] = [c.newest for c in decoder.caches]
    state = (jnp.zeros((), jnp.int32), decoder.logits, decoder.ended, newest, ids, log_probs)
    i, logits, ended, newest, ids, log_probs = jax.lax.while_loop(go_on, step, state)
    caches = tuple(LayerCache(*both) for both in zip(slots, newest))
    caches, where = empty_newest(caches, decoder.slots._replace(newest=i))
    decoder = Decoder(caches, where, logits, decoder.keys, decoder.drawn + i, ended)
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
    chunk: int = CHUNK,
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
      chunk: tokens drawn between two looks of the host, at most CHUNK.

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
        decoder, ids, log_probs = decode(config, params, decoder, n, how, eod)
        n, ended = int(decoder.drawn) - done, bool(decoder.ended.all())
        if n:
            yield np.asarray(ids)[:, :n], np.asarray(log_probs)[:, :n]
        done += n
        if ended:
            return
