"""Diagnostics against plain numpy, the command from end to end, and what training logs of them."""

import csv
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from ngpt_jax import plots
from ngpt_jax.checkpoint.folder import find_checkpoint
from ngpt_jax.config import ConfigError, experiment
from ngpt_jax.config.fields import SCALES
from ngpt_jax.data import pipeline
from ngpt_jax.diagnose import figures as drawing
from ngpt_jax.diagnose import measures, report
from ngpt_jax.diagnose.run_state import RunState, load_text, read_state, seen_ids
from ngpt_jax.inference import opening
from ngpt_jax.model import inspect as d
from ngpt_jax.model.folding import round_matrices
from ngpt_jax.model.params import param_tree
from ngpt_jax.model.transformer import init_params
from ngpt_jax.optim.recipes import make_optimizer
from ngpt_jax.training import evaluator, loop
from ngpt_jax.training.step import TrainState, make_train_step, summed_nats

ROOT = Path(__file__).parent.parent
KINDS = ["ngpt", "gpt"]
KERNELS = ("query", "key", "value", "out", "up", "gate", "down")


def wobbly(config, seed=0):
    """Random parameters, no scale or gain a constant."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))

    def draw(leaf, p):
        x = rng.standard_normal(leaf.shape)
        x = x if p.is_matrix else 1 + 0.3 * x
        return jnp.asarray(x / math.sqrt(config.model.width), leaf.dtype)

    return jax.tree.map(draw, shapes, param_tree(config.model))


def opened(config, params):
    state = TrainState(0, params, None, None)
    return RunState("run", epath.Path("run"), config, state, {})


def f64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def degrees(a, b):
    """By the arccos of each pair of vectors, one after the other."""
    out = np.empty(a.shape[:-1])
    for i in np.ndindex(out.shape):
        cosine = a[i] @ b[i] / math.sqrt((a[i] @ a[i]) * (b[i] @ b[i]))
        out[i] = math.degrees(math.acos(min(1.0, max(-1.0, cosine))))
    return out


# --------------------------------------------------------------------------------- parameters alone


@pytest.mark.parametrize("kind", KINDS)
def test_condition_number_of_every_head(tiny, kind):
    fields = {"model.kind": kind, "model.width": 24, "model.heads": 4, "model.kv_heads": 2}
    config = tiny(**fields, **{"model.scan_layers": False})
    params = wobbly(config)
    rows = measures.condition_numbers(opened(config, params))
    layers, wanted, again = f64(params["layers"]), {}, {}
    for layer in range(2):
        for name in KERNELS:
            w = layers[f"{name}_kernel"][layer]
            if name == "out":
                heads = [w[i].T for i in range(4)]
            elif name in ("query", "key", "value"):
                heads = [w[:, i] for i in range(w.shape[1])]
            else:
                heads = [w.T if name == "down" else w]  # (embed, mlp)
            for i, head in enumerate(heads):
                wanted[name, layer, i] = np.linalg.cond(head)
                columns = [column / np.linalg.norm(column) for column in head.T]
                again[name, layer, i] = np.linalg.cond(np.stack(columns, axis=1))
    for name in KERNELS:
        heads = {"query": 4, "out": 4, "key": 2, "value": 2}.get(name, 1)
        for layer in range(2):
            some = [r for r in rows if (r["matrix"], r["layer"]) == (f"{name}_kernel", layer)]
            assert len(some) == 1 + (heads if heads > 1 else 0)
            assert all(r["depth"] == layer for r in some)
            for row in some:
                for column, numbers in (("condition", wanted), ("renormalized", again)):
                    if column == "renormalized" and kind == "ngpt":
                        assert row[column] is None
                        continue
                    of_heads = [numbers[name, layer, i] for i in range(heads)]
                    median = row["head"] == "median"
                    right = np.median(of_heads) if median else of_heads[row["head"]]
                    assert row[column] == pytest.approx(right, rel=1e-9)


def test_singular_and_zero_matrices_are_told_and_drawn(tiny, tmp_path):
    config = tiny(**{"model.kind": "gpt"})
    params = wobbly(config)
    params["layers"]["query_kernel"] = jnp.zeros_like(params["layers"]["query_kernel"])
    run = opened(config, params)
    rows = measures.condition_numbers(run)
    assert {r["condition"] for r in rows if r["matrix"] == "query_kernel"} == {math.inf}
    for draw, table in (
        (drawing.condition_numbers, rows),
        (drawing.query_and_key, measures.query_and_key(run, [0, 1])),
    ):
        plots.save(draw(table, ["run"]), tmp_path / "figure.png")
    zero, one = np.zeros((2, 3)), np.eye(3)[:2]
    assert np.array_equal(d.angles_between(zero, one), [90, 90])
    assert np.array_equal(d.angles_between(zero, zero), [0, 0])
    assert d.radial_and_tangential(zero, one).share() == 0
    assert d.radial_and_tangential(one, zero).share() == 0
    assert d.radial_and_tangential(one, zero).angles().size == 0
    for table in (zero, one, np.ones((1, 3)), np.ones((5, 3))):
        assert np.isfinite(d.eigenvalues_over_median(table)).all()
        assert np.isfinite(d.pairwise_cosines(table)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seen", ["all", "some"])
def test_embeddings_without_padding_and_without_ids_that_were_never_seen(tiny, kind, seen):
    config = tiny(**{"model.kind": kind})
    params = wobbly(config)
    for name in d.TABLES:  # padding that would be seen everywhere
        params[name] = params[name].at[60:].set(1e3)
    seen = None if seen == "all" else np.arange(60) % 3 > 0
    rows = measures.embeddings(opened(config, params), seen)
    assert {r["ids_left_out"] for r in rows} == {None if seen is None else 20}
    for name in d.TABLES:
        table = np.asarray(params[name], np.float64)[:60]
        table = table if seen is None else table[seen]

        def found(quantity, name=name):
            some = [r for r in rows if (r["table"], r["quantity"]) == (name, quantity)]
            assert (some[0]["position"], some[-1]["position"]) == (0, 1)
            return [r["value"] for r in some]

        assert found("norm") == pytest.approx(sorted(math.sqrt(row @ row) for row in table))
        centered = table - table.mean(0)
        eigen = np.linalg.eigvalsh(centered.T @ centered / (len(table) - 1))[::-1]
        assert found("eigenvalue_over_median") == pytest.approx(eigen / np.median(eigen))
        cosines = sorted(
            table[i] @ table[j] / math.sqrt((table[i] @ table[i]) * (table[j] @ table[j]))
            for i in range(len(table)) for j in range(i)
        )  # fmt: skip
        assert found("cosine") == pytest.approx(np.quantile(cosines, np.linspace(0, 1, 201)))


def test_scales_and_their_histograms(tiny):
    config = tiny()
    params = wobbly(config)
    params["layers"]["alpha_a"] *= -1  # the sign means nothing
    run = opened(config, params)
    rows, histograms = measures.scales(run), measures.scale_histograms(run)
    for name in SCALES:
        spec = getattr(config.model, name)
        raw = params[name][:60] if name == "s_z" else params["layers"][name]
        value = np.asarray(raw, np.float64) * spec.init / spec.scale
        value = np.abs(value) if name.startswith("alpha") else value
        value = value.reshape(1 if name == "s_z" else 2, -1)
        some = [r for r in rows if r["scale"] == name]
        assert [r["mean"] for r in some] == pytest.approx(value.mean(1))
        assert [r["p50"] for r in some] == pytest.approx(np.median(value, 1))
        for layer, of_layer in enumerate(value):
            bins = [r for r in histograms if r["scale"] == name and r["layer"] in (layer, None)]
            counts = [
                np.sum((of_layer >= r["from"]) & (of_layer < r["to"])) / (r["to"] - r["from"])
                for r in bins[:-1]
            ]
            right = np.array(counts) / of_layer.size
            assert [r["density"] for r in bins[:-1]] == pytest.approx(right)
    assert measures.scales(opened(tiny(**{"model.kind": "gpt"}), {})) == []


def test_norms_and_singular_values_of_queries_and_keys(tiny):
    config = tiny(**{"model.kind": "gpt", "model.layers": 3})
    params = wobbly(config)
    run = opened(config, params)
    assert report.middle_layers(run) == [1, 2]
    rows = measures.query_and_key(run, [2])
    assert {r["layer"] for r in rows} == {2}
    for name in ("query_kernel", "key_kernel"):
        w = np.asarray(params["layers"][name][2], np.float64)  # (embed, heads, head_dim)
        length = [np.linalg.norm(w[:, i, j]) for i in range(2) for j in range(8)]
        some = [r for r in rows if r["matrix"] == name and r["quantity"] == "norm"]
        assert [r["value"] for r in some] == pytest.approx(sorted(length, reverse=True))
        singular = np.stack([np.linalg.svd(w[:, i])[1] for i in range(2)])
        some = [r for r in rows if r["matrix"] == name and r["quantity"] == "singular_value"]
        assert [r["value"] for r in some] == pytest.approx(np.median(singular, 0))
        assert [r["least"] for r in some] == pytest.approx(singular.min(0))
        condition = np.median(singular[:, 0] / singular[:, -1])
        assert some[0]["median_condition"] == pytest.approx(condition)


# -------------------------------------------------------------------------------------- activations


def rms(x, gain, eps):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * gain


def norm(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def rotated(x, positions, base=10000.0):
    half = x.shape[-1] // 2
    angle = positions[..., None, None] * base ** (-np.arange(half) / half)  # (B, T, 1, half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
    )


def by_hand(model, params, tokens, segments, positions):
    """Logits, angles {name: (layers, B, T, 2)} and entropies (layers, B, T, heads), by blocks."""
    p = f64(params)
    h = p["input_embedding"][tokens]
    batch, length = tokens.shape
    angles, entropies = {"attention": [], "mlp": []}, []

    def effective(name, w):
        spec = getattr(model, name)
        if spec.form in ("none", "fixed"):
            return 1.0 if spec.form == "none" else spec.init
        return w[name] * spec.init / spec.scale

    def step(name, alpha, h, proposal):
        if model.branch_norm == "unit":
            proposal = norm(proposal)
        if model.residual == "add":
            moved = h + proposal
        else:
            a = effective(alpha, w)
            a = np.abs(a) if model.alpha_sign == "absolute" else a
            a = a * (layer + 1) ** {"constant": 0, "harmonic": -1, "root": -0.5}[model.alpha_depth]
            moved = norm(RESIDUALS[model.residual](h, proposal, a))
        angles[name].append(np.stack([degrees(h, proposal), degrees(h, moved)], -1))
        return moved

    for layer in range(model.layers):
        w = {name: leaf[layer] for name, leaf in p["layers"].items()}
        x = h
        if model.pre_norm == "rms":
            x = rms(h, w["attention_norm"], model.rms_eps)
        h = h if model.residual == "add" else norm(h)
        q, k, v = (
            np.einsum("btd,dhe->bthe", x, w[f"{n}_kernel"]) for n in ("query", "key", "value")
        )
        if model.qk_norm and model.qk_form == "rms_before_rope":
            q, k = (rms(y, w[f"{n}_norm"], model.rms_eps) for y, n in ((q, "query"), (k, "key")))
        q, k = rotated(q, positions), rotated(k, positions)
        if model.qk_norm and model.qk_form == "unit_after_rope":
            q, k = norm(q), norm(k)
        group = model.heads // model.kv_heads
        scale = model.head_dim ** (0.5 if model.softmax_scale == "sqrt" else -0.5)
        s = np.ones(k.shape[2:]) * effective("s_qk", w)
        q, k = q * np.repeat(s, group, 0), k * s
        heads, found = np.zeros_like(q), np.zeros((batch, length, model.heads))
        for b, t, i in np.ndindex(batch, length, model.heads):
            seen = [u for u in range(t + 1) if segments[b, u] == segments[b, t]]
            score = scale * np.array([q[b, t, i] @ k[b, u, i // group] for u in seen])
            prob = np.exp(score - score.max())
            prob /= prob.sum()
            found[b, t, i] = -sum(x * math.log(x) for x in prob if x > 0)
            heads[b, t, i] = sum(x * v[b, u, i // group] for x, u in zip(prob, seen))
        entropies.append(found)
        h = step("attention", "alpha_a", h, np.einsum("bthe,hed->btd", heads, w["out_kernel"]))
        x = rms(h, w["mlp_norm"], model.rms_eps) if model.pre_norm == "rms" else h
        u, gate = x @ w["up_kernel"] * effective("s_u", w), x @ w["gate_kernel"]
        if model.s_v.form != "none":
            gate = gate * effective("s_v", w) * math.sqrt(model.width)
        silu = gate * (1 + np.tanh(gate / 2)) / 2
        h = step("mlp", "alpha_m", h, (u * silu) @ w["down_kernel"])
    if model.final_norm == "rms":
        h = rms(h, p["final_norm"], model.rms_eps)
    logits = h @ p["output_embedding"].T * effective("s_z", p)
    return logits, {n: np.stack(a) for n, a in angles.items()}, np.stack(entropies)


def slerp(h, f, a):
    theta = np.arccos(np.sum(h * f, -1, keepdims=True))
    return (np.sin((1 - a) * theta) * h + np.sin(a * theta) * f) / np.sin(theta)


def geodesic(h, f, a):
    """GeoNorm's step as it is printed, for h of any norm, with a v made tangent anew."""

    def tangent(v):
        return v - np.sum(h * v, -1, keepdims=True) / np.sum(h * h, -1, keepdims=True) * h

    v = tangent(a * tangent(f))
    radius, length = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (h, v))
    return np.cos(length / radius) * h + radius * np.sin(length / radius) * v / length


