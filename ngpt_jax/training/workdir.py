"""A run's folder: whose it is, and that all processes see the same one."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import jax

from ngpt_jax import config as config_lib
from ngpt_jax.config import Config, ConfigError
from ngpt_jax.parallel import distributed
from ngpt_jax.training.metrics import write_atomically


def claim_workdir(workdir: Path, config: Config) -> None:
    """Writes config.json and versions.json; refuses a folder that holds another run's model."""
    saved = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"--workdir={workdir} is a file; give a folder.")
    if saved.exists():
        try:
            old = config_lib.from_config_dict(json.loads(saved.read_text(encoding="utf-8")))
        except ValueError as e:
            raise ConfigError(f"{saved} cannot be read ({e}); choose another --workdir.") from e
        diff = config_lib.differences(old, config)
        bound = ("model.", "optimizer.", "data.", "train.")
        free = (
            *("model.dtype", "model.scan_layers", "model.remat", "model.loss_chunk"),
            *("model.attention", "train.accumulate", "data.threads", "data.prefetch"),
        )
        if bad := [d for d in diff if d.startswith(bound) and not d.startswith(free)]:
            rest = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise ConfigError(
                f"--workdir={workdir} holds another run ({'; '.join(bad[:3])}{rest});"
                " choose another --workdir, or delete it."
            )
    elif (workdir / "checkpoints").is_dir() and any((workdir / "checkpoints").iterdir()):
        raise ConfigError(
            f"--workdir={workdir} holds checkpoints but no config.json; choose another --workdir."
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(saved, config_lib.to_json(config))
        write_atomically(workdir / "versions.json", json.dumps(_versions(), indent=2) + "\n")
    except OSError as e:
        raise ConfigError(f"--workdir={workdir} cannot be written: {e.strerror}.") from e


def check_shared(workdir: Path, patience: float = 60.0) -> None:
    """Refuses a workdir that is not the same folder for all processes.

    Args:
      workdir: claimed by process 0.
      patience: seconds until what one host wrote is seen by the others; NFS keeps old entries
        for up to a minute.
    """
    file = workdir / "versions.json"
    text = distributed.of_first(lambda: str(zlib.crc32(file.read_bytes())))

    def look() -> None:
        deadline = time.monotonic() + patience
        while not (file.exists() and str(zlib.crc32(file.read_bytes())) == text):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"--workdir={workdir} is not the folder of process 0; give one on storage"
                    " that all hosts share."
                )
            time.sleep(0.5)

    distributed.together(look, ConfigError)


def _versions() -> dict[str, Any]:
    packages = "ngpt-jax jax jaxlib flax optax orbax-checkpoint grain numpy".split()
    versions: dict[str, Any] = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(),
        "command": sys.argv,
        "python": platform.python_version(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        **versions,
    }
