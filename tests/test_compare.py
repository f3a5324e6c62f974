"""Studies: which runs are due, speed-ups, the table, the runner, the command."""

import csv
import dataclasses
import errno
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from data_helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgba

from ngpt_jax import files, plots
from ngpt_jax.config import ConfigError
from ngpt_jax.study import compare, cores, figures, plan, report, results, runner, summary
from ngpt_jax.study.plan import Point, Study
from ngpt_jax.study.summary import Runs, cost_at, speed_up
from ngpt_jax.terminal import Terminal

REPO = Path(__file__).parent.parent

PLAN = Study(
    models={"gpt": {"model.kind": "gpt"}, "ngpt": {"optimizer.warmup_share": 0.25}},
    settings={"short": {}, "long": {"model.context": 64}},
    budgets=(10, 20, 40, 80),
    seeds=(0, 1, 2),
    tuned="optimizer.learning_rate",
    ladders={"gpt": (1e-3, 2e-3, 4e-3, 8e-3), "ngpt": (5e-3, 1e-2, 2e-2)},
    baseline="gpt",
)


def made_up_loss(point, best):
    """Falls with the budget, is least at the rate ``best`` and differs a little between seeds."""
    speed = 2.0 if point.model == "ngpt" else 1.0
    off = math.log(point.value / best[point.model]) ** 2 if point.value else 0.0
    return 3 - 0.3 * math.log(speed * point.steps) + 0.1 * off + 0.001 * point.seed


def run_in_disorder(study, loss, seed):
    """Runs a study as several programs might: any of the due runs may end next."""
    rng, losses = random.Random(seed), {}
    while points := plan.due(study, losses):
        for point in rng.sample(points, rng.randint(1, len(points))):
            assert point not in losses
            losses[point] = loss(point)
    return losses


@settings(max_examples=30, deadline=None)
@given(
    gpt=st.floats(3e-4, 3e-2), ngpt=st.floats(2e-3, 1e-1), seed=st.integers(0, 5),
)  # fmt: skip
def test_a_study_ends_with_the_same_runs_in_any_order_and_no_best_value_at_an_edge(gpt, ngpt, seed):
    def loss(point):
        return made_up_loss(point, {"gpt": gpt, "ngpt": ngpt})

    losses = run_in_disorder(PLAN, loss, seed)
    assert losses == run_in_disorder(PLAN, loss, seed + 1)
    cells = plan.chosen(PLAN, losses)
    assert len(cells) == 2 * 2 * 4
    for (setting, model, steps), points in cells.items():
        assert [p.seed for p in points] == [0, 1, 2]
        below, above = plan.neighbours(PLAN, losses, points[0])
        assert below >= losses[points[0]] <= above
        tried = sorted(
            p.value
            for p in losses
            if (p.setting, p.model, p.steps, p.seed) == (setting, model, steps, 0)
        )
        assert len(tried) >= (len(PLAN.ladders[model]) if steps in (10, 80) else 3)
        factor = 2.0
        best = {"gpt": gpt, "ngpt": ngpt}[model]
        assert abs(math.log(points[0].value / best)) < math.log(factor) * 0.52
        np.testing.assert_allclose(np.diff(np.log(tried)), math.log(factor), rtol=0.02)


def test_values_that_diverge_are_an_edge_to_walk_away_from():
    def loss(point):
        return (
            math.inf if point.value > 1.2e-3 else made_up_loss(point, {"gpt": 1e-3, "ngpt": 1e-3})
        )

    losses = run_in_disorder(PLAN, loss, 0)
    cells = plan.chosen(PLAN, losses)
    assert len(cells) == 2 * 2 * 4 and all(p[0].value <= 1.2e-3 for p in cells.values())


def test_cells_without_a_best_value_in_reach_are_given_up_and_the_others_go_on():
    def loss(point):
        lost = point.model == "gpt" and point.setting == "long"
        return point.value if lost else made_up_loss(point, {"gpt": 3e-3, "ngpt": 1e-2})

    losses = run_in_disorder(PLAN, loss, 0)
    assert len(plan.chosen(PLAN, losses)) == 3 * 4
    lines = plan.given_up(PLAN, losses)
    assert [line.partition(":")[0] for line in lines] == [
        f"long, gpt, {steps} steps" for steps in PLAN.budgets
    ]
    assert "no best optimizer.learning_rate within 8 rungs" in lines[0]
    assert lines[1].endswith("not tuned, as 10 steps are not.")
    assert plan.forecast(PLAN, losses) == []


def test_a_walk_ends_where_the_field_takes_no_further_value():
    ladders = dict.fromkeys(PLAN.models, (0.2, 0.4, 0.8))
    models = {"gpt": {"model.kind": "gpt"}, "ngpt": {}}
    study = dataclasses.replace(
        PLAN, models=models, tuned="optimizer.warmup_share", ladders=ladders, budgets=(10,)
    )
    plan.check(study)

    def loss(point):
        return -point.value if point.model == "gpt" else abs(point.value - 0.4)

    losses = run_in_disorder(study, loss, 0)
    assert {p.value for p in losses} == {0.2, 0.4, 0.8}
    assert {cell[1] for cell in plan.chosen(study, losses)} == {"ngpt"}
    lines = plan.given_up(study, losses)
    assert len(lines) == 2
    assert "the best optimizer.warmup_share is 0.8, beside values that it does not take" in lines[0]


@pytest.mark.parametrize("near", [1, plan.MAX_WALK])
@pytest.mark.parametrize("best", [1e-3 * 2.0**-8, 8e-3 * 2.0**7])
def test_all_seeds_run_around_a_best_value_that_is_far_off_the_ladder(near, best):
    study = dataclasses.replace(PLAN, models={"gpt": {}}, ladders={"gpt": PLAN.ladders["gpt"]},
                                baseline=None, budgets=(10,), near=near)  # fmt: skip
    losses = run_in_disorder(study, lambda p: abs(math.log(p.value / best)), 0)
    for cell, runs in plan.chosen(study, losses).items():
        assert runs[0].value == pytest.approx(best, rel=0.02)
        assert len(plan.around(study, cell, runs[0].value)) == (2 * near + 1) * 3
    assert len(plan.chosen(study, losses)) == 2 or best < 1e-3


def test_models_of_a_grid_have_names_of_their_own():
    with pytest.raises(ConfigError, match=r"two of its models are called 'source=a_b'"):
        plan.grid({"data.source": ("a b", "a_b")})


def test_the_optimum_is_that_of_a_parabola_and_all_seeds_run_around_the_best_value(tmp_path):
    best = {"gpt": 3.1e-3, "ngpt": 1.3e-2}
    study = dataclasses.replace(PLAN, near=1, budgets=(10,))

    def loss(point):  # a seed's optimum lies 10 % above that of the seed before, "long"'s at twice
        shift = 1.1 ** (point.seed - 1) * (2 if point.setting == "long" else 1)
        return 2 + 0.1 * math.log(point.value / (shift * best[point.model])) ** 2

    assert len(plan.forecast(study, {})) >= 4 * 9
    rows = made_up_rows(study, loss)
    losses = results.losses_of(study, rows)
    for cell, runs in plan.chosen(study, losses).items():
        around = plan.around(study, cell, runs[0].value)
        assert len({p.value for p in around}) == 3 and len(around) == 9 and {*around} <= {*losses}
    optima = summary.optima_of(study, rows)
    assert len(optima) == 4
    for line in optima:
        shift = 2 if line["setting"] == "long" else 1
        assert line["optimum"] == pytest.approx(shift * best[line["model"]])
        assert line["optimum_high"] == pytest.approx(1.1 * line["optimum"])
        assert line["optimum_low"] == pytest.approx(line["optimum"] / 1.1)
        for name in ("shift", "shift_low", "shift_high"):
            assert line[name] == pytest.approx(shift)
    figures.transfer(study, rows, optima, tmp_path / "transfer.png")
    assert (tmp_path / "transfer.png").stat().st_size > 10_000
    hill = [row | {"loss": -row["loss"]} if row["seed"] == 2 else row for row in rows]
    found = {line[name] for line in summary.optima_of(study, hill) for name in ("optimum", "shift")}
    assert found == {None}


