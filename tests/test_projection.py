"""The optax transformation, alone and inside optax, Flax, scans and meshes."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ngpt_jax import sphere
from ngpt_jax.projection import keep_params_on_sphere, project_params, sphere_deviation

ROOT = Path(__file__).parents[1]
TOLERANCE = {"float32": 1e-6, "bfloat16": 2.0**-8, "float64": 1e-14}
property_test = settings(max_examples=60, deadline=None, derandomize=True)


def normal(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def f64(x):
    return np.asarray(x).astype(np.float64)


def norms(x, axis):
    return np.sqrt(np.sum(np.square(f64(x)), axis=axis))


def off_sphere(x, axis, radius=1.0):
    """The largest distance of a vector's norm from the radius, in float64 numpy."""
    return np.abs(norms(x, axis) - radius).max()


def one_step(params, axes, updates, radius=1.0):
    """Parameters after one update by the transformation alone."""
    tx = keep_params_on_sphere(axes, radius)
    updates, _ = tx.update(updates, tx.init(params), params)
    return optax.apply_updates(params, updates)


jitted_step = jax.jit(one_step, static_argnums=1)


def run_python(code, **env):
    """The last line that a fresh interpreter prints, read as json."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **env}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


# One step


@pytest.mark.parametrize("axis", [0, -1, (0, -2), (0, 1, 2)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_norms_after_a_step(dtype, axis):
    with jax.enable_x64(True):
        params = jax.jit(lambda p: project_params(p, axis))(normal(4, 8, 6, dtype=dtype))
        updates = 0.1 * normal(4, 8, 6, seed=1, dtype=dtype)
        new = jitted_step(params, axis, updates)
    assert params.dtype == new.dtype == dtype
    assert off_sphere(params, axis) < TOLERANCE[dtype]
    assert off_sphere(new, axis) < TOLERANCE[dtype]
    moved = f64(params) + f64(updates)
    expected = moved / np.sqrt(np.sum(np.square(moved), axis, keepdims=True))
    np.testing.assert_allclose(f64(new), expected, rtol=0, atol=TOLERANCE[dtype])


@property_test
@given(*[hnp.arrays(np.float32, (3, 5), elements=st.floats(-8, 8, width=32))] * 2)
def test_any_step_ends_on_the_sphere(params, updates):
    new = jitted_step(params, 1, updates)
    sizes, kept = norms(new, 1), norms(params, 1)
    # A zero vector has no direction, and devices may take a subnormal sum for zero.
    may_stay = np.max(np.abs(params + updates), 1) < np.finfo(np.float32).tiny
    expected = np.where(may_stay & (np.abs(sizes - kept) < 5e-6), kept, 1)
    expected = np.where(np.any(params + updates, 1), expected, kept)
    np.testing.assert_allclose(sizes, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_have_the_dtype_and_structure_of_params(dtype):
    """Gradients in float32, parameters in either."""
    params = {"a": [normal(4, 3, dtype=dtype)], "b": (normal(3, dtype=dtype),)}
    axes = {"a": [0], "b": (0,)}
    tx = keep_params_on_sphere(axes)
    updates = jax.tree.map(lambda p: jnp.ones(p.shape, jnp.float32), params)
    updates, _ = tx.update(updates, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    new = optax.apply_updates(params, updates)
    assert off_sphere(new["a"][0], 0) < 2.0**-8
    assert off_sphere(new["b"][0], 0) < 2.0**-8


def test_bfloat16_is_computed_in_float32():
    """A sum of 4096 squares stops at 256 in bfloat16."""
    params = project_params(jnp.ones(4096, jnp.bfloat16), 0)
    assert off_sphere(params, 0) == 0
    assert off_sphere(jitted_step(params, 0, params), 0) == 0


def test_small_bfloat16_updates_keep_their_digits():
    """w + u, when rounded to bfloat16 before the projection, loses u."""
    params = jnp.full(64, 1 / 8, jnp.bfloat16)
    u = 1e-4 * np.where(np.arange(64) % 2, 1, -1)
    tx = keep_params_on_sphere(0)
    updates, _ = tx.update(jnp.asarray(u, jnp.float32), tx.init(params), params)
    np.testing.assert_allclose(f64(updates), u, rtol=0.01)


def test_sgd_on_the_sphere_matches_numpy():
    """w <- Norm(w - lr A w) in float64 by hand; it finds the least eigenvector of A."""
    a = np.diag([1.0, 2.0, 3.0, 4.0]) + 0.1
    w = np.array([0.1, 0.5, -0.5, 0.7])
    w /= np.linalg.norm(w)
    tx = optax.chain(optax.sgd(0.2), keep_params_on_sphere(0))
    params = jnp.asarray(w, jnp.float32)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda w: w @ jnp.asarray(a, jnp.float32) @ w / 2)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(60):
        w -= 0.2 * a @ w
        w /= np.linalg.norm(w)
        params, state = step(params, state)
        np.testing.assert_allclose(params, w, rtol=0, atol=2e-6)
    assert params @ a @ params == pytest.approx(np.linalg.eigvalsh(a)[0], abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vectors_sent_to_zero_stay(dtype):
    """To zero, zero, away from zero, an ordinary one."""
    params = jnp.array([[0.6, 0.8], [0, 0], [0, 0], [1, 0]], dtype)
    updates = jnp.array([[-0.6, -0.8], [0, 0], [0, 2], [0, 1]], dtype)
    new = jitted_step(params, 1, updates)
    half = np.sqrt(0.5)
    expected = [f64(params)[0], [0, 0], [0, 1], [half, half]]
    np.testing.assert_allclose(f64(new), expected, rtol=0, atol=TOLERANCE[dtype])
    np.testing.assert_array_equal(new[:2], params[:2])


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_diverged_update_is_not_hidden(bad):
    new = jitted_step(jnp.eye(2), 0, jnp.array([[bad, 1.0], [0.0, 1.0]]))
    assert not np.isfinite(new[:, 0]).all()
    np.testing.assert_allclose(new[:, 1], np.array([1, 2]) / np.sqrt(5), atol=1e-6)


@pytest.mark.parametrize("radius", [0.5, 3.0, np.float32(2.0)])
def test_radius(radius):
    params = project_params(normal(5, 4), 0, radius)
    assert off_sphere(params, 0, float(radius)) < 1e-6
    new = jitted_step(params, 0, 0.1 * normal(5, 4, seed=1), radius)
    assert off_sphere(new, 0, float(radius)) < 1e-6
    assert sphere_deviation(new, 0, radius) < 1e-6
    assert sphere_deviation(new, 0) == pytest.approx(abs(1 - radius), abs=1e-6)


# Trees


class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array | None


@dataclasses.dataclass
class Module:
    """An Equinox style module: a class that is a tree, absent leaves are None."""

    weight: jax.Array
    bias: jax.Array | None


jax.tree_util.register_dataclass(Module, ["weight", "bias"], [])

W = np.random.default_rng(2).standard_normal((4, 3)).astype(np.float32)
B = np.array([1.0, -2.0, 3.0], np.float32)
# Parameters, axes, and the axis of each array in the order of jax.tree.leaves.
TREES = {
    "dict": ({"w": W, "b": B}, {"w": 0, "b": None}, [None, 0]),
    "tuple": ((W, B), (0, 0), [0, 0]),
    "tuple_of_tuples": ((W, B), ((0, 1), None), [(0, 1), None]),
    "list": ([W, W], [(1,), None], [1, None]),
    "nested": ({"a": [(W, W)], "b": B}, {"a": [(None, -1)], "b": -1}, [None, -1, -1]),
    "namedtuple": (Layer(W, None), Layer(1, None), [1]),
    "none_with_an_axis": ({"w": W, "b": None}, {"w": (0, -1), "b": 0}, [(0, -1)]),
    "module": (Module(W, None), Module(0, None), [0]),
    "array": (W, 0, [0]),
    "array_and_tuple": (W, (0, 1), [(0, 1)]),
    "array_left_alone": (W, None, [None]),
    "only_none": ({"w": None}, {"w": None}, []),
    "empty": ({}, {}, []),
}


@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize("tree", TREES)
def test_trees(tree, as_function):
    params, axes, leaf_axes = TREES[tree]
    new = one_step(
        params,
        (lambda params: axes) if as_function else axes,
        jax.tree.map(lambda p: np.float32(0.1) * p[::-1], params),
    )
    assert jax.tree.structure(new) == jax.tree.structure(params)
    for p, q, axis in zip(*map(jax.tree.leaves, (params, new)), leaf_axes, strict=True):
        if axis is None:
            np.testing.assert_allclose(q, p + 0.1 * p[::-1], rtol=1e-6)
        else:
            assert off_sphere(q, axis) < 1e-6


def test_a_function_of_params_chooses_axes_by_name_or_rank():
    def axes(params):
        return jax.tree.map(lambda p: 0 if p.ndim == 2 else None, params)

    new = one_step({"w": W, "b": B}, axes, {"w": W[::-1], "b": B})
    assert off_sphere(new["w"], 0) < 1e-6
    np.testing.assert_array_equal(new["b"], 2 * B)


def test_masked_nodes_pass_through():
    """optax.masked replaces a leaf or a whole subtree by a MaskedNode."""
    node = optax.MaskedNode()
    params = {"w": W, "b": node, "layer": node}
    axes = {"w": 0, "b": 0, "layer": {"kernel": 1, "bias": None}}
    tx = keep_params_on_sphere(axes)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["b"] == updates["layer"] == node
    assert off_sphere(W + updates["w"], 0) < 1e-6
    assert project_params(params, axes)["layer"] == node
    assert sphere_deviation(params, axes)["layer"] is None


@pytest.mark.parametrize("absent", [None, optax.MaskedNode()])
def test_absent_updates_pass_through(absent):
    tx = keep_params_on_sphere({"w": 0, "b": 0})
    params = {"w": W, "b": B}
    updates, _ = tx.update({"w": W, "b": absent}, tx.init(params), params)
    assert updates["b"] is absent


# Errors


def test_missing_params_are_asked_for():
    tx = keep_params_on_sphere(0)
    with pytest.raises(
        ValueError, match=r"needs the parameters: tx\.update\(updates, state, params\)"
    ):
        tx.update(W, tx.init(W))


def update_without_init(params, axes):
    keep_params_on_sphere(axes).update(params, optax.EmptyState(), params)


@pytest.mark.parametrize(
    "call",
    [
        lambda params, axes: keep_params_on_sphere(axes).init(params),
        update_without_init,
        project_params,
        sphere_deviation,
    ],
    ids=["init", "update", "project_params", "sphere_deviation"],
)
@pytest.mark.parametrize(
    ("axes", "error", "match"),
    [
        (0, ValueError, "axes must have the structure of params"),
        ({"w": 0}, ValueError, "axes must have the structure of params"),
        ({"w": 0, "b": 0, "c": 0}, ValueError, "axes must have the structure of params"),
        ((0, None), ValueError, "axes must have the structure of params"),
        (lambda params: {"w": 0}, ValueError, "axes must have the structure of params"),
        ({"w": 2, "b": 0}, ValueError, r"axes\['w'\] = 2 is out of range for shape \(4, 3\)"),
        ({"w": -3, "b": 0}, ValueError, r"axes\['w'\] = -3 is out of range"),
        ({"w": (0, -2), "b": 0}, ValueError, r"axes\['w'\] = \(0, -2\) names an axis twice"),
        ({"w": 0, "b": (0, 1)}, ValueError, r"axes\['b'\] = 1 is out of range for shape \(3,\)"),
        ({"w": (), "b": 0}, ValueError, r"axes\['w'\] is an empty tuple"),
        ({"w": True, "b": 0}, TypeError, r"axes\['w'\] must be a Python int.* True of type bool"),
        ({"w": 0.0, "b": 0}, TypeError, r"axes\['w'\] must be a Python int.* of type float"),
        ({"w": (0, 1.0), "b": 0}, TypeError, r"axes\['w'\] must be a Python int.* of type float"),
        ({"w": [0], "b": 0}, TypeError, r"axes\['w'\] must be a Python int.* of type list"),
        ({"w": "0", "b": 0}, TypeError, r"axes\['w'\] must be a Python int.* of type str"),
        ({"w": {"value": None}, "b": 0}, TypeError, "With nnx.Optimizer give axes as a function"),
        ({"w": 0, "b": np.array(0)}, TypeError, r"axes\['b'\] must be .* of type ndarray"),
        ({"w": 0, "b": jnp.array(0)}, TypeError, r"axes\['b'\] must be .* of type ArrayImpl"),
    ],
)
def test_wrong_axes(call, axes, error, match):
    with pytest.raises(error, match=match):
        call({"w": W, "b": B}, axes)


def test_numpy_integers_are_axes():
    out = project_params({"w": W, "b": B}, {"w": np.int64(0), "b": (np.int32(-1),)})
    assert off_sphere(out["w"], 0) < 1e-6 and off_sphere(out["b"], 0) < 1e-6


MENDS = {
    "a function inside inject_hyperparams": (
        lambda: optax.inject_hyperparams(keep_params_on_sphere)(
            lambda params: jax.tree.map(lambda p: 0, params)
        ).init({"w": W}),
        'static_args=("axes",)',
    ),
    "optax.flatten around the chain": (
        lambda: optax.flatten(keep_params_on_sphere({"w": 0})).init({"w": W}),
        "put optax.flatten around the optimizer alone",
    ),
    "a list": (lambda: project_params({"w": W}, {"w": [0, 1]}), "several axes as a tuple"),
    "a prefix": (lambda: project_params({"a": {"w": W}}, {"a": 0}), "jax.tree.map(lambda p: ..."),
    "a dict for an nnx State": (
        lambda: project_params(
            nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Param), {"kernel": 0, "bias": None}
        ),
        "give a function such as",
    ),
}


@pytest.mark.parametrize("name", MENDS)
def test_messages_name_the_mend(name):
    call, mend = MENDS[name]
    with pytest.raises((TypeError, ValueError), match=re.escape(mend)):
        call()


@pytest.mark.parametrize(
    "radius", [{"w": "2"}, {"w": -2.0}, None, "2", -1.0, np.float32(-2), 1j, np.array(1j)]
)
@pytest.mark.parametrize(
    "call", [lambda r: keep_params_on_sphere({"w": 0}, r),
             lambda r: project_params({"w": W}, {"w": 0}, r),
             lambda r: sphere_deviation({"w": W}, {"w": 0}, r)],
)  # fmt: skip
def test_wrong_radius(call, radius):
    with pytest.raises((TypeError, ValueError), match="radius must"):
        call(radius)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_leaves_without_unit_vectors_are_refused(dtype):
    params = {"w": W, "n": jnp.ones((4, 3), dtype)}
    with pytest.raises(TypeError, match=r"axes\['n'\]: a parameter of dtype .* must be None"):
        project_params(params, {"w": 0, "n": 0})
    assert project_params(params, {"w": 0, "n": None})["n"] is params["n"]


# Every size and dtype


@property_test
@given(
    w=hnp.arrays(np.float64, (3, 4), elements=st.floats(0.5, 2)),
    sign=hnp.arrays(np.int8, (3, 4), elements=st.sampled_from([-1, 1])),
    exponents=hnp.arrays(np.int64, (1, 4), elements=st.integers(-124, 124)),
    dtype=st.sampled_from(["float32", "complex64", "bfloat16"]),
)
def test_vectors_of_every_size(w, sign, exponents, dtype):
    """Powers of two change no bit of the projected vectors."""
    w = w * sign * (1 + 2j if dtype == "complex64" else 1)
    plain, scaled = (jnp.asarray(w * 2.0**e, dtype) for e in (0 * exponents, exponents))
    out = project_params(scaled, 0)
    assert out.dtype == scaled.dtype
    assert np.array_equal(f64(jnp.abs(out)), f64(jnp.abs(project_params(plain, 0))))
    assert off_sphere(jnp.abs(out), 0) < (2e-6 if dtype != "bfloat16" else 2.0**-8)
    deviation = sphere_deviation(plain, 0, 1.5)
    true = np.abs(norms(jnp.abs(plain), 0) - 1.5).max()
    assert abs(float(deviation) - true) < 1e-5


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-20, 1.0, 1e19, 1e30, 1e38])
def test_a_step_of_every_size(size):
    params = project_params(W, 0)
    update = size * normal(4, 3, seed=2) / 4
    out = one_step(params, 0, update)
    moved = f64(params) + f64(update)
    assert np.abs(f64(out) - moved / norms(moved, 0)).max() < 1e-6


def test_complex_vectors_stay_on_the_sphere():
    w = jnp.asarray([[1 + 1j, 2.0], [3j, 1.0]], jnp.complex64)
    params = project_params(w, 0)
    for step in range(5):
        params = jitted_step(params, 0, 0.3 * w * 1j**step)
        assert off_sphere(jnp.abs(params), 0) < 1e-6
    assert sphere_deviation(jnp.asarray([0.6, 0.8j], jnp.complex64), 0) < 1e-6
    assert abs(sphere_deviation(jnp.asarray([3j, 4j], jnp.complex64), 0) - 4) < 1e-6


@property_test
@given(
    w=hnp.arrays(np.float32, (2, 8), elements=st.floats(-1, 1, width=32)),
    u=hnp.arrays(np.float32, (2, 8), elements=st.floats(-4, 4, width=32)),
)
def test_short_bfloat16_vectors_keep_the_stated_bound(w, u):
    params = project_params(jnp.asarray(w, jnp.bfloat16), 0)
    update = jnp.asarray(u, jnp.bfloat16)
    out = one_step(params, 0, update)
    moved = f64(params) + f64(update)
    there = norms(moved, 0) > 1e-3
    step = np.sqrt(np.sum(np.square(f64(out) - f64(params)), axis=0))
    off = np.abs(norms(out, 0) - 1)
    assert (off <= 2.0**-8 * (1 + step) * 1.01)[there].all()


def test_strict_promotion_of_dtypes():
    params = {"a": W.astype(jnp.bfloat16), "b": W}
    axes = {"a": 0, "b": 1}
    with jax.numpy_dtype_promotion("strict"):
        params = project_params(params, axes, np.float32(2))
        tx = keep_params_on_sphere(axes, jnp.float32(2))
        updates, _ = tx.update(jax.tree.map(lambda p: p / 2, params), tx.init(params), params)
        off = sphere_deviation(optax.apply_updates(params, updates), axes, 2)
    assert off["b"] < 1e-6 and off["a"] < 2.0**-7


# Trees of other projects


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class CallableModule:
    """As Equinox's modules are: a pytree that can be called."""

    weight: jax.Array
    bias: jax.Array | None

    def __call__(self, x):
        return self.weight @ x


