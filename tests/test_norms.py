"""The norms, the residual step and SwiGLU against plain formulas, at vectors of any size."""

import dataclasses
import math

import choices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpt_jax import sphere
from ngpt_jax.model import folding, norms, transformer
from ngpt_jax.model.transformer import Transformer, init_params
from ngpt_jax.parallel import rules
from ngpt_jax.training import step


def normal(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    size=st.integers(-40, 60),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    axis=st.sampled_from([0, -1]),
)
def test_unit_is_normalize(size, dtype, axis):
    """Values and gradients, where squares neither under- nor overflow."""
    x, c = normal(3, 5, dtype=dtype) * 2.0**size, normal(3, 5, seed=1, dtype=dtype)
    assert norms.unit(x, axis).dtype == x.dtype
    assert np.array_equal(norms.unit(x, axis), sphere.normalize(x, axis))
    own, other = (
        jax.grad(lambda x, f=f: jnp.sum((f(x, axis) * c).astype("float32")))(x)
        for f in (norms.unit, sphere.normalize)
    )
    np.testing.assert_allclose(
        np.asarray(own, "float32") * 2.0**size, np.asarray(other, "float32") * 2.0**size,
        rtol=2.0**-7 if dtype == "bfloat16" else 1e-4, atol=1e-5,
    )  # fmt: skip


def test_unit_agrees_with_autodiff_of_the_plain_formula():
    with jax.enable_x64(True):
        x, c = (normal(4, 6, seed=s, dtype="float64") for s in (0, 1))

        def plain(x):
            return jnp.sum(c * x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True)))

        def own(x):
            return jnp.sum(c * norms.unit(x))

        for derivative in (jax.grad, jax.jacfwd, jax.hessian):
            np.testing.assert_allclose(derivative(own)(x), derivative(plain)(x), 1e-10, 1e-12)


EPS = 1e-6


def plain_unit(x):
    square = jnp.sum(x * x, -1, keepdims=True)
    there = square > 0
    return jnp.where(there, x / jnp.sqrt(jnp.where(there, square, 1)), 0)


def plain_step(h, f, alpha, by_norm):
    x = plain_unit(h) if by_norm else h
    return plain_unit(x + alpha * (plain_unit(f) - x))


def plain_swiglu(u, v):
    return u * v / (1 + jnp.exp(-v))


# name -> (function with a rule of its own, formula for autodiff, kinds of the arguments)
RULES = {
    "step": (lambda *a: norms.residual_step(*a, False), lambda *a: plain_step(*a, False), "rra"),
    "step of norm": (norms.residual_step, lambda *a: plain_step(*a, True), "rra"),
    "rms": (
        lambda x, gain: norms.rms_norm(x, gain, EPS),
        lambda x, gain: x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + EPS) * gain,
        "ra",
    ),
    "swiglu": (norms.swiglu, plain_swiglu, "rr"),
    "joined swiglu": (
        norms.joined_swiglu,
        lambda uv: plain_swiglu(uv[..., 0, :], uv[..., 1, :]),
        "2",
    ),
}


def arguments(name, shape, dtype, seed=0):
    """Random rows in the dtype, and a positive vector in at least float32."""
    with jax.enable_x64(True):
        shapes = {"r": shape, "2": (*shape[:-1], 2, shape[-1]), "a": shape[-1:]}
        args = [normal(*shapes[k], seed=seed + i) for i, k in enumerate(RULES[name][2])]
        wide = jnp.promote_types(dtype, jnp.float32)
        kinds = RULES[name][2]
        return [
            (jnp.abs(x) / 4).astype(wide) if k == "a" else x.astype(dtype)
            for k, x in zip(kinds, args)
        ]


