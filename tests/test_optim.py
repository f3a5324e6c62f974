"""Schedules, groups, clipping, and the two recipes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ngpt_jax.config.fields import OptimizerConfig
from ngpt_jax.model.params import param_tree, unit_axes
from ngpt_jax.optim.recipes import make_optimizer
from ngpt_jax.optim.schedules import make_schedule
from ngpt_jax.optim.transformations import (
    clip_by_global_norm,
    global_norm,
    scale_by_adam,
    scale_by_learning_rate,
)
from ngpt_jax.projection import sphere_deviation
from ngpt_jax.training.step import init_state, make_train_step, summarize_params


def rates(steps=100, **fields):
    config = OptimizerConfig(learning_rate=2.0, **({"warmup_steps": 0} | fields))
    return np.array([float(make_schedule(config, steps)(i)) for i in range(steps + 1)])


def test_cosine_equals_optax():
    ours = rates(warmup_steps=10, final_fraction=0.1)
    theirs = optax.warmup_cosine_decay_schedule(0.0, 2.0, 10, 100, 0.2)
    np.testing.assert_allclose(ours, [float(theirs(i)) for i in range(101)], atol=1e-6)


def test_without_warmup_the_first_step_has_the_peak_rate():
    assert rates()[0] == 2.0
    assert rates(warmup_steps=4)[:5].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_wsd_is_stable_then_falls_linearly():
    r = rates(schedule="wsd", decay_fraction=0.2)
    assert np.all(r[:81] == 2.0)
    np.testing.assert_allclose(np.diff(r[80:]), -0.1, atol=1e-6)
    assert r[-1] == 0.0


@pytest.mark.parametrize("schedule", ["wsd", "wsd_sqrt"])
def test_a_decay_begins_when_the_warm_up_has_ended(schedule):
    """However long it is: the rate rises to its peak and falls to the end, without a jump."""
    r = rates(schedule=schedule, decay_fraction=0.9, warmup_steps=50)
    top = int(np.argmax(r))
    assert top == 50 and r[50] == 2.0
    assert np.all(np.diff(r[:51]) > 0) and np.all(np.diff(r[50:]) < 0) and r[-1] < 0.2


def test_wsd_sqrt_falls_by_the_root_of_the_progress():
    r = rates(schedule="wsd_sqrt", decay_fraction=0.2, final_fraction=0.1)
    assert np.all(r[:81] == 2.0)
    np.testing.assert_allclose(r[80:], 0.2 + 1.8 * (1 - np.sqrt(np.arange(21) / 20)), atol=1e-6)


@pytest.mark.parametrize("rho", [0.01, 0.1, 1e3])
def test_log_is_the_formula(rho):
    r = rates(schedule="log", log_rho=rho, warmup_steps=20, final_fraction=0.1)
    np.testing.assert_allclose(r[:20], 2 * np.arange(20) / 20, atol=1e-6)
    progress = np.arange(81) / 80
    expected = 0.2 + 1.8 * (1 - np.log(1 + progress / rho) / np.log(1 + 1 / rho))
    np.testing.assert_allclose(r[20:], expected, atol=1e-5)
    assert r[-1] == pytest.approx(0.2, abs=1e-6)
    if rho == 1e3:  # a straight line
        np.testing.assert_allclose(r[20:], 2 - 1.8 * progress, atol=1e-3)


def test_constant():
    assert np.all(rates(schedule="constant") == 2.0)


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_clip_equals_optax_and_torch_form(factor):
    grads = {"a": factor * jnp.arange(4.0), "b": factor * jnp.ones((2, 3))}
    ours, _ = clip_by_global_norm(1.5).update(grads, optax.EmptyState())
    theirs, _ = optax.clip_by_global_norm(1.5).update(grads, optax.EmptyState())
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    torch_form, _ = clip_by_global_norm(1.5, eps=0.5).update(grads, optax.EmptyState())
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in grads.values()))
    np.testing.assert_allclose(torch_form["a"], grads["a"] * min(1, 1.5 / (norm + 0.5)), rtol=1e-6)


def test_clip_of_zero_gradients_is_zero():
    many = [jnp.ones((), jnp.bfloat16)] * 301
    np.testing.assert_allclose(global_norm(many), 301**0.5, rtol=1e-6)
    clipped, _ = clip_by_global_norm(1.0).update(jnp.zeros(3), optax.EmptyState())
    assert not np.any(clipped)


def test_adam_equals_optax_bit_for_bit_and_keeps_its_state_where_told():
    rng = np.random.default_rng(0)
    params = {"a": jnp.zeros((5, 3)), "b": jnp.zeros(4, jnp.bfloat16)}
    ours, theirs = scale_by_adam(0.9, 0.95, 1e-8), optax.scale_by_adam(0.9, 0.95, 1e-8)
    state, their_state = ours.init(params), theirs.init(params)
    for i in range(6):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)
        if i % 2:
            nans = jax.tree.map(lambda g: g * jnp.nan, grads)
            _, state = ours.update(nans, state, ok=jnp.asarray(False))
        updates, state = ours.update(grads, state, ok=jnp.asarray(True))
        their_updates, their_state = theirs.update(grads, their_state)
        jax.tree.map(np.testing.assert_array_equal, (updates, state), (their_updates, their_state))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_the_rate_is_that_of_the_step_given(x64, dtype):
    schedule = make_schedule(OptimizerConfig(learning_rate=0.1, warmup_steps=3), 10)
    tx, theirs = scale_by_learning_rate(schedule), optax.scale_by_learning_rate(schedule)
    updates = {"w": jnp.arange(4, dtype=dtype)}
    state = theirs.init(updates)
    for step in range(10):
        ours, nothing = tx.update(updates, tx.init(updates), step=jnp.int32(step))
        expected, state = theirs.update(updates, state)
        assert ours["w"].dtype == dtype and nothing == optax.EmptyState()
        np.testing.assert_array_equal(ours["w"], expected["w"])
        if dtype == "float64":
            assert float(ours["w"][1]) == -float(schedule(step))
    assert schedule(jnp.int32(7)).dtype == jnp.float64


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_groups_follow_from_axis_names(tiny, kind):
    groups = jax.tree.map(lambda p: p.group, param_tree(tiny(**{"model.kind": kind}).model))
    assert groups["input_embedding"] == "input_table"
    assert groups["output_embedding"] == "output_table"
    matrices = {name for name, group in groups["layers"].items() if group == "block_matrix"}
    names = "query key value out up gate down".split()
    assert matrices == {f"{name}_kernel" for name in names}
    assert {g for n, g in groups["layers"].items() if n not in matrices} == {"vector"}


def test_weight_decay_acts_on_the_baselines_matrices_alone(tiny):
    config = tiny(**{"model.kind": "gpt", "optimizer.schedule": "constant",
                     "optimizer.warmup_steps": 0})  # fmt: skip
    tx, _ = make_optimizer(config)
    params = init_state(config, tx).params
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params, step=0)
    shrunk = jax.tree.map(lambda u: bool(np.any(u)), updates)
    assert shrunk == jax.tree.map(lambda p: p.is_matrix, param_tree(config.model))
    lr = config.optimizer.learning_rate
    np.testing.assert_allclose(
        updates["output_embedding"], -lr * 0.1 * params["output_embedding"], rtol=1e-5
    )


def batches(config, seed=0):
    rng = np.random.default_rng(seed)
    shape = (config.train.batch_size, config.model.context)
    while True:
        yield {"inputs": rng.integers(0, 60, shape), "targets": rng.integers(0, 60, shape)}


def test_every_unit_vector_stays_on_the_sphere_for_200_steps(tiny):
    config = tiny(**{"train.steps": 200, "optimizer.learning_rate": 1e-2})
    tx, schedule = make_optimizer(config)
    state = init_state(config, tx)
    step = jax.jit(make_train_step(config, tx, schedule), donate_argnums=0)
    axes = unit_axes(config.model)
    largest = jax.jit(lambda p: jnp.max(jnp.stack(jax.tree.leaves(sphere_deviation(p, axes)))))
    stream = batches(config)
    start = jax.tree.map(np.asarray, state.params)
    for _ in range(200):
        state, _ = step(state, next(stream))
        assert largest(state.params) < 1e-6
    moved = np.abs(state.params["layers"]["up_kernel"] - start["layers"]["up_kernel"])
    assert np.max(moved) > 0.1
    padding = state.params["output_embedding"][60:]
    np.testing.assert_allclose(padding, start["output_embedding"][60:], atol=1e-6)


def test_without_projection_the_vectors_leave_the_sphere(tiny):
    config = tiny(**{"optimizer.learning_rate": 1e-2, "optimizer.project": False})
    tx, schedule = make_optimizer(config)
    state, _ = jax.jit(make_train_step(config, tx, schedule))(
        init_state(config, tx), next(batches(config))
    )
    off = jax.tree.leaves(sphere_deviation(state.params, unit_axes(config.model)))
    assert min(float(jnp.max(x)) for x in off) > 1e-4


def test_summary_shows_effective_values(tiny):
    config = tiny(**{"model.s_z.init": 7.0})
    tx, _ = make_optimizer(config)
    params = init_state(config, tx).params
    summary = {k: float(v) for k, v in summarize_params(config.model, params).items()}
    assert summary.pop("sphere_deviation") < 1e-6
    assert summary == pytest.approx({
        "mean_alpha_a": 0.05, "mean_alpha_m": 0.05, "mean_s_qk": 1, "mean_s_u": 1, "mean_s_v": 1,
        "mean_s_z": 7.0,
    }, rel=1e-5)  # fmt: skip
    params["layers"]["alpha_a"] = -params["layers"]["alpha_a"]
    assert float(summarize_params(config.model, params)["mean_alpha_a"]) == pytest.approx(0.05)
    axes = unit_axes(config.model)
    params["layers"]["down_kernel"] = 1.5 * params["layers"]["down_kernel"]
    assert axes["layers"]["down_kernel"] == 2
    off = float(summarize_params(config.model, params)["sphere_deviation"])
    assert off == pytest.approx(0.5, rel=1e-5)


def test_bfloat16_parameters_stay_near_the_sphere(tiny):
    config = tiny(**{"model.param_dtype": "bfloat16", "model.dtype": "bfloat16"})
    tx, schedule = make_optimizer(config)
    state = init_state(config, tx)
    step = jax.jit(make_train_step(config, tx, schedule))
    stream = batches(config)
    for _ in range(3):
        state, metrics = step(state, next(stream))
    assert np.isfinite(metrics["loss"])
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state.params))
    assert summarize_params(config.model, state.params)["sphere_deviation"] < 2**-8