def test_the_runs_still_to_come_are_counted():
    assert len(plan.forecast(PLAN, {})) == 2 * ((4 + 2) * 2 + (3 + 2) * 2 + (3 + 2) * 4)
    losses = run_in_disorder(PLAN, lambda p: made_up_loss(p, {"gpt": 3e-3, "ngpt": 1e-2}), 0)
    assert plan.forecast(PLAN, losses) == []


def test_nothing_is_tuned_where_no_field_is_named():
    study = dataclasses.replace(PLAN, tuned=None, ladders={}, budgets=(10,))
    points = plan.due(study, {})
    assert len(points) == 2 * 2 * 3 and points[0] == Point("short", "gpt", 10, None, 0)
    assert dict(plan.overrides_of(study, points[0]))["model.kind"] == "gpt"


def test_overrides_are_those_of_setting_model_budget_value_and_seed():
    point = Point("long", "ngpt", 40, 2e-2, 3)
    assert dict(plan.overrides_of(PLAN, point)) == {
        "model.context": "64", "optimizer.warmup_share": "0.25", "train.steps": "40",
        "train.seed": "3", "data.seed": "3", "optimizer.learning_rate": "0.02",
    }  # fmt: skip
    assert point.name == "long-ngpt-40-0.02-seed3"
    own = {"long": {"ngpt": {"optimizer.warmup_share": 0.0}, "gpt": {"optimizer.b2": 0.9}}}
    study = dataclasses.replace(PLAN, recipes=own)
    plan.check(study)
    assert dict(plan.overrides_of(study, point))["optimizer.warmup_share"] == "0.0"
    assert "optimizer.b2" not in dict(plan.overrides_of(study, point))
    elsewhere = point._replace(setting="short")
    assert plan.overrides_of(study, elsewhere) == plan.overrides_of(PLAN, elsewhere)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": (20, 10)}, "budgets must be one or more whole numbers from 1 on, ascending"),
        ({"budgets": (0, 10)}, "budgets must be one or more whole numbers from 1 on, ascending"),
        ({"seeds": ()}, "seeds must be one or more whole numbers from 0 on, ascending"),
        ({"seeds": 3}, "seeds must be a tuple, not 3"),
        ({"seeds": (0, 2**32)}, "seeds: each must be a whole number from 0 to 4294967295, got 429"),
        ({"seeds": (False, True)}, "seeds: each must be a whole number from 0 to"),
        ({"models": {}}, "must be a dict, not empty"),
        ({"models": ["gpt"]}, r"models must be a dict, not \['gpt'\]"),
        ({"tuned": 5}, "tuned must be text or None, not 5"),
        ({"ladders": None}, "ladders must be a dict, not None"),
        ({"ladders": {"gpt": 1e-3, "ngpt": (1, 2, 4)}}, r"ladders\['gpt'\] must be a tuple"),
        ({"cores": 0.5}, "cores must be a whole number or None, not 0.5"),
        ({"title": 5}, "title must be text, not 5"),
        ({"baseline": {"ngpt": ["gpt"]}}, r"baseline \['gpt'\] is none of the models"),
        ({"models": {3: {}}}, "3: a name is made of"),
        ({"settings": {"a": None}}, "must be a dict of fields"),
        ({"settings": {"a": {"data.pahts": ("x",)}}}, "unknown field 'data.pahts'"),
        ({"settings": {"a": {"data.paths": ()}}}, "data.paths is empty"),
        ({"settings": {"a": {"train.seed": 3}}}, "train.seed is set by the study itself"),
        ({"models": {"gpt": {"optimizer.learning_rate": 1.0}}}, "is set by the study itself"),
        ({"settings": {"a": {"optimizer.learning_rate": 1.0}}}, "is set by the study itself"),
        ({"recipes": {"lnog": {}}}, "recipes: there is no setting 'lnog'"),
        ({"recipes": {"long": {"ngtp": {}}}}, r"recipes\['long'\]: there is no model 'ngtp'"),
        ({"recipes": {"long": {"gpt": {"model.widht": 3}}}}, "unknown field 'model.widht'"),
        ({"recipes": {"long": {"gpt": {"train.seed": 3}}}}, "is set by the study itself"),
        ({"recipes": {"long": ["gpt"]}}, "must be a dict of models"),
        ({"settings": {"a": {}, "a-gpt": {}}, "models": {"gpt-b": {}, "b": {}}}, "into each other"),
        ({"tuned": "train.batch_size"}, "must name a field that is a float"),
        ({"cores": 0}, "cores must be positive"),
        ({"ladders": {**PLAN.ladders, "ngtp": (1, 2, 4)}}, "there is no model 'ngtp'"),
        ({"ladders": {**PLAN.ladders, "gpt": ("a", "b", "c")}}, "three or more positive"),
        ({"models": {"a/b": {}}}, "a name is made of"),
        ({"baseline": "gtp"}, "baseline 'gtp' is none of the models gpt, ngpt"),
        ({"baseline": {"ngpt": "gtp"}}, "baseline 'gtp' is none of the models gpt, ngpt"),
        ({"baseline": {"ngtp": "gpt"}}, "baseline 'ngtp' is none of the models gpt, ngpt"),
        ({"baseline": 3}, "baseline must be text or a dict or None, not 3"),
        ({"tuned": None}, "ladders need a field"),
        ({"tuned": None, "ladders": {}, "near": 1}, "near needs a field in tuned"),
        ({"near": -1}, "near must be 0 to 8, not -1"),
        ({"near": 9}, "near must be 0 to 8, not 9"),
        ({"ladders": {"gpt": (1, 1.001, 1.002), "ngpt": (1, 2, 4)}}, "2 % apart or more"),
        ({"ladders": {"gpt": (1e-3, 2e-3)}}, "three or more"),
        ({"ladders": {"gpt": (1e-3, 2e-3, 3e-3), "ngpt": (1, 2, 4)}}, "constant factor"),
    ],
)
def test_studies_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        plan.check(dataclasses.replace(PLAN, **change))


# ----------------------------------------------------------------------------------- speed-up


