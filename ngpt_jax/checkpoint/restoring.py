"""Reading checkpoints: a run's own state, or the parameters that another run starts from."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from ngpt_jax.checkpoint import checksums
from ngpt_jax.checkpoint.folder import CheckpointFolder, absolute
from ngpt_jax.checkpoint.saving import why
from ngpt_jax.config import ConfigError
from ngpt_jax.parallel import distributed


def restore(
    checkpoint: epath.Path, like: dict[str, Any], tell: Callable[[str], str], only: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a checkpoint that is known to be whole; all processes call it.

    Args:
      like: a tree of ShapeDtypeStructs with shardings: of this mesh, whichever one the checkpoint
        was written on.
      tell: makes the message of the clause that names the first difference.
      only: the one entry of the state to read, which is then that of like; all where empty.

    Returns:
      The state, laid out by XLA itself so that its buffers can be donated, and progress.

    Raises:
      ConfigError: names or shapes differ, or it cannot be read.
    """

    def read() -> Any:
        folder, handler = checkpoint / "state", ocp.PyTreeCheckpointHandler()
        try:
            there, here = _shapes(handler.metadata(folder).tree), _shapes(like)
            there = {name: s for name, s in there.items() if name.startswith(only)}
            if not only and all(name.startswith(("params/", "step")) for name in there):
                raise ConfigError(
                    tell("it holds weights alone; start a run from them with --config.init_from")
                )
            if difference := _difference(there, here, only):
                raise ConfigError(tell(difference))
            arguments = ocp.args.PyTreeRestore(
                like,
                restore_args=ocp.checkpoint_utils.construct_restore_args(like),
                partial_restore=bool(only),
            )
            progress = json.loads((checkpoint / "progress" / "metadata").read_text())
            return handler.restore(folder, args=arguments), progress
        except ConfigError:
            raise
        except Exception as e:  # of TensorStore, orbax and the storage
            raise ConfigError(f"{checkpoint} cannot be read: {why(e)}.") from e

    state, progress = distributed.together(read, ConfigError)
    return jax.tree.map(_lay_out, state, like), progress


def _lay_out(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """A copy that XLA made; one at a time, as there is room for little more than one state."""
    y = jax.jit(jnp.copy, out_shardings=like.sharding)(x).block_until_ready()
    x.delete()
    return y


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in ocp.tree.to_flat_dict(tree, sep="/").items()}


def _difference(there: dict[str, Any], here: dict[str, Any], prefix: str) -> str:
    """The first name, without its prefix, of another shape there than here; parameters first."""
    for name in sorted([*here, *there], key=lambda name: not name.startswith("params")):
        a, b, name_ = there.get(name), here.get(name), name.removeprefix(prefix)
        if a is None:
            return f"it has no {name_}, which is {b} here"
        if b is None:
            return f"its {name_}, which is {a}, is not in this one"
        if a != b:
            return f"its {name_} is {a}, not {b}"
    return ""


def restore_params(path: epath.PathLike, like_params: Any) -> tuple[Any, dict[str, Any]]:
    """The parameters of another run, for ``init_from``; its moments are not read.

    Args:
      path: the run's folder, of which the newest checkpoint is read, or one of its checkpoints.
      like_params: a tree of ShapeDtypeStructs with shardings.

    Returns:
      The parameters, laid out like that, and the progress of that run.

    Raises:
      ConfigError: nothing is there, it is damaged, or of another model.
    """
    name = f"--config.init_from={path}"
    found = distributed.first_then_rest(
        lambda: str(_find(name, absolute(path))) if distributed.is_first() else "",
        ConfigError,
    )
    checkpoint = epath.Path(distributed.of_first(lambda: found))

    def tell(difference: str) -> str:
        return f"{name} holds another model: {difference}; set model.* as that run did."

    like = {"params": like_params}
    state, progress = restore(checkpoint, like, tell, only="params/")
    return state["params"], progress


def _find(name: str, path: epath.Path) -> epath.Path:
    """The checkpoint that a path names, whole."""
    try:
        if not path.exists():
            raise ConfigError(f"{name}: no such folder; give a run's folder or a checkpoint in it.")
        if (path / "checkpoints").is_dir():
            folder = CheckpointFolder(path)
            if not (steps := folder.steps()):
                raise ConfigError(f"{name} holds no checkpoint yet; give another run's folder.")
            checkpoint = folder.checkpoint(steps[-1])
        elif path.name.isdecimal() and path.is_dir():
            checkpoint, steps = path, []
        else:
            raise ConfigError(
                f"{name} is neither a run's folder (with checkpoints/ in it) nor one of its"
                " checkpoints (checkpoints/N); give one of them."
            )
        checksums.verify(checkpoint)
        return checkpoint
    except checksums.Damaged as e:
        other = f"give {steps[-2]}, the one before" if len(steps) > 1 else "give another one"
        raise ConfigError(f"{name}: {checkpoint} is damaged ({e}); {other}.") from e
    except OSError as e:
        raise ConfigError(f"{name} cannot be read: {e.strerror or e}.") from e
