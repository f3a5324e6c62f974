"""What may change when a run goes on, other runs' weights, and errors while a run is under way."""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from data_helpers import ROOT, write_array_record, write_bin
from test_sources import TinySet
from test_training import numbers, rows, stop_in_evaluation

from ngpt_jax.checkpoint import saving
from ngpt_jax.config import CheckpointConfig, ConfigError
from ngpt_jax.data.tokenizers import base
from ngpt_jax.model.params import param_tree
from ngpt_jax.optim.schedules import make_schedule
from ngpt_jax.optim.transformations import scale_by_adam, scale_by_learning_rate
from ngpt_jax.projection import keep_params_on_sphere
from ngpt_jax.training import evaluator, layout, loop, saver, setup, workdir
from ngpt_jax.training.logger import Logger
from ngpt_jax.training.metrics import MetricWriter
from ngpt_jax.training.stop_signal import EXIT_RESUME


def arrays(folder, step):
    tree = ocp.PyTreeCheckpointer().restore(folder / f"checkpoints/{step}/state")
    return jax.tree.map(np.asarray, tree)


@pytest.fixture(scope="module")
def finished(book, tmp_path_factory):
    """A run of 8 steps, to copy; and its fields."""
    fields = {"train.steps": 8, "checkpoint.every": 4, "checkpoint.keep": 9, "eval.every": 4}
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, fields, book


@pytest.fixture
def begun(finished, small, tmp_path):
    """A copy of the run as it was after step 4, and its fields."""
    folder, fields, _ = finished
    if not folder.exists():
        assert loop.train(small(**fields), folder) == 0
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/8")
    return tmp_path / "run", fields


# ---------------------------------------------------------------------- what may change on resume


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("model.width", 32, "the run's own"),
        ("model.rope_base", 5e3, "the run's own"),
        ("model.s_z.init", 2.0, "the run's own"),
        ("model.param_dtype", "bfloat16", "the run's own"),
        ("optimizer.b2", 0.99, "the run's own"),
        ("optimizer.recipe", "muon", "the run's own"),
        ("model.parametrization", "nugpt", "the run's own"),
        ("optimizer.weight_decay", 0.1, "the run's own"),
        ("data.seed", 1, "the run's own"),
        ("data.packing", "best_fit", "the run's own"),
        ("data.mask_documents", True, "the run's own"),
        ("train.seed", 1, "the run's own"),
        ("train.steps", 9, "schedule"),
        ("train.batch_size", 8, "schedule"),
        ("optimizer.learning_rate", 1e-3, "schedule"),
        ("optimizer.schedule", "wsd", "schedule"),
        ("optimizer.final_fraction", 0.1, "schedule"),
        ("optimizer.warmup_steps", 2, "schedule"),
        ("model.dtype", "bfloat16", "free"),
        ("model.remat", "full", "free"),
        ("model.loss_chunk", 32, "free"),
        ("train.accumulate", 2, "free"),
        ("train.max_skipped", 3, "free"),
        ("mesh.tensor", 2, "free"),
        ("eval.every", 3, "free"),
        ("checkpoint.every", 3, "free"),
        ("checkpoint.keep_every", 10, "free"),
        ("log.every", 1, "free"),
        ("data.workers", 2, "free"),
        ("data.cache", "elsewhere", "free"),
        ("data.paths", ("moved.txt",), "free"),
        ("data.tokenizer", "moved.json", "free"),
        ("sample.tokens", 3, "free"),
        ("runtime.hang_seconds", 5, "free"),
        ("init_from", "elsewhere", "free"),
    ],
)
def test_what_may_change(small, field, value, kind):
    if field == "init_from":
        new = dataclasses.replace(small(), init_from=value)
    else:
        new = small(**{field: value})
    found = workdir.changes(small(), new)
    # The strictest kind comes first; others follow from it (eval.batch_size from train.batch_size).
    assert next(k for k, differences in found.items() if differences) == kind
    assert found[kind][0].startswith(f"{field}: ")


def test_a_constant_rate_has_no_schedule(small):
    constant = {"optimizer.schedule": "constant"}
    longer = small(**constant, **{"train.steps": 99})
    assert workdir.changes(small(**constant), longer)["free"] == ["train.steps: 12 -> 99"]
    constant |= {"model.parametrization": "nugpt", "optimizer.base_steps": 6}  # rates follow
    longer = small(**constant, **{"train.steps": 99})
    assert workdir.changes(small(**constant), longer)["schedule"] == ["train.steps: 12 -> 99"]