def test_cost_is_read_off_a_monotone_curve():
    def at(costs, losses, loss):
        (cost,), (bound,) = cost_at(costs, np.array(losses)[:, None], [loss])
        return float(cost), int(bound)

    costs, losses = [100, 200, 400], [3.0, 2.0, 1.0]
    for cost, loss in zip(costs, losses):
        assert at(costs, losses, loss) == (pytest.approx(cost), 0)
    assert at(costs, losses, 3.5) == (pytest.approx(100), 1)
    assert at(costs, losses, 0.5) == (pytest.approx(400), -1)
    assert at([7], [2.0], 2.0) == (pytest.approx(7), 0)
    assert at([7], [2.0], 2.5) == (pytest.approx(7), 1)
    assert at([7], [2.0], 1.5) == (pytest.approx(7), -1)
    # Losses that fall as cost**-0.4 stay so, in any unit of the cost.
    for unit in (1e-3, 1e15):
        losses = [1 + n**-0.4 for n in costs]
        for n in (100, 123, 200, 399):
            found = at([unit * c for c in costs], losses, 1 + n**-0.4)
            assert found == (pytest.approx(unit * n), 0)
    # A curve that rises again counts where it first comes down.
    assert at([1, 2, 4], [3.0, 2.0, 2.5], 2.0) == (pytest.approx(2), 0)
    # Many at once are as one by one.
    y, target = np.random.default_rng(0).normal(size=(4, 50)), np.linspace(-1, 1, 50)
    together = np.transpose(cost_at([1, 3, 4, 9], y, target)).tolist()
    assert together == [list(at([1, 3, 4, 9], y[:, i], target[i])) for i in range(50)]


def measured_curves():
    """Mean losses at 500, 1000, 2000 and 4000 steps, of each text and model of speedup.py."""
    study = results.load_study(str(ROOT / "experiments" / "speedup.py"))
    cells = summary.cells_of(study, results.read(ROOT / "experiments" / "speedup" / "results.csv"))
    curves = [
        {c["steps"]: c["loss"] for c in summary.curve_of(cells, setting, model)}
        for setting, model in itertools.product(study.settings, study.models)
    ]
    assert len(curves) == 9 and all(list(c) == [500, 1000, 2000, 4000] for c in curves)
    return curves


def read(curve, budgets, loss):
    points = {n: curve[n] for n in budgets}
    (cost,), (bound,) = cost_at(list(points), np.array([*points.values()])[:, None], [loss])
    assert bound == 0
    return cost


@pytest.mark.parametrize(
    ("middle", "others", "bias", "spread"),
    [
        (1000, (500, 2000, 4000), 0.015, 0.04),
        (2000, (500, 1000, 4000), 0.015, 0.04),  # in the last piece
        (1000, (500, 2000), 0.06, 0.04),
        (2000, (1000, 4000), 0.06, 0.04),
    ],
)
def test_a_budget_is_found_again_from_the_others(middle, others, bias, spread):
    """Losses as they fall in training, budgets a factor of four apart."""
    found = [read(c, others, c[middle]) / middle for c in measured_curves()]
    assert abs(np.mean(found) - 1) < bias and np.std(found) < spread


def test_the_end_of_a_curve_is_as_steep_as_with_a_later_budget():
    curves, first = measured_curves(), (500, 1000, 2000)
    for gap in (0.003, 0.01, 0.02):  # nats above the loss of 2,000 steps
        found = [
            read(c, first, c[2000] + gap) / read(c, (*first, 4000), c[2000] + gap) for c in curves
        ]
        assert abs(np.mean(found) - 1) < 0.005


@settings(deadline=None)
@given(gain=st.floats(1.05, 9), size=st.floats(0.5, 50), budget=st.integers(0, 3))
def test_a_model_so_many_times_faster_has_that_speed_up(gain, size, budget):
    costs = [100.0, 200.0, 400.0, 800.0]

    def curve(factor):
        return {i: Runs(c, [1 + size * (factor * c) ** -0.4] * 3) for i, c in enumerate(costs)}

    found = speed_up(curve(1), curve(gain), budget, draws=20)
    slower = speed_up(curve(gain), curve(1), budget, draws=20)
    assert found.value * slower.value == pytest.approx(1)
    assert {found.bound + slower.bound} <= {"", "><"}
    if gain <= max(2**budget, 2 ** (3 - budget)):  # what one of the curves covers
        assert found.bound == "" and found.value == pytest.approx(gain)
        assert found.low == pytest.approx(gain) == found.high
    else:
        assert found.bound == ">" and found.value == pytest.approx(2**budget)
    # Without runs of the budget, the loss to reach is the baseline's.
    short = {i: runs for i, runs in curve(1 / gain).items() if i < 3}
    behind = speed_up(curve(1), short, 3, draws=20)
    assert behind.bound == "<" and behind.value == pytest.approx(2)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_interval_covers_as_often_as_it_says(seeds):
    rng, steps = np.random.default_rng(seeds), [100.0, 200.0, 400.0, 800.0]

    def curve(factor, spread):
        means = [1 + 3 * (factor * n) ** -0.3 for n in steps]
        return {
            i: Runs(n, list(rng.normal(mean, spread, seeds)))
            for i, (n, mean) in enumerate(zip(steps, means))
        }

    found = [speed_up(curve(1, 0.01), curve(1.1, 0.02), 2, draws=400) for _ in range(200)]
    assert 0.92 < np.mean([s.low <= 1.1 <= s.high for s in found]) <= 0.99


def test_the_spread_of_both_models_is_in_the_interval():
    def curve(last, spread=0.0):
        losses = {100: 3.0, 200: 2.0, 400: last}
        return {n: Runs(n, [x - spread, x, x + spread]) for n, x in losses.items()}

    steady = speed_up(curve(1.0), curve(0.9), 400)
    assert steady.low == pytest.approx(steady.value) == steady.high
    for pair in ((curve(1.0, 0.1), curve(0.9)), (curve(1.0), curve(0.9, 0.1))):
        found = speed_up(*pair, 400)
        assert found.value == steady.value and found.low < found.value < found.high
        row = found._asdict() | {"speed_up": found.value}
        assert summary.show(row) == f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


# ------------------------------------------------------------------------- table and runner

EXPERIMENT = """
from ngpt_jax.config import default_config
from ngpt_jax.study.plan import Study

def get_config(variants=""):
    config = default_config()
    config.model.width = 16
    config.model.heads = 2
    config.model.layers = 1
    config.model.context = 32
    config.train.steps = 8
    config.eval.every = 1000
    config.eval.batch_size = 64
    config.sample.tokens = 0
    config.data.source = "text"
    config.data.paths = (BOOK,)
    return config

def get_study(variants=""):
    return Study(
        models={"gpt": {"model.kind": "gpt"}, "ngpt": {}}, settings={"book": {}},
        budgets=(8, 16), seeds=(0, 1), tuned="optimizer.learning_rate",
        ladders={"gpt": (1e-3, 2e-3, 4e-3), "ngpt": (5e-3, 1e-2, 2e-2)}, baseline="gpt",
        title="A book", notes="Small & <quick>.",
    )
"""

FAKE_RUN = """
import json, math, pathlib, signal, sys, time
workdir, config, point = pathlib.Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
time.sleep(0.1)
workdir.mkdir(parents=True, exist_ok=True)
(workdir / "starts").open("a").write("x")
model, steps, value, seed = point
if value == 4e-3:
    code = 3
else:
    code = 0
loss = 3 - 0.3 * math.log(steps * (2 if model == "ngpt" else 1)) + seed / 1000
loss += abs(math.log(value / (2e-3 if model == "gpt" else 1e-2)))
versions = dict(cpu="c", cores=1, devices="1 x cpu", python="3", jax="0", jaxlib="0",
                data="d" * 64, held_out="h" * 64)
(workdir / "versions").write_text(json.dumps(versions))
(workdir / "versions").replace(workdir / "versions.json")
(workdir / "config.json").write_text(config)
rows = [{"step": 8, "train/tokens_per_second": 100.0, "train/seconds": 2.0 * steps}]
if code == 0:
    rows.append({"step": steps, "eval/a/loss": loss - 1, "eval/b/loss": loss + 1,
                 "eval/a/bits_per_byte": 1.0, "eval/b/bits_per_byte": 3.0})
(workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\\n" for r in rows))
sys.exit(code)
"""


