"""Functions of tensors that modeling_ngpt.py uses: a copy of this file lies beside it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_ngpt import NGPTConfig

Tables = tuple[Tensor, Tensor]  # cosines and sines of RoPE


def wide(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalize(x: Tensor, dim: int = -1) -> Tensor:
    """Norm(x) = x / ||x|| (section 2.1), computed in at least float32; zero stays zero."""
    return F.normalize(wide(x), dim=dim).to(x.dtype)


def scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """x * scale, computed in at least float32; x where there is no scale."""
    return x if scale is None else (wide(x) * scale).to(x.dtype)


def add(h: Tensor, f: Tensor, alpha: None) -> Tensor:
    """h + f (equations 4 and 5)."""
    return h + f


# The step a of the rules below is |alpha|, or alpha where it is signed.


def lerp(h: Tensor, f: Tensor, alpha: Tensor, signed: bool = False) -> Tensor:
    """Norm(h + a (f - h)) (equations 10 and 11)."""
    h, a = wide(h), alpha if signed else alpha.abs()
    return normalize(h + a * (f - h))


def exp(h: Tensor, f: Tensor, alpha: Tensor, signed: bool = False) -> Tensor:
    """cos(|w|) h + sin(|w|) w / |w|, where w is the part of a v, and v that of f, tangent at h.

    The step of GeoNorm (arXiv 2601.22095), where alpha is one number.
    """
    h, a = normalize(wide(h)), alpha if signed else alpha.abs()

    def tangent(x: Tensor) -> Tensor:
        return x - (h * x).sum(-1, keepdim=True) * h

    w = tangent(a * tangent(wide(f)))
    length = w.norm(dim=-1, keepdim=True)
    return normalize(length.cos() * h + torch.sinc(length / math.pi) * w)


def slerp(h: Tensor, f: Tensor, alpha: Tensor, signed: bool = False) -> Tensor:
    """Norm(sin((1 - a) t) h + sin(a t) f), with t the angle between the unit vectors h and f.

    This is equation 6 where alpha is one number: its divisor sin(t) has no effect on the norm.
    torch.sinc(x) = sin(pi x) / (pi x) is smooth at 0, so that t may be 0 or pi.
    """
    h, f, a = wide(h), wide(f), alpha if signed else alpha.abs()
    angle = 2 * torch.atan2((h - f).norm(dim=-1, keepdim=True), (h + f).norm(dim=-1, keepdim=True))

    def weight(share: Tensor) -> Tensor:
        return share * torch.sinc(share * angle / math.pi)

    return normalize(weight(1 - a) * h + weight(a) * f)


def unit(f: Tensor) -> Tensor:
    return normalize(wide(f))


def unchanged(x: Tensor) -> Tensor:
    return x


def rope_tables(positions: Tensor, config: NGPTConfig, dtype: torch.dtype) -> Tables:
    """Cosines and sines of t * base^(-2j/head_dim), each (B, 1, T, head_dim/2)."""
    size = config.head_dim
    powers = [config.rope_base ** (-2 * j / size) for j in range(size // 2)]
    dtype = torch.promote_types(dtype, torch.float32)
    frequencies = torch.tensor(powers, dtype=dtype, device=positions.device)
    angles = positions[:, None, :, None].to(dtype) * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: Tables) -> Tensor:
    """RoPE on x (B, heads, T, head_dim): channel j turns with channel j + head_dim/2."""
    cos, sin = tables
    a, b = wide(x).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def visible(mask: Tensor | None, past: int, length: int, device: torch.device) -> Tensor | None:
    """Which positions each of the ``length`` new ones attends to; None: all before it and itself.

    Args:
      mask: (B, past + length), 0 for padding, or None.
      past: positions in the cache.

    Returns:
      (1 or B, 1, length, past + length) bool. Padding sees itself, so that no softmax is empty.
    """
    if mask is None and past == 0:
        return None
    slot = torch.arange(past + length, device=device)
    own = slot[past:, None]
    seen = (slot <= own)[None, None]
    return seen if mask is None else seen & (mask[:, None, None].bool() | (slot == own))


def within_documents(position_ids: Tensor) -> Tensor | None:
    """The causal mask of packed documents; None: each row is one document.

    A position that is not the one before it plus 1 begins a document.
    """
    document = F.pad(position_ids.diff(dim=-1) != 1, (1, 0)).cumsum(-1)
    # A compiled program cannot branch on values, and always takes the mask.
    if not (torch.compiler.is_compiling() or document[:, -1:].any()):
        return None
    return (document[:, None, :, None] == document[:, None, None]).tril()
