"""A trace of some steps, for TensorBoard's profiler."""

from collections.abc import Callable

import jax
from etils import epath

from ngpt_jax.config.fields import ProfileConfig
from ngpt_jax.training.step import TrainState


class Profile:
    """Traces the steps that the config names, counted from this start of the run."""

    def __init__(self, config: ProfileConfig, workdir: epath.Path, say: Callable[[str], None]):
        self._config, self._folder, self._say = config, workdir / "profile", say
        self._steps, self._tracing = 0, False

    def before_step(self, state: TrainState) -> None:
        """Starts or ends the trace where that is due; called before each step."""
        first, count = self._config.first_step, self._config.num_steps
        if count and self._steps == first:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        if self._steps == first + count:
            self.end(state)
        self._steps += 1

    def end(self, state: TrainState) -> None:
        """Ends a trace that was started, once the device has done its work."""
        if self._tracing:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._tracing = False
            self._say(f"trace of {self._config.num_steps} steps -> {self._folder}")