@pytest.fixture
def experiment(tmp_path, book):
    path = tmp_path / "tiny_study.py"
    path.write_text(EXPERIMENT.replace("BOOK", repr(str(book))))
    return str(path)


@pytest.fixture
def fake_runs(tmp_path, monkeypatch):
    """Runs that end at once: with a made-up loss, or diverged at the rate 4e-3."""
    from ngpt_jax import config as config_lib

    script = tmp_path / "fake_run.py"
    script.write_text(FAKE_RUN)

    def start(c, point, cores, locks):
        config = results.config_of(c.experiment, c.study, point)
        model = dataclasses.replace(config.model, vocab_size=257)
        text = config_lib.to_json(dataclasses.replace(config, model=model))
        what = json.dumps([point.model, point.steps, point.value, point.seed])
        command = [sys.executable, str(script), str(c.runs / point.name), text, what]
        return subprocess.Popen(
            command, pass_fds=[f.fileno() for f in locks], start_new_session=True
        )

    monkeypatch.setattr(runner, "start", start)


def comparison(experiment, out):
    study = results.load_study(experiment)
    return runner.Comparison(experiment, study, out / "results.csv", out / "runs")


def run_study(experiment, out, stopped=lambda: None):
    """Whether the study is complete."""
    out.mkdir(exist_ok=True)
    c = comparison(experiment, out)
    assert runner.run_all(c, Terminal(quiet=True), stopped) == []
    return not plan.due(c.study, results.losses_of(c.study, results.read(c.table)))


def losses_in(out):
    return [
        (results.point_of(r), r["status"], r["loss"]) for r in results.read(out / "results.csv")
    ]


def test_a_study_that_is_stopped_again_and_again_ends_with_the_same_table(
    experiment, fake_runs, tmp_path
):
    begun = time.monotonic()
    assert run_study(experiment, tmp_path / "whole")
    of_a_run = (time.monotonic() - begun) / 16  # also on a busy machine
    starts = 0
    while True:
        starts += 1
        end = time.monotonic() + random.Random(starts).uniform(0.3, 5) * of_a_run

        def stopped(end=end):
            return "SIGTERM" if time.monotonic() > end else None

        if run_study(experiment, tmp_path / "cut", stopped):
            break
        assert starts < 200
    assert starts > 3
    assert losses_in(tmp_path / "cut") == losses_in(tmp_path / "whole")
    rows = results.read(tmp_path / "whole" / "results.csv")
    assert len(rows) == 2 * 2 * (3 + 1)
    diverged = [r for r in rows if r["status"] == "diverged"]
    assert {r["value"] for r in diverged} == {4e-3} and diverged[0]["loss"] is None
    first = rows[0]
    assert first["bits_per_byte"] == 2.0 and first["tokens"] == 8 * 16 * 32
    assert first["flops"] > 6 * first["tokens"] * 16 * 16 * 16
    assert "--config.optimizer.learning_rate=0.001" in first["command"]


def test_the_time_to_come_counts_start_compilation_and_evaluation():
    study = dataclasses.replace(PLAN, tuned=None, ladders={}, budgets=(10,), seeds=(0, 1, 2, 3))
    assert runner.to_come(study, []) == (
        "about 16 runs to come, for how long is not known before one has ended"
    )
    rows = [
        dict(zip(Point._fields, (*cell, 10, None, seed))) | {"status": "done", "loss": 1.0}
        | {"seconds": 10.0 * (1 + seed), "other_seconds": None}
        for cell in (("short", "gpt"), ("long", "gpt")) for seed in (0, 1, 2)
    ]  # fmt: skip
    # 10 runs to come of 20 s of training each.
    told = runner.to_come(study, rows)
    assert told == (
        "about 10 runs to come, about 3:20 left without start and evaluation (not known)"
    )
    for row in rows:
        row["other_seconds"] = 7.0
    for row in rows[:3]:
        row["other_seconds"] = 60.0
    # One more run for each of these two, and 8 of ngpt, of which nothing is known: the median.
    assert 10 * 20 + 60 + 7 + 8 * 33.5 == 535
    assert runner.to_come(study, rows) == "about 10 runs to come, about 8:55 left"


def test_a_run_that_was_not_stopped_tells_what_it_took_beside_training(
    experiment, fake_runs, tmp_path
):
    def stopped():
        return "SIGTERM" if losses_in(tmp_path / "out") else None

    begun = tmp_path / "out" / "runs" / "book-gpt-8-0.001-seed0"
    for folder_is_there in (False, True):
        if folder_is_there:
            (tmp_path / "out" / "results.csv").unlink()
        start = time.monotonic()
        run_study(experiment, tmp_path / "out", stopped)
        row = results.read(tmp_path / "out" / "results.csv")[0]
        assert results.point_of(row).name == begun.name and begun.exists()
        if folder_is_there:
            assert row["other_seconds"] is None
        else:
            took = time.monotonic() - start + 0.01  # both are rounded
            assert 0.1 < row["seconds"] + row["other_seconds"] < took


def test_tables_without_the_later_column_are_read(tmp_path):
    table = (REPO / "experiments" / "speedup" / "results.csv").read_text()
    assert "other_seconds" not in table
    (tmp_path / "results.csv").write_text(table)
    assert {r["other_seconds"] for r in results.read(tmp_path / "results.csv")} == {None}


def test_two_programs_share_the_work_and_do_nothing_twice(experiment, fake_runs, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    out = tmp_path / "shared"
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda _: run_study(experiment, out), range(2)))
    assert len(losses_in(out)) == 16
    starts = [p.read_text() for p in (out / "runs").glob("*/starts")]
    assert starts == ["x"] * 16


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit(2)", r"ended with code 2: error: no text \(see "),
        ("import os; os.kill(os.getpid(), 9)", r"was ended by signal 9 \(9: out of memory\?\)"),
    ],
)
def test_a_run_that_fails_does_not_end_the_others(
    experiment, fake_runs, tmp_path, monkeypatch, capsys, program, message
):
    honest, out, tried = runner.start, tmp_path / "out", []

    def start(c, point, *how):
        if (point.model, point.steps, point.value) != ("gpt", 8, 1e-3):
            return honest(c, point, *how)
        tried.append(point)
        c.log_of(point).write_text("much\nerror: no text\n")
        return subprocess.Popen([sys.executable, "-c", program])

    monkeypatch.setattr(runner, "start", start)
    assert compare.compare(experiment, str(out), False, False, None) == 1
    said = capsys.readouterr()
    assert re.search(f"error: {tried[0].name} {message}", said.out + said.err)
    assert "error: 1 failed and will be tried by the next start: " + tried[0].name in said.err
    assert len(tried) == 1 and 0 < len(losses_in(out)) < 16
    assert (out / "report.html").exists()
    monkeypatch.setattr(runner, "start", honest)
    assert compare.compare(experiment, str(out), False, False, None) == 0
    assert len(losses_in(out)) == 16


