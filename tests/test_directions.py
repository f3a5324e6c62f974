"""Directions of updates: each against float64 numpy, the limits that tie them to the projection,
and inside optax, scans, ensembles and meshes."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ngpt_jax import sphere
from ngpt_jax.directions import angle_turned, cap_angle, radial_share, tangent, unit_step
from ngpt_jax.projection import keep_params_on_sphere, project_params, sphere_deviation

ROOT = Path(__file__).parents[1]
AXES = [-1, (0, -2), (0, 1, 2)]
ROUNDING = {"float32": 1e-6, "bfloat16": 2.0**-7, "float64": 1e-14}
MAKE = {
    "tangent": tangent,
    "unit_step": functools.partial(unit_step, length=0.3),
    "cap_angle": functools.partial(cap_angle, max_angle=0.2),
}


def normal(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def f64(x):
    return np.asarray(x).astype(np.complex128 if jnp.iscomplexobj(x) else np.float64)


def dot(a, b, axis):
    return np.sum((np.conj(a) * b).real, axis, keepdims=True)


def norm(x, axis):
    return np.sqrt(dot(x, x, axis))


def edited(tx, params, updates, **extra):
    """The updates, as compiled."""
    tx = optax.with_extra_args_support(tx)
    state = tx.init(params)
    return jax.jit(lambda u, s, p: tx.update(u, s, p, **extra)[0])(updates, state, params)


def bits(x):
    return np.asarray(x).view(f"u{x.dtype.itemsize}")


# In float64, by the formulas of the docstrings.


def plain_tangent(w, u, axis):
    return u - dot(w, u, axis) / dot(w, w, axis) * w


def plain_unit_step(w, u, axis, length=0.3):
    return length * norm(w, axis) * u / norm(u, axis)


def plain_cap_angle(w, u, axis, theta=0.2):
    t, size = plain_tangent(w, u, axis), norm(w, axis)
    phi = np.arctan2(norm(t, axis), dot(w, w + u, axis) / size)
    to = size * (np.cos(theta) * w / size + np.sin(theta) * t / norm(t, axis))
    return np.where(phi <= theta, u, to - w)


PLAIN = {"tangent": plain_tangent, "unit_step": plain_unit_step, "cap_angle": plain_cap_angle}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [*ROUNDING, "complex64"])
@pytest.mark.parametrize("name", MAKE)
def test_against_the_formula(name, dtype, axis):
    """Vectors of many sizes, on no sphere, whose updates are above and below the cap."""
    with jax.enable_x64(True):
        w, u = normal(4, 5, 6), normal(4, 5, 6, seed=1) * np.linspace(0.02, 0.5, 6)
        w = (w + (1j * w[::-1] if dtype == "complex64" else 0)).astype(dtype)
        u = (u + (1j * u[:, ::-1] if dtype == "complex64" else 0)).astype(dtype)
        out = edited(MAKE[name](axis), w, u)
    assert out.dtype == dtype
    expected = PLAIN[name](f64(w), f64(u), axis)
    tolerance = ROUNDING.get(dtype, 1e-6) * norm(expected, axis).max()
    np.testing.assert_allclose(f64(out), expected, rtol=0, atol=2 * tolerance)


@pytest.mark.parametrize("name", MAKE)
def test_vectors_of_every_size(name):
    """25 pairs of a size of the parameter and one of the update."""
    sizes = np.array([1e-33, 1e-20, 1.0, 1e20, 1e37])
    w, u = np.repeat(sizes, 5) * f64(normal(6, 25)), np.tile(sizes, 5) * f64(normal(6, 25, seed=1))
    w, u = jnp.asarray(w, jnp.float32), jnp.asarray(u, jnp.float32)
    out = f64(edited(MAKE[name](0), w, u))
    expected = PLAIN[name](f64(w), f64(u), 0)
    small = np.finfo(np.float32).tiny  # devices may take smaller numbers for zero
    off = np.abs(out - expected).max(0)
    assert (off < 3e-6 * np.abs(expected).max(0) + small).all()


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_diverged_update_is_not_hidden(name, bad):
    out = edited(MAKE[name](0), jnp.eye(3), jnp.eye(3)[::-1].at[1, 0].set(bad))
    assert not np.isfinite(out[:, 0]).all()
    assert np.isfinite(out[:, 1:]).all()


@pytest.mark.parametrize("name", MAKE)
def test_zero_vectors_and_zero_updates(name):
    w, u = jnp.array([[3.0, 0, 0], [4, 0, 0]]), jnp.array([[0, 0, 1.0], [0, 0, 2]])
    expected = [[0, 0, 0 if name == "unit_step" else 1], [0, 0, 0 if name == "unit_step" else 2]]
    np.testing.assert_array_equal(edited(MAKE[name](0), w, u), expected)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("absent", [None, optax.MaskedNode()])
def test_absent_leaves_and_leaves_left_alone_pass(name, absent):
    params = {"w": normal(4, 3), "b": normal(3), "none": absent, "frozen": normal(4, 3)}
    updates = {**params, "frozen": absent, "w": normal(4, 3, seed=1)}
    tx = MAKE[name]({"w": 0, "b": None, "none": 0, "frozen": 1})
    out, _ = tx.update(updates, tx.init(params), params)
    assert out["none"] is absent and out["frozen"] is absent and out["b"] is params["b"]
    assert not np.array_equal(out["w"], updates["w"])


@pytest.mark.parametrize("name", MAKE)
def test_updates_keep_their_dtype(name):
    """Updates in float32 for parameters in bfloat16 keep their digits."""
    w, u = normal(64, 3, dtype="bfloat16"), normal(64, 3, seed=1)
    out = edited(MAKE[name](0), w, u)
    assert out.dtype == jnp.float32
    expected = PLAIN[name](f64(w), f64(u), 0)
    np.testing.assert_allclose(out, expected, atol=2e-6 * norm(expected, 0).max())
    with jax.numpy_dtype_promotion("strict"):
        MAKE[name](0).update(u, MAKE[name](0).init(w), w)


@pytest.mark.parametrize("name", MAKE)
def test_wrong_use_is_refused(name):
    tx = MAKE[name]({"w": 0})
    with pytest.raises(ValueError, match=f"{name} needs the parameters"):
        tx.update({"w": normal(2)}, tx.init({"w": normal(2)}))
    with pytest.raises(ValueError, match="axes must have the structure of params"):
        tx.init({"v": normal(2)})


# Each one's own


def test_a_tangent_update_is_tangent_to_rounding():
    """Also where little is left of the update."""
    w = normal(256, 8)
    u = 3 * w + 1e-3 * normal(256, 8, seed=1)
    t = f64(edited(tangent(0), w, u))
    cosine = dot(f64(w), t, 0) / norm(f64(w), 0) / norm(t, 0)
    assert np.abs(cosine).max() < 1e-6


@pytest.mark.parametrize("length", [-1.0, np.float32(-0.1), "1", 1j, None])
def test_wrong_lengths(length):
    with pytest.raises((TypeError, ValueError), match="length must"):
        unit_step(0, length)


@pytest.mark.parametrize("angle", [-0.1, np.nan, np.inf, 30.0, jnp.float32(-1), "1", None])
def test_wrong_angles(angle):
    with pytest.raises((TypeError, ValueError), match="max_angle must"):
        cap_angle(0, angle)


def test_a_schedule_without_an_angle_is_not_hidden():
    out = edited(cap_angle(0, lambda step: step - 1.0), jnp.eye(2), jnp.eye(2)[::-1], step=0)
    assert np.isnan(out).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_below_the_cap_each_bit_stays(dtype):
    w = normal(16, 8, dtype=dtype)
    u = (normal(16, 8, seed=1) * np.geomspace(1e-4, 10, 8)).astype(dtype)
    out = edited(cap_angle(0, 0.3), w, u)
    t = plain_tangent(f64(w), f64(u), 0)
    phi = np.arctan2(norm(t, 0), dot(f64(w), f64(w) + f64(u), 0) / norm(f64(w), 0))[0]
    below = phi < 0.3
    assert 2 <= below.sum() <= 6
    np.testing.assert_array_equal(bits(out)[:, below], bits(u)[:, below])
    turned = angle_turned(f64(w), f64(w) + f64(out), 0).largest
    assert abs(float(turned) - 0.3) < ROUNDING[dtype]


@pytest.mark.parametrize("angle", [np.pi, np.float32(np.pi)])
def test_a_cap_at_pi_is_none(angle):
    w, u = normal(16, 8), 10 * normal(16, 8, seed=1)
    u = u.at[:, 0].set(-3 * w[:, 0]).at[2, 1].set(np.inf).at[3, 2].set(np.nan)
    np.testing.assert_array_equal(bits(edited(cap_angle(0, angle), w, u)), bits(u))


def test_a_cap_at_zero_turns_nothing():
    w = project_params(normal(16, 8), 0)
    out = edited(optax.chain(cap_angle(0, 0.0), keep_params_on_sphere(0)), w, normal(16, 8))
    np.testing.assert_allclose(out, 0, atol=1e-7)


@pytest.mark.parametrize("angle", [0.0, 0.2, 2.0])
@pytest.mark.parametrize("share", [0.5, -0.5, -1.0, -1.5, -3.0])
def test_radial_candidates_stay_on_their_line(share, angle):
    """No 0 / 0. One that went through zero stays where it is, whatever the cosine's sign."""
    w = jnp.array([[0.0, 3], [1, 0], [0, 4]])
    out = edited(cap_angle(0, angle), w, share * w)
    crossed = share < -1
    limit = np.zeros_like(w) if crossed else share * w
    if share == -1:  # the angle to zero is atan2(0, 0) = 0
        limit = -w
    np.testing.assert_array_equal(out, limit)


