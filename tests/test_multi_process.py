"""Real processes with simulated CPU devices: one program, one result, on any of them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

from ngpt_jax import files
from ngpt_jax.checkpoint.checkpoints import Checkpoints
from ngpt_jax.config import ConfigError, from_config_dict
from ngpt_jax.optim.recipes import make_optimizer
from ngpt_jax.parallel import distributed
from ngpt_jax.parallel.mesh import make_mesh
from ngpt_jax.training import layout, workdir

ROOT = Path(__file__).parents[1]
STEPS = 20
_started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_runs_on():
    """Whatever a test finds, none of its processes outlives it."""
    yield
    while _started:
        _started.pop().kill()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(processes, devices, workdir, book, *arguments, program=("-m", "ngpt_jax.main")):
    """The debug model in float64 on ``processes`` of ``devices`` each."""
    command = [
        sys.executable, *program, f"--config={ROOT}/experiments/1b.py:debug,stdlib",
        f"--workdir={workdir}", "--config.data.source=text", f"--config.data.paths={book}",
        "--config.model.dtype=float64", "--config.model.param_dtype=float64",
        f"--config.train.steps={STEPS}", "--config.log.every=1", "--config.eval.every=10",
        "--config.checkpoint.every=10", "--config.sample.tokens=4", *arguments,
    ]  # fmt: skip
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0"
        f" --xla_force_host_platform_device_count={devices}",
    }
    address = f"127.0.0.1:{free_port()}"
    running = []
    for i in range(processes):
        several = [
            f"--coordinator_address={address}", f"--num_processes={processes}", f"--process_id={i}"
        ]  # fmt: skip
        running.append(
            subprocess.Popen(
                command + (several if processes > 1 else []),
                cwd=ROOT,
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    _started.extend(running)
    return running


def finish(running, code=0):
    outputs = []
    for process in running:
        out, err = process.communicate(timeout=300)
        outputs.append(out)
        assert process.returncode == code, err + out
    return outputs


def wait_for_steps(workdir):
    metrics, deadline = workdir / "metrics.jsonl", time.time() + 120
    while not (metrics.exists() and metrics.read_text()):
        assert time.time() < deadline
        time.sleep(0.1)


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["train/loss"] for r in rows if "train/loss" in r}


def final_state(workdir, config):
    """Parameters and moments on one device, whoever wrote them."""
    mesh = make_mesh(config)
    like = layout.abstract_state(config, make_optimizer(config)[0], mesh)
    checkpoints = Checkpoints(workdir, config.checkpoint)
    assert checkpoints.latest_step() == STEPS
    state, _ = checkpoints.restore(like)
    checkpoints.close()
    return state


def assert_same_run(a, b):
    """Losses, parameters and moments agree to 1e-9."""
    la, lb = losses(a), losses(b)
    assert sorted(la) == list(range(1, STEPS + 1)) == sorted(lb)
    assert max(abs(la[i] - lb[i]) for i in la) < 1e-9
    config = from_config_dict(json.loads((a / "config.json").read_text()))
    for x, y in zip(*(jax.tree.leaves(final_state(w, config)) for w in (a, b)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, atol=1e-9, rtol=0)


@pytest.fixture(scope="module")
def runs(book, tmp_path_factory):
    """Workdirs of one device, of 2 processes x 4 devices, and of a tensor axis across 4."""
    base = tmp_path_factory.mktemp("runs")
    finish(start(1, 1, base / "one", book))
    out = finish(start(2, 4, base / "two", book))
    assert "mesh: fsdp 8 over 8 x cpu, 2 processes" in out[0]
    assert "step" not in out[1]  # only the first process tells
    finish(start(4, 2, base / "tensor", book, "--config.mesh.fsdp=2", "--config.mesh.tensor=4"))
    return base


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "tensor"])
def test_processes_train_what_one_device_trains(x64, runs, name):
    assert_same_run(runs / "one", runs / name)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(1, 8), (4, 2)])
def test_a_run_goes_on_with_other_processes(x64, runs, book, tmp_path, processes, devices):
    shutil.copytree(runs / "two", tmp_path / "run")
    shutil.rmtree(tmp_path / f"run/checkpoints/{STEPS}")
    mesh = ["--config.mesh.data=2", "--config.mesh.tensor=2"] if processes == 4 else []
    out = finish(start(processes, devices, tmp_path / "run", book, *mesh))
    assert "resumed from step 10" in out[0]
    assert_same_run(runs / "one", tmp_path / "run")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(book, tmp_path):
    long = [
        "--config.train.steps=5000",
        "--config.checkpoint.every=5000",
        "--config.eval.every=5000",
    ]
    running = start(2, 1, tmp_path / "run", book, *long)
    wait_for_steps(tmp_path / "run")
    running[1].send_signal(signal.SIGTERM)
    out = finish(running, code=75)
    step = int(out[0].split("saved step ")[1].split(";")[0])
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == [str(step)]
    assert max(losses(tmp_path / "run")) == step


@pytest.mark.slow
def test_a_full_disk_on_the_first_process_ends_all(book, tmp_path):
    code = f"""
