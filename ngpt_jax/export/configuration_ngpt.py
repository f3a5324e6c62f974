"""Config of the PyTorch models that ``ngpt_jax.tools.convert`` writes; lies beside the weights."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class NGPTConfig(PretrainedConfig):
    """Of nGPT (https://arxiv.org/abs/2410.01131) and of its paper's GPT baseline.

    Args:
      kind: ngpt, or gpt.
      vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
        num_key_value_heads, head_dim, max_position_embeddings: as in other models.
      rope_base: of the rotary position embedding; channel j turns with channel j + head_dim/2.
      qk_norm: normalize q and k per head.
      rms_norm_eps: of GPT's RMSNorm.
      folded: nGPT's scales are multiplied into the matrices.
      normalize_on_read: each matrix of nGPT is normalized where it is read.
      scale_factors: of nGPT's learned scales by name: effective = stored * factor.
      ngpt_jax: what ``convert --from_hf`` wants to know: the training config, the tokenizer.
    """

    model_type = "ngpt_jax"

    def __init__(
        self,
        kind: str = "ngpt",
        vocab_size: int = 257,
        hidden_size: int = 128,
        intermediate_size: int = 512,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 4,
        head_dim: int = 32,
        max_position_embeddings: int = 128,
        rope_base: float = 10000.0,
        qk_norm: bool = True,
        rms_norm_eps: float = 1e-6,
        folded: bool = False,
        normalize_on_read: bool = False,
        scale_factors: dict[str, float] | None = None,
        ngpt_jax: dict[str, Any] | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ):
        self.kind = kind
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.rope_base = rope_base
        self.qk_norm = qk_norm
        self.rms_norm_eps = rms_norm_eps
        self.folded = folded
        self.normalize_on_read = normalize_on_read
        self.scale_factors = scale_factors or {}
        self.ngpt_jax = ngpt_jax or {}
        self.use_cache = use_cache
        super().__init__(**{"tie_word_embeddings": False, **kwargs})
