"""Checkpoints on disk: where they lie, how one is found, and how a folder is repaired."""

import math
import os
import shutil
from typing import Any

from etils import epath
from orbax.checkpoint.path import atomicity, atomicity_defaults

from ngpt_jax.checkpoint import checksums
from ngpt_jax.checkpoint.checksums import DamagedCheckpoint
from ngpt_jax.config import ConfigError
from ngpt_jax.errors import tell
from ngpt_jax.files import is_remote, reading, reason


class CheckpointFolder:
    """WORKDIR/checkpoints, where N/ is checkpoint N. Methods that write are for process 0 only.

    One rename makes a checkpoint, and one rename begins its removal. Storage without an atomic
    rename (gs://) marks a checkpoint by a file instead, orbax's commit_success.txt.
    """

    def __init__(self, workdir: epath.PathLike):
        self.workdir = absolute(workdir)
        self.path = self.workdir / "checkpoints"
        self.damaged = self.workdir / "damaged"
        self._temporary: Any = atomicity_defaults.get_default_temporary_path_class(self.path)
        self._commit_file = issubclass(self._temporary, atomicity.CommitFileTemporaryPath)

    def checkpoint(self, step: int) -> epath.Path:
        """The folder of checkpoint ``step``."""
        return self.path / str(step)

    def temporary(self, step: int) -> atomicity.TemporaryPathBase:
        """The folder in which checkpoint ``step`` is written; its finalize() commits it."""
        return self._temporary.from_final(self.checkpoint(step))

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, in rising order; some may be damaged."""
        return sorted(int(p.name) for p in self._numbered() if self._committed(p))

    def _numbered(self) -> list[epath.Path]:
        names = [p for p in self.path.iterdir() if p.name.isdecimal() and p.is_dir()]
        return [p for p in names if str(int(p.name)) == p.name]

    def _committed(self, path: epath.Path) -> bool:
        return not self._commit_file or (path / atomicity.COMMIT_SUCCESS_FILE).exists()

    def remove_leftovers(self) -> None:
        """Removes what a killed save or a killed removal has left."""
        unfinished = [p for p in self._numbered() if not self._committed(p)]
        temporary = [p for p in self.path.iterdir() if atomicity.TMP_DIR_SUFFIX in p.name]
        for path in unfinished + temporary:
            path.rmtree()

    def remove(self, step: int) -> None:
        """Removes a checkpoint; a half removed one is not seen as a checkpoint."""
        path = self.checkpoint(step)
        if self._commit_file:
            (path / atomicity.COMMIT_SUCCESS_FILE).unlink(missing_ok=True)
        else:
            path = path.rename(self.path / f"{step}{atomicity.TMP_DIR_SUFFIX}.removed")
        path.rmtree()

    def free_bytes(self) -> float:
        """Room on the disk; infinite on remote storage."""
        return math.inf if is_remote(self.path) else shutil.disk_usage(os.fspath(self.path)).free

    def _held_out(self, step: int) -> float | None:
        try:
            return checksums.read(self.checkpoint(step)).get("held_out")
        except DamagedCheckpoint:  # told, and set aside, when it is needed
            return None

    def set_held_out(self, step: int, loss: float) -> None:
        """Adds the held-out loss to a checkpoint that was saved before its evaluation."""
        checksums.change(self.checkpoint(step), held_out=loss)

    def repair(self) -> dict[int, float | None]:
        """Makes the folder, where it is missing, and sees that its newest checkpoint is whole.

        Leftovers are removed. Damaged checkpoints newer than the newest whole one are moved to
        WORKDIR/damaged, each with a warning.

        Returns:
          The held-out loss, None where it is not known, of each checkpoint by its step.

        Raises:
          ConfigError: all are damaged, or the folder cannot be read or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.remove_leftovers()
            steps, warnings = self.steps(), []
            while steps:
                try:
                    checksums.verify(self.checkpoint(steps[-1]))
                    break
                except DamagedCheckpoint as e:
                    step = steps.pop()
                    aside = self._set_aside(step)
                    warnings.append(f"checkpoint {step} is damaged ({e}); set aside in {aside}")
            for warning in warnings:
                tell("warning: " + warning + (f", going on from {steps[-1]}" if steps else ""))
            if not steps and self.damaged.exists() and any(self.damaged.iterdir()):
                raise ConfigError(
                    f"--workdir={self.workdir} holds damaged checkpoints only (in {self.damaged});"
                    " delete the folder to train anew, or choose another --workdir."
                )
            return {step: self._held_out(step) for step in steps}
        except OSError as e:
            raise ConfigError(
                f"{e.filename or self.path} cannot be read or written: {reason(e)}."
            ) from e

    def _set_aside(self, step: int) -> epath.Path:
        self.damaged.mkdir(parents=True, exist_ok=True)
        target, again = self.damaged / str(step), 2
        while target.exists():
            target, again = self.damaged / f"{step}-{again}", again + 1
        return self.checkpoint(step).rename(target)


def find_checkpoint(flag: str, path: epath.PathLike, step: int | None = None) -> epath.Path:
    """The folder of a checkpoint, after all of its files were read and found whole.

    Args:
      flag: the flag that named the path, for messages.
      path: a run's folder, or one of its checkpoints.
      step: which checkpoint of a run's folder; None: the newest.

    Raises:
      ConfigError: there is none, or it is damaged.
    """
    where, path = f"--{flag}={path}", absolute(path)
    with reading(where):
        if not path.exists():
            raise ConfigError(
                f"{where}: no such folder; give a run's folder or a checkpoint in it."
            )
        if (path / "checkpoints").is_dir():
            folder = CheckpointFolder(path)
            steps = folder.steps()
            if not steps:
                raise ConfigError(f"{where} holds no checkpoint yet; give another run's folder.")
            step = steps[-1] if step is None else step
            if step not in steps:
                raise ConfigError(
                    f"--step={step}: {where} has no such checkpoint; there are"
                    f" {', '.join(map(str, steps))}."
                )
            checkpoint, earlier = folder.checkpoint(step), [s for s in steps if s < step]
        elif path.name.isdecimal() and path.is_dir():
            checkpoint, earlier = path, []
        else:
            raise ConfigError(
                f"{where} is neither a run's folder (with checkpoints/ in it) nor one of its"
                " checkpoints (checkpoints/N); give one of them."
            )
        try:
            checksums.verify(checkpoint)
        except DamagedCheckpoint as e:
            other = f"checkpoint {earlier[-1]}, the one before it" if earlier else "another one"
            raise ConfigError(f"{where}: {checkpoint} is damaged ({e}); give {other}.") from e
    return checkpoint


def absolute(path: epath.PathLike) -> epath.Path:
    """The path without ~, and absolute where it is local."""
    path = epath.Path(path).expanduser()
    return path if is_remote(path) else path.absolute()
