"""Normalization, RoPE and scale of heads: the rule in XLA, and the kernel against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ngpt_jax.aot import hlo, topologies
from ngpt_jax.model import heads
from ngpt_jax.model.kernels.heads import rotate_heads as kernel
from ngpt_jax.model.rotary import apply_rope, rope_tables

EPS = 1e-6
# Which of q_scale and k_scale there are: nGPT in training, in inference, both; QK-norm; GPT.
CASES = [("unit_after_rope", (False, True)), ("unit_after_rope", (True, False)),
         ("unit_after_rope", (True, True)), ("rms_before_rope", (True, True))]  # fmt: skip


def inputs(shape, form, scaled, per_row=False, dtype="float32", wide="float32"):
    """(qk, cos, sin, q_scale, k_scale) and the cotangents of q and k; wide: of all but qk."""
    rng = np.random.default_rng(sum(shape))
    b, t, kv_heads, group, head_dim = shape

    def normal(*shape, dtype=wide):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    positions = rng.integers(0, 100, (b, t)) if per_row else np.arange(t) + 3
    tables = rope_tables(jnp.asarray(positions), head_dim, 100.0, wide)
    by_head = [(kv_heads, group, head_dim), (kv_heads, head_dim)]
    scale_shapes = [(head_dim,)] * 2 if form == "rms_before_rope" else by_head
    scales = [normal(*s) if there else None for s, there in zip(scale_shapes, scaled)]
    arguments = (normal(b, t, kv_heads, group + 1, head_dim, dtype=dtype), *tables, *scales)
    return arguments, tuple(normal(b, t, *s, dtype=dtype) for s in by_head)


def plain(qk, cos, sin, q_scale, k_scale, form):
    """The formulas of the paper, for autodiff."""

    def one(x, scale):
        if form == "rms_before_rope":
            x = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + EPS)
            x = x if scale is None else x * scale
        flat = apply_rope(x.reshape(*x.shape[:2], -1, x.shape[-1]), (cos, sin))
        x = flat.reshape(x.shape)
        if form == "unit_after_rope":
            x = x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True))
            x = x if scale is None else x * scale
        return x

    return one(qk[..., :-1, :], q_scale), one(qk[..., -1, :], k_scale)


def value_and_gradients(function, arguments, cotangents, *static):
    """q, k and the gradients of qk and the scales, as float arrays of numpy."""
    qk, cos, sin, *scales = arguments

    @jax.jit
    def run(qk, scales):
        out, pull = jax.vjp(lambda qk, s: function(qk, cos, sin, *s, *static), qk, scales)
        return out, pull(cotangents)

    out = run(qk, scales)
    assert all(x.dtype == qk.dtype for x in (*out[0], out[1][0]))
    return [np.asarray(x, np.promote_types(x.dtype, "float32")) for x in jax.tree.leaves(out)]


@pytest.mark.parametrize(("form", "scaled"), CASES)
@pytest.mark.parametrize("per_row", [False, True])
def test_the_rule_agrees_with_autodiff_of_the_plain_formula(x64, form, scaled, per_row):
    arguments, g = inputs((2, 3, 2, 3, 6), form, scaled, per_row, "float64", "float64")
    own = value_and_gradients(heads.rotate_heads, arguments, g, form, EPS)
    for a, b in zip(own, value_and_gradients(plain, arguments, g, form), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("form", "scaled"), CASES)
def test_one_array_of_heads_is_rotated_like_a_joined_one(form, scaled):
    (qk, cos, sin, *scales), g = inputs((2, 3, 2, 3, 6), form, scaled, dtype="bfloat16")

    def apart(qk, cos, sin, q_scale, k_scale):
        q, shape = qk[..., :-1, :], qk[..., :-1, :].shape
        if q_scale is not None and q_scale.ndim > 1:
            q_scale = q_scale.reshape(-1, 6)
        q = heads.rotate(q.reshape(2, 3, 6, 6), cos, sin, q_scale, form, EPS)
        k = heads.rotate(qk[..., -1, :], cos, sin, k_scale, form, EPS)
        return q.reshape(shape), k

    arguments = (qk, cos, sin, *scales)
    own = value_and_gradients(apart, arguments, g)
    joined = value_and_gradients(heads.rotate_heads, arguments, g, form, EPS)
    for a, b in zip(own, joined, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    wide, g = jax.tree.map(lambda x: x.astype("float32"), (arguments, g))
    for a, b in zip(own, value_and_gradients(plain, wide, g, form), strict=True):
        np.testing.assert_allclose(a, b, rtol=2.0**-8, atol=2e-5)


def test_the_rule_keeps_its_arguments_alone():
    arguments, _ = inputs((2, 3, 2, 3, 6), "unit_after_rope", (False, True), dtype="bfloat16")
    _, pull = jax.vjp(lambda *a: heads.rotate_heads(*a, "unit_after_rope"), *arguments)
    kept = [x for x in jax.tree.leaves(pull) if x.ndim]
    assert {x.shape for x in kept} <= {x.shape for x in arguments if x is not None}


@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    case=st.sampled_from(CASES),
    shape=st.tuples(
        st.integers(1, 2), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3),
        st.sampled_from([16, 20, 64, 96]),
    ),
    per_row=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)  # fmt: skip
def test_the_kernel_agrees_with_the_rule(case, shape, per_row, dtype):
    compare(case, shape, per_row, dtype)


@pytest.mark.parametrize(
    ("case", "shape"),
    [  # more tokens than a program has, more heads, both, and a group larger than a program's
        (CASES[0], (2, 70, 2, 1, 64)),
        (CASES[3], (1, 17, 8, 1, 256)),
        (CASES[2], (1, 20, 6, 3, 200)),
        (CASES[3], (2, 5, 2, 9, 32)),
    ],
)
def test_programs_share_the_work(case, shape):
    compare(case, shape, False, "float32")


def compare(case, shape, per_row, dtype):
    form, scaled = case
    arguments, g = inputs(shape, form, scaled, per_row, dtype)
    own = value_and_gradients(kernel, arguments, g, form, EPS, True)
    wide, g = jax.tree.map(lambda x: x.astype("float32"), (arguments, g))
    for a, b in zip(own, value_and_gradients(plain, wide, g, form), strict=True):
        # One rounding to bfloat16; the sums for the scales are never rounded.
        rtol = 2.0**-8 if dtype == "bfloat16" and a.ndim > 3 else 1e-5
        np.testing.assert_allclose(a, b, rtol=rtol, atol=2e-5)


@pytest.mark.parametrize("form", ["unit_after_rope", "rms_before_rope"])
def test_vectors_of_every_size_give_finite_gradients(form):
    sizes = np.float32([0, 1e-30, 1e-19, 1e-16, 1, 1e10, 1e30])
    (qk, *rest), g = inputs((1, 7, 1, 1, 16), form, (form == "rms_before_rope", True))
    arguments = (qk * sizes[:, None, None, None], *rest)
    own = value_and_gradients(kernel, arguments, g, form, EPS, True)
    rule = value_and_gradients(heads.rotate_heads, arguments, g, form, EPS)
    for a, b in zip(own, rule, strict=True):
        assert np.isfinite(a).all() and np.isfinite(b).all()
        largest = np.abs(b).max(axis=tuple(range(2, b.ndim)), keepdims=True)  # of a token
        assert (np.abs(a - b) <= 1e-5 * largest).all()
    if form == "unit_after_rope":
        for q in (own[0], rule[0]):  # 1e-19: squares lose digits
            norm = np.linalg.norm(q[0, :, 0, 0], axis=-1)
            np.testing.assert_allclose(norm[[0, 1, 3, 4, 5, 6]], [0, 0, 1, 1, 1, 0], rtol=1e-5)
        gradients = own[2][0, :, 0]
        assert not gradients[[0, 1, 6]].any() and gradients[[3, 4, 5]].all()


@pytest.mark.parametrize(
    ("case", "shape"), [(CASES[0], (4, 128, 12, 1, 64)), (CASES[3], (4, 128, 4, 2, 96))]
)
def test_it_compiles_for_a_gpu_and_moves_each_array_once(h100, case, shape):
    arguments, g = inputs(shape, *case, dtype="bfloat16")
    arguments, g = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=h100), (arguments, g)
    )

    def forward(*arguments):
        return kernel(*arguments, case[0], EPS)

    def backward(arguments, g):
        dqk, _, _, *dscales = jax.vjp(forward, *arguments)[1](g)
        return dqk, dscales

    size = 2 * np.prod(arguments[0].shape)
    small = sum(4 * x.size for x in arguments[1:] if x is not None)
    for name, lowered, passes in [
        ("rotate_heads", jax.jit(forward).lower(*arguments), 2),
        ("rotate_heads_backward", jax.jit(backward).lower(arguments, g), 3.1),  # 0.1 for the sums
    ]:
        text = lowered.compile(topologies.GPU_COMPILER_OPTIONS).as_text()
        assert f'name = "{name}"' in text
        assert hlo.analyze(text).bytes_accessed <= passes * size + small
