"""Reading checkpoints: a run's whole state, or its parameters alone."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from ngpt_jax.checkpoint.folder import find_checkpoint
from ngpt_jax.checkpoint.saving import why
from ngpt_jax.config import ConfigError
from ngpt_jax.parallel import distributed


def restore(
    checkpoint: epath.Path, like: dict[str, Any], where: str, mend: str, only: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a checkpoint that is known to be whole; all processes call it.

    Args:
      checkpoint: its folder.
      like: tree of ShapeDtypeStructs with shardings, which says what to read and how to lay it
        out. The mesh need not be the one that the checkpoint was written on.
      where, mend: begin and end of the message that says how checkpoint and ``like`` differ.
      only: reads the entries whose names begin so, such as "params/", and leaves the others;
        ``like`` holds these entries only.

    Returns:
      The state, made by XLA itself so that its buffers can be donated; and the progress that was
      saved with it.

    Raises:
      ConfigError: names or shapes differ, or the checkpoint cannot be read.
    """

    def read() -> Any:
        folder, handler = checkpoint / "state", ocp.PyTreeCheckpointHandler()
        try:
            saved = _shapes(handler.metadata(folder).tree)
            if not only and all(name.startswith(("params/", "step")) for name in saved):
                raise ConfigError(
                    f"{where}: it holds weights alone, without an optimizer's state; start a run"
                    " from them with --config.init_from."
                )
            saved = {name: shape for name, shape in saved.items() if name.startswith(only)}
            if difference := _difference(saved, _shapes(like), only):
                raise ConfigError(f"{where}: {difference}; {mend}.")
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


def _difference(saved: dict[str, Any], wanted: dict[str, Any], prefix: str) -> str:
    """The first entry, without its prefix, whose shapes differ, or nothing; parameters first."""
    for name in sorted([*wanted, *saved], key=lambda name: not name.startswith("params")):
        a, b, short = saved.get(name), wanted.get(name), name.removeprefix(prefix)
        if a is None:
            return f"it has no {short}, which is {b} here"
        if b is None:
            return f"its {short}, which is {a}, is not in this one"
        if a != b:
            return f"its {short} is {a}, not {b}"
    return ""


def restore_params(path: epath.PathLike, like_params: Any) -> tuple[Any, dict[str, Any]]:
    """The parameters of another run, for ``init_from``; the optimizer's moments are not read.

    Args:
      path: the run's folder, whose newest checkpoint is read, or one of its checkpoints.
      like_params: tree of ShapeDtypeStructs with shardings.

    Returns:
      The parameters, laid out like that, and the progress of that run.

    Raises:
      ConfigError: nothing is there, it is damaged, or it is of another model.
    """
    # Process 0 alone reads all files to verify them, which may take long.
    found = distributed.first_then_rest(
        lambda: str(find_checkpoint("config.init_from", path)) if distributed.is_first() else "",
        ConfigError,
    )
    checkpoint = epath.Path(distributed.of_first(lambda: found))
    where = f"--config.init_from={path} holds another model"
    mend = "set model.* as that run did"
    state, progress = restore(checkpoint, {"params": like_params}, where, mend, only="params/")
    return state["params"], progress
