"""Log-probabilities of given tokens, in chunks of positions to save the memory of the logits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ngpt_jax.config import ModelConfig
from ngpt_jax.model.loss import CHUNK, num_chunks
from ngpt_jax.model.transformer import Transformer, output_logits
from ngpt_jax.parallel import rules


@functools.partial(jax.jit, static_argnums=0)
def score(config: ModelConfig, params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The log-probability of each token of a row after the tokens before it.

    Args:
      config: of the model.
      params: parameters of this config, folded or not.
      tokens: (B, T). Rows may end in any padding, because no token before it sees it.

    Returns:
      The log-probability (B, T - 1) in nats of tokens 1 to T - 1, in at least float32; and whether
      greedy decoding would draw the token, that is the first of the likeliest ones.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    inputs = rules.constrain(inputs, "batch", "length")
    outputs: Any = Transformer(config).apply({"params": params}, inputs, method="hidden_and_table")
    h, table = outputs
    batch, length = targets.shape
    n = num_chunks(batch, length, config.loss_chunk or CHUNK)

    def cut(x: jax.Array) -> jax.Array:  # (B, T, ...) -> (n, B, T/n, ...)
        return jnp.moveaxis(x.reshape(batch, n, length // n, *x.shape[2:]), 1, 0)

    def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h, y = chunk
        logits = output_logits(config, h, table)
        picked = jnp.take_along_axis(logits, y[..., None], axis=-1)[..., 0]
        total = jax.nn.logsumexp(logits, axis=-1)
        return picked - total, jnp.argmax(logits, axis=-1) == y

    found = jax.lax.map(of_chunk, (cut(h), cut(targets)))
    log_probs, likeliest = (jnp.moveaxis(x, 0, 1).reshape(batch, length) for x in found)
    return rules.constrain(log_probs, None, None), rules.constrain(likeliest, None, None)