@pytest.mark.parametrize("share", [-2.0, -3.0, -1e3])
def test_what_rounding_leaves_of_a_radial_update_turns_nothing(share):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), jnp.float32)
    out = edited(cap_angle(0, 0.2), w, share * w)
    np.testing.assert_array_equal(out, np.zeros_like(w))


@pytest.mark.parametrize("bad", [np.ones((2, 1, 1)), np.ones((3, 1)), np.ones(3)])
def test_numbers_of_vectors_have_their_shape(bad):
    w, u = jnp.ones((3, 4)), jnp.eye(3, 4)
    for name, tx in (
        ("length", unit_step(0, bad)),
        ("max_angle", cap_angle(0, bad)),
        ("shares", keep_params_on_sphere(0, mode="brake", shares=(bad, 1.0))),
    ):
        with pytest.raises(ValueError, match=f"{name} must broadcast against the norms with kept"):
            edited(tx, w, u)
    good = np.linspace(0.1, 0.4, 4)[None]
    turned = angle_turned(w, w + edited(cap_angle(0, good), w, 9 * u), 0)
    assert turned.largest <= 0.4 + 1e-6


def test_steps_of_the_schedule():
    """Without ``step`` the state counts, with it the state stays as it was."""
    w, u = jnp.eye(2), 3 * jnp.eye(2)[::-1]
    tx = cap_angle(0, lambda step: 0.1 * (step + 1))
    state = tx.init(w)

    def turned(**extra):
        nonlocal state
        out, state = tx.update(u, state, w, **extra)
        return float(angle_turned(w, w + out, 0).largest)

    assert [turned() for _ in range(3)] == pytest.approx([0.1, 0.2, 0.3], abs=1e-6)
    assert turned(step=jnp.int32(6), ok=True) == pytest.approx(0.7, abs=1e-6)
    assert state.count == 3
    chained = optax.chain(optax.scale(1.0), tx)
    out, _ = chained.update(u, chained.init(w), w, step=2)
    assert float(angle_turned(w, w + out, 0).mean) == pytest.approx(0.3, abs=1e-6)
    assert cap_angle(0, 0.1).init(w) == optax.EmptyState()


