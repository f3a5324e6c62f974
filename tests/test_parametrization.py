"""Rates and scales that follow the shape, and every place that reads them."""

import jax
import numpy as np
import pytest

from ngpt_jax import config as config_lib
from ngpt_jax.config import ConfigError, from_saved, to_json
from ngpt_jax.config.experiment import load_config
from ngpt_jax.decoding.folding import for_inference
from ngpt_jax.export.huggingface import _architecture
from ngpt_jax.export.reference_checkpoint import _as_theirs
from ngpt_jax.model import inspect
from ngpt_jax.model.folding import fold
from ngpt_jax.model.parametrization import rate_factor
from ngpt_jax.model.params import param_tree, scale_factor
from ngpt_jax.model.transformer import init_params
from ngpt_jax.optim.recipes import make_optimizer, rate_factors
from ngpt_jax.parallel.mesh import make_mesh
from ngpt_jax.training import layout
from ngpt_jax.training.step import summarize_params

GROUPS = ("input_table", "block_matrix", "output_table", "vector")
NUGPT = {"model.parametrization": "nugpt", "model.base_width": 4, "model.base_layers": 1,
         "optimizer.base_steps": 1}  # fmt: skip
SCALES = ("alpha_a", "alpha_m", "s_qk", "s_u", "s_v", "s_z")


def parameters(model):
    """Scales as they start, and matrices of any numbers: without the time to compile an init."""

    def make(p):
        value = getattr(model, p.name).scale if p.name in SCALES else 0.25
        return np.full(p.shape(model), value, np.float32)

    return jax.tree.map(make, param_tree(model))


def factors(config):
    return [rate_factor(config, group) for group in GROUPS]


def test_rates_of_nugpt(tiny):
    """Width times 4, steps times 8: section 3.1 of its paper."""
    config = tiny(**NUGPT)
    np.testing.assert_allclose(factors(config), np.array([4**-0.5, 4**-0.75, 4**-0.75 / 2, 1]) / 2)
    own = tiny(**NUGPT, **{"optimizer.output_rate": 1.0})
    assert rate_factor(own, "output_table") == rate_factor(own, "block_matrix")
    for name, factor in (("base_width", [0.5, 0.5, 0.25, 0.5]), ("base_layers", factors(config))):
        without = tiny(**NUGPT | {f"model.{name}": None})
        np.testing.assert_allclose(factors(without), factor)
    np.testing.assert_allclose(
        factors(tiny(**NUGPT | {"optimizer.base_steps": None})), 2 * np.array(factors(config))
    )


def test_scales_of_nugpt(tiny):
    """Depth times 2, width times 4."""
    model = tiny(**NUGPT).model
    assert [getattr(model, name).scale for name in SCALES] == [0.03, 0.03, 0.03, 1, 1, 0.03]
    effective = [scale_factor(model, name) * getattr(model, name).scale for name in SCALES]
    np.testing.assert_allclose(effective, [0.025, 0.025, 1, 1, 1, 2])
    params = init_params(model, jax.random.key(0))
    assert params["s_z"][0] == params["layers"]["alpha_m"][1, 2] == np.float32(0.03)
    summary = summarize_params(model, params)
    assert [float(summary[f"mean_{n}"]) for n in SCALES] == pytest.approx(effective, rel=1e-5)
    given = tiny(**NUGPT, **{"model.s_z.scale": 0.5, "model.alpha_a.init": 0.1}).model
    assert (given.s_z.scale, scale_factor(given, "alpha_a")) == (0.5, 0.05 / 0.03)


def test_the_rate_of_root_width(tiny):
    """0.24 with base_width 1 is 0.24 / sqrt(width)."""
    config = tiny(**{"model.parametrization": "root_width", "model.base_width": 1,
                     "optimizer.learning_rate": 0.24, "optimizer.recipe": "sgd",
                     "optimizer.momentum": 0.0, "optimizer.clip_norm": 0.0,
                     "optimizer.project": False})  # fmt: skip
    params = parameters(config.model)
    ones = jax.tree.map(np.ones_like, params)
    tx, schedule = make_optimizer(config)
    updates, _ = tx.update(ones, tx.init(params), params, step=0)
    for u in jax.tree.leaves(updates):
        np.testing.assert_allclose(u, -0.24 / 4, rtol=1e-6)
    assert float(schedule(0)) == pytest.approx(0.24)
    assert config.model.alpha_a.scale == 0.25


