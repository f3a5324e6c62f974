"""Weights for inference: scales multiplied in, in the compute dtype, one tree for each layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngpt_jax import sphere
from ngpt_jax.config import ModelConfig
from ngpt_jax.model.folding import fold, folded_config
from ngpt_jax.model.params import (
    TABLE,
    depth_factors,
    effective_scale,
    fixed_scale,
    has_scale,
    step_size,
)
from ngpt_jax.parallel import rules


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
        ("embed", "kv_heads", "joined", "head_dim"),
        "attention_norm",
    ),
    "mlp_kernel": Joined(("up_kernel", "gate_kernel"), ("embed", "joined", "mlp"), "mlp_norm"),
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
        _layer(config, {name: w[i] for name, w in stacked.items()}, i) for i in range(config.layers)
    ]
    top = {name: w for name, w in params.items() if name != "layers"}
    return {name: _place(config, name, w) for name, w in top.items()} | {"layers": layers}


def _layer(config: ModelConfig, layer: dict[str, jax.Array], i: int) -> dict[str, jax.Array]:
    assert config.kv_heads is not None
    left = {name: sphere.promote(w) for name, w in layer.items()}
    depth = depth_factors(config)
    for name in ("alpha_a", "alpha_m"):
        if has_scale(config, name):
            stored = left[name] if name in left else fixed_scale(config, name)[i]
            alpha = effective_scale(config, name, stored)
            left[name] = step_size(config, alpha, depth if depth is None else float(depth[i]))
    for name, joined in JOINED.items():
        parts = [left.pop(part) for part in joined.names]
        axis = joined.axes.index("joined")
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
