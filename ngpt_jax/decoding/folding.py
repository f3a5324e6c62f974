"""Weights as inference reads them: scales folded in, in the compute dtype, a tree a layer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ngpt_jax import sphere
from ngpt_jax.config import ModelConfig
from ngpt_jax.model.transformer import FOLDED_MARK, is_matrix, param_axes, refuse_folded


def folded_config(config: ModelConfig) -> ModelConfig:
    """The config of the weights that :func:`fold` gives; GPT has no scales to fold."""
    if config.kind == "gpt":
        return config
    dtype = jnp.promote_types(config.param_dtype, jnp.float32).name
    return dataclasses.replace(config, folded=True, normalize_on_read=False, param_dtype=dtype)


def fold(config: ModelConfig, params: Any) -> Any:
    """nGPT's scales multiplied into its matrices, which changes no logit but by rounding.

    (h W_u) s_u = h (W_u s_u) and (h W_v) s_v sqrt(d) = h (W_v s_v sqrt(d)) (equations 20, 21); s_z
    goes into the output table (3); sqrt(d_k) (q s_qk) . (k s_qk) = (q s_qk^2 sqrt(d_k)) . k (15,
    16). alpha_a and alpha_m stay: they scale states, not weights.

    Args:
      config: resolved, of these parameters.
      params: the parameters; GPT's are returned as they are.

    Returns:
      The parameters of :func:`folded_config`, in at least float32. They are known by the name
      FOLDED_MARK; the projection and training refuse them.
    """
    if config.kind == "gpt":
        return params
    refuse_folded(config)
    assert config.head_dim is not None and config.kv_heads is not None

    def read(w: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        normalize = config.normalize_on_read and is_matrix(axes)
        return sphere.promote(sphere.normalize(w, axes.index("embed")) if normalize else w)

    params = jax.tree.map(read, params, param_axes(config))
    layers = dict(params["layers"])

    def take(tree: dict[str, Any], name: str) -> jax.Array:
        spec = getattr(config, name)
        return tree.pop(name) * (spec.init / spec.scale)

    # (layers, embed, mlp) * (layers, 1, mlp)
    layers["up_kernel"] *= take(layers, "s_u")[:, None]
    layers["gate_kernel"] *= take(layers, "s_v")[:, None] * math.sqrt(config.width)
    factor = jnp.square(take(layers, "s_qk")) * math.sqrt(config.head_dim)
    layers[FOLDED_MARK] = jnp.repeat(factor, config.heads // config.kv_heads, axis=1)
    top = {name: w for name, w in params.items() if name != "layers"}
    table = top["output_embedding"] * take(top, "s_z")[:, None]
    return top | {"layers": layers, "output_embedding": table}


def for_inference(config: ModelConfig, params: Any) -> Any:
    """Folded weights, matrices in the compute dtype, ``layers`` a list of one tree a layer.

    So a step of decoding reads each weight once: it cuts none out of a stack and casts none.
    """
    if not config.folded:
        params = fold(config, params)
    config = folded_config(config)

    def cast(w: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        return w.astype(config.dtype) if is_matrix(axes) else w

    params = jax.tree.map(cast, params, param_axes(config))
    stacked = params["layers"]
    layers = [{name: w[i] for name, w in stacked.items()} for i in range(config.layers)]
    return params | {"layers": layers}