def test_an_error_of_this_program_ends_the_runs(experiment, tmp_path, monkeypatch):
    started = []

    def start(c, point, cores, locks):
        if started:
            raise OSError(errno.EMFILE, "too many open files")
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        return started[0]

    monkeypatch.setattr(runner, "start", start)
    monkeypatch.setattr(runner, "lanes", lambda cores: 2)
    with pytest.raises(OSError, match="too many open files"):
        run_study(experiment, tmp_path / "out")
    assert started[0].poll() == -signal.SIGTERM


def test_a_running_run_counts_with_the_steps_that_it_has_made(experiment, tmp_path):
    c = comparison(experiment, tmp_path)
    point = plan.due(c.study, {})[0]
    run = runner.Running(point, None, [], [])
    rows = [
        {**point._replace(seed=1)._asdict(), "status": "done", "loss": 1.0, "seconds": 80.0,
         "other_seconds": 0.0}
    ]  # fmt: skip
    text, share = runner._status(c, rows, [run])
    count = len(plan.forecast(c.study, results.losses_of(c.study, rows)))
    assert share == pytest.approx(1 / (1 + count)) and point.name in text
    workdir = c.runs / point.name
    workdir.mkdir(parents=True)
    for written in ('{"step": 2, "a": 1}\n{"step": 6}\n', '{"step": 2}\n{"ste', ""):
        (workdir / "metrics.jsonl").write_text(written)
        later, share = runner._status(c, rows, [run])
        made = 6 if "6" in written else 0
        assert share == pytest.approx((1 + made / 8) / (1 + count))
        assert (later == text) == (made == 0)


def test_runs_are_told_to_stop(experiment, tmp_path, monkeypatch):
    started = []

    def start(c, point, cores, locks):
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        return started[-1]

    monkeypatch.setattr(runner, "start", start)
    assert not run_study(experiment, tmp_path / "out", lambda: "SIGTERM" if started else None)
    assert [p.poll() for p in started] == [-signal.SIGTERM]


