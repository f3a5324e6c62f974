"""The fused kernels in the whole model, interpreted; and the choice between them and XLA."""

import dataclasses
import types

import choices
import jax
import numpy as np
import pytest

from ngpt_jax.config import ConfigError
from ngpt_jax.model import fused
from ngpt_jax.model.transformer import init_params
from ngpt_jax.training import step

MODELS = {
    "ngpt": {"kind": "ngpt"},
    "ngpt with a key head for each query": {"kind": "ngpt", "kv_heads": 4},
    "gpt with QK-norm": {"kind": "gpt", "qk_norm": True},
}


def model_and_batch(fields, documents=False, **more):
    """Config, parameters whose scales differ, and a batch of 4 sequences."""
    fields = fields | {"width": 32, "head_dim": 8, "vocab_size": 60, "vocab_multiple": 16}
    config, rng = choices.make(fields, **more), np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x * np.exp(0.3 * rng.standard_normal(x.shape)).astype("float32"),
        init_params(config.model, jax.random.key(0)),
    )
    tokens = rng.integers(0, 60, (4, 17)).astype("int32")
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    if documents:
        ends = np.sort(rng.integers(1, 16, (4, 2)), axis=1)
        ids = (np.arange(16)[None, :, None] >= ends[:, None]).sum(-1)
        starts = np.where(ids == 0, 0, np.take_along_axis(ends, np.maximum(ids - 1, 0), 1))
        batch |= {"segment_ids": ids.astype("int32"), "positions": np.arange(16) - starts}
        batch["positions"] = batch["positions"].astype("int32")
        batch["weights"] = rng.integers(0, 2, (4, 16)).astype("float32")
    return config, params, batch


def loss_and_gradients(config, kernels, params, batch):
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, kernels=kernels))
    traced = jax.jit(lambda p, b: step._loss_and_grads(config, p, b)).trace(params, batch)
    assert ("pallas_call" in str(traced.jaxpr)) == (kernels == "pallas")
    return traced.lower().compile()(params, batch)


def assert_same(a, b, tolerance):
    """Losses, and gradients relative to the largest entry of each."""
    np.testing.assert_allclose(a[0], b[0], rtol=tolerance)
    for x, y in zip(jax.tree.leaves(a[1]), jax.tree.leaves(b[1]), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


@pytest.mark.parametrize(
    ("name", "documents", "dtype", "tolerance"),
    [
        ("ngpt", True, "float32", 1e-5),
        ("ngpt with a key head for each query", False, "float32", 1e-5),
        ("gpt with QK-norm", True, "float32", 1e-5),
        ("ngpt", False, "bfloat16", 0.03),
    ],
)
def test_a_model_with_kernels_is_the_one_without(name, documents, dtype, tolerance):
    config, params, batch = model_and_batch(MODELS[name], documents, dtype=dtype)
    found, truth = (loss_and_gradients(config, k, params, batch) for k in ("pallas", "xla"))
    assert_same(found, truth, tolerance)


def device(platform, kind="NVIDIA H100 80GB HBM3"):
    return types.SimpleNamespace(platform=platform, device_kind=kind)


@pytest.mark.parametrize(
    ("platform", "dtype", "message"),
    [
        ("cpu", "float32", "for NVIDIA GPUs, and the devices are of type cpu; set it to auto or"),
        ("tpu", "bfloat16", "for NVIDIA GPUs, and the devices are of type tpu; set it to auto or"),
        ("gpu", "float64", "the kernels know no float64; set it to auto or xla"),
    ],
)
def test_kernels_that_do_not_run_are_refused(platform, dtype, message):
    config = choices.make({"kind": "ngpt"}, kernels="pallas", dtype=dtype).model
    with pytest.raises(ConfigError, match=f"model.kernels = pallas cannot be used: .*{message}"):
        fused.choose_kernels(config, device(platform))


def test_auto_takes_kernels_where_they_ran(monkeypatch):
    config = choices.make({"kind": "ngpt"}, dtype="bfloat16").model
    for platform, kind, reason in (
        ("cpu", "cpu", "for NVIDIA GPUs, and the devices are of type cpu"),
        ("tpu", "TPU v5 lite", "for NVIDIA GPUs, and the devices are of type tpu"),
        ("gpu", "NVIDIA GPU X", "have never run on NVIDIA GPU X"),
    ):
        kernels, why = fused.choose_kernels(config, device(platform, kind))
        assert kernels == "xla" and reason in why
    monkeypatch.setitem(fused.VERIFIED, "NVIDIA GPU X", "in 2030")
    gpu = device("cuda", "NVIDIA GPU X")
    assert fused.choose_kernels(config, gpu) == ("pallas", "they agreed on NVIDIA GPU X, in 2030")
    wide = dataclasses.replace(config, dtype="float64")
    assert fused.choose_kernels(wide, gpu) == ("xla", "the kernels know no float64")
    for kernels in ("xla", "pallas"):
        asked = dataclasses.replace(config, kernels=kernels)
        assert fused.choose_kernels(asked, gpu) == (kernels, "as configured")


@pytest.mark.parametrize("fields", [{"s_qk.form": "vector"}, {"kind": "ngpt", "qk_norm": False}])
def test_joined_products_of_every_choice_of_scales(fields, monkeypatch):
    """Also where no kernel is for the form, or a factor comes after the norm."""
    config, params, batch = model_and_batch({"kind": "gpt", "qk_norm": True} | fields)
    apart = loss_and_gradients(config, "xla", params, batch)
    monkeypatch.setattr(fused, "joins_products", lambda config: True)
    assert_same(loss_and_gradients(config, "xla", params, batch), apart, 1e-5)