# What is normalized to give the next hidden state.
RESIDUALS = {"lerp": lambda h, f, a: h + a * (f - h), "slerp": slerp, "exp": geodesic}


@pytest.mark.parametrize(
    ("fields", "off"),
    [
        ({"model.kv_heads": 2}, 1e-3),
        ({"model.kv_heads": 1, "model.scan_layers": False, "model.dtype": "bfloat16"}, 2.0),
        ({"model.kind": "gpt", "model.remat": "full"}, 1e-3),
        ({"model.kind": "gpt", "model.qk_norm": True, "model.kv_heads": 2}, 1e-3),
    ],
    ids=["ngpt", "ngpt-bfloat16", "gpt", "gpt-qk_norm"],
)
def test_angles_and_entropies_of_a_model_by_hand(tiny, fields, off):
    config = tiny(**{"model.heads": 4, "model.width": 24, "model.vocab_size": 20, **fields})
    model, rng = config.model, np.random.default_rng(1)
    params = wobbly(config)
    tokens = rng.integers(0, 20, (2, 11)).astype(np.int32)
    segments = np.array([[0] * 11, [0] * 4 + [1] * 7], np.int32)
    positions = np.array([np.arange(11), [*range(4), *range(7)]], np.int32)
    batch = {"inputs": tokens, "segment_ids": segments, "positions": positions}
    read = round_matrices(model, params)
    _, angles, entropies = by_hand(model, read, tokens, segments, positions)

    @jax.jit
    def measure(params, batch):
        found = d.block_angles(model, params, batch)
        return found, *d.attention_entropies(model, params, batch, block=4)

    found, nats, seen = measure(params, batch)
    for name in d.BLOCKS:
        assert np.abs(found[name] - angles[name]).max() < off
    assert nats.dtype == np.float32
    assert np.abs(nats - entropies).max() < 0.02 * off
    assert np.array_equal(seen, [np.arange(1, 12), [*range(1, 5), *range(1, 8)]])