@pytest.mark.slow
def test_free_changes_and_their_list(begun, small, capsys):
    folder, fields = begun
    config = small(**fields | {"model.remat": "full", "log.every": 2, "checkpoint.keep": 1})
    assert loop.train(config, folder) == 0
    out = capsys.readouterr().out
    assert "resumed from step 4" in out
    assert "changed: model.remat: 'auto' -> 'full'" in out
    assert "changed: log.every: 3 -> 2" in out
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["8"]
    assert json.loads((folder / "config.json").read_text())["model"]["remat"] == "full"


@pytest.mark.slow
def test_the_schedule_changes_with_a_flag_alone(begun, small):
    folder, fields = begun
    longer = small(**fields | {"train.steps": 10, "train.batch_size": 8})
    before = sorted(p.relative_to(folder) for p in folder.rglob("*"))
    message = (
        r"another schedule \(train.steps: 8 -> 10; train.batch_size: 4 -> 8.*\); .*--allow_sch"
    )
    with pytest.raises(ConfigError, match=message):
        loop.train(longer, folder)
    assert sorted(p.relative_to(folder) for p in folder.rglob("*")) == before
    assert loop.train(longer, folder, allow_schedule_change=True) == 0
    progress = json.loads((folder / "checkpoints/10/progress/metadata").read_text())
    assert progress["position"] == 4 * 4 + 6 * 8
    shorter = small(**fields | {"train.steps": 3})
    with pytest.raises(ConfigError, match="train.steps = 3, but the run .* is at step 10 already"):
        loop.train(shorter, folder, allow_schedule_change=True)


@pytest.mark.slow
def test_another_tokenizer_is_refused(begun, small, monkeypatch):
    folder, fields = begun
    monkeypatch.setattr(base, "fingerprint_of", lambda *_: "1234567890")
    before = [(folder / name).read_text() for name in ("config.json", "versions.json")]
    message = r"data.tokenizer \('byte', .* 12345678\) is not the one .* \(fingerprint .{8}\)"
    with pytest.raises(ConfigError, match=message):
        loop.train(small(**fields | {"log.every": 7}), folder)
    assert [(folder / n).read_text() for n in ("config.json", "versions.json")] == before