def test_axes_in_a_tree_that_can_be_called():
    params = {"first": CallableModule(W, None), "last": CallableModule(W.T, B)}
    axes = jax.tree.map(lambda p: 1 if p.ndim == 2 else None, params)
    for tree, axis in ((params, axes), (params["last"], axes["last"])):
        out = project_params(tree, axis)
        keep_params_on_sphere(axis).init(out)
        assert max(jax.tree.leaves(sphere_deviation(out, axis))) < 1e-6
    assert off_sphere(project_params(params["last"], axes["last"]).weight, 1) < 1e-6


def test_names_of_parameters_mean_nothing():
    params = {"folded_qk_scale": W, "folded": B}
    out = project_params(params, {"folded_qk_scale": 0, "folded": None})
    assert off_sphere(out["folded_qk_scale"], 0) < 1e-6 and out["folded"] is B


def test_averages_are_put_back():
    """Wrappers that keep parameters of their own: what the docstring says."""
    axes = {"w": 0}
    tx = optax.chain(optax.contrib.schedule_free_adamw(0.05), keep_params_on_sphere(axes))
    params = project_params({"w": W}, axes)
    state = tx.init(params)
    for seed in range(20):
        updates, state = tx.update({"w": normal(4, 3, seed=seed)}, state, params)
        params = optax.apply_updates(params, updates)
        assert off_sphere(params["w"], 0) < 1e-6
    average = optax.contrib.schedule_free_eval_params(state[0], params)
    assert off_sphere(average["w"], 0) > 1e-3
    assert off_sphere(project_params(average, axes)["w"], 0) < 1e-6


