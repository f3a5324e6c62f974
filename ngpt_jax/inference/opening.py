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
from ngpt_jax.files import reason
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
    where, saved = f"--{flag}={path}", workdir / "config.json"
    if not workdir.exists():
        raise ConfigError(f"{where}: no such folder; give the --workdir of a training run.")
    if not (saved.exists() and (workdir / "checkpoints").is_dir()):
        raise ConfigError(
            f"{where} is not the folder of a training run: config.json and checkpoints/ must be in"
            " it."
        )
    try:
        config = config_lib.from_saved(saved.read_text())
    except OSError as e:
        raise ConfigError(f"{where} cannot be read: {reason(e)}.") from e
    except (ValueError, AttributeError, TypeError, RecursionError) as e:
        raise ConfigError(f"{saved} cannot be read ({e}).") from e
    # Devices and kernel are those of this machine, not of the one that trained.
    model = dataclasses.replace(config.model, attention="auto")
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
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{workdir} is there already, and not empty; choose another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        progress = {
            "position": 0, "losses": [], "seconds": 0.0, "data": None, "tokenizer": tokenizer,
            "config": dataclasses.asdict(config), "versions": workdir_lib.versions(),
        }  # fmt: skip
        checkpoints = Checkpoints(folder, CheckpointConfig())
        checkpoints.save(_Weights(jnp.zeros((), jnp.int32), params), progress)
        checkpoints.close()
        workdir_lib.write_start(folder, config, {"tokenizer": tokenizer})
    except SaveError as e:
        raise ConfigError(str(e)) from e
    except OSError as e:
        raise ConfigError(f"{e.filename or workdir} cannot be written: {reason(e)}.") from e