import sys; sys.path.insert(0, "{ROOT}")
from ngpt_jax.training import metrics
def write(self, step, row): raise OSError(28, "No space left on device", "metrics.jsonl")
metrics.MetricWriter.write = write
from ngpt_jax import main
from ngpt_jax.config import command
command.run_command(main._main)
"""
    (tmp_path / "program.py").write_text(code)
    running = start(2, 1, tmp_path / "run", book, program=[str(tmp_path / "program.py")])
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [1, 1], outputs
    for _, err in outputs:
        assert "metrics.jsonl cannot be written: No space left on device; make room" in err
        assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "text.txt").unlink(), "text.txt"),
        (lambda folder: (folder / "val.txt").write_text("new"), "held_out of process 1 is not"),
    ],
)
def test_what_is_wrong_with_one_process_ends_all(book, tmp_path, change, message):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        shutil.copy(book, folder / "text.txt")
        (folder / "val.txt").write_text("some other text\n" * 300)
    change(folders[1])
    common = [
        sys.executable, "-m", "ngpt_jax.main", f"--config={ROOT}/experiments/1b.py:debug,stdlib",
        f"--workdir={tmp_path}/run", "--config.data.source=text", "--config.data.paths=text.txt",
        "--config.data.eval_paths=val=val.txt", "--config.mesh.fsdp=1", "--config.mesh.data=-1",
        f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2",
    ]  # fmt: skip
    running = [
        subprocess.Popen(
            [*common, f"--process_id={i}"],
            cwd=folder, env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i, folder in enumerate(folders)
    ]  # fmt: skip
    errors = [p.communicate(timeout=120)[1] for p in running]
    assert [p.returncode for p in running] == [2, 2], errors
    for text in errors:
        assert message in text.splitlines()[-1]


LONG = "x" * 5000


@pytest.mark.parametrize(
    ("first", "own", "name"),
    [
        ({"a": 1, "text": LONG + "1"}, {"a": 1, "text": LONG + "2"}, "text"),
        ({f"fact{i}": i for i in range(300)}, {f"fact{i}": i + i // 299 for i in range(300)},
         "fact299"),
        ({"a": LONG, "b": "two\nlines"}, {"a": LONG, "b": "two\nother lines"}, "b"),
        ({"a": 1, "new": 2}, {"a": 1}, "new"),
    ],
)  # fmt: skip
def test_the_fact_that_differs_is_named(monkeypatch, first, own, name):
    told = []
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.jax, "process_index", lambda: 1)
    monkeypatch.setattr(distributed, "together", lambda fn, error: fn())
    monkeypatch.setattr(distributed, "of_first", lambda fn: told.append(fn()) or told[-1])
    distributed.check_same(**first)
    monkeypatch.setattr(distributed, "of_first", lambda fn: told[0])
    distributed.check_same(**first)
    with pytest.raises(ConfigError, match=f"^{name} of process 1 is not that of process 0"):
        distributed.check_same(**own)


@pytest.mark.slow
def test_a_second_start_in_the_workdir_of_two_processes_is_refused(book, tmp_path):
    impatient = f"""
