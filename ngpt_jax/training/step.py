"""The training step: pure functions of a state and a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ngpt_jax import sphere
from ngpt_jax.config import Config, ModelConfig
from ngpt_jax.model.loss import cross_entropy
from ngpt_jax.model.transformer import (
    Transformer,
    init_params,
    real_vocab,
    unit_axes,
)
from ngpt_jax.projection import sphere_deviation

Batch = dict[str, jax.Array]  # inputs, targets (B, T) int32; weights (B, T) where some don't count


class TrainState(NamedTuple):
    """All that changes in training. ``step`` counts the updates made."""

    step: jax.Array
    params: Any
    opt_state: Any


def init_state(config: Config, tx: optax.GradientTransformation) -> TrainState:
    params = init_params(config.model, jax.random.key(config.train.seed))
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def summed_nats(config: ModelConfig, params: Any, batch: Batch) -> jax.Array:
    """Sum over the batch's (weighted) targets of -log p(target), in nats."""
    assert config.vocab_size is not None
    outputs: Any = Transformer(config).apply(
        {"params": params}, batch["inputs"], method="hidden_and_table"
    )
    h, table = outputs
    targets = batch["targets"]
    weights = batch.get("weights", jnp.ones(targets.shape, jnp.float32))
    return cross_entropy(h, table, targets, weights, config.vocab_size, config.loss_chunk)


def make_train_step(
    config: Config, tx: optax.GradientTransformation, schedule: optax.Schedule
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The step (state, batch) -> (state, metrics), not yet jitted.

    Metrics are scalars of the batch before the update: loss (nats a token), grad_norm (before
    clipping), learning_rate.
    """

    def train_step(state: TrainState, batch: Batch):
        def mean_nats(params):
            return summed_nats(config.model, params, batch) / batch["targets"].size

        loss, grads = jax.value_and_grad(mean_nats)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def summarize_params(config: ModelConfig, params: Any) -> dict[str, jax.Array]:
    """What nGPT's parameters look like: the largest deviation from the sphere over all unit
    vectors, and the mean effective value of each kind of scale, padding left out. Empty for GPT.
    """
    if config.kind != "ngpt":
        return {}
    off = jax.tree.leaves(sphere_deviation(params, unit_axes(config)))
    out = {"sphere_deviation": jnp.max(jnp.stack(off))}
    flat = params["layers"] | {"s_z": real_vocab(params["s_z"], ("vocab",), config)}
    for name in ("alpha_a", "alpha_m", "s_qk", "s_u", "s_v", "s_z"):
        spec = getattr(config, name)
        effective = sphere.promote(flat[name]) * (spec.init / spec.scale)
        out[f"mean_{name}"] = jnp.mean(jnp.abs(effective) if "alpha" in name else effective)
    return out
