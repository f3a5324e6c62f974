"""What the benchmarks share: which config they time, and on what machine."""

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from ngpt_jax import config as config_lib
from ngpt_jax.config import Config, ConfigError, experiment
from ngpt_jax.config.presets import PRESETS
from ngpt_jax.data.tokenizers.load import with_tokenizer
from ngpt_jax.parallel.backend import available_cores, enable_x64_if_used


def load(
    spec: str | None, overrides: Sequence[tuple[str, str]], small: Mapping[str, Any]
) -> Config:
    """The resolved config to time, with its vocabulary size.

    Args:
      spec: experiment FILE[:variant,...]; None: a small model of 4 layers and width 256.
      overrides: (dotted name, text).
      small: further fields of the small model, by dotted name.

    Raises ConfigError, also for a field that makes the difference between nGPT and GPT.
    """
    for name, _ in overrides:
        if name == "model.kind" or any(name in preset for preset in PRESETS.values()):
            raise ConfigError(
                f"--config.{name}: each model is timed with its own (that of its model.kind); leave"
                " the flag out."
            )
    values = config_lib.default_config()
    values.update_from_flattened_dict({"model.width": 256, "model.vocab_size": 8192, **small})
    config = experiment.load_config(spec or values, overrides)
    if config.model.vocab_size is None:
        config, _ = with_tokenizer(config)
    enable_x64_if_used(config.model)
    return config


def machine() -> dict[str, str]:
    """The devices, CPU and jax version that numbers were measured with."""
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "machine": f"{platform.machine()}, {len(available_cores())} cores",
        "jax": jax.__version__,
    }
