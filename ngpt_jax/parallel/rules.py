"""Which mesh axes shard which named axis: one table for parameters, one for activations.

The mesh has four axes: ``data`` (replicas of the model), ``fsdp`` (shards parameters, which are
gathered where they are used), ``tensor`` (shards heads and hidden units) and ``context`` (shards
positions). ``embed`` of a parameter is never sharded: each unit vector lies whole on one device, so
the projection onto the sphere needs no communication.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ngpt_jax.config import ConfigError

MESH_AXES = ("data", "fsdp", "tensor", "context")

Rules = Mapping[str, tuple[str, ...]]

PARAMETERS: Rules = {
    "layers": (),
    "embed": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),  # where it divides; else every device holds all of them
    "head_dim": ("fsdp",),
    "mlp": ("tensor", "fsdp"),
    "joined": (),  # several matrices in one
    "vocab": ("tensor", "fsdp"),
}

ACTIVATIONS: Rules = {
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "embed": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
}

# A parameter with a larger share of all parameters must not lie whole on every device.
UNSHARDED_SHARE = 0.02


def current_mesh() -> AbstractMesh | None:
    """The mesh set with ``jax.set_mesh``; None where there is none, or only one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def current_device() -> Any:
    """A device of the current mesh, which need not exist; without a mesh one of the process."""
    mesh = jax.sharding.get_abstract_mesh()
    return getattr(mesh, "abstract_device", None) or jax.devices()[0]


def platform_of(device: Any) -> str:
    """cpu, gpu or tpu."""
    return {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)


def platform() -> str:
    """Of the current devices: cpu, gpu or tpu."""
    return platform_of(current_device())


def axis_size(mesh: Mesh | AbstractMesh | None, *names: str) -> int:
    """Devices along mesh axes; 1 for axes that the mesh does not have."""
    return math.prod(mesh.shape.get(name, 1) for name in names) if mesh is not None else 1


def param_spec(
    axes: Sequence[str],
    sizes: Mapping[str, int],
    mesh: Mesh | AbstractMesh,
    rules: Rules = PARAMETERS,
    name: str = "a parameter",
) -> PartitionSpec:
    """How a parameter with the named ``axes`` is sharded.

    Args:
      axes: names of its axes.
      sizes: of the named axes.
      mesh: of the devices.
      rules: mesh axes of each named axis.
      name: of the parameter, for messages.

    Raises:
      ConfigError: a mesh axis would shard two axes of the parameter, or does not divide one.
    """
    entries: list[list[str]] = []
    used: dict[str, str] = {}
    for axis in axes:
        cut = [m for m in rules[axis] if axis_size(mesh, m) > 1]
        if axis == "kv_heads" and sizes[axis] % axis_size(mesh, *cut):
            cut = []
        for m in cut:
            if m in used:
                raise ConfigError(
                    f"Mesh axis {m} would shard both {used[m]} and {axis} of {name}; change the"
                    " rules so that each mesh axis is used once."
                )
            used[m] = axis
        if sizes[axis] % axis_size(mesh, *cut):
            product = " * ".join(f"mesh.{m}" for m in cut)
            raise ConfigError(
                f"{product} = {axis_size(mesh, *cut)} does not divide {axis} = {sizes[axis]} of"
                f" {name}; {_mend(axis, sizes[axis], cut, mesh)}."
            )
        entries.append(cut)
    return PartitionSpec(*map(tuple, entries))


def _mend(axis: str, size: int, cut: Sequence[str], mesh: Mesh | AbstractMesh) -> str:
    if axis == "vocab":
        return f"set model.vocab_multiple to a multiple of {axis_size(mesh, *cut)}"
    left = size
    for m in cut:
        n = axis_size(mesh, m)
        if left % n:
            break
        left //= n
    rest = "data" if m == "fsdp" else "fsdp"
    return f"try mesh.{m}={math.gcd(left, n)} and mesh.{rest}=-1"


def check_sharded_enough(
    specs: Mapping[str, PartitionSpec], elements: Mapping[str, int], mesh: Mesh | AbstractMesh
) -> None:
    """Refuses a mesh whose fsdp and tensor axes leave a large parameter whole on every device."""
    if axis_size(mesh, "fsdp", "tensor") == 1:
        return
    total = sum(elements.values())
    for name, spec in specs.items():
        share = elements[name] / total
        if share > UNSHARDED_SHARE and all(entry is None for entry in spec):
            raise ConfigError(
                f"{name} ({share:.0%} of the parameters) would lie whole on each of the"
                f" {mesh.size} devices: mesh.tensor = {axis_size(mesh, 'tensor')} divides none of"
                " its axes; use mesh.fsdp, or change model.kv_heads."
            )


def activation_spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """How an activation is sharded; an axis that the mesh does not divide stays whole.

    So a batch of one sequence works. Training batches are checked at the start.
    """
    entries: list[list[str]] = []
    for axis, size in zip(axes, shape, strict=True):
        cut: list[str] = []
        for m in ACTIVATIONS[axis] if axis is not None else ():
            n = axis_size(mesh, m)
            if n > 1 and size % (axis_size(mesh, *cut) * n) == 0:
                cut.append(m)
        entries.append(cut)
    return PartitionSpec(*map(tuple, entries))


def spec_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes that a spec uses."""
    names: list[str] = []
    for entry in spec:
        names += [] if entry is None else [entry] if isinstance(entry, str) else list(entry)
    return tuple(names)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Shards an activation with the named axes over the current mesh."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(axes, x.shape, mesh))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(w: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """A parameter as it is used: gathered over ``fsdp``, still sharded over ``tensor``.

    Its gradient is summed and scattered into the parameter's own shards in one go, not summed on
    every device.
    """
    return lay_out(w, axes, without="fsdp")


def lay_out(w: jax.Array, axes: tuple[str, ...], without: str | None = None) -> jax.Array:
    """Shards an array over the current mesh as a parameter with the named axes.

    Args:
      w: the array.
      axes: names of its axes.
      without: a mesh axis that does not count.
    """
    mesh = current_mesh()
    if mesh is None:
        return w
    rules = {axis: tuple(m for m in cut if m != without) for axis, cut in PARAMETERS.items()}
    spec = param_spec(axes, dict(zip(axes, w.shape)), mesh, rules)
    return jax.lax.with_sharding_constraint(w, spec)


def _gather_fwd(w, axes):
    return gather(w, axes), None


def _gather_bwd(axes, _, grad):
    return (lay_out(grad, axes),)


gather.defvjp(_gather_fwd, _gather_bwd)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