# Transformations of jax and optax


def test_jit_and_scan_agree_with_eager():
    axes = {"w": 0, "b": None}
    tx = keep_params_on_sphere(axes)
    params = {"w": W, "b": B}
    steps = {"w": 0.1 * normal(5, 4, 3), "b": normal(5, 3)}

    def step(params, updates):
        updates, _ = tx.update(updates, tx.init(params), params)
        return optax.apply_updates(params, updates), updates

    scanned, all_updates = jax.lax.scan(step, jax.tree.map(jnp.asarray, params), steps)
    eager = compiled = params
    for i in range(5):
        compiled, _ = jax.jit(step)(compiled, {"w": steps["w"][i], "b": steps["b"][i]})
        eager, updates = step(eager, {"w": steps["w"][i], "b": steps["b"][i]})
        assert off_sphere(eager["w"], 0) < 1e-6
        np.testing.assert_allclose(all_updates["w"][i], updates["w"], atol=1e-6)
    for other in (scanned, compiled):
        np.testing.assert_allclose(other["w"], eager["w"], atol=2e-6)
        np.testing.assert_allclose(other["b"], eager["b"], atol=2e-6)


def test_donated_buffers():
    tx = optax.chain(optax.adam(0.1), keep_params_on_sphere(0))

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    old = params = project_params(W, 0)
    expected, _ = step.__wrapped__(jnp.asarray(W[::-1]), tx.init(params), params)
    params, _ = step(jnp.asarray(W[::-1]), tx.init(params), params)
    assert old.is_deleted()
    np.testing.assert_allclose(params, expected, atol=1e-6)


