"""The CPU cores, and what a command has to set before its first use of jax.

The latter are flags for XLA, and float64.

XLA reads its flags when a backend starts. With the flags here communication and computation
overlap. TPUs need none: libtpu overlaps by default, and flags made for one generation stop the
compiler on another.
"""

import os
from pathlib import Path

from ngpt_jax.config import ModelConfig

GPU_OVERLAP = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_pipelined_all_gather=true",
    "--xla_gpu_enable_pipelined_reduce_scatter=true",
)


def available_cores() -> list[int]:
    """The CPU cores that this program may use: under SLURM, say, not all that the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def set_xla_flags(choice: str) -> None:
    """Adds the flags of ``runtime.xla_flags`` to the environment; flags already there stay.

    XLA aborts on a flag that it does not know, so they are given only where there is a GPU.
    """
    gpu = Path("/dev/nvidiactl").exists() and os.environ.get("JAX_PLATFORMS", "") != "cpu"
    if choice == "overlap" and gpu:
        given = os.environ.get("XLA_FLAGS", "")
        new = [flag for flag in GPU_OVERLAP if flag.split("=")[0] not in given]
        os.environ["XLA_FLAGS"] = " ".join([*new, *([given] if given else [])])


def enable_x64_if_used(model: ModelConfig) -> None:
    """Allows jax to make float64 arrays where the model has some."""
    if "float64" in (model.dtype, model.param_dtype):
        import jax  # only now: whoever sets the flags above needs no jax

        jax.config.update("jax_enable_x64", True)