def result_and_gradients(function, args, dtype):
    """The result and its gradients for one cotangent, in this dtype, as float64 arrays."""

    @jax.jit
    def run(*args):
        out, pull = jax.vjp(function, *args)
        g = jnp.cos(jnp.arange(out.size, dtype="float32")).reshape(out.shape)
        return out, *pull(g.astype(dtype).astype(out.dtype))

    return [np.asarray(x, "float64") for x in run(*args)]


def assert_agrees(name, args, tolerance):
    """The rule against autodiff of the formula in float64, of the same arguments.

    Errors are relative to the largest entry of the row, or of the vector.
    """
    own, plain, kinds = RULES[name]
    dtype = args[0].dtype
    with jax.enable_x64(True):
        found = result_and_gradients(own, args, dtype)
        truth = result_and_gradients(plain, [x.astype("float64") for x in args], dtype)
    for a, b, kind in zip(found, truth, "r" + kinds, strict=True):
        largest = np.abs(b).max(axis=-1, keepdims=True)
        assert np.isfinite(a).all()
        # What is not a row is a sum that is never rounded to the dtype of the rows.
        limit = tolerance if kind != "a" else min(tolerance, 1e-5)
        assert (np.abs(a - b) <= limit * largest).all(), name


TOLERANCE = {"float64": 1e-12, "float32": 4e-6, "bfloat16": 2.0**-8}


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(list(RULES)),
    rows=st.sampled_from([(), (1,), (3, 5)]),
    width=st.integers(2, 40),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_rules_agree_with_autodiff_of_the_plain_formulas(name, rows, width, dtype):
    assert_agrees(name, arguments(name, (*rows, width), dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("name", RULES)
def test_rules_in_float64(name):
    assert_agrees(name, arguments(name, (3, 24), "float64"), TOLERANCE["float64"])


def of_norm(x, size):
    """Vectors of this norm, which may be too large or small for its square."""
    x = np.asarray(x, "float64")
    return size * x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("by_norm", [False, True])
def test_a_step_is_finite_and_right_at_every_size(by_norm, dtype):
    """h and f of these norms, some of which count as zero or lose digits."""
    sizes = [0, 1e-30, 1e-19, 1e-18, 1e-17, 1e-14, 1, 1e10, 1e15, 1e18, 1e19, 1e30]
    h, f, alpha = arguments("step", (16,), "float32")
    pairs = [(1, size) for size in sizes] + [(size, 1) for size in sizes if by_norm]
    h, f = (
        jnp.asarray(np.stack([of_norm(x, pair[i]) for pair in pairs]), dtype)
        for i, x in enumerate((h, f))
    )
    right = [i for i, pair in enumerate(pairs) if all(1e-14 <= s <= 1e18 for s in pair)]
    name = "step of norm" if by_norm else "step"
    out, *grads = result_and_gradients(RULES[name][0], (h, f, alpha), dtype)
    assert all(np.isfinite(x).all() for x in (out, *grads))
    # In between, the square of alpha f may be below the normal numbers.
    near = [i for i, pair in enumerate(pairs) if not any(1e-19 <= s <= 1e-17 for s in pair)]
    np.testing.assert_allclose(
        np.linalg.norm(out[near], axis=-1), 1, atol=2e-6 if dtype == "float32" else 2.0**-7
    )
    for i in right:
        assert_agrees(name, (h[i], f[i], alpha), max(4e-6, TOLERANCE[dtype]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_between_antipodes(dtype):
    h = jnp.asarray(of_norm(normal(4, 16), 1), dtype)
    for alpha in (0.0, 0.25, 0.5, 1.0):
        args = h, -h, jnp.full(16, alpha, "float32")
        out, *grads = result_and_gradients(norms.residual_step, args, dtype)
        assert all(np.isfinite(x).all() for x in (out, *grads))
        if alpha != 0.5:  # there the point between the two is 0
            assert_agrees("step of norm", args, TOLERANCE[dtype] / abs(1 - 2 * alpha))
    # Near them the norm loses digits, as the docstring says.
    f = -(h.astype("float32") + 0.2 * of_norm(normal(4, 16, seed=1), 1).astype("float32"))
    moved = norms.residual_step(h.astype("float32"), f, jnp.full(16, 0.5), True)
    np.testing.assert_allclose(jnp.linalg.norm(moved, axis=-1), 1, atol=1e-5)


def test_rms_norm_of_a_huge_vector_has_the_right_gradient():
    """Autodiff would form the cube of 1 / root, which is below all numbers."""
    for size in (1e10, 1e18):
        x, gain = arguments("rms", (3, 8), "float32")
        assert_agrees("rms", (jnp.float32(size) * x, gain), TOLERANCE["float32"])


@pytest.mark.parametrize("name", ["rms", "swiglu", "joined swiglu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_rules_are_finite_at_every_size(name, dtype):
    for size in (0, 1e-30, 1e-19, 1e10, 1e15, 1e19, 1e30):
        args = arguments(name, (3, 8), "float32")
        rows = RULES[name][2].replace("r", "2")
        # The product of u and v stays a number: its factors have half of the size.
        size = size if name == "rms" else math.sqrt(size)
        args = [(size * x).astype(dtype) if k == "2" else x for k, x in zip(rows, args)]
        for x in result_and_gradients(RULES[name][0], args, dtype):
            assert np.isfinite(x).all()


@pytest.mark.parametrize("name", RULES)
def test_rules_keep_their_arguments_alone(name):
    args = arguments(name, (3, 8), "bfloat16")
    pull = jax.vjp(RULES[name][0], *args)[1]
    kept = [(x.shape, x.dtype) for x in jax.tree.leaves(pull) if x.ndim]
    assert sorted(kept, key=str) == sorted([(x.shape, x.dtype) for x in args], key=str)


@pytest.mark.parametrize(("kind", "most"), [("ngpt", 24), ("gpt", 22)])
def test_a_layer_keeps_few_vectors_and_none_in_float32(monkeypatch, kind, most):
    """Of ``width`` bfloat16 numbers a token, besides what attention keeps.

    12 of them are of the MLP. Four or five are copies, which differ in shape alone.
    """
    monkeypatch.setattr(transformer, "causal_attention", lambda q, k, v, *_: q + k + v)
    layers, tokens, width = 3, 64, 32
    fields = {"kind": kind, "qk_norm": True, "layers": layers, "width": width, "heads": 4}
    fields |= {"kv_heads": 4, "head_dim": None, "context": tokens, "dtype": "bfloat16"}
    config = choices.make(fields, remat="none").model
    network = folding.folded_config(config)
    batch = dict.fromkeys(("inputs", "targets"), jnp.zeros((1, tokens), jnp.int32))

    def pull():
        params = folding.compute_params(config, init_params(config, jax.random.key(0)))
        return jax.vjp(lambda p: step.summed_nats(network, p, batch), params)[1]

    kept = [x for x in jax.tree.leaves(jax.eval_shape(pull)) if {layers, tokens} <= set(x.shape)]
    assert {x.dtype.name for x in kept} == {"bfloat16"}
    assert sum(x.size for x in kept) / (layers * tokens * width) <= most


@pytest.mark.parametrize(("kind", "most"), [("ngpt", 5.8e-3), ("gpt", 6.6e-3)])
def test_gradients_in_bfloat16_are_near_those_in_float64(kind, most):
    """Relative error of the whole gradient, in arithmetic that rounds where the program says so.

    The mean of three models, each with a batch.
    """
    fields = {"kind": kind, "qk_norm": True, "width": 32, "head_dim": None, "vocab_size": 60}
    config = choices.make(fields, dtype="bfloat16")

    def gradients(config, inputs):
        run = jax.jit(lambda params, batch: step._loss_and_grads(config, params, batch)[1])
        run = run.lower(*inputs[0]).compile({"xla_allow_excess_precision": False})
        trees = (jax.tree.leaves(run(*x)) for x in inputs)
        return [np.concatenate([np.asarray(x, "float64").ravel() for x in t]) for t in trees]

    inputs, rng = [], np.random.default_rng(0)
    for seed in range(3):
        params = jax.tree.map(
            lambda x: x * np.exp(0.3 * rng.standard_normal(x.shape)).astype("float32"),
            init_params(config.model, jax.random.key(seed)),
        )
        tokens = rng.integers(0, 60, (8, 17)).astype("int32")
        inputs.append((params, {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}))
    found = gradients(config, inputs)
    with jax.enable_x64(True):
        model = dataclasses.replace(config.model, dtype="float64", param_dtype="float64")
        wide = [
            (jax.tree.map(lambda x: jnp.asarray(x, "float64"), params), batch)
            for params, batch in inputs
        ]
        truth = gradients(dataclasses.replace(config, model=model), wide)
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, truth)]
    assert np.mean(errors) <= most, errors


def test_a_scaled_matrix_is_rounded_once():
    """One rounding to bfloat16 is 1.66e-3 of a number, on average; two are 2.35e-3."""
    config = choices.make(
        {"kind": "ngpt", "width": 64, "head_dim": None, "dtype": "bfloat16"}
    ).model
    params = init_params(config, jax.random.key(0))
    for name in ("s_u", "s_v"):
        params["layers"][name] *= np.exp(0.5 * normal(*params["layers"][name].shape))
    params["s_z"] *= np.exp(0.5 * normal(*params["s_z"].shape))
    truth, read = folding.fold(config, params), folding.compute_params(config, params)
    for name in ("up_kernel", "gate_kernel", "output_embedding"):
        tops = [tree[name] if name in tree else tree["layers"][name] for tree in (truth, read)]
        assert tops[1].dtype == "bfloat16"
        a, b = (np.asarray(x, "float64") for x in tops)
        there = a != 0
        assert np.sqrt(np.mean(np.square((b - a)[there] / a[there]))) <= 1.7e-3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_tpus_multiply_the_scales_in_the_blocks_and_get_the_same_gradients(
    x64, monkeypatch, tiny, accumulate
):
    config = tiny(**{
        "model.dtype": "float64", "model.param_dtype": "float64", "train.accumulate": accumulate,
    })  # fmt: skip
    params = init_params(config.model, jax.random.key(0))
    for name in ("s_u", "s_v"):
        params["layers"][name] *= np.exp(0.5 * normal(*params["layers"][name].shape))
    tokens = np.arange(64).reshape(4, 16) % 60
    batch = {"inputs": tokens, "targets": tokens + 1}
    folded = []
    monkeypatch.setattr(step, "fold", lambda *args: folded.append(0) or folding.fold(*args))
    expected = step._loss_and_grads(config, params, batch)
    assert folded
    monkeypatch.setattr(rules, "platform", lambda: "tpu")
    found = step._loss_and_grads(config, params, batch)
    assert len(folded) == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-10, 1e-14), found, expected)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-19, 1e-16, 1e-14, 1e-10, 1e10, 1e19, 1e30])
def test_gradients_of_every_size_are_finite(size):
    x = jnp.full((2, 4), size)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(norms.unit(x) * jnp.arange(4.0)))(x)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("size", [1e-14, 1e-16, 1e-18, 1e-19, 0.0])
@pytest.mark.parametrize("name", ["down_kernel", "out_kernel", "query_kernel"])
def test_tiny_matrices_leave_the_gradients_of_a_model_finite(tiny, name, size):
    config = tiny().model
    params = init_params(config, jax.random.key(0))
    params["layers"][name] *= size
    tokens = np.arange(16)[None] % 60

    def loss(params):
        logits = Transformer(config).apply({"params": params}, tokens)[..., :60]
        return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 0])

    value, gradients = jax.value_and_grad(loss)(params)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
