"""nGPT, its GPT baseline and variants in PyTorch: a copy of this file lies beside the weights.

Written by ``ngpt_jax.tools.convert``; load it with
``AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)``. Attention is torch's
scaled_dot_product_attention. What a model computes is told by the choices of its config. Equation
numbers are those of https://arxiv.org/abs/2410.01131.

The model can be trained further, but ``transformers`` does not put its matrices back onto the
sphere after each step. The tokenizer's pad token is eos_token, and a collator that leaves padding
out of the labels leaves out every end of document, too: give labels that keep them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from .configuration_ngpt import NGPTConfig
from .functions_ngpt import (
    Tables,
    add,
    exp,
    lerp,
    normalize,
    rope_tables,
    rotate,
    scaled,
    slerp,
    unchanged,
    unit,
    visible,
    wide,
    within_documents,
)

logger = logging.get_logger(__name__)

# What the installed version of transformers calls the KV cache.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class NGPTLinear(nn.Linear):
    """No bias. With normalize_on_read its vectors along ``embed_dim`` are normalized on read."""

    def __init__(self, config: NGPTConfig, size: int, out: int, embed_dim: int = 1):
        super().__init__(size, out, bias=False)
        self.unit_dim = embed_dim if config.normalize_on_read else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix())

    def matrix(self) -> Tensor:
        return self.weight if self.unit_dim is None else normalize(self.weight, self.unit_dim)


class NGPTRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in at least float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = wide(x)
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (x32 * self.weight).to(x.dtype)


def _scale(config: NGPTConfig, name: str, *size: int) -> nn.Parameter | None:
    """The stored values of a learned scale (section 2.5); None: the model has no such parameter."""
    sizes = {"none": None, "fixed": None, "scalar": (), "vector": size}[_form(config, name)]
    return None if sizes is None else nn.Parameter(torch.ones(sizes))


def _form(config: NGPTConfig, name: str) -> str:
    """The form of a scale; none: it is folded into a matrix, or there is no such scale."""
    folded = config.folded and name not in ("alpha_a", "alpha_m")
    return "none" if folded else config.choices[f"{name}.form"]


def _effective(module: nn.Module, name: str, factor: float = 1.0) -> Tensor | None:
    """A scale times ``factor``, in at least float32; None: there is no such scale.

    A scale that is no vector has no dimension: torch gives products with it the other's dtype.
    """
    form, stored = _form(module.config, name), getattr(module, name)
    if form == "none":
        return None
    if form == "fixed":
        stored = torch.ones((), dtype=torch.float64)
    return wide(stored) * module.config.scale_factors[name] * factor


# What the choices of a config mean.
_RESIDUALS: dict[str, Callable[..., Tensor]] = {
    "add": add, "lerp": lerp, "slerp": slerp, "exp": exp
}  # fmt: skip
_DEPTHS = {"constant": lambda k: 1.0, "harmonic": lambda k: 1 / k, "root": lambda k: k**-0.5}
_NORMS: dict[str, type[nn.Module]] = {"none": nn.Identity, "rms": NGPTRMSNorm}
_BRANCH_NORMS = {"none": unchanged, "unit": unit}
_QK_FORMS = {  # of q and k: before RoPE, after it; False: not normalized
    False: (nn.Identity, unchanged),
    "rms_before_rope": (NGPTRMSNorm, unchanged),
    "unit_after_rope": (nn.Identity, normalize),
}
_SOFTMAX_SCALES = {"sqrt": math.sqrt, "rsqrt": lambda head_dim: 1 / math.sqrt(head_dim)}


class NGPTAttention(nn.Module):
    """softmax(softmax_scale q k^T) v, with q and k normalized and scaled as the config says."""

    def __init__(self, config: NGPTConfig, layer: int):
        super().__init__()
        c = self.config = config
        self.layer = layer
        heads, kv_heads = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
        self.q_proj = NGPTLinear(c, c.hidden_size, heads)
        self.k_proj = NGPTLinear(c, c.hidden_size, kv_heads)
        self.v_proj = NGPTLinear(c, c.hidden_size, kv_heads)
        self.o_proj = NGPTLinear(c, heads, c.hidden_size, embed_dim=0)
        before_rope, self.after_rope = _QK_FORMS[c.choices["qk_norm"] and c.choices["qk_form"]]
        self.q_norm = before_rope(c.head_dim, c.rms_norm_eps)
        self.k_norm = before_rope(c.head_dim, c.rms_norm_eps)
        self.s_qk = _scale(c, "s_qk", c.num_key_value_heads, c.head_dim)
        self.softmax_scale = _SOFTMAX_SCALES[c.choices["softmax_scale"]](c.head_dim)
        if c.folded:  # the softmax's scale is in the factor
            self.softmax_scale = 1.0
            self.folded_qk_scale = nn.Parameter(torch.ones(c.num_attention_heads, c.head_dim))

    def forward(
        self, h: Tensor, tables: Tables, mask: Tensor | None, cache: Cache | None, slots: Tensor
    ) -> Tensor:
        c = self.config
        q, k, v = (  # (B, heads, T, head_dim)
            f(h).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), tables), rotate(self.k_norm(k), tables)
        q, k = self.after_rope(q), self.after_rope(k)
        if c.folded:
            q = scaled(q, self.folded_qk_scale[:, None])
        s_qk = _effective(self, "s_qk")
        if s_qk is not None:  # it scales q and k (equations 15, 16): (q s) . (k s) = q . (k s^2)
            k = scaled(k, s_qk.square()[:, None] if s_qk.dim() else s_qk.square())
        if cache is not None:
            # transformers 4 alone reads the positions.
            k, v = cache.update(k, v, self.layer, {"cache_position": slots})
        group = c.num_attention_heads // c.num_key_value_heads
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class NGPTMLP(nn.Module):
    """SwiGLU(u, v) = u SiLU(v)."""

    def __init__(self, config: NGPTConfig):
        super().__init__()
        c = self.config = config
        self.up_proj = NGPTLinear(c, c.hidden_size, c.intermediate_size)
        self.gate_proj = NGPTLinear(c, c.hidden_size, c.intermediate_size)
        self.down_proj = NGPTLinear(c, c.intermediate_size, c.hidden_size, embed_dim=0)
        self.s_u = _scale(c, "s_u", c.intermediate_size)
        self.s_v = _scale(c, "s_v", c.intermediate_size)

    def forward(self, h: Tensor) -> Tensor:  # equations 20, 21
        s_u, s_v = _effective(self, "s_u"), _effective(self, "s_v", math.sqrt(h.shape[-1]))
        u, v = scaled(self.up_proj(h), s_u), scaled(self.gate_proj(h), s_v)
        return self.down_proj(u * F.silu(v))


class NGPTBlock(GradientCheckpointingLayer):
    """Attention and MLP, each followed by a step of the hidden state h: residual(h, f(h), alpha).

    nGPT: h <- Norm(h + alpha (Norm(f(h)) - h)) (10, 11). GPT: h <- h + f(RMSNorm(h)) (4, 5).
    """

    def __init__(self, config: NGPTConfig, layer: int):
        super().__init__()
        c = self.config = config
        self.self_attn = NGPTAttention(c, layer)
        self.mlp = NGPTMLP(c)
        pre_norm = _NORMS[c.choices["pre_norm"]]
        self.attention_norm = pre_norm(c.hidden_size, c.rms_norm_eps)
        self.mlp_norm = pre_norm(c.hidden_size, c.rms_norm_eps)
        self.alpha_a = _scale(c, "alpha_a", c.hidden_size)
        self.alpha_m = _scale(c, "alpha_m", c.hidden_size)
        self.branch_norm = _BRANCH_NORMS[c.choices["branch_norm"]]
        self.residual = _RESIDUALS[c.choices["residual"]]
        if c.choices["alpha_sign"] == "signed":
            self.residual = functools.partial(self.residual, signed=True)
        self.depth = _DEPTHS[c.choices["alpha_depth"]](layer + 1)

    def forward(self, h: Tensor, *how: Any) -> Tensor:
        f = self.self_attn(self.attention_norm(h), *how)
        if self.config.choices["residual"] != "add":  # the others start from a unit vector
            h = normalize(h)
        h = self._step(h, f, "alpha_a")
        return self._step(h, self.mlp(self.mlp_norm(h)), "alpha_m")

    def _step(self, h: Tensor, f: Tensor, name: str) -> Tensor:
        alpha = _effective(self, name, self.depth)
        return self.residual(h, self.branch_norm(f), alpha).to(h.dtype)


class NGPTPreTrainedModel(PreTrainedModel):
    config_class = NGPTConfig
    base_model_prefix = "model"
    _no_split_modules = ("NGPTBlock",)
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices: scales stay float32, and transformers would take that of the first."""
        return self.get_input_embeddings().weight.dtype

    def post_init(self) -> None:
        """Keeps scales and gains, which are few, in float32 where the matrices are bfloat16."""
        matrices = ("_proj.weight", "embed_tokens.weight", "lm_head.weight")
        small = [n for n, _ in self.named_parameters() if not n.endswith(matrices)]
        names = {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in small}
        self._keep_in_fp32_modules_strict = sorted(names)
        super().post_init()


