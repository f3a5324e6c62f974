"""The model over weights for inference. The caller says how it attends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ngpt_jax.config import ModelConfig
from ngpt_jax.decoding.cache import Caches
from ngpt_jax.model.embedding import embed_tokens
from ngpt_jax.model.folding import folded_config
from ngpt_jax.model.norms import rms_norm
from ngpt_jax.model.rotary import rope_tables
from ngpt_jax.model.transformer import Attend, Block


def forward(
    config: ModelConfig,
    params: Any,
    tokens: jax.Array,
    slot: jax.Array,
    first: jax.Array,
    attends: Sequence[Attend],
) -> tuple[jax.Array, Caches]:
    """The last hidden states (B, T, embed) of T tokens, and the caches with these tokens.

    Args:
      config: of the model, folded or not.
      params: from folding.for_inference.
      tokens: (B, T).
      slot: (T,) the slot of each token in the cache.
      first: (B,) the slot of each row's first token; before it there is padding.
      attends: one for each layer; returns attention's result and the layer's new cache.
    """
    config = folded_config(config)
    assert config.head_dim is not None
    positions = jnp.maximum(slot - first[:, None], 0)  # (B, T)
    dtype = jnp.promote_types(config.dtype, jnp.float32)
    tables = rope_tables(positions, config.head_dim, config.rope_base, dtype)
    h = embed_tokens(params["input_embedding"], tokens)
    caches = []
    for i, (layer, attend) in enumerate(zip(params["layers"], attends, strict=True)):
        block: Any = Block(config, after_first=i > 0)
        h, cache = block.apply({"params": layer}, h, tables, None, attend)
        caches.append(cache)
    return rms_norm(h, params.get("final_norm"), config.rms_eps), tuple(caches)
