"""Variants of the model: their geometry, their limits, and the forms of scales.

That each goes with all other choices is checked in test_choices.py.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_kernels_rows
import test_norms
from choices import make
from test_convert import make_run, same
from test_diagnose import geodesic, opened, wobbly
from test_fused import assert_same, loss_and_gradients, model_and_batch

from ngpt_jax import sphere
from ngpt_jax.config import ConfigError
from ngpt_jax.config.fields import SCALES
from ngpt_jax.decoding.folding import for_inference
from ngpt_jax.diagnose import figures, measures, report
from ngpt_jax.export import huggingface, reference_checkpoint
from ngpt_jax.model.params import param_tree
from ngpt_jax.model.transformer import RESIDUALS, init_params
from ngpt_jax.training.step import summarize_params

TOKENS = np.random.default_rng(0).integers(0, 20, (2, 14)).astype(np.int32)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def unit(*shape, seed=0, axis=-1):
    x = normal(*shape, seed=seed)
    return x / np.sqrt(np.sum(x * x, axis, keepdims=True))


def at_angle(theta, width=16, rows=4):
    """Unit vectors h and f with this angle between them."""
    h, v = unit(rows, width), normal(rows, width, seed=1)
    v -= np.sum(h * v, -1, keepdims=True) * h
    return h, np.cos(theta) * h + np.sin(theta) * v / np.linalg.norm(v, axis=-1, keepdims=True)


# ------------------------------------------------------------------------------ the exponential map


@pytest.mark.parametrize("length", [0.499, 0.501, 9.0])
@pytest.mark.parametrize("axis", [-1, 0, (0, 1)])
def test_the_exponential_map_is_its_formula(x64, axis, length):
    x, v = unit(3, 6, axis=axis), normal(3, 6, seed=1)
    v -= np.sum(x * v, axis, keepdims=True) * x
    v *= length / np.sqrt(np.sum(v * v, axis, keepdims=True))
    moved = sphere.exponential(x, v, axis=axis)
    np.testing.assert_allclose(moved, np.cos(length) * x + np.sin(length) / length * v, atol=1e-15)
    np.testing.assert_allclose(np.sum(np.square(moved), axis), 1, rtol=4e-15)


def test_derivatives_of_every_order_at_no_step(x64):
    """Those of cos(t) x + sin(t) u for a tangent unit vector u, and 0 along x."""
    x, u = unit(6), normal(6, seed=1)
    u -= (x @ u) * x
    u /= np.linalg.norm(u)

    @jax.jit
    def derivatives():
        def along(t):
            return sphere.exponential(jnp.asarray(x), t * jnp.asarray(u))

        found = []
        for _ in range(4):
            found.append(along(0.0))
            along = jax.jacfwd(along)
        return found, jax.jacrev(sphere.exponential, 1)(jnp.asarray(x), jnp.zeros(6))

    found, jacobian = derivatives()
    np.testing.assert_allclose(found, [x, u, -x, -u], atol=1e-13)
    np.testing.assert_allclose(jacobian, np.eye(6) - np.outer(x, x), atol=1e-15)


@pytest.mark.parametrize("length", [1e-30, 1e-8, 1e-4, 0.49, 0.51, 3.0])
def test_the_exponential_map_has_exact_derivatives_in_float32(length):
    x, c = unit(6), normal(6, seed=2)
    v = length * np.roll(x, 1)

    args = [jnp.asarray(y, "float32") for y in (x, v)]
    found = jax.jit(jax.grad(lambda x, v: c @ sphere.exponential(x, v), (0, 1)))(*args)
    with jax.enable_x64(True):

        def plain(x, v):
            x = x / jnp.sqrt(x @ x)
            t = v - (x @ v) * x
            n = jnp.sqrt(t @ t)
            return c @ (jnp.cos(n) * x + jnp.sin(n) / n * t)

        right = jax.jit(jax.grad(plain, (0, 1)))(*(jnp.asarray(a, "float64") for a in args))
    for a, b in zip(found, right):
        np.testing.assert_allclose(a, b, atol=3e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exponential_step_is_finite_at_every_size(dtype):
    lengths = np.array([0, 1e-38, 1e-20, 1e-8, 0.5, np.pi, 1e4, 1e15, 1e19, 1e30])[:, None]
    h, f = np.tile(unit(16), (len(lengths), 1)), lengths * unit(len(lengths), 16, seed=1)
    h = np.concatenate([h, h[:2], 0 * h[:1]])
    f = np.concatenate([f, h[:1], -h[:1], f[5:6]])  # along h, too; at last an h of 0
    alpha = jnp.linspace(-0.6, 0.6, 16)
    h, f = (jnp.asarray(x, dtype) for x in (h, f))

    @jax.jit
    def run(*args):
        moved, pull = jax.vjp(RESIDUALS["exp"], *args)
        return moved, pull(jnp.broadcast_to(jnp.arange(16), h.shape).astype(dtype))

    moved, grads = run(h, f, alpha)
    assert moved.dtype == dtype
    assert all(np.isfinite(np.asarray(x, "float32")).all() for x in (moved, *grads))
    np.testing.assert_allclose(jnp.linalg.norm(moved[:-1].astype("float32"), axis=-1), 1, atol=0.01)


# --------------------------------------------------------------------------------- residual rules


@pytest.mark.parametrize("theta", [1e-3, 0.4, 1.5, 3.0])
@pytest.mark.parametrize("alpha", [0.3, -0.3, 1.0])
def test_an_exponential_step_is_slerp_by_another_share(x64, theta, alpha):
    """It goes along the great circle to f by alpha times the length sin(t) of f's tangent part."""
    h, f = at_angle(theta)
    moved = RESIDUALS["exp"](h, f, jnp.full(16, alpha))
    share = alpha * np.sin(theta) / theta
    np.testing.assert_allclose(moved, sphere.slerp(h, f, share), atol=1e-14)
    np.testing.assert_allclose(sphere.angle(h, moved), abs(alpha) * np.sin(theta), atol=1e-14)
    # A tangent f of any length: the angle is that of the step.
    v = 0.7 * (f - np.cos(theta) * h) / np.sin(theta)
    moved = RESIDUALS["exp"](h, v, jnp.full(16, alpha))
    np.testing.assert_allclose(moved, sphere.slerp(h, v / 0.7, alpha * 1.4 / np.pi), atol=1e-13)
    np.testing.assert_allclose(sphere.angle(h, moved), 0.7 * abs(alpha), atol=1e-13)