# Limits that tie them together


@pytest.mark.parametrize("radius", [1.0, 2.5])
@pytest.mark.parametrize("axis", [0, (0, 1)])
@pytest.mark.parametrize("angle", [1e-4, 0.05, 0.7, 1.5])
@pytest.mark.parametrize("retraction", ["normalize", "exp"])
def test_a_tangent_unit_step_turns_by_its_angle(retraction, angle, axis, radius):
    """Of length tan(a), or of length a along the great circle; the rate is 1."""
    w = project_params(normal(16, 8), axis, radius)
    tx = optax.chain(
        tangent(axis),
        unit_step(axis, np.tan(angle) if retraction == "normalize" else angle),
        keep_params_on_sphere(axis, radius, retraction=retraction),
    )
    new = w + edited(tx, w, normal(16, 8, seed=1))
    turned = angle_turned(f64(w), f64(new), axis)
    assert float(turned.largest) == pytest.approx(angle, rel=1e-5, abs=3e-7)
    assert float(turned.mean) == pytest.approx(angle, rel=1e-5, abs=3e-7)
    assert sphere_deviation(new, axis, radius) < 1e-6


def test_several_axes_initial_radius_and_unit_step_are_adamh():
    """W <- R n(W - lr R n(u)), with n that divides by the Frobenius norm."""
    start, rate = {"a": normal(6, 5), "b": 3 * normal(5, 4, seed=1)}, 0.03
    adam = optax.scale_by_adam()
    axes = {"a": (0, 1), "b": (0, 1)}
    tx = optax.chain(
        adam, unit_step(axes), optax.scale(-rate), keep_params_on_sphere(axes, "initial")
    )

    def n(x):
        return x / jnp.linalg.norm(x)

    def adamh(w, u, size):
        return size * n(w - rate * size * n(u))

    params = plain = start
    sizes = jax.tree.map(jnp.linalg.norm, start)
    state, plain_state = tx.init(start), adam.init(start)
    update = jax.jit(tx.update)
    for _ in range(20):
        updates, state = update(jax.tree.map(jnp.sin, params), state, params)
        params = optax.apply_updates(params, updates)
        u, plain_state = adam.update(jax.tree.map(jnp.sin, plain), plain_state)
        plain = jax.tree.map(adamh, plain, u, sizes)
    for a, b, before in zip(*map(jax.tree.leaves, (params, plain, start)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert np.abs(a - before).max() > 0.1


# Metrics


@pytest.mark.parametrize("axis", AXES)
def test_metrics_against_numpy(axis):
    w, u = normal(4, 5, 6), normal(4, 5, 6, seed=1)
    params, updates = {"w": w, "b": w[0], "none": None}, {"w": u, "b": u[0], "none": None}
    axes = {"w": axis, "b": None, "none": 0}
    after = optax.apply_updates(params, updates)
    a, b = f64(w), f64(after["w"])
    angles = np.arccos(dot(a, b, axis) / norm(a, axis) / norm(b, axis))
    turned = jax.jit(lambda p, q: angle_turned(p, q, axes))(params, after)
    assert turned.largest == {"w": pytest.approx(angles.max(), abs=1e-5), "b": None, "none": None}
    assert turned.mean["w"] == pytest.approx(angles.mean(), abs=1e-5)
    radial = np.sum(np.square(dot(a, f64(u), axis) / norm(a, axis)))
    share = jax.jit(lambda u, p: radial_share(u, p, axes))(updates, params)
    expected = radial / np.sum(np.square(f64(u)))
    assert share == {"w": pytest.approx(expected, rel=1e-5), "b": None, "none": None}


def test_metrics_at_their_ends():
    w = normal(16, 4)
    assert angle_turned(w, 3 * w, 0).largest < 1e-6
    assert angle_turned(w, -w, 0).mean == pytest.approx(np.pi, abs=1e-6)
    tiny = w + 1e-6 * edited(tangent(0), w, normal(16, 4, seed=1)) / 4
    assert 1e-8 < angle_turned(w.astype("float32"), tiny, 0).largest < 1e-5
    zero = jnp.zeros_like(w)
    assert angle_turned(w, zero, 0).largest == pytest.approx(np.pi / 2)
    assert angle_turned(zero, zero, 0).largest == 0
    assert radial_share(zero, w, 0) == 0 and radial_share(w, zero, 0) == 0
    assert radial_share(-2 * w, w, 0) == pytest.approx(1)
    assert radial_share(edited(tangent(0), w, normal(16, 4, seed=1)), w, 0) < 1e-12
    size = np.float32(10.0) ** np.arange(-30, 10, 12)  # the largest vector decides
    expected = float(radial_share(w[:, 3:], w[:, 3:] + 1, 0))
    assert radial_share(1e29 * w * size, w + 1, 0) == pytest.approx(expected, rel=1e-5)
    assert np.isnan(radial_share(w.at[0, 0].set(np.nan), w, 0))


# Transformations of jax and optax

X = np.random.default_rng(3).standard_normal((32, 6)).astype(np.float32)
KERNEL = np.random.default_rng(4).standard_normal((6, 4)).astype(np.float32)
Y = 3 * X @ (KERNEL / np.linalg.norm(KERNEL, axis=0)) + 1
TREE = {"kernel": 0, "scale": None, "bias": None}
ONLY = {"kernel": True, "scale": False, "bias": False}
LABELS = {"kernel": "sphere", "scale": "flat", "bias": "flat"}


def whole(rate=0.1, angle=0.25, radius=1.0, length=None):
    """The order of the module's docstring."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        tangent(TREE),
        optax.scale_by_adam(),
        tangent(TREE),
        *([] if length is None else [unit_step(TREE, length)]),
        optax.scale_by_learning_rate(rate),
        cap_angle(TREE, angle),
        keep_params_on_sphere(TREE, radius),
    )


def edits(which):
    return optax.chain(
        tangent(which), unit_step(which), cap_angle(which, 0.2),
        keep_params_on_sphere(which, "initial"),
    )  # fmt: skip


OPTIMIZERS = {
    "chain": whole(),
    "unit": whole(length=1.0, angle=optax.linear_schedule(0.25, 0.2, 40)),
    "masked": optax.chain(optax.adam(0.1), optax.masked(edits(TREE), ONLY)),
    "partition": optax.partition(
        {
            "sphere": optax.chain(
                optax.sgd(0.5), edits(lambda params: jax.tree.map(lambda p: 0, params))
            ),
            "flat": optax.sgd(0.1),
        },
        LABELS,
    ),
    "multi_steps": optax.MultiSteps(
        optax.chain(optax.adam(0.15), edits(TREE)), every_k_schedule=2
    ).gradient_transformation(),
    "inject_hyperparams": optax.inject_hyperparams(whole)(
        0.1, angle=optax.constant_schedule(0.25), radius=1.0, length=1.0
    ),
}


@functools.cache
def trained(name):
    """Losses, and the parameters before and after each of 40 steps, in a scan."""
    tx = OPTIMIZERS[name]

    def loss(params):
        return jnp.mean((X @ params["kernel"] * params["scale"] + params["bias"] - Y) ** 2)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), (value, params)

    params = {"kernel": normal(6, 4), "scale": jnp.ones(4), "bias": jnp.zeros(4)}
    params = project_params(params, TREE)
    run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=40))
    _, (losses, history) = run(params)
    return losses, history


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_with_optax(name):
    """Loss falls, kernel columns keep their norm and turn no further than the cap."""
    losses, history = trained(name)
    assert losses[-1] < 0.5 * losses[0]
    kernel = f64(history["kernel"])
    assert np.abs(norm(kernel, 1) - 1).max() < 1e-6
    turned = angle_turned(kernel[:-1], kernel[1:], 1).largest
    assert 0.01 < turned < 0.25 + 1e-5
    assert np.abs(f64(history["bias"])[-1]).max() > 0.1


def test_optax_maps_over_the_parameters_of_the_state():
    tx, params = whole(angle=lambda step: 0.1, radius="initial"), dict.fromkeys(TREE, KERNEL)
    names = optax.tree.map_params(
        tx, lambda x, name: name, tx.init(params), {k: k for k in TREE},
        transform_non_params=lambda _: None,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )  # fmt: skip
    assert names[2].mu == names[-1].norms == {k: k for k in TREE}
    assert names[5].count is None


def test_donated_buffers():
    tx = whole(radius="initial")

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = project_params({k: jnp.asarray(KERNEL) for k in TREE}, TREE)
    grads = jax.tree.map(jnp.sin, params)
    expected, _ = step.__wrapped__(grads, tx.init(params), params)
    state = tx.init(params)
    old = params["kernel"], state[-1].norms["kernel"]
    params, state = step(grads, state, params)
    assert old[0].is_deleted() and old[1].is_deleted()
    np.testing.assert_allclose(state[-1].norms["kernel"], 1, atol=1e-6)
    np.testing.assert_allclose(params["kernel"], expected["kernel"], atol=1e-6)


def test_an_ensemble_under_vmap():
    """Axes counted from behind mean the same for one model and for a stack of them."""
    tx = optax.chain(tangent(-2), unit_step(-2), cap_angle(-2, 0.1), keep_params_on_sphere(-2, 2.0))
    w, u = project_params(normal(3, 6, 4), -2, 2.0), normal(3, 6, 4, seed=1)

    @jax.jit
    def step(w, u):
        return w + tx.update(u, tx.init(w), w)[0]

    each = jnp.stack([step(a, b) for a, b in zip(w, u)])
    np.testing.assert_allclose(jax.vmap(step)(w, u), each, atol=1e-6)
    np.testing.assert_allclose(step(w, u), each, atol=1e-6)


# Eight devices, in a process of its own

SHARDING = """
import json, re
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from ngpt_jax.directions import angle_turned, cap_angle, radial_share, tangent, unit_step
from ngpt_jax.projection import keep_params_on_sphere, project_params

jax.config.update("jax_num_cpu_devices", 8)

def make(axis_name=None, retraction="normalize"):
    return optax.chain(
        tangent(1, axis_name), unit_step(1, 0.5, axis_name), cap_angle(1, 0.4, axis_name),
        keep_params_on_sphere(1, "initial", axis_name, retraction=retraction),
    )

tx = make()
brake = keep_params_on_sphere(1, mode="brake", shares=(0.25, 0.5))
ball = keep_params_on_sphere(1, np.full((4, 1, 6), 2.5, np.float32), mode="ball")
others = brake, ball, keep_params_on_sphere(1, 3.0, retraction="exp")

def step(w, u):
    state = tx.init(w)
    new, _ = tx.update(u, state, w)
    more = [t.update(u, t.init(w), w)[0] for t in others]
    return state[-1].norms, (new, *more), (angle_turned(w, w + new, 1), radial_share(u, w, 1))

w = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8, 6)), jnp.float32)
u = w[::-1, ::-1]
expected = jax.jit(step)(w, u)
collective = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"

