"""Learning-rate schedules: functions of the step, the number of batches consumed before."""

import jax.numpy as jnp
import optax

from ngpt_jax.config.fields import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then cosine, wsd (stable, then linear decay) or constant.

    Args:
      config: resolved; with ``warmup_steps = 0`` step 0 has the peak rate.
      steps: length of the run; cosine and wsd reach ``final_fraction`` of the peak there.

    Returns:
      A function from the step to the learning rate, a scalar in the default float dtype.
    """
    warmup = config.warmup_steps or 0
    decay = max(1, round(config.decay_fraction * steps))

    def share_of_peak(step):
        if config.schedule == "cosine":
            progress = jnp.clip((step - warmup) / (steps - warmup), 0, 1)
            falling = (1 + jnp.cos(jnp.pi * progress)) / 2
        elif config.schedule == "wsd":
            falling = jnp.clip((steps - step) / decay, 0, 1)
        else:
            return jnp.ones_like(step)
        return config.final_fraction + (1 - config.final_fraction) * falling

    def schedule(step):
        step = jnp.asarray(step) * 1.0  # float64 where that is the default
        rising = step / max(warmup, 1)
        share = jnp.where(step < warmup, rising, share_of_peak(step))
        return config.learning_rate * share

    return schedule
