"""What waits for hardware: the study for one GPU, and the paper's 0.5B point."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import commands, split_environment

from ngpt_jax.config.experiment import load_config
from ngpt_jax.model.params import num_params
from ngpt_jax.study import plan, results
from ngpt_jax.training.throughput import train_flops_per_token

ROOT = Path(__file__).parents[1]
STUDY = str(ROOT / "experiments/gpu_study.py")
PAPER = Path("experiments/paper_0_5b.md")
H100 = 989e12  # FLOP/s


@pytest.mark.parametrize(
    ("variant", "runs", "tokens"),
    [("", 120, (20, 40, 80)), (":32m", 60, (20, 40, 80)), (":127m", 60, (20, 40, 80)),
     (":long", 40, (160, 320))],
)  # fmt: skip
def test_budgets_are_the_tokens_a_parameter_that_the_file_tells(variant, runs, tokens):
    study = results.load_study(STUDY + variant)
    told = dict(zip(study.budgets, tokens, strict=True))
    points = plan.forecast(study, {})
    assert len(points) == runs
    for cell in {(p.setting, p.model, p.steps) for p in points}:
        point = plan.Point(*cell, study.ladders[cell[1]][0], 0)
        config = results.config_of(STUDY + variant, study, point)
        model, optimizer = config.model, config.optimizer
        size = {"32m": (6, 256, 4, 22.7e6), "127m": (18, 512, 8, 108.4e6)}[point.setting]
        assert (model.layers, model.width, model.heads, model.head_dim) == (*size[:3], 64)
        assert (model.context, model.dtype, model.param_dtype) == (2048, "bfloat16", "float32")
        assert num_params(model) == pytest.approx(size[3], rel=3e-3)
        seen = config.train.steps * config.train.batch_size * model.context
        assert seen / num_params(model) == pytest.approx(told[point.steps], rel=0.01)
        gpt = point.model.startswith("gpt")
        assert (optimizer.recipe == "muon") == point.model.endswith("muon")
        assert optimizer.weight_decay == (0.1 if gpt else 0.0)
        assert optimizer.warmup_steps == (point.steps // 10 if gpt else 0)
        assert config.checkpoint.minutes == 3


def test_the_cheapest_runs_come_first():
    study = results.load_study(STUDY)
    due = plan.due(study, {})
    assert len(due) == 48
    assert [p.steps for p in due] == sorted(p.steps for p in due)
    assert due[0].setting == "32m"


@pytest.mark.parametrize("size", ["32m", "127m"])
def test_a_size_alone_is_a_part_of_the_whole_and_trains_with_main(size):
    whole, alone = results.load_study(STUDY), results.load_study(f"{STUDY}:{size}")
    points = plan.forecast(alone, {})
    assert {*points} == {p for p in plan.forecast(whole, {}) if p.setting == size}
    for point in points[:8]:
        one, other = (
            results.config_of(STUDY, whole, point),
            results.config_of(f"{STUDY}:{size}", alone, point),
        )
        assert one == other
    by_main = load_config(f"{STUDY}:{size}").model
    assert by_main == results.config_of(STUDY, whole, points[0]).model


@pytest.mark.parametrize(
    ("model", "published"),
    [("ngpt", (1.5e-3, 2.4e-3, 3e-3)), ("gpt_qk", (5.2e-3, 1.0e-2))],
)
def test_ladders_hold_the_published_rates(model, published):
    ladders = results.load_study(STUDY).ladders
    assert {len(ladder) for ladder in ladders.values()} == {3}
    for ladder in (ladders[model], [x / 2 for x in ladders[f"{model}_muon"]]):
        assert all(ladder[0] <= rate <= ladder[-1] for rate in published)


def test_a_run_of_the_debug_study(tmp_path):
    study = results.load_study(f"{STUDY}:debug")
    due = plan.due(study, {})
    assert len(due) == 8
    point = due[-1]
    assert (point.setting, point.model) == ("127m", "gpt_qk_muon")
    command = results.command_of(f"{STUDY}:debug", study, point)
    subprocess.run(
        [sys.executable, "-m", "ngpt_jax.main", *command, f"--workdir={tmp_path}/run",
         f"--config.data.cache={tmp_path}/cache"],
        check=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    origins = [results.origin_of(f"{STUDY}:debug", study, point)]
    row = results.row_of(f"{STUDY}:debug", study, point, tmp_path / "run", False, origins)
    assert row["status"] == "done" and 4 < row["loss"] < 6


def test_the_page_of_the_study_has_its_costs():
    page = (ROOT / "experiments/gpu_study.md").read_text()
    for size in ("32m", "127m"):
        config = load_config(f"{STUDY}:{size}")
        tokens = config.train.batch_size * config.model.context
        assert f"{config.train.batch_size} sequences, {tokens:,} |" in page
        compute = 1e3 * tokens * train_flops_per_token(config.model) / H100
        rows = re.findall(rf"^\| `{size}`, (?:nGPT|GPT).*", page, re.M)
        assert len(rows) == 4
        for row in rows:
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            assert float(cells[4]) == pytest.approx(compute, rel=0.01)
            memory, least, total = (float(cell.split()[0]) for cell in cells[5:])
            assert memory == least
            assert total == pytest.approx(compute + memory, abs=1)
            mfu = [int(re.search(r"\((\d+) %", cell)[1]) for cell in cells[6:]]
            assert mfu == pytest.approx([100 * compute / least, 100 * compute / total], abs=0.6)


def flags_of(command):
    """(experiment, overrides) of a command of training."""
    spec = next(word for word in command if word.startswith("--config="))
    words = [
        word.removeprefix("--config.").split("=", 1) for word in command if "--config." in word
    ]
    return f"{ROOT}/{spec.removeprefix('--config=')}", [(name, text) for name, text in words]


def test_the_commands_of_the_papers_point():
    runs = [split_environment(command)[1] for command in commands(PAPER)]
    runs = [run for run in runs if run[1:3] == ["-m", "ngpt_jax.main"]]
    assert len(runs) == 4
    short, point, gpt, tpu = (load_config(*flags_of(run)) for run in runs)
    for config, rate in ((short, 1.5e-3), (point, 1e-3), (gpt, 1.5e-3), (tpu, 1e-3)):
        assert config.optimizer.learning_rate == rate
        assert (config.model.context, config.train.batch_size) == (1024, 512)
        assert config.train.steps == (25_000 if config is short else 100_000)
    assert num_params(point.model) == 468_491_520
    assert (gpt.model.kind, gpt.optimizer.warmup_steps, gpt.optimizer.weight_decay) == (
        "gpt", 2000, 0.1,
    )  # fmt: skip
    page = (ROOT / PAPER).read_text()
    flops = 512 * 1024 * train_flops_per_token(point.model) * point.train.steps
    for devices, peak, hours in ((8, H100, "12.7"), (64, 197e12, "8.0")):
        assert f"{flops / (0.4 * devices * peak) / 3600:.1f}" == hours and f"| {hours}, " in page
