"""Checkpoints: checkpoint N holds the state after N steps, each of one batch."""

import json
import math
import threading
from typing import Any, TypeVar

from etils import epath

from ngpt_jax.checkpoint import saving
from ngpt_jax.checkpoint.folder import CheckpointFolder
from ngpt_jax.checkpoint.restoring import restore
from ngpt_jax.config import CheckpointConfig, ConfigError
from ngpt_jax.errors import tell
from ngpt_jax.parallel import distributed

State = TypeVar("State", bound=Any)  # a NamedTuple of trees with the field step


class SaveError(RuntimeError):
    """A save failed; one line says which and why, what is left, and the mend."""


class Checkpoints:
    """A run's checkpoints, saved in the background; all processes call the same methods.

    A checkpoint is committed after its checksums are written. The ``keep`` newest stay, those of
    multiples of ``keep_every``, and the ``keep_best`` of the lowest held-out losses.
    """

    def __init__(self, workdir: epath.PathLike, config: CheckpointConfig):
        """Opens the folder; see :meth:`CheckpointFolder.repair` for what it does, and errors."""
        self._config, self._folder = config, CheckpointFolder(workdir)
        found = distributed.first_then_rest(  # process 0 reads all files, which may take long
            lambda: self._folder.repair() if distributed.is_first() else {}, ConfigError
        )
        # The held-out loss, or None, of each checkpoint, with the one that is being saved.
        text = distributed.of_first(lambda: json.dumps(list(found.items())))
        self._held_out: dict[int, float | None] = dict(json.loads(text))
        self._save: saving.Save | None = None  # until it is whole, or its error was raised
        self._lock = threading.Condition()
        self._error: SaveError | None = None
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
        """Starts a save, once the one before has ended; of a saved step only the loss is noted.

        The arrays are copied to the host before this returns, so the next step may donate them.

        Args:
          state: a NamedTuple of trees with the field step.
          progress: JSON-able facts on where the run is.
          held_out: the loss by which the checkpoint may be among the best, where it is known.

        Raises:
          SaveError: the save before failed (this one is started nevertheless); or there is no
            room for this one, and nothing was written.
        """
        earlier = self._finish()
        step, text, tree = int(state.step), json.dumps(progress), state._asdict()
        loss = held_out if held_out is not None and math.isfinite(held_out) else None
        if step in self._held_out:
            if loss not in (None, self._held_out[step]):  # evaluated (anew) since it was saved
                self._held_out[step] = loss
                if problem := distributed.of_first(lambda: self._note(step, loss)):
                    raise self._failed(step, problem) from earlier
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
        """Why a save cannot succeed, or nothing."""
        try:
            return saving.prepare(self._folder, step, tree)
        except Exception as e:
            return saving.why(e)

    def _note(self, step: int, loss: float) -> str:
        """Why the loss of a saved step cannot be noted, or nothing."""
        try:
            self._folder.set_held_out(step, loss)
            return ""
        except Exception as e:
            return saving.why(e)

    def _done(self, save: saving.Save) -> None:
        """On the thread of a save, at its end: removes what is no longer to be kept."""
        if save.problem:
            self._agree_when_to_raise(save)
            return
        with self._lock:
            doomed = sorted(set(self._held_out) - kept(self._held_out, self._config))
            for step in doomed:
                del self._held_out[step]
        for step in doomed if distributed.is_first() else ():
            try:
                self._folder.remove(step)
            except Exception as e:
                why = f"no longer needed, cannot be removed: {saving.why(e)}"
                tell(f"warning: checkpoint {step}, {why}")
        with self._lock:
            self._save = None

    def _agree_when_to_raise(self, save: saving.Save) -> None:
        """Chooses the call of :meth:`check_for_errors` that raises the error of a failed save.

        The processes hear of a failed save at different moments, in their background threads, but
        have to raise at the same step. So they tell each other how often each has called
        check_for_errors, and all raise at the call after the largest of these numbers. From here
        until that is known, a call waits: none can pass the one that raises.
        """
        error = self._failed(save.step, save.problem)
        with self._lock:
            self._error, calls = error, self._calls
        try:
            most = max(map(int, saving.share(f"{save.key}/calls", str(calls))))
        except Exception:  # the other processes are gone
            most = calls
        with self._lock:
            self._raise_at = most + 1
            self._lock.notify_all()

    def _failed(self, step: int, problem: str) -> SaveError:
        latest = self.latest_step()
        mend = f"see that {self._folder.path} can be written"
        if "space" in problem or "quota" in problem:
            mend = f"make room in {self._folder.path}, or lower checkpoint.keep"
        return SaveError(
            f"Checkpoint {step} could not be saved ({problem}); the last whole one is"
            f" {'none' if latest is None else latest}; {mend}."
        )

    def check_for_errors(self) -> None:
        """Raises SaveError where a save has failed since; all processes at the same call."""
        with self._lock:
            self._calls += 1
            self._lock.wait_for(lambda: self._error is None or self._raise_at is not None)
            if self._raise_at is None or self._calls < self._raise_at:
                return
        if (error := self._take_error()) is not None:
            raise error

    def _finish(self) -> SaveError | None:
        """Waits for the save under way, and returns its error."""
        with self._lock:
            save = self._save
        if save is None:
            return None
        save.join()
        return self._take_error()

    def _take_error(self) -> SaveError | None:
        """The error of the save that failed, which is forgotten with it."""
        with self._lock:
            error, save = self._error, self._save
            self._error = self._raise_at = self._save = None
            if save is not None:
                del self._held_out[save.step]
        return error

    def restore(self, like: State) -> tuple[State, dict[str, Any]]:
        """The newest checkpoint in the shapes, dtypes and shardings of ``like``.

        Args:
          like: a TrainState of ShapeDtypeStructs with shardings, see :func:`restoring.restore`.

        Returns:
          The state, whose buffers can be donated, and progress.

        Raises:
          ConfigError: the checkpoint holds another state, or cannot be read.
        """
        step = self.latest_step()
        assert step is not None
        where = (
            f"--workdir={self._folder.workdir}: checkpoint {step} is of another model or optimizer"
        )
        state, progress = restore(
            self._folder.checkpoint(step), like._asdict(), where, "choose another --workdir"
        )
        return like._replace(**state), progress

    def close(self) -> None:
        """Waits for the last save, and raises SaveError where it failed."""
        if (error := self._finish()) is not None:
            raise error


def kept(held_out: dict[int, float | None], config: CheckpointConfig) -> set[int]:
    """Which checkpoints stay, of those there are with their held-out losses."""
    newest = sorted(held_out)[-max(config.keep, 1) :]
    every = [s for s in held_out if config.keep_every and s % config.keep_every == 0]
    by_loss = sorted((loss, s) for s, loss in held_out.items() if loss is not None)
    best = [s for _, s in by_loss[: config.keep_best]]
    return {*newest, *every, *best}
