"""Weights for inference: scales multiplied in, in the compute dtype, one tree for each layer."""

from typing import Any

from ngpt_jax.config import ModelConfig
from ngpt_jax.model.folding import compute_params


def for_inference(config: ModelConfig, params: Any) -> Any:
    """Folded weights with matrices in the compute dtype; ``layers`` is a list, one tree a layer.

    A step of decoding then reads each weight once. It need not slice or cast any.
    """
    params = compute_params(config, params)
    stacked = params["layers"]
    layers = [{name: w[i] for name, w in stacked.items()} for i in range(config.layers)]
    return params | {"layers": layers}