@pytest.mark.slow
def test_damaged_checkpoints_are_set_aside(finished, begun, small, capsys):
    """The losses that follow are those of the undisturbed run."""
    whole, fields, _ = finished
    folder, _ = begun
    shutil.copytree(whole / "checkpoints/8", folder / "checkpoints/8")
    file = max((folder / "checkpoints/8/state").rglob("*"), key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    assert loop.train(small(**fields), folder) == 0
    captured = capsys.readouterr()
    assert "warning: checkpoint 8 is damaged (state/" in captured.err
    assert "going on from 4" in captured.err
    assert "resumed from step 4" in captured.out
    assert (folder / "damaged/8").is_dir()
    assert numbers(folder) == numbers(whole)
    a, b = arrays(folder, 8), arrays(whole, 8)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.array_equal(x, y)


@pytest.mark.slow
def test_a_workdir_in_use_is_refused(begun, small, monkeypatch, capsys):
    folder, fields = begun
    code = "import sys, time; from etils import epath; from ngpt_jax.training import workdir;"
    code += "f = workdir.lock_workdir(epath.Path(sys.argv[1])); print(flush=True); time.sleep(99)"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, stdout=subprocess.PIPE,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    other.stdout.readline()
    monkeypatch.setattr(workdir.lock_workdir, "__defaults__", (0.5, None))
    with pytest.raises(workdir.RunError, match="is in use by another process; wait for its end"):
        loop.train(small(**fields), folder)
    assert f"waiting up to 0 s for another process, which uses {folder}" in capsys.readouterr().out
    other.kill()
    other.wait()
    assert loop.train(small(**fields), folder) == 0


@pytest.mark.slow
def test_metrics_that_are_damaged_or_of_another_evaluation(begun, small, finished):
    """Whole rows stay; what is no row is dropped; the last evaluation is made on all of it."""
    folder, fields = begun
    shutil.copytree(finished[0] / "checkpoints/8", folder / "checkpoints/8")
    good = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    partial = [json.loads(r) for r in good if b"bits_per_byte" in r]
    (row,) = partial
    del row["eval/held_out/bits_per_byte"]
    kept = [r for r in good if b"bits_per_byte" not in r]
    (folder / ".metrics.jsonl.77.tmp").write_text("of a kill while it was written")
    garbage = [b"\xff\x00garbage\n", b"[1]\n", b'{"step": "x"}\n']
    (folder / "metrics.jsonl").write_bytes(
        b"".join([*kept[:2], *garbage, *kept[2:], json.dumps(row).encode()])
    )
    assert loop.train(small(**fields), folder) == 0
    found = rows(folder)
    assert [json.dumps(r) for r in found[: len(kept)]] == [r.decode().strip() for r in kept]
    assert "eval/held_out/bits_per_byte" in found[-1]
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.slow
def test_a_checkpoint_that_is_evaluated_later_may_be_the_best(small, tmp_path, monkeypatch):
    config = small(**{"train.steps": 8, "eval.every": 4, "checkpoint.every": 4,
                      "checkpoint.keep_best": 1, "checkpoint.keep": 1})  # fmt: skip
    with monkeypatch.context() as patch:
        stop_in_evaluation(patch)
        assert loop.train(config, tmp_path) == EXIT_RESUME
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(
        evaluator,
        "evaluate",
        lambda *args: {"loss": next(losses), "bits_per_byte": 1.0, "tokens": 1.0},
    )
    assert loop.train(config, tmp_path) == 0
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "8"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGINT, 1.0), (signal.SIGTERM, 2.5)])
def test_a_signal_while_a_run_starts(tmp_path, number, seconds):
    process = subprocess.Popen(
        [sys.executable, "-m", "ngpt_jax.main", "--config=experiments/quickstart.py:debug",
         f"--workdir={tmp_path}/run", "--config.train.steps=100000"],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    time.sleep(seconds)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (EXIT_RESUME, "")
    assert f"{signal.Signals(number).name}: s" in out


@pytest.mark.slow
def test_where_nobody_reads_what_is_said(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ngpt_jax.main", "--config=experiments/quickstart.py:debug",
             f"--workdir={tmp_path}/run", "--config.sample.tokens=0"],
            cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True, stdout=full,
            stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()], done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------- init_from


@pytest.mark.slow
def test_a_run_from_the_weights_of_another(begun, small, tmp_path, monkeypatch, capsys):
    folder, fields = begun
    config = small(**fields | {"train.steps": 1, "optimizer.learning_rate": 1e-30})
    for path in (folder, folder / "checkpoints/4"):
        new = dataclasses.replace(config, init_from=str(path))
        assert loop.train(new, tmp_path / f"new{path.name}") == 0
        a, b = arrays(folder, 4), arrays(tmp_path / f"new{path.name}", 1)
        assert int(b["step"]) == 1
        for x, y in zip(*(jax.tree.leaves(t["params"]) for t in (a, b)), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)
    scaled = small(**fields | {"train.steps": 1, "model.s_z.init": 2.0, "model.rope_base": 5e4})
    assert loop.train(dataclasses.replace(scaled, init_from=str(folder)), tmp_path / "scaled") == 0
    assert (
        "is another one (model.rope_base: 10000.0 -> 50000.0; model.s_z.init: 1.0 -> 2.0)"
        in capsys.readouterr().out
    )
    # Read at the first start alone.
    gone = dataclasses.replace(config, init_from=str(tmp_path / "gone"))
    assert loop.train(gone, tmp_path / "new4") == 0
    for init_from, change, message in [
        (tmp_path / "gone", {}, "init_from=.*gone: no such folder; give a run's folder or"),
        (folder, {"model.width": 32}, "init_from=.* holds another model: its .*; set model"),
    ]:
        other = dataclasses.replace(small(**fields | change), init_from=str(init_from))
        with pytest.raises(ConfigError, match=message):
            loop.train(other, tmp_path / "other")
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
    monkeypatch.setattr(base, "fingerprint_of", lambda *_: "1234567890")
    other = dataclasses.replace(small(**fields), init_from=str(folder))
    with pytest.raises(ConfigError, match=r"init_from=.*: data.tokenizer .* is not the one"):
        loop.train(other, tmp_path / "other")


