"""A run's folder of checkpoints on disk: leftovers, damage and removal."""

from __future__ import annotations

import math
import os
import shutil
import sys
from typing import Any

from etils import epath
from orbax.checkpoint.path import atomicity, atomicity_defaults

from ngpt_jax.checkpoint import checksums
from ngpt_jax.checkpoint.checksums import Damaged
from ngpt_jax.config import ConfigError
from ngpt_jax.files import is_remote


class CheckpointFolder:
    """WORKDIR/checkpoints, where N/ is checkpoint N. What writes is for process 0 only.

    A checkpoint comes into being by one rename, and goes by one; where the storage has no such
    (gs://) by the writing and removal of a file, orbax's commit_success.txt.
    """

    def __init__(self, workdir: epath.PathLike):
        self.workdir = absolute(workdir)
        self.local = not is_remote(self.workdir)
        self.path = self.workdir / "checkpoints"
        self.damaged = self.workdir / "damaged"
        self._kind: Any = atomicity_defaults.get_default_temporary_path_class(self.path)
        self._commit_file = issubclass(self._kind, atomicity.CommitFileTemporaryPath)

    def checkpoint(self, step: int) -> epath.Path:
        return self.path / str(step)

    def temporary(self, step: int) -> atomicity.TemporaryPathBase:
        """Where checkpoint N is written; its finalize() makes it checkpoint N."""
        return self._kind.from_final(self.checkpoint(step))

    def steps(self) -> list[int]:
        """Checkpoints that were committed, whole or damaged since, in rising order."""
        return sorted(int(p.name) for p in self._numbered() if self._committed(p))

    def _numbered(self) -> list[epath.Path]:
        names = [p for p in self.path.iterdir() if p.name.isdecimal() and p.is_dir()]
        return [p for p in names if str(int(p.name)) == p.name]

    def _committed(self, path: epath.Path) -> bool:
        return not self._commit_file or (path / atomicity.COMMIT_SUCCESS_FILE).exists()

    def remove_leftovers(self) -> None:
        """Removes what a killed save, or a killed removal, has left."""
        unfinished = [p for p in self._numbered() if not self._committed(p)]
        temporary = [p for p in self.path.iterdir() if atomicity.TMP_DIR_SUFFIX in p.name]
        for path in unfinished + temporary:
            path.rmtree()

    def remove(self, step: int) -> None:
        """Removes a checkpoint so that it is never seen half removed."""
        path = self.checkpoint(step)
        if self._commit_file:
            (path / atomicity.COMMIT_SUCCESS_FILE).unlink(missing_ok=True)
        else:
            path = path.rename(self.path / f"{step}{atomicity.TMP_DIR_SUFFIX}.removed")
        path.rmtree()

    def free_bytes(self) -> float:
        return shutil.disk_usage(os.fspath(self.path)).free if self.local else math.inf

    def open(self) -> dict[int, float | None]:
        """Sets the folder right at the start of a run, so that its newest checkpoint is whole.

        Damaged checkpoints newer than it are moved to WORKDIR/damaged, each with a line on stderr.

        Returns:
          The held-out loss, where known, of every checkpoint.

        Raises:
          ConfigError: all are damaged, or the folder cannot be read or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.remove_leftovers()
            steps, aside = self.steps(), []
            while steps:
                try:
                    checksums.verify(self.checkpoint(steps[-1]))
                    break
                except Damaged as e:
                    moved = self._set_aside(steps[-1])
                    aside.append(f"checkpoint {steps.pop()} is damaged ({e}); set aside in {moved}")
            for line in aside:
                warn(line + (f", going on from {steps[-1]}" if steps else ""))
            if not steps and self.damaged.exists() and any(self.damaged.iterdir()):
                raise ConfigError(
                    f"--workdir={self.workdir} holds damaged checkpoints only (in {self.damaged});"
                    " delete the folder to train anew, or choose another --workdir."
                )
            return {step: self._held_out(step) for step in steps}
        except OSError as e:
            raise ConfigError(
                f"{e.filename or self.path} cannot be read or written: {e.strerror or e}."
            ) from e

    def _held_out(self, step: int) -> float | None:
        try:
            return checksums.read(self.checkpoint(step)).get("held_out")
        except Damaged:  # told, and set aside, when it is needed
            return None

    def set_held_out(self, step: int, loss: float) -> None:
        """Adds to a whole checkpoint what was measured after it was saved."""
        checksums.change(self.checkpoint(step), held_out=loss)

    def _set_aside(self, step: int) -> epath.Path:
        self.damaged.mkdir(parents=True, exist_ok=True)
        target, again = self.damaged / str(step), 2
        while target.exists():
            target, again = self.damaged / f"{step}-{again}", again + 1
        return self.checkpoint(step).rename(target)


def absolute(path: epath.PathLike) -> epath.Path:
    path = epath.Path(path).expanduser()
    return path if is_remote(path) else path.absolute()


def warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)
