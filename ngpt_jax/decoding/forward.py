"""The model over weights for inference. The caller says how it attends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ngpt_jax.config import ModelConfig
from ngpt_jax.decoding.block import Attend, Hidden, block, rms_factor
from ngpt_jax.decoding.cache import Caches
from ngpt_jax.decoding.rows import rows_shape
from ngpt_jax.model.embedding import embed_tokens
from ngpt_jax.model.folding import folded_config
from ngpt_jax.model.rotary import rope_tables

Tables = tuple[jax.Array, jax.Array]


def tables_of(config: ModelConfig, slot: jax.Array, first: jax.Array) -> Tables:
    """Cosines and sines of RoPE, each (B, T, head_dim/2).

    Args:
      config: of the model.
      slot: (T,) the slot of each token in the cache.
      first: (B,) the slot of each row's first token; before it there is padding.
    """
    assert config.head_dim is not None
    positions = jnp.maximum(slot - first[:, None], 0)
    dtype = jnp.promote_types(config.dtype, jnp.float32)
    return rope_tables(positions, config.head_dim, config.rope_base, dtype)


def forward(
    config: ModelConfig,
    params: Any,
    tokens: jax.Array,
    tables: Tables,
    attends: Sequence[Attend],
) -> tuple[jax.Array, Caches]:
    """The last hidden states (B, T, embed) of T tokens, and the caches with these tokens.

    Args:
      config: of the model, folded or not.
      params: from folding.for_inference.
      tokens: (B, T).
      tables: of the tokens, from :func:`tables_of`.
      attends: one for each layer; returns attention's result and the layer's new cache.
    """
    config = folded_config(config)
    x = embed_tokens(params["input_embedding"], tokens)
    h = Hidden(x.reshape(*rows_shape(*tokens.shape), -1))
    caches = []
    for i, (layer, attend) in enumerate(zip(params["layers"], attends, strict=True)):
        h, cache = block(config, layer, h, i == 0, tables, attend)
        caches.append(cache)
    if config.final_norm == "rms":
        factor = rms_factor(h.x, h.factor, config.rms_eps)
        h = Hidden(h.x, factor * params["final_norm"])
    return h.value().astype(x.dtype).reshape(x.shape), tuple(caches)