@pytest.mark.parametrize("axes", [0, lambda params: 0], ids=["int", "function"])
def test_radius_as_an_injected_hyperparameter(axes):
    tx = optax.inject_hyperparams(keep_params_on_sphere, static_args=("axes",))(axes, radius=2.0)
    state = tx.init(W)
    update = jax.jit(tx.update)
    for radius in (2.0, 3.0):
        state.hyperparams["radius"] = jnp.float32(radius)
        updates, state = update(W[::-1], state, W)
        assert off_sphere(W + updates, 0, radius) < 1e-6


def test_radius_as_a_schedule():
    radius = optax.linear_schedule(1.0, 3.0, 2)
    tx = optax.inject_hyperparams(keep_params_on_sphere, static_args="axes")(0, radius)
    params, state = jnp.asarray(W), tx.init(W)
    for expected in (1, 2, 3):
        updates, state = tx.update(0.1 * params[::-1], state, params)
        params = optax.apply_updates(params, updates)
        assert off_sphere(params, 0, expected) < 1e-6


def test_inject_hyperparams_without_static_args_says_what_to_do():
    tx = optax.inject_hyperparams(keep_params_on_sphere)(0)
    with pytest.raises(TypeError, match=re.escape('static_args=("axes",)')):
        tx.init(W)


# Training


def train(tx, params, loss, steps=40):
    """Losses, last parameters, and the parameters after every step."""

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (value, params)

    @jax.jit
    def run(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=steps)

    (params, _), (losses, history) = run(params)
    return losses, params, history


X = np.random.default_rng(3).standard_normal((32, 6)).astype(np.float32)
KERNEL = np.random.default_rng(4).standard_normal((6, 4)).astype(np.float32)
Y = 3 * X @ (KERNEL / np.linalg.norm(KERNEL, axis=0)) + 1
AXES = {"kernel": 0, "scale": None, "bias": None}
LABELS = {"kernel": "sphere", "scale": "flat", "bias": "flat"}


def linear_loss(params):
    return jnp.mean((X @ params["kernel"] * params["scale"] + params["bias"] - Y) ** 2)


def inject(learning_rate, radius):
    return optax.chain(optax.adam(learning_rate), keep_params_on_sphere(AXES, radius))


