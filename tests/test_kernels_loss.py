"""The loss's fused kernel, in interpret mode, against autodiff of the plain formula."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpt_jax.aot import hlo
from ngpt_jax.model.kernels import cross_entropy as kernels
from ngpt_jax.model.loss import cross_entropy

ROOT = Path(__file__).parents[1]


def case(n, vocab, columns, scale=1.0):
    keys = jax.random.split(jax.random.key(n + columns), 3)
    logits = scale * jax.random.normal(keys[0], (n, columns))
    targets = jax.random.randint(keys[1], (n,), 0, vocab)
    weights = jax.random.bernoulli(keys[2], 0.7, (n,)) * 1.5
    return logits, targets, weights


def agree(logits, targets, weights, vocab, dtype=jnp.float32):
    """The kernel against autodiff in float64."""
    nats, gradient = kernels.cross_entropy_gradient(
        logits, targets, weights, vocab, dtype, interpret=True
    )
    with jax.enable_x64(True):
        exact = jnp.asarray(np.asarray(logits), jnp.float64)[:, :vocab]

        def plain(x):
            picked = jnp.take_along_axis(x, targets[:, None], -1)[:, 0]
            each = jax.nn.logsumexp(x, axis=-1) - picked
            return jnp.sum(each * weights), each

        d, each = map(np.asarray, jax.grad(plain, has_aux=True)(exact))
    assert gradient.dtype == dtype
    np.testing.assert_allclose(nats, each, rtol=1e-6, atol=1e-6 * (1 + np.max(np.abs(exact))))
    gradient = np.asarray(gradient, np.float64)
    loose = float(jnp.finfo(dtype).eps) + 1e-6 * (1 + np.max(np.abs(exact)))
    np.testing.assert_allclose(gradient[:, :vocab], d, rtol=loose, atol=1e-6)
    assert not np.any(gradient[:, vocab:])
    assert not np.any(gradient[np.asarray(weights) == 0])


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 5),
    vocab=st.integers(2, 70),
    padding=st.integers(0, 40),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    blocks=st.booleans(),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_agrees_with_autodiff(n, vocab, padding, scale, blocks, dtype):
    with pytest.MonkeyPatch.context() as patch:
        if blocks:  # as of a vocabulary beyond _WHOLE
            patch.setattr(kernels, "_WHOLE", 8)
            patch.setattr(kernels, "_BLOCK", 16)
        agree(*case(n, vocab, vocab + padding, scale), vocab, dtype)


@pytest.mark.parametrize("vocab", [1000, 33_000])
def test_real_sizes_of_blocks(vocab):
    agree(*case(2, vocab, vocab + 24), vocab)


@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e30])
@pytest.mark.parametrize("blocks", [False, True])
def test_tiny_and_huge_logits_are_finite(scale, blocks, monkeypatch):
    if blocks:
        monkeypatch.setattr(kernels, "_WHOLE", 8)
        monkeypatch.setattr(kernels, "_BLOCK", 16)
    logits, targets, weights = case(4, 29, 40, scale)
    logits = logits.at[0].set(-scale)  # one row of equal, negative logits
    nats, gradient = kernels.cross_entropy_gradient(
        logits, targets, weights, 29, jnp.float32, interpret=True
    )
    assert np.all(np.isfinite(nats))
    assert np.all(np.isfinite(gradient))
    assert abs(nats[0] - np.log(29)) < 1e-5 * max(1, scale)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_loss_with_the_kernel_equals_that_without(dtype):
    keys = jax.random.split(jax.random.key(0), 2)
    hidden = jax.random.normal(keys[0], (3, 12, 8)).astype(dtype)
    table = jax.random.normal(keys[1], (32, 8)).astype(dtype)
    targets = jnp.arange(36).reshape(3, 12) % 29
    weights = (targets % 3 > 0) * 1.0

    def loss(kernels):
        return jax.value_and_grad(
            lambda h, t: 3 * cross_entropy(h, t, targets, weights, 29, 9, kernels, True), (0, 1)
        )

    text = str(jax.make_jaxpr(loss("pallas"))(hidden, table))
    assert "cross_entropy_gradient" in text
    (a, da), (b, db) = loss("xla")(hidden, table), loss("pallas")(hidden, table)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    for x, y in zip(da, db):
        assert y.dtype == dtype
        np.testing.assert_allclose(*(np.asarray(g, np.float32) for g in (x, y)), atol=1e-5)


def test_float64_takes_no_kernel(x64):
    shapes = [jax.ShapeDtypeStruct(s, jnp.float64) for s in ((2, 3, 8), (32, 8))]
    targets, weights = jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3))
    text = jax.make_jaxpr(
        jax.grad(lambda h, t: cross_entropy(h, t, targets, weights, 29, 3, "pallas"))
    )(*shapes)
    assert "pallas" not in str(text)


@pytest.mark.parametrize("vocab", [32_000, 50_304])
def test_compiles_for_a_gpu_that_is_not_there(vocab, h100):
    """It reads the logits once and writes the gradient in bfloat16: 6 bytes a logit."""
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=h100)
        for shape, dtype in (((64, vocab), jnp.float32), ((64,), jnp.int32), ((64,), jnp.float32))
    ]
    compiled = jax.jit(
        lambda *args: kernels.cross_entropy_gradient(*args, vocab, jnp.bfloat16)
    ).lower(*shapes).compile()  # fmt: skip
    text = compiled.as_text()
    assert "cross_entropy_gradient" in text
    assert hlo.analyze(text).bytes_accessed < 6.01 * 64 * vocab


def test_on_meshes():
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, __file__], cwd=ROOT, text=True, capture_output=True, check=False,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def on_meshes():
    """With four devices: the kernel under fsdp and context, and a vocabulary cut over tensor."""
    from ngpt_jax.parallel import rules

    keys = jax.random.split(jax.random.key(0), 2)
    hidden = jax.random.normal(keys[0], (4, 8, 16))
    table = jax.random.normal(keys[1], (32, 16))
    targets = jnp.arange(32).reshape(4, 8) % 29
    weights = (targets % 3 > 0) * 1.0

    def loss(kernels):
        return jax.jit(jax.value_and_grad(
            lambda h, t: cross_entropy(h, t, targets, weights, 29, 4, kernels, True), (0, 1)
        ))  # fmt: skip

    expected = loss("xla")(hidden, table)
    for sizes in ((1, 4, 1, 1), (1, 2, 1, 2), (1, 2, 2, 1), (1, 1, 2, 1)):
        devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
        with jax.set_mesh(jax.sharding.Mesh(devices, rules.MESH_AXES)):
            found = loss("pallas")(hidden, table)
            kernel = "cross_entropy_gradient" in str(jax.make_jaxpr(loss("pallas"))(hidden, table))
        assert kernel == (sizes[2] == 1), sizes
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), expected, found)


if __name__ == "__main__":
    on_meshes()
