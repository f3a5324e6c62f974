"""What a run would be: parameter table, counts and memory, from shapes alone."""

import math
from typing import Any

import jax
import numpy as np

from ngpt_jax.config import Config, ConfigError
from ngpt_jax.data.corpus import check_corpus
from ngpt_jax.data.tokenizers.load import with_tokenizer
from ngpt_jax.model.params import axis_sizes, num_params
from ngpt_jax.optim.recipes import make_optimizer
from ngpt_jax.parallel.mesh import check_eval_batch, make_mesh
from ngpt_jax.parallel.rules import axis_size
from ngpt_jax.terminal import format_bytes
from ngpt_jax.training import layout
from ngpt_jax.training.throughput import train_flops_per_token


def _bytes(tree: Any) -> int:
    """Of one device's part of a tree of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
    )


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
        check_corpus(config.data, tokenizer)
    except ConfigError as e:
        if config.model.vocab_size is None:
            raise
        problem = e
    mesh = make_mesh(config)
    check_eval_batch(config.eval.batch_size, mesh)
    config, kernel = layout.for_mesh(config, mesh)
    tx, _ = make_optimizer(config)
    state = layout.abstract_state(config, tx, mesh)
    model, train = config.model, config.train
    assert train.steps is not None
    tokens = train.batch_size * model.context
    vocab = axis_sizes(model)["vocab"]
    windows, length = layout.abstract_batch(config, mesh)["inputs"].sharding.shard_shape(
        (train.batch_size // train.accumulate, model.context)
    )
    tensor = axis_size(mesh, "tensor")
    logits = 4 * min(model.loss_chunk, windows * length) * vocab // tensor
    scores = 4 * windows * length * model.context * model.heads // tensor
    in_memory = f", attention scores of a block {format_bytes(scores)} (several at a time)"
    facts = [
        ("parameters", f"{num_params(model):,} ({model.kind}; padding left out)"),
        ("vocabulary", f"{model.vocab_size:,} of {name}, padded to {vocab:,}"),
        ("run", f"{train.steps:,} steps of {tokens:,} tokens: {train.steps * tokens:,} tokens"),
        ("compute", f"{train_flops_per_token(model):.3g} FLOPs a token,"
         f" {train_flops_per_token(model) * train.steps * tokens:.3g} in all"),
        ("devices", layout.describe_mesh(mesh)),
        ("attention", kernel.removeprefix("attention kernel: ")),
        ("memory a device", f"parameters {format_bytes(_bytes(state.params))},"
         f" Adam {format_bytes(_bytes(state.opt_state))},"
         f" gradients {format_bytes(_bytes(state.params))},"
         f" logits of a chunk {format_bytes(logits)}"
         f"{in_memory if model.attention == 'xla' else ''}; other activations come on top"),
    ]  # fmt: skip
    width = max(len(name) for name, _ in facts)
    lines = [f"{name:{width}}  {fact}" for name, fact in facts]
    return "\n".join([layout.parameter_table(config, mesh), "", *lines]), problem
