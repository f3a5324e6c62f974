"""Structure and invariants of the two models."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngpt_jax import sphere
from ngpt_jax.export.reference_layout import from_reference, to_reference
from ngpt_jax.model.params import num_params, padded_vocab_size, param_tree, unit_axes
from ngpt_jax.model.rotary import apply_rope, interleaved_to_half, rope_tables
from ngpt_jax.model.transformer import Transformer, init_params
from ngpt_jax.projection import sphere_deviation
from ngpt_jax.training.step import summarize_params, summed_nats

TOKENS = np.random.default_rng(0).integers(0, 60, (2, 16))


def logits_of(config, params, tokens=TOKENS):
    return jax.jit(Transformer(config).apply)({"params": params}, jnp.asarray(tokens))


def loss_and_grads(config, params):
    batch = {"inputs": jnp.asarray(TOKENS), "targets": jnp.asarray(np.roll(TOKENS, -1, 1))}
    return jax.jit(jax.value_and_grad(lambda p: summed_nats(config, p, batch) / TOKENS.size))(
        params
    )


@pytest.mark.parametrize(
    ("kind", "layers", "width", "heads", "count"),
    [
        ("gpt", 24, 1024, 16, 468_239_360),
        ("ngpt", 24, 1024, 16, 468_491_520),
        ("gpt", 36, 1280, 20, 1_025_731_840),
        ("ngpt", 36, 1280, 20, 1_026_177_280),
    ],
)
def test_parameter_counts_of_the_paper(tiny, kind, layers, width, heads, count):
    fields = {"kind": kind, "layers": layers, "width": width, "heads": heads, "vocab_size": 32000}
    config = tiny(**{f"model.{name}": value for name, value in fields.items()}).model
    assert num_params(config) == count
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_axes_and_shapes_agree(tiny, kind):
    config = tiny(**{"model.kind": kind, "model.kv_heads": 1}).model
    params = init_params(config, jax.random.key(0))
    table = param_tree(config)
    assert jax.tree.structure(params) == jax.tree.structure(table)
    for leaf, p in zip(jax.tree.leaves(params), jax.tree.leaves(table)):
        assert leaf.ndim == len(p.axes)
    matrices = [a for a in jax.tree.leaves(unit_axes(config)) if a is not None]
    assert len(matrices) == (9 if kind == "ngpt" else 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_matrix_starts_on_the_sphere(tiny, dtype):
    config = tiny(**{"model.param_dtype": dtype}).model
    params = init_params(config, jax.random.key(0))
    off = sphere_deviation(params, unit_axes(config))
    assert max(jax.tree.leaves(off)) < (1e-6 if dtype == "float32" else 2**-8)


def test_hidden_states_stay_on_the_sphere(tiny):
    config = tiny().model
    params = init_params(config, jax.random.key(0))
    _, state = Transformer(config).apply({"params": params}, TOKENS, mutable="intermediates")
    state = state["intermediates"]
    for h in (state["embedded"][0], *state["layers"]["hidden"][0]):
        assert np.max(sphere.deviation(h)) < 1e-6


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_later_tokens_change_no_earlier_logit(tiny, kind):
    config = tiny(**{"model.kind": kind}).model
    params = init_params(config, jax.random.key(0))
    changed = TOKENS.copy()
    changed[:, 9] = (changed[:, 9] + 1) % 60
    a, b = logits_of(config, params), logits_of(config, params, changed)
    assert np.array_equal(a[:, :9], b[:, :9])
    assert not np.array_equal(a[:, 9:], b[:, 9:])


def test_scores_depend_on_relative_position_alone():
    x = jax.random.normal(jax.random.key(0), (2, 1, 1, 8))

    def score(q_position, k_position):
        q, k = (
            apply_rope(v[None], rope_tables(jnp.array([p]), 8, 10000.0))
            for v, p in zip(x, (q_position, k_position))
        )
        return float(jnp.sum(q * k))

    assert score(7, 3) == pytest.approx(score(11, 7), abs=1e-5)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)
    rotated = apply_rope(x, rope_tables(jnp.array([5]), 8, 10000.0))
    assert np.allclose(sphere.safe_norm(rotated), sphere.safe_norm(x), atol=1e-6)


def test_rope_layouts_correspond():
    """Rotating interleaved pairs, then reordering, is reordering, then rotating halves."""
    head_dim, t = 8, 5
    x = np.random.default_rng(0).normal(size=head_dim)
    angle = t * 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    pairs = np.stack([
        x[0::2] * np.cos(angle) - x[1::2] * np.sin(angle),
        x[1::2] * np.cos(angle) + x[0::2] * np.sin(angle),
    ], axis=-1).reshape(-1)  # fmt: skip
    order = interleaved_to_half(head_dim)
    halves = apply_rope(
        jnp.asarray(x[order])[None, None, None], rope_tables(jnp.array([t]), 8, 1e4)
    )
    assert np.allclose(halves[0, 0, 0], pairs[order], atol=1e-6)


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_grouped_queries_equal_repeated_key_heads(tiny, kind):
    grouped = tiny(**{"model.kind": kind, "model.heads": 4, "model.kv_heads": 2}).model
    params = init_params(grouped, jax.random.key(0))
    full = dataclasses.replace(grouped, kv_heads=4)
    repeated = dict(params["layers"])
    for name in ("key_kernel", "value_kernel"):
        repeated[name] = jnp.repeat(params["layers"][name], 2, axis=2)
    if kind == "ngpt":
        s_qk = params["layers"]["s_qk"]
        s_qk = s_qk * jax.random.uniform(jax.random.key(1), s_qk.shape, minval=0.5, maxval=2)
        params = params | {"layers": params["layers"] | {"s_qk": s_qk}}
        repeated["s_qk"] = jnp.repeat(s_qk, 2, axis=1)
    a = logits_of(grouped, params)
    b = logits_of(full, params | {"layers": repeated})
    np.testing.assert_allclose(a[..., :60], b[..., :60], atol=2e-6)


def test_reference_layout_with_grouped_queries(tiny):
    config = tiny(**{"model.kv_heads": 1}).model
    params = init_params(config, jax.random.key(0))
    back = from_reference(to_reference(params, config), config)
    for name, leaf in back["layers"].items():
        assert np.array_equal(leaf, params["layers"][name]), name
    assert np.array_equal(back["s_z"], params["s_z"])


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_padding_of_the_vocabulary(tiny, kind):
    config = tiny(**{"model.kind": kind}).model
    assert padded_vocab_size(config) == 128
    params = init_params(config, jax.random.key(0))
    assert np.all(np.isneginf(logits_of(config, params)[..., 60:]))
    _, grads = loss_and_grads(config, params)
    for name in ("input_embedding", "output_embedding", *(["s_z"] if kind == "ngpt" else [])):
        assert not np.any(grads[name][60:]), name
        assert np.any(grads[name][:60]), name
    if kind == "ngpt":
        padded = params["output_embedding"][60:]
        assert np.max(sphere.deviation(padded)) < 1e-6
        spoiled = params | {"s_z": params["s_z"].at[60:].set(1e3)}
        mean = summarize_params(config, params)["mean_s_z"]
        assert summarize_params(config, spoiled)["mean_s_z"] == mean


def test_normalize_on_read_gives_the_same_logits_and_tangent_gradients(tiny):
    plain = tiny().model
    on_read = dataclasses.replace(plain, normalize_on_read=True)
    params = init_params(plain, jax.random.key(0))
    np.testing.assert_allclose(
        logits_of(plain, params)[..., :60], logits_of(on_read, params)[..., :60], atol=2e-6
    )
    stretched = jax.tree.map(
        lambda w, axis: w if axis is None else 3 * w,
        params, unit_axes(plain), is_leaf=lambda x: x is None,
    )  # fmt: skip
    np.testing.assert_allclose(
        logits_of(on_read, stretched)[..., :60], logits_of(on_read, params)[..., :60], atol=2e-6
    )
    _, grads = loss_and_grads(on_read, params)

    def radial(w, g, axis):
        return 0.0 if axis is None else float(jnp.max(jnp.abs(jnp.sum(w * g, axis=axis))))

    radials = jax.tree.leaves(
        jax.tree.map(radial, params, grads, unit_axes(plain), is_leaf=lambda x: x is None)
    )
    assert max(radials) < 1e-7


@pytest.mark.parametrize(
    "change",
    [{"remat": "full"}, {"remat": "dots"}, {"remat": "attention"}, {"scan_layers": False}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_how_blocks_are_compiled_changes_nothing(x64, tiny, kind, change):
    config = tiny(**{"model.kind": kind, "model.dtype": "float64", "model.param_dtype": "float64"})
    params = init_params(config.model, jax.random.key(0))
    loss, grads = loss_and_grads(config.model, params)
    other_loss, other = loss_and_grads(dataclasses.replace(config.model, **change), params)
    assert abs(loss - other_loss) < 1e-12
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_bfloat16_compute_stays_near_float32(tiny, kind):
    config = tiny(**{"model.kind": kind}).model
    low = dataclasses.replace(config, dtype="bfloat16")
    params = init_params(config, jax.random.key(0))
    a, b = logits_of(config, params)[..., :60], logits_of(low, params)[..., :60]
    assert b.dtype == jnp.float32
    assert np.max(np.abs(a - b)) < 0.03 * np.max(np.abs(a))
    loss, grads = loss_and_grads(low, params)
    assert all(g.dtype == jnp.float32 and np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    assert abs(loss - loss_and_grads(config, params)[0]) < 0.01


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_qk_norm_is_a_switch(tiny, kind):
    config = tiny(**{"model.kind": kind, "model.qk_norm": kind == "gpt"}).model
    params = init_params(config, jax.random.key(0))
    assert ("query_norm" in params["layers"]) == (kind == "gpt")
    default = dataclasses.replace(config, qk_norm=kind == "ngpt")
    if kind == "gpt":
        bare = {k: v for k, v in params["layers"].items() if k not in ("query_norm", "key_norm")}
        other = logits_of(default, params | {"layers": bare})
    else:
        other = logits_of(default, params)
    assert np.max(np.abs(logits_of(config, params) - other)[..., :60]) > 1e-5


def test_alpha_counts_by_its_magnitude(tiny):
    config = tiny().model
    params = init_params(config, jax.random.key(0))
    flipped = {name: -w if name.startswith("alpha") else w for name, w in params["layers"].items()}
    a, b = logits_of(config, params), logits_of(config, params | {"layers": flipped})
    assert np.array_equal(a, b)
