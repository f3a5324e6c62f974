"""The weights that the network computes with: scales multiplied into the matrices."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from ngpt_jax import sphere
from ngpt_jax.config import ModelConfig
from ngpt_jax.model.attention import softmax_scale
from ngpt_jax.model.logit_gradient import backward_table, factors, scale_rows
from ngpt_jax.model.params import (
    FOLDED_MARK,
    TABLE,
    Param,
    param_tree,
    refuse_folded,
    scale_factor,
)

# The scales whose values multiply the vectors of a matrix.
SCALED_MATRICES = {"s_u": "up_kernel", "s_v": "gate_kernel", "s_z": "output_embedding"}


def folded_config(config: ModelConfig) -> ModelConfig:
    """The config of the weights that :func:`fold` returns; the same if there is nothing to fold."""
    folded = any(TABLE[name].is_in(config) for name in ("s_qk", *SCALED_MATRICES))
    if not (folded or config.normalize_on_read):
        return config
    dtype = jnp.promote_types(config.param_dtype, jnp.float32).name
    return dataclasses.replace(config, folded=folded, normalize_on_read=False, param_dtype=dtype)


def fold(config: ModelConfig, params: Any, logit_power: float | None = None) -> Any:
    """Multiplies scales into the matrices. The logits stay the same but for rounding.

    (h W_u) s_u = h (W_u s_u) and (h W_nu) s_nu sqrt(d) = h (W_nu s_nu sqrt(d)) (equations 20, 21);
    s_z goes into the output table (3). With c the factor on q k^T, sqrt(d_k) in nGPT,
    c (q s_qk) . (k s_qk) = (q s_qk^2 c) . k (15, 16). alpha_a and alpha_m stay, because they scale
    states and not weights.

    Args:
      config: resolved, of these parameters. Raises ConfigError if they are folded already.
      params: the parameters. A model without scales to fold, such as GPT, gets them back unchanged.
      logit_power: not None: the output table gets the gradient of :mod:`.logit_gradient`.

    Returns:
      The parameters of :func:`folded_config`, in at least float32. The projection and training
      know them by the name FOLDED_MARK and refuse them.
    """
    refuse_folded(config)
    assert config.kv_heads is not None and config.head_dim is not None
    new = folded_config(config)
    if new == config:
        return params

    top = jax.tree.map(functools.partial(_read, config), params, param_tree(config))
    layers = top["layers"]

    def take(tree: dict[str, Any], name: str) -> jax.Array:
        return tree.pop(name) * scale_factor(config, name)

    if "s_u" in layers:  # (layers, embed, mlp) * (layers, 1, mlp)
        layers["up_kernel"] *= take(layers, "s_u")[:, None]
    if "s_v" in layers:
        layers["gate_kernel"] *= take(layers, "s_v")[:, None] * math.sqrt(config.width)
    if "s_z" in top:
        s_z = take(top, "s_z")
        if logit_power is None:
            top["output_embedding"] *= s_z[:, None]
        else:
            factor = _logit_factors(config, s_z, logit_power)
            top["output_embedding"] = scale_rows(top["output_embedding"], s_z, factor)
    if new.folded:
        shape = (config.layers, config.kv_heads, config.head_dim)
        s_qk = take(layers, "s_qk") if "s_qk" in layers else jnp.ones(shape, new.param_dtype)
        factor = jnp.square(s_qk) * softmax_scale(config)
        layers[FOLDED_MARK] = jnp.repeat(factor, config.heads // config.kv_heads, axis=1)
    return top


def _read(config: ModelConfig, w: jax.Array, p: Param) -> jax.Array:
    normalized = config.normalize_on_read and p.is_matrix
    return sphere.promote(sphere.normalize(w, p.axes.index("embed")) if normalized else w)


def _logit_factors(config: ModelConfig, s_z: jax.Array, power: float) -> jax.Array:
    assert config.vocab_size is not None
    return factors(s_z, power, config.vocab_size)


def gradient_table(config: ModelConfig, params: Any, logit_power: float) -> jax.Array:
    """What the gradient of the last hidden states goes through, in the compute dtype.

    It is the output table times the factors of :mod:`.logit_gradient`. ``params`` are not folded.
    """
    name = "output_embedding"
    table = _read(config, params[name], TABLE[name])
    factor = _logit_factors(config, sphere.promote(params["s_z"]), logit_power)
    return backward_table(table, factor, config.dtype)


def round_matrices(config: ModelConfig, params: Any) -> Any:
    """Parameters with the matrices in the compute dtype, but for those that a scale multiplies.

    They are cast once for all passes of a step, and gradients with respect to the result have the
    compute dtype too. The network casts the others when it has multiplied them.
    """
    scaled = {matrix for scale, matrix in SCALED_MATRICES.items() if TABLE[scale].is_in(config)}
    return jax.tree.map(
        lambda w, p: w.astype(config.dtype) if p.is_matrix and p.name not in scaled else w,
        params, param_tree(config),
    )  # fmt: skip


def compute_params(config: ModelConfig, params: Any) -> Any:
    """Parameters of :func:`folded_config` with the matrices in the compute dtype.

    A scaled matrix is rounded once, after its scale is multiplied in. ``params`` may be folded
    already.
    """
    params = params if config.folded else fold(config, params)
    return round_matrices(folded_config(config), params)
