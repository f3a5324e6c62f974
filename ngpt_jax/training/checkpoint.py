"""Checkpoints with orbax: checkpoint N holds the state after N steps, each of one batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from ngpt_jax.config import CheckpointConfig
from ngpt_jax.training.step import TrainState


class Checkpoints:
    """Saves in the background; errors of a save surface at the next call."""

    def __init__(self, workdir: Path, config: CheckpointConfig):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep, enable_async_checkpointing=True, create=True
        )
        self._progress: dict[str, Any] | None = None  # as last saved or restored
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            options=options,
            item_names=("state", "progress"),
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, progress: dict[str, Any]) -> None:
        """Starts a save of the state and of JSON-able facts on where the run is.

        The arrays are copied to the host before this returns, so the next step may donate them.
        """
        step = int(state.step)
        self._manager.check_for_errors()
        if step in self._manager.all_steps():
            if progress == self._progress:
                return
            # The same state, evaluated since: it replaces the one that says that it was not.
            self._manager.wait_until_finished()
            self._manager.delete(step)
        self._progress = copy.deepcopy(progress)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()),
                # A copy: it is written while the run goes on changing its own.
                progress=ocp.args.JsonSave(self._progress),
            ),
            force=True,
        )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint in the shapes, dtypes and shardings of ``like``.

        Args:
          like: a TrainState of ShapeDtypeStructs with shardings: of this mesh, whichever one
            the checkpoint was written on.

        Returns:
          The state, laid out by XLA itself so that its buffers can be donated, and progress.
        """
        abstract = like._asdict()
        restored = self._manager.restore(
            self._manager.latest_step(),
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()
            ),
        )
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        copy_all = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)
        state = copy_all(restored["state"])
        self._progress = copy.deepcopy(restored["progress"])
        return TrainState(**state), restored["progress"]

    def check_for_errors(self) -> None:
        self._manager.check_for_errors()

    def close(self) -> None:
        """Waits for the last save."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        self._manager.close()
