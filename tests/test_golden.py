"""Parity with the authors' code (tests/golden/README.md), for both models, in float64."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngpt_jax.export.reference_layout import from_reference, to_reference
from ngpt_jax.model.params import unit_axes
from ngpt_jax.model.transformer import Transformer
from ngpt_jax.optim.recipes import make_optimizer
from ngpt_jax.projection import project_params
from ngpt_jax.training.guard import init_guard
from ngpt_jax.training.step import TrainState, make_train_step, summed_nats

GOLDEN = Path(__file__).parent / "golden"
KINDS, STATES = ("ngpt", "gpt"), ("init", "pert")


def load(tiny, kind, state, dtype="float64", **fields):
    golden = np.load(GOLDEN / f"a_{kind}_{state}.npz")
    golden = {name: golden[name] for name in golden.files}
    fields = {"model.vocab_multiple": 128} | fields
    config = tiny(**{
        "model.kind": kind, "model.layers": 2, "model.width": 32, "model.heads": 4,
        "model.context": 32, "model.vocab_size": 97, "model.loss_chunk": 16,
        "model.dtype": dtype, "model.param_dtype": dtype, "train.steps": 20,
        "optimizer.learning_rate": 30e-4, "optimizer.warmup_steps": 0 if kind == "ngpt" else 5,
        "optimizer.clip_eps": 1e-6, **fields,
    })  # fmt: skip
    raw = {n.removeprefix("param/"): a for n, a in golden.items() if n.startswith("param/")}
    params = from_reference({name: a.astype(dtype) for name, a in raw.items()}, config.model)
    return config, golden, jax.tree.map(jnp.asarray, params)


def tokens(array):
    return jnp.asarray(array, jnp.int32)


def forward(config, params, x):
    """Logits without padding, and the hidden states, the table's output first."""

    @jax.jit
    def run(params, x):
        return Transformer(config.model).apply({"params": params}, x, mutable="intermediates")

    logits, state = run(params, tokens(x))
    state = state["intermediates"]
    assert np.all(np.isneginf(logits[..., 97:]))
    return logits[..., :97], [state["embedded"][0], *state["layers"]["hidden"][0]]


def worst(a, b):
    return float(np.max(np.abs(np.asarray(a) - np.asarray(b))))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("multiple", [1, 128], ids=["V97", "V128"])
def test_forward_and_gradients(x64, tiny, kind, state, multiple):
    config, golden, params = load(tiny, kind, state, **{"model.vocab_multiple": multiple})
    logits, hidden = forward(config, params, golden["x"])
    assert worst(logits, golden["logits"]) < 1e-9
    assert len(hidden) == 3
    for i, h in enumerate(hidden):
        assert worst(h, golden[f"hidden/{i}"]) < 1e-9

    batch = {"inputs": tokens(golden["x"]), "targets": tokens(golden["y"])}
    loss_fn = jax.jit(
        jax.value_and_grad(lambda p: summed_nats(config.model, p, batch) / golden["y"].size)
    )
    loss, grads = loss_fn(params)
    assert worst(loss, golden["loss"]) < 1e-9
    grads = to_reference(grads, config.model)
    assert len(grads) == sum(name.startswith("grad/") for name in golden)
    for name, grad in grads.items():
        assert worst(grad, golden["grad/" + name]) < 1e-9, name


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_training_steps(x64, tiny, kind, state):
    config, golden, params = load(tiny, kind, state)
    tx, schedule = make_optimizer(config)
    params = project_params(params, unit_axes(config.model))
    run = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), init_guard())
    step = jax.jit(make_train_step(config, tx, schedule))
    for i in range(20):
        batch = {"inputs": tokens(golden["traj/x"][i]), "targets": tokens(golden["traj/y"][i])}
        run, metrics = step(run, batch)
        assert worst(metrics["loss"], golden["traj/loss"][i]) < 1e-9
        assert worst(metrics["grad_norm"], golden["traj/grad_norm"][i]) < 1e-9
        assert worst(metrics["learning_rate"], golden["traj/lr"][i]) < 1e-12
    for name, w in to_reference(run.params, config.model).items():
        if "final/" + name in golden:
            assert worst(w, golden["final/" + name]) < 1e-9, name
        else:
            assert worst(np.linalg.norm(w), golden["final_norm/" + name]) < 1e-9, name
            assert worst(w[0], golden["final_row0/" + name]) < 1e-9, name
            assert worst(w[:, 0], golden["final_col0/" + name]) < 1e-9, name


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_logits(tiny, kind, state):
    config, golden, params = load(tiny, kind, state, dtype="float32")
    logits, _ = forward(config, params, golden["x"])
    assert logits.dtype == jnp.float32
    assert worst(logits, golden["logits"]) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_reference_layout_round_trip(tiny, kind):
    config, golden, params = load(tiny, kind, "pert", dtype="float32")
    back = to_reference(params, config.model)
    for name, w in back.items():
        assert np.array_equal(w, golden["param/" + name]), name
    assert len(back) == sum(name.startswith("param/") for name in golden)
