"""Flags for XLA that let communication and computation overlap.

They are read when a backend starts, so they have to be set before jax's first use of a device.
TPUs need none: libtpu overlaps by default, and flags made for one generation stop the compiler on
another.
"""

from __future__ import annotations

import os
from pathlib import Path

GPU_OVERLAP = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_pipelined_all_gather=true",
    "--xla_gpu_enable_pipelined_reduce_scatter=true",
)


def set_flags(choice: str) -> None:
    """Adds the flags of ``runtime.xla_flags`` to the environment; flags already there win.

    XLA aborts on a flag that it does not know, so they are given only where there is a GPU.
    """
    if choice != "overlap":
        return
    if Path("/dev/nvidiactl").exists() and os.environ.get("JAX_PLATFORMS", "") != "cpu":
        _add("XLA_FLAGS", GPU_OVERLAP)


def _add(variable: str, flags: tuple[str, ...]) -> None:
    given = os.environ.get(variable, "")
    new = [f for f in flags if f.split("=")[0] not in given]
    os.environ[variable] = " ".join([*new, *([given] if given else [])])
