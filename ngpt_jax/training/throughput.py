"""FLOPs of a model, and what chips can do: for MFU and for estimates."""

import os
from typing import NamedTuple

import jax

from ngpt_jax.config import ConfigError, ModelConfig
from ngpt_jax.parallel import rules

GIB = 2**30  # bytes
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # of a GPU's memory, which jax takes at its start


class Chip(NamedTuple):
    """Published figures of an accelerator, per jax device."""

    kind: str  # jax's device_kind, or its first words
    flops: float  # dense bf16 peak, FLOP/s
    memory: float  # GiB; of the larger GPUs what the driver offers
    bandwidth: float  # of the memory, bytes/s
    network: float  # to other chips, bytes/s: TPUs one direction, GPUs both directions together


# The first match wins.
_CHIPS = (
    Chip("TPU v4", 275e12, 32, 1228e9, 300e9),
    Chip("TPU v5 lite", 197e12, 16, 819e9, 200e9),
    Chip("TPU v5e", 197e12, 16, 819e9, 200e9),
    Chip("TPU v5", 459e12, 95, 2765e9, 600e9),
    Chip("TPU v6 lite", 918e12, 32, 1640e9, 448e9),
    Chip("TPU7x", 1153.5e12, 96, 3690e9, 300e9),  # half a chip: jax sees its two cores apart
    Chip("NVIDIA A100-PCIE-40GB", 312e12, 39.4, 1555e9, 64e9),
    Chip("NVIDIA A100 80GB PCIe", 312e12, 79.2, 1935e9, 64e9),
    Chip("NVIDIA A100-SXM4-40GB", 312e12, 39.4, 1555e9, 600e9),
    Chip("NVIDIA A100-SXM4-80GB", 312e12, 79.2, 2039e9, 600e9),
    Chip("NVIDIA H100 PCIe", 756e12, 80, 2000e9, 600e9),
    Chip("NVIDIA H100", 989e12, 79.1, 3350e9, 900e9),
    Chip("NVIDIA H200", 989e12, 141, 4800e9, 900e9),
    Chip("NVIDIA B200", 2250e12, 178.3, 8000e9, 1800e9),
    Chip("NVIDIA L4", 121e12, 24, 300e9, 64e9),
    Chip("Tesla V100-SXM2-16GB", 125e12, 16, 900e9, 300e9),
    Chip("Tesla V100-SXM2-32GB", 125e12, 32, 900e9, 300e9),
)


def train_flops_per_token(config: ModelConfig) -> float:
    """FLOPs of forward and backward for one token, counted from the model's shape.

    Two for each weight of a matmul (the input table is only looked up), and the two products of
    attention over half of the context, which is visible on average. The backward pass costs twice
    the forward pass. Recomputation does not count.
    """
    layers, scores, table = _forward_flops(config)
    return 3 * (layers + scores + table)


def recomputed_flops_per_token(config: ModelConfig) -> float:
    """FLOPs per token that ``model.remat`` adds; they do not count in the MFU."""
    layers, scores, _ = _forward_flops(config)
    # xla's backward pass reads the softmax, which is not kept: one of attention's two products.
    attention = layers + (scores / 2 if config.attention == "xla" else 0)
    again = {"none": 0, "attention": attention, "dots": scores, "full": layers + scores}
    return again[config.remat]


def prefill_flops(config: ModelConfig, prompt: int) -> float:
    """FLOPs of reading one prompt of so many tokens; logits are those of the last token alone."""
    layers, scores, table = _forward_flops(config, prompt / 2)
    return prompt * (layers + scores) + table


def decode_flops(config: ModelConfig, slots: int) -> float:
    """FLOPs of drawing one token, which attends to all slots of the cache."""
    return sum(_forward_flops(config, slots))


def _forward_flops(config: ModelConfig, seen: float | None = None) -> tuple[float, float, float]:
    """Of one token: products with the blocks' weights, those of attention, the output table.

    ``seen``: positions that it attends to; None: half of the context.
    """
    c = config
    seen = c.context / 2 if seen is None else seen
    assert c.kv_heads and c.head_dim and c.mlp_width and c.vocab_size
    attention = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    matrices = c.layers * (attention + 3 * c.width * c.mlp_width)
    scores = c.layers * 2 * c.heads * c.head_dim * seen
    return 2 * matrices, 2 * scores, 2 * c.vocab_size * c.width


def chip_of(device: jax.Device) -> Chip | None:
    """What a device can do; None where that is not known, as for a CPU."""
    kind = device.device_kind
    for chip in _CHIPS:
        if kind == chip.kind or kind.startswith(chip.kind + " "):  # "NVIDIA L4" is not an "L40S"
            return chip
    return None


def memory_of(device: jax.Device) -> float | None:
    """Bytes of an accelerator's memory; None where that is not known.

    Of a chip that is not in the table, what jax says; but several processes might not agree on it.
    """
    if (chip := chip_of(device)) is not None:
        return chip.memory * GIB
    platform = rules.platform_of(device)
    if platform == "cpu" or jax.process_count() > 1:
        return None
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit / usable_share(platform) if limit else None


def mfu(config: ModelConfig, tokens_per_second: float) -> float | None:
    """Model FLOPs utilization over all devices; None where their peak is not known."""
    chip = chip_of(jax.devices()[0])
    if chip is None:
        return None
    return tokens_per_second * train_flops_per_token(config) / (chip.flops * jax.device_count())


def usable_share(platform: str) -> float:
    """The share of a device's memory that a program can use; raises ConfigError."""
    if platform != "gpu":
        return 0.97  # the rest is the runtime's
    try:
        return float(os.environ.get(FRACTION, "0.75"))
    except ValueError:
        raise ConfigError(f"{FRACTION} must be a number, got {os.environ[FRACTION]!r}.") from None