SPHERE = keep_params_on_sphere(AXES)
OPTIMIZERS = {
    "sgd": optax.chain(optax.sgd(0.1), SPHERE),
    "adam": optax.chain(optax.adam(0.1), SPHERE),
    "lion": optax.chain(optax.lion(0.05), SPHERE),
    "muon": optax.chain(optax.contrib.muon(0.1), SPHERE),
    "chain_in_chain": optax.chain(optax.clip(1.0), optax.chain(optax.adam(0.1), SPHERE)),
    "masked": optax.chain(
        optax.adam(0.1),
        optax.masked(SPHERE, {"kernel": True, "scale": False, "bias": False}),
    ),
    "masked_function": optax.chain(
        optax.adam(0.1),
        optax.masked(
            keep_params_on_sphere(lambda params: jax.tree.map(lambda p: 0, params)),
            lambda params: jax.tree.map(lambda p: p.ndim == 2, params),
        ),
    ),
    "partition": optax.partition(
        {"sphere": optax.chain(optax.adam(0.1), SPHERE), "flat": optax.sgd(0.1)}, LABELS
    ),
    "multi_steps": optax.MultiSteps(
        optax.chain(optax.adam(0.15), SPHERE), every_k_schedule=2
    ).gradient_transformation(),
    "inject_hyperparams": optax.inject_hyperparams(inject)(0.1, radius=1.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_with_optax(name):
    """Loss falls, each kernel column keeps its norm at each step, the others are free."""
    params = {"kernel": normal(6, 4), "scale": jnp.ones(4), "bias": jnp.zeros(4)}
    params = project_params(params, AXES)
    losses, last, history = train(OPTIMIZERS[name], params, linear_loss)
    assert losses[-1] < 0.2 * losses[0]
    assert off_sphere(history["kernel"], 1) < 1e-6
    assert jnp.abs(last["kernel"] - params["kernel"]).max() > 0.1
    assert off_sphere(last["scale"], 0, norms(params["scale"], 0)) > 0.1
    assert off_sphere(last["bias"], 0, 0) > 0.1


class StackedLinen(nn.Module):
    """Two scanned Dense layers, kernel [layer, in, out], and a head."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            lambda layer, x, _: (nn.tanh(layer(x)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        x, _ = layers(nn.Dense(6, name="layers"), x, None)
        return nn.Dense(4, name="head")(x)


def test_training_stacked_linen_layers():
    model = StackedLinen()
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    axes = {"layers": {"kernel": 1, "bias": None}, "head": {"kernel": 0, "bias": None}}
    assert params["layers"]["kernel"].shape == (2, 6, 6)
    losses, last, history = train(
        optax.chain(optax.adam(0.03), keep_params_on_sphere(axes)),
        project_params(params, axes),
        lambda params: jnp.mean((model.apply({"params": params}, X) - Y) ** 2),
    )
    assert losses[-1] < 0.8 * losses[0]
    assert off_sphere(history["layers"]["kernel"], 2) < 1e-6
    assert off_sphere(history["head"]["kernel"], 1) < 1e-6
    assert norms(last["layers"]["bias"], 1).min() > 0.01


def test_training_nnx_state():
    graph, state = nnx.split(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))

    def axes(state):
        return jax.tree.map(lambda p: 0 if p.ndim == 2 else None, state)

    losses, last, history = train(
        optax.chain(optax.adam(0.03), keep_params_on_sphere(axes)),
        project_params(state, axes),
        lambda state: jnp.mean((nnx.merge(graph, state)(X) - Y) ** 2),
    )
    assert isinstance(last, nnx.State)
    assert losses[-1] < 0.8 * losses[0]
    assert off_sphere(history["kernel"][...], 1) < 1e-6
    assert norms(last["bias"][...], 0) > 0.1


# project_params and sphere_deviation


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_project_params_and_sphere_deviation(transform):
    params = {"w": jnp.array([[3.0, 0.0], [4.0, 0.0]]), "b": B, "none": None}
    axes = {"w": 0, "b": None, "none": 0}
    projected = transform(lambda p: project_params(p, axes))(params)
    np.testing.assert_allclose(projected["w"], [[0.6, 0.0], [0.8, 0.0]], atol=1e-7)
    np.testing.assert_array_equal(projected["b"], B)
    assert projected["none"] is None
    deviation = transform(lambda p: sphere_deviation(p, axes, radius=2.0))(params)
    assert deviation == {"w": pytest.approx(3.0), "b": None, "none": None}
    assert transform(lambda p: sphere_deviation(p, axes))(params)["w"] == pytest.approx(4.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deviation_is_in_float32(dtype):
    params = project_params(normal(64, 3, dtype=dtype), 0)
    assert params.dtype == dtype
    deviation = sphere_deviation(params, 0)
    assert deviation.dtype == jnp.float32
    assert deviation == pytest.approx(off_sphere(params, 0), abs=3e-7)


# Radii of other kinds, modes, the exponential map


def updated(tx, params, updates, state=None):
    """Parameters after one compiled update, and the state."""
    state = tx.init(params) if state is None else state
    updates, state = jax.jit(tx.update)(updates, state, params)
    return optax.apply_updates(params, updates), state


def test_the_default_is_the_plain_formula_and_no_more():
    """Options that are off add nothing to the program."""

    def plain(u, w):
        moved = w + u.astype(w.dtype)
        scaled, _, square = sphere.rescale(moved, (0,))
        inverse = sphere.safe_rsqrt(square)
        moves = (inverse > 0) | ~jnp.isfinite(moved)
        r = jnp.asarray(1.0, inverse.dtype)
        return jnp.where(moves, r * scaled * inverse - w, 0).astype(w.dtype)

    def text(fn):
        return str(jax.make_jaxpr(fn)(W[::-1], W))

    def of(*args, **options):
        tx = keep_params_on_sphere(0, *args, **options)
        assert jax.tree.leaves(tx.init(W)) == []
        return text(lambda u, w: tx.update(u, optax.EmptyState(), w)[0])

    assert of() == of(1.0, mode="sphere", retraction="normalize") == text(plain)
    assert of(mode="ball") != text(plain)


RADII = {
    "number": (2.0, [2.0, 2.0, 2.0]),
    "array": (np.float32([0.5, 2, 3]), [0.5, 2, 3]),
    "kept dimensions": (np.float32([[0.5, 2, 3]]), [0.5, 2, 3]),
    "tree": ({"w": 3.0, "b": None, "none": 1.0}, [3.0, 3.0, 3.0]),
    "tree of arrays": ({"w": jnp.array([1.0, 2, 3]), "b": 7, "none": None}, [1.0, 2, 3]),
}


@pytest.mark.parametrize("name", RADII)
def test_radii(name):
    radius, expected = RADII[name]
    axes, params = {"w": 0, "b": None, "none": 0}, {"w": W, "b": B, "none": None}
    updates = {"w": W[::-1], "b": B, "none": None}
    params = jax.jit(lambda p: project_params(p, axes, radius))(params)
    np.testing.assert_allclose(norms(params["w"], 0), expected, rtol=1e-6)
    new, _ = updated(keep_params_on_sphere(axes, radius), params, updates)
    np.testing.assert_allclose(norms(new["w"], 0), expected, rtol=1e-6)
    assert sphere_deviation(new, axes, radius)["w"] < 1e-6
    assert sphere_deviation(new, axes, 9.0)["w"] == pytest.approx(9 - min(expected), abs=1e-5)


@pytest.mark.parametrize(
    ("radius", "match"),
    [
        (
            np.ones((4, 3)),
            r"against the norms with kept dimensions, \(1, 3\); got",
        ),
        (np.ones((2, 1, 3)), "radius must broadcast"),
        (np.ones(4), "radius must broadcast"),
        ({"w": np.ones(4), "b": 1.0}, "radius must broadcast"),
        ({"w": None, "b": 1.0}, "radius must have a number or an array for each leaf"),
        ({"w": 1.0}, "radius must be one number or array, or have the structure of params"),
        ([1.0, 1.0], "radius must be one number or array, or have the structure of params"),
    ],
)
@pytest.mark.parametrize("retraction", ["normalize", "exp"])
def test_radii_that_do_not_fit_are_refused(radius, match, retraction):
    params, axes = {"w": W, "b": B}, {"w": 0, "b": None}
    tx = keep_params_on_sphere(axes, radius, retraction=retraction)
    for call in (
        lambda: tx.update(params, tx.init(params), params),
        lambda: project_params(params, axes, radius),
        lambda: sphere_deviation(params, axes, radius),
    ):
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "cube"}, 'mode must be "sphere", "ball" or "brake"'),
        ({"retraction": "polar"}, 'retraction must be "normalize" or "exp"'),
        ({"retraction": "exp", "mode": "ball"}, "not with mode='ball'"),
        ({"retraction": "exp", "mode": "brake", "shares": (0, 1)}, "not with mode='brake'"),
        ({"mode": "brake"}, r'mode="brake" needs shares=\(outward, inward\)'),
        ({"shares": (0, 1)}, "and no other mode does"),
        ({"mode": "ball", "shares": (0, 1)}, "and no other mode does"),
        ({"mode": "brake", "shares": 0.5}, "shares must be a pair"),
        ({"mode": "brake", "shares": (0, 0.5, 1)}, "shares must be a pair"),
        ({"mode": "brake", "shares": (0, 1.5)}, "shares must not be above 1"),
        ({"mode": "brake", "shares": (-0.5, 1)}, "shares must not be negative"),
        ({"mode": "brake", "shares": (0, 1), "radius": 2.0}, "leave out radius"),
        ({"mode": "brake", "shares": (0, 1), "radius": "initial"}, "leave out radius"),
        ({"mode": "brake", "shares": (0, 1), "radius": {"w": 1.0}}, "leave out radius"),
        ({"radius": "first"}, "radius must be a number"),
    ],
)
def test_options_that_do_not_go_together(options, match):
    with pytest.raises((ValueError, TypeError), match=match) as e:
        keep_params_on_sphere({"w": 0}, **options)
    assert "\n" not in str(e.value)


# Of a convolution's kernel (height, width, in, out) one vector an output channel; of a matrix one.
@pytest.mark.parametrize(("shape", "axis"), [((3, 3, 4, 8), (0, 1, 2)), ((6, 5), (0, 1))])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_initial_norms_over_several_axes(dtype, shape, axis):
    kept = tuple(1 if i in axis else n for i, n in enumerate(shape))
    with jax.enable_x64(True):
        params = normal(*shape, dtype=dtype)
        tx = keep_params_on_sphere(axis, "initial")
        state = jax.jit(tx.init)(params)
        assert jax.eval_shape(tx.init, params).norms.shape == state.norms.shape == kept
        assert state.norms.dtype == ("float64" if dtype == "float64" else "float32")
        new = params
        for seed in range(1, 4):
            new, state = updated(tx, new, 0.3 * normal(*shape, seed=seed, dtype=dtype), state)
    first = norms(params, axis)
    np.testing.assert_allclose(norms(new, axis), first, rtol=2 * TOLERANCE[dtype])
    np.testing.assert_allclose(np.squeeze(f64(state.norms)), first, rtol=2e-6)
    assert np.abs(f64(new) - f64(params)).max() > 0.3


def test_initial_norms_in_the_state():
    node = optax.MaskedNode()
    params = {"w": jnp.asarray(W), "b": B, "none": None, "masked": node}
    axes = {"w": 0, "b": None, "none": 0, "masked": {"any": 1}}
    tx = keep_params_on_sphere(axes, "initial")
    state = tx.init(params)
    assert {**state.norms, "w": None} == {"w": None, "b": node, "none": node, "masked": node}
    updates, same = tx.update(params, state, params)
    assert same is state and updates["none"] is None and updates["masked"] == node
    assert updates["b"] is B
    # The norms of the state are radii for the other two functions.
    back = project_params({**params, "w": 3 * params["w"]}, axes, state.norms)
    np.testing.assert_allclose(back["w"], W, rtol=1e-6)
    assert sphere_deviation(back, axes, state.norms)["w"] < 1e-6


@pytest.mark.parametrize("mode", ["sphere", "ball"])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_vectors_that_are_zero_at_first_are_left_free(transform, mode):
    tx = keep_params_on_sphere(0, "initial", mode=mode)
    params = jnp.array([[3.0, 0], [4, 0]])
    state = transform(tx.init)(params)
    np.testing.assert_array_equal(state.norms, [[5, 0]])
    new, state = updated(tx, params, jnp.array([[4.0, 6], [3, 8]]), state)
    np.testing.assert_allclose(new, [[5 / 2**0.5, 6], [5 / 2**0.5, 8]], rtol=1e-6)


def test_initial_norms_of_every_size():
    params = normal(4, 3) * np.float32([1e-30, 1e30, 1e37])
    u = normal(4, 3, seed=1) * np.float32([1e-30, 1e30, 1e37])
    new, _ = updated(keep_params_on_sphere(0, "initial"), params, u)
    np.testing.assert_allclose(norms(new, 0), norms(params, 0), rtol=1e-6)


def test_vectors_in_the_ball_are_left_alone():
    """To the bit; those outside go to its surface."""
    params = jnp.asarray(W) * np.float32([0.1, 1, 4])
    u = 0.01 * normal(4, 3, seed=1)
    tx = keep_params_on_sphere(0, 3.0, mode="ball")
    updates, _ = jax.jit(tx.update)(u, tx.init(params), params)
    inside = norms(f64(params) + f64(u), 0) < 3
    assert list(inside) == [True, True, False]
    np.testing.assert_array_equal(updates[:, inside], u[:, inside])
    assert off_sphere((params + updates)[:, ~inside], 0, 3.0) < 1e-6


@pytest.mark.parametrize("as_tree", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_ball_of_infinite_radius_is_none(dtype, as_tree):
    """Whatever the numbers are: none becomes NaN that was not."""
    params, u = normal(8, 6, dtype=dtype), normal(8, 6, seed=1, dtype=dtype)
    u = u.at[0, 0].set(np.nan).at[0, 1].set(np.inf).at[0, 2].set(-np.inf)
    u, params = u.at[:, 3].set(-params[:, 3]), params.at[:, 4].set(0)
    u = u.at[:, 5].set(3e38)  # its norm is infinite in float32
    tx = keep_params_on_sphere([0], [np.inf] if as_tree else np.inf, mode="ball")
    updates, _ = jax.jit(tx.update)([u], tx.init([params]), [params])
    np.testing.assert_array_equal(f64(updates[0]), f64(u))


def test_a_ball_of_radius_zero():
    new, _ = updated(keep_params_on_sphere(0, 0.0, mode="ball"), jnp.eye(2), jnp.ones((2, 2)))
    np.testing.assert_array_equal(new, np.zeros((2, 2)))


@pytest.mark.parametrize("shares", [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (0.25, 0.5)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_brake_keeps_a_share_of_each_change(dtype, shares):
    with jax.enable_x64(True):
        params = normal(8, 40, dtype=dtype) * np.geomspace(0.1, 10, 40).astype(dtype)
        u = normal(8, 40, seed=1, dtype=dtype)
        new, _ = updated(keep_params_on_sphere(0, mode="brake", shares=shares), params, u)
    old, moved = norms(params, 0), f64(params) + f64(u)
    free = norms(moved, 0)
    assert (free > old).any() and (free < old).any()
    expected = old + np.where(free > old, *shares) * (free - old)
    off = TOLERANCE[dtype] * (1 + free + old)
    assert (np.abs(norms(new, 0) - expected) < off).all()
    if shares == (1.0, 1.0):  # free, to the bit
        np.testing.assert_array_equal(f64(new), f64(params + u))
    if shares == (0.0, 1.0):
        assert (norms(new, 0) < old + off).all()
    if shares[0] == 0.0:  # where the norm would have grown it is kept
        plain = old * moved / free
        grows = free > old
        assert (np.abs(f64(new) - plain) < off)[:, grows].all()


def test_the_brake_at_zero():
    """A zero vector grows by the outward share; one sent to zero shrinks where it is."""
    params, u = jnp.array([[0.0, 3], [0, 4]]), jnp.array([[1.0, -3], [0, -4]])
    new, _ = updated(keep_params_on_sphere(0, mode="brake", shares=(0.25, 0.5)), params, u)
    np.testing.assert_allclose(new, [[0.25, 1.5], [0, 2]], rtol=1e-6)
    new, _ = updated(keep_params_on_sphere(0, mode="brake", shares=(0.0, 0.0)), params, u)
    np.testing.assert_array_equal(new, params)


def test_the_brake_inside_inject_hyperparams():
    """Which fills in the radius that was not given."""
    inject = optax.inject_hyperparams(keep_params_on_sphere, static_args="axes")
    new, _ = updated(inject(0, mode="brake", shares=(0.0, 0.0)), jnp.asarray(W), W[::-1])
    np.testing.assert_allclose(norms(new, 0), norms(W, 0), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "options",
    [{"mode": "ball"}, {"mode": "brake", "shares": (0, 0)}, {"mode": "brake", "shares": (1, 1)},
     {"radius": "initial"}, {"retraction": "exp"}],
    ids=str,
)  # fmt: skip
def test_a_diverged_update_is_visible_with_each_option(options, bad):
    u = jnp.array([[bad, 1.0], [0.0, 1.0]])
    new, _ = updated(keep_params_on_sphere(0, **options), jnp.eye(2), u)
    assert not np.isfinite(new[:, 0]).all() and np.isfinite(new[:, 1]).all()


def exponential(w, u, radius, axis):
    """By the formula, in the dtype given."""
    size = np.sqrt(np.sum(w * w, axis, keepdims=True))
    t = u - np.sum(w * u, axis, keepdims=True) / size**2 * w
    length = np.sqrt(np.sum(t * t, axis, keepdims=True))
    return radius * (np.cos(length / radius) * w / size + np.sin(length / radius) * t / length)


@pytest.mark.parametrize("radius", [1.0, 2.5])
@pytest.mark.parametrize("axis", [-1, (0, 2)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_exponential_map(dtype, axis, radius):
    with jax.enable_x64(True):
        params = project_params(normal(4, 5, 6, dtype=dtype), axis, radius)
        u = (normal(4, 5, 6, seed=1) * np.geomspace(1e-3, 3, 5)[:, None]).astype(dtype)
        new, _ = updated(keep_params_on_sphere(axis, radius, retraction="exp"), params, u)
    expected = exponential(f64(params), f64(u), radius, axis)
    tolerance = 2 * radius * TOLERANCE[dtype]
    np.testing.assert_allclose(f64(new), expected, rtol=0, atol=tolerance)
    assert off_sphere(new, axis, radius) < tolerance


def test_the_exponential_map_at_its_ends():
    """A zero or radial update, a zero vector, huge and tiny steps, NaN; and a radius of zero."""
    params = jnp.array([[0.6], [0.8]]) * jnp.ones(7)
    params = params.at[:, 3:5].set(0)
    u = jnp.zeros((2, 7)).at[:, 1].set(5 * params[:, 1]).at[:, 2].set(jnp.array([-8e36, 6e36]))
    u = u.at[:, 4].set(jnp.array([0, 4.0])).at[:, 5].set(jnp.array([-8e-30, 6e-30]))
    u = u.at[:, 6].set(3e38 * params[:, 6])
    new, _ = updated(keep_params_on_sphere(0, retraction="exp"), params, u)
    np.testing.assert_allclose(new[:, jnp.array([0, 1, 5])], params[:, :3], atol=1e-7)
    assert off_sphere(new[:, jnp.array([2, 6])], 0) < 1e-6
    np.testing.assert_allclose(new[:, 3:5], [[0, 0], [0, 1]], atol=1e-7)
    none, _ = updated(keep_params_on_sphere(0, 0.0, retraction="exp"), params, u)
    np.testing.assert_array_equal(none, np.zeros((2, 7)))


def test_derivatives_of_the_exponential_map():
    """Against autodiff of the plain formula in float64; at u = 0 the derivative is exact."""

    def plain(w, u):
        size = jnp.linalg.norm(w, axis=0)
        t = (u - jnp.sum(w * u, 0) / size**2 * w) / 2.5
        length = jnp.linalg.norm(t, axis=0)
        return jnp.cos(length) * w / size + jnp.sin(length) * t / length

    def ours(w, u):
        return sphere.exponential(w, u, 2.5, 0)

    with jax.enable_x64(True):
        w, u, g = (normal(6, 3, seed=seed, dtype="float64") for seed in range(3))
        found = [jax.jit(lambda w, u, f=f: jax.vjp(f, w, u)[1](g))(w, u) for f in (ours, plain)]
        for a, b in zip(*found, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
        w = project_params(w, 0)
        _, at_zero = jax.jit(lambda w, u: jax.vjp(ours, w, u)[1](g))(w, 0 * u)
        np.testing.assert_allclose(at_zero, sphere.tangent(w, g, 0) / 2.5, atol=1e-14)


KEEPERS = {
    "initial": keep_params_on_sphere(AXES, "initial"),
    "ball": keep_params_on_sphere(AXES, 1.5, mode="ball"),
    "brake": keep_params_on_sphere(AXES, mode="brake", shares=(0.1, 0.5)),
    "exp": keep_params_on_sphere(AXES, retraction="exp"),
    "tree": keep_params_on_sphere(AXES, {"kernel": 2.0, "scale": None, "bias": None}),
}
ONLY = {"kernel": True, "scale": False, "bias": False}


@pytest.mark.parametrize("name", KEEPERS)
def test_training_with_other_options(name):
    """In scans, chain, masked, partition and MultiSteps: a norm goes where the option lets it."""
    keeper = KEEPERS[name]
    last = optax.chain(optax.adam(0.1), keeper)
    params = {"kernel": normal(6, 4), "scale": jnp.ones(4), "bias": jnp.zeros(4)}
    for tx in (
        optax.MultiSteps(optax.chain(optax.adam(0.15), keeper), 2).gradient_transformation(),
        optax.chain(optax.adam(0.1), optax.masked(keeper, ONLY)),
        optax.partition({"sphere": last, "flat": optax.sgd(0.1)}, LABELS),
    ):
        losses, _, history = train(tx, params, linear_loss)
        assert losses[-1] < 0.5 * losses[0]
        sizes = norms(history["kernel"], 1)[2:]
        if name == "brake":
            changes = np.abs(np.diff(sizes, axis=0))
            assert changes.max() > 1e-3
        elif name == "ball":
            assert sizes.max() < 1.5 + 2e-6 and sizes.min() < 1.49
        else:
            expected = {"initial": norms(params["kernel"], 0), "exp": 1.0, "tree": 2.0}[name]
            np.testing.assert_allclose(sizes, np.broadcast_to(expected, sizes.shape), rtol=2e-6)


def test_optax_maps_over_the_norms_of_its_state():
    """With the placeholder of optax.tree.map_params too."""
    tx = optax.chain(optax.adam(1e-3), keep_params_on_sphere({"w": 0, "b": 0}, "initial"))
    names = optax.tree.map_params(
        tx, lambda _, name: name, tx.init({"w": W, "b": B}), {"w": "w", "b": "b"},
        transform_non_params=lambda _: None,
    )  # fmt: skip
    assert names[1].norms == {"w": "w", "b": "b"}


# Fresh processes

SHARDING = """
import json, re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from ngpt_jax.projection import keep_params_on_sphere, project_params, sphere_deviation

jax.config.update("jax_num_cpu_devices", 8)
tx, tx2 = keep_params_on_sphere(1), keep_params_on_sphere(1, 2.0)

@jax.jit
def step(params, updates):
    updates, _ = tx.update(updates, tx.init(params), params)
    return updates, project_params(params, 1)

w = np.random.default_rng(0).standard_normal((4, 8, 6))
collective = "all-reduce|all-gather|all-to-all|collective|reduce-scatter"
out = {}
for mode in ("Auto", "Explicit"):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType[mode],) * 2)
    for name, spec in {"uncut": P("x", None, "y"), "cut": P(None, "x", "y")}.items():
        for dtype in ("float32", "bfloat16"):
            sharding = NamedSharding(mesh, spec)
            params = jax.device_put(jnp.asarray(w, dtype), sharding)
            compiled = step.lower(params, params).compile()
            updates, projected = compiled(params, params)
            new = params + updates
            out[f"{mode}-{name}-{dtype}"] = dict(
                devices=len(updates.sharding.device_set),
                kept=all(a.sharding.is_equivalent_to(sharding, 3) for a in (updates, projected)),
                types=[str(jax.typeof(a)) for a in (params, updates, projected)],
                collectives=sorted(set(re.findall(collective, compiled.as_text()))),
                deviation=float(jax.jit(lambda w: sphere_deviation(w, 1))(new)),
                expected=float(np.abs(np.linalg.norm(np.float64(new), axis=1) - 1).max()),
            )