def test_a_core_that_another_program_leaves_is_used_at_once(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(cores.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(cores, "available_cores", lambda: [3, 5])
    monkeypatch.setattr(runner, "_LOOK", 0.1)
    other, taken = runner.take_cores(1), []
    path = Path(experiment)
    path.write_text(path.read_text().replace("Study(", "Study(cores=1, "))

    def start(c, point, cores, locks):
        taken.extend(cores)
        threading.Timer(0.5, runner.release, [other.values()]).start()
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    def stopped():
        return "SIGTERM" if len(taken) == 2 else None

    monkeypatch.setattr(runner, "start", start)
    assert not run_study(experiment, tmp_path / "out", stopped)
    assert taken == [5, 3]


def test_a_core_is_taken_once_and_by_the_run_that_inherits_it(monkeypatch, tmp_path):
    monkeypatch.setattr(cores.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(cores, "available_cores", lambda: [3, 5, 6])
    first, second = runner.take_cores(1), runner.take_cores(2)
    assert list(first) == [3] and list(second) == [5, 6] and runner.take_cores(1) is None
    child = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[first[3].fileno()]
    )
    runner.release(first.values())
    assert runner.take_cores(1) is None  # the child has it
    child.communicate(b"\n")
    assert list(runner.take_cores(1)) == [3]
    assert runner.take_cores(None) == {}
    assert runner.lanes(2) == 1 and runner.lanes(None) == 1
    with pytest.raises(ConfigError, match="pinned to 4 cores, and 3 are here"):
        runner.lanes(4)


def test_a_file_that_changes_under_a_run_does_not_change_what_its_row_says(
    experiment, fake_runs, tmp_path, monkeypatch
):
    honest = runner.start

    def start(*arguments):
        process = honest(*arguments)
        path = Path(experiment)
        path.write_text(path.read_text().replace("model.layers = 1", "model.layers = 2"))
        return process

    monkeypatch.setattr(runner, "start", start)
    study, out = results.load_study(experiment), tmp_path / "out"
    before = results.digest(results.config_of(experiment, study, plan.due(study, {})[0]))
    run_study(experiment, out, lambda: "SIGTERM" if losses_in(out) else None)
    assert results.read(out / "results.csv")[0]["config"] == before
    table = out / "results.csv"
    with pytest.raises(ConfigError, match="1 of 1 rows were made with other settings"):
        results.check_rows(experiment, study, results.read(table), table)


def test_the_report_stands_alone_and_its_numbers_are_those_of_the_table(
    experiment, fake_runs, tmp_path
):
    out = tmp_path / "out"
    run_study(experiment, out)
    study = results.load_study(experiment)
    page = report.write(experiment, study, results.read(out / "results.csv"), out)
    text = page.read_text()
    assert "Small &amp; &lt;quick&gt;." in text
    assert not re.search(r'(src|href)=(?!"data:)', text) and "<script" not in text
    names = {p.name for p in out.glob("*.png")}
    assert names == {"speedup.png", "tuning.png", "loss_steps.png"}
    assert text.count("data:image/png;base64,") == len(names)
    # Twice as fast at equal steps: exactly 2, as the made-up losses fall by the same law.
    rows = summary.speedups_of(study, summary.cells_of(study, results.read(out / "results.csv")))
    last = next(r for r in rows if r["steps"] == 16 and r["cost"] == "steps")
    assert last["speed_up"] == pytest.approx(2.0) and "2.00 (" in text
    cells = summary.cells_of(study, results.read(out / "results.csv"))
    assert [c["value"] for c in cells] == [2e-3, 2e-3, 1e-2, 1e-2]
    assert all(c["loss_at_value_below"] > c["loss_first_seed"] for c in cells)
    assert cells[2]["loss_at_value_above"] == pytest.approx(
        cells[2]["loss_first_seed"] + math.log(2)
    )
    assert cells[0]["loss_at_value_above"] == math.inf and "diverged" in text
    assert cells[0]["loss"] == pytest.approx(3 - 0.3 * math.log(8) + 0.0005)
    rows, tuning = results.read(out / "results.csv"), Point("book", "gpt", 8, 1e-3, 0)
    assert results.spread_of(study, rows, tuning) == pytest.approx(0.001)
    # Of two seeds at the best rate the one in question is left out, and one has no spread.
    assert results.spread_of(study, rows, tuning._replace(value=2e-3)) is None


def test_no_figure_shows_what_another_one_shows():
    def cells(**costs):
        models = {"gpt": 1.0, "ngpt": 2.0}
        return [
            {"setting": s, "model": m, "steps": n} | {k: n * f(x) for k, f in costs.items()}
            for s in ("a", "b") for m, x in models.items() for n in (8, 16)
        ]  # fmt: skip

    def drawn(**costs):
        return figures.costs_to_draw(cells(**costs))

    same, other, none = (lambda _: 0.3), (lambda x: 0.3 * x), (lambda _: 0)
    assert drawn(tokens=same, flops=same, seconds=other) == ["steps", "seconds"]
    assert drawn(tokens=same, flops=other, seconds=none) == ["steps", "flops"]


def test_a_run_made_again_is_compared_to_the_last_bit(
    experiment, fake_runs, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(results, "_commit", lambda _: "fedcba9876")
    out = tmp_path / "out"
    run_study(experiment, out)
    c = comparison(experiment, out)
    study, table = c.study, c.table
    row = next(r for r in results.read(table) if r["value"] == 1e-3)  # not the best rate of a cell
    name = results.point_of(row).name
    assert runner.run_again(c, name, Terminal()) == 0
    assert "the same to the last bit" in capsys.readouterr().out
    moved = math.nextafter(row["loss"], 9)
    results.add(table, study, row | {"loss": moved})
    assert runner.run_again(c, name, Terminal()) == 1  # the same machine and code: to the last bit
    assert "within the spread" not in capsys.readouterr().out
    results.add(table, study, row | {"loss": row["loss"] + 1.0, "jax": "0.0.1"})
    assert runner.run_again(c, name, Terminal()) == 1
    results.add(table, study, row | {"loss": moved})
    before = table.read_text()
    other = [r | {"held_out": "another"} for r in results.read(table)]  # all of another text
    plots.write_csv(table, list(results.COLUMNS), other)
    assert runner.run_again(c, name, Terminal()) == 1
    table.write_text(before)
    capsys.readouterr()
    results.add(table, study, row | {"loss": moved, "jax": "0.0.1", "commit": "0123456789"})
    assert runner.run_again(c, name, Terminal()) == 0
    said = capsys.readouterr().out
    assert "jax differs: 0.0.1 in the table, 0 here" in said
    assert "commit differs: 0123456789 in the table" in said and "within the spread" in said
    assert f"in the table: done, loss {moved!r}; now: done, loss {row['loss']!r}" in said
    assert "spread of the other seeds of its cell" in said
    for commit in ("fedcba9876+", None):
        monkeypatch.setattr(results, "_commit", lambda _, commit=commit: commit)
        results.add(table, study, row | {"loss": moved, "commit": commit})
        assert runner.run_again(c, name, Terminal()) == 0
        said = capsys.readouterr().out
        assert "the code of the table is not known" in said and "within the spread" in said
    results.add(table, study, row | {"status": "diverged", "loss": None})
    assert runner.run_again(c, name, Terminal()) == 1
    with pytest.raises(ConfigError, match=r"has no book-gpt-9; it has e.g. book-gpt-8-0.001-seed0"):
        runner.run_again(c, "book-gpt-9", Terminal())


def test_a_run_that_fails_when_it_is_made_again_shows_its_log(
    experiment, fake_runs, tmp_path, capsys, monkeypatch
):
    run_study(experiment, tmp_path)
    c = comparison(experiment, tmp_path)

    def start(c, point, cores, locks):
        c.log_of(point).write_text("no memory\n")
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])

    monkeypatch.setattr(runner, "start", start)
    with pytest.raises(runner.PointFailed, match="ended with code 1: no memory"):
        runner.run_again(c, "book-gpt-8-0.001-seed0", Terminal())
    assert "no memory" in capsys.readouterr().out


def test_a_run_that_goes_on_with_other_code_tells_both(
    experiment, fake_runs, tmp_path, monkeypatch
):
    c, (point, *_) = comparison(experiment, tmp_path), plan.due(results.load_study(experiment), {})
    c.runs.mkdir()
    rows = []
    for commit in ("a", "a", "b+", "a"):
        monkeypatch.setattr(results, "_commit", lambda _, commit=commit: commit)
        run = runner._start(c, point, [], [])
        run.process.wait()
        rows.append(runner._result(c, run))
    assert [row["commit"] for row in rows] == ["a", "a", "a then b+", "a then b+"]
    assert {row["jax"] for row in rows} == {"0"} and {row["cores"] for row in rows} == {1}
    versions = c.runs / point.name / "versions.json"  # as a start on another machine leaves it
    versions.write_text(json.dumps(json.loads(versions.read_text()) | {"cpu": "other"}))
    run = runner._start(c, point, [], [])
    run.process.wait()
    assert runner._result(c, run)["cpu"] == "c then other"
    c.starts_of(point).unlink()
    run = runner._start(c, point, [], [])
    run.process.wait()
    assert runner._result(c, run)["commit"] == "unknown then a"
    versions.unlink()  # no start came so far as to train
    run = runner._start(c, point, [], [])
    run.process.wait()
    assert runner._result(c, run)["commit"] == "a"


def test_the_commit_is_that_of_this_clone(tmp_path):
    git = subprocess.run(
        ["git", "-C", str(REPO), "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True
    )
    if git.returncode or not (REPO / ".git").exists():
        pytest.skip("this is not a clone")
    file = REPO / "experiments" / "quickstart.py"
    outside = tmp_path / "mine.py"
    outside.write_text(file.read_text())
    for path in (file, outside):
        assert results._commit(str(path)).removesuffix("+") == git.stdout.strip()


def test_rows_of_other_settings_are_refused(experiment, fake_runs, tmp_path):
    out = tmp_path / "out"
    run_study(experiment, out)
    study = results.load_study(experiment)
    rows = results.read(out / "results.csv")
    results.check_rows(experiment, study, rows, out / "results.csv")
    other = Path(experiment).with_name("other.py")
    other.write_text(Path(experiment).read_text().replace("model.layers = 1", "model.layers = 2"))
    with pytest.raises(ConfigError, match=r"16 of 16 rows were made with other settings"):
        results.check_rows(str(other), study, rows, out / "results.csv")


def with_cell(name, value):
    """Puts a value into the first row of a table."""

    def damage(text):
        head, row, *rest = text.split("\n")
        cells = row.split(",")
        cells[head.strip().split(",").index(name)] = value
        return "\n".join([head, ",".join(cells), *rest])

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "setting,model\na,b\n", "no column"),
        (lambda text: text.split("\n", 1)[1], "no column"),
        (lambda text: "", "no column"),
        (lambda text: "\0" * len(text), "cannot be read"),
        (lambda text: text[: text.rindex("done") + 4], "line 2, column tokens: None cannot be"),
        (with_cell("status", "fine"), "line 2, column status: 'fine' cannot be"),
        (with_cell("status", "diverged"), "line 2, column loss: '"),
        *(
            (with_cell("loss", value), f"line 2, column loss: {told}")
            for value, told in (("", "'' c"), ("-1", "'-1' c"), ("nan", "'nan' c"), ("x", "could"))
        ),
        (with_cell("parameters", "0"), "column parameters: '0' cannot be"),
        (with_cell("tokens", ""), "column tokens: '' cannot be"),
        (with_cell("seconds", "inf"), "column seconds: 'inf' cannot be"),
        (with_cell("value", "nan"), "column value: 'nan' cannot be"),
        (lambda text: text + text.splitlines()[1] + "\n", "two rows of book-gpt-8-0.001-seed0"),
        (lambda text: text.replace("setting,", "note,setting,", 1), "not known, or are there twic"),
        (lambda text: text.replace("setting,", "loss,setting,", 1), "not known, or are there twic"),
        (lambda text: text.rstrip() + ",more\n", "line 2 has more cells than the first line"),
    ],
)
def test_a_table_that_is_damaged_is_refused(experiment, fake_runs, tmp_path, damage, message):
    out = tmp_path / "out"
    run_study(experiment, out, lambda: "SIGTERM" if losses_in(out) else None)
    path = out / "results.csv"
    path.write_text(damage(path.read_text()))
    with pytest.raises(ConfigError, match=message):
        results.read(path)


