"""Text from a model: one token after the other, the whole window read anew for each."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngpt_jax.config import ModelConfig
from ngpt_jax.model.transformer import Transformer
from ngpt_jax.parallel import rules


@functools.partial(jax.jit, static_argnums=(0, 4))
def _generate(
    config: ModelConfig,
    params: Any,
    window: jax.Array,
    length: jax.Array,
    count: int,
    temperature: jax.Array,
    key: jax.Array,
) -> jax.Array:
    def next_token(carry, key):
        window, length = carry  # (context,) ids of which the first ``length`` are real
        logits = Transformer(config).apply({"params": params}, window[None])[0, length - 1]
        drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
        token = jnp.where(temperature > 0, drawn, jnp.argmax(logits)).astype(window.dtype)
        full = length == window.shape[0]
        window = jnp.where(full, jnp.roll(window, -1), window)
        length = jnp.where(full, length, length + 1)
        return (window.at[length - 1].set(token), length), token

    _, tokens = jax.lax.scan(next_token, (window, length), jax.random.split(key, count))
    return rules.constrain(tokens, None)  # whole on every device of every process


def sample(
    config: ModelConfig, params: Any, prompt: list[int], count: int, temperature: float, seed: int
) -> list[int]:
    """Draws ``count`` token ids that go on from ``prompt``.

    Each token sees the last ``model.context`` ids before it.

    Args:
      config: resolved.
      params: the parameters.
      prompt: at least one token id.
      count: tokens to draw.
      temperature: 0 takes the likeliest token.
      seed: of the draw.
    """
    seen = prompt[-config.context :]
    window = np.zeros(config.context, np.int32)
    window[: len(seen)] = seen
    out = _generate(config, params, window, len(seen), count, temperature, jax.random.key(seed))
    return [int(t) for t in out]