@pytest.mark.slow
def test_initial_norms_are_kept_on_resume_and_are_those_of_weights_taken(
    small, tmp_path, monkeypatch
):
    """Frobenius norms, which differ between seeds."""

    def with_norms(config):
        schedule = make_schedule(config.optimizer, config.train.steps)
        axes = jax.tree.map(
            lambda p: tuple(range(len(p.axes))) if p.is_matrix else None, param_tree(config.model)
        )
        steps = scale_by_adam(0.9, 0.95, 1e-8), scale_by_learning_rate(schedule)
        return optax.chain(*steps, keep_params_on_sphere(axes, "initial")), schedule

    monkeypatch.setattr(layout, "make_optimizer", with_norms)
    monkeypatch.setattr(setup, "make_optimizer", with_norms)

    def norms(state):
        named = ocp.tree.to_flat_dict(state["opt_state"][2]["norms"], sep="/")
        return {name: float(x.squeeze()) for name, x in named.items() if np.size(x)}

    def frobenius(state):
        named = ocp.tree.to_flat_dict(state["params"], sep="/")
        return {name: float(np.linalg.norm(named[name])) for name in norms(state)}

    fields = {"model.kind": "gpt", "train.steps": 4, "checkpoint.every": 2, "checkpoint.keep": 9}
    first, config = tmp_path / "first", small(**fields)
    assert loop.train(config, first) == 0
    before, whole = arrays(first, 2), arrays(first, 4)
    assert len(norms(whole)) > 5
    for state in (before, whole):
        assert norms(state) == norms(whole)
        assert frobenius(state) == pytest.approx(norms(whole), rel=1e-5)
    shutil.rmtree(first / "checkpoints/4")
    assert loop.train(config, first) == 0
    for a, b in zip(*map(jax.tree.leaves, (whole, arrays(first, 4))), strict=True):
        np.testing.assert_array_equal(a, b)
    other = small(**fields | {"train.seed": 7, "train.steps": 1})
    assert loop.train(dataclasses.replace(other, init_from=str(first)), tmp_path / "other") == 0
    state = arrays(tmp_path / "other", 1)
    assert frobenius(state) == pytest.approx(norms(state), rel=1e-5)
    assert norms(state) == pytest.approx(norms(whole), rel=1e-5)


# --------------------------------------------------------------------------- while a run goes on


@pytest.mark.slow
def test_the_best_checkpoints_stay(small, tmp_path, monkeypatch):
    """An evaluation that makes the list is saved, wherever the others are."""
    losses = iter([3.0, 1.0, 2.0, 0.5, 4.0, 4.0])
    found = {"perplexity": 1.0, "tokens": 1.0, "bits_per_byte": 1.0}
    monkeypatch.setattr(evaluator, "evaluate", lambda *args: {"loss": next(losses), **found})
    config = small(**{"eval.every": 2, "checkpoint.every": 5, "checkpoint.keep": 1,
                      "checkpoint.keep_best": 2})  # fmt: skip
    assert loop.train(config, tmp_path) == 0
    names = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert names == [4, 8, 12]


@pytest.mark.slow
def test_checkpoints_by_the_clock(small, tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 40))
    fake = SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter)
    monkeypatch.setattr(saver, "time", fake)
    config = small(**{"checkpoint.every": 100, "checkpoint.minutes": 1.0, "checkpoint.keep": 9,
                      "log.every": 1, "eval.every": 100})  # fmt: skip
    assert loop.train(config, tmp_path) == 0
    names = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert 3 <= len(names) <= 8
    assert names[-1] == 12


@pytest.mark.slow
def test_the_clock_is_looked_at_between_rows_of_metrics(small, tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 40))
    fake = SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter)
    monkeypatch.setattr(saver, "time", fake)
    config = small(**{"checkpoint.every": 100, "checkpoint.minutes": 1.0, "checkpoint.keep": 9,
                      "log.every": 100, "eval.every": 100})  # fmt: skip
    assert loop.train(config, tmp_path) == 0
    assert len(list((tmp_path / "checkpoints").iterdir())) >= 3


