"""What a run would be: parameter table, counts and memory, from shapes alone."""

from __future__ import annotations

import math
from typing import Any, cast

import jax
import numpy as np

from ngpt_jax.config import Config, ConfigError
from ngpt_jax.data.sources import check_files
from ngpt_jax.model.transformer import axis_sizes, is_axes, num_params, param_axes, unit_axes
from ngpt_jax.optim.groups import param_groups
from ngpt_jax.optim.recipes import make_optimizer
from ngpt_jax.parallel.mesh import make_mesh
from ngpt_jax.training.loop import with_tokenizer
from ngpt_jax.training.step import init_state
from ngpt_jax.training.throughput import train_flops_per_token


def _bytes(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in leaves)


def format_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.2f} GiB"


def parameter_table(config: Config) -> str:
    """Name, shape, axes, axis of unit norm and optimizer group of every parameter."""
    sizes = axis_sizes(config.model)
    flat = jax.tree_util.tree_flatten_with_path(param_axes(config.model), is_leaf=is_axes)
    axes, treedef = cast(Any, flat)
    units = treedef.flatten_up_to(unit_axes(config.model))
    groups = treedef.flatten_up_to(param_groups(config.model))
    rows = [("name", "shape", "axes", "unit norm along", "group")]
    for (path, names), unit, group in zip(axes, units, groups):
        name = "/".join(key.key for key in path)
        shape = " x ".join(str(sizes[a]) for a in names)
        along = "-" if unit is None else f"{names[unit]} (axis {unit})"
        rows.append((name, shape, ", ".join(names), along, group))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def report(config: Config) -> tuple[str, ConfigError | None]:
    """Everything that can be said of a run before it starts.

    Returns:
      The text, and what is wrong with the data where the model can be told without them; raises
      ConfigError for all other mistakes.
    """
    problem = None
    name = config.data.tokenizer
    try:
        config, tokenizer = with_tokenizer(config)
        name = tokenizer.name
        check_files(config.data)
    except ConfigError as e:
        if config.model.vocab_size is None:
            raise
        problem = e
    mesh = make_mesh(config)
    tx, _ = make_optimizer(config)
    state = jax.eval_shape(lambda: init_state(config, tx))
    model, train = config.model, config.train
    assert train.steps is not None
    tokens = train.batch_size * model.context
    vocab = axis_sizes(model)["vocab"]
    windows = -(-train.batch_size // mesh.size)
    scores = 4 * windows * model.heads * model.context**2
    logits = 4 * min(model.loss_chunk, tokens) * vocab
    facts = [
        ("parameters", f"{num_params(model):,} ({model.kind}; padding left out)"),
        ("vocabulary", f"{model.vocab_size:,} of {name}, padded to {vocab:,}"),
        ("run", f"{train.steps:,} steps of {tokens:,} tokens: {train.steps * tokens:,} tokens"),
        ("compute", f"{train_flops_per_token(model):.3g} FLOPs a token,"
         f" {train_flops_per_token(model) * train.steps * tokens:.3g} in all"),
        ("devices", f"{mesh.size} x {jax.devices()[0].device_kind}"),
        ("memory a device", f"parameters {format_bytes(_bytes(state.params))},"
         f" Adam {format_bytes(_bytes(state.opt_state))},"
         f" gradients {format_bytes(_bytes(state.params))},"
         f" logits of a chunk {format_bytes(logits)}, attention scores of a block"
         f" {format_bytes(scores)} (several at a time); other activations come on top"),
    ]  # fmt: skip
    width = max(len(name) for name, _ in facts)
    lines = [f"{name:{width}}  {fact}" for name, fact in facts]
    return "\n".join([parameter_table(config), "", *lines]), problem
