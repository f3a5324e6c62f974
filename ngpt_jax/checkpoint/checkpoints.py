"""Checkpoints: checkpoint N holds the state after N steps, each of one batch."""

from __future__ import annotations

import json
import math
import threading
from functools import partial
from typing import Any, TypeVar

from etils import epath

from ngpt_jax.checkpoint import saving
from ngpt_jax.checkpoint.folder import CheckpointFolder, warn
from ngpt_jax.checkpoint.restoring import restore, restore_params
from ngpt_jax.config import CheckpointConfig, ConfigError
from ngpt_jax.parallel import distributed

__all__ = ["CheckpointError", "Checkpoints", "restore_params"]

State = TypeVar("State", bound=Any)  # a NamedTuple of trees with the field step


class CheckpointError(RuntimeError):
    """A save failed; one line says which and why, what is left, and the mend."""


class Checkpoints:
    """A run's checkpoints, saved in the background; all processes call the same methods.

    A checkpoint is listed with its checksums before it is committed. The ``keep`` newest stay,
    those of multiples of ``keep_every``, and the ``keep_best`` of the lowest held-out losses.
    """

    def __init__(self, workdir: epath.PathLike, config: CheckpointConfig):
        """Sets damaged checkpoints aside; see :meth:`CheckpointFolder.open`, also for errors."""
        self._config, self._folder = config, CheckpointFolder(workdir)
        listed = distributed.first_then_rest(  # the first reads it all, which may take long
            lambda: list(self._folder.open().items()) if distributed.is_first() else [], ConfigError
        )
        # Held-out losses, or None, of all checkpoints, the one being saved among them.
        self._held_out: dict[int, float | None] = dict(json.loads(_of_first(json.dumps(listed))))
        self._save: saving.Save | None = None  # until it is whole, or its error was raised
        self._lock = threading.Condition()
        self._error: CheckpointError | None = None
        self._calls = 0  # of check_for_errors
        self._raise_at: int | None = None  # the call that raises the error

    def latest_step(self) -> int | None:
        """The newest whole checkpoint."""
        with self._lock:
            saving_now = None if self._save is None else self._save.step
            return max((s for s in self._held_out if s != saving_now), default=None)

    def is_best(self, loss: float) -> bool:
        """Whether a checkpoint of this held-out loss would be among the ``keep_best``."""
        with self._lock:
            losses = sorted(x for x in self._held_out.values() if x is not None)
        n = self._config.keep_best
        return n > 0 and math.isfinite(loss) and (len(losses) < n or loss < losses[n - 1])

    def save(self, state: Any, progress: dict[str, Any], held_out: float | None = None) -> None:
        """Starts a save, after the end of the one before; nothing where there is one of this step.

        The arrays are copied to the host before this returns, so the next step may donate them.

        Args:
          progress: JSON-able facts on where the run is.
          held_out: the loss by which it may be among the best, where it was evaluated.

        Raises:
          CheckpointError: the save before failed, which is told once this one is started; or there
            is no room for this one, and nothing was written.
        """
        earlier = self._finish()
        step, text, tree = int(state.step), json.dumps(progress), state._asdict()
        loss = held_out if held_out is not None and math.isfinite(held_out) else None
        if step in self._held_out:
            if loss is not None and self._held_out[step] is None:  # evaluated since it was saved
                self._held_out[step] = loss
                if distributed.is_first():
                    self._folder.set_held_out(step, loss)
        else:
            if problem := distributed.of_first(lambda: self._prepare(step, tree)):
                raise self._failed(step, problem) from earlier
            facts = {"step": step, "held_out": loss}
            with self._lock:  # the save may end before it is known here
                self._save = saving.Save(self._folder, step, tree, text, facts, self._done)
                self._held_out[step] = loss
        if earlier is not None:
            raise earlier

    def _prepare(self, step: int, tree: dict[str, Any]) -> str:
        """Why a save cannot succeed, or nothing: an error here would leave the others waiting."""
        try:
            saving.prepare(self._folder, step, tree)
        except Exception as e:
            return str(e) if isinstance(e, saving.SaveError) else saving.why(e)
        return ""

    def _done(self, save: saving.Save) -> None:
        """In the background: the end of a save."""
        if save.problem is not None:
            self._tell(save)
            return
        with self._lock:
            doomed = sorted(set(self._held_out) - kept(self._held_out, self._config))
            for step in doomed:
                del self._held_out[step]
        for step in doomed if distributed.is_first() else ():
            try:
                self._folder.remove(step)
            except Exception as e:
                warn(f"checkpoint {step}, no longer needed, cannot be removed: {saving.why(e)}")
        with self._lock:
            self._save = None

    def _tell(self, save: saving.Save) -> None:
        """Lets all processes raise at the same call of check_for_errors, which none has passed."""
        assert save.problem is not None
        error = self._failed(save.step, save.problem)
        with self._lock:  # from here on a call waits
            self._error, calls = error, self._calls
        try:
            last = max(map(int, saving.share(f"{save.key}/calls", str(calls))))
        except Exception:  # the others are gone
            last = calls
        with self._lock:
            self._raise_at = last + 1
            self._lock.notify_all()

    def _failed(self, step: int, problem: str) -> CheckpointError:
        latest = self.latest_step()
        mend = f"see that {self._folder.path} can be written"
        if "space" in problem or "quota" in problem:
            mend = f"make room in {self._folder.path}, or lower checkpoint.keep"
        return CheckpointError(
            f"Checkpoint {step} could not be saved ({problem}); the last whole one is"
            f" {'none' if latest is None else latest}; {mend}."
        )

    def check_for_errors(self) -> None:
        """Raises CheckpointError where a save failed since; all processes at the same call."""
        with self._lock:
            self._calls += 1
            self._lock.wait_for(lambda: self._error is None or self._raise_at is not None)
            if self._raise_at is None or self._calls < self._raise_at:
                return
        if (error := self._take()) is not None:
            raise error

    def _finish(self) -> CheckpointError | None:
        """Waits for the save under way; its error."""
        with self._lock:
            save = self._save
        if save is None:
            return None
        save.join()
        return self._take()

    def _take(self) -> CheckpointError | None:
        """The error of a save that failed, which is then forgotten."""
        with self._lock:
            error, save = self._error, self._save
            self._error = self._raise_at = self._save = None
            if save is not None:
                del self._held_out[save.step]
        return error

    def restore(self, like: State) -> tuple[State, dict[str, Any]]:
        """The newest checkpoint in the shapes, dtypes and shardings of ``like``.

        Args:
          like: a TrainState of ShapeDtypeStructs with shardings: of this mesh, whichever one
            the checkpoint was written on.

        Returns:
          The state, laid out by XLA itself so that its buffers can be donated, and progress.

        Raises:
          ConfigError: the checkpoint holds another state, or cannot be read.
        """
        step = self.latest_step()
        assert step is not None

        def tell(difference: str) -> str:
            return (
                f"--workdir={self._folder.workdir}: checkpoint {step} is of another model or"
                f" optimizer: {difference}; choose another --workdir."
            )

        state, progress = restore(self._folder.checkpoint(step), like._asdict(), tell)
        return like._replace(**state), progress

    def close(self) -> None:
        """Waits for the last save, and raises CheckpointError where it failed."""
        if (error := self._finish()) is not None:
            raise error


def kept(held_out: dict[int, float | None], config: CheckpointConfig) -> set[int]:
    """Which checkpoints stay, of those there are with their held-out losses."""
    newest = sorted(held_out)[-max(config.keep, 1) :]
    every = [s for s in held_out if config.keep_every and s % config.keep_every == 0]
    by_loss = sorted((loss, s) for s, loss in held_out.items() if loss is not None)
    best = [s for _, s in by_loss[: config.keep_best]]
    return {*newest, *every, *best}


def _of_first(text: str) -> str:
    """Process 0's ASCII text of any length."""
    size = int(distributed.of_first(lambda: str(len(text))))
    parts = [slice(i, i + 2000) for i in range(0, size, 2000)]
    return "".join(distributed.of_first(partial(text.__getitem__, part)) for part in parts)
