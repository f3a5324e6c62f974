"""The PyTorch models of tests/compare_torch.py are ours: losses, and losses after steps."""

import compare_torch
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngpt_jax.model.transformer import init_params
from ngpt_jax.optim.recipes import make_optimizer
from ngpt_jax.training.guard import init_guard
from ngpt_jax.training.step import TrainState, make_train_step

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("kind", compare_torch.KINDS)
def test_both_make_the_same_losses(tiny, kind, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    fields = {"kind": kind, "width": 32, "heads": 4, "vocab_size": 60}
    optimizer = {"optimizer.learning_rate": 1e-2, "optimizer.warmup_steps": 0, "train.steps": 20}
    config = tiny(**{f"model.{name}": x for name, x in fields.items()} | optimizer)
    start = compare_torch.our_start(config, steps=6)
    theirs = compare_torch.torch_trainer(kind, start, config.model.layers, config.model.heads)
    tx, schedule = make_optimizer(config)
    params = init_params(config.model, jax.random.key(config.train.seed))
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), init_guard())
    step = jax.jit(make_train_step(config, tx, schedule))
    batch = {name: start[name] for name in ("inputs", "targets")}
    losses = []
    for _ in range(6):
        state, metrics = step(state, batch)
        losses.append((float(metrics["loss"]), theirs()))
    np.testing.assert_allclose(*zip(*losses), rtol=2e-5)
    assert losses[-1][0] < losses[0][0] - 0.3
