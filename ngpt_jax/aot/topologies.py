"""The devices to compile for: those of a TPU topology, which need not exist, or the ones here."""

import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from ngpt_jax.config import ConfigError
from ngpt_jax.errors import install_hint

# Cloud TPU's name of a slice is PREFIX-COUNT; v4 and v5p count two cores a chip.
_ACCELERATORS = {"v4": ("v4", 2), "v5e": ("v5litepod", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}


def topology_devices(name: str, slices: int = 1) -> list[Any]:
    """The devices of a topology.

    Sets environment variables that libtpu reads, so call it before jax finds its devices.

    Args:
      name: GENERATION:SHAPE, "v5e:4x4" for example, as libtpu describes it; or "local" for the
        devices of this machine.
      slices: how many such TPU slices there are.

    Raises ConfigError for a topology that is not known, and where libtpu is not installed.
    """
    if name == "local":
        return jax.devices()
    generation, _, shape = name.partition(":")
    if generation not in _ACCELERATORS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise ConfigError(
            f"--topology = {name!r} is not known; it is GENERATION:SHAPE with one of"
            f" {', '.join(_ACCELERATORS)}, for example v5e:4x4, v5p:2x2x4, v6e:8x8."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"libtpu is not installed: {install_hint('tpu')} (no TPU is needed).")
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
