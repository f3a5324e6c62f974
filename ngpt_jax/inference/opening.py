"""A finished (or stopped) run's folder, opened to look at it or to use its weights."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ngpt_jax import config as config_lib
from ngpt_jax.checkpoint.checkpoints import Checkpoints, SaveError
from ngpt_jax.checkpoint.folder import find_checkpoint
from ngpt_jax.checkpoint.restoring import restore
from ngpt_jax.config import CheckpointConfig, Config, ConfigError, MeshConfig, experiment
from ngpt_jax.data.tokenizers.base import Tokenizer, check_tokenizer
from ngpt_jax.data.tokenizers.load import with_tokenizer
from ngpt_jax.files import writing
from ngpt_jax.parallel.backend import enable_x64_if_used
from ngpt_jax.parallel.mesh import device_mesh
from ngpt_jax.training import layout
from ngpt_jax.training import workdir as workdir_lib


def read_config(flag: str, path: str, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """The config of a run's folder, for one device here.

    Args:
      flag: that named the folder.
      path: the folder.
      overrides: (dotted name, text), where text and tokenizer lie here, say.

    Raises ConfigError.
    """
    workdir = workdir_lib.open_workdir(path)
    where = f"--{flag}={path}"
    if not workdir.exists():
        raise ConfigError(f"{where}: no such folder; give the --workdir of a training run.")
    if not ((workdir / "config.json").exists() and (workdir / "checkpoints").is_dir()):
        raise ConfigError(
            f"{where} is not the folder of a training run: config.json and checkpoints/ must be in"
            " it."
        )
    config = workdir_lib.read_config(where, workdir)
    # Devices and kernel are those of this machine, not of the one that trained.
    model = dataclasses.replace(config.model, attention="auto")
    config = dataclasses.replace(config, model=model, mesh=MeshConfig())
    return experiment.load_config(config_lib.to_config_dict(config), overrides)


class OpenedRun(NamedTuple):
    """A checkpoint's weights; ``config`` is resolved, with the vocabulary filled in."""

    config: Config
    tokenizer: Tokenizer
    params: Any
    mesh: Mesh
    step: int


def open_run(
    flag: str, path: str, step: int | None, overrides: Sequence[tuple[str, str]]
) -> OpenedRun:
    """The weights of a run's folder, or of one that :func:`write_weights` made.

    Args:
      flag: that named the folder.
      path: the folder.
      step: of the checkpoint; None: the newest.
      overrides: (dotted name, text): where the tokenizer lies here, say. One device is used where
        none of mesh.* is among them.

    Raises ConfigError.
    """
    config = read_config(flag, path, overrides)
    checkpoint = find_checkpoint(flag, path, step)
    config, tokenizer = with_tokenizer(config)
    enable_x64_if_used(config.model)
    several = any(name.startswith("mesh.") for name, _ in overrides)
    mesh = device_mesh(config.mesh, None if several else jax.devices()[:1])
    like = {"params": layout.abstract_params(config.model, mesh)}
    where = f"{checkpoint} is not of the model in {path}/config.json"
    mend = "put the config.json of its run there"
    state, progress = restore(checkpoint, like, where, mend, only="params/")
    check_tokenizer(tokenizer, progress["tokenizer"], f"--{flag}={path}")
    return OpenedRun(config, tokenizer, state["params"], mesh, int(checkpoint.name))


class _Weights(NamedTuple):
    """The state of a folder that holds weights alone."""

    step: jax.Array
    params: Any


def write_weights(workdir: str, config: Config, params: Any, tokenizer: str) -> None:
    """Makes a folder like a run's, with weights that were trained elsewhere as checkpoint 0.

    It can be opened, and a run can start from it (``init_from``). A run cannot go on in it, as the
    optimizer's moments are missing.

    Args:
      workdir: new, or empty.
      config: resolved.
      params: the parameters.
      tokenizer: fingerprint of the one that the weights were trained with.

    Raises ConfigError.
    """
    folder = workdir_lib.open_workdir(workdir)
    with writing(workdir):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{workdir} is there already, and not empty; choose another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        progress = {
            "position": 0, "losses": [], "seconds": 0.0, "data": None, "tokenizer": tokenizer,
            "config": dataclasses.asdict(config), "versions": workdir_lib.versions(),
        }  # fmt: skip
        try:
            checkpoints = Checkpoints(folder, CheckpointConfig())
            checkpoints.save(_Weights(jnp.zeros((), jnp.int32), params), progress)
            checkpoints.close()
        except SaveError as e:
            raise ConfigError(str(e)) from e
        workdir_lib.write_start(folder, config, {"tokenizer": tokenizer})
