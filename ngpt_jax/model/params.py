"""Every parameter of the model, one line each. All that can be derived from a line is derived here.

A matrix is a set of vectors of the residual space: it has the axis ``embed`` and one more besides
``layers``, and each of its vectors lies along ``embed``. All other parameters are scale vectors.
Numbers in parentheses are those of the equations of https://arxiv.org/abs/2410.01131.
"""

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any

import jax

from ngpt_jax.config import ConfigError, ModelConfig
from ngpt_jax.config.fields import SCALES
from ngpt_jax.model.parametrization import initial_value

Axes = tuple[str, ...]

# The factor on q that replaces s_qk in folded weights. Folded weights are known by this name.
FOLDED_MARK = "folded_qk_scale"


@dataclasses.dataclass(frozen=True)
class Param:
    """A line of the table, and a leaf of :func:`param_tree`.

    Attributes:
      path: in the tree of parameters; those of the blocks are stacked along ``layers``.
      axes: the name of each axis, which decides its length and how it lies on the mesh.
      group: of the optimizer: input_table, output_table, block_matrix or vector.
      equation: what it does.
      needs: the choices that bring it: field of ModelConfig -> value.
    """

    path: str
    axes: Axes
    group: str
    equation: str
    needs: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.path.removeprefix("layers/")

    @property
    def module_axes(self) -> Axes:
        """The axes where its module declares it: blocks are stacked outside of them."""
        return self.axes[1:] if self.axes[0] == "layers" else self.axes

    @property
    def is_matrix(self) -> bool:
        return self.group != "vector"

    @property
    def unit_axis(self) -> int | None:
        """The axis along which a vector of a matrix lies."""
        return self.axes.index("embed") if self.is_matrix else None

    def is_in(self, config: ModelConfig) -> bool:
        """Whether the choices of a config bring it."""
        return all(operator.attrgetter(f)(config) == value for f, value in self.needs.items())

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        sizes = axis_sizes(config)
        return tuple(sizes[axis] for axis in self.axes)


def _scale(name: str) -> dict[str, Any]:
    return {f"{name}.form": "vector", "folded": False}


_PRE_NORM = {"pre_norm": "rms"}
_QK_NORM = {"qk_norm": True, "qk_form": "rms_before_rope"}
_ROWS: tuple[tuple[str, str, str, str, Mapping[str, Any]], ...] = (
    ("input_embedding", "vocab embed", "input_table", "h = row of the token", {}),
    ("layers/attention_norm", "layers embed", "vector", "RMSNorm(h) (4)", _PRE_NORM),
    ("layers/query_kernel", "layers embed heads head_dim", "block_matrix", "q = h W_q", {}),
    ("layers/key_kernel", "layers embed kv_heads head_dim", "block_matrix", "k = h W_k", {}),
    ("layers/value_kernel", "layers embed kv_heads head_dim", "block_matrix", "v = h W_v", {}),
    ("layers/query_norm", "layers head_dim", "vector", "RMSNorm(q)", _QK_NORM),
    ("layers/key_norm", "layers head_dim", "vector", "RMSNorm(k)", _QK_NORM),
    ("layers/s_qk", "layers kv_heads head_dim", "vector", "q, k times it (15, 16)", _scale("s_qk")),
    (f"layers/{FOLDED_MARK}", "layers heads head_dim", "vector", "q times it", {"folded": True}),
    ("layers/out_kernel", "layers heads head_dim embed", "block_matrix", "h_A = heads W_o", {}),
    ("layers/alpha_a", "layers embed", "vector", "step to h_A (10)", {"alpha_a.form": "vector"}),
    ("layers/mlp_norm", "layers embed", "vector", "RMSNorm(h) (5)", _PRE_NORM),
    ("layers/up_kernel", "layers embed mlp", "block_matrix", "u = h W_u", {}),
    ("layers/gate_kernel", "layers embed mlp", "block_matrix", "nu = h W_nu", {}),
    ("layers/s_u", "layers mlp", "vector", "u times it (20)", _scale("s_u")),
    ("layers/s_v", "layers mlp", "vector", "nu times it and sqrt(width) (21)", _scale("s_v")),
    ("layers/down_kernel", "layers mlp embed", "block_matrix", "h_M = (u SiLU(nu)) W_oMLP", {}),
    ("layers/alpha_m", "layers embed", "vector", "step to h_M (11)", {"alpha_m.form": "vector"}),
    ("final_norm", "embed", "vector", "RMSNorm(h)", {"final_norm": "rms"}),
    ("output_embedding", "vocab embed", "output_table", "z = E_out h (1)", {}),
    ("s_z", "vocab", "vector", "z times it (3)", _scale("s_z")),
)
_PARAMS = [Param(p, tuple(axes.split()), g, e, needs) for p, axes, g, e, needs in _ROWS]
TABLE = {param.name: param for param in _PARAMS}  # in the order of use


