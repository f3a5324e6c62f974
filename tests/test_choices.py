"""Every choice of the model goes with the others, and no code asks for the kind."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest
from choices import accepted, label, make, pairwise
from test_diagnose import by_hand
from test_generation import check_decoding, logits_of, moved

from ngpt_jax.config import ConfigError
from ngpt_jax.config.presets import PRESETS
from ngpt_jax.decoding import folding
from ngpt_jax.model import inspect
from ngpt_jax.model.params import param_tree
from ngpt_jax.optim.recipes import make_optimizer
from ngpt_jax.training.step import init_state, make_train_step, summarize_params

PACKAGE = Path(__file__).parent.parent / "ngpt_jax"
TOKENS = np.random.default_rng(0).integers(0, 20, (2, 14)).astype(np.int32)


@pytest.mark.parametrize("fields", pairwise(), ids=label)
def test_logits_are_those_by_hand_of_folded_weights_and_of_the_cache(x64, fields):
    model = make(fields, dtype="float64", param_dtype="float64").model
    params = moved(model)

    def as_read(w, p):
        axis = p.unit_axis if model.normalize_on_read else None
        return w if axis is None else w / np.linalg.norm(w, axis=axis, keepdims=True)

    read = jax.tree.map(as_read, jax.tree.map(np.asarray, params), param_tree(model))
    where = np.zeros_like(TOKENS), np.arange(14)[None].repeat(2, axis=0)
    logits, angles, nats = by_hand(model, read, TOKENS, *where)
    most = check_decoding(model, params, TOKENS, 1e-12)  # of folded weights, with the cache
    raw = logits_of(model, params, TOKENS)[..., :20]
    np.testing.assert_allclose(raw, logits[..., :20], atol=1e-11 * most)
    folded = folding.folded_config(model)
    own = logits_of(folded, folding.fold(model, params), TOKENS)[..., :20]
    np.testing.assert_allclose(own, raw, atol=1e-12 * most)
    scales = {name for name in ("s_qk", "s_u", "s_v", "s_z") if fields[f"{name}.form"] == "vector"}
    assert folded.folded == bool(scales)
    assert (folded == model) == (not scales and not model.normalize_on_read)

    @jax.jit
    def measure(params, batch):
        nats, _ = inspect.attention_entropies(model, params, batch)
        return inspect.block_angles(model, params, batch), nats

    found_angles, found_nats = measure(params, {"inputs": TOKENS})
    np.testing.assert_allclose(found_nats, nats, atol=1e-9)
    for name in inspect.BLOCKS:  # the arccos by hand is good to 1e-6 degrees
        np.testing.assert_allclose(found_angles[name], angles[name], atol=2e-6)


@pytest.mark.parametrize("fields", pairwise(), ids=label)
def test_training_moves_every_parameter(x64, fields):
    config = make(fields, dtype="float64", param_dtype="float64")
    tx, schedule = make_optimizer(config)
    state = start = init_state(config, tx)
    step = jax.jit(make_train_step(config, tx, schedule))
    rng = np.random.default_rng(0)
    for _ in range(2):
        x = rng.integers(0, 20, (2, 17)).astype(np.int32)
        state, metrics = step(state, {"inputs": x[:, :-1], "targets": x[:, 1:]})
        assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    stayed = jax.tree.map(lambda a, b: np.array_equal(a, b), start.params, state.params)
    assert not any(jax.tree.leaves(stayed)), stayed
    summary, diagnosed = jax.jit(
        lambda params, batch: (
            summarize_params(config.model, params), inspect.summarize(config.model, params, batch)
        )
    )(state.params, {"inputs": x[:, :-1]})  # fmt: skip
    assert ("sphere_deviation" in summary) == (fields["weights"] == "sphere")
    assert summary.get("sphere_deviation", 0) < 1e-12
    assert all(np.isfinite(value) for value in (*summary.values(), *diagnosed.values()))
    assert set(inspect.effective_scales(config.model, state.params)) == {
        key.removeprefix("mean_") for key in summary if key.startswith("mean_")
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "gpt", "alpha_a.form": "vector"}, "alpha_a.form = vector does not go with .*add"),
        ({"alpha_m.form": "none"}, "alpha_m.form = none does not go with model.residual = lerp"),
        ({"residual": "slerp", "branch_norm": "none"}, "slerp needs model.branch_norm = unit"),
        ({"kind": "gpt", "normalize_on_read": True}, "normalize_on_read needs .*weights = sphere"),
        ({"kind": "gpt", "folded": True}, "folded needs scales to fold"),
    ],
)
def test_choices_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        make(fields)


@pytest.mark.parametrize("kind", PRESETS)
def test_what_follows_from_another_choice_need_not_be_given(kind):
    assert accepted({"kind": kind, "residual": "add"})
    assert accepted({"kind": kind, "residual": "lerp"})
    assert make({"kind": kind, "weights": "free"}).optimizer.project is False
    assert make({"kind": kind, "weights": "sphere"}).optimizer.project is True


# ---------------------------------------------------------------------- no code asks for the kind


def asks(tree):
    """Lines that do more with the kind of a model's config than print it or hand it on by name.

    A comparison, an index, a match, a .get() and a name for later use are such lines.
    """
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "kind"  # not that of a task or a chip
            and ast.unparse(node.value).rpartition(".")[2] in ("config", "model", "c", "m")
            and not isinstance(parents[node], ast.FormattedValue | ast.Dict | ast.keyword)
        ):
            yield node.lineno


@pytest.mark.parametrize("room", sorted(p.name for p in PACKAGE.iterdir() if p.name != "config"))
def test_no_code_outside_the_config_asks_for_the_kind(room):
    files = [PACKAGE / room] if room.endswith(".py") else (PACKAGE / room).rglob("*.py")
    found = {
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in files for line in asks(ast.parse(path.read_text()))
    }  # fmt: skip
    assert not found
