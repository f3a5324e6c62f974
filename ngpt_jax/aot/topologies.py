"""The devices to compile for: TPUs or GPUs, which need not exist, or the ones here."""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from ngpt_jax.config import ConfigError
from ngpt_jax.errors import install_hint

# Cloud TPU's name of a slice is PREFIX-COUNT; v4 and v5p count two cores a chip.
_ACCELERATORS = {"v4": ("v4", 2), "v5e": ("v5litepod", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}


class Gpu(NamedTuple):
    """What XLA has to know of a GPU; the makers' figures, as XLA's own repository has them."""

    kind: str  # jax's device_kind
    capability: int  # major compute capability
    cores: int  # streaming multiprocessors
    fpus: int  # of a core
    clock: float  # GHz
    shared_memory: int  # bytes of a core; a block can have all but 1,024 of them
    l2: int  # bytes
    memory: int  # bytes
    bandwidth: int  # bytes/s


_AMPERE = (8, 108, 64, 1.41, 167936, 40 << 20)
_HOPPER = (9, 132, 128, 1.98, 233472, 50 << 20)
_GPUS = {
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", *_AMPERE, 42331013120, 1555200000000),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", *_AMPERE, 85100068864, 2039040000000),
    "h100": Gpu("NVIDIA H100 80GB HBM3", *_HOPPER, 84942979072, 3352320000000),
    "h200": Gpu("NVIDIA H200 141GB HBM3e", *_HOPPER, 151397597184, 4800000000000),
    "b200": Gpu("NVIDIA B200", 10, 148, 128, 1.965, 233472, 132644864, 191514411008, 7672320000000),
}
_NO_SLICES = "--slices is for TPU topologies; leave it out (several hosts of GPUs: h100:2x8)."
# Autotuning measures kernels on the device, which is not there.
GPU_COMPILER_OPTIONS: dict[str, str | bool] = {"xla_gpu_autotune_level": "0"}


def topology_devices(name: str, slices: int = 1) -> list[Any]:
    """The devices of a topology.

    Sets environment variables that libtpu reads, so call it before jax finds its devices.

    Args:
      name: GENERATION:SHAPE for TPUs, "v5e:4x4" for example, as libtpu describes it; GPU:COUNT or
        GPU:HOSTSxCOUNT, "h100:8" or "h100:2x8"; or "local" for the devices of this machine.
      slices: how many such TPU slices there are.

    Raises ConfigError for a topology that is not known, and where what it needs is not installed.
    """
    if name == "local":
        if slices > 1:
            raise ConfigError(_NO_SLICES)
        return jax.devices()
    generation, _, shape = name.partition(":")
    if generation in _GPUS and re.fullmatch(r"([1-9]\d*x)?[1-9]\d*", shape):
        if slices > 1:
            raise ConfigError(_NO_SLICES)
        return _gpus(_GPUS[generation], shape)
    if generation not in _ACCELERATORS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        raise ConfigError(
            f"--topology = {name!r} is not known; it is GENERATION:SHAPE with one of"
            f" {', '.join(_ACCELERATORS)}, for example v5e:4x4, v5p:2x2x4, v6e:8x8; or GPU:COUNT or"
            f" GPU:HOSTSxCOUNT with one of {', '.join(_GPUS)}, for example h100:8, h100:2x8."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"libtpu is not installed: {install_hint('aot')} (no TPU is needed).")
    prefix, cores = _ACCELERATORS[generation]
    chips = math.prod(int(n) for n in shape.split("x"))
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{prefix}-{chips * cores}")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    more = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(name, platform="tpu", **more).devices)
    except Exception as e:  # jaxlib raises a RuntimeError of its own, or a ValueError
        reason = next((line for line in str(e).splitlines() if line), type(e).__name__)
        raise ConfigError(f"--topology = {name!r}: libtpu does not know it ({reason}).") from e


def _gpus(gpu: Gpu, shape: str) -> list[Any]:
    hosts, _, count = shape.rpartition("x")
    jax.devices()  # loads the plugin, which makes the platform known
    grid = f"1x{hosts or 1}x{count}"
    try:
        description = topologies.get_topology_desc(
            gpu.kind, platform="cuda", topology=grid, target_config=_target_config(gpu)
        )
    except NotImplementedError as e:
        raise ConfigError(
            f"jax-cuda13-plugin is not installed: {install_hint('aot')} (no GPU is needed)."
        ) from e
    return list(description.devices)


def _target_config(gpu: Gpu) -> str:
    """XLA's description of a GPU: a text proto, stream_executor.GpuTargetConfigProto."""
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": gpu.shared_memory,
        "shared_memory_per_block_optin": gpu.shared_memory - 1024,
        "threads_per_core_limit": 2048,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.fpus,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": gpu.bandwidth,
        "l2_cache_size": gpu.l2,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": gpu.memory,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    fields = " ".join(f"{name}: {value}" for name, value in info.items())
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {gpu.capability} }} }}"
        ' platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 }'
        f' device_description_str: "{gpu.kind}"'
    )
