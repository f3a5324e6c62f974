"""Whole runs: exact resume, stopping, metrics, evaluation, and workdirs."""

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_packing import stream_of

from ngpt_jax.config import ConfigError
from ngpt_jax.data import pipeline
from ngpt_jax.data.corpus import EvalSet, load_corpus
from ngpt_jax.data.tokenizers.base import ByteTokenizer
from ngpt_jax.data.tokenizers.load import load_tokenizer
from ngpt_jax.model.params import num_params
from ngpt_jax.model.transformer import Transformer, init_params
from ngpt_jax.parallel.mesh import BatchPlacer, make_mesh
from ngpt_jax.terminal import format_duration
from ngpt_jax.training import dry_run, evaluator, layout, loop, step, throughput
from ngpt_jax.training.logger import Logger
from ngpt_jax.training.metrics import MetricWriter
from ngpt_jax.training.stop_signal import EXIT_RESUME
from ngpt_jax.training.workdir import Diverged, RunError

ROOT = Path(__file__).parents[1]


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def numbers(workdir):
    """What a run computed, without what a clock showed."""
    clocks = ("seconds", "tokens_per_second")
    return [{k: v for k, v in row.items() if not k.endswith(clocks)} for row in rows(workdir)]


def final_state(workdir):
    with ocp.CheckpointManager(workdir / "checkpoints", item_names=("state", "progress")) as m:
        restored = m.restore(
            m.latest_step(),
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(), progress=ocp.args.JsonRestore()
            ),
        )
    return restored["state"], restored["progress"]


def stop_at(monkeypatch, step):
    """Sends this process SIGTERM in the middle of the step after ``step``."""
    real = Logger.add

    def stopping(self, step_, metrics):
        real(self, step_, metrics)
        if step_ == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Logger, "add", stopping)


def stop_in_evaluation(monkeypatch):
    """Sends this process SIGTERM as an evaluation begins."""
    real = evaluator.evaluate

    def stopping(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(evaluator, "evaluate", stopping)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_a_stopped_run_goes_on_bit_for_bit(small, tmp_path, monkeypatch, kind):
    config = small(**{"model.kind": kind})
    assert loop.train(config, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert loop.train(config, tmp_path / "cut") == EXIT_RESUME
    assert rows(tmp_path / "cut")[-1]["step"] == 6
    assert loop.train(config, tmp_path / "cut") == 0

    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    (a, pa), (b, pb) = final_state(tmp_path / "whole"), final_state(tmp_path / "cut")
    assert pa["position"] == pb["position"] == 12 * config.train.batch_size
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.array_equal(x, y)


@pytest.mark.slow
def test_another_held_out_text_is_evaluated_anew(small, tmp_path, book, capsys):
    """A finished run with another text under the same name; a stop in between changes nothing."""
    (tmp_path / "a.txt").write_text("a lazy dog\n" * 40)
    (tmp_path / "b.txt").write_text("zq zq 0123456789\n" * 40)

    def config(name):
        paths = (f"val={tmp_path / name}",)
        return small(**{"train.steps": 3, "checkpoint.every": 3, "checkpoint.keep_best": 1,
                        "data.eval_paths": paths})  # fmt: skip

    def evaluated():
        return [row["eval/val/loss"] for row in rows(tmp_path / "run") if "eval/val/loss" in row]

    assert loop.train(config("a.txt"), tmp_path / "run") == 0
    (first,) = evaluated()
    with pytest.MonkeyPatch.context() as patch:
        stop_in_evaluation(patch)
        assert loop.train(config("b.txt"), tmp_path / "run") == EXIT_RESUME
    told = "the held-out text is not the one before; checkpoint.keep_best compares losses of both"
    assert "".join(capsys.readouterr()).count(told) == 1
    for _ in range(2):  # the second time it is known
        assert loop.train(config("b.txt"), tmp_path / "run") == 0
        (second,) = evaluated()
        assert second > first + 0.01
        out = "".join(capsys.readouterr())
        assert f"held-out val: {second:.4f} nats" in out and told not in out


@pytest.mark.slow
def test_seconds_and_tokens_are_of_all_starts(small, tmp_path, monkeypatch):
    """Steps between a row and a stop count; tokens are those that were read."""
    with monkeypatch.context() as patch:
        stop_at(patch, 5)  # rows after 3 and 6
        assert loop.train(small(), tmp_path) == EXIT_RESUME
    logged = [row["train/seconds"] for row in rows(tmp_path) if "train/seconds" in row][-1]
    _, progress = final_state(tmp_path)
    saved = float(progress["seconds"])
    assert saved > logged
    more = small(**{"train.batch_size": 8})
    assert loop.train(more, tmp_path, allow_schedule_change=True) == 0
    last = [row for row in rows(tmp_path) if "train/tokens" in row][-1]
    assert last["train/seconds"] > saved
    before = 5 * small().train.batch_size
    assert last["train/tokens"] == (before + 7 * 8) * more.model.context


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying"), 1,
         "error: the device has too little memory; set model.remat=full"),
        (RunError("the disk is full"), 1, "error: the disk is full"),
        (Diverged("step 3"), 3, "error: step 3"),
        (ConfigError("a field"), 2, "error: a field"),
        (KeyboardInterrupt(), 130, ""),
    ],
)  # fmt: skip
def test_an_error_of_a_run_is_one_line(error, code, told, capsys):
    def train():
        raise error

    assert loop.exit_code(train) == code
    said = capsys.readouterr().err
    assert said.startswith(told) and said.count("\n") == bool(told)


