"""Every recipe for both models: it learns, keeps its state where told, and is cut over meshes."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from ngpt_jax.config import ConfigError, from_saved, to_json
from ngpt_jax.config.recipes import RECIPES as FACTS
from ngpt_jax.model.params import num_params, param_tree, unit_axes
from ngpt_jax.model.transformer import init_params
from ngpt_jax.optim import recipes
from ngpt_jax.optim.recipes import RECIPES, make_optimizer
from ngpt_jax.optim.transformations import keep_state_unless_ok, scale_by_adam
from ngpt_jax.parallel import rules
from ngpt_jax.projection import sphere_deviation
from ngpt_jax.training import layout, loop
from ngpt_jax.training.step import _loss_and_grads
from ngpt_jax.training.workdir import changes

CASES = [(r, kind) for r in RECIPES for kind in ("ngpt", "gpt") if (r, kind) != ("ngpt2026", "gpt")]
RATES = {"sgd": 0.3, "lion": 3e-3}


def make(tiny, recipe, kind, **fields):
    if kind == "ngpt" and recipe not in ("adamh", "muonh"):
        fields = {"optimizer.tangent": "both", "optimizer.max_angle": 0.3} | fields
    return tiny(**{
        "model.kind": kind, "optimizer.recipe": recipe, "optimizer.schedule": "constant",
        "optimizer.warmup_steps": 0, "optimizer.learning_rate": RATES.get(recipe, 2e-2), **fields,
    })  # fmt: skip


@pytest.fixture(scope="module")
def start():
    """get(config) -> the parameters at the start, and the loss of a batch with its gradients.

    Compiled once for each kind of model; the logits have their plain gradients.
    """
    made = {}
    ids = jax.random.randint(jax.random.key(2), (2, 4, 16), 0, 60)
    batch = {"inputs": ids[0], "targets": ids[1]}

    def get(config):
        kind = config.model.kind
        if kind not in made:
            plain = dataclasses.replace(config.optimizer, logit_gradient="plain")
            config = dataclasses.replace(config, optimizer=plain)
            run = jax.jit(lambda params: _loss_and_grads(config, params, batch))
            made[kind] = init_params(config.model, jax.random.key(0)), run
        return made[kind]

    return get


def test_every_recipe_has_a_function():
    assert list(RECIPES) == list(FACTS)


@pytest.mark.parametrize(("recipe", "kind"), CASES)
def test_learns_and_keeps_its_state_where_told(tiny, start, recipe, kind):
    config = make(tiny, recipe, kind)
    tx, _ = make_optimizer(config)
    first, loss_and_grads = start(config)

    @jax.jit
    def apply(params, state, grads, number, ok):
        updates, state = tx.update(grads, state, params, step=number, ok=ok)
        return optax.apply_updates(params, updates), state

    params, state, losses = first, jax.jit(tx.init)(first), []
    for number in range(8):
        loss, grads = loss_and_grads(params)
        if number == 4:
            nans = jax.tree.map(lambda g: g * jnp.nan, grads)
            _, kept = apply(params, state, nans, number, False)
            jax.tree.map(np.testing.assert_array_equal, kept, state)
        losses.append(float(loss))
        params, state = apply(params, state, grads, number, True)
    assert losses[-1] < losses[0] - 0.02, losses
    if kind == "ngpt":
        off = sphere_deviation(params, unit_axes(config.model))
        assert max(map(float, jax.tree.leaves(off))) < 1e-6
    elif recipe in ("adamh", "muonh"):
        check_norms(config, params, first)


def test_adamh_is_the_rule_of_its_paper(tiny):
    """W <- R n(W - lr R n(u)), with u of Adam, for a matrix of a layer; R is the norm at first."""
    config = make(tiny, "adamh", "gpt", **{"optimizer.clip_norm": 0.0})
    own, rng = param_tree(config.model), np.random.default_rng(0)
    params, *all_grads = (
        jax.tree.map(lambda p: rng.standard_normal(p.shape(config.model), np.float32), own)
        for _ in range(3)
    )
    tx, adam = make_optimizer(config)[0], optax.scale_by_adam(0.9, 0.95, 1e-8)
    expected, start, state, theirs = params, params, tx.init(params), adam.init(params)
    update, direction = jax.jit(tx.update), jax.jit(adam.update)

    def norm(w):
        return np.linalg.norm(w.reshape(len(w), -1), axis=1).reshape(-1, *[1] * (w.ndim - 1))

    def step(p, w, u, w0):
        if p.group in ("vector", "input_table"):
            return w - 2e-2 * config.model.width**-0.5 * np.asarray(u)
        w, u, w0 = (
            np.reshape(x, x.shape if p.axes[0] == "layers" else (1, -1)) for x in (w, u, w0)
        )
        moved = w - 2e-2 * norm(w0) * u / norm(u)
        return (norm(w0) * moved / norm(moved)).reshape(p.shape(config.model))

    for grads in all_grads:
        updates, state = update(grads, state, params, step=0)
        params = jax.tree.map(np.add, params, updates)
        u, theirs = direction(grads, theirs)
        expected = jax.tree.map(step, own, expected, u, start)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, params, expected)


def test_padding_of_the_vocabulary_is_no_part_of_the_norm_of_a_table(tiny):
    """A step of AdamH is as long as the rate says, for the rows that stand for tokens."""
    config = make(tiny, "adamh", "gpt", **{"model.vocab_multiple": 64})
    own = param_tree(config.model)
    params, real = init_params(config.model, jax.random.key(0)), config.model.vocab_size

    def gradient(p):
        g = jax.random.normal(jax.random.key(1), p.shape(config.model))
        return g.at[real:].set(0) if p.axes[0] == "vocab" else g

    def table(tree):
        (found,) = (x for p, x in zip(jax.tree.leaves(own), jax.tree.leaves(tree))
                    if p.group == "output_table")  # fmt: skip
        return found

    tx = make_optimizer(config)[0]
    update = jax.jit(tx.update)(jax.tree.map(gradient, own), tx.init(params), params, step=0)[0]
    before, moved = table(params), table(update)
    assert len(before) > real and not before[real:].any() and not moved[real:].any()
    assert jnp.linalg.norm(moved) / jnp.linalg.norm(before) == pytest.approx(2e-2, rel=0.02)


def check_norms(config, params, first):
    """Matrices of the blocks and the output table have the norms that they had, no others have."""
    own = jax.tree.leaves(param_tree(config.model))
    for p, new, old in zip(own, jax.tree.leaves(params), jax.tree.leaves(first)):
        axes = tuple(range(p.axes[0] == "layers", new.ndim))
        a, b = (jnp.sqrt(jnp.sum(jnp.square(w), axes)) for w in (new, old))
        kept = p.group in ("block_matrix", "output_table")
        assert np.allclose(a, b, rtol=1e-6) == kept, p.path


@pytest.mark.parametrize(("recipe", "kind"), CASES)
def test_states_are_sharded_like_their_parameters(tiny, recipe, kind):
    config = make(tiny, recipe, kind)
    mesh = jax.sharding.AbstractMesh((1, 2, 2, 1), rules.MESH_AXES)
    tx, _ = make_optimizer(config)
    state = layout.abstract_state(config, tx, mesh)
    whole = rules.replicated(mesh)
    specs = {x.shape: x.sharding.spec for x in jax.tree.leaves(state.params)}
    cut = 0
    for leaf in jax.tree.leaves(state.opt_state):
        if leaf.shape in specs:
            assert leaf.sharding.spec == specs[leaf.shape]
            cut += leaf.sharding != whole
        else:
            assert leaf.sharding.is_equivalent_to(whole, leaf.ndim)
    matrices = len(jax.tree.leaves(param_tree(config.model)))
    assert cut >= matrices / 2  # as many as one moment of each matrix has


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recipe": "adamh", "weight_decay": 0.1}, "weight_decay = 0.1 is for .* not adamh; leave"),
        ({"recipe": "muon", "weight_decay": 0.1}, "weight_decay = 0.1 pulls along unit vectors"),
        ({"recipe": "ngpt", "eps_gate": 1e-5}, "eps_gate = 1e-05 is for .* = ngpt2026, not ngpt"),
        ({"recipe": "sgd", "b2": 0.9}, "b2 = 0.9 is for .*, not sgd; leave it out"),
        (
            {"recipe": "lion", "momentum": 0.9},
            "momentum = 0.9 is for .* sgd, not lion",
        ),
        ({"muon_heads": "apart"}, "muon_heads = apart is for .* = muon, muonh, not ngpt"),
        ({"recipe": "ngpt2026", "project": False}, "project must not be false with .* ngpt2026"),
        ({"recipe": "muonh", "project": False}, "project must not be false with .* muonh"),
        ({"project": False, "max_angle": 0.1}, "max_angle is for unit vectors: it needs optimizer"),
        ({"project": False, "tangent": "both"}, "tangent is for unit vectors: it needs optimizer"),
        ({"max_angle": 3.2}, r"max_angle must lie in \(0, pi\], got 3.2"),
        ({"log_rho": 0.2}, "log_rho = 0.2 is for optimizer.schedule = log, not cosine; leave"),
        (
            {"decay_fraction": 0.5},
            "decay_fraction = 0.5 is for .* = wsd, wsd_sqrt, not cosine",
        ),
        (
            {"schedule": "constant", "final_fraction": 0.1},
            "final_fraction = 0.1 is for .*, not",
        ),
        ({"recipe": "adam"}, "recipe must be one of ngpt, adamw, muon, .*, got 'adam'"),
    ],
)
def test_refused(tiny, fields, message):
    with pytest.raises(ConfigError, match=f"^optimizer.{message}") as e:
        tiny(**{f"optimizer.{name}": value for name, value in fields.items()})
    assert "\n" not in str(e.value)


def test_the_recipe_of_2026_is_for_unit_vectors(tiny):
    with pytest.raises(ConfigError, match="ngpt2026 is for unit vectors: it needs model.weights"):
        tiny(**{"model.kind": "gpt", "optimizer.recipe": "ngpt2026"})


def test_what_the_presets_give_each_recipe(tiny):
    def given(kind, recipe):
        o = tiny(**{"model.kind": kind, "optimizer.recipe": recipe, "train.steps": 100}).optimizer
        where_read = o.momentum, o.gate, o.adam_rate
        return o.recipe, o.schedule, o.warmup_steps, o.weight_decay, *where_read

    assert given("ngpt", None) == ("ngpt", "cosine", 0, 0.0, None, None, None)
    assert given("gpt", None) == ("adamw", "cosine", 10, 0.1, None, None, None)
    assert given("gpt", "muon") == ("muon", "cosine", 10, 0.1, 0.95, None, None)
    assert given("gpt", "adamh") == ("adamh", "cosine", 10, 0.0, None, None, 0.25)
    assert given("ngpt", "muon") == ("muon", "cosine", 0, 0.0, 0.95, None, None)
    assert given("ngpt", "ngpt2026") == ("ngpt2026", "log", 10, 0.0, None, 0.5, None)


def test_another_recipe_on_resume_is_the_runs_own_and_refused(tiny):
    old, new = tiny(), tiny(**{"optimizer.recipe": "muon"})
    own = changes(old, new)["the run's own"]
    assert "optimizer.recipe: 'ngpt' -> 'muon'" in own
    for recipe, kind in CASES:
        config = make(tiny, recipe, kind)
        assert from_saved(to_json(config)) == config


def test_a_run_of_muon_goes_on_bit_for_bit(small, tmp_path):
    """Its state has no second moment of the matrices, and no momentum of the rest."""
    run = tmp_path / "run"
    fields = {"model.layers": 1, "train.steps": 4, "checkpoint.every": 2, "checkpoint.keep": 9}
    config = small(**fields, **{"optimizer.recipe": "muon"})
    assert loop.train(config, run) == 0
    whole = ocp.PyTreeCheckpointer().restore(run / "checkpoints/4/state")
    shutil.rmtree(run / "checkpoints/4")
    assert loop.train(config, run) == 0
    again = ocp.PyTreeCheckpointer().restore(run / "checkpoints/4/state")
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    with pytest.raises(ConfigError, match="holds another run .*optimizer.recipe: 'muon' -> 'ngpt'"):
        loop.train(small(**fields), run)


def test_a_run_from_before_the_recipes_goes_on(tiny):
    config = tiny()
    values = json.loads(to_json(config))
    for name in ("recipe", "base_steps", "output_rate", "log_rho", "momentum", "muon_heads", "gate",
                 "eps_gate", "logit_gradient", "logit_power", "tangent", "max_angle"):  # fmt: skip
        del values["optimizer"][name]
    for name in ("parametrization", "base_width", "base_layers"):
        del values["model"][name]
    assert from_saved(json.dumps(values)) == config


@pytest.mark.parametrize("eps_gate", [1e-3, 0.0])
def test_a_gate_of_exponent_1_is_an_epsilon(x64, eps_gate):
    ours = scale_by_adam(0.9, 0.95, 1e-8, 1.0, eps_gate)
    theirs = optax.scale_by_adam(0.9, 0.95, 1e-8 + eps_gate, eps_root=0.0)
    w = jnp.zeros(5)
    state, their_state = ours.init(w), theirs.init(w)
    for i in range(4):
        g = jax.random.normal(jax.random.key(i), (5,)) * jnp.array([1.0, 1e-2, 1e-3, 1e-6, 0])
        u, state = ours.update(g, state)
        expected, their_state = theirs.update(g, their_state)
        np.testing.assert_allclose(u, expected, rtol=1e-12)


def test_the_gate_by_hand_and_at_the_ends():
    tx = scale_by_adam(0.0, 0.0, 1e-8, 0.5, 1e-4)
    for g, gate in ((1e-4, 0.5), (1e-2, 10 / 11), (1e-30, 0.01 / 1.01), (1e18, 1.0)):
        u, _ = tx.update(jnp.array([g]), tx.init(jnp.zeros(1)))
        d = g + 1e-8
        np.testing.assert_allclose(u, [gate * g / d], rtol=2e-3)
    u, _ = tx.update(jnp.zeros(1), tx.init(jnp.zeros(1)))
    assert u == 0


def test_the_default_of_eps_gate_falls_with_the_number_of_parameters(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(recipes, "scale_by_adam", lambda *a: seen.append(a) or optax.identity())
    for fields in ({}, {"optimizer.eps_gate": 1e-5, "optimizer.gate": 1.0}):
        config = make(tiny, "ngpt2026", "ngpt", **fields)
        make_optimizer(config)
    count = num_params(config.model)
    assert seen == [
        (0.9, 0.95, 1e-8, 0.5, recipes.GATED / count**0.5), (0.9, 0.95, 1e-8, 1.0, 1e-5),
    ]  # fmt: skip


@pytest.mark.parametrize("ok", [True, False])
def test_any_state_stays_where_told(ok):
    tx = keep_state_unless_ok(optax.trace(0.9))
    old = tx.init(jnp.ones(3))._replace(trace=jnp.arange(3.0))
    updates, new = tx.update(jnp.full(3, jnp.inf if not ok else 1.0), old, ok=jnp.asarray(ok))
    np.testing.assert_array_equal(new.trace, updates if ok else old.trace)