import sys; sys.path.insert(0, "{ROOT}")
from ngpt_jax import main
from ngpt_jax.config import command
from ngpt_jax.training import workdir
workdir.lock_workdir.__defaults__ = (1.0, None)
command.run_command(main._main)
"""
    (tmp_path / "program.py").write_text(impatient)
    long = ["--config.train.steps=100000", "--config.eval.every=100000",
            "--config.checkpoint.every=100000"]  # fmt: skip
    running = start(2, 1, tmp_path / "run", book, *long)
    wait_for_steps(tmp_path / "run")
    second = start(2, 1, tmp_path / "run", book, *long, program=[str(tmp_path / "program.py")])
    errors = [process.communicate(timeout=120)[1] for process in second]
    assert sorted(process.returncode for process in second) == [1, 2], errors
    assert all("is in use by another process" in err for err in errors)
    running[0].send_signal(signal.SIGUSR1)
    assert "SIGUSR1 received: stopping" in finish(running, code=75)[0]


@pytest.mark.slow
def test_the_lock_ends_with_a_run_that_is_killed(book, tmp_path):
    (process,) = start(1, 1, tmp_path / "run", book, "--config.data.workers=2",
                       "--config.train.steps=100000")  # fmt: skip
    wait_for_steps(tmp_path / "run")
    with pytest.raises(BlockingIOError):
        files.lock(tmp_path / "run/.lock", lambda: False)
    process.kill()
    process.wait()
    end = time.time() + 5
    files.lock(tmp_path / "run/.lock", lambda: time.time() < end).close()


def test_a_workdir_that_others_do_not_see_is_refused(tmp_path, monkeypatch):
    (tmp_path / ".lock").write_text("what process 0 wrote")
    monkeypatch.setattr(workdir.jax, "process_count", lambda: 2)
    monkeypatch.setattr(workdir.distributed, "together", lambda fn, error: fn())
    told = str(zlib.crc32(b"what process 0 wrote"))
    monkeypatch.setattr(workdir.distributed, "of_first", lambda fn: told)
    workdir.check_shared(tmp_path, patience=0)
    (tmp_path / ".lock").write_text("what another wrote")
    with pytest.raises(ConfigError, match="is not the folder of process 0; give one on storage"):
        workdir.check_shared(tmp_path, patience=0)


@pytest.mark.parametrize(
    ("variables", "gpus"),
    [
        ({}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, [0, 1, 2, 3]),
        ({"SLURM_TASKS_PER_NODE": "1,1", "CUDA_VISIBLE_DEVICES": "4,5"}, [0, 1]),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2),2"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, [0, 1, 2, 3]),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, None),
    ],
)
def test_a_process_alone_on_its_host_takes_all_its_gpus(monkeypatch, variables, gpus):
    for name in ("SLURM_TASKS_PER_NODE", "CUDA_VISIBLE_DEVICES", *variables):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [f"nvidia{i}" for i in range(4)])
    assert distributed._all_gpus() == gpus


def test_a_coordinator_that_is_not_there_is_told_in_time():
    start_time = time.time()
    done = subprocess.run(
        [
            sys.executable, "-m", "ngpt_jax.main",
            f"--config={ROOT}/experiments/1b.py:debug,stdlib",
            f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2",
            "--process_id=1", "--start_timeout=3",
        ],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "error: the coordinator at 127.0.0.1" in done.stderr
    assert "within 3 s; start the same program on all workers" in done.stderr
    assert time.time() - start_time < 40


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=2"], "Give all of --coordinator_address=HOST:PORT"),
        (
            ["--coordinator_address=here", "--num_processes=2", "--process_id=0"],
            "--coordinator_address must be HOST:PORT, got 'here'",
        ),
        (
            ["--coordinator_address=a:1", "--num_processes=2", "--process_id=2"],
            "--process_id = 2 must be at least 0 and below --num_processes = 2",
        ),
    ],
)
def test_wrong_facts_of_processes_are_refused(flags, message):
    given = dict(f.removeprefix("--").split("=") for f in flags)
    numbers = {k: int(v) for k, v in given.items() if k != "coordinator_address"}
    with pytest.raises(ConfigError, match=message):
        distributed.initialize(given.get("coordinator_address"), **numbers)
