"""FLOPs of the model and peaks of the devices, for MFU."""

from __future__ import annotations

import jax

from ngpt_jax.config import ModelConfig

# Published dense bf16 peaks in FLOP/s, by jax's device_kind or its first words; first match wins.
_PEAK_FLOPS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU7x", 2307e12),
    ("NVIDIA A100-SXM4-40GB", 312e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA L4", 121e12),
    ("Tesla V100-SXM2-16GB", 125e12),
    ("Tesla V100-SXM2-32GB", 125e12),
)


def train_flops_per_token(config: ModelConfig) -> float:
    """FLOPs of forward and backward for one token, counted from the model's shape.

    Two for each weight of a matmul (the input table is only looked up), and the two
    products of attention over the half of the context that is visible on average; the
    backward pass costs twice the forward pass. Recomputation does not count.
    """
    c = config
    assert c.kv_heads and c.head_dim and c.mlp_width and c.vocab_size
    attention = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    matrices = c.layers * (attention + 3 * c.width * c.mlp_width) + c.vocab_size * c.width
    scores = c.layers * 2 * c.heads * c.head_dim * c.context / 2
    return 3 * 2 * (matrices + scores)


def peak_flops(device: jax.Device) -> float | None:
    """The device's published bf16 peak in FLOP/s, None where it is not known (a CPU)."""
    kind = device.device_kind
    for name, peak in _PEAK_FLOPS:
        if kind == name or kind.startswith(name + " "):  # "NVIDIA L4" is not "NVIDIA L40S"
            return peak
    return None


def mfu(config: ModelConfig, tokens_per_second: float) -> float | None:
    """Model FLOPs utilization over all devices, None where their peak is not known."""
    peak = peak_flops(jax.devices()[0])
    if peak is None:
        return None
    return tokens_per_second * train_flops_per_token(config) / (peak * jax.device_count())
