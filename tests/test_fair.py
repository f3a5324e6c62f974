"""The study whose table is to be fair: its budgets, its seeds, and equal trials."""

import dataclasses
import runpy
import statistics
from collections import Counter

import pytest
from data_helpers import ROOT

from ngpt_jax.model.params import num_params
from ngpt_jax.study import plan, results

FILE = str(ROOT / "experiments" / "fair.py")
TABLES = ("", ":long", ":context", ":width")


@pytest.mark.parametrize(
    ("variant", "tokens_per_parameter"),
    [("", (5, 10, 36)), (":long", (130,)), (":context", (18, 36)), (":width", (5, 10))],
)
def test_the_budgets_are_what_the_file_says(variant, tokens_per_parameter):
    study = results.load_study(FILE + variant)
    points = {(p.setting, p.model): p for p in plan.due(study, {})}
    assert len(points) == len(study.settings) * 4
    for point in points.values():
        config = results.config_of(FILE + variant, study, point)
        tokens = config.train.batch_size * config.model.context
        assert tokens == 2048
        count = num_params(dataclasses.replace(config.model, vocab_size=257))
        found = [steps * tokens / count for steps in study.budgets]
        assert found == pytest.approx(tokens_per_parameter, rel=0.02)
        gpt, muon = point.model.startswith("gpt"), point.model.endswith("muon")
        assert config.model.qk_norm and (config.model.kind == "gpt") == gpt
        assert (config.optimizer.recipe == "muon") == muon


def test_the_search_uses_no_budget_and_no_seed_of_the_tables_and_is_as_long_for_each_model():
    search = results.load_study(f"{FILE}:search")
    for study in (results.load_study(FILE + variant) for variant in TABLES):
        assert not {*study.budgets} & {*search.budgets} and not {*study.seeds} & {*search.seeds}
        assert {*study.models} == {"ngpt", "ngpt_muon", "gpt_qk", "gpt_qk_muon"}
    trials = Counter(p.model.partition("+")[0] for p in plan.forecast(search, {}))
    assert trials == dict.fromkeys(study.models, 20)
    assert study.trials["ngpt"] - study.trials["ngpt_muon"] == 65  # those of speedup.py


def test_each_recipe_is_the_trial_with_the_lowest_mean_over_both_texts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    found = runpy.run_path(FILE)["FOUND"]
    losses = {}
    for row in results.read(ROOT / "experiments" / "fair-search" / "results.csv"):
        model, _, trial = row["model"].partition("+")
        losses.setdefault(model, {}).setdefault(trial, []).append(row["loss"])
    for model, of_trial in losses.items():
        assert {len(x) for x in of_trial.values()} == {2}
        assert found[model] == min(of_trial, key=lambda trial: statistics.fmean(of_trial[trial]))
