"""The kernels over rows: numbers in interpret mode against plain formulas, and compiled for a GPU.

The formulas are differentiated by autodiff. In float64 they are the truth. In float32 they round as
the model does without kernels: inputs are read in their dtype and results written in it.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ngpt_jax.aot import hlo, topologies
from ngpt_jax.model.kernels import residual, rms, swiglu

EPS = 1e-6


def unit(x):
    square = jnp.sum(x * x, -1, keepdims=True)
    there = square > 0
    return jnp.where(there, x / jnp.sqrt(jnp.where(there, square, 1)), 0)


def step(h, f, alpha, by_norm):
    x = unit(h) if by_norm else h
    return unit(x + alpha * (unit(f) - x))


def rms_norm(x, gain):
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + EPS) * gain


def silu_product(uv):
    return uv[..., 0, :] * uv[..., 1, :] / (1 + jnp.exp(-uv[..., 1, :]))


def residual_kernel(h, f, alpha, by_norm, copies, interpret=True):
    return residual.residual_step(
        h, f, alpha, normalize_h=by_norm, copies=copies, interpret=interpret
    )


# name -> (kernel with copies, formula of the same results, arguments, which of them are vectors)
KERNELS = {
    "residual_step": (
        functools.partial(residual_kernel, by_norm=False),
        lambda *args, copies: (step(*args, by_norm=False),) * copies,
        "row row vector",
    ),
    "residual_step_of_norm": (
        functools.partial(residual_kernel, by_norm=True),
        lambda *args, copies: (step(*args, by_norm=True),) * copies,
        "row row vector",
    ),
    "add_rms_norm": (
        lambda *args, copies, **more: rms.add_rms_norm(*args, EPS, **more),
        lambda h, f, gain, copies: (h + f, rms_norm(h + f, gain)),
        "row row vector",
    ),
    "swiglu": (
        lambda uv, copies, **more: (swiglu.swiglu(uv, **more),),
        lambda uv, copies: (silu_product(uv),),
        "pair",
    ),
}


def shapes(name, n, d, dtype):
    """Shapes of a kernel's arguments; rows in the dtype, vectors in float32."""
    shape = {"row": (n, d), "pair": (n, 2, d), "vector": (d,)}
    kinds = KERNELS[name][2].split()
    return [jax.ShapeDtypeStruct(shape[k], "float32" if k == "vector" else dtype) for k in kinds]


def arguments(name, n, d, dtype):
    """Random multiples of 1/16 up to 4, so that the sum of two is exact in bfloat16."""
    rng = np.random.default_rng(n * d)
    return [
        jnp.asarray(np.clip(np.round(16 * rng.standard_normal(x.shape)) / 16, -4, 4), x.dtype)
        for x in shapes(name, n, d, dtype)
    ]


def results(function, args, cotangents):
    """Results and cotangents of arguments, jitted."""

    @jax.jit
    def run(args, cotangents):
        out, vjp = jax.vjp(function, *args)
        return out, vjp(tuple(cotangents))

    return run(args, cotangents)


def compared(name, args, copies):
    """[(kernel, formula rounded as the model does, truth)] of each result and cotangent."""
    kernel, formula, _ = KERNELS[name]
    kernel = functools.partial(kernel, copies=copies, interpret=True)
    formula = functools.partial(formula, copies=copies)
    outputs = jax.eval_shape(kernel, *args)
    rng = np.random.default_rng(len(outputs))
    cotangents = [jnp.asarray(rng.standard_normal(y.shape), y.dtype) for y in outputs]

    def rounded(*args):
        out = formula(*(x.astype("float32") for x in args))
        return tuple(y.astype(o.dtype) for y, o in zip(out, outputs))

    own, usual = (jax.tree.leaves(results(f, args, cotangents)) for f in (kernel, rounded))
    with jax.enable_x64(True):
        exact = [[jnp.asarray(x, "float64") for x in values] for values in (args, cotangents)]
        truth = jax.tree.leaves(results(formula, *exact))
        truth = [np.asarray(x) for x in truth]
    for x, y in zip(own, usual):
        assert x.dtype == y.dtype and x.shape == y.shape
    return [tuple(np.asarray(x, "float64") for x in values) for values in zip(own, usual, truth)]


