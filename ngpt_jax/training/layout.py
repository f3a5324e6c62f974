"""How a run's state and batches are sharded over the mesh, and the step lowered for it.

Training and the ahead-of-time tool get their program from the same function here.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ngpt_jax.config import Config, ModelConfig
from ngpt_jax.model.parametrization import rate_factor
from ngpt_jax.model.params import axis_sizes, param_tree
from ngpt_jax.optim.recipes import make_optimizer, rate_factors
from ngpt_jax.parallel import rules
from ngpt_jax.terminal import format_bytes, format_table
from ngpt_jax.training import choices
from ngpt_jax.training.step import TrainState, init_state, make_train_step


def for_mesh(config: Config, mesh: Mesh) -> tuple[Config, dict[str, str]]:
    """The config with what depends on the mesh's devices decided, see :func:`choices.by_devices`.

    Raises ConfigError where the mesh does not divide a parameter, or a kernel does not run.
    """
    param_shardings(config.model, mesh)
    return choices.by_devices(config, mesh)


def param_shardings(config: ModelConfig, mesh: Mesh) -> Any:
    """The sharding of each parameter, as a tree; raises ConfigError where the mesh does not fit."""
    own, sizes = jax.tree.leaves(param_tree(config)), axis_sizes(config)
    specs = {p.path: rules.param_spec(p.axes, sizes, mesh, name=p.path) for p in own}
    elements = {p.path: math.prod(p.shape(config)) for p in own}
    rules.check_sharded_enough(specs, elements, mesh)
    return jax.tree.map(lambda p: NamedSharding(mesh, specs[p.path]), param_tree(config))


def abstract_params(config: ModelConfig, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of a model's parameters; raises ConfigError as above."""
    dtype = jnp.dtype(config.param_dtype)
    return jax.tree.map(
        lambda p, s: jax.ShapeDtypeStruct(p.shape(config), dtype, sharding=s),
        param_tree(config), param_shardings(config, mesh),
    )  # fmt: skip


def abstract_state(config: Config, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a run's state.

    What the optimizer keeps for a parameter is sharded as the parameter is, along each axis that it
    has in full: moments along all of them, norms not along the axis of a vector.
    """
    shapes = jax.eval_shape(lambda: init_state(config, tx))
    params, whole = param_shardings(config.model, mesh), rules.replicated(mesh)
    guard = jax.tree.map(lambda _: whole, shapes.guard)

    def as_param(x: Any, param: jax.ShapeDtypeStruct, sharding: NamedSharding) -> Any:
        if isinstance(x, optax.MaskedNode):
            return x
        if x.ndim != param.ndim:
            return whole
        spec = (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))
        full = (e if n == m else None for e, n, m in zip(spec, x.shape, param.shape))
        return NamedSharding(mesh, PartitionSpec(*full))

    opt_state = optax.tree.map_params(
        tx, as_param, shapes.opt_state, shapes.params, params,
        transform_non_params=lambda _: whole,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )  # fmt: skip
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shapes._replace(step=whole, params=params, opt_state=opt_state, guard=guard),
    )


def first_state(
    config: Config, tx: optax.GradientTransformation, mesh: Mesh, params: Any = None
) -> TrainState:
    """The state at step 0; each device makes its own shards.

    With ``params``, laid out as the state's, these are taken and their buffers donated.
    """
    out = shardings(abstract_state(config, tx, mesh))
    init = jax.jit(lambda p: init_state(config, tx, p), out_shardings=out, donate_argnums=0)
    with jax.set_mesh(mesh):
        return init(params)


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a training batch, see transformer.Batch."""
    shape = (config.train.batch_size, config.model.context)
    spec = rules.activation_spec(("batch", "length"), shape, mesh)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, spec))
    batch = {"inputs": tokens, "targets": tokens}
    if config.data.packing == "best_fit":
        batch["weights"] = tokens.update(dtype=jnp.float32)
    if config.data.mask_documents:
        batch["segment_ids"] = batch["positions"] = tokens
    return batch


def describe_mesh(mesh: Mesh) -> str:
    """Such as "mesh: data 2 x fsdp 4 over 8 x TPU v5 lite, 2 processes"."""
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    device = mesh.devices.flat[0].device_kind
    processes = len({d.process_index for d in mesh.devices.flat})
    several = f", {processes} processes" if processes > 1 else ""
    return f"mesh: {sizes or 'one device'} over {mesh.size} x {device}{several}"


def parameter_table(config: Config, mesh: Mesh) -> str:
    """Name, shape, axes, axis of unit norm, group, sharding and bytes per device of parameters.

    Where groups have factors on the learning rate, these stand there too.
    """
    model, factors = config.model, rate_factors(config) is not None
    rows: list[tuple[str, ...]] = [
        ("name", "shape", "axes", "unit norm along", "group",
         *(("rate times",) if factors else ()), "sharded over", "bytes per device")
    ]  # fmt: skip
    params = param_tree(model), abstract_params(model, mesh)
    for p, x in zip(*map(jax.tree.leaves, params), strict=True):
        unit = p.unit_axis if model.weights == "sphere" else None
        along = "-" if unit is None else f"embed (axis {unit})"
        rows.append(
            (p.path, " x ".join(map(str, p.shape(model))), ", ".join(p.axes), along, p.group,
             *((f"{rate_factor(config, p.group):.4g}",) if factors else ()),
             spec_text(x.sharding.spec), format_bytes(bytes_per_device(x)))
        )  # fmt: skip
    return format_table(rows)


def bytes_per_device(tree: Any) -> int:
    """Of a tree of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
    )


def spec_text(spec: PartitionSpec) -> str:
    """Such as "-, tensor, fsdp" for PartitionSpec(None, "tensor", "fsdp")."""
    return ", ".join("-" if e is None else e if isinstance(e, str) else "*".join(e) for e in spec)


def shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def lower_train_step(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """The training step for a mesh, from shapes alone: the program that a run compiles.

    Args:
      config: resolved, with its vocabulary, and all else decided (:func:`for_mesh`).
      mesh: its devices need not be there.
    """
    tx, schedule = make_optimizer(config)
    state = abstract_state(config, tx, mesh)
    step = jax.jit(
        make_train_step(config, tx, schedule),
        donate_argnums=0,
        out_shardings=(shardings(state), rules.replicated(mesh)),
    )
    with jax.set_mesh(mesh):
        return step.lower(state, abstract_batch(config, mesh))