@pytest.mark.parametrize(("seconds", "minutes"), [(0.1, 10.0), (2.0, 30.0), (700.0, 10.0)])
def test_processes_look_at_the_clock_rarely_and_in_time(monkeypatch, seconds, minutes):
    """Several processes meet at each look: few looks, and no save later than a step or two."""
    now, looks = [0.0], []
    monkeypatch.setattr(saver.jax, "process_count", lambda: 2)
    monkeypatch.setattr(saver, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def of_first(fn):
        looks.append(now[0])
        return fn()

    monkeypatch.setattr(saver.distributed, "of_first", of_first)
    nothing = SimpleNamespace(save=lambda *_: None, is_best=lambda _: False)
    config = CheckpointConfig(every=10**9, minutes=minutes)
    due = saver.Saver(nothing, config, {}, lambda _: None, print)
    saves = []
    for step in range(1, 30_000 if seconds < 1 else 5_000):
        now[0] += seconds
        due.look_at_clock(step)
        if due.due(step):
            saves.append(now[0])
            due.save(step, None, {})
    gaps = np.diff([0.0, *saves])
    assert len(saves) > 3
    assert (gaps >= 60 * minutes - 1e-6).all()
    assert gaps.max() <= max(60 * minutes, seconds) + 2 * seconds
    assert len(looks) <= 20 * len(saves)


def full_disk(monkeypatch, step):
    """The save of one step fails as on a full disk."""
    real = saving.Save._commit

    def commit(self, measured):
        if self.step == step:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, measured)

    monkeypatch.setattr(saving.Save, "_commit", commit)


@pytest.mark.slow
def test_a_disk_that_is_full_during_a_save(small, tmp_path, monkeypatch, capsys):
    full_disk(monkeypatch, 8)
    config = small(**{"checkpoint.every": 4, "checkpoint.keep": 9})
    with pytest.raises(
        workdir.RunError,
        match=r"Checkpoint 8 could not be saved \(no space left on "
        r"device; .* the checkpoint needs .*\); the last whole one is 4; make room",
    ):
        loop.train(config, tmp_path / "stop")
    # The error came while the run went on: it may have come to its end.
    names = sorted(p.name for p in (tmp_path / "stop/checkpoints").iterdir())
    assert names in (["4"], ["12", "4"])
    shutil.rmtree(tmp_path / "stop/checkpoints/12", ignore_errors=True)
    goes_on = small(**{"checkpoint.every": 4, "checkpoint.keep": 9,
                       "checkpoint.on_error": "continue"})  # fmt: skip
    assert loop.train(goes_on, tmp_path / "stop") == 0
    assert "warning: Checkpoint 8 could not be saved" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "stop/checkpoints").iterdir()) == ["12", "4"]


@pytest.mark.slow
def test_a_disk_that_is_full_for_metrics(small, tmp_path):
    """A real limit on the size of files; the run ends in one line, and goes on without it."""
    script = f"""
import resource, signal, sys, threading
sys.path.insert(0, "tests")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from ngpt_jax.training import metrics
real = metrics.MetricWriter.write
def write(self, step, row):
    if step >= 6 and {{limited}}:
        [t.join() for t in threading.enumerate() if t.name.startswith("save")]
        size = self.path.stat().length
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, size + 20))
    real(self, step, row)
metrics.MetricWriter.write = write
from ngpt_jax.main import _main
from ngpt_jax.config import command
sys.argv = ["main", "--config=experiments/quickstart.py:debug", "--workdir={tmp_path}/run",
    "--config.train.steps=9", "--config.log.every=3", "--config.checkpoint.every=3",
    "--config.sample.tokens=0", "--config.model.width=16", "--config.model.heads=2"]
command.run_command(_main)
"""

    def start(limited):
        return subprocess.run(
            [sys.executable, "-c", script.replace("{limited}", str(limited))], cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True, capture_output=True, timeout=300,
        )  # fmt: skip

    done = start(True)
    assert done.returncode == 1, done.stderr
    assert "error: " in done.stderr
    assert "cannot be written: File too large; make room" in done.stderr.splitlines()[-1]
    done = start(False)
    assert done.returncode == 0, done.stderr
    steps = [r["step"] for r in rows(tmp_path / "run") if "train/loss" in r]
    assert steps == [3, 6, 9]


@pytest.mark.slow
def test_text_that_is_damaged_while_a_run_goes_on(small, tmp_path, monkeypatch):
    tokens = np.random.default_rng(0).integers(0, 257, 20_000)
    file = write_bin(tmp_path / "t.bin", tokens)
    real = Logger.write_row

    def write_row(self, step, params):
        real(self, step, params)
        write_bin(file, np.full(20_000, 300))

    monkeypatch.setattr(Logger, "write_row", write_row)
    config = small(**{"data.source": "bin", "data.paths": (str(file),), "data.prefetch": 1})
    with pytest.raises(workdir.RunError, match=r"t.bin' has the token id 300, but data.tokenizer"):
        loop.train(config, tmp_path / "run")


