"""The device mesh, and which rows of a batch go to which process."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from ngpt_jax.config import Config, ConfigError
from ngpt_jax.config.fields import MeshConfig
from ngpt_jax.parallel.rules import MESH_AXES, activation_spec, axis_size


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Sizes of the mesh axes, -1 filled in so that all devices are used."""
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    known = math.prod(s for s in sizes if s != -1)
    told = " x ".join(f"{axis} {s}" for axis, s in zip(MESH_AXES, sizes) if s not in (1, -1))
    if -1 in sizes:
        if devices % known:
            raise ConfigError(
                f"The mesh ({told}) does not divide the {devices} devices; make the product of"
                f" mesh.{', mesh.'.join(MESH_AXES)} a divisor of {devices}."
            )
        return tuple(devices // known if s == -1 else s for s in sizes)
    if known != devices:
        raise ConfigError(
            f"The mesh ({told or 'one device'}) needs {known} devices, but there are {devices};"
            " set one of mesh.data, mesh.fsdp, mesh.tensor, mesh.context to -1 (the rest)."
        )
    return tuple(sizes)


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run, see :func:`device_mesh`; raises ConfigError where it does not divide the
    training batch.

    Args:
      config: resolved.
      devices: all of them by default.
    """
    mesh = device_mesh(config.mesh, devices)
    _check_rows("train.batch_size", config.train.batch_size, mesh, config.train.accumulate)
    if config.model.context % axis_size(mesh, "context"):
        raise ConfigError(
            f"model.context = {config.model.context} is not divisible by mesh.context ="
            f" {axis_size(mesh, 'context')}."
        )
    return mesh


def device_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp, tensor, context, all Auto.

    Args:
      config: sizes of the axes.
      devices: all of them by default. Those of several TPU slices get a hybrid mesh, with
        ``data`` across the slices, where the network is slow.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(config, len(devices))
    tpu = devices[0].platform == "tpu"
    slices = len({getattr(d, "slice_index", 0) for d in devices}) if tpu else 1
    if shape[0] % slices:
        raise ConfigError(
            f"mesh.data = {shape[0]} must be a multiple of the {slices} TPU slices: replicas"
            f" are what lies across slices. Try mesh.data={slices}."
        )
    if slices > 1:
        inside, across = (shape[0] // slices, *shape[1:]), (slices, 1, 1, 1)
        array = mesh_utils.create_hybrid_device_mesh(
            inside, across, devices, allow_split_physical_axes=True
        )
    else:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=tpu)
    return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _check_rows(field: str, rows: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Refuses a batch whose rows the mesh cannot cut evenly."""
    ways = axis_size(mesh, "data", "fsdp")
    wanted = ways * microbatches
    if rows % wanted:
        parts = f" in {microbatches} microbatches" if microbatches > 1 else ""
        raise ConfigError(
            f"{field} = {rows} is not divisible by the {ways} devices of mesh.data *"
            f" mesh.fsdp{parts}; the next that is: {-(-rows // wanted) * wanted}."
        )


def check_eval_batch(batch_size: int | None, mesh: Mesh) -> None:
    """Refuses an ``eval.batch_size`` whose rows the mesh cannot cut evenly."""
    if batch_size is not None:
        _check_rows("eval.batch_size", batch_size, mesh)


class BatchPlacer:
    """Moves batches of one shape to the devices of a mesh; each process gives some of the rows.

    Which rows follows from the batch's sharding, not from the number of the process: where a
    ``tensor`` or ``context`` axis lies across processes, several need the same rows.

    Attributes:
      sharding: of every array of a batch, (batch, length).
      rows: the rows that this process gives, ascending.
    """

    def __init__(self, mesh: Mesh, batch_size: int, context: int):
        self.shape = (batch_size, context)
        spec = activation_spec(("batch", "length"), self.shape, mesh)
        self.sharding = NamedSharding(mesh, spec)
        indices = self.sharding.addressable_devices_indices_map(self.shape).values()
        needed = {tuple(index[0].indices(batch_size)) for index in indices if index is not None}
        self.rows = np.unique(np.concatenate([np.arange(*piece) for piece in needed]))

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Global arrays from this process's rows of them, each (len(rows), length)."""
        return {name: self._place(rows) for name, rows in batch.items()}

    def _place(self, local: np.ndarray) -> jax.Array:
        def piece(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(self.shape[0])
            first = int(np.searchsorted(self.rows, start))
            return local[first : first + stop - start, index[1]]

        return jax.make_array_from_callback(self.shape, self.sharding, piece)