def test_an_error_that_nobody_expects_is_not_hidden():
    for fault in (
        "INTERNAL: a fault",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem",
    ):

        def train(fault=fault):
            raise jax.errors.JaxRuntimeError(fault)

        with pytest.raises(jax.errors.JaxRuntimeError):
            loop.exit_code(train)


@pytest.mark.slow
def test_a_context_without_room_for_a_sample(small, tmp_path):
    config = small(**{"train.steps": 1, "sample.tokens": 5, "model.context": 1})
    assert loop.train(config, tmp_path) == 0


@pytest.mark.slow
def test_a_step_that_does_not_compile_leaves_no_folder(small, tmp_path, monkeypatch):
    def lower(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory")

    monkeypatch.setattr(layout, "lower_train_step", lower)
    with pytest.raises(jax.errors.JaxRuntimeError):
        loop.train(small(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_killed_between_checkpoints_goes_on_from_the_last(small, tmp_path, monkeypatch):
    config = small()
    assert loop.train(config, tmp_path / "whole") == 0

    def crash(self, step, params):
        if step == 9:
            raise OSError("power cut")
        return real(self, step, params)

    real = Logger.write_row
    with monkeypatch.context() as patch:
        patch.setattr(Logger, "write_row", crash)
        with pytest.raises(OSError, match="power cut"):
            loop.train(config, tmp_path / "cut")
    with (tmp_path / "cut/metrics.jsonl").open("a") as f:
        f.write('{"step": 9, "train/lo')  # the half line of a crash
    assert loop.train(config, tmp_path / "cut") == 0
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


@pytest.mark.slow
def test_a_stop_in_the_last_evaluation_is_made_up_for(small, tmp_path, monkeypatch, capsys):
    config = small(**{"train.steps": 3, "checkpoint.every": 3})
    with monkeypatch.context() as patch:
        stop_in_evaluation(patch)
        assert loop.train(config, tmp_path) == EXIT_RESUME
    for _ in range(2):
        assert loop.train(config, tmp_path) == 0
        assert "bits/byte" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path) if "eval/held_out/loss" in row] == [3]


@pytest.mark.slow
def test_metrics_and_the_files_of_a_run(small, tmp_path, capsys):
    config = small(**{"sample.tokens": 5, "sample.prompt": "the "})
    loop.train(config, tmp_path)
    train_rows = [r for r in rows(tmp_path) if "train/loss" in r]
    assert [r["step"] for r in train_rows] == [3, 6, 9, 12]
    names = """loss grad_norm learning_rate tokens tokens_per_second data_wait_seconds seconds
        sphere_deviation mean_alpha_a mean_alpha_m mean_s_qk mean_s_u mean_s_v mean_s_z""".split()
    for row in train_rows:
        assert {f"train/{name}" for name in names} <= set(row)
        assert row["train/sphere_deviation"] < 1e-6
    assert "train/compile_seconds" in train_rows[0]
    assert train_rows[-1]["train/loss"] < train_rows[0]["train/loss"]
    evals = [r for r in rows(tmp_path) if "eval/held_out/loss" in r]
    assert [r["step"] for r in evals] == [4, 8, 12]
    assert "eval/held_out/bits_per_byte" in evals[-1]
    assert "eval/held_out/bits_per_byte" not in evals[0]
    assert json.loads((tmp_path / "config.json").read_text())["model"]["width"] == 16
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert {"jax", "cpu", "cores", "python"} <= set(versions)
    assert all(re.fullmatch(r"[0-9a-f]{64}", versions[x]) for x in ("data", "held_out"))
    assert list((tmp_path / "tensorboard").iterdir())
    out = capsys.readouterr().out
    assert "bits/byte" in out
    assert "sample:\nthe " in out
    # A finished run is shown again, not trained again.
    loop.train(config, tmp_path)
    again = capsys.readouterr().out
    end = "\nheld-out text: "
    assert out.split(end)[1] == again.split(end)[1]
    assert "the end" in again


@pytest.mark.slow
def test_workdirs_of_other_runs_are_refused(small, tmp_path):
    config = small(**{"train.steps": 2, "eval.every": 10})
    loop.train(config, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"another run \(model.width: 16 -> 32;.* and 5 more\)"):
        loop.train(small(**{"train.steps": 2, "model.width": 32}), tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        loop.train(config, tmp_path / "file")
    other = tmp_path / "other.txt"
    other.write_text("another text\n" * 1000)
    with pytest.raises(ConfigError, match="not the one that this run began with"):
        loop.train(small(**{"train.steps": 2, "eval.every": 10, "data.paths": (str(other),)}),
                   tmp_path / "run")  # fmt: skip
    (tmp_path / "run/config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds checkpoints but no config.json"):
        loop.train(config, tmp_path / "run")
    (tmp_path / "mine").mkdir()
    mine = tmp_path / "mine/metrics.jsonl"
    mine.write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match=r"holds metrics.jsonl but no config.json"):
        loop.train(config, tmp_path / "mine")
    assert mine.read_text() == '{"step": 1}\n' and len([*mine.parent.iterdir()]) == 1
    (tmp_path / "run/config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        loop.train(config, tmp_path / "run")


def test_bad_data_is_refused_before_work_starts(small, tmp_path):
    for fields, message in [
        ({"model.vocab_size": 100}, "ids go up to 256, but model.vocab_size = 100"),
        ({"model.context": 100_000}, "model.context"),
        ({"data.paths": ("nowhere.txt",)}, "nowhere.txt"),
        ({"data.tokenizer": "nowhere.json"}, "nowhere.json"),
    ]:
        with pytest.raises(ConfigError, match=message):
            loop.train(small(**fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def poison(monkeypatch, config, steps):
    """Makes the loss of the batches of these steps NaN."""
    corpus = load_corpus(config.data, load_tokenizer(config.data), config.model.context)
    dataset = pipeline.train_dataset(corpus.train[""], config.data.seed)
    batches = pipeline.train_batches(dataset, config.train.batch_size, 0, 0, 1)
    sums = [int(next(batches)["inputs"].sum()) for _ in range(config.train.steps)]
    bad = jnp.array([sums[s - 1] for s in steps])
    real = step.summed_nats

    def summed_nats(model, params, batch, *rest):
        is_bad = jnp.isin(batch["inputs"].sum(), bad)
        return real(model, params, batch, *rest) * jnp.where(is_bad, jnp.nan, 1)

    monkeypatch.setattr(step, "summed_nats", summed_nats)


@pytest.mark.slow
def test_steps_whose_loss_is_not_finite_are_skipped_or_stop_the_run(small, tmp_path, monkeypatch):
    config = small(**{"train.max_skipped": 3, "checkpoint.every": 4})
    poison(monkeypatch, config, [2, 6, 7, 9])
    assert loop.train(config, tmp_path / "a") == 0
    train_rows = [r for r in rows(tmp_path / "a") if "train/skipped" in r]
    assert [r["train/skipped"] for r in train_rows] == [1, 2, 4, 4]
    assert all(math.isfinite(x) for r in train_rows for x in r.values())
    poison(monkeypatch, config, [6, 7, 8])
    with pytest.raises(RunError) as error:
        loop.train(config, tmp_path / "b")
    assert re.fullmatch(
        r"3 steps in a row were skipped, the last of them step 8 \(loss nan, gradient norm nan\);"
        r" the last checkpoint is step 4\. Try a lower optimizer.learning_rate, .*",
        str(error.value),
    )
    assert error.value.exit_code == 3  # by which compare knows that a run diverged
    # A skip before a stop counts after it.
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        assert loop.train(config, tmp_path / "c") == EXIT_RESUME
    with pytest.raises(RunError, match="last of them step 8"):
        loop.train(config, tmp_path / "c")


@pytest.mark.slow
def test_evaluation_counts_every_token_once_and_bytes_of_text(tiny):
    config = tiny(**{"model.vocab_size": 257, "eval.batch_size": 3})
    documents = ["naïve café", "x" * 133]
    t = ByteTokenizer()
    ids = [i for text in documents for i in [*t.encode(text), t.eod]]
    eval_set = EvalSet("set", stream_of(ids), len("".join(documents).encode()), t.eod)
    params = init_params(config.model, jax.random.key(0))
    placer = BatchPlacer(make_mesh(config), 3, 16)
    batches = pipeline.eval_batches(eval_set, 16, 3)
    result = evaluator.evaluate(config.model, params, batches, placer, len(ids), eval_set.num_bytes)
    tokens = np.array([t.eod, *ids])
    assert result["tokens"] == len(tokens) - 1 == 12 + 133 + 2
    nats = 0.0
    forward = jax.jit(Transformer(config.model).apply)
    for start in range(0, len(tokens) - 1, 16):
        window = np.zeros(17, int)
        real = tokens[start : start + 17]
        window[: len(real)] = real
        logits = forward({"params": params}, window[None, :-1])[0]
        picked = jax.nn.log_softmax(logits)[np.arange(16), window[1:]]
        nats -= float(np.sum(picked[: len(real) - 1]))
    assert result["loss"] == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / (12 + 133), rel=1e-5)


@pytest.mark.slow
def test_devices_share_a_batch(tmp_path):
    """Four devices give what one gives; a batch that does not divide is refused."""
    script = """
import sys, json, numpy as np, jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
jax.config.update("jax_enable_x64", True)
from pathlib import Path
from ngpt_jax import config as c
from ngpt_jax.training import loop
v = c.default_config()
v.model.update(layers=2, width=16, heads=2, context=16, dtype="float64", param_dtype="float64")
v.data.update(source="text", paths=(sys.argv[2],))
v.train.update(steps=3, batch_size=int(sys.argv[3]))
v.log.every = 1
v.sample.tokens = 0
loop.train(c.from_config_dict(v), Path(sys.argv[4]))
"""
    book = tmp_path / "book.txt"
    book.write_text("\n".join(f"line {i} of a book" for i in range(200)))

    def run(devices, batch_size, name):
        return subprocess.run(
            [sys.executable, "-c", script, devices, str(book), batch_size, str(tmp_path / name)],
            cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip

    for devices in ("1", "4"):
        done = run(devices, "8", f"run{devices}")
        assert done.returncode == 0, done.stderr
    losses = [
        [r["train/loss"] for r in rows(tmp_path / f"run{n}") if "train/loss" in r] for n in (1, 4)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-12)
    done = run("4", "6", "bad")
    assert (
        "train.batch_size = 6 is not divisible by the 4 devices of mesh.data * mesh.fsdp;"
        " the next that is: 8." in done.stderr
    )


@pytest.mark.slow
def test_the_command_trains_stops_on_ctrl_c_and_goes_on(tmp_path, book):
    command = [
        sys.executable, "-m", "ngpt_jax.main", f"--config={ROOT}/experiments/quickstart.py:debug",
        f"--workdir={tmp_path}/run", "--config.data.source=text", f"--config.data.paths={book}",
        "--config.train.steps=4000", "--config.model.width=16", "--config.log.every=1",
        "--config.eval.every=10000", "--config.checkpoint.every=10000", "--config.sample.tokens=8",
    ]  # fmt: skip
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.time() + 120
    while not (metrics.exists() and metrics.read_text()):
        assert time.time() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_RESUME, err
    assert "SIGINT: saved step" in out
    step = rows(tmp_path / "run")[-1]["step"]
    assert f"saved step {step};" in out
    assert err == ""

    (tmp_path / "run/config.json").write_text(
        (tmp_path / "run/config.json").read_text().replace('"steps": 4000', f'"steps": {step + 2}')
    )
    command = [a.replace("steps=4000", f"steps={step + 2}") for a in command]
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"resumed from step {step}" in done.stdout
    assert "sample:" in done.stdout
    assert [r["step"] for r in rows(tmp_path / "run") if "train/loss" in r] == [*range(1, step + 3)]


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_dry_run_tells_shapes_axes_and_memory(tiny, kind):
    config = tiny(**{"model.kind": kind, "model.vocab_size": 300})
    report, problem = dry_run.report(config)
    assert problem is None
    assert f"{num_params(config.model):,}" in report
    assert "300 of byte, padded to 384" in report
    line = next(row for row in report.splitlines() if row.startswith("layers/out_kernel"))
    assert "2 x 2 x 8 x 16" in line
    assert "layers, heads, head_dim, embed" in line
    assert ("embed (axis 3)" in line) == (kind == "ngpt")
    assert "memory per device" in report


@pytest.mark.parametrize("vocab", [1000, 50304])
def test_a_vocabulary_far_larger_than_the_tokenizer_s_is_told(small, vocab):
    report, _ = dry_run.report(small(**{"model.vocab_size": vocab}))
    (line,) = [row for row in report.splitlines() if row.startswith("warning: model.vocab")]
    assert f"{vocab - 257:,} rows are never used" in line
    # Rows of both tables, and a scale for each logit.
    assert f"{(2 * 16 + 1) * (vocab - 257):,} parameters cannot learn" in line
    report, _ = dry_run.report(small(**{"model.vocab_size": 384}))
    assert "warning" not in report


@pytest.mark.parametrize("steps", [30_000, 10**6])
def test_many_epochs_are_told(small, tmp_path, steps):
    """Of text from an estimate, of tokens from their number."""
    report, _ = dry_run.report(small(**{"train.steps": steps}))
    assert "about " in report
    assert "times; give more text, or fewer train.steps" in report
    assert "times; give" not in dry_run.report(small())[0]
    (np.arange(10_000) % 256).astype(np.uint16).tofile(tmp_path / "a.bin")
    tokens = {"data.source": "bin", "data.paths": (str(tmp_path / "a.bin"),), "data.held_out": 0.1,
              "data.token_dtype": "uint16", "data.cache": str(tmp_path / "cache")}  # fmt: skip
    report, _ = dry_run.report(small(**tokens, **{"train.steps": steps}))
    assert f"text               9,000 tokens, each read {steps * 64 / 9000:,.0f} times" in report
    assert (
        f"warning: the run reads its 9,000 tokens of text {steps * 64 / 9000:,.0f} times" in report
    )


@pytest.mark.slow
def test_a_run_warns_of_its_sizes(small, tmp_path, capsys):
    assert loop.train(small(**{"model.vocab_size": 2000}), tmp_path) == 0
    assert "warning: model.vocab_size = 2,000, but byte has 257 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(("limit", "end"), [(2**40, "fits, with "), (2**10, "does not fit")])
def test_dry_run_tells_whether_it_fits(tiny, limit, end):
    kind = {"device_kind": "some chip", "platform": "gpu"}
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": limit}, **kind)
    assert end in dry_run._fits(2**20, device)
    unknown = SimpleNamespace(memory_stats=lambda: None, **kind)
    assert "memory of some chip is not known" in dry_run._fits(2**20, unknown)
    report, _ = dry_run.report(tiny(**{"model.vocab_size": 300}))
    assert "left for activations" in report
    # The scores of XLA's attention are in memory as a whole.
    report, _ = dry_run.report(tiny(**{"model.vocab_size": 300, "train.batch_size": 2**30}))
    assert "does not fit" in report


def test_dry_run_tells_of_missing_files_beside_the_table(tiny):
    missing = {"data.tokenizer": "nowhere.json", "model.vocab_size": 300}
    report, problem = dry_run.report(tiny(**missing))
    assert "300 of nowhere.json" in report
    assert "nowhere.json" in str(problem)
    with pytest.raises(ConfigError, match="nowhere.json"):
        dry_run.report(tiny(**missing | {"model.vocab_size": None}))
    _, problem = dry_run.report(tiny(**{"data.source": "text", "data.paths": ("nowhere.txt",),
                                        "model.vocab_size": 300}))  # fmt: skip
    assert "nowhere.txt" in str(problem)


def test_flops_of_a_token(tiny):
    c = tiny(**{"model.kv_heads": 1, "model.vocab_size": 60}).model
    per_layer = 16 * 8 * (2 + 2 + 1 + 1) + 3 * 16 * 64
    scores = 2 * 2 * 8 * 16 / 2
    assert throughput.train_flops_per_token(c) == 6 * (2 * (per_layer + scores) + 60 * 16)
    assert throughput.mfu(c, 1e3) is None


def test_rows_past_the_restored_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "x": s}) + "\n" for s in (1, 2, 3, 4)))
    writer = MetricWriter(tmp_path, 2)
    writer.write(3, {"x": 30, "none": None})
    writer.close()
    assert rows(tmp_path) == [{"step": 1, "x": 1}, {"step": 2, "x": 2}, {"step": 3, "x": 30}]
    MetricWriter(tmp_path, 0).close()
    assert rows(tmp_path) == []
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []


