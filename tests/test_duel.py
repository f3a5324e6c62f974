"""Two models side by side, and the list of runs."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from data_helpers import write
from test_training import final_state, numbers

from ngpt_jax.config import ConfigError
from ngpt_jax.training import duel as duel_lib
from ngpt_jax.training import history, loop, workdir
from ngpt_jax.training.logger import Logger
from ngpt_jax.training.stop_signal import EXIT_RESUME, StopSignal

ROOT = Path(__file__).parents[1]
KINDS = ("ngpt", "gpt")


def duel(configs, folder):
    return duel_lib.duel(configs, folder, StopSignal())


@pytest.mark.slow
def test_a_duel_is_two_runs_and_goes_on_where_it_was_stopped(small, tmp_path, monkeypatch, capsys):
    configs = {kind: small(**{"model.kind": kind}) for kind in KINDS}
    assert duel(configs, tmp_path / "whole") == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    table = lines[lines.index("  step      ngpt       gpt  training loss") + 1 :]
    found = [line.split() for line in table if line.split()[0].isdigit()]
    assert [int(step) for step, *_ in found] == [3, 6, 9, 12]
    losses = {kind: history.read_losses(tmp_path / "whole" / kind).train for kind in KINDS}
    for (step, *shown), *both in zip(found, *losses.values(), strict=True):
        assert both == [(int(step), pytest.approx(float(text), abs=1e-4)) for text in shown]
    for kind in KINDS:
        assert f"\n{kind}: held-out text: " in out
    assert lines[-1] == f"losses: {tmp_path}/whole/loss.png"
    assert (tmp_path / "whole/loss.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "whole/loss.csv").open()))
    assert {(row["run"], row["set"]) for row in rows} == {
        (kind, name) for kind in KINDS for name in ("training", "held_out")
    }

    # Each is the run that main would have made.
    for kind, config in configs.items():
        assert loop.train(config, tmp_path / "alone" / kind) == 0
        assert numbers(tmp_path / "alone" / kind) == numbers(tmp_path / "whole" / kind)

    # Stopped within a step of the second model, between two rows.
    real, calls = Logger.add, []

    def stopping(self, step, metrics):
        real(self, step, metrics)
        calls.append(step)
        if len(calls) == 14:
            os.kill(os.getpid(), signal.SIGTERM)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Logger, "add", stopping)
        assert duel(configs, tmp_path / "cut") == EXIT_RESUME
    assert "SIGTERM: saved; run the same command again to resume" in capsys.readouterr().out
    assert not (tmp_path / "cut/loss.png").exists()
    assert duel(configs, tmp_path / "cut") == 0
    assert "resumed from step 7" in capsys.readouterr().out
    for kind in KINDS:
        assert numbers(tmp_path / "cut" / kind) == numbers(tmp_path / "whole" / kind)
        ends = [final_state(tmp_path / where / kind)[0] for where in ("cut", "alone")]
        for one, other in zip(*map(jax.tree.leaves, ends), strict=True):
            assert np.array_equal(one, other)
    assert (tmp_path / "cut/loss.csv").read_text() == (tmp_path / "whole/loss.csv").read_text()


@pytest.mark.parametrize(
    ("field", "value"),
    [("train.batch_size", 8), ("train.steps", 13), ("data.seed", 1), ("model.context", 8)],
)
def test_models_that_read_different_batches_are_refused(small, tmp_path, field, value):
    configs = {"ngpt": small(), "gpt": small(**{"model.kind": "gpt", field: value})}
    with pytest.raises(ConfigError, match="read different batches; give them the same"):
        duel(configs, tmp_path / "duel")
    assert not (tmp_path / "duel").exists()


@pytest.mark.slow
def test_the_commands_of_duel_and_runs(tmp_path, book):
    def start(*command):
        return subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, text=True, capture_output=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}, check=False,
        )  # fmt: skip

    done = start(
        "ngpt_jax.tools.duel", "--config=quickstart:debug", "--config.data.source=text",
        f"--config.data.paths={book}", "--config.train.steps=4", "--config.log.every=2",
        "--config.model.layers=1", "--config.model.width=16",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/duel-quickstart-debug"
    assert {"ngpt", "gpt", "loss.png", "loss.csv"} == {path.name for path in folder.iterdir()}
    configs = [json.loads((folder / kind / "config.json").read_text()) for kind in KINDS]
    rates = [config["optimizer"]["learning_rate"] for config in configs]
    assert [config["model"]["kind"] for config in configs] == [*KINDS] and rates == [1.4e-2, 6e-3]
    done = start("ngpt_jax.tools.runs")
    lines = done.stdout.splitlines()
    assert lines[0].split() == "folder kind parameters step held-out loss state".split()
    for kind, line in zip(("gpt", "ngpt"), lines[2:], strict=True):
        assert line.split()[:2] == [f"runs/duel-quickstart-debug/{kind}", kind]
        assert line.split()[3:6] == ["4", "of", "4"] and line.split()[-1] == "finished"
    for flags, told in (
        (["--config=quickstart:debug,gpt"], "leave out the variant gpt"),
        (["--config=quickstart:debug", "--config.model.kind=gpt"], "quickstart:debug is gpt, not"),
        (["--config=quickstart:debug", "--config.train.max_skipped=1", "--config.train.steps=4",
          "--config.optimizer.learning_rate=1e30", "--workdir=no/run"], "steps in a row were"),
    ):  # fmt: skip
        done = start("ngpt_jax.tools.duel", *flags)
        assert done.returncode == (3 if "no/run" in " ".join(flags) else 2), done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ") and told in done.stderr
    done = start("ngpt_jax.tools.runs", "nowhere")
    assert (done.returncode, done.stderr) == (
        2, "error: no folder 'nowhere'; give one that holds runs.\n"
    )  # fmt: skip
    (tmp_path / "empty").mkdir()
    assert start("ngpt_jax.tools.runs", "empty").stdout == "there are no runs in empty\n"


@pytest.mark.slow
def test_runs_tell_their_state(runs, tmp_path):
    broken = {"half": '{"model": ', "nothing": "{}", "list": "[]", "newer": '{"model": {"x": 1}}'}
    for name in ("finished", "stopped", "running", "new", "logged", *broken):
        shutil.copytree(runs / "ngpt", tmp_path / "deep" / name)
    write(tmp_path / "no run/config.json", "{}")
    for name in ("stopped", "running", "new"):
        file = tmp_path / "deep" / name / "config.json"
        file.write_text(file.read_text().replace('"steps": 4,', '"steps": 9,'))
    for name, text in broken.items():
        write(tmp_path / "deep" / name / "config.json", text)
    shutil.rmtree(tmp_path / "deep/new/checkpoints")
    (tmp_path / "deep/new/checkpoints").mkdir()
    (tmp_path / "deep/new/metrics.jsonl").unlink()

    def list_runs():
        return {Path(facts.folder).name: facts for facts in history.list_runs(str(tmp_path))}

    saved = tmp_path / "deep/logged/checkpoints"  # killed after a row, with an older checkpoint
    (saved / "4").rename(saved / "2")
    lock = workdir.lock_workdir(tmp_path / "deep/running", patience=0)
    found = list_runs()
    lock.close()
    assert {name: (facts.step, facts.state) for name, facts in found.items()} == {
        "finished": ("4 of 4", "finished"), "logged": ("4 of 4", "stopped"),
        "stopped": ("4 of 9", "stopped"),
        "running": ("4 of 9", "running"), "new": ("0 of 9", "stopped"),
        **dict.fromkeys(broken, ("-", "not readable")),
    }  # fmt: skip
    assert found["new"].held_out == "-" and float(found["finished"].held_out) > 1
    assert list_runs()["running"].state == "stopped"
