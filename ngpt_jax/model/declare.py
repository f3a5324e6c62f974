"""How modules declare the parameters of the table in :mod:`.params`, and read them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ngpt_jax import sphere
from ngpt_jax.config import ModelConfig
from ngpt_jax.model import norms
from ngpt_jax.model.params import TABLE, effective_scale, fixed_scale, has_scale, initial_scale


def declare(module: nn.Module, config: ModelConfig, name: str, init: Any) -> Any:
    """A parameter with its axes and shape from the table."""
    param = TABLE[name].of(config)
    boxed = nn.with_logical_partitioning(init, param.module_axes)
    shape = param.shape(config)[len(param.axes) - len(param.module_axes) :]
    return module.param(name, boxed, shape, jnp.dtype(config.param_dtype))


def matrix(
    module: nn.Module, config: ModelConfig, name: str, factor: jax.Array | None = None
) -> jax.Array:
    """A matrix in the compute dtype.

    With ``weights=sphere`` its vectors along embed are normalized at initialization. With
    ``normalize_on_read`` they are normalized here too, so that gradients are tangent to the sphere.
    The matrix is still sharded over ``fsdp``. Its users gather it: :meth:`Block._product`,
    the embedding and the loss.

    Args:
      module, config: of the parameter.
      name: of the parameter.
      factor: multiplies the vectors, broadcast against the matrix. (h W) * s = h (W * s), and
        there are fewer weights than activations to multiply.
    """
    assert config.init_std is not None
    axes, std = TABLE[name].module_axes, config.init_std
    axis = axes.index("embed")
    if "vocab" not in axes and axes[-1] == "embed":  # GPT-2's rule for branches
        std *= (2 * config.layers) ** -0.5
    normal = nn.initializers.normal(std)

    def init(key, shape, dtype):
        w = normal(key, shape, jnp.promote_types(dtype, jnp.float32))
        if config.weights == "sphere":
            w = sphere.normalize(w, axis)
        elif "vocab" in axes:  # padding counts in no norm of the whole table
            w = w.at[config.vocab_size :].set(0)
        return w.astype(dtype)

    w = declare(module, config, name, init)
    if config.normalize_on_read:
        w = norms.unit(w, axis)
    if factor is not None:
        w = sphere.promote(w) * factor
    return w.astype(config.dtype)


def scale(module: nn.Module, config: ModelConfig, name: str) -> jax.Array | None:
    """The effective values (section 2.5) of a scale in at least float32, one for each channel.

    None where the config's choices do not bring this scale.
    """
    if not has_scale(config, name):
        return None
    if TABLE[name].is_in(config):
        init = nn.initializers.constant(initial_scale(config, name))
        stored = sphere.promote(declare(module, config, name, init))
    else:
        stored = fixed_scale(config, name).ravel()[0]  # the same in all layers
    return effective_scale(config, name, stored)


def gain(module: nn.Module, config: ModelConfig, name: str) -> jax.Array | None:
    """The learned gain of an RMSNorm in at least float32; None where there is no such norm."""
    if not TABLE[name].is_in(config):
        return None
    return sphere.promote(declare(module, config, name, nn.initializers.ones))
