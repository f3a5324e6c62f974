"""Steps that are skipped, weights of targets, and documents that do not see each other."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngpt_jax.model.transformer import Transformer
from ngpt_jax.optim.recipes import make_optimizer
from ngpt_jax.parallel.mesh import make_mesh
from ngpt_jax.training import layout
from ngpt_jax.training import step as step_lib
from ngpt_jax.training.guard import MIN_STEPS, check, init_guard
from ngpt_jax.training.step import init_state, make_train_step

ROOT = Path(__file__).parents[1]
VOCAB = 60  # of the tiny model


# ------------------------------------------------------------------------------- skipped steps


def batches(config, count, seed=0):
    rng = np.random.default_rng(seed)
    shape = (config.train.batch_size, config.model.context)
    draw = lambda: rng.integers(0, VOCAB, shape, np.int32)  # noqa: E731
    return [
        {"inputs": draw(), "targets": draw(), "weights": np.ones(shape, np.float32)}
        for _ in range(count)
    ]


def runner(config):
    """(step, first state): the step jitted and donating, as training has it."""
    tx, schedule = make_optimizer(config)
    step = jax.jit(make_train_step(config, tx, schedule), donate_argnums=0)
    return step, init_state(config, tx)


def on_host(state):
    return jax.tree.map(np.array, state)


def on_device(state):
    return jax.tree.map(jnp.array, state)  # a copy, which may be donated


def assert_same_bits(a, b):
    """Equal to the bit: NaN equals NaN, and 0 is not -0."""
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.tobytes(), y.tobytes()), a, b)


@pytest.fixture
def poisoned(monkeypatch):
    """Adds batch["to_loss"] to the loss, batch["to_grad"] to one entry of the gradient."""
    real = step_lib._loss_and_grads

    def loss_and_grads(config, params, batch):
        batch = dict(batch)
        to_loss, to_grad = batch.pop("to_loss"), batch.pop("to_grad")
        loss, grads = real(config, params, batch)
        grads["layers"]["up_kernel"] = grads["layers"]["up_kernel"].at[0, 1, 2].add(to_grad)
        return loss + to_loss, grads

    monkeypatch.setattr(step_lib, "_loss_and_grads", loss_and_grads)


BAD = [("to_loss", np.nan), ("to_loss", np.inf), ("to_grad", np.nan), ("to_grad", -np.inf),
       ("to_grad", 1e30)]  # fmt: skip


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_a_loss_or_gradient_that_is_not_finite_changes_nothing(tiny, poisoned, kind):
    step, state = runner(tiny(**{"model.kind": kind}))
    zero = {"to_loss": np.float32(0), "to_grad": np.float32(0)}
    good, bad, *after = (batch | zero for batch in batches(tiny(), 4))
    before = on_host(step(state, good)[0])

    # The run that never saw the batch, save that the schedule went on.
    other, rates = on_device(before._replace(step=np.int32(2))), []
    for batch in after:
        other, metrics = step(other, batch)
        rates.append(float(metrics["learning_rate"]))

    for where, what in BAD:
        state, metrics = step(on_device(before), bad | {where: np.float32(what)})
        assert not np.isfinite(metrics["loss" if where == "to_loss" else "grad_norm"]), where
        assert (metrics["skipped"], metrics["skipped_in_row"]) == (1, 1), (where, what)
        skipped = on_host(state)
        assert_same_bits(skipped[1:3], before[1:3])  # parameters; moments and Adam's count
        assert skipped.step == before.step + 1 == 2
        assert skipped.guard._replace(skipped=0, in_row=0) == before.guard
        for batch, rate in zip(after, rates, strict=True):
            state, metrics = step(state, batch)
            assert metrics["learning_rate"] == rate
            assert (metrics["skipped"], metrics["skipped_in_row"]) == (1, 0), (where, what)
        assert_same_bits(on_host(state)[:3], on_host(other)[:3])


def test_a_batch_of_nans_is_skipped_from_the_first_step_on(tiny):
    """Without any help: the weights make loss and gradients NaN."""
    config = tiny(**{"train.accumulate": 2})
    step, state = runner(config)
    first = on_host(state)
    stream = batches(config, 5)
    for i in (0, 1, 3):
        stream[i]["weights"] = np.full_like(stream[i]["weights"], np.nan)
    rows, rates = [], []
    for i, batch in enumerate(stream):
        state, metrics = step(state, batch)
        rows.append((int(metrics["skipped"]), int(metrics["skipped_in_row"])))
        rates.append(float(metrics["learning_rate"]))
        if i == 1:
            assert_same_bits(on_host(state)[1:3], first[1:3])
    assert rows == [(1, 1), (2, 2), (2, 0), (3, 1), (3, 0)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 5
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(on_host(state)))
    assert int(state.guard.accepted) == 2 and int(state.opt_state[1].count) == 2


def test_the_schedule_follows_the_step_not_the_updates_made(tiny):
    config = tiny(**{"model.kind": "gpt", "optimizer.warmup_steps": 0})
    step, first = runner(config)
    (batch,) = batches(config, 1)
    first = on_host(first)
    for steps, still in ((0, False), (config.train.steps, True)):  # cosine ends at 0
        state, metrics = step(on_device(first._replace(step=np.int32(steps))), batch)
        assert (metrics["learning_rate"] == 0) == still
        moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.params, first.params)
        assert set(jax.tree.leaves(moved)) == {not still}
        assert int(state.opt_state[1].count) == int(state.guard.accepted) == 1


# --------------------------------------------------------------------------------- spike guard


def watch(losses):
    """A sequence with spike_deviations = 6: (accepted or not of each, the guard at the end)."""

    def body(guard, loss):
        ok, guard = check(guard, loss, jnp.float32(1), 6.0)
        return guard, ok

    guard, ok = jax.lax.scan(body, init_guard(), jnp.asarray(losses, jnp.float32))
    return np.asarray(ok), on_host(guard)


def noisy(count, mean=3.0, deviation=0.02, seed=0):
    return mean + deviation * np.random.default_rng(seed).standard_normal(count)


def test_a_spike_is_refused_and_leaves_the_statistics_alone():
    losses = noisy(400)
    assert np.all(watch(losses)[0])
    for height, accepted in ((3.2, False), (3.06, True), (2.0, True)):
        spiked = np.concatenate([losses[:300], [height], losses[300:]])
        ok, guard = watch(spiked)
        assert ok[300] == accepted and np.all(np.delete(ok, 300))
        assert (guard.skipped, guard.in_row) == (int(not accepted), 0)
        if not accepted:
            assert guard._replace(skipped=0) == watch(losses)[1]
    ok, guard = watch(np.concatenate([losses, [3.2, np.nan, 3.2]]))
    assert not np.any(ok[400:]) and (guard.skipped, guard.in_row) == (3, 3)


def test_statistics_are_weighted_means_without_bias():
    losses = noisy(400, mean=11.0)
    for count in (1, 2, 50, 400):
        weights = 0.99 ** np.arange(count)[::-1]
        x = losses[:count].astype(np.float32).astype(np.float64)
        mean = np.average(x, weights=weights)
        variance = np.average((x - mean) ** 2, weights=weights)
        guard = watch(losses[:count])[1]
        assert guard.accepted == count
        np.testing.assert_allclose(guard.mean, mean, rtol=1e-6)
        np.testing.assert_allclose(guard.variance, variance, rtol=1e-4, atol=1e-12)


def test_no_spike_before_enough_steps_were_accepted():
    losses = noisy(2 * MIN_STEPS)
    for at, accepted in ((MIN_STEPS - 1, True), (MIN_STEPS, False)):
        losses[at] = 30.0
        assert watch(losses[: at + 1])[0][at] == accepted
        losses[at] = 3.0
    losses[:50] = np.nan  # these don't count
    losses[MIN_STEPS] = 30.0
    assert watch(losses)[0][MIN_STEPS]


@pytest.mark.parametrize("slope", [-1e-2, -1e-4, 1e-4, 1e-2])
def test_a_slow_drift_is_no_spike(slope):
    drift = slope * np.arange(3000)
    assert np.all(watch(30 + noisy(3000) + drift)[0])
    assert np.all(watch(40 + drift)[0])


def test_a_falling_loss_of_training_is_no_spike():
    steps = np.arange(5000)
    losses = 2.5 + 8 * (1 + steps / 20) ** -0.7 + noisy(5000, mean=0, deviation=0.05)
    assert np.all(watch(losses)[0])


@pytest.mark.parametrize("level", [1e-3, 3.0, 1e4])
def test_rounding_of_a_constant_loss_is_no_spike(level):
    losses = np.full(1000, level, np.float32)
    losses[500::50] = np.nextafter(np.float32(level), np.float32(np.inf))
    losses[900:] *= 1 + 5e-6
    assert np.all(watch(losses)[0])
    assert not watch([*losses, 1.01 * level])[0][-1]


def test_without_deviations_any_finite_loss_is_accepted():
    guard = on_device(watch(noisy(300))[1])
    ok, after = check(guard, jnp.float32(1e6), jnp.float32(1), 0.0)
    assert ok and after.in_row == 0
    assert not check(guard, jnp.float32(1e6), jnp.float32(1), 6.0)[0]
    for dtype in (jnp.bfloat16, jnp.float32):
        assert not check(guard, jnp.asarray(np.nan, dtype), jnp.asarray(1, dtype), 0.0)[0]
        assert not check(guard, jnp.asarray(1, dtype), jnp.asarray(np.inf, dtype), 0.0)[0]


def test_a_spike_is_skipped_in_training(tiny, poisoned):
    config = tiny(**{"train.spike_deviations": 6.0, "optimizer.schedule": "constant"})
    step, state = runner(config)
    state = state._replace(guard=on_device(watch(noisy(200, mean=4.1))[1]))
    before = on_host(state)
    (batch,) = batches(config, 1)
    assert before.guard.accepted == 200
    state, metrics = step(state, batch | {"to_loss": np.float32(5), "to_grad": np.float32(0)})
    assert 9 < metrics["loss"] < 10 and metrics["skipped_in_row"] == 1
    assert_same_bits(on_host(state)[1:3], before[1:3])
    state, metrics = step(state, batch | {"to_loss": np.float32(0), "to_grad": np.float32(0)})
    assert metrics["skipped"] == 1 and metrics["skipped_in_row"] == 0


# ------------------------------------------------------------------------ weights and documents


def float64(tiny, **fields):
    return tiny(**{"model.dtype": "float64", "model.param_dtype": "float64", **fields})


def loss_and_grads(config):
    return jax.jit(functools.partial(step_lib._loss_and_grads, config))


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_microbatches_share_the_mean_over_all_weights(x64, tiny, kind):
    fields = {"model.kind": kind, "train.batch_size": 8, "data.packing": "best_fit"}
    one, four = (float64(tiny, **fields, **{"train.accumulate": n}) for n in (1, 4))
    params = init_state(one, make_optimizer(one)[0]).params
    rng = np.random.default_rng(1)
    (batch,) = batches(one, 1)
    # Each microbatch with another sum of weights.
    weights = rng.random((8, 16)) * rng.integers(0, 2, (8, 1)) * rng.integers(0, 2, (8, 16))
    batch["weights"] = weights.astype(np.float32)
    a, b = (loss_and_grads(config)(params, batch) for config in (one, four))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype == jnp.float64
        np.testing.assert_allclose(x, y, atol=1e-12, rtol=0)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_loss_is_the_weighted_mean(x64, tiny, accumulate):
    config = float64(tiny, **{"train.accumulate": accumulate})
    params = init_state(config, make_optimizer(config)[0]).params
    (batch,) = batches(config, 1)
    shape = batch["targets"].shape
    logits = Transformer(config.model).apply({"params": params}, batch["inputs"])
    nats = -np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), batch["targets"][..., None], -1
    )[..., 0]
    plain = {"inputs": batch["inputs"], "targets": batch["targets"]}
    run = loss_and_grads(config)
    assert float(run(params, plain)[0]) == pytest.approx(nats.mean(), abs=1e-12)
    half = np.where(np.arange(16) < 8, np.float32(0.5), 0) * np.ones(shape, np.float32)
    for weights, expected in (
        (np.ones(shape), nats.mean()),
        (half, nats[:, :8].mean()),
        (half / 64, nats[:, :8].sum() / 128),  # less than one target in all: no mean of so little
        (np.zeros(shape), 0),
    ):
        loss, grads = run(params, plain | {"weights": weights.astype(np.float32)})
        assert float(loss) == pytest.approx(expected, abs=1e-12)
        assert all(np.any(g) == bool(expected) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_documents_of_a_window_are_as_if_alone(x64, tiny, kind):
    """Wherever they lie in it: their positions start anew. s_qk differs from channel to channel."""
    config = float64(tiny, **{"model.kind": kind, "train.batch_size": 1})
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda p: p * (1 + 0.1 * rng.standard_normal(p.shape)),
        init_state(config, make_optimizer(config)[0]).params,
    )
    documents = [rng.integers(0, VOCAB, n) for n in (8, 6)]

    def window(*documents, start=0, padding=0, masked=True, running=False):
        batch = {name: np.full((1, 16), padding, np.int32) for name in ("inputs", "targets")}
        batch["segment_ids"] = np.zeros((1, 16), np.int32)  # of padding
        batch["positions"] = np.zeros((1, 16), np.int32)
        batch["weights"], at = np.zeros((1, 16), np.float32), start
        for number, tokens in enumerate(documents, start=1):
            here = slice(at, at := at + len(tokens) - 1)
            batch["inputs"][0, here], batch["targets"][0, here] = tokens[:-1], tokens[1:]
            batch["segment_ids"][0, here], batch["weights"][0, here] = number, 1
            batch["positions"][0, here] = np.arange(len(tokens) - 1)
        if not masked:
            del batch["segment_ids"]
        if running:
            del batch["positions"]
        return batch

    run = loss_and_grads(config)

    def sums(batch):
        """Of nats and their gradients."""
        return jax.tree.map(lambda x: batch["weights"].sum() * x, run(params, batch))

    together = sums(window(*documents))
    alone = [sums(window(document)) for document in documents]
    assert_close(together, jax.tree.map(jnp.add, *alone), atol=1e-10)
    assert_close(sums(window(*documents, padding=7)), together, atol=1e-10)
    assert_close(sums(window(documents[1], start=7)), alone[1], atol=1e-10)
    # Without the mask the second sees the first, and the padding before it.
    assert abs(sums(window(*documents, masked=False))[0] - together[0]) > 1e-5
    assert abs(sums(window(documents[1], start=7, masked=False))[0] - alone[1][0]) > 1e-5
    # Positions that run on count in nGPT alone, whose s_qk scales rotated channels.
    moved = abs(sums(window(documents[1], start=7, running=True))[0] - alone[1][0])
    assert moved > 1e-9 if kind == "ngpt" else moved < 1e-10


def assert_close(a, b, atol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol, rtol=0)


def test_the_batch_has_what_the_config_asks_for(tiny):
    for fields, more in (
        ({}, {}),
        ({"data.mask_documents": True}, {"segment_ids": "int32", "positions": "int32"}),
        ({"data.packing": "best_fit"}, {"weights": "float32"}),
        ({"data.packing": "best_fit", "data.mask_documents": True},
         {"weights": "float32", "segment_ids": "int32", "positions": "int32"}),
    ):  # fmt: skip
        config = tiny(**fields)
        batch = layout.abstract_batch(config, make_mesh(config, jax.devices()[:1]))
        expected = {"inputs": "int32", "targets": "int32"} | more
        assert {name: str(x.dtype) for name, x in batch.items()} == expected
        assert {x.shape for x in batch.values()} == {(4, 16)}


ON_A_MESH = """
import json, sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
from ngpt_jax.config import default_config, from_config_dict
from ngpt_jax.optim.recipes import make_optimizer
from ngpt_jax.parallel.mesh import BatchPlacer, make_mesh
from ngpt_jax.training import layout

