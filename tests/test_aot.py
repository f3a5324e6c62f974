"""The ahead-of-time tool: training's own program, TPUs that are not there, and its mistakes."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from ngpt_jax.aot import programs, search
from ngpt_jax.aot import report as report_lib
from ngpt_jax.aot.show import show
from ngpt_jax.aot.topologies import topology_devices
from ngpt_jax.config import ConfigError
from ngpt_jax.config.experiment import load_config
from ngpt_jax.data.tokenizers.load import with_tokenizer
from ngpt_jax.parallel.mesh import make_mesh
from ngpt_jax.training import layout, loop, throughput

ROOT = Path(__file__).parents[1]
libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu (Linux on x86-64)"
)


@pytest.mark.slow
def test_the_step_is_the_one_that_training_runs(tiny, tmp_path, monkeypatch):
    config = tiny(**{
        "model.vocab_size": 257, "sample.tokens": 0, "train.steps": 1, "eval.batches": 1,
        "data.source": "text", "data.paths": ("x.txt",),
    })  # fmt: skip
    (tmp_path / "x.txt").write_text("some text of a book\n" * 100)
    monkeypatch.chdir(tmp_path)
    texts, real = [], layout.lower_train_step

    def spy(*args):
        lowered = real(*args)
        texts.append(lowered.as_text())
        return lowered

    with monkeypatch.context() as patch:
        patch.setattr(layout, "lower_train_step", spy)
        assert loop.train(config, tmp_path / "run") == 0
    report = report_lib.report_of(config, jax.devices(), str(tmp_path / "lowered.txt"))
    assert report["fits"]
    assert [(tmp_path / "lowered.txt").read_text()] == texts
    assert "attention" in show(report)


@libtpu
@pytest.mark.slow
def test_a_small_model_compiles_for_a_tpu_with_splash(tiny):
    devices = topology_devices("v5e:2x2")
    config = tiny(**{
        "model.width": 128, "model.context": 256, "model.dtype": "bfloat16", "model.remat": "full",
        "model.vocab_size": 512, "model.loss_chunk": 128, "train.batch_size": 4,
    })  # fmt: skip
    report = report_lib.report_of(config, devices)
    assert report["attention"] == "splash"
    kernels = report["kernels"].values()
    assert sum(k["instructions"] for k in kernels) == 4  # forward twice, dq, dkv
    assert sum(k["count"] for k in kernels) == 8  # in each of two layers
    assert report["launches"] is None  # a TPU runs one program
    assert report["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1, "context": 1}
    assert 0 < report["peak_bytes"] < 2**28
    assert report["collectives"]["all-gather"]["bytes"] > 2 * 2 * 512 * 128  # two bf16 tables
    assert "of 16 GiB" in show(report)


@libtpu
def test_auto_that_finds_no_kernel_on_a_tpu_is_an_error(tiny):
    with pytest.raises(ConfigError, match="not splash: it needs head_dim 64"):
        report_lib.report_of(tiny(), topology_devices("v5e:2x2"))


@pytest.mark.parametrize(
    "name",
    ["v9:2x2", "v5e", "v5e:4by4", "h100", "h100:0", "h100:3x", "h100:2x2x2", "a10:1", "v5e:0x4"],
)
def test_unknown_topologies_are_refused(name):
    with pytest.raises(ConfigError, match="is not known; it is GENERATION:SHAPE with one of v4"):
        topology_devices(name)


@libtpu
def test_a_topology_that_libtpu_does_not_know_is_refused():
    with pytest.raises(ConfigError, match="v5e:3x5.: libtpu does not know it"):
        topology_devices("v5e:3x5")


def test_missing_libtpu_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="libtpu is not installed: pip install"):
        topology_devices("v5e:4x4")


@libtpu
def test_replicas_lie_across_slices(tiny):
    devices = topology_devices("v5e:2x2", slices=2)
    mesh = make_mesh(tiny(**{"mesh.data": 2, "train.batch_size": 8}), devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1, "context": 1}
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {1}]
    with pytest.raises(ConfigError, match="mesh.data = 1 must be a multiple of the 2 TPU slices"):
        make_mesh(tiny(**{"train.batch_size": 8}), devices)


def test_a_program_that_jaxlib_cannot_read_is_reported_as_far_as_known(tiny):
    config = tiny()
    mesh = make_mesh(config, jax.devices()[:1])
    config, _ = layout.for_mesh(config, mesh)
    step = programs.compile_step(config, mesh)

    class Unreadable:
        memory_analysis = step.compiled.memory_analysis
        cost_analysis = step.compiled.cost_analysis

        @staticmethod
        def as_text():
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    report = report_lib.analyze(config, mesh, step._replace(compiled=Unreadable))
    whole = report_lib.analyze(config, mesh, step)
    assert report["unreadable"] == "INTERNAL: RET_CHECK failure"
    assert report["collectives"] is None
    assert {k for k in whole if report[k] != whole[k]} == {
        "unreadable", "collectives", "collective_bytes", "bytes_accessed", "unknown_loops",
        "arithmetic_intensity", "custom_calls", "parts", "largest",
    }  # fmt: skip
    assert "not known: jaxlib cannot read" in show(report)


DEBUG = ("1b", "0_5b", "124m", "quickstart")


@libtpu
@pytest.mark.parametrize("name", DEBUG)
def test_debug_variants_are_taken_as_they_are(name, monkeypatch):
    taken = []

    def compile_step(config, mesh, lowered_to):
        taken.append(config.model.attention)
        raise ConfigError("enough")

    monkeypatch.setattr(report_lib, "compile_step", compile_step)
    config, _ = with_tokenizer(
        load_config(f"{ROOT}/experiments/{name}.py:debug", [("data.tokenizer", "byte")])
    )
    with pytest.raises(ConfigError, match="enough"):
        report_lib.report_of(config, topology_devices("v5e:2x2"))
    assert taken == ["xla"]


@pytest.mark.slow
def test_the_bytes_of_a_token_are_told_by_part():
    done = subprocess.run(
        [sys.executable, "-m", "ngpt_jax.tools.aot", "--topology=local", "--program=decode",
         "--config=experiments/quickstart.py:debug"],
        cwd=ROOT, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = [
        line for line in done.stdout.splitlines() if line.strip().startswith("bytes by part")
    ]
    assert all(part in done.stdout for part in ("attention", "MLP", "residual steps")), line


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["local", pytest.param("v5e:2x2", marks=libtpu)])
@pytest.mark.parametrize("name", DEBUG)
def test_the_command_on_debug_variants(name, topology):
    done = subprocess.run(
        [sys.executable, "-m", "ngpt_jax.tools.aot", f"--topology={topology}",
         f"--config=experiments/{name}.py:debug"],
        cwd=ROOT, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "memory a device" in done.stdout and " 0 ms" not in done.stdout
    assert "tokens/s" not in done.stdout  # of a model so small a bound tells nothing


def test_times_have_a_unit_that_fits_and_tiny_steps_no_estimate(tiny, monkeypatch):
    config = tiny()
    mesh = make_mesh(config, jax.devices()[:1])
    config, _ = layout.for_mesh(config, mesh)
    chip = throughput.Chip("cpu", 1e15, 16, 1e12, 1e12)
    monkeypatch.setattr(throughput, "chip_of", lambda device: chip)
    report = report_lib.analyze(config, mesh, programs.compile_step(config, mesh))
    shown = show(report)
    assert "µs" in shown and "roofline" in shown and "none: the model is so small" in shown
    assert "tokens/s" not in shown and "MFU" not in shown
    times = {"compute": 12.3456, "memory": 0.5, "network": 0.0012345, "others": 3.45e-8}
    shown = show(report | {"least_seconds": times, "step_seconds_bound": 12.3456, "mfu_bounds": {}})
    assert "compute 12.3 s, memory 500 ms, network 1.23 ms, others 0.0345 µs" in shown
    assert "at least 12.3 s a step" in shown and "tokens/s, MFU at most" in shown


def test_a_step_that_does_not_fit_is_told_as_far_as_known(tiny):
    config = tiny()
    facts = report_lib.run_facts(config, make_mesh(config, jax.devices()[:1])) | {"fits": False}
    unknown = show(facts | {"peak_bytes": None, "chip_bytes": None})
    assert unknown.endswith("DOES NOT FIT")
    known = show(facts | {"peak_bytes": 3 * 2**34, "chip_bytes": 2**34})
    assert known.endswith("DOES NOT FIT: needs 48.00 GiB a device, the device has 16 GiB")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--search", "--windows=4"], "--search finds --windows itself"),
        (["--search", "--lowered=x.txt"], "leave out --windows and --lowered"),
        (["--topology=local", "--slices=2"], "--slices is for TPU topologies"),
        (["--json=nowhere/x.json"], "--json=nowhere/x.json: there is no folder nowhere"),
        (["--topology=h100:8", "--slices=2"], "--slices is for TPU topologies"),
        (["--program=decode", "--search"], "--search and --windows are for training"),
        (["--rows=4"], "--rows, --prompt and --tokens are for --program=prefill or decode"),
        (["--program=decode", "--tokens=64"], "--tokens=64 leaves no room for a prompt"),
        (["--topology=v9:4"], "--topology = 'v9:4' is not known"),
        ([], "Give an experiment"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(flags, message):
    config = [f"--config={ROOT}/experiments/1b.py:debug,stdlib"] if flags else []
    done = subprocess.run(
        [sys.executable, "-m", "ngpt_jax.tools.aot", *config, *flags],
        cwd=ROOT, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


@pytest.mark.parametrize(("kind", "memory", "share"), [
    ("TPU v5e", 16, 0.97), ("NVIDIA H100 80GB HBM3", 79.1, 0.75),
])  # fmt: skip
def test_the_search_ends_at_the_most_that_leaves_some_memory(
    kind, memory, share, tiny, monkeypatch
):
    platform = "tpu" if "TPU" in kind else "gpu"
    device = SimpleNamespace(device_kind=kind, platform=platform)
    limit = share * memory * report_lib.GIB

    def report_of(config, devices):
        windows = config.train.batch_size
        return {
            "fits": windows <= 21,
            "peak_bytes": (0.05 + windows / 20.01) * limit / 1.05,
            "n": windows,
        }

    monkeypatch.delenv(throughput.FRACTION, raising=False)
    monkeypatch.setattr(report_lib, "report_of", report_of)
    assert search.search(tiny(), [device])["n"] == 20


@pytest.mark.parametrize(
    "peak",
    [
        lambda n: n / 33.5,
        lambda n: n / 33.5 if n < 34 else 1.2 - n / 1000,  # falls where XLA computes again
        lambda n: n / 33.5 if n < 34 else None,  # the compiler does not say
        lambda n: 0.5 + n / 67,
        lambda n: (n / 33.5) ** 2,
    ],
)
@pytest.mark.parametrize("first", [1, 20, 41, 60])
def test_the_search_finds_the_most_whatever_does_not_fit(peak, first, tiny, monkeypatch):
    device = SimpleNamespace(device_kind="TPU v6 lite", platform="tpu")
    limit = throughput.usable_share("tpu") * 32 * report_lib.GIB

    def report_of(config, devices):
        n = config.train.batch_size
        bytes_ = None if peak(n) is None else peak(n) * limit
        return {"fits": bytes_ is not None and bytes_ <= limit, "peak_bytes": bytes_, "n": n}

    monkeypatch.setattr(report_lib, "report_of", report_of)
    monkeypatch.setattr(search.choices, "estimate", lambda *_: (0.01 * limit, 0.99 * limit / first))
    assert search.search(tiny(), [device])["n"] == 33


def test_the_share_of_a_gpu_is_the_one_that_jax_will_take(monkeypatch):
    monkeypatch.setenv(throughput.FRACTION, "0.95")
    assert (throughput.usable_share("gpu"), throughput.usable_share("tpu")) == (0.95, 0.97)
    monkeypatch.setenv(throughput.FRACTION, "much")
    with pytest.raises(ConfigError, match="must be a number, got 'much'"):
        throughput.usable_share("gpu")