def error(x, truth):
    return np.linalg.norm(x - truth) / np.linalg.norm(truth)


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=2, deadline=None, derandomize=True)
@example(n=1101, d=24, dtype="bfloat16", copies=1)  # a program of some rows, the last of fewer
@example(n=3, d=1280, dtype="bfloat16", copies=2)
@given(
    n=st.integers(1, 40),
    d=st.sampled_from([1, 37, 96, 768]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    copies=st.integers(1, 3),
)
def test_values_and_gradients(name, n, d, dtype, copies):
    """Errors are at most those of the formula in float32 that is written in the dtype."""
    for own, usual, truth in compared(name, arguments(name, n, d, dtype), copies):
        if d > 1:  # Norm of one number has no gradient, so that only noise would be compared
            assert error(own, truth) <= 1.02 * error(usual, truth) + 1e-6
        np.testing.assert_allclose(own, usual, atol=0.02 if dtype == "bfloat16" else 2e-5)


def test_rms_norm_is_that_of_the_sum_as_it_is_written():
    rng = np.random.default_rng(0)
    h, f = (jnp.asarray(rng.standard_normal((3, 40)), "bfloat16") for _ in range(2))
    gain = jnp.linspace(0.5, 2, 40)
    x, y = rms.add_rms_norm(h, f, gain, EPS, interpret=True)
    assert np.array_equal(x, h + f)
    assert np.array_equal(y, rms.add_rms_norm(x, 0 * x, gain, EPS, interpret=True)[1])


@pytest.mark.parametrize("name", KERNELS)
def test_shapes_before_the_last_axis(name):
    args = arguments(name, 6, 5, "float32")
    kernel = functools.partial(KERNELS[name][0], copies=2, interpret=True)
    folded = [x if x.ndim == 1 else x.reshape(2, 3, *x.shape[1:]) for x in args]
    for x, y in zip(kernel(*folded), kernel(*args)):
        assert np.array_equal(x, y.reshape(2, 3, 5))


@pytest.mark.parametrize("by_norm", [False, True])
def test_vectors_of_every_size_are_finite(by_norm):
    """A vector that Norm takes for zero has gradient zero."""
    sizes = np.array([0, 1e-38, 1e-30, 1e-19, 1e-16, 1e-10, 1, 1e10, 1e16, 1e19, 1e30], "float32")
    direction = np.array([0.6, -0.8, 0], "float32")
    h = jnp.asarray(np.repeat(sizes[:, None] * direction, len(sizes), 0))
    f = jnp.asarray(np.tile(sizes[:, None] * direction[::-1], (len(sizes), 1)))
    g = jnp.asarray(np.random.default_rng(0).standard_normal(h.shape), "float32")
    kernel = functools.partial(residual_kernel, by_norm=by_norm, copies=1)
    for alpha in (0.0, 0.3):
        (y,), (d_h, d_f, d_alpha) = results(kernel, (h, f, jnp.full(3, alpha)), (g,))
        assert all(np.isfinite(x).all() for x in (y, d_h, d_f, d_alpha))
        lengths = np.linalg.norm(np.asarray(y, "float64"), axis=1)
        assert np.all((abs(lengths - 1) < 1e-4) | (lengths == 0))
        for x, d_x in ((f, d_f), *([(h, d_h)] if by_norm else [])):
            length = np.linalg.norm(np.asarray(x, "float64"), axis=1)
            assert not np.any(np.asarray(d_x)[(length < 1e-19) | (length > 2e19)])


def test_a_zero_step_from_a_zero_vector_leaves_alpha_alone():
    zero, g = jnp.zeros((2, 8)), jnp.ones((2, 8))
    kernel = functools.partial(residual_kernel, by_norm=True, copies=1)
    for x in jax.tree.leaves(results(kernel, (zero, zero, jnp.ones(8)), (g,))):
        assert not np.any(x)


def test_other_kernels_are_finite_at_every_size():
    sizes = np.array([0, 1e-38, 1e-30, 1e-10, 1, 90, 1e10, 1e18], "float32")
    x = jnp.asarray(np.concatenate([sizes, -sizes])[:, None] * np.ones((1, 4), "float32"))
    norm = functools.partial(rms.add_rms_norm, eps=EPS, interpret=True)
    out = [results(norm, (x, 0 * x, jnp.ones(4)), (jnp.ones_like(x),) * 2)]
    uv = jnp.stack(jnp.meshgrid(x[:, 0], x[:, 0]), 1).reshape(-1, 2, len(x))
    gate = functools.partial(KERNELS["swiglu"][0], copies=1, interpret=True)
    out.append(results(gate, (uv,), (jnp.ones_like(uv[:, 0]),)))
    assert all(np.isfinite(y).all() for y in jax.tree.leaves(out))
    huge = results(norm, (x * 1e20, 0 * x, jnp.ones(4)), (jnp.ones_like(x),) * 2)
    assert all(np.isfinite(y).all() for y in jax.tree.leaves(huge))


# name -> rows that the forward and backward kernels move, with two copies of the result.
MOVED = {
    "residual_step": [3, 6],
    "residual_step_of_norm": [3, 6],
    "add_rms_norm": [4, 4],
    "swiglu": [3, 5],
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_a_gpu(name, h100):
    kernel = functools.partial(KERNELS[name][0], copies=2, interpret=False)
    args = shapes(name, 1 << 15, 768, "bfloat16")
    out = jax.eval_shape(kernel, *args)
    described = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=h100), (args, out)
    )
    lowered = jax.jit(lambda args, g: results(kernel, args, g)).lower(*described)
    text = lowered.compile(compiler_options=topologies.GPU_COMPILER_OPTIONS).as_text()
    found = re.findall(r'name = "([^"]*)"', text)
    own_name = name.removesuffix("_of_norm")
    assert sorted(found) == [own_name, f"{own_name}_backward"]
    traffic = hlo.analyze(text).traffic
    moved = [size for call, (_, size) in traffic.items() if call.startswith("pallas_call")]
    row = (1 << 15) * 768 * 2
    # Besides rows, partial sums for vectors.
    pairs = zip(sorted(moved), MOVED[name], strict=True)
    assert all(rows <= x / row < rows + 0.13 for x, rows in pairs)