def test_what_decides_about_the_loss_is_in_the_digest():
    from ngpt_jax.config import default_config
    from ngpt_jax.config.experiment import load_config

    def digest(*overrides):
        config = default_config()
        config.train.steps = 10
        return results.digest(load_config(config, overrides))

    plain = digest()
    for field, value in {
        "data.held_out": "0.1", "model.dtype": "bfloat16", "train.spike_deviations": "5",
        "init_from": "runs/a", "optimizer.b2": "0.9", "train.batch_size": "8",
        "data.tokenizer": "a.json", "model.scan_layers": "False",
    }.items():  # fmt: skip
        assert digest((field, value)) != plain, field
    for field, value in {
        "data.cache": "/x", "log.every": "7", "mesh.data": "2", "model.remat": "full",
        "checkpoint.keep": "9", "eval.every": "3",
    }.items():  # fmt: skip
        assert digest((field, value)) == plain, field


def made_up_rows(study, loss):
    """Rows of a whole study with losses by a function of the point, inf: diverged."""
    losses, rows = run_in_disorder(study, loss, 0), []
    for p, x in losses.items():
        rows.append({
            "setting": p.setting, "model": p.model, "steps": p.steps, "value": p.value,
            "seed": p.seed, "status": "done" if x < math.inf else "diverged",
            "loss": x if x < math.inf else None, "bits_per_byte": None, "tokens": p.steps,
            "parameters": 10, "flops": 6.0 * p.steps, "seconds": 0.0, "tokens_per_second": None,
            **dict.fromkeys("cpu cores devices python jax commit".split(), "x"),
        })  # fmt: skip
    return rows


def test_a_seed_that_diverged_leaves_its_cell_out_of_speed_ups(tmp_path):
    def loss(p):
        lost = (p.model, p.steps, p.seed) in (("ngpt", 20, 1), ("gpt", 80, 2))
        return math.inf if lost else made_up_loss(p, {"gpt": 2e-3, "ngpt": 1e-2})

    rows = made_up_rows(PLAN, loss)
    found = summary.speedups_of(PLAN, summary.cells_of(PLAN, rows))
    assert {s["steps"] for s in found} == {10, 20, 40}
    assert {s["cost"] for s in found} == {"steps", "flops"}  # nothing was timed
    assert all(math.isfinite(s["speed_up"]) for s in found)
    text = report.write("x.py", PLAN, rows, tmp_path).read_text()
    assert "<th>diverged</th>" in text
    lost = [f"{s} {m} at {n}" for s in PLAN.settings for m, n in (("gpt", 80), ("ngpt", 20))]
    assert f"Runs diverged, so the means are not drawn: {', '.join(lost)}." in text


def test_the_ring_is_at_the_value_that_the_table_has(tmp_path, monkeypatch):
    """Not at a better one of rows that the study no longer asks for."""
    study = dataclasses.replace(PLAN, settings={"short": {}}, models={"gpt": {}}, budgets=(10,),
                                ladders={"gpt": PLAN.ladders["gpt"]}, baseline=None)  # fmt: skip
    rows = made_up_rows(study, lambda p: made_up_loss(p, {"gpt": 2e-3}))
    row = next(r for r in rows if (r["value"], r["seed"]) == (2e-3, 0))
    rows.append(row | {"value": 2.5e-3, "loss": row["loss"] - 1})
    drawn = []
    monkeypatch.setattr(plots, "save", lambda fig, path: drawn.append(fig))
    figures.tuning(study, rows, tmp_path / "tuning.png")
    (panel,) = drawn[0].axes
    rings = [line for line in panel.lines if line.get_fillstyle() == "none"]
    assert [tuple(line.get_xydata()[0]) for line in rings if len(line.get_xdata()) == 1] == [
        (2e-3, row["loss"])
    ]


def test_a_bound_is_an_arrow_and_no_point_of_the_line(tmp_path, monkeypatch):
    rows = made_up_rows(PLAN, lambda p: made_up_loss(p, {"gpt": 2e-3, "ngpt": 1e-2}))
    found = summary.speedups_of(PLAN, summary.cells_of(PLAN, rows))
    assert {s["steps"] for s in found} == {10, 20, 40, 80}
    drawn = []
    monkeypatch.setattr(plots, "save", lambda fig, path: drawn.append(fig))
    for bound, down in ((">", 0), ("<", 1)):
        changed = [
            s | ({"bound": bound, "speed_up": 1.0} if s["steps"] == 10 else {}) for s in found
        ]
        figures.speedups(PLAN, changed, tmp_path / "speedup.png")
        for panel in drawn[-1].axes:
            ((line, _, _),) = panel.containers
            assert len(line.get_xdata()) == 3 and min(line.get_xdata()) > 15
            assert (line.get_color(), line.get_marker()) == plots.looks(PLAN.models)["ngpt"]
            (arrow,) = [t for t in panel.texts if not t.get_text()]
            assert arrow.xy[1] == pytest.approx(1) and (arrow.xyann[1] < 0) == down
            assert arrow.arrow_patch.get_edgecolor() == to_rgba(line.get_color())


def test_one_slow_run_does_not_change_what_a_cell_costs_in_seconds():
    rows = made_up_rows(PLAN, lambda p: made_up_loss(p, {"gpt": 2e-3, "ngpt": 1e-2}))
    for row in rows:
        row["seconds"] = row["steps"] * (2.0 if row["model"] == "gpt" else 3.0)
    for row in [r for r in rows if (r["model"], r["steps"]) == ("gpt", 40)][:3]:
        row["seconds"] *= 5  # of its 6
    cells = summary.cells_of(PLAN, rows)
    paces = {(c["model"], c["seconds"] / c["steps"]) for c in cells}
    assert paces == {("gpt", 2.0), ("ngpt", 3.0)}
    found = {(s["model"], s["setting"], s["steps"], s["cost"]): s["speed_up"]
             for s in summary.speedups_of(PLAN, cells)}  # fmt: skip
    for (model, setting, steps, cost), value in found.items():
        if cost == "steps":
            assert found[model, setting, steps, "seconds"] == pytest.approx(value * 2 / 3)


def test_models_are_timed_on_the_same_machine():
    """A machine that is four times as fast makes no model faster than another."""
    rows = made_up_rows(PLAN, lambda p: made_up_loss(p, {"gpt": 2e-3, "ngpt": 1e-2}))
    for row in rows:
        row["seconds"] = row["steps"] * (2.0 if row["model"] == "gpt" else 3.0)
    for row in rows:
        if row["model"] == "ngpt" and row["steps"] < 80:  # most of nGPT's runs, not most of all
            row |= {"cpu": "fast", "seconds": row["seconds"] / 4}
    cells = summary.cells_of(PLAN, rows)
    assert {(c["model"], c["seconds"] / c["steps"]) for c in cells} == {("gpt", 2), ("ngpt", 3)}
    assert {c["timed_on"] for c in cells} == {("x", "x", "x")}
    # With no run of nGPT on the other machine there is nothing to compare.
    alone = [row for row in rows if row["model"] == "gpt" or row["cpu"] == "fast"]
    cells = summary.cells_of(PLAN, alone)
    assert {c["timed_on"][0] for c in cells} == {"x", "fast"}
    assert {s["cost"] for s in summary.speedups_of(PLAN, cells)} == {"steps", "flops"}
    # A run that diverged has made a few of its steps alone.
    cut = [row | ({"status": "diverged", "seconds": 1.0} if row["steps"] < 40 else {})
           for row in rows if row["cpu"] == "x"]  # fmt: skip
    cells = summary.cells_of(PLAN, rows, timed=cut)
    assert {(c["model"], c["seconds"] / c["steps"]) for c in cells} == {("gpt", 2), ("ngpt", 3)}
    # With runs of another study there is.
    cells = summary.cells_of(PLAN, alone, timed=rows)
    assert "seconds" in {s["cost"] for s in summary.speedups_of(PLAN, cells)}


