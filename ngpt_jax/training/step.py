"""The training step, as pure functions of a state and a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ngpt_jax import sphere
from ngpt_jax.config import Config, ModelConfig
from ngpt_jax.model import fused
from ngpt_jax.model.folding import fold, folded_config, gradient_table, round_matrices
from ngpt_jax.model.loss import CHUNK, cross_entropy
from ngpt_jax.model.params import learned_scales, param_tree, unit_axes
from ngpt_jax.model.transformer import Batch, Transformer, init_params
from ngpt_jax.optim.transformations import global_norm
from ngpt_jax.parallel import rules
from ngpt_jax.projection import sphere_deviation
from ngpt_jax.training.guard import Guard, check, init_guard


class TrainState(NamedTuple):
    """Everything that changes in training. ``step`` counts consumed batches, also skipped ones."""

    step: jax.Array
    params: Any
    opt_state: Any
    guard: Guard


def init_state(config: Config, tx: optax.GradientTransformation, params: Any = None) -> TrainState:
    """The state at step 0, with parameters drawn from the seed, or with those given."""
    if params is None:
        params = init_params(config.model, jax.random.key(config.train.seed))
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), init_guard())


def summed_nats(
    config: ModelConfig, params: Any, batch: Batch, backward_table: jax.Array | None = None
) -> jax.Array:
    """The sum of -log p(target) in nats over the batch's targets, with their weights.

    ``backward_table`` is for the gradient, see :func:`cross_entropy`.
    """
    assert config.vocab_size is not None
    outputs: Any = Transformer(config).apply(
        {"params": params}, batch["inputs"], batch.get("segment_ids"), batch.get("positions"),
        method="hidden_and_table",
    )  # fmt: skip
    h, table = outputs
    targets = batch["targets"]
    weights = batch.get("weights", jnp.ones(targets.shape, jnp.float32))
    return cross_entropy(
        h, table, targets, weights, config.vocab_size, config.loss_chunk or CHUNK,
        config.kernels, fused.interpreted(), backward_table,
    )  # fmt: skip


def make_train_step(
    config: Config, tx: optax.GradientTransformationExtraArgs, schedule: optax.Schedule
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the step (state, batch) -> (state, metrics), not yet jitted.

    A batch that the guard refuses is skipped: parameters and the optimizer's state stay the same.
    Metrics are scalars: loss (nats per token) and grad_norm (before clipping), both before the
    update, learning_rate, skipped and skipped_in_row (batches so far, this one included).
    """

    def train_step(state: TrainState, batch: Batch):
        loss, grads = _loss_and_grads(config, state.params, batch)
        grad_norm = global_norm(grads)  # XLA computes it once for here and clipping
        ok, guard = check(state.guard, loss, grad_norm, config.train.spike_deviations)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, step=state.step, ok=ok)
        params = optax.apply_updates(state.params, updates)
        # jnp.where and not a product with 0, which would let NaN through.
        params = jax.tree.map(lambda new, old: jnp.where(ok, new, old), params, state.params)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step),
            "skipped": guard.skipped,
            "skipped_in_row": guard.in_row,
        }
        return TrainState(state.step + 1, params, opt_state, guard), metrics

    return train_step


def _loss_and_grads(config: Config, params: Any, batch: Batch) -> tuple[jax.Array, Any]:
    """Mean nats per token, with the batch's weights, and the gradients in the parameters' dtypes.

    With ``train.accumulate`` the batch is cut into microbatches, one at a time in memory. The mean
    is that of the whole batch, over all devices.
    """
    model, microbatches = config.model, config.train.accumulate
    dtype = jnp.promote_types(model.dtype, jnp.float32)
    tokens: Any = batch["targets"].size
    if "weights" in batch:
        tokens = jnp.maximum(jnp.sum(batch["weights"], dtype=dtype), 1)

    # Scales are multiplied in once for all microbatches, and the gradients go back through the
    # products once. On TPUs each block does it, as XLA fuses it there: 4 % fewer bytes with remat.
    network, folded, through_fold = model, params, lambda grads: (grads,)
    power = logit_power(config)
    if rules.platform() != "tpu" or power is not None:
        network = folded_config(model)
        folded, through_fold = jax.vjp(lambda params: fold(model, params, power), params)
    weights = round_matrices(network, folded)
    backward_table = None if power is None else gradient_table(model, params, power)

    def mean_nats(weights, batch):
        return summed_nats(network, weights, batch, backward_table) / tokens

    value_and_grad = jax.value_and_grad(mean_nats)

    def of_params(grads):
        (grads,) = through_fold(jax.tree.map(lambda g, w: g.astype(w.dtype), grads, folded))
        return grads

    if microbatches == 1:
        loss, grads = value_and_grad(weights, batch)
        return loss, of_params(grads)

    def cut(x):  # (B, T) -> (microbatches, B / microbatches, T), each with rows of every device
        parts = jnp.moveaxis(x.reshape(-1, microbatches, x.shape[1]), 1, 0)
        return rules.constrain(parts, None, "batch", "length")

    def add(total, microbatch):
        out = value_and_grad(weights, microbatch)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, out), None

    def zero(w, p):
        return rules.lay_out(jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32)), p.axes)

    zeros = jnp.zeros((), dtype), jax.tree.map(zero, folded, param_tree(network))
    (loss, grads), _ = jax.lax.scan(add, zeros, jax.tree.map(cut, batch))
    return loss, of_params(grads)


def logit_power(config: Config) -> float | None:
    """The exponent of the preconditioned gradient of the logits; None for the plain gradient."""
    o = config.optimizer
    return o.logit_power if o.logit_gradient == "preconditioned" else None


def summarize_params(config: ModelConfig, params: Any) -> dict[str, jax.Array]:
    """Scalars of the parameters that are logged; none for GPT.

    sphere_deviation, with ``weights=sphere``: the largest deviation of a vector's norm from 1.
    mean_NAME, for each learned scale: the mean of its effective values, for alphas of the steps.
    """
    out = {}
    if config.weights == "sphere":
        off = jax.tree.leaves(sphere_deviation(params, unit_axes(config)))
        out["sphere_deviation"] = jnp.max(jnp.stack(off))
    for name, values in learned_scales(config, params, sphere.promote):
        out[f"mean_{name}"] = jnp.mean(values)
    return out