def inside(w, u):  # each device sees its own piece
    new = project_params(w, 1, 2.0, axis_name="x")
    tx = keep_params_on_sphere(1, 2.0, axis_name="x")
    updates, _ = tx.update(u, tx.init(new), new)
    new = new + updates
    return new, sphere_deviation(new, 1, 2.0, axis_name="x")[None]

mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
cut = P(None, "x", "y")
size = np.float32(10.0) ** np.arange(-30, 31, 12)  # of the six columns
new, off = jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=(cut, cut), out_specs=(cut, P("y"))))(
    jnp.asarray(w * size, jnp.float32), jnp.asarray(w[::-1] / 2, jnp.float32)
)
whole = project_params(jnp.asarray(w * size, jnp.float32), 1, 2.0)
whole = whole + tx2.update(jnp.asarray(w[::-1] / 2, jnp.float32), tx2.init(whole), whole)[0]
out["inside shard_map"] = dict(
    off=float(np.abs(np.linalg.norm(np.float64(new), axis=1) - 2).max()), told=float(off.max()),
    same=float(np.abs(new - whole).max()),
)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def sharded():
    return run_python(SHARDING)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("vectors", ["uncut", "cut"])
@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_sharded_params(sharded, mode, vectors, dtype):
    """Eight devices: no collectives unless the vectors themselves are cut in pieces."""
    result = sharded[f"{mode}-{vectors}-{dtype}"]
    assert result["devices"] == 8
    assert result["kept"]
    shape = {"uncut": "4@x,8,6@y", "cut": "4,8@x,6@y"}[vectors] if mode == "Explicit" else "4,8,6"
    assert result["types"] == [f"{dtype}[{shape}]"] * 3
    assert result["collectives"] == ([] if vectors == "uncut" else ["all-reduce"])
    assert result["expected"] < TOLERANCE[dtype]
    assert result["deviation"] == pytest.approx(result["expected"], abs=3e-7)


