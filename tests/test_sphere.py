"""Geometry of the sphere against independent float64 numpy formulas."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ngpt_jax import sphere

DTYPES = ["float16", "bfloat16", "float32", "float64"]
EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-23, "float64": 2.0**-52}
AXES = [0, -1, (-1, -3), (0, 1, 2)]

STATIC = {"safe_norm": (1, 2), "normalize": 1, "lerp": 3, "angle": (2, 3),
          "slerp": 3, "tangent": 2, "retract": 2, "deviation": 1}  # fmt: skip
jitted = SimpleNamespace(
    **{name: jax.jit(getattr(sphere, name), static_argnums=n) for name, n in STATIC.items()}
)

property_test = settings(max_examples=60, deadline=None, derandomize=True)
# Entries between 1e-15 and 1e15, or exactly zero: squares neither under- nor overflow float32.
magnitudes = st.floats(2.0**-50, 2.0**50, width=32)
entries = st.one_of(st.just(0.0), magnitudes, magnitudes.map(lambda x: -x))
vectors = hnp.arrays(np.float32, (3, 5), elements=entries)


@pytest.fixture(autouse=True)
def no_x64_leak():
    yield
    assert jnp.zeros(1).dtype == jnp.float32


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def unit(*shape, seed=0, axis=-1):
    x = normal(*shape, seed=seed)
    return x / norm(x, axis, keepdims=True)


def norm(x, axis=-1, keepdims=False):
    """Euclidean norm in float64, over one axis or many."""
    return np.sqrt(np.sum(np.square(f64(x)), axis=axis, keepdims=keepdims))


def f64(x):
    return np.asarray(x).astype(np.float64)


def f32(*arrays):
    out = [jnp.asarray(a, jnp.float32) for a in arrays]
    return out[0] if len(out) == 1 else out


def np_lerp(a, b, t, axis=-1):
    y = a + t * (b - a)
    return y / norm(y, axis, keepdims=True)


def np_slerp(a, b, t, axis=-1):
    theta = np.arccos(np.sum(a * b, axis, keepdims=True))
    return (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)


def assert_close(actual, desired, atol=1e-6):
    np.testing.assert_allclose(f64(actual), f64(desired), rtol=0, atol=atol)


# normalize


@pytest.mark.parametrize("axis", [0, (-1, -3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_normalize_keeps_dtype_and_norm_one(dtype, axis):
    with jax.enable_x64(True):
        x = jnp.asarray(normal(4, 3, 5), dtype)
        y = jitted.normalize(x, axis)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert_close(norm(y, axis), 1, 4 * EPS[dtype])
    assert_close(y, f64(x) / norm(x, axis, keepdims=True), 4 * EPS[dtype])


@pytest.mark.parametrize(("dtype", "value"), [("float16", 300.0), ("float16", 1e-4)])
def test_normalize_computes_in_float32(dtype, value):
    """The squares over- or underflow in float16."""
    y = jitted.normalize(jnp.full(64, value, dtype))
    assert_close(y, 1 / 8, 1e-4)


def test_normalize_sums_many_bfloat16_squares_in_float32():
    """A sum of 4096 ones stops at 256 in bfloat16."""
    assert_close(jitted.normalize(jnp.ones(4096, jnp.bfloat16)), 1 / 64, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_vector_stays_zero_with_zero_gradient(dtype):
    @jax.jit
    def value_and_gradient(x):
        y, pullback = jax.vjp(sphere.normalize, x)
        return y, *pullback(jnp.ones_like(y))

    with jax.enable_x64(True):
        y, g = value_and_gradient(jnp.asarray([[0, 0, 0], [3, 0, 4]], dtype))
    assert_close(y, [[0, 0, 0], [0.6, 0, 0.8]], 2 * EPS[dtype])
    assert_close(g[0], 0, 0)
    # (I - y y^T) 1 / 5
    assert_close(g[1], (1 - 1.4 * np.array([0.6, 0, 0.8])) / 5, 4 * EPS[dtype])


def test_normalize_propagates_nan():
    assert np.isnan(jitted.normalize(jnp.array([jnp.nan, 1.0]))).any()


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("size", [1e-37, 1e-25, 1e-19, 1e-14, 1e-7, 1.0, 1e10, 1e19, 1e30])
def test_norms_and_gradients_of_every_size(size, dtype):
    """Against float64; a gradient that float32 cannot hold is not asked for."""
    unscaled = np.array([1, -2, 3, 4.0]) * (1 + 1j if dtype == "complex64" else 1)
    x = jnp.asarray(size * unscaled, dtype)
    length = np.sqrt(np.sum(np.abs(unscaled) ** 2))
    y = unscaled / length
    np.testing.assert_allclose(jitted.normalize(x), y, rtol=1e-6)
    np.testing.assert_allclose(jitted.safe_norm(x), size * length, rtol=1e-6)
    c = np.array([1.0, 2, -3, 0.5])
    gradient = jax.grad(lambda x: jnp.sum(sphere.normalize(x).real * c))(x)
    true = (c - y.real @ c * np.conj(y)) / length / size  # jax: the conjugate of the steepest way
    np.testing.assert_allclose(gradient, true, rtol=1e-5)
    gradient = jax.grad(sphere.safe_norm)(x)
    np.testing.assert_allclose(gradient, np.conj(y), rtol=1e-5)


@pytest.mark.parametrize("function", [sphere.normalize, sphere.safe_norm])
def test_second_derivatives_are_those_of_the_plain_formula(function):
    plain = {
        sphere.normalize: lambda x: x / jnp.sqrt(jnp.sum(x * x)),
        sphere.safe_norm: lambda x: jnp.sqrt(jnp.sum(x * x)),
    }[function]
    with jax.enable_x64(True):
        x, c = jnp.asarray(normal(5)), jnp.asarray(normal(5, seed=1))
        for second in (jax.hessian, lambda f: jax.jacrev(jax.jacrev(f))):
            own, true = (second(lambda x, f=f: jnp.sum(f(x) * c))(x) for f in (function, plain))
            np.testing.assert_allclose(own, true, rtol=1e-10, atol=1e-12)
        turned = jax.jvp(function, (x,), (c,))[1]
        true = jax.jvp(plain, (x,), (c,))[1]
        np.testing.assert_allclose(turned, true.reshape(turned.shape), 1e-10)
    for size in (0.0, 1e-19, 1e19):
        x = jnp.full(3, size)
        hessian = jax.hessian(lambda x: jnp.sum(function(x)))(x)
        assert not np.isnan(hessian).any()


def test_rescaling_is_exact():
    x = jnp.asarray(normal(200, 5) * 2.0 ** np.arange(-100, 100)[:, None], jnp.float32)
    scaled, scale, square = jax.jit(sphere.rescale)(x)
    assert np.array_equal(f64(scaled), f64(x) * f64(scale))
    assert np.array_equal(np.frexp(f64(scale))[0], np.full((200, 1), 0.5))
    top = np.abs(f64(scaled)).max(axis=1)
    assert (top >= 1).all() and (top < 2).all()
    np.testing.assert_allclose(square, norm(scaled, keepdims=True) ** 2, rtol=1e-6)


@property_test
@given(vectors)
def test_normalize_gives_norm_one_or_zero(x):
    assert_close(norm(jitted.normalize(x)), norm(x) > 0, 1e-6)


@property_test
@given(vectors)
def test_normalize_is_idempotent(x):
    y = jitted.normalize(x)
    assert_close(jitted.normalize(y), y, 3e-7)


@property_test
@given(
    hnp.arrays(np.float32, (3, 5), elements=st.floats(0.125, 8, width=32)),
    st.floats(1e-10, 1e10),
    st.sampled_from([-1, 1]),
)
def test_normalize_is_scale_invariant_and_odd(x, scale, sign):
    y = jitted.normalize(x * np.float32(sign * scale))
    assert_close(y, sign * jitted.normalize(x), 1e-6)


# safe_norm


@pytest.mark.parametrize("axis", AXES)
def test_norms_match_numpy(axis):
    x = f32(normal(4, 3, 5))
    kept = norm(x, axis, keepdims=True)
    assert_close(jitted.normalize(x, axis), x / kept)
    np.testing.assert_allclose(jitted.safe_norm(x, axis), norm(x, axis), rtol=1e-6)
    np.testing.assert_allclose(jitted.safe_norm(x, axis, True), kept, rtol=1e-6)


def test_the_norm_is_zero_with_zero_gradient_at_zero():
    value, gradient = jax.value_and_grad(lambda x: sphere.safe_norm(x).sum())(jnp.zeros(3))
    assert value == 0
    assert_close(gradient, 0, 0)


# lerp


@pytest.mark.parametrize("t", [0.3, normal(4, 1, seed=2), normal(4, 6, seed=2), normal(6, seed=2)])
def test_lerp_formula(t):
    a, b = unit(4, 6), unit(4, 6, seed=1)
    y = jitted.lerp(*f32(a, b), t if isinstance(t, float) else f32(t))
    assert_close(norm(y), 1)
    assert_close(y, np_lerp(a, b, t), 2e-6)


@pytest.mark.parametrize("axis", [0, (0, 1)])
@pytest.mark.parametrize(("interpolate", "formula"), [("lerp", np_lerp), ("slerp", np_slerp)])
def test_interpolation_along_other_axes(interpolate, formula, axis):
    a, b = unit(3, 4, 2, axis=axis), unit(3, 4, 2, seed=1, axis=axis)
    y = getattr(jitted, interpolate)(*f32(a, b), 0.3, axis)
    assert_close(norm(y, axis), 1)
    assert_close(y, formula(a, b, 0.3, axis), 2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interpolate", [jitted.lerp, jitted.slerp], ids=["lerp", "slerp"])
def test_interpolation_ends_and_dtype(interpolate, dtype):
    with jax.enable_x64(True):
        a, b = (jnp.asarray(unit(4, 6, seed=s), dtype) for s in (0, 1))
        start, end, between = (interpolate(a, b, t) for t in (0.0, 1.0, 0.5))
    assert start.dtype == end.dtype == between.dtype == a.dtype
    assert_close(start, a, 8 * EPS[dtype])
    assert_close(end, b, 8 * EPS[dtype])
    middle = f64(a) + f64(b)
    assert_close(between, middle / norm(middle, keepdims=True), 8 * EPS[dtype])


@pytest.mark.parametrize("interpolate", [jitted.lerp, jitted.slerp], ids=["lerp", "slerp"])
def test_interpolation_of_bfloat16_is_float32_inside(interpolate):
    """0.3 and the steps in between are not rounded to bfloat16."""
    a, b = (jnp.asarray(unit(4, 64, seed=s), jnp.bfloat16) for s in (0, 1))
    expected = interpolate(*f32(a, b), 0.3).astype(jnp.bfloat16)
    assert_close(interpolate(a, b, 0.3), expected, 0)


# slerp


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.9, 1.0, normal(4, 1, seed=2)])
def test_slerp_formula(t):
    a, b = unit(4, 6), unit(4, 6, seed=1)
    y = jitted.slerp(*f32(a, b), t if isinstance(t, float) else f32(t))
    assert_close(norm(y), 1)
    assert_close(y, np_slerp(a, b, t), 3e-6)


def test_slerp_formula_float64():
    a, b = unit(4, 6), unit(4, 6, seed=1)
    with jax.enable_x64(True):
        y = jitted.slerp(jnp.asarray(a), jnp.asarray(b), 0.3)
    assert_close(y, np_slerp(a, b, 0.3), 1e-14)


def test_slerp_angle_grows_linearly_in_t():
    a, b = f32(unit(4, 6), unit(4, 6, seed=1))
    for t in np.linspace(0, 1, 6):
        y = jitted.slerp(a, b, t)
        assert_close(jitted.angle(a, y), t * f64(jitted.angle(a, b)), 2e-6)
        assert_close(jitted.angle(y, b), (1 - t) * f64(jitted.angle(a, b)), 2e-6)


def test_lerp_angle_is_not_linear_in_t():
    """What tells the two apart: over a right angle, a quarter of the chord is 18.4 degrees."""
    a, b = f32([1, 0], [0, 1])
    assert_close(jitted.angle(a, jitted.lerp(a, b, 0.25)), np.arctan(1 / 3))
    assert_close(jitted.angle(a, jitted.slerp(a, b, 0.25)), np.pi / 8)


def test_slerp_and_lerp_agree_for_small_angles():
    """They differ by O(theta^3)."""
    a, v = unit(4, 6), normal(4, 6, seed=1)
    a32, b = f32(a, jitted.retract(*f32(a, 1e-3 * v)))
    step = f64(jitted.slerp(a32, b, 0.3)) - f64(a32)
    chord = f64(jitted.lerp(a32, b, 0.3)) - f64(a32)
    assert norm(step).min() > 1e-4
    assert_close(step, chord, 2e-7)


def test_slerp_at_equal_points():
    """Value a; derivatives (1 - t) P and t P with P the projection on the tangent space."""
    a = f32(unit(6))
    projection = np.eye(6) - np.outer(a, a)
    jacobian = jax.jit(jax.jacrev(sphere.slerp, argnums=(0, 1, 2)))
    for t in (0.0, 0.3, 1.0):
        assert_close(jitted.slerp(a, a, t), a, 2e-7)
        da, db, dt = jacobian(a, a, t)
        assert_close(da, (1 - t) * projection)
        assert_close(db, t * projection)
        assert_close(dt, 0)


def test_slerp_of_zero_vectors_has_a_finite_gradient():
    zero = jnp.zeros(3)
    value, gradients = jax.value_and_grad(lambda a, b, t: sphere.slerp(a, b, t).sum(), (0, 1, 2))(
        zero, zero, 0.3
    )
    assert value == 0
    for gradient in gradients:
        assert_close(gradient, 0, 0)


def test_slerp_gradient_matches_differences_of_the_formula():
    """Along tangent directions: the two differ off the sphere."""
    a, b, c = unit(6), unit(6, seed=1), normal(6, seed=2)
    u, v = (jitted.tangent(*f32(x, normal(6, seed=s))) for x, s in ((a, 3), (b, 4)))

    def expected(eps):
        moved = (x + eps * f64(y) for x, y in ((a, u), (b, v)))
        return c @ np_slerp(*(x / norm(x) for x in moved), 0.3 + eps)

    gradient = jax.jit(jax.grad(lambda a, b, t: f32(c) @ sphere.slerp(a, b, t), argnums=(0, 1, 2)))
    da, db, dt = gradient(*f32(a, b, 0.3))
    assert_close(da @ u + db @ v + dt, (expected(1e-4) - expected(-1e-4)) / 2e-4, 1e-5)


@pytest.mark.parametrize("theta", [1e-18, 1e-12, 1e-8, 1e-7, 1e-5, 1e-3, 0.1, 1.0, 3.0])
def test_slerp_of_every_angle_has_exact_derivatives(theta):
    """A step for each entry, in float32 against float64; jnp.sinc would give noise below 1e-4."""
    a = np.eye(6)[0]
    b = np.cos(theta) * a + np.sin(theta) * np.eye(6)[1]
    t, c = np.linspace(0.02, 0.9, 6), normal(6, seed=2)

    def value_and_grads(*x):
        return jax.value_and_grad(lambda a, b, t: c @ sphere.slerp(a, b, t), (0, 1, 2))(*x)

    value, grads = value_and_grads(*f32(a, b, t))
    with jax.enable_x64(True):
        wanted = value_and_grads(*(jnp.asarray(f64(x)) for x in f32(a, b, t)))
    assert_close(value, wanted[0], 2e-6)
    for found, right in zip(grads, wanted[1]):
        assert_close(found, right, 2e-6 * max(1, np.abs(right).max()))


def test_slerp_is_finite_at_antipodes():
    a = f32(unit(4, 6))
    assert np.isfinite(jitted.slerp(a, -a, 0.3)).all()


# tangent, retract


@pytest.mark.parametrize("axis", [-1, 0, (0, 1)])
def test_tangent_is_the_orthogonal_projection(axis):
    x, v = f32(unit(3, 6, axis=axis), normal(3, 6, seed=1))
    y = jitted.tangent(x, v, axis)
    assert_close(np.sum(f64(x) * f64(y), axis), 0)
    assert_close(jitted.tangent(x, y, axis), y)
    radial = np.sum(f64(x) * f64(v), axis, keepdims=True)
    assert_close(y, f64(v) - radial * f64(x))


def test_tangent_of_x_is_zero():
    x = f32(unit(3, 6))
    assert_close(jitted.tangent(x, 5 * x), 0, 2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tangent_retract_and_angle_dtypes(dtype):
    """tangent has the dtype of the gradient; retract and angle that of the point."""
    with jax.enable_x64(True):
        x, v = jnp.asarray(unit(6), dtype), jnp.asarray(normal(6), jnp.float32)
        tangents = jitted.tangent(x, v), jitted.tangent(v, x)
        points = jitted.retract(x, v), jitted.angle(x, x)
    assert tangents[0].dtype == v.dtype
    assert {y.dtype for y in (tangents[1], *points)} == {x.dtype}


@pytest.mark.parametrize("axis", [-1, 0, (0, 1)])
def test_retract_formula(axis):
    x, v = unit(3, 6, axis=axis), normal(3, 6, seed=1)
    y = jitted.retract(*f32(x, v), axis)
    assert_close(norm(y, axis), 1)
    assert_close(y, (x + v) / norm(x + v, axis, keepdims=True))


def test_retract_is_first_order_the_tangent():
    """retract(x, eps v) = x + eps tangent(x, v) + O(eps^2)."""
    x, v = unit(3, 6), normal(3, 6, seed=1)
    with jax.enable_x64(True):
        errors = [
            norm(jitted.retract(x, eps * v) - x - eps * f64(jitted.tangent(x, v))).max()
            for eps in (1e-3, 1e-4)
        ]
    assert errors[0] < 1e-4
    assert errors[1] == pytest.approx(errors[0] / 100, rel=0.1)


# angle


@pytest.mark.parametrize(
    ("b", "expected"),
    [([1, 0], 0), ([0, 1], np.pi / 2), ([0, -1], np.pi / 2), ([-1, 0], np.pi)],
)
def test_angle_of_known_points(b, expected):
    a, b = f32([1, 0], b)
    assert_close(jitted.angle(a, b), expected, 3e-7)


@pytest.mark.parametrize("axis", AXES)
def test_angle_is_arccos_along_any_axis(axis):
    a, b = unit(4, 3, 5, axis=axis), unit(4, 3, 5, seed=1, axis=axis)
    expected = np.arccos(np.sum(a * b, axis, keepdims=True))
    kept = jitted.angle(*f32(a, b), axis, True)
    assert kept.shape == expected.shape
    assert_close(kept, expected)
    assert_close(jitted.angle(*f32(a, b), axis), np.squeeze(expected, axis))


@pytest.mark.parametrize("theta", [1e-2, 1e-4, 1e-6, 1e-9])
def test_tiny_angles_keep_their_digits(theta):
    a, b = f32([1, 0], [np.cos(theta), np.sin(theta)])
    assert float(jitted.angle(a, b)) == pytest.approx(theta, rel=1e-6)
    assert np.pi - float(jitted.angle(a, -b)) == pytest.approx(theta, abs=5e-7)


@pytest.mark.parametrize("sign", [1, -1])
def test_angle_gradient_is_finite_at_equal_and_opposite_points(sign):
    a = f32(unit(6))
    for gradient in jax.grad(sphere.angle, argnums=(0, 1))(a, sign * a):
        assert np.isfinite(gradient).all()


# deviation


def test_deviation_is_the_distance_from_the_radius():
    x = jnp.array([[3.0, 4.0], [0.6, 0.8], [0.0, 0.0]])
    assert_close(jitted.deviation(x), [4, 0, 1], 2e-7)
    assert_close(jitted.deviation(x, radius=5), [0, 4, 5], 1e-6)
    assert_close(jitted.deviation(x, 0, radius=2.0), np.abs(norm(x, 0) - 2))
    assert_close(jitted.deviation(x, (0, 1)), np.sqrt(26) - 1, 2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_deviation_is_in_at_least_float32(dtype):
    """257 is no bfloat16 number, and its square no float16 number."""
    with jax.enable_x64(True):
        y = jitted.deviation(jnp.asarray([256, 16, 7, 1], dtype), radius=256)
    assert y.dtype == ("float64" if dtype == "float64" else "float32")
    assert_close(y, np.sqrt(256**2 + 16**2 + 7**2 + 1) - 256, 3e-5)


# transformations


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: sphere.normalize(a + b),
        lambda a, b: sphere.lerp(a, b, 0.3),
        lambda a, b: sphere.slerp(a, b, 0.3),
        sphere.tangent,
        sphere.retract,
        sphere.angle,
        lambda a, b: sphere.deviation(a + b),
    ],
)
def test_functions_agree_under_jit_and_vmap(function):
    a, b = f32(unit(4, 6), unit(4, 6, seed=1))
    assert_close(jax.jit(jax.vmap(function))(a, b), function(a, b))


def test_whole_numbers_are_read_as_float32():
    a, b = jnp.array([3, 4]), jnp.array([4, -3])
    np.testing.assert_allclose(sphere.normalize([3, 4]), [0.6, 0.8], rtol=1e-6)
    x, y = jnp.array([1, 0]), jnp.array([0, 1])
    for out in (sphere.lerp(x, y, 0.5), sphere.slerp(x, y, 0.5), sphere.retract(x, y)):
        np.testing.assert_allclose(out, [0.5**0.5] * 2, rtol=1e-6)
    assert sphere.angle(x, y) == pytest.approx(np.pi / 2)
    np.testing.assert_allclose(sphere.tangent(x, a), [0, 4])
    assert sphere.normalize(b).dtype == jnp.float32


def test_tangents_of_complex_vectors_are_at_right_angles():
    x = jitted.normalize(jnp.asarray(normal(4, 5) + 1j * normal(4, 5, seed=1), jnp.complex64))
    v = jnp.asarray(normal(4, 5, seed=2) + 1j * normal(4, 5, seed=3), jnp.complex64)
    t = sphere.tangent(x, v)
    assert_close(jnp.sum((jnp.conj(x) * t).real, axis=-1), 0, 1e-5)
    assert_close(t, sphere.split(x, v).tangent, 1e-5)
