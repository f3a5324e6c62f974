"""Parameters from the names and layout of the authors' PyTorch code to ours, and back.

They have torch Linear weights (out, in), one entry a layer, RoPE on interleaved pairs, up and gate
fused in one matrix. We have kernels with an axis for the heads, stacked over layers, RoPE on
halves, padded tables. The stored numbers of the scales are the same.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ngpt_jax.config import ModelConfig
from ngpt_jax.model.params import (
    initial_scale,
    padded_vocab_size,
    param_tree,
    real_vocab,
)
from ngpt_jax.model.rotary import interleaved_to_half

Array = np.ndarray


class _Entry(NamedTuple):
    """A name of theirs, our parameters for it (one, or up and gate), and the two maps."""

    theirs: str
    ours: tuple[str, ...]
    read: Callable[[Array], tuple[Array, ...]]
    write: Callable[..., Array]


def _same(theirs: str, ours: str) -> _Entry:
    return _Entry(theirs, (ours,), lambda w: (w,), lambda w: w)


def _halves(theirs: str, ours: tuple[str, str]) -> _Entry:
    """Matrices (out, in) become (in, out); vectors stay; the first half is up, then gate."""
    return _Entry(
        theirs,
        ours,
        lambda w: tuple(half.T for half in np.split(w, 2, axis=0)),
        lambda u, v: np.concatenate([u.T, v.T], axis=0),
    )


def _heads(theirs: str, ours: str, heads: int, order: Array) -> _Entry:
    """(heads * head_dim, embed) <-> (embed, heads, head_dim); our channels are theirs[order]."""
    head_dim = len(order)
    return _Entry(
        theirs,
        (ours,),
        lambda w: (np.moveaxis(w.reshape(heads, head_dim, -1)[:, order], -1, 0),),
        lambda w: np.moveaxis(w, 0, -1)[:, np.argsort(order)].reshape(heads * head_dim, -1),
    )


def _layer_entries(c: ModelConfig) -> list[_Entry]:
    """Of the parameters that the blocks of this model have."""
    assert c.kv_heads is not None and c.head_dim is not None
    heads, kv_heads, head_dim = c.heads, c.kv_heads, c.head_dim
    order, same = interleaved_to_half(head_dim), np.arange(head_dim)
    entries = [
        _heads("query.weight", "query_kernel", heads, order),
        _heads("key.weight", "key_kernel", kv_heads, order),
        _heads("value.weight", "value_kernel", kv_heads, same),
        _Entry(
            "att_c_proj.weight",
            ("out_kernel",),
            lambda w: (w.T.reshape(heads, head_dim, -1),),
            lambda w: w.reshape(heads * head_dim, -1).T,
        ),
        _halves("c_fc.weight", ("up_kernel", "gate_kernel")),
        _Entry("mlp_c_proj.weight", ("down_kernel",), lambda w: (w.T,), lambda w: w.T),
        _same("rmsnorm_att.weight", "attention_norm"),
        _same("rmsnorm_mlp.weight", "mlp_norm"),
        _same("attn_alpha", "alpha_a"),
        _same("mlp_alpha", "alpha_m"),
        _Entry(
            "sqk",
            ("s_qk",),
            lambda w: (w.reshape(kv_heads, head_dim)[:, order],),
            lambda w: w[:, np.argsort(order)].reshape(-1),
        ),
        _halves("suv", ("s_u", "s_v")),
    ]
    there = param_tree(c)["layers"]
    return [entry for entry in entries if set(entry.ours) <= set(there)]


# Theirs and ours outside the blocks, of the same layout.
_TOP = {
    "transformer.wte.weight": "input_embedding",
    "lm_head.weight": "output_embedding",
    "sz": "s_z",
    "rmsnorm_f.weight": "final_norm",
}


def _top_entries(c: ModelConfig) -> list[tuple[str, str, tuple[str, ...]]]:
    """(theirs, ours, axes) of the parameters that this model has outside the blocks."""
    there = param_tree(c)
    return [(theirs, ours, there[ours].axes) for theirs, ours in _TOP.items() if ours in there]


def pad_vocab(name: str, w: Array, axes: Sequence[str], c: ModelConfig) -> Array:
    """Our parameter ``name`` with rows of padding, where it has an axis of the vocabulary.

    Rows of tables on the sphere are the first basis vector, those of s_z its starting value, others
    0. Logits of padding are masked out.
    """
    if "vocab" not in axes:
        return w
    fill = initial_scale(c, "s_z") if name == "s_z" else 0
    extra = np.full((padded_vocab_size(c) - w.shape[0], *w.shape[1:]), fill, w.dtype)
    if w.ndim == 2 and c.weights == "sphere":
        extra[:, 0] = 1
    return np.concatenate([w, extra])


def from_reference(theirs: Mapping[str, Array], config: ModelConfig) -> dict[str, Any]:
    """Our parameter tree from {name: array} in the authors' layout.

    Args:
      theirs: every parameter under the authors' name; raises KeyError for a missing one.
      config: a resolved ModelConfig with the shape of ``theirs``.
    """
    params: dict[str, Any] = {"layers": {}}
    for name, ours, axes in _top_entries(config):
        params[ours] = pad_vocab(ours, np.asarray(theirs[name]), axes, config)
    for entry in _layer_entries(config):
        per_layer = [
            entry.read(np.asarray(theirs[f"transformer.h.{i}.{entry.theirs}"]))
            for i in range(config.layers)
        ]
        for ours, stack in zip(entry.ours, zip(*per_layer)):
            params["layers"][ours] = np.stack(stack)
    return params


def to_reference(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Array]:
    """The inverse of :func:`from_reference`; padding is left out. Gradients map alike."""
    theirs = {
        name: np.asarray(real_vocab(params[ours], axes, config))
        for name, ours, axes in _top_entries(config)
    }
    for entry in _layer_entries(config):
        stacked = [np.asarray(params["layers"][ours]) for ours in entry.ours]
        for i in range(config.layers):
            theirs[f"transformer.h.{i}.{entry.theirs}"] = entry.write(*(w[i] for w in stacked))
    return theirs
