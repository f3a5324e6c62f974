"""The attention kernels against each other and against what causal attention must not see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngpt_jax.config import ConfigError
from ngpt_jax.decoding import prefill
from ngpt_jax.decoding.folding import for_inference
from ngpt_jax.model.attention import block_size, causal_attention, choose_kernel, kernel_of
from ngpt_jax.model.transformer import Transformer, init_params

MESH = jax.sharding.AbstractMesh((1, 1, 1, 1), ("data", "fsdp", "tensor", "context"))


def inputs(heads, kv_heads, head_dim, length=256, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, length, heads, head_dim), dtype)
    k = jax.random.normal(keys[1], (2, length, kv_heads, head_dim), dtype)
    v = jax.random.normal(keys[2], (2, length, kv_heads, head_dim), dtype)
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))  # as in nGPT
    segments = jnp.cumsum(jax.random.bernoulli(keys[3], 0.02, (2, length)), axis=1)
    return q, k, v, segments


def plain(q, k, v, scale, segments=None):
    """Softmax over what a position may see, written without any care for speed."""
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    scores = scale * jnp.einsum("bthc,bshc->bhts", q, k)
    t = jnp.arange(q.shape[1])
    visible = (t[:, None] >= t)[None, None]
    if segments is not None:
        visible = visible & (segments[:, None, :, None] == segments[:, None, None, :])
    weights = jnp.where(visible, jnp.exp(scores), 0)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.einsum("bhts,bshc->bthc", weights, v)


def with_grads(fn, q, k, v):
    def weighted(q, k, v):
        out = fn(q, k, v)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    (_, out), grads = jax.value_and_grad(weighted, (0, 1, 2), has_aux=True)(q, k, v)
    return out, *grads


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "documents"),
    [(4, 4, 64, False), (4, 2, 64, True), (2, 1, 128, False), (2, 2, 128, True)],
)
def test_splash_equals_xla_forward_and_backward(heads, kv_heads, head_dim, documents):
    q, k, v, segments = inputs(heads, kv_heads, head_dim)
    segments = segments if documents else None
    scale = head_dim**0.5

    def kernel(name, **kwargs):
        return jax.jit(
            lambda *x: with_grads(
                lambda q, k, v: causal_attention(q, k, v, scale, segments, name, **kwargs), *x
            )
        )

    for a, b in zip(kernel("xla")(q, k, v), kernel("splash", interpret=True)(q, k, v)):
        assert np.max(np.abs(a)) > 0.1
        np.testing.assert_allclose(a, b, atol=1e-5 * np.max(np.abs(a)))


@pytest.mark.parametrize("length", [12, 384, 301])  # one, three and two (unequal) blocks
@pytest.mark.parametrize("documents", [False, True])
def test_xla_equals_the_plain_softmax(x64, documents, length):
    q, k, v, segments = inputs(4, 2, 8, length, dtype=jnp.float64)
    segments = segments if documents else None
    a = with_grads(lambda *x: causal_attention(*x, 8**0.5, segments), q, k, v)
    b = with_grads(lambda *x: plain(*x, 8**0.5, segments), q, k, v)
    for x, y in zip(a, b):
        np.testing.assert_allclose(x, y, atol=1e-12)


def test_later_tokens_and_other_documents_change_no_earlier_logit(tiny):
    config = tiny().model
    params = init_params(config, jax.random.key(0))
    forward = jax.jit(lambda *x: Transformer(config).apply({"params": params}, *x))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 60, (2, 16))
    segments = np.repeat(np.arange(4), 4)[None].repeat(2, axis=0)
    logits = forward(tokens, segments)
    changed = tokens.copy()
    changed[:, 10] = (changed[:, 10] + 1) % 60
    moved = np.any(forward(changed, segments) != logits, axis=(0, 2))
    # Position 10 lies in the document of positions 8 to 11: it and the one after it change.
    assert moved.tolist() == [8 + 2 <= t < 12 for t in range(16)]
    moved = np.any(forward(changed, None) != forward(tokens, None), axis=(0, 2))
    assert moved.tolist() == [t >= 10 for t in range(16)]


@pytest.mark.slow
def test_splash_sees_no_later_token_and_no_other_document():
    q, k, v, _ = inputs(2, 1, 64)
    segments = jnp.asarray(np.repeat(np.arange(4), 64)[None].repeat(2, axis=0))
    run = jax.jit(lambda k, v: causal_attention(q, k, v, 8.0, segments, "splash", interpret=True))
    moved = np.any(run(k, v) != run(k.at[:, 150].add(1), v.at[:, 150].add(1)), axis=(0, 2, 3))
    assert np.array_equal(np.flatnonzero(moved), np.arange(150, 192))


@pytest.mark.parametrize(
    ("capability", "kernel"),
    [("8.0", "cudnn"), ("9.0", "cudnn"), ("10.0", "cudnn"), ("7.5", "xla"), ("gfx90a", "xla")],
)
def test_auto_knows_which_gpus_cudnn_serves(tiny, capability, kernel):
    config = tiny(**{"model.width": 128, "model.dtype": "bfloat16"}).model
    chosen, why = choose_kernel(config, MESH, "gpu", capability)
    assert chosen == kernel
    assert kernel == "cudnn" or f"capability 8.0 (Ampere) or more, not {capability}" in why


def test_blocks_divide_the_positions():
    assert [block_size(n) for n in (128, 256, 384, 1024, 1152)] == [128, 256, 128, 512, 128]


@pytest.mark.parametrize(
    ("platform", "fields", "kernel", "reason"),
    [
        ("cpu", {}, "xla", "auto on cpu"),
        ("tpu", {}, "splash", "auto on tpu"),
        ("tpu", {"model.width": 64}, "xla", "not splash: it needs head_dim 64 or a multiple"),
        ("tpu", {"model.context": 100}, "xla", "multiple of 128 positions a device, not 100"),
        ("tpu", {"model.dtype": "float64"}, "xla", "it knows no float64"),
        ("gpu", {"model.dtype": "bfloat16"}, "cudnn", "auto on gpu"),
        ("gpu", {}, "xla", "it computes in bfloat16, and model.dtype is float32"),
    ],
)
def test_auto_takes_the_kernel_of_the_platform_and_says_why(tiny, platform, fields, kernel, reason):
    config = tiny(**{"model.width": 128, "model.context": 256, **fields}).model
    chosen, why = choose_kernel(config, MESH, platform)
    assert chosen == kernel
    assert reason in why


@pytest.mark.parametrize(
    ("attention", "platform", "message"),
    [
        ("cudnn", "cpu", "model.attention = cudnn cannot be used: cuDNN is for NVIDIA GPUs"),
        ("splash", "cpu", "model.attention = splash cannot be used: it is for TPUs"),
        ("splash", "tpu", "multiple of 128 positions a device, not 16"),
    ],
)
def test_a_kernel_asked_for_in_vain_is_an_error(tiny, attention, platform, message):
    config = tiny(**{"model.attention": attention, "model.width": 128}).model
    with pytest.raises(ConfigError, match=message):
        choose_kernel(config, MESH, platform)
    assert choose_kernel(dataclasses.replace(config, attention="xla"), MESH, platform)[0] == "xla"


def test_a_prompt_has_a_kernel_that_takes_its_length(tiny):
    """The text at the end of a run on TPUs: prompts are padded to multiples of 64."""
    config = tiny(**{"model.attention": "splash", "model.width": 128, "model.context": 256}).model
    assert [kernel_of(config, n) for n in (64, 128, 192, 256)] == ["xla", "splash"] * 2
    params = jax.eval_shape(lambda: for_inference(config, init_params(config, jax.random.key(0))))
    for length in (64, 128, 192):
        out = jax.eval_shape(
            lambda p, n=length: prefill.prefill(
                config, p, jnp.zeros((1, n), jnp.int32), jnp.zeros(1, jnp.int32), n + 64,
                jax.random.split(jax.random.key(0), 1),
            ),
            params,
        )  # fmt: skip
        assert out.drawn.shape == ()


@pytest.mark.parametrize(("remat", "calls"), [("none", 1), ("attention", 1), ("full", 2)])
def test_remat_computes_attention_again_only_where_it_says_so(tiny, monkeypatch, remat, calls):
    """Calls of cuDNN's forward pass in a traced gradient, of one layer."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    fields = {"model.width": 128, "model.context": 128, "model.dtype": "bfloat16"}
    fields |= {"model.layers": 1, "model.attention": "cudnn", "model.remat": remat}
    config = tiny(**fields).model
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def loss(params, tokens):
        return Transformer(config).apply({"params": params}, tokens).sum()

    program = jax.make_jaxpr(jax.grad(loss))(params, jax.ShapeDtypeStruct((1, 128), jnp.int32))
    assert str(program).count("= dot_product_attention_fwd") == calls
    assert str(program).count("= dot_product_attention_bwd") == 1
