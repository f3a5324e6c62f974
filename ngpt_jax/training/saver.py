"""Saves of a run: when one is due, and what becomes of one that fails."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from ngpt_jax.checkpoint.checkpoints import Checkpoints, SaveError
from ngpt_jax.config import CheckpointConfig
from ngpt_jax.parallel import distributed
from ngpt_jax.training.step import TrainState
from ngpt_jax.training.workdir import RunError


class Saver:
    """Saves checkpoints in the background. All processes call the same methods in one order.

    A save that fails ends the run with a RunError, or is only told, as ``checkpoint.on_error``
    says. That may happen at any later call.
    """

    def __init__(
        self, checkpoints: Checkpoints, config: CheckpointConfig, facts: dict[str, Any],
        loss_at: Callable[[int], float | None], say: Callable[[str], None],
    ):  # fmt: skip
        """
        Args:
          checkpoints: of the run.
          config: says which are due.
          facts: JSON-able, saved with each checkpoint.
          loss_at: the held-out loss of a step, None where it was not evaluated.
          say: takes a line for the user.
        """
        self._checkpoints, self._config = checkpoints, config
        self._facts, self._loss_at, self._say = facts, loss_at, say
        self._saved_at, self._overdue = time.monotonic(), False
        self._next_look, self._last_look = 0, (0, 0.0)  # steps; (step, seconds)

    def look_at_clock(self, step: int) -> None:
        """Finds out, by process 0's clock, whether ``checkpoint.minutes`` have passed.

        Called after every step. Several processes wait for each other when they look, so each look
        tells after how many steps the next one is: half of those that fit into the time left.
        """
        if not self._config.minutes or step < self._next_look:
            return
        left = 60 * self._config.minutes - (time.monotonic() - self._saved_at)
        before, then = self._last_look
        ahead = 1
        if jax.process_count() > 1 and 0 < before < step:
            ahead = max(1, int(left / 2 * (step - before) / (time.monotonic() - then)))
        told = distributed.of_first(lambda: f"{ahead if left > 0 else 0}")
        self._overdue, self._next_look = told == "0", step + max(1, int(told))
        self._last_look = step, time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to save after this many steps, be it the last one or not."""
        loss = self._loss_at(step)
        best = loss is not None and self._checkpoints.is_best(loss)
        return step > 0 and (best or self._overdue or step % self._config.every == 0)

    def save(self, step: int, state: TrainState, progress: dict[str, Any]) -> None:
        """Starts a save; the arrays are copied before this returns. Step 0 is not worth one."""
        if step == 0:
            return
        self._saved_at, self._overdue = time.monotonic(), False
        with self._errors():
            self._checkpoints.save(state, progress | self._facts, self._loss_at(step))

    def check(self) -> None:
        """Tells of a save that has failed; all processes at the same call."""
        with self._errors():
            self._checkpoints.check_for_errors()

    def last_saved(self) -> str:
        """The newest whole checkpoint, "step 50" say, after the end of the save under way."""
        with contextlib.suppress(SaveError):
            self._checkpoints.close()
        saved = self._checkpoints.latest_step()
        return "none" if saved is None else f"step {saved}"

    def finish(self, step: int) -> None:
        """Waits for the last save; raises RunError where ``step`` could not be saved."""
        self.close()
        if step and self._checkpoints.latest_step() != step:
            raise RunError(
                f"Step {step} could not be saved; the last checkpoint is {self.last_saved()}. Run"
                " the same command again to resume there."
            )

    def close(self) -> None:
        """Waits for the last save."""
        with self._errors():
            self._checkpoints.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except SaveError as e:
            if self._config.on_error == "stop":
                raise RunError(str(e)) from e
            self._say(f"warning: {e}")