def padded_vocab_size(config: ModelConfig) -> int:
    """Rows of the tables: vocab_size rounded up to a multiple of vocab_multiple."""
    assert config.vocab_size is not None
    return -(-config.vocab_size // config.vocab_multiple) * config.vocab_multiple


def axis_sizes(config: ModelConfig) -> dict[str, Any]:
    """Length of every named axis."""
    return {
        "layers": config.layers,
        "vocab": padded_vocab_size(config),
        "embed": config.width,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "mlp": config.mlp_width,
    }


def param_list(config: ModelConfig) -> list[Param]:
    """The parameters that a model has, in the order of the table."""
    return [p for p in TABLE.values() if p.is_in(config)]


def param_tree(config: ModelConfig) -> dict[str, Any]:
    """A tree like the parameters, with the line of the table in place of each."""
    own = param_list(config)
    blocks = {p.name: p for p in own if p.path != p.name}
    return {p.name: p for p in own if p.path == p.name} | {"layers": blocks}


def num_params(config: ModelConfig) -> int:
    """How many parameters a model has; rows that pad the vocabulary do not count."""
    exact = dataclasses.replace(config, vocab_multiple=1)
    return sum(math.prod(p.shape(exact)) for p in param_list(exact))


def unit_axes(config: ModelConfig) -> dict[str, Any]:
    """A tree like the parameters of the axis of unit norm: None for vectors, and for free weights.

    It is what :func:`ngpt_jax.projection.keep_params_on_sphere` takes. Raises ConfigError for
    folded weights, whose vectors have other norms.
    """
    refuse_folded(config)
    sphere = config.weights == "sphere"
    return jax.tree.map(lambda p: p.unit_axis if sphere else None, param_tree(config))


def refuse_folded(config: ModelConfig) -> None:
    """Raises ConfigError for the config of folded weights."""
    if config.folded:
        raise ConfigError(
            "model.folded: these weights have their scales multiplied in, which is for inference"
            " alone; train from the raw ones."
        )


def real_vocab(leaf: Any, axes: Axes, config: ModelConfig) -> Any:
    """A parameter without the rows that pad the vocabulary."""
    if "vocab" not in axes:
        return leaf
    index = [slice(None)] * len(axes)
    index[axes.index("vocab")] = slice(config.vocab_size)
    return leaf[tuple(index)]


def scale_factor(config: ModelConfig, name: str) -> float:
    """The effective value of a learned scale over its stored value (section 2.5)."""
    return initial_value(config, name) / getattr(config, name).scale


def stored_scales(config: ModelConfig, params: Any) -> dict[str, Any]:
    """The stored values of the learned scales that a model has, by name; padding left out."""
    out = {}
    for name in SCALES:
        if TABLE[name].is_in(config):
            leaf = params[name] if name in params else params["layers"][name]
            out[name] = real_vocab(leaf, TABLE[name].axes, config)
    return out