def test_nugpt_at_its_base_shape_is_ngpt_with_its_constants(tiny):
    at_base = {"model.parametrization": "nugpt", "model.base_width": 16, "model.base_layers": 2,
               "optimizer.base_steps": 8}  # fmt: skip
    constants = {f"model.{name}.scale": 0.03 for name in SCALES if name not in ("s_u", "s_v")}
    constants |= {"optimizer.output_rate": 0.5}
    texts = []
    for fields in (at_base, constants):
        config = tiny(**fields)
        mesh = make_mesh(config)
        config, _ = layout.for_mesh(config, mesh)
        texts.append(layout.lower_train_step(config, mesh).as_text())
    assert texts[0] == texts[1]


def test_without_a_parametrization_no_group_has_a_factor(tiny):
    for kind in ("ngpt", "gpt"):
        config = tiny(**{"model.kind": kind})
        assert factors(config) == [1, 1, 1, 1] and rate_factors(config) is None
        assert "rate times" not in layout.parameter_table(config, make_mesh(config))


def test_the_table_of_parameters_shows_the_factors(tiny):
    config = tiny(**NUGPT)
    table = layout.parameter_table(config, make_mesh(config)).splitlines()
    column = table[0].index("rate times")
    for line in table[2:]:
        group = next(p.group for p in jax.tree.leaves(param_tree(config.model))
                     if p.path == line.split()[0])  # fmt: skip
        assert float(line[column:].split()[0]) == pytest.approx(rate_factor(config, group), 1e-3)


def test_a_config_is_resolved_again_and_its_width_overridden(tiny):
    config = tiny(**NUGPT)
    assert from_saved(to_json(config)) == config
    values = config_lib.default_config()
    values.model.update(parametrization="nugpt", base_width=16, base_layers=2, width=16, layers=2)
    values.train.steps = 8
    wide = load_config(values, [("model.width", "64"), ("model.layers", "4")])
    assert rate_factor(wide, "block_matrix") == pytest.approx(4**-0.75)
    assert scale_factor(wide.model, "s_z") == pytest.approx(2 / 0.03)
    assert scale_factor(wide.model, "alpha_a") == pytest.approx(0.025 / 0.03)


def test_every_reader_of_a_scale_takes_its_factors(tiny):
    """Folding, decoding, the exports and the reports, against numbers by hand."""
    model = tiny(**NUGPT).model
    params = parameters(model)
    folded, layers = fold(model, params), params["layers"]
    rtol = 1e-5
    np.testing.assert_allclose(
        folded["output_embedding"], 2 * params["output_embedding"], rtol=rtol
    )
    alphas = for_inference(model, params)["layers"][1]["alpha_a"]
    np.testing.assert_allclose(alphas, 0.025, rtol=rtol)
    exported = _architecture(model)["scale_factors"]
    assert exported == {name: scale_factor(model, name) for name in SCALES}
    assert exported["alpha_m"] == pytest.approx(0.025 / 0.03)
    theirs = _as_theirs(model, params, 0.03)  # their constants: 0.05 / 0.03 and 1 / 0.03
    np.testing.assert_allclose(theirs["layers"]["alpha_a"], layers["alpha_a"] / 2, rtol=rtol)
    np.testing.assert_allclose(theirs["s_z"], 2 * params["s_z"], rtol=rtol)
    np.testing.assert_array_equal(theirs["layers"]["s_qk"], layers["s_qk"])
    shown = inspect.effective_scales(model, params)
    np.testing.assert_allclose(shown["alpha_m"], 0.025, rtol=rtol)
    np.testing.assert_allclose(shown["s_z"], 2, rtol=rtol)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.base_width": 4}, "model.base_width = 4 is for model.parametrization = nugpt, "),
        ({"optimizer.base_steps": 4}, "optimizer.base_steps = 4 is for .* nugpt, not ngpt"),
        (
            {"model.parametrization": "root_width", "model.base_width": 1, "model.base_layers": 2},
            "model.base_layers = 2 is for .* nugpt, not root_width",
        ),
        ({"model.parametrization": "root_width"}, ".* root_width needs model.base_width"),
        ({"model.parametrization": "nugpt", "model.kind": "gpt"}, ".* = nugpt is for unit vectors"),
    ],
)
def test_refused(tiny, fields, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        tiny(**fields)
