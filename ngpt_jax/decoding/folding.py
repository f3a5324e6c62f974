"""Weights for inference: scales multiplied in, in the compute dtype, one tree for each layer."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngpt_jax import sphere
from ngpt_jax.config import ModelConfig
from ngpt_jax.model.attention import softmax_scale
from ngpt_jax.model.params import (
    FOLDED_MARK,
    TABLE,
    param_tree,
    refuse_folded,
    scale_factor,
)
from ngpt_jax.parallel import rules


def folded_config(config: ModelConfig) -> ModelConfig:
    """The config of the weights that :func:`fold` returns; the same if there is nothing to fold."""
    folded = any(TABLE[name].is_in(config) for name in ("s_qk", "s_u", "s_v", "s_z"))
    if not (folded or config.normalize_on_read):
        return config
    dtype = jnp.promote_types(config.param_dtype, jnp.float32).name
    return dataclasses.replace(config, folded=folded, normalize_on_read=False, param_dtype=dtype)


def fold(config: ModelConfig, params: Any) -> Any:
    """Multiplies scales into the matrices. The logits stay the same but for rounding.

    (h W_u) s_u = h (W_u s_u) and (h W_nu) s_nu sqrt(d) = h (W_nu s_nu sqrt(d)) (equations 20, 21);
    s_z goes into the output table (3). With c the factor on q k^T, sqrt(d_k) in nGPT,
    c (q s_qk) . (k s_qk) = (q s_qk^2 c) . k (15, 16). alpha_a and alpha_m stay, because they scale
    states and not weights.

    Args:
      config: resolved, of these parameters. Raises ConfigError if they are folded already.
      params: the parameters. A model without scales to fold, such as GPT, gets them back unchanged.

    Returns:
      The parameters of :func:`folded_config`, in at least float32. The projection and training
      know them by the name FOLDED_MARK and refuse them.
    """
    refuse_folded(config)
    assert config.kv_heads is not None and config.head_dim is not None
    new = folded_config(config)
    if new == config:
        return params

    def read(w: jax.Array, p: Any) -> jax.Array:
        normalized = config.normalize_on_read and p.is_matrix
        return sphere.promote(sphere.normalize(w, p.axes.index("embed")) if normalized else w)

    top = jax.tree.map(read, params, param_tree(config))
    layers = top["layers"]

    def take(tree: dict[str, Any], name: str) -> jax.Array:
        return tree.pop(name) * scale_factor(config, name)

    if "s_u" in layers:  # (layers, embed, mlp) * (layers, 1, mlp)
        layers["up_kernel"] *= take(layers, "s_u")[:, None]
    if "s_v" in layers:
        layers["gate_kernel"] *= take(layers, "s_v")[:, None] * math.sqrt(config.width)
    if "s_z" in top:
        top["output_embedding"] *= take(top, "s_z")[:, None]
    if new.folded:
        shape = (config.layers, config.kv_heads, config.head_dim)
        s_qk = take(layers, "s_qk") if "s_qk" in layers else jnp.ones(shape, new.param_dtype)
        factor = jnp.square(s_qk) * softmax_scale(config)
        layers[FOLDED_MARK] = jnp.repeat(factor, config.heads // config.kv_heads, axis=1)
    return top


class Joined(NamedTuple):
    """Matrices that read the same vectors, side by side in one matrix.

    Attributes:
      names: of the matrices.
      axes: of the joined matrix, as those of a parameter.
      gain: the RMSNorm before them.
    """

    names: tuple[str, ...]
    axes: tuple[str, ...]
    gain: str


JOINED = {
    # Of each key head: its query heads, itself and its value head.
    "attention_kernel": Joined(
        ("query_kernel", "key_kernel", "value_kernel"),
        ("embed", "kv_heads", "part", "head_dim"),
        "attention_norm",
    ),
    "mlp_kernel": Joined(("up_kernel", "gate_kernel"), ("embed", "part", "mlp"), "mlp_norm"),
}


def for_inference(config: ModelConfig, params: Any) -> Any:
    """Weights for :func:`ngpt_jax.decoding.block.block`, laid out on the current mesh.

    They are folded, and matrices have the compute dtype. ``layers`` is a list, one tree a layer:
    matrices that read the same vectors are joined (JOINED) and hold the gain of the RMSNorm before
    them; alpha_a and alpha_m are step sizes, in at least float32. So a step of decoding reads each
    weight once, and slices and casts none.
    """
    params = params if config.folded else fold(config, params)
    config, stacked = folded_config(config), params["layers"]
    layers = [
        _layer(config, {name: w[i] for name, w in stacked.items()}) for i in range(config.layers)
    ]
    top = {name: w for name, w in params.items() if name != "layers"}
    return {name: _place(config, name, w) for name, w in top.items()} | {"layers": layers}


def _layer(config: ModelConfig, layer: dict[str, jax.Array]) -> dict[str, jax.Array]:
    assert config.kv_heads is not None
    left = {name: sphere.promote(w) for name, w in layer.items()}
    for name in ("alpha_a", "alpha_m"):
        if name in left:
            left[name] = jnp.abs(left[name] * scale_factor(config, name))
    for name, joined in JOINED.items():
        parts = [left.pop(part) for part in joined.names]
        axis = joined.axes.index("part")
        if "kv_heads" in joined.axes:  # (embed, heads, head_dim)
            parts = [w.reshape(len(w), config.kv_heads, -1, w.shape[-1]) for w in parts]
            whole = jnp.concatenate(parts, axis)
        else:
            whole = jnp.stack(parts, axis)
        gain = left.pop(joined.gain, None)
        left[name] = whole if gain is None else jnp.einsum("e,e...->e...", gain, whole)
    return {name: _place(config, name, w) for name, w in left.items()}


def _place(config: ModelConfig, name: str, w: jax.Array) -> jax.Array:
    if name in JOINED:
        return rules.lay_out(w.astype(config.dtype), JOINED[name].axes)
    param = TABLE[name]
    w = w.astype(config.dtype) if param.is_matrix else sphere.promote(w)
    return rules.lay_out(w, param.module_axes)