def test_entropy_is_made_in_blocks_of_queries():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 32, 4, 8)), jnp.float32) for _ in range(2))
    k = k[:, :, :2]
    whole, _ = d.entropy(q, 3 * k, 1.0, block=99)
    jaxpr = str(jax.make_jaxpr(lambda q, k: d.entropy(q, 3 * k, 1.0, block=6))(q, k))
    assert "32,32" not in jaxpr and "6,2,2,32" in jaxpr  # no scores of all queries
    assert np.abs(d.entropy(q, 3 * k, 1.0, block=6)[0] - whole).max() < 1e-6
    even, seen = d.entropy(q * 0, k, 1.0)
    assert np.abs(even - np.log(seen)[..., None]).max() < 1e-5
    sharp, _ = d.entropy(q, 1e4 * k, 1.0)
    assert np.isfinite(sharp).all() and sharp.min() >= 0


# ---------------------------------------------------------------------------- runs, and the command


@pytest.fixture(scope="module")
def runs(tmp_path_factory, book):
    """Both kinds of the quickstart's debug variant, trained for 8 steps on the book."""
    out = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("runs") / kind
        overrides = {
            "data.source": "text", "data.paths": book, "model.context": "32", "train.steps": "8",
            "train.batch_size": "4", "eval.every": "4", "eval.batch_size": "8", "eval.batches": "1",
            "checkpoint.every": "4", "checkpoint.keep": "3", "log.every": "1", "sample.tokens": "0",
        }  # fmt: skip
        variants = "debug" if kind == "ngpt" else "gpt,debug"
        config = experiment.load_config(
            f"{ROOT}/experiments/quickstart.py:{variants}", list(overrides.items())
        )
        assert loop.train(config, folder) == 0
        out[kind] = folder
    return out


