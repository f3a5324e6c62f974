"""What a config leaves to the devices: kernels, remat, scan or unroll, the chunk of the loss."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from ngpt_jax.config import Config, ModelConfig
from ngpt_jax.model import fused
from ngpt_jax.model.attention import choose_kernel
from ngpt_jax.model.loss import auto_chunk
from ngpt_jax.model.params import num_params, padded_vocab_size
from ngpt_jax.parallel import rules
from ngpt_jax.training import throughput
from ngpt_jax.training.throughput import GIB

_SAFE = 0.85  # of the usable memory: the estimate below is rough
_FEW_LAYERS = 8  # a CPU compiles so many unrolled blocks fast enough, and runs them 8 % faster
_MANY_LAYERS = 64  # unrolled they would take a GPU's compiler minutes


def by_devices(config: Config, mesh: Mesh) -> tuple[Config, dict[str, str]]:
    """The config with everything decided that depends on the mesh's devices.

    Args:
      config: resolved, with its vocabulary.
      mesh: its devices need not be there.

    Returns:
      The config, and for each choice the value and the reason, to be told.

    Raises ConfigError where the config asks for a kernel that does not run there.
    """
    device = mesh.devices.flat[0]
    platform, capability = rules.platform_of(device), getattr(device, "compute_capability", None)
    told = {}

    def choose(name: str, value: Any, reason: str, shown: str | None = None) -> None:
        nonlocal config
        model = dataclasses.replace(config.model, **{name: value})
        config = dataclasses.replace(config, model=model)
        told[name] = f"{shown or value} ({reason})"

    choose("attention", *choose_kernel(config.model, mesh, device.platform, capability))
    choose("kernels", *fused.choose_kernels(config.model, device))
    memory = throughput.memory_of(device)
    reason = f"auto on {platform}" if config.model.loss_chunk is None else "as configured"
    chunk = _loss_chunk(config, mesh.shape, platform, memory)
    choose("loss_chunk", chunk, reason, f"{chunk:,} tokens")
    choose("remat", *_remat(config, mesh.shape, device, memory))
    scan, reason = _scan_layers(config.model, platform)
    choose("scan_layers", scan, reason, "yes" if scan else "no, unrolled")
    return config, told


def _tokens(config: Config, shape: Mapping[str, int]) -> int:
    """Tokens of a microbatch on a device."""
    ways = shape["data"] * shape["fsdp"] * shape["context"]
    return max(1, config.train.batch_size * config.model.context // config.train.accumulate // ways)


def _loss_chunk(
    config: Config, shape: Mapping[str, int], platform: str, memory: float | None
) -> int:
    rows = padded_vocab_size(config.model) // shape["tensor"]
    return config.model.loss_chunk or auto_chunk(rows, _tokens(config, shape), memory, platform)


def _remat(
    config: Config, shape: Mapping[str, int], device: jax.Device, memory: float | None
) -> tuple[str, str]:
    """The least remat that fits into memory: what is kept need not be computed again."""
    asked = config.model.remat
    if asked != "auto":
        return asked, "as configured"
    platform = rules.platform_of(device)
    if platform == "cpu":
        return "none", "auto on cpu"
    if memory is None:
        return "full", f"auto: the memory of {device.device_kind} is not known"
    room = _SAFE * throughput.usable_share(platform) * memory
    for remat in ("none", "attention"):
        model = dataclasses.replace(config.model, remat=remat)
        need = sum(estimate(dataclasses.replace(config, model=model), shape, platform, memory))
        if need <= room:
            return remat, f"auto: about {need / GIB:.1f} GiB of {memory / GIB:.0f}"
    return "full", f"auto: {remat} needs about {need / GIB:.0f} GiB of {memory / GIB:.0f}"


def estimate(
    config: Config, shape: Mapping[str, int], platform: str, memory: float | None
) -> tuple[float, float]:
    """Bytes of a device that do not depend on the batch, and those that do; roughly.

    Master weights and moments in float32, weights and gradients in bfloat16. The block being
    computed has 5 activations of the MLP's width and some 14 of the model's. Every block keeps what
    remat leaves: without remat 8 vectors of the model's width per token, and 3 of the MLP's. TPUs
    pad heads of 64 channels to 128.

    Args:
      config: resolved, with its vocabulary, and remat decided.
      shape: sizes of the mesh axes.
      platform: cpu, gpu or tpu.
      memory: bytes of a device, None where that is not known.
    """
    m, tensor = config.model, shape["tensor"]
    assert m.mlp_width and m.head_dim
    state = 16 * num_params(m) / (shape["fsdp"] * tensor) + 0.1 * GIB
    chunk = min(_loss_chunk(config, shape, platform, memory), _tokens(config, shape))
    logits = 6 * chunk * padded_vocab_size(m) / tensor
    padded = 2 if platform == "tpu" and m.head_dim <= 64 else 0
    wide = m.mlp_width / m.width
    kept = {"full": 1, "attention": 2 + padded, "dots": 6 + 2 * wide, "none": 8 + 3 * wide + padded}
    block = 2 * (5 * m.mlp_width / tensor + 14 * m.width)
    token = block + 2 * kept[m.remat] * m.layers * m.width
    return state + logits, _tokens(config, shape) * token


def _scan_layers(model: ModelConfig, platform: str) -> tuple[bool, str]:
    """Whether the layers are scanned. Unrolled they run faster, scanned they compile faster.

    On GPUs a scan copies all that is kept for the backward pass: of the 124M model's 225 GB a step
    without remat, unrolled layers move 137 GB. With full remat little is kept, and TPUs copy less.
    """
    if model.scan_layers is not None:
        return model.scan_layers, "as configured"
    if platform == "cpu":
        return model.layers > _FEW_LAYERS, f"auto on cpu: {model.layers} layers"
    if platform == "tpu":
        return True, "auto on tpu"
    scan = model.remat == "full" or model.layers > _MANY_LAYERS
    return scan, f"auto on {platform}: {model.layers} layers, remat {model.remat}"