def test_vectors_cut_inside_shard_map(sharded):
    result = sharded["inside shard_map"]
    assert result["off"] < 1e-6 and result["same"] < 1e-6
    assert result["told"] == pytest.approx(result["off"], abs=5e-7)


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("ngpt_jax.projection", ["flax", "grain", "orbax", "tensorflow_datasets"]),
        ("ngpt_jax.directions", ["flax", "grain", "orbax", "tensorflow_datasets"]),
        ("ngpt_jax.sphere", ["flax", "grain", "orbax", "tensorflow_datasets", "optax"]),
    ],
)
def test_imports_are_light(module, unwanted):
    loaded = run_python(f"import json, sys, {module}; print(json.dumps(list(sys.modules)))")
    assert module in loaded
    assert not set(unwanted) & set(loaded)


def test_optax_maps_over_the_parameters_of_its_state():
    """optax.tree.map_params calls init with a placeholder instead of parameters."""
    tx = optax.chain(optax.adam(1e-3), keep_params_on_sphere({"w": 0, "b": None}))
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    names = optax.tree.map_params(
        tx, lambda _, name: name, tx.init(params), {"w": "w", "b": "b"},
        transform_non_params=lambda _: None,
    )  # fmt: skip
    assert names[0][0].mu == {"w": "w", "b": "b"}
