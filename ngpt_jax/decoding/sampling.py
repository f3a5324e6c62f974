"""Draws a token from logits: temperature, then top-k, top-p and min-p."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_COLDEST = 1e-6
_HOTTEST = 1e30  # float32 ends at 3e38


class Sampling(NamedTuple):
    """How tokens are drawn. Filters work on the softmax at the temperature, in this order.

    Attributes:
      temperature: of the softmax. 0 (below 1e-6): always draw the likeliest token.
      top_k: keep the k likeliest tokens. 0: keep all.
      top_p: keep the fewest of the likeliest tokens whose probabilities add up to p. 1: keep all.
      min_p: keep tokens whose probability is at least this share of the largest. 0: keep all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def problem(self) -> str | None:
        """A message that names the field with a wrong value; None where all are right."""
        if not 0 <= self.temperature <= _HOTTEST:
            return f"temperature must be a number from 0 to {_HOTTEST}, got {self.temperature}"
        if self.top_k < 0:
            return f"top_k must not be negative (0: all tokens), got {self.top_k}"
        if not 0 < self.top_p <= 1:
            return f"top_p must lie in (0, 1], got {self.top_p}"
        if not 0 <= self.min_p < 1:
            return f"min_p must lie in [0, 1), got {self.min_p}"
        return None


def filter_logits(logits: jax.Array, how: Sampling) -> jax.Array:
    """Logits (..., vocab) divided by the temperature, -inf for tokens that a filter removes.

    The likeliest token always stays. Tokens exactly as likely as the last one that top-k or top-p
    keeps stay too.
    """
    logits = logits / how.temperature
    if 0 < how.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, how.top_k)[0][..., -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if how.top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        probs = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # probability of all likelier tokens
        inside = (before < how.top_p) | (before == 0)  # before is 0 for the likeliest token
        least = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if how.min_p > 0:
        top = jnp.max(logits, axis=-1, keepdims=True)
        logits = jnp.where(logits >= top + jnp.log(how.min_p), logits, -jnp.inf)
    return logits


def draw(logits: jax.Array, how: Sampling, keys: jax.Array) -> jax.Array:
    """Draws a token id (B,) int32 for each row.

    Args:
      logits: (B, vocab), at least float32.
      how: static.
      keys: (B,) random keys, one for each row, so that a row does not depend on the others.
    """
    if how.temperature < _COLDEST:  # a smaller temperature would make logits infinite
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    drawn = jax.vmap(jax.random.categorical)(keys, filter_logits(logits, how))
    return drawn.astype(jnp.int32)
