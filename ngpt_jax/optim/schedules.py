"""Learning-rate schedules: functions of the step, the number of batches consumed before."""

import math

import jax.numpy as jnp
import optax

from ngpt_jax.config.optimizer import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then one of the following, from the peak to ``final_fraction`` of it.

    * ``cosine``: (1 + cos(pi r)) / 2, with r in [0, 1] the progress after the warm-up.
    * ``log``: 1 - log(1 + r/rho) / log(1 + 1/rho), the logarithmic decay of
      https://arxiv.org/abs/2608.01284, with rho = ``log_rho``. Its mean is 1/log(1 + 1/rho) - rho.
    * ``wsd``: constant, then 1 - p, with p the progress in the last ``decay_fraction`` of the run,
      but not before the end of the warm-up.
    * ``wsd_sqrt``: the same with 1 - sqrt(p).
    * ``constant``: the peak to the end.

    Args:
      config: resolved; with ``warmup_steps = 0`` step 0 has the peak rate.
      steps: length of the run.

    Returns:
      A function from the step to the learning rate, a scalar in the default float dtype.
    """
    warmup = config.warmup_steps or 0
    decay = max(1, min(round(config.decay_fraction * steps), steps - warmup))  # after the warm-up

    def share_of_peak(step):
        if config.schedule == "constant":
            return jnp.ones_like(step)
        if config.schedule in ("wsd", "wsd_sqrt"):
            falling = jnp.clip((steps - step) / decay, 0, 1)
            if config.schedule == "wsd_sqrt":
                falling = 1 - jnp.sqrt(1 - falling)
        else:
            progress = jnp.clip((step - warmup) / (steps - warmup), 0, 1)
            if config.schedule == "log":
                rho = config.log_rho
                falling = 1 - jnp.log1p(progress / rho) / math.log1p(1 / rho)
            else:
                falling = (1 + jnp.cos(jnp.pi * progress)) / 2
        return config.final_fraction + (1 - config.final_fraction) * falling

    def schedule(step):
        step = jnp.asarray(step) * 1.0  # float64 where that is the default
        rising = step / max(warmup, 1)
        share = jnp.where(step < warmup, rising, share_of_peak(step))
        return config.learning_rate * share

    return schedule
