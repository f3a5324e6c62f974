"""Training and generation compiled for GPUs that are not there, and what the report tells of it."""

import functools
import importlib.util

import jax
import numpy as np
import pytest

from ngpt_jax.aot import programs, topologies
from ngpt_jax.aot.programs import Texts
from ngpt_jax.aot.report import report_of
from ngpt_jax.aot.show import show
from ngpt_jax.aot.topologies import topology_devices
from ngpt_jax.config import ConfigError
from ngpt_jax.decoding import folding, generation
from ngpt_jax.decoding.sampling import Sampling
from ngpt_jax.model.transformer import init_params
from ngpt_jax.parallel.mesh import device_mesh
from ngpt_jax.training import layout

cuda = pytest.mark.usefixtures("cuda_plugin")
TEXTS = Texts(rows=2, prompt=70, tokens=50)


@pytest.fixture
def model(tiny):
    """A model whose attention is XLA's, as cuDNN is not installed everywhere."""

    def make(**fields):
        return tiny(**{
            "model.dtype": "bfloat16", "model.attention": "xla", "model.width": 64,
            "model.context": 64, "model.remat": "full", "model.vocab_size": 512,
            "train.batch_size": 8, **fields,
        })  # fmt: skip

    return make


@cuda
def test_one_h100(model):
    report = report_of(model(), topology_devices("h100:1"))
    assert report["device_kind"] == "NVIDIA H100 80GB HBM3"
    assert report["platform"] == "gpu" and report["fits"] and report["collectives"] == {}
    state = report["argument_bytes"]
    assert state < report["peak_bytes"] <= 2 * state + report["temporary_bytes"]
    assert report["peak_bytes"] < 2**28 < report["chip_bytes"]
    assert report["launches"] > 50 and report["unknown_loops"] == []
    parts = report["parts"].values()
    total = sum(p["forward"] + p["backward"] for p in parts)
    assert total == pytest.approx(report["bytes_accessed"])
    assert {"attention", "MLP", "residual steps", "loss and output table", "optimizer"} <= {
        *report["parts"]
    }
    for name in ("attention", "MLP", "residual steps"):
        assert min(report["parts"][name]["backward"], report["parts"][name]["forward"]) > 0
    assert report["parts"]["MLP"]["backward"] > report["parts"]["MLP"]["forward"]
    other = report["parts"].get("other", {"forward": 0, "backward": 0})
    assert other["forward"] + other["backward"] < 0.1 * total
    assert report["largest"] == sorted(report["largest"], key=lambda i: -i["bytes"])
    shown = show(report)
    assert "autotuning off" in shown and "nothing ran" in shown
    assert "of 79.1 GiB" in shown