def open_run(folder, step, overrides=()):
    config = opening.read_config("workdir", str(folder), overrides)
    checkpoint = find_checkpoint("workdir", str(folder), step)
    return read_state("run", str(folder), config, checkpoint)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "ngpt_jax.tools.diagnose", *map(str, arguments)],
        cwd=ROOT, env=os.environ, text=True, capture_output=True, timeout=300,
    )  # fmt: skip


COLUMNS = {  # the first two after the run
    "embeddings": ["table", "quantity"],
    "condition": ["matrix", "layer"],
    "scales": ["scale", "layer"],
    "scale_histograms": ["scale", "layer"],
    "query_key": ["layer", "matrix"],
    "angles": ["block", "quantity"],
    "entropy": ["layer", "depth"],
    "rotation": ["matrix", "layer"],
    "gradient": ["matrix", "layer"],
}


@pytest.fixture(scope="module")
def figures(runs, tmp_path_factory):
    """What the command says, and the folder of its figures, for both runs after 4 steps."""
    out = tmp_path_factory.mktemp("figures") / "out"
    done = command(
        f"--workdir={runs['ngpt']}", f"--against={runs['gpt']}", f"--out={out}", "--step=4",
        "--layers=1", "--windows=3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, out


def read_csv(path, **wanted):
    """Rows with numbers where there are some, None where there is nothing."""

    def value(text):
        try:
            return float(text) if text else None
        except ValueError:
            return text

    with open(path, newline="") as f:
        rows = [{name: value(x) for name, x in row.items()} for row in csv.DictReader(f)]
    return [r for r in rows if all(r[name] == x for name, x in wanted.items())]


@pytest.mark.parametrize("kind", KINDS)
def test_rotation_and_gradient_are_those_of_the_next_step(runs, figures, kind):
    run = open_run(runs[kind], 4)
    config, model = run.config, run.config.model
    corpus = load_text(run)
    seen = seen_ids(run, corpus)
    tokens = corpus.train[""].stream
    assert np.array_equal(np.flatnonzero(seen), np.unique(tokens.read(0, len(tokens))))
    assert 0 < seen.sum() < model.vocab_size
    label = {"ngpt": "nGPT ngpt", "gpt": "GPT gpt"}[kind]
    rotation, gradient = (
        read_csv(figures[1] / f"{name}.csv", run=label) for name in ("rotation", "gradient")
    )
    # The fifth batch, read from the start of the stream, and the training step on it.
    dataset = pipeline.make_dataset(config.data, corpus)
    batches = pipeline.train_batches(dataset, 4, 0, threads=0, prefetch=1)
    batch = [next(batches) for _ in range(5)][-1]
    step = jax.jit(make_train_step(config, *make_optimizer(config)))
    after, metrics = step(TrainState(*run.state), batch)
    assert float(metrics["loss"]) == pytest.approx(
        next(r["train/loss"] for r in rows_of(runs[kind]) if r["step"] == 5 and "train/loss" in r)
    )

    def nats(params):
        return summed_nats(model, params, batch) / batch["targets"].size

    grads = jax.jit(jax.grad(nats))(run.state.params)

    def vectors(tree, name, layer):
        """A list of all vectors along embed."""
        if layer is None:  # without padding
            return list(np.asarray(tree[name], np.float64)[: model.vocab_size][seen])
        w = np.asarray(tree["layers"][name][int(layer)], np.float64)
        if name in ("out_kernel", "down_kernel"):
            return [w[i] for i in np.ndindex(w.shape[:-1])]
        return [w[:, *i] for i in np.ndindex(w.shape[1:])]

    assert len(gradient) == 2 + 7 * model.layers and len(rotation) == 2 * len(gradient)
    for row in gradient:
        name, layer = row["matrix"], row["layer"]
        before, moved, g = (
            np.array(vectors(t, name, layer)) for t in (run.state.params, after.params, grads)
        )
        own, peak = (r for r in rotation if (r["matrix"], r["layer"]) == (name, layer))
        assert (own["rate"], peak["rate"]) == ("own", "peak")
        turned = degrees(before, moved)
        assert own["learning_rate"] == pytest.approx(float(metrics["learning_rate"]))
        assert own["mean"] == pytest.approx(turned.mean(), rel=1e-3, abs=1e-5)
        assert own["p90"] == pytest.approx(np.quantile(turned, 0.9), rel=1e-3, abs=1e-5)
        ratio = config.optimizer.learning_rate / own["learning_rate"]
        assert peak["mean"] == pytest.approx(ratio * own["mean"], rel=0.1)
        radial = sum((w @ x) ** 2 / (w @ w) for w, x in zip(before, g))
        total = sum(x @ x for x in g)
        assert row["radial_share"] == pytest.approx(radial / total, rel=1e-3, abs=1e-7)
        assert row["radial_norm"] == pytest.approx(math.sqrt(radial), rel=1e-3, abs=1e-6)
        assert row["tangential_norm"] == pytest.approx(math.sqrt(total - radial), rel=1e-3)
        some = np.linalg.norm(g, axis=1) > 0
        assert row["vectors_with_gradient"] == some.sum()
        assert row["mean_angle"] == pytest.approx(degrees(before[some], g[some]).mean(), rel=1e-4)


def test_at_the_end_of_a_schedule_the_peak_rate_still_tells(runs):
    run = open_run(runs["ngpt"], None)
    corpus = load_text(run)
    rotation, _ = measures.rotation_and_gradient(run, corpus, seen_ids(run, corpus))
    assert int(run.state.step) == 8
    own, peak = ([r["mean"] for r in rotation if r["rate"] == rate] for rate in ("own", "peak"))
    assert max(own) < 1e-4 and min(peak) > 0.1


def test_the_command_from_end_to_end(figures):
    said, out = figures
    for name in COLUMNS:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        table = read_csv(out / f"{name}.csv")
        wanted = {"nGPT ngpt"} if name.startswith("scale") else {"nGPT ngpt", "GPT gpt"}
        assert {row["run"] for row in table} == wanted
        numbers = [x for row in table for x in row.values() if isinstance(x, float)]
        assert len(numbers) >= 2 * len(table) and np.isfinite(numbers).all()
        assert list(table[0])[1:3] == COLUMNS[name]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        f"{name}.{kind}" for name in COLUMNS for kind in ("png", "csv")
    )
    lines = said.splitlines()
    assert "nGPT ngpt, step 4" in lines[0] and "GPT gpt, step 4" in lines[0]
    for start in ("condition number: query ", "mean |alpha_a|", "attention entropy (nats)",
                  "rotation, blocks: degrees a step at the peak rate",
                  "radial share of |gradient|^2, blocks"):  # fmt: skip
        (line,) = [x for x in lines if x.startswith(start)]
        assert 0 < float(line.removeprefix(start).split()[0]) < 100
    assert str(out) in lines[-1]
    (line,) = [x for x in lines if x.startswith("token ids that the text does not have, left out")]
    left_out = {row["ids_left_out"] for row in read_csv(out / "embeddings.csv")}
    assert [float(x) for x in line.split()[-2:]] == [*left_out] * 2 and min(left_out) > 0


