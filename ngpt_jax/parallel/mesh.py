"""The device mesh: every device holds the model, the batch is cut along its first axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ngpt_jax.config import Config, ConfigError


def make_mesh(config: Config) -> Mesh:
    """A mesh of all devices with one axis, ``data``; checks that the batches divide by it."""
    devices = jax.device_count()
    for name, size in (("train", config.train.batch_size), ("eval", config.eval.batch_size)):
        if size is not None and size % devices:
            raise ConfigError(
                f"{name}.batch_size = {size} is not divisible by the {devices} devices;"
                f" the next that is: {-(-size // devices) * devices}."
            )
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_putter(mesh: Mesh) -> Callable[[Any], Any]:
    """A function that moves a batch of numpy arrays to the devices, rows cut over ``data``."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return lambda batch: jax.device_put(batch, sharding)
