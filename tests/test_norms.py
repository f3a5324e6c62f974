"""The model's norms against sphere.py, and gradients that stay finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpt_jax import sphere
from ngpt_jax.model import norms
from ngpt_jax.model.transformer import Transformer, init_params


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