# --------------------------------------------------------------------------------------- sources


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tfds", "bin", "array_record", "mixture"])
def test_every_source_trains_the_debug_model(tmp_path, kind):
    """Through the command; two documents a window where the text is packed and masked."""
    tokens = np.random.default_rng(0).integers(0, 257, 40_000)
    write_bin(tmp_path / "t.bin", tokens, header=(20240520, 1))
    text = [f"document {i} of some\n".encode() * 9 for i in range(200)]
    write_array_record(tmp_path / "t.array_record", text)
    if kind in ("tfds", "mixture"):
        TinySet(data_dir=str(tmp_path / "tfds"), file_format="array_record").download_and_prepare()
    flags = {
        "tfds": [f"paths={tmp_path}/tfds", "tfds_eval_split=validation"],
        "bin": [f"paths={tmp_path}/t.bin"],
        "array_record": [f"paths={tmp_path}/t.array_record", "packing=best_fit",
                         "mask_documents=True"],
        "mixture": [
            "mixture.a.source=bin", f"mixture.a.paths={tmp_path}/t.bin", "mixture.a.weight=0.2",
            "mixture.b.source=array_record", f"mixture.b.paths={tmp_path}/t.array_record",
            "mixture.c.source=tfds", f"mixture.c.paths={tmp_path}/tfds",
        ],
    }[kind]  # fmt: skip
    done = subprocess.run(
        [
            sys.executable, "-m", "ngpt_jax.main", "--config=experiments/quickstart.py:debug",
            f"--workdir={tmp_path}/run", f"--config.data.source={kind}",
            "--config.sample.tokens=4", *(f"--config.data.{flag}" for flag in flags),
        ],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True, capture_output=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    train = [r["train/loss"] for r in rows(tmp_path / "run") if "train/loss" in r]
    assert train[-1] < train[0]
    assert all(map(math.isfinite, train))
    names = {key for r in rows(tmp_path / "run") for key in r if key.endswith("bits_per_byte")}
    sets = {"tfds": ["validation"], "mixture": ["a/held_out", "b/held_out", "c/held_out"]}
    assert names == {f"eval/{s}/bits_per_byte" for s in sets.get(kind, ["held_out"])}


# --------------------------------------------------------------------------------------- metrics


def test_metrics_of_several_starts_on_remote_storage(tmp_path, monkeypatch):
    """A file a start; rows past the restored step are dropped from the older ones."""
    from ngpt_jax.training import metrics

    monkeypatch.setattr(metrics, "is_remote", lambda path: True)
    from etils import epath

    folder = epath.Path(tmp_path)
    for start_step, steps in ((0, (1, 2, 3)), (2, (3, 4)), (4, (5,))):
        writer = MetricWriter(folder, start_step)
        for step in steps:
            writer.write(step, {"x": step, "eval/a/loss": 0.5 * step})
        writer.close()
    found = {f.name: [json.loads(r)["step"] for r in f.read_text().splitlines()]
             for f in sorted(Path(tmp_path).glob("metrics*.jsonl"))}  # fmt: skip
    assert found == {
        "metrics-0000.jsonl": [1, 2], "metrics-0001.jsonl": [3, 4], "metrics-0002.jsonl": [5],
    }  # fmt: skip
    assert MetricWriter(folder, 4).results == {"a": {"loss": 2.0}}
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_hides_what_was_written_past_the_restored_step(tmp_path):
    from etils import epath
    from tensorboardX.proto.event_pb2 import Event

    for start_step in (0, 1):
        writer = MetricWriter(epath.Path(tmp_path), start_step)
        writer.write(start_step + 1, {"loss": 2.0, "none": None, "bad": math.nan})
        writer.close()
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    assert len(files) == 2
    events = []
    data = files[1].read_bytes()
    while data:
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    assert events[1].session_log.status == 1  # START, from this step on
    assert events[1].step == 2
    assert [(v.tag, v.simple_value) for v in events[2].summary.value] == [("loss", 2.0)]
    assert re.search(r"tfevents", files[0].name)