def test_an_exponential_step_with_an_alpha_for_each_channel(x64):
    h, f = unit(4, 16), 3 * normal(4, 16, seed=1)
    alpha = 0.5 * normal(16, seed=2)
    moved = RESIDUALS["exp"](h, f, alpha)
    np.testing.assert_allclose(moved, geodesic(h, f, alpha), atol=1e-14)
    np.testing.assert_allclose(RESIDUALS["exp"](h, 3 * h, alpha), h, atol=1e-14)


@pytest.mark.parametrize("other", ["lerp", "exp"])
def test_rules_differ_by_the_third_power_of_the_angle(x64, other):
    angles = 0.5 ** np.arange(1, 8)
    apart = []
    for theta in angles:
        h, f = at_angle(theta)
        a, b = (RESIDUALS[name](h, f, jnp.full(16, 0.3)) for name in ("slerp", other))
        apart.append(np.abs(a - b).max())
    exponents = np.diff(np.log(apart)) / np.diff(np.log(angles))
    np.testing.assert_allclose(exponents[2:], 3, atol=0.02)


@pytest.mark.parametrize("name", ["step", "step of norm"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_residual_step_takes_an_alpha_of_any_sign(name, dtype):
    h, f, alpha = test_norms.arguments(name, (3, 24), dtype)
    signs = (-1.0) ** np.arange(24)
    with jax.enable_x64(True):
        signed = jnp.asarray(np.asarray(alpha) * signs, alpha.dtype)
    test_norms.assert_agrees(name, (h, f, signed), test_norms.TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["residual_step", "residual_step_of_norm"])
def test_the_kernel_takes_an_alpha_of_any_sign(name):
    h, f, alpha = test_kernels_rows.arguments(name, 24, 64, "float32")
    assert (alpha < 0).any() and (alpha > 0).any()
    for found, _, truth in test_kernels_rows.compared(name, [h, f, alpha / 8], 1):
        np.testing.assert_allclose(found, truth, atol=1e-5 * np.abs(truth).max())


# ------------------------------------------------------------------------------ forms of the scales


def forms(form, **more):
    return make({"kind": "ngpt"} | {f"{name}.form": form for name in SCALES}, **more)


def test_fixed_scales_are_vectors_at_their_start_bit_for_bit():
    """In all that the network reads. In a compiled step XLA may multiply the constants first."""
    vector, fixed = (forms(form).model for form in ("vector", "fixed"))
    params = init_params(vector, jax.random.key(0))
    rest = jax.tree.map(
        lambda p: (params if p.name == p.path else params["layers"])[p.name], param_tree(fixed)
    )
    assert not set(SCALES) & {*rest, *rest["layers"]}
    a, b = (for_inference(c, p) for c, p in ((vector, params), (fixed, rest)))
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_scalars_are_vectors_of_equal_entries():
    """In values, and their gradient is the sum of those of the entries."""
    vector, scalar = (forms(form) for form in ("vector", "scalar"))
    params = wobbly(scalar)
    shapes = {n: np.shape((params | params["layers"])[n]) for n in SCALES}
    assert shapes == dict.fromkeys(SCALES[:-1], (2,)) | {"s_z": ()}

    def spread(w, p, to):
        return jnp.broadcast_to(w.reshape(w.shape + (1,) * (len(to.shape) - w.ndim)), to.shape)

    like = jax.eval_shape(lambda: init_params(vector.model, jax.random.key(0)))
    equal = jax.tree.map(spread, params, param_tree(scalar.model), like)
    a, b = (for_inference(c.model, p) for c, p in ((vector, equal), (scalar, params)))
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))
    batch = {"inputs": TOKENS[:, :-1], "targets": TOKENS[:, 1:]}
    one, wide = loss_and_gradients(vector, "xla", equal, batch)
    loss, own = loss_and_gradients(scalar, "xla", params, batch)
    assert float(loss) == pytest.approx(float(one), rel=1e-6)
    for name in SCALES:
        a, b = ((tree | tree["layers"])[name] for tree in (own, wide))
        total = np.sum(b, axis=tuple(range(a.ndim, b.ndim)))
        np.testing.assert_allclose(a, total, atol=1e-6 * np.abs(b).sum())


