"""Which steps to skip: a loss or gradient that is not finite, or a loss far above its usual."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

DECAY = 0.99  # of the running statistics: some 100 steps, in which a loss hardly moves
MIN_STEPS = 100  # before a spike is called one: until then the loss falls steeply
# Least standard deviation over the mean: above rounding, below the noise of any batch (that of a
# batch of 10^7 tokens is some 3e-4).
MIN_DEVIATION = 1e-4


class Guard(NamedTuple):
    """Steps skipped, and the running statistics of the loss over the others; scalars.

    A variance beside the mean, not a mean square: in float32 their difference would be rounding.
    """

    skipped: jax.Array  # int32, in all
    in_row: jax.Array  # int32, up to now without one in between that was not
    accepted: jax.Array  # int32
    mean: jax.Array  # float32
    variance: jax.Array  # float32


def init_guard() -> Guard:
    """No steps seen."""
    return Guard(  # arrays of their own: one buffer cannot be donated twice
        skipped=jnp.zeros((), jnp.int32),
        in_row=jnp.zeros((), jnp.int32),
        accepted=jnp.zeros((), jnp.int32),
        mean=jnp.zeros((), jnp.float32),
        variance=jnp.zeros((), jnp.float32),
    )


def check(
    guard: Guard, loss: jax.Array, grad_norm: jax.Array, spike_deviations: float
) -> tuple[jax.Array, Guard]:
    """Whether a step may be made, and the guard after it.

    Args:
      guard: before the step.
      loss, grad_norm: of the step's batch, scalars; a gradient that is not finite has a norm that
        is not.
      spike_deviations: refuse a loss so many standard deviations above its running mean; 0: never.

    Returns:
      ok, a boolean scalar; the guard, whose statistics a refused step leaves as they were.
    """
    loss = loss.astype(jnp.float32)
    ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if spike_deviations > 0:
        deviation = jnp.maximum(jnp.sqrt(guard.variance), MIN_DEVIATION * jnp.abs(guard.mean))
        spike = loss > guard.mean + spike_deviations * deviation
        ok &= ~(spike & (guard.accepted >= MIN_STEPS))
    # Averages with weights 1, DECAY, DECAY^2, ... of the newest, the one before, ...: with the
    # newest one's share of the sum of weights, they have no bias towards a start at 0.
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
