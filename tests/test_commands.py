"""What all commands have in common, and the benchmarks of training and of its data."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from ngpt_jax.benchmark import configs, data, train_step
from ngpt_jax.config import ConfigError, DataConfig

ROOT = Path(__file__).parents[1]
TOOLS = sorted(path.stem for path in (ROOT / "ngpt_jax" / "tools").glob("[a-z]*.py"))


DATA = ["data.corpora", "data.prepare", "data.train_tokenizer"]
COMMANDS = ["main", *DATA, *(f"tools.{tool}" for tool in TOOLS)]


def test_the_list_has_every_command():
    done = subprocess.run(
        [sys.executable, "-m", "ngpt_jax"], cwd=ROOT, text=True, capture_output=True, check=True
    )
    listed = dict(re.findall(r"^  python -m (\S+) +(\S.*)$", done.stdout, re.M))
    runs = [p for p in (ROOT / "ngpt_jax").rglob("*.py") if "command.run_command(" in p.read_text()]
    there = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in runs}
    assert listed.keys() == there == {f"ngpt_jax.{name}" for name in COMMANDS}
    assert listed["ngpt_jax.main"] == "Trains nGPT, or the GPT baseline."


@pytest.mark.parametrize("name", COMMANDS)
def test_help_exits_with_0_and_does_not_load_jax(name):
    command = [sys.executable, "-X", "importtime", "-m", f"ngpt_jax.{name}", "--help"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"  python -m ngpt_jax\.{name}\s", done.stdout) and "--" in done.stdout
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "absl" in loaded
    assert not loaded & {"jax", "flax", "optax", "matplotlib", "tokenizers"}


def test_the_benchmark_of_training_steps(tiny, monkeypatch):
    numbers = train_step.measure(tiny(), ["gpt", "plain"], 3, 1)
    assert set(numbers["models"]) == {"gpt", "plain"} and numbers["steps"] == 3
    assert numbers["ratios"]["ngpt/gpt"] is None
    for row in numbers["models"].values():
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert row["tokens_per_second"] == pytest.approx(4 * 16 / (row["median_ms"] / 1e3))
    shown = train_step.show(numbers)
    assert "gpt/plain: " in shown and "3 steps each on 1 x cpu" in shown
    with pytest.raises(ConfigError, match="The plain GPT is float32"):
        train_step.measure(tiny(**{"model.dtype": "bfloat16"}), ["plain"], 3, 1)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="The plain GPT runs on one device, and there are 2"):
        train_step.measure(tiny(), ["plain"], 3, 1)
    baseline = train_step.config_of("gpt_qk_norm", tiny()).model
    assert baseline.kind == "gpt" and baseline.qk_norm
    assert not train_step.config_of("gpt", tiny()).model.qk_norm


@pytest.mark.parametrize("name", ["model.kind", "model.qk_norm", "optimizer.recipe"])
def test_a_benchmark_takes_no_field_in_which_ngpt_and_gpt_differ(name):
    with pytest.raises(ConfigError, match=f"--config.{name}: each model is timed with its own"):
        configs.load(None, [(name, "muon")], train_step.SMALL)


@pytest.mark.slow
def test_the_benchmark_of_data(book):
    held = np.ones(500 * 2**20, np.uint8)  # by this process, not by that of the preparation
    numbers = data.measure(DataConfig(source="text", paths=(book,)), 1, 4, 16, 1)
    assert numbers["tokens"] > 1000 and 10 < numbers["peak_mib"] < 500 and held.all()
    assert all(numbers[name] > 0 for name in ("library", "one", "all", "loader"))
    assert "preparation, 1 workers" in data.show(numbers)