def test_with_one_seed_there_is_no_interval(tmp_path):
    study = dataclasses.replace(PLAN, seeds=(0,))
    rows = made_up_rows(study, lambda p: made_up_loss(p, {"gpt": 2e-3, "ngpt": 1e-2}))
    found = summary.speedups_of(study, summary.cells_of(study, rows))
    assert all(s["low"] is None and s["high"] is None for s in found)
    assert "95 %" not in report.write("x.py", study, rows, tmp_path).read_text()


def test_a_run_of_another_text_is_refused(tmp_path):
    """Of another Python on another machine, say, while both share the folder."""
    rows = made_up_rows(PLAN, lambda p: made_up_loss(p, {"gpt": 2e-3, "ngpt": 1e-2}))
    of_text = {"data": "a", "held_out": "b", "cores": 1, "config": "c"}
    rows = [row | of_text for row in rows if row["setting"] == rows[0]["setting"]]
    for row in rows[:3]:
        results.add(tmp_path / "results.csv", PLAN, row)
    before, name = (tmp_path / "results.csv").read_text(), results.point_of(rows[3]).name
    for what in ("data", "held_out"):
        message = rf"{name} read another text than .*; delete \S*/runs/{name}, and go on"
        with pytest.raises(ConfigError, match=message):
            results.add(tmp_path / "results.csv", PLAN, rows[3] | {what: "c"})
    assert (tmp_path / "results.csv").read_text() == before


def test_the_report_names_its_own_folder(tmp_path, monkeypatch):
    rows = made_up_rows(PLAN, lambda p: made_up_loss(p, {"gpt": 2e-3, "ngpt": 1e-2}))
    monkeypatch.chdir(tmp_path)
    Path("experiments").mkdir()
    for out, named in (("runs/x", True), ("experiments/x", False), ("other/experiments/x", False)):
        Path(out).mkdir(parents=True)
        page = report.write("experiments/x.py", PLAN, rows, Path(out))
        assert (f"--out={out}" in page.read_text()) == named


def test_programs_write_the_report_one_after_the_other_and_of_all_rows(
    experiment, fake_runs, tmp_path
):
    from concurrent.futures import ThreadPoolExecutor

    out = tmp_path / "out"
    run_study(experiment, out)
    table = out / "results.csv"
    text = table.read_text()
    short = text[: text.rindex("\n", 0, -1) + 1]
    table.write_text(short)
    with ThreadPoolExecutor(2) as pool:
        with files.lock(out / results.LOCK):  # of a program that adds the last row
            both = [
                pool.submit(compare.compare, experiment, str(out), False, True, None)
                for _ in range(2)
            ]
            time.sleep(1)
            assert not (out / "report.html").exists()
            table.write_text(text)
        assert [one.result() for one in both] == [0, 0]
    assert not list(out.glob(".*.tmp"))
    rows = results.read(table)
    assert summary.machines_of(rows)[0].split()[0] in (out / "report.html").read_text()
    seeds = [int(x["seeds"]) for x in csv.DictReader((out / "cells.csv").open())]
    study = results.load_study(experiment)
    assert seeds == [c["seeds"] for c in summary.cells_of(study, rows)]
    assert seeds != [c["seeds"] for c in summary.cells_of(study, rows[:-1])]


def command(*arguments, **how):
    return subprocess.run(
        [sys.executable, "-m", "ngpt_jax.tools.compare", *arguments],
        capture_output=True, text=True, cwd=REPO, **how,
    )  # fmt: skip


FULL = """
import errno, runpy, sys
from ngpt_jax.study import compare
def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")
compare.compare = full
runpy.run_module("ngpt_jax.tools.compare", run_name="__main__", alter_sys=True)
"""


def test_an_error_that_names_no_file_names_the_study():
    done = subprocess.run(
        [sys.executable, "-c", FULL, "--experiment=quickstart:finals"], capture_output=True,
        text=True, cwd=REPO, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: the results of quickstart:finals: No space left on device.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: Give --experiment="),
        (["--experiment=no.py"], "error: --experiment: no file 'no.py'"),
        (["--experiment=experiments/124m.py"], "it defines no function get_study"),
        (["--experiment=experiments/speedup.py:serch"], "Unknown variant 'serch'"),
        (
            ["--experiment=x.py", "--config.train.steps=3"],
            "error: --config.train.steps is a flag of training",
        ),
        (["--experiment=x.py", "--check=a", "--dry_run"], "error: Give only one of --check, --dry"),
        (["--experiment=quickstart", "--out=setup.cfg"], "error: --out=setup.cfg is a file"),
    ],
)
def test_bad_arguments_get_one_line(arguments, message):
    done = command(*arguments)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_text_is_told_before_any_run(experiment, tmp_path, book):
    out = f"--out={tmp_path / 'out'}"
    done = command(f"--experiment={experiment}", "--dry_run", out)
    assert done.returncode == 0 and "due: book-gpt-8-0.001-seed0" in done.stdout, done.stderr
    assert "about 16 runs to come, for how long is not known" in done.stdout
    path = Path(experiment)
    path.write_text(path.read_text().replace(str(book), str(tmp_path / "gone.txt")))
    for more in (["--dry_run"], []):
        done = command(f"--experiment={experiment}", out, *more)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert "book-gpt-8-0.001-seed0: data.paths: there is no file or folder" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_real_runs_can_be_stopped_and_every_point_can_be_made_again(experiment, tmp_path, home):
    path = Path(experiment)
    path.write_text(
        textwrap.dedent(
            path.read_text().split("def get_study")[0] + "def get_study(variants=''):\n"
            "    return Study(models={'gpt': {'model.kind': 'gpt'}, 'ngpt': {}},"
            " settings={'book': {}}, budgets=(100,), cores=1)\n"
        )
    )
    out = tmp_path / "out"
    arguments = [
        sys.executable, "-m", "ngpt_jax.tools.compare", f"--experiment={path}", f"--out={out}",
    ]  # fmt: skip
    # A place of its own for the locks of cores: a study may be under way here.
    env = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(arguments, cwd=REPO, stdout=subprocess.PIPE, text=True, env=env)
    end = time.monotonic() + 60
    while not list(out.glob("runs/*/metrics.jsonl")) and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 75, said
    assert "save their state" in said
    done = command(*arguments[3:], env=env)
    assert done.returncode == 0, done.stderr
    rows = results.read(out / "results.csv")
    assert [(r["model"], r["status"], r["cores"]) for r in rows] == [
        ("gpt", "done", 1), ("ngpt", "done", 1)
    ]  # fmt: skip
    name = results.point_of(rows[1]).name
    done = command(*arguments[3:], f"--check={name}", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same to the last bit" in done.stdout
    assert (out / "report.html").exists()
