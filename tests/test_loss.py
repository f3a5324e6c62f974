"""The chunked loss against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ngpt_jax.model.loss import (
    _one_pass,
    _two_passes,
    auto_chunk,
    cross_entropy,
    num_chunks,
)

B, T, D, V, PADDED = 3, 12, 8, 29, 32


def inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (B, T, D), dtype)
    table = jax.random.normal(keys[1], (PADDED, D), dtype)
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    weights = jax.random.bernoulli(keys[3], 0.7, (B, T)).astype(jnp.float32)
    return hidden, table, targets, weights


def plain(hidden, table, targets, weights):
    logits = jnp.einsum("btd,vd->btv", hidden, table[:V])
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights)


@pytest.mark.parametrize("chunk", [1, 9, 18, 1000])
def test_equals_the_plain_loss_with_gradients(x64, chunk):
    args = inputs(jnp.float64)
    a, da = jax.value_and_grad(plain, (0, 1))(*args)
    b, db = jax.value_and_grad(lambda *x: 2 * cross_entropy(*x, V, chunk), (0, 1))(*args)
    assert abs(2 * a - b) < 1e-10
    assert abs(2 * a - 2 * cross_entropy(*args, V, chunk)) < 1e-10
    for x, y in zip(da, db):
        np.testing.assert_allclose(2 * x, y, atol=1e-10)
    assert not np.any(db[1][V:])


@pytest.mark.parametrize("options", [("xla",), ("pallas", True)], ids=lambda o: o[0])
def test_the_gradient_of_hidden_goes_through_the_backward_table(options):
    hidden, table, targets, weights = inputs()
    other = jax.random.normal(jax.random.key(9), table.shape)

    def loss(h, t):
        return cross_entropy(h, t, targets, weights, V, 18, *options, backward_table=other)

    d_hidden, d_table = jax.grad(loss, (0, 1))(hidden, table)
    logits = jnp.einsum("btd,vd->btv", hidden, table)[..., :V]
    d_logits = (jax.nn.softmax(logits) - jax.nn.one_hot(targets, V)) * weights[..., None]
    np.testing.assert_allclose(d_hidden, d_logits @ other[:V], atol=1e-5)
    np.testing.assert_allclose(d_table[:V], jnp.einsum("btv,btd->vd", d_logits, hidden), atol=1e-5)


def test_chunks_divide_the_length_and_bound_the_tokens():
    assert num_chunks(8, 256, 2048) == 1
    assert num_chunks(8, 256, 2047) == 2
    assert num_chunks(8, 256, 512) == 4
    assert num_chunks(2, 7, 4) == 7  # 7 is prime
    assert num_chunks(8, 256, 1) == 256


def test_chunks_follow_from_the_memory():
    h100, v5e = 84_942_979_072, 16 * 2**30
    assert auto_chunk(32_000, 32_768, h100, "gpu") == 8192
    assert auto_chunk(16_000, 32_768, h100, "gpu") == 16_384  # cut over two devices
    assert auto_chunk(32_000, 4096, h100, "gpu") == 4096
    assert auto_chunk(32_000, 8192, v5e, "tpu") == 1024
    assert auto_chunk(32_000, 8192, None, "gpu") == 1024
    assert auto_chunk(10**9, 8192, v5e, "tpu") == 1
    assert auto_chunk(384, 2048, None, "cpu") == 2048  # the quickstart
    assert auto_chunk(32_000, 2048, None, "cpu") == 256


@pytest.mark.parametrize("masked", [[], [0], [28], range(28), range(1, 29)])
def test_maximum_and_sum_in_one_pass(masked):
    """The form for NVIDIA GPUs against that of other devices; masked logits are the lowest."""
    logits = 50 * jax.random.normal(jax.random.key(0), (5, 29))
    logits = logits.at[:, jnp.array(list(masked), int)].set(jnp.finfo(jnp.float32).min)
    for scale in (0, 1, 1e-30, 1e30):
        x = jnp.maximum(scale * logits, jnp.finfo(jnp.float32).min)
        for a, b in zip(_one_pass(x), _two_passes(x)):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_large_logits_do_not_overflow():
    hidden, table, targets, weights = inputs()
    args = (hidden, 1e4 * table, targets, weights, V, 18)
    loss, grads = jax.value_and_grad(cross_entropy, (0, 1))(*args)
    assert np.isfinite(loss)
    assert all(np.all(np.isfinite(g)) for g in grads)


def test_bfloat16_keeps_softmax_and_sums_in_float32():
    args = inputs(jnp.bfloat16)
    loss, grads = jax.value_and_grad(lambda *x: cross_entropy(*x, V, 9), (0, 1))(*args)
    exact = plain(*(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in args))
    assert loss.dtype == jnp.float32
    assert abs(loss - exact) < 1e-2 * exact
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.bfloat16]


@pytest.mark.parametrize(
    ("batch", "length", "width", "vocab", "chunk"),
    [(1, 1024, 16, 8192, 32), (8, 1024, 256, 128_000, 256)],
)
def test_logits_are_never_whole_in_memory(batch, length, width, vocab, chunk):
    """Temporary bytes of value-and-grad stay below a tenth of those of the plain loss."""
    shapes = (
        jax.ShapeDtypeStruct((batch, length, width), jnp.float32),
        jax.ShapeDtypeStruct((vocab, width), jnp.float32),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        jax.ShapeDtypeStruct((batch, length), jnp.float32),
    )

    def chunked(*args):
        return cross_entropy(*args, vocab, chunk)

    def temporary(fn):
        compiled = jax.jit(jax.value_and_grad(fn, (0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def whole(hidden, table, targets, weights):
        logits = jnp.einsum("btd,vd->btv", hidden, table)
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights)

    assert temporary(chunked) < temporary(whole) / 10