def train(devices, accumulate, **mesh):
    v = default_config()
    v.model.update(layers=2, width=16, heads=2, context=16, vocab_size=60, loss_chunk=16,
                   dtype="float64", param_dtype="float64")
    v.data.update(packing="best_fit", mask_documents=True)
    v.train.update(steps=6, batch_size=8, accumulate=accumulate)
    v.mesh.update(**mesh)
    config = from_config_dict(v)
    mesh = make_mesh(config, jax.devices()[:devices])
    config, _ = layout.for_mesh(config, mesh)
    step = layout.lower_train_step(config, mesh).compile()
    state = layout.first_state(config, make_optimizer(config)[0], mesh)
    placer = BatchPlacer(mesh, 8, 16)
    rng, rows = np.random.default_rng(0), []
    for i in range(6):
        batch = {name: rng.integers(0, 60, (8, 16), np.int32) for name in ("inputs", "targets")}
        batch["segment_ids"] = np.cumsum(rng.random((8, 16)) < 0.2, axis=1, dtype=np.int32)
        batch["positions"] = rng.integers(0, 16, (8, 16), np.int32)
        lengths = rng.integers(1, 17, (8, 1))  # no two rows, and no two devices, have as much
        batch["weights"] = (np.arange(16) < lengths).astype(np.float32)
        if i == 2:
            batch["weights"][5, 3] = np.nan  # on one of the devices
        state, metrics = step(state, placer(batch))
        rows.append([float(metrics[n]) for n in ("loss", "grad_norm", "skipped_in_row")])
    assert int(state.guard.accepted) == 5 and int(state.step) == 6
    return rows, jax.tree.map(np.asarray, state.params)

(a, p), (b, q) = train(1, 1, fsdp=1), train(4, 2, fsdp=2, context=2)
worst = max(float(np.max(np.abs(x - y))) for x, y in zip(*map(jax.tree.leaves, (p, q))))
print(json.dumps([a, b, worst]))
"""


@pytest.mark.slow
def test_weights_count_over_the_whole_mesh():
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MESH],
        cwd=ROOT, env=os.environ, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    a, b, worst = json.loads(done.stdout)
    np.testing.assert_allclose(a, b, atol=1e-12, rtol=0)
    assert [row[2] for row in a] == [0, 0, 1, 0, 0, 0]
    assert worst < 1e-11