def test_alpha_by_depth_is_alpha_over_k():
    """Layer k, counted from 1; both of its steps."""
    plain = make({"kind": "ngpt", "layers": 3})
    params = wobbly(plain)
    for name, factors in (("harmonic", [1, 1 / 2, 1 / 3]), ("root", [1, 2**-0.5, 3**-0.5])):
        model = dataclasses.replace(plain.model, alpha_depth=name)
        by_hand = dict(params)
        by_hand["layers"] = {
            n: w * jnp.array(factors)[:, None] if n.startswith("alpha") else w
            for n, w in params["layers"].items()
        }
        own, other = for_inference(model, params), for_inference(plain.model, by_hand)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), own, other)
        for n in ("mean_alpha_a", "mean_alpha_m"):
            own, other = (
                summarize_params(m, p) for m, p in ((model, params), (plain.model, by_hand))
            )
            assert float(own[n]) == pytest.approx(float(other[n]), rel=1e-6)


VARIANTS = {
    "exp": {"residual": "exp", "branch_norm": "none", "alpha_depth": "harmonic",
            "alpha_a.form": "scalar", "alpha_m.form": "fixed"},
    "signed": {"alpha_sign": "signed", "alpha_depth": "root", "alpha_m.form": "scalar",
               "s_qk.form": "scalar", "s_u.form": "fixed", "s_v.form": "scalar",
               "s_z.form": "scalar"},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_scan_remat_and_kernels_change_no_variant(name):
    config, params, batch = model_and_batch({"kind": "ngpt"} | VARIANTS[name])
    params["layers"]["alpha_a"] *= jnp.resize(
        jnp.array([-1.0, 1.0]), params["layers"]["alpha_a"].shape
    )
    truth = loss_and_gradients(config, "xla", params, batch)
    model = dataclasses.replace(config.model, scan_layers=False, remat="full")
    other = dataclasses.replace(config, model=model)
    assert_same(loss_and_gradients(other, "pallas", params, batch), truth, 1e-5)


# ------------------------------------------------------------------------------ files and figures


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_come_back_from_a_folder(tiny, tmp_path, name):
    run = make_run(tiny, **{f"model.{n}": value for n, value in VARIANTS[name].items()})
    huggingface.write_folder(run, str(tmp_path / "hf"))
    back = huggingface.read_folder(str(tmp_path / "hf"))
    assert back.config == run.config
    assert same(back.params, run.params, run.config.model)


def test_a_folder_without_the_newer_choices_is_read(tiny, tmp_path):
    run = make_run(tiny)
    huggingface.write_folder(run, str(tmp_path))
    values = json.loads((tmp_path / "config.json").read_text())
    for name in ("alpha_depth", "alpha_sign"):
        del values["choices"][name], values["ngpt_jax"]["config"]["model"][name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert huggingface.read_folder(str(tmp_path)).config == run.config
    values["choices"]["residual"] = "slerp"
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="config.json says choices = .*, but the config of the"):
        huggingface.read_folder(str(tmp_path))


@pytest.mark.parametrize(
    "fields",
    [{"residual": "exp"}, {"alpha_depth": "root"}, {"alpha_sign": "signed"}]
    + [{f"{name}.form": form} for name in SCALES for form in ("scalar", "fixed")],
    ids=str,
)
def test_the_authors_layout_has_no_place_for_them(fields):
    ((name, value),) = fields.items()
    model = make({"kind": "ngpt"} | fields).model
    with pytest.raises(ConfigError, match=f"no place for model.{name}={value} in ngpt") as e:
        reference_checkpoint._check_choices("--to_reference", model)
    assert "\n" not in str(e.value)


def test_figures_show_signs_and_any_number_of_scales():
    config = make(
        {"kind": "ngpt", "alpha_sign": "signed", "s_u.form": "fixed", "s_z.form": "scalar"}
    )
    params = wobbly(config)
    params["layers"]["alpha_a"] *= -1
    run = opened(config, params)
    rows = measures.scales(run)
    assert all(r["mean"] == -r["mean_abs"] for r in rows if r["scale"] == "alpha_a")
    assert {r["scale"] for r in rows} == set(SCALES) - {"s_u"}
    tables = {"scales": rows, "condition": [], "embeddings": measures.embeddings(run, None)}
    assert report.headlines(tables)["mean |alpha_a|"] > 0
    summary = summarize_params(config.model, params)
    assert summary["mean_alpha_a"] < 0 < summary["mean_alpha_m"]
    drawn = figures.scales(rows, ["run"])
    assert drawn.axes[0].get_title() == "mean alpha"
    assert max(line.get_ydata().min() for line in drawn.axes[0].lines[:1]) < 0
    histograms = figures.scale_histograms(measures.scale_histograms(run), ["run"])
    assert [a.axison for a in histograms.axes] == [True] * 5 + [False]
    absolute = dataclasses.replace(config.model, alpha_sign="absolute")
    again = opened(dataclasses.replace(config, model=absolute), params)
    assert figures.scales(measures.scales(again), ["run"]).axes[0].get_title() == "mean |alpha|"
