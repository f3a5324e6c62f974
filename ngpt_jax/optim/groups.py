"""Optimizer groups, derived from axis names and the top-level path."""

from __future__ import annotations

from typing import Any

import jax

from ngpt_jax.config import ModelConfig
from ngpt_jax.model.transformer import is_axes, is_matrix, param_axes


def param_groups(config: ModelConfig) -> dict[str, Any]:
    """A tree like the parameters: input_table, block_matrix, output_table or vector.

    Both tables have the axes vocab and embed: the top-level name tells them apart. Vectors
    are scales and norm gains, two-dimensional once they are stacked over layers.
    """

    def group(path, axes):
        if not is_matrix(axes):
            return "vector"
        top = path[0].key
        return {"input_embedding": "input_table", "output_embedding": "output_table"}.get(
            top, "block_matrix"
        )

    return jax.tree_util.tree_map_with_path(group, param_axes(config), is_leaf=is_axes)


def matrix_mask(config: ModelConfig) -> dict[str, Any]:
    """True for matrices, which weight decay acts on; False for vectors."""
    return jax.tree.map(lambda group: group != "vector", param_groups(config))
