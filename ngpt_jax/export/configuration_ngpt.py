"""Config of the PyTorch models that ``ngpt_jax.tools.convert`` writes: a copy of this file lies
beside the weights.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

# A config.json without choices was written before they were fields of the config. It is of nGPT or
# of the GPT baseline, and only nGPT has learned scales. Choice: (nGPT's, GPT's).
_OLD_CHOICES = {
    "residual": ("lerp", "add"),
    "alpha_depth": ("constant", "constant"),
    "alpha_sign": ("absolute", "absolute"),
    "pre_norm": ("none", "rms"),
    "branch_norm": ("unit", "none"),
    "final_norm": ("none", "rms"),
    "qk_form": ("unit_after_rope", "rms_before_rope"),
    "softmax_scale": ("sqrt", "rsqrt"),
    "weights": ("sphere", "free"),
    **{
        f"{n}.form": ("vector", "none") for n in ("alpha_a", "alpha_m", "s_qk", "s_u", "s_v", "s_z")
    },
}


class NGPTConfig(PretrainedConfig):
    """Config of nGPT (https://arxiv.org/abs/2410.01131), of its GPT baseline and of variants.

    Every field but use_cache comes from config.json and has no default here.

    Attributes:
      kind: name of the model, for people; the code does not read it.
      choices: what the model computes, by the names that the fields have in the training's config
        below ``model``: residual, alpha_depth, alpha_sign, pre_norm, branch_norm, final_norm,
        qk_norm, qk_form, softmax_scale, weights, and NAME.form of each scale.
      vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
        num_key_value_heads, head_dim, max_position_embeddings: as in other models.
      rope_base: of the rotary position embedding; channel j turns with channel j + head_dim/2.
      rms_norm_eps: epsilon of every RMSNorm.
      folded: all scales but the alphas are multiplied into the matrices.
      normalize_on_read: each matrix is normalized where it is read.
      scale_factors: by the name of each scale; effective value = stored value * factor, where the
        stored value of a fixed scale is 1.
      ngpt_jax: what ``convert --from_hf`` reads: the training's config, the tokenizer.
    """

    model_type = "ngpt_jax"

    def __init__(
        self,
        choices: dict[str, Any] | None = None,
        scale_factors: dict[str, float] | None = None,
        qk_norm: bool = True,  # of a config.json without choices
        use_cache: bool = True,
        **fields: Any,
    ):
        old = {name: a if scale_factors else b for name, (a, b) in _OLD_CHOICES.items()}
        self.choices = {**old, "qk_norm": qk_norm, **(choices or {})}
        self.scale_factors = scale_factors or {}
        self.use_cache = use_cache
        super().__init__(**{"tie_word_embeddings": False, **fields})
