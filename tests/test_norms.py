"""The model's norms against sphere.py."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpt_jax import sphere
from ngpt_jax.model import norms


def normal(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    size=st.integers(-20, 20),
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
