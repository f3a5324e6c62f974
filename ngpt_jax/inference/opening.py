"""A finished (or stopped) run's folder, opened to look at it or to use its weights."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngpt_jax import config as config_lib
from ngpt_jax.checkpoint.checkpoints import Checkpoints, SaveError
from ngpt_jax.config import CheckpointConfig, Config, ConfigError, experiment
from ngpt_jax.config.fields import MeshConfig
from ngpt_jax.files import writing
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
    # Devices and kernels are those of this machine, not of the one that trained.
    model = dataclasses.replace(config.model, attention="auto", kernels="auto")
    config = dataclasses.replace(config, model=model, mesh=MeshConfig())
    return experiment.load_config(config_lib.to_config_dict(config), overrides)


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