def test_without_the_text_parameters_are_still_measured(runs):
    run = open_run(runs["gpt"], 4, [("data.paths", "gone.txt")])
    tables, note = report.measure(run, None, 1)
    assert {"embeddings", "condition", "query_key"} <= set(tables)
    assert not {"angles", "entropy", "rotation", "gradient"} & set(tables)
    assert note.startswith("run: angles, entropy, rotation and gradient are left out: data.paths")
    assert "gone.txt" in note and "\n" not in note
    shown = report.show([run], [report.headlines(tables)])
    assert "condition number: query" in shown and "rotation" not in shown
    assert "left out" not in shown  # which ids were seen is not known
    other = run._replace(config=open_run(runs["gpt"], 4).config, progress={
        **run.progress, "data": "of another text"})  # fmt: skip
    assert "not the one that the run was trained on" in report.measure(other, None, 1)[1]


def test_bad_input_is_told_in_a_line(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "new/checkpoints").mkdir(parents=True)
    config = (runs["ngpt"] / "config.json").read_text()
    (tmp_path / "new/config.json").write_text(config)
    (tmp_path / "odd/checkpoints").mkdir(parents=True)
    (tmp_path / "odd/config.json").write_text("{")
    for folder, message in (
        ("gone", "--workdir=.*gone: no such folder"),
        ("empty", "--workdir=.*empty is not the folder of a training run"),
        ("odd", "config.json cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            opening.read_config("workdir", str(tmp_path / folder))
    with pytest.raises(ConfigError, match="--against=.*new holds no checkpoint yet"):
        find_checkpoint("against", str(tmp_path / "new"), None)
    with pytest.raises(ConfigError, match=r"--step=5: --workdir=.* no such .* there are 4, 8\."):
        find_checkpoint("workdir", str(runs["ngpt"]), 5)
    with pytest.raises(ConfigError, match="Unknown field --config.data.path"):
        opening.read_config("workdir", str(runs["ngpt"]), [("data.path", "x")])
    wide = open_run(runs["ngpt"], 4).config
    wide = dataclasses.replace(wide, model=dataclasses.replace(wide.model, mlp_width=64))
    checkpoint = find_checkpoint("workdir", str(runs["ngpt"]), 4)
    with pytest.raises(ConfigError, match="model and optimizer in .*kernel is"):
        read_state("run", str(runs["ngpt"]), wide, checkpoint)
    done = command(f"--workdir={runs['ngpt']}", "--layers=7")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert "--layers: there is no layer 7" in line
    assert not (runs["ngpt"] / "diagnose").exists()


# ----------------------------------------------------------------------------------- while training


@pytest.mark.parametrize("kind", KINDS)
def test_every_evaluation_logs_what_is_cheap(runs, kind):
    rows = [r for r in rows_of(runs[kind]) if any(key.startswith("eval/") for key in r)]
    assert [r["step"] for r in rows] == [4, 8]
    names = {"angle_attention", "angle_mlp", "step_attention", "step_mlp"}
    names |= {f"cosine_{table}" for table in d.TABLES}
    if kind == "gpt":
        names |= {f"norm_spread_{table}" for table in d.TABLES}
    for row in rows:
        logged = {key: x for key, x in row.items() if key.startswith("diagnose/")}
        assert set(logged) == {f"diagnose/{name}" for name in names}
        run = open_run(runs[kind], row["step"])
        model, params = run.config.model, run.state.params
        corpus = load_text(run)
        (batch,) = pipeline.eval_batches(corpus.held_out[0], 32, 8, 1)
        real = batch["weights"] > 0
        for name, angles in d.block_angles(model, params, batch).items():
            for i, what in enumerate(("angle", "step")):
                mean = np.mean(np.asarray(angles, np.float64)[:, real, i])
                assert logged[f"diagnose/{what}_{name}"] == pytest.approx(mean, rel=1e-5)
        for table in d.TABLES:
            w = np.asarray(params[table], np.float64)[: model.vocab_size]
            unit = w / np.linalg.norm(w, axis=1, keepdims=True)
            cosines = (unit @ unit.T)[~np.eye(len(w), dtype=bool)]
            assert logged[f"diagnose/cosine_{table}"] == pytest.approx(cosines.mean(), abs=1e-6)
            if kind == "gpt":
                length = np.linalg.norm(w, axis=1)
                spread = length.std() / length.mean()
                assert logged[f"diagnose/norm_spread_{table}"] == pytest.approx(spread, rel=1e-4)


def test_what_is_logged_changes_nothing(runs, tmp_path, monkeypatch):
    """The same run without: every loss and every parameter bit for bit."""
    monkeypatch.setattr(evaluator, "_summarize", lambda config, params, batch: {})
    config = opening.read_config("workdir", str(runs["ngpt"]))
    assert loop.train(config, tmp_path / "plain") == 0
    with_, without = rows_of(runs["ngpt"]), rows_of(tmp_path / "plain")
    assert not any(key.startswith("diagnose/") for row in without for key in row)
    timed = ("seconds", "per_second", "mfu")
    for a, b in zip(with_, without, strict=True):
        same = {k for k in a if not k.startswith("diagnose/") and not k.endswith(timed)}
        assert {k: a[k] for k in same} == {k: b[k] for k in same}
    a, b = (open_run(folder, 8).state for folder in (runs["ngpt"], tmp_path / "plain"))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))