def test_wandb_missing_is_told(tmp_path):
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(ConfigError, match="log.wandb_project needs wandb: pip install"):
        MetricWriter(tmp_path, 0, "x")


def test_durations():
    assert [format_duration(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]


@pytest.mark.slow
def test_a_window_of_steps_is_profiled(book, tmp_path):
    # A process of its own: a trace would ask libtpu, which other tests load, for TPUs.
    command = [
        sys.executable, "-m", "ngpt_jax.main", "--config=experiments/quickstart.py:debug",
        f"--workdir={tmp_path}/run", "--config.data.source=text", f"--config.data.paths={book}",
        "--config.train.steps=5", "--config.profile.first_step=2", "--config.profile.num_steps=2",
        "--config.sample.tokens=0",
    ]  # fmt: skip
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"trace of 2 steps -> {tmp_path}/run/profile" in done.stdout
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))


def test_a_step_that_hangs_dumps_all_stacks(small, tmp_path, monkeypatch, capfd):
    def hang(self, step, metrics):
        time.sleep(1.5)
        raise OSError("woke up")

    monkeypatch.setattr(Logger, "add", hang)
    with pytest.raises(OSError, match="woke up"):
        loop.train(small(**{"runtime.hang_seconds": 1}), tmp_path / "run")
    err = capfd.readouterr().err
    assert "Timeout (0:00:01)!" in err
    assert "in hang" in err
    time.sleep(1.1)  # the end of a run ends the watch
    assert "Timeout" not in capfd.readouterr().err


def test_the_memory_of_a_chip_is_that_of_the_table_or_what_jax_says(monkeypatch):
    def memory(kind, stats, platform="cuda"):
        device = SimpleNamespace(device_kind=kind, platform=platform, memory_stats=lambda: stats)
        return throughput.memory_of(device)

    monkeypatch.setenv(throughput.FRACTION, "0.5")
    assert memory("NVIDIA A100 80GB PCIe", None) == 79.2 * throughput.GIB
    assert memory("NVIDIA Something", {"bytes_limit": 12 * throughput.GIB}) == 24 * throughput.GIB
    assert memory("NVIDIA Something", None) is None
    assert memory("cpu", {"bytes_limit": 5}, "cpu") is None
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert memory("NVIDIA Something", {"bytes_limit": 12}) is None
