"""Every choice of the model goes with the others, and no code asks for the kind."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest
from choices import accepted, label, make, pairwise
from test_diagnose import by_hand, wobbly
from test_diagnose import slerp as by_hand_slerp
from test_generation import check_decoding, logits_of

import ngpt_jax
from ngpt_jax import sphere
from ngpt_jax.checkpoint.folder import find_checkpoint
from ngpt_jax.config import ConfigError
from ngpt_jax.config.presets import PRESETS
from ngpt_jax.diagnose import report, run_state
from ngpt_jax.diagnose.figures import FIGURES
from ngpt_jax.model import folding, inspect
from ngpt_jax.model.params import param_tree
from ngpt_jax.model.transformer import RESIDUALS
from ngpt_jax.optim.recipes import make_optimizer
from ngpt_jax.training import loop
from ngpt_jax.training.guard import init_guard
from ngpt_jax.training.step import TrainState, make_train_step, summarize_params

PACKAGE = Path(__file__).parent.parent / "ngpt_jax"
TOKENS = np.random.default_rng(0).integers(0, 20, (2, 14)).astype(np.int32)


def with_signs(params):
    """Parameters with every other alpha negative."""

    def turn(path, w):
        alpha = path[-1].key.startswith("alpha")
        return w * (-1.0) ** np.arange(w.size).reshape(w.shape) if alpha else w

    return jax.tree_util.tree_map_with_path(turn, params)


@pytest.mark.parametrize("fields", pairwise(), ids=label)
def test_logits_are_those_by_hand_of_folded_weights_and_of_the_cache(x64, fields):
    config = make(fields, dtype="float64", param_dtype="float64")
    model, params = config.model, with_signs(wobbly(config))

    def as_read(w, p):
        axis = p.unit_axis if model.normalize_on_read else None
        return w if axis is None else w / np.linalg.norm(w, axis=axis, keepdims=True)

    read = jax.tree.map(as_read, jax.tree.map(np.asarray, params), param_tree(model))
    where = np.zeros_like(TOKENS), np.arange(14)[None].repeat(2, axis=0)
    logits, angles, nats = by_hand(model, read, TOKENS, *where)
    raw = check_decoding(model, params, TOKENS, 1e-12, (11,))[..., :20]  # folded, with the cache
    most = np.abs(raw).max()
    np.testing.assert_allclose(raw, logits[..., :20], atol=1e-11 * most)
    folded = folding.folded_config(model)
    own = logits_of(folded, folding.fold(model, params), TOKENS)[..., :20]
    np.testing.assert_allclose(own, raw, atol=1e-12 * most)
    scales = {name for name in ("s_qk", "s_u", "s_v", "s_z") if fields[f"{name}.form"] != "none"}
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
    params = wobbly(config)  # compiling init_params would take as long as the step
    state = start = TrainState(np.int32(0), params, tx.init(params), init_guard())
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


def test_slerp_is_equation_6_where_alpha_is_one_number(x64):
    """And a step along the great circle turns h by the share alpha of the angle."""
    h, f = (sphere.normalize(x) for x in np.random.default_rng(0).standard_normal((2, 5, 16)))
    moved = RESIDUALS["slerp"](h, f, np.full(16, 0.3))
    np.testing.assert_allclose(moved, by_hand_slerp(np.asarray(h), np.asarray(f), 0.3), atol=1e-14)
    turned, angle = sphere.angle(h, moved), sphere.angle(h, f)
    np.testing.assert_allclose(turned, 0.3 * angle, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("theta", [0.0, 1e-18, 1e-7, 1e-3, np.pi - 1e-3, np.pi])
def test_a_slerp_step_is_finite_at_every_angle(theta, dtype):
    h = np.eye(16)[0]
    f = np.cos(theta) * h + np.sin(theta) * np.eye(16)[1]
    alpha = np.linspace(0, 0.6, 16)  # 0.5 is not among them: it would lead nowhere at pi
    h, f, alpha = (jax.numpy.asarray(x, dtype) for x in (h, f, alpha))
    moved = RESIDUALS["slerp"](h, f, alpha)
    grads = jax.grad(lambda *x: RESIDUALS["slerp"](*x).sum(), (0, 1, 2))(h, f, alpha)
    assert moved.dtype == dtype and abs(float(sphere.safe_norm(moved)) - 1) < 0.01
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in grads)


@pytest.mark.slow
def test_a_run_of_a_variant_trains_generates_and_is_diagnosed(small, tmp_path):
    path = str(tmp_path / "run")
    fields = {
        "residual": "exp", "alpha_depth": "root", "alpha_sign": "signed",
        "alpha_a.form": "scalar", "s_qk.form": "fixed", "s_z.form": "scalar",
    }  # fmt: skip
    values = {f"model.{name}": value for name, value in fields.items()}
    assert loop.train(small(**values, **{"sample.tokens": 4}), path) == 0
    model = ngpt_jax.load(path)
    assert model.config.model.residual == "exp"
    seen = [256, *b"the ", *model.generate("the ", 8, temperature=0).ids]
    logits = logits_of(model.config.model, model.params, np.array([seen]))[0, 4:-1, :257]
    assert seen[5:] == np.argmax(logits, axis=-1).tolist()
    checkpoint = find_checkpoint("workdir", path, None)
    run = run_state.read_state("variant", path, model.config, checkpoint)
    found, note = report.measure(run, None, 1)
    assert not note and {"scales", "angles", "entropy", "rotation", "gradient"} <= set(found)
    for name in ("scales", "scale_histograms"):
        FIGURES[name](found[name], ["variant"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "gpt", "alpha_a.form": "vector"}, "alpha_a.form = vector does not go with .*add"),
        ({"alpha_a.init": 0.0}, "model.alpha_a.init = 0 would stay 0"),
        ({"s_z.form": "scalar", "s_z.init": 0.0}, "model.s_z.init = 0 would stay 0"),
        ({"rms_eps": 0.0}, "model.rms_eps must be positive"),
        ({"alpha_m.form": "none"}, "alpha_m.form = none does not go with model.residual = lerp"),
        (
            {"alpha_a.form": "none", "residual": "exp"},
            "alpha_a.form = none does not go with .* exp",
        ),
        (
            {"kind": "gpt", "alpha_depth": "root"},
            "alpha_depth = root does not go with .*residual = add",
        ),
        ({"kind": "gpt", "alpha_sign": "signed"}, "alpha_sign = signed does not go with .* = add"),
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