class NGPTModel(NGPTPreTrainedModel):
    """Token ids (B, T) to the last hidden states (B, T, hidden_size)."""

    def __init__(self, config: NGPTConfig):
        super().__init__(config)
        c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(NGPTBlock(c, i) for i in range(c.num_hidden_layers))
        self.norm = _NORMS[c.choices["final_norm"]](c.hidden_size, c.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Any:
        """As other models of transformers; tokens before each row's first may be padding.

        ``cache`` and ``past_key_values`` are two names of one argument. Where there is no mask and
        nothing in the cache, position_ids that do not go on by 1 begin a document, and attention
        stays within documents.
        """
        c = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if c.output_attentions if output_attentions is None else output_attentions:
            logger.warning_once("output_attentions: sdpa does not return attentions; it is None.")
        cache = past_key_values if cache is None else cache
        if self.training and torch.is_grad_enabled() and self.layers[0].gradient_checkpointing:
            if cache is not None:  # layers run again in the backward pass, and would write again
                raise ValueError("Gradient checkpointing does not go with a cache; leave it out.")
        elif cache is None and (c.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if c.normalize_on_read and inputs_embeds is None:
            h = normalize(h)
        length, past = h.shape[1], 0 if cache is None else cache.get_seq_length()
        slots = past + torch.arange(length, device=h.device)
        mask = attention_mask
        if mask is None or mask.dim() == 2:
            mask = visible(mask, past, length, h.device)
        if mask is None and position_ids is not None:
            mask = within_documents(position_ids)
        if position_ids is None:
            position_ids = slots[None]
            if attention_mask is not None and attention_mask.dim() == 2:
                position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]
        tables = rope_tables(position_ids, c, h.dtype)
        keep = c.output_hidden_states if output_hidden_states is None else output_hidden_states
        states: tuple[Tensor, ...] | None = () if keep else None
        for layer in self.layers:
            states = None if states is None else (*states, h)
            h = layer(h, tables, mask, cache, slots)
        h = self.norm(h)
        states = None if states is None else (*states, h)
        out = BaseModelOutputWithPast(last_hidden_state=h, hidden_states=states, **{_CACHE: cache})
        return out.to_tuple() if return_dict is False else out


class NGPTForCausalLM(NGPTPreTrainedModel, GenerationMixin):
    """Logits in at least float32 (equations 1 and 3)."""

    def __init__(self, config: NGPTConfig):
        super().__init__(config)
        c = config
        self.model = NGPTModel(c)
        self.lm_head = NGPTLinear(c, c.hidden_size, c.vocab_size)
        self.s_z = _scale(c, "s_z", c.vocab_size)
        self.post_init()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **_: Any
    ) -> nn.Embedding:
        size, multiple = self.config.vocab_size, pad_to_multiple_of or 1
        wanted = size if new_num_tokens is None else new_num_tokens
        if -(-wanted // multiple) * multiple != size:
            raise NotImplementedError(
                f"The vocabulary is that of the training, {size} tokens: each row has its scale."
            )
        return self.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As other models of transformers; ``labels`` are ``input_ids``, -100 where left out."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # A product in float32: in bfloat16 it would round each logit.
        h = wide(out.last_hidden_state[:, kept])
        product = F.linear(h, self.lm_head.matrix().to(h.dtype))
        logits = scaled(product, _effective(self, "s_z"))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        out = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=out.hidden_states, **{_CACHE: out.get(_CACHE)}
        )
        return out.to_tuple() if return_dict is False else out