@cuda
def test_eight_h100_on_two_hosts(model):
    config = model(**{"mesh.data": 2, "train.batch_size": 16})
    report = report_of(config, topology_devices("h100:2x4"))
    assert (report["chips"], report["hosts"]) == (8, 2)
    assert report["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1, "context": 1}
    collectives = report["collectives"]
    assert {"all-gather", "all-reduce"} <= {*collectives}
    # Replicas lie across hosts: gradients go between them, and weights stay inside.
    assert collectives["all-gather"]["across"] == 0 < collectives["all-gather"]["bytes"]
    assert collectives["all-reduce"]["across"] > 0
    assert all(c["across"] <= c["bytes"] for c in collectives.values())
    assert "of them between hosts" in show(report)


@cuda
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_gpu_and_a_tpu_in_one_process(model):
    for name, platform in (("h100:8", "gpu"), ("v5e:2x2", "tpu")):
        report = report_of(model(), topology_devices(name))
        assert report["platform"] == platform and report["fits"]
        assert report["collectives"]["all-gather"]["across"] == 0
        assert report["collectives"]["all-gather"]["bytes"] > 0


@cuda
def test_the_step_for_a_gpu_is_lowered_by_the_function_that_training_calls(
    model, tmp_path, monkeypatch
):
    """With the choices of that device: on GPUs the products of q and k are one, for example."""
    texts, real = [], layout.lower_train_step

    def spy(config, mesh):
        lowered = real(config, mesh)
        texts.append(lowered.as_text())
        return lowered

    monkeypatch.setattr(layout, "lower_train_step", spy)
    report_of(model(), topology_devices("h100:1"), str(tmp_path / "lowered.txt"))
    assert texts == [(tmp_path / "lowered.txt").read_text()]
    assert "tensor<64x2x" in texts[0]  # the joined products


@cuda
def test_drawing_a_token_on_an_h100(model):
    report = report_of(model(), topology_devices("h100:1"), None, "decode", TEXTS)
    weights = 2 * (report["parameters"] - 64 * 512)  # bf16; the input table is looked up
    assert weights < report["bytes_accessed"] < 3 * weights + 2**20
    assert 30 < report["launches"] < 200
    assert report["outside_loop"]["tokens"] == 16 and report["outside_loop"]["bytes"] > 0
    assert len(report["unknown_loops"]) == 0  # the loop is counted as one pass of it
    assert "a token" in show(report) and "a cache of 192 slots" in show(report)


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_programs_of_generation_are_those_that_run(program, model, monkeypatch):
    config = model(**{"model.vocab_size": 60})
    mesh, lowered = device_mesh(config.mesh, jax.devices()[:1]), []

    def spied(real):
        def call(*args):
            lowered.append(real.lower(*args).as_text())
            return real(*args)

        return call

    for name in ("prefill", "decode"):
        monkeypatch.setattr(generation, name, spied(getattr(generation, name)))
    with jax.set_mesh(mesh):
        params = init_params(config.model, jax.random.key(0))
        weights = jax.jit(functools.partial(folding.for_inference, config.model))(params)
        prompts = [[1] * TEXTS.prompt] * TEXTS.rows
        how = Sampling(temperature=0.8)
        drawn = generation.generate(config.model, weights, prompts, TEXTS.tokens, how, 0)
        assert np.shape(next(drawn)[0]) == (2, 16)
    text = programs.compile_generation(program, config, mesh, TEXTS).lowered.as_text()
    assert text == lowered[program == "decode"]
    report = report_of(config, jax.devices()[:1], None, program, TEXTS)
    assert report["fits"] and report["program"] == program and "mfu_bound" not in report
    assert f"a {'token' if program == 'decode' else 'prefill'}" in show(report)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("cuDNN not found.", "cuDNN is not installed.*pip install nvidia-cudnn-cu13, or set"),
        ("INTERNAL: libdevice not found at ./libdevice.10.bc", "nvidia-cuda-nvcc.*pip install"),
        ("No PTX compilation provider is available.\nThese", "nvidia-cuda-nvcc.*pip install"),
    ],
)
def test_a_missing_part_is_told_in_one_line(error, message, model, monkeypatch):
    def lower_train_step(*args):
        raise jax.errors.JaxRuntimeError(error) if "INTERNAL" in error else RuntimeError(error)

    monkeypatch.setattr(layout, "lower_train_step", lower_train_step)
    with pytest.raises(ConfigError, match=message) as told:
        report_of(model(), jax.devices()[:1])
    assert "\n" not in str(told.value)


def test_a_missing_plugin_is_told(monkeypatch):
    def get_topology_desc(*args, **kwargs):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies.topologies, "get_topology_desc", get_topology_desc)
    with pytest.raises(ConfigError, match=r"jax-cuda13-plugin is not installed: pip install '.\[a"):
        topology_devices("h100:8")
    with pytest.raises(ConfigError, match="--slices is for TPU topologies"):
        topology_devices("h100:8", slices=2)


def test_more_memory_than_jax_takes_is_told(model):
    report = report_of(model(), jax.devices()[:1])
    over = {"chip_bytes": report["peak_bytes"] / 0.9, "usable": 0.75, "platform": "gpu"}
    assert "MORE than the 75% that jax takes: give it more with XLA_PYTHON" in show(report | over)
    too_large = report | over | {"chip_bytes": report["peak_bytes"] / 2, "fits": False}
    assert "DOES NOT FIT: needs" in show(too_large) and "bytes by part" in show(too_large)