def far(a, b):
    return max(float(np.abs(np.float64(x) - np.float64(y)).max())
               for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))

out = {}
for mode in ("Auto", "Explicit"):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType[mode],) * 2)
    for name, spec in {"uncut": P("x", None, "y"), "cut": P(None, "x", "y")}.items():
        sharding = NamedSharding(mesh, spec)
        put = jax.device_put((w, u), sharding)
        # The metrics alone add what lies on other devices.
        parts = 3 if name == "cut" else 2
        compiled = jax.jit(lambda w, u: step(w, u)[:parts]).lower(*put).compile()
        norms, updates, *_ = found = compiled(*put)
        spec = P(*(None if i == 1 else e for i, e in enumerate(spec)))
        out[f"{mode}-{name}"] = dict(
            far=far(found, expected[:parts]),
            norms=[str(norms.dtype), norms.shape,
                   norms.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)],
            kept=all(x.sharding.is_equivalent_to(sharding, 3) for x in updates),
            types=sorted({str(jax.typeof(x)) for x in updates}),
            collectives=sorted(set(re.findall(collective, compiled.as_text()))),
        )

def inside(w, u, retraction):  # each device sees its own piece
    tx = make("x", retraction)
    state = tx.init(w)
    new, _ = tx.update(u, state, w)
    more = [t.update(u, t.init(w), w)[0] for t in (
        keep_params_on_sphere(1, axis_name="x", mode="brake", shares=(0.25, 0.5)),
        keep_params_on_sphere(1, 2.5, "x", mode="ball"),
    )]
    # The metrics of an own piece are of the columns that this device holds.
    turned, share = angle_turned(w, w + new, 1, "x"), radial_share(u, w, 1, "x")
    return state[-1].norms, (new, *more), (turned.largest[None], share[None])

mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
cut, whole = P(None, "x", "y"), P(None, None, "y")
shares = jax.jit(lambda u, w: [radial_share(u[..., i:i + 3], w[..., i:i + 3], 1) for i in (0, 3)])
for retraction in ("normalize", "exp"):
    tx = make(retraction=retraction)
    fn = lambda w, u: inside(w, u, retraction)
    norms, updates, (turned, share) = jax.jit(jax.shard_map(
        fn, mesh=mesh, in_specs=(cut, cut), out_specs=(whole, (cut,) * 3, (P("y"),) * 2)
    ))(w, u)
    plain = jax.jit(lambda w, u: step(w, u))(w, u)
    out[f"inside {retraction}"] = dict(
        far=far((norms, updates), (plain[0], plain[1][:3])),
        turned=abs(float(turned.max() - plain[2][0].largest)),
        share=float(np.abs(share - np.array(shares(u, w))).max()),
    )
print(json.dumps(out))
"""


def run_python(code):
    """The last line that a fresh interpreter prints, read as json."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    out = subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def sharded():
    return run_python(SHARDING)


@pytest.mark.parametrize("vectors", ["uncut", "cut"])
@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_sharded_params(sharded, mode, vectors):
    """No collectives unless the vectors are cut; norms are cut as the parameter's other axes."""
    result = sharded[f"{mode}-{vectors}"]
    assert result["far"] < 2e-6
    assert result["norms"] == ["float32", [4, 1, 6], True]
    assert result["kept"]
    shape = {"uncut": "4@x,8,6@y", "cut": "4,8@x,6@y"}[vectors] if mode == "Explicit" else "4,8,6"
    assert result["types"] == [f"float32[{shape}]"]
    assert result["collectives"] == ([] if vectors == "uncut" else ["all-reduce"])


@pytest.mark.parametrize("retraction", ["normalize", "exp"])
def test_vectors_cut_inside_shard_map(sharded, retraction):
    result = sharded[f"inside {retraction}"]
    assert result["far"] < 2e-6 and result["turned"] < 2e-6 and result["share"] < 2e-6


def test_the_geometry_below():
    """What is split adds up, and both parts are what they are called."""
    w, u = 1e30 * normal(8, 5), normal(8, 5, seed=1)
    parts = jax.jit(lambda w, u: sphere.split(w, u, 0))(w, u)
    total = f64(parts.radial * parts.direction + parts.tangent)
    np.testing.assert_allclose(total, f64(u), atol=1e-6)
    np.testing.assert_allclose(dot(f64(parts.direction), f64(parts.tangent), 0), 0, atol=1e-6)
    np.testing.assert_allclose(parts.norm, norm(f64(w), 0), rtol=1e-6)
    np.testing.assert_allclose(parts.square, norm(f64(parts.tangent), 0) ** 2, rtol=1e-6)
