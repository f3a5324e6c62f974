"""A block of the model over weights for inference, in few kernels.

It computes what :class:`ngpt_jax.model.transformer.Block` does, but for rounding. With one row a
token is many small kernels, and a norm costs as much as a small product. So no vector is normalized
before a product: (x c) W = (x W) c with a number c for each row, and where x W becomes unit vectors
c does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngpt_jax import sphere
from ngpt_jax.config import ModelConfig
from ngpt_jax.decoding.cache import KeysValues
from ngpt_jax.decoding.folding import JOINED
from ngpt_jax.decoding.rows import inverse_norm, square_norm
from ngpt_jax.model.attention import softmax_scale
from ngpt_jax.model.params import FOLDED_MARK, TABLE
from ngpt_jax.model.rotary import apply_rope
from ngpt_jax.model.transformer import RESIDUALS, linear
from ngpt_jax.parallel import rules

# (q, k, v, scale of q k^T) -> attention's result (B, T, heads, head_dim), and the KV cache.
Attend = Callable[[jax.Array, jax.Array, jax.Array, float], tuple[jax.Array, KeysValues]]


class Hidden(NamedTuple):
    """The hidden state h = x * factor.

    Attributes:
      x: (*rows, embed) in the compute dtype; rows from rows_shape.
      factor: (*rows, 1) in at least float32, or 1.
    """

    x: jax.Array
    factor: jax.Array | float = 1.0

    def value(self) -> jax.Array:
        """h in at least float32."""
        return sphere.promote(self.x) * self.factor


def block(
    config: ModelConfig,
    layer: dict[str, jax.Array],
    h: Hidden,
    first: bool,
    tables: tuple[jax.Array, jax.Array],
    attend: Attend,
) -> tuple[Hidden, KeysValues]:
    """Both steps of h.

    Args:
      config: of the folded weights.
      layer: the weights of this layer, from folding.for_inference.
      h: the hidden state.
      first: whether this is the first block.
      tables: cosines and sines of RoPE.
      attend: attention, which writes the KV cache.
    """
    # The names are those of training's modules; aot tells bytes by part with them.
    with jax.named_scope("_attention"):
        f, cache = _attention(config, layer, _read(config, h), tables, attend)
    with jax.named_scope("_step"):
        if first and config.residual != "add":
            h = Hidden(h.x, inverse_norm(h.x))
        h = _step(config, h, f, layer.get("alpha_a"))
    with jax.named_scope("_mlp"):
        f = _mlp(config, layer, _read(config, h))
    with jax.named_scope("_step"):
        return _step(config, h, f, layer.get("alpha_m")), cache


def rms_factor(x: jax.Array, factor: Any, eps: float) -> jax.Array:
    """What RMSNorm multiplies the vector x * factor by, times factor."""
    mean_square = square_norm(x) / x.shape[-1]
    return factor * jax.lax.rsqrt(jnp.square(factor) * mean_square + eps)


def _read(config: ModelConfig, h: Hidden) -> Hidden:
    """What a branch reads; the gain of its RMSNorm is in its matrices."""
    if config.pre_norm != "rms":
        return h
    return Hidden(h.x, rms_factor(h.x, h.factor, config.rms_eps))


def _step(config: ModelConfig, h: Hidden, f: jax.Array, alpha: jax.Array | None) -> Hidden:
    """h moved by a branch's output f: equations 10 and 11, or h + f."""
    start, to = h.value(), sphere.promote(f)
    if config.branch_norm == "unit":
        to = to * inverse_norm(f)
    if config.residual == "add":
        return Hidden((start + to).astype(h.x.dtype))
    assert alpha is not None
    if config.residual in ("slerp", "exp"):
        return Hidden(RESIDUALS[config.residual](start, to, alpha).astype(h.x.dtype))
    x = (start + alpha * (to - start)).astype(h.x.dtype)
    return Hidden(x, inverse_norm(x))


def _product(x: jax.Array, layer: dict[str, jax.Array], name: str, contracted: int = 1) -> Any:
    """The product of x (*rows, ...) and a matrix, which is gathered over fsdp for it."""
    w = rules.gather(layer[name], JOINED[name].axes if name in JOINED else TABLE[name].module_axes)
    if rules.current_mesh() is not None:
        return linear(x, w, contracted)
    rows, rest = x.shape[: x.ndim - contracted], w.shape[contracted:]
    size = math.prod(w.shape[:contracted])
    return (x.reshape(*rows, size) @ w.reshape(size, -1)).reshape(*rows, *rest)


def _attention(
    config: ModelConfig, layer: dict[str, jax.Array], h: Hidden, tables: Any, attend: Attend
) -> tuple[jax.Array, KeysValues]:
    c, dtype = config, h.x.dtype
    heads = _product(h.x, layer, "attention_kernel")  # (*rows, kv_heads, group + 2, head_dim)
    v_factor = qk_factor = jnp.asarray(h.factor)[..., None, None]
    if c.qk_norm and c.qk_form == "unit_after_rope":  # RoPE keeps the norm
        qk_factor = inverse_norm(heads)
    elif c.qk_norm:
        qk_factor = rms_factor(heads, v_factor, c.rms_eps)

    def take(first: int, last: int, factor: jax.Array) -> jax.Array:
        factor = jnp.broadcast_to(factor, (*heads.shape[:-1], 1))
        x = sphere.promote(heads[..., first:last, :]) * factor[..., first:last, :]
        return x.reshape(*tables[0].shape[:2], -1, x.shape[-1])  # (B, T, heads, head_dim)

    group = heads.shape[-2] - 2
    q, k = take(0, group, qk_factor), take(group, group + 1, qk_factor)
    v = take(group + 1, group + 2, v_factor)
    if c.qk_norm and c.qk_form == "rms_before_rope":
        q, k = q * layer["query_norm"], k * layer["key_norm"]
    q, k = apply_rope(q, tables), apply_rope(k, tables)
    if c.folded:
        q = q * rules.gather(layer[FOLDED_MARK], TABLE[FOLDED_MARK].module_axes)
    out, cache = attend(q.astype(dtype), k.astype(dtype), v.astype(dtype), softmax_scale(c))
    out = out.reshape(*h.x.shape[:-1], *out.shape[2:])
    f = _product(out, layer, "out_kernel", contracted=2)
    return rules.constrain(f, "batch", "length", "embed"), cache


def _mlp(config: ModelConfig, layer: dict[str, jax.Array], h: Hidden) -> jax.Array:
    both = _product(h.x, layer, "mlp_kernel")  # (*rows, 2, mlp)
    both = sphere.promote(both) * jnp.asarray(h.factor)[..., None]
    hidden = (both[..., 0, :] * jax.nn.silu(both[..., 1, :])).astype(h.x.dtype)
    hidden = rules.constrain(hidden, "batch", "length", "mlp")
    return rules.constrain(_product(hidden, layer, "down_kernel"), "batch", "length", "embed")
