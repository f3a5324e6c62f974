"""Logit gradient preconditioning (https://arxiv.org/abs/2608.01284, as others reproduce it).

The logits are z = s_z u with u = E_out h, for each token id. The forward pass is as ever. Backward,
dL/dz goes into u with another factor:

    dL/du = (s_z / mean(s_z))^q dL/dz        in place of s_z dL/dz

and from there into E_out and h. The gradient of s_z is the ordinary one. So the size of what all
weights below the logits get no longer follows the mean of s_z, which changes in training.

The loss reads the product of the table and s_z. So the rule has two places: :func:`scale_rows` for
the gradient of E_out, and the table of :func:`backward_table` for that of h.
"""

import jax
import jax.numpy as jnp

from ngpt_jax import sphere


def factors(s_z: jax.Array, power: float, vocab_size: int) -> jax.Array:
    """(s_z / mean(s_z))^power with its sign, like s_z; the mean is that of the ids in use."""
    real = jnp.arange(s_z.size) < vocab_size
    relative = s_z / jnp.mean(s_z, where=real)
    return jnp.sign(relative) * jnp.abs(relative) ** power


@jax.custom_vjp
def scale_rows(table: jax.Array, s_z: jax.Array, factor: jax.Array) -> jax.Array:
    """The table (vocab, embed) with each row times its s_z.

    Backward the table gets ``factor`` (vocab,) times the gradient of the result, s_z its own.
    """
    del factor
    return table * s_z[:, None]


def _forward(table, s_z, factor):
    return table * s_z[:, None], (table, factor)


def _backward(kept, gradient):
    table, factor = kept
    return factor[:, None] * gradient, jnp.sum(table * gradient, axis=1), jnp.zeros_like(factor)


scale_rows.defvjp(_forward, _backward)


def backward_table(table: jax.Array, factor: jax.Array, dtype: str) -> jax.Array:
    """The table (vocab, embed) that the gradient of the hidden states goes through."""
    return jax.lax.stop_gradient((sphere.promote(table) * factor[:, None]).astype(dtype))
