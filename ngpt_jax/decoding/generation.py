"""Text from a model: prompts at once, then a token a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ngpt_jax.config import ModelConfig
from ngpt_jax.decoding.cache import CHUNK
from ngpt_jax.decoding.prefill import prefill
from ngpt_jax.decoding.sampling import Sampling
from ngpt_jax.decoding.step import decode

BUCKET = 64  # prompts and caches are padded to multiples of this: few programs for many lengths


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
    """Continues prompts, a chunk of tokens at a time.

    Row i draws with the random key fold_in(key(seed), i), so that its tokens do not depend on the
    other rows.

    Args:
      config: of the model, folded or not.
      params: from folding.for_inference.
      prompts: token ids, at least one each.
      count: tokens to draw for each prompt.
      how: of the draw.
      seed: of the draw.
      eod: the id that ends a row. -1: no id does.
      chunk: tokens drawn before they are handed to the caller, at most CHUNK.

    Yields:
      The ids (B, n) of a chunk and their log-probabilities (B, n) in nats. A row that has ended
      goes on with ``eod``; when all rows have ended, the iterator ends.
    """
    longest = max(map(len, prompts))
    width = -(-longest // BUCKET) * BUCKET
    slots = width + -(-count // BUCKET) * BUCKET
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
