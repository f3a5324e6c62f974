"""Which steps to skip: those whose loss or gradient is not finite, or whose loss is a spike."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

DECAY = 0.99  # of the running statistics: they cover some 100 steps, in which a loss hardly moves
MIN_STEPS = 100  # accepted before a spike can be called one: until then the loss falls steeply
# Smallest standard deviation, relative to the mean: above rounding, and below the noise of any
# batch (for 10^7 tokens that is some 3e-4).
MIN_DEVIATION = 1e-4


class Guard(NamedTuple):
    """Numbers of steps, and running statistics of the accepted losses; all are scalars.

    The variance itself is kept, not the mean square: in float32 the difference between that and
    the squared mean would be rounding.
    """

    skipped: jax.Array  # int32, in all
    in_row: jax.Array  # int32, skipped since the last accepted step
    accepted: jax.Array  # int32
    mean: jax.Array  # float32
    variance: jax.Array  # float32


def init_guard() -> Guard:
    """The guard before the first step."""
    return Guard(  # five arrays: one buffer cannot be donated twice
        skipped=jnp.zeros((), jnp.int32),
        in_row=jnp.zeros((), jnp.int32),
        accepted=jnp.zeros((), jnp.int32),
        mean=jnp.zeros((), jnp.float32),
        variance=jnp.zeros((), jnp.float32),
    )


def check(
    guard: Guard, loss: jax.Array, grad_norm: jax.Array, spike_deviations: float
) -> tuple[jax.Array, Guard]:
    """Whether to accept a step, and the guard after it.

    Args:
      guard: before the step.
      loss: of the step's batch, a scalar.
      grad_norm: a scalar; not finite where an entry of the gradient is not.
      spike_deviations: a loss this many standard deviations above its running mean is a spike; 0:
        none is.

    Returns:
      ok, a boolean scalar; and the guard, whose statistics change with accepted steps only.
    """
    loss = loss.astype(jnp.float32)
    ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if spike_deviations > 0:
        deviation = jnp.maximum(jnp.sqrt(guard.variance), MIN_DEVIATION * jnp.abs(guard.mean))
        spike = loss > guard.mean + spike_deviations * deviation
        ok &= ~(spike & (guard.accepted >= MIN_STEPS))
    # Mean and variance are averages with weights 1, DECAY, DECAY^2, ... from the newest loss back.
    # The newest one's share is 1 / (sum of the weights), so the zeros at the start do not count.
    accepted = guard.accepted + 1
    weight_sum = -jnp.expm1(accepted.astype(jnp.float32) * math.log(DECAY)) / (1 - DECAY)
    share = 1 / jnp.maximum(weight_sum, 1)
    off = loss - guard.mean
    good = Guard(
        skipped=guard.skipped,
        in_row=jnp.zeros_like(guard.in_row),
        accepted=accepted,
        mean=guard.mean + share * off,
        variance=(1 - share) * (guard.variance + share * off * off),
    )
    bad = guard._replace(skipped=guard.skipped + 1, in_row=guard.in_row + 1)
    return ok, jax.tree.map(lambda g, b: jnp.where(ok, g, b), good, bad)
