"""Every parameter of the model, one line each. All that can be derived from a line is derived here.

A matrix is a set of vectors of the residual space: it has the axis ``embed`` and one more besides
``layers``, and each of its vectors lies along ``embed``. All other parameters are scale vectors.
Numbers in parentheses are those of the equations of https://arxiv.org/abs/2410.01131.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngpt_jax import sphere
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
      axes: the name of each axis, which decides its length and how it lies on the mesh. In TABLE
        they are those of a vector; :func:`param_list` has those of the model.
      group: of the optimizer: input_table, output_table, block_matrix or vector.
      equation: what it does.
      needs: the choices that bring it: field of ModelConfig -> values.
    """

    path: str
    axes: Axes
    group: str
    equation: str
    needs: Mapping[str, tuple[Any, ...]]

    @property
    def name(self) -> str:
        return self.path.removeprefix("layers/")

    @property
    def module_axes(self) -> Axes:
        """The axes where its module declares it: blocks are stacked outside of them."""
        return self.axes[1:] if self.axes[:1] == ("layers",) else self.axes

    @property
    def is_matrix(self) -> bool:
        return self.group != "vector"

    @property
    def unit_axis(self) -> int | None:
        """The axis along which a vector of a matrix lies."""
        return self.axes.index("embed") if self.is_matrix else None

    def is_in(self, config: ModelConfig) -> bool:
        """Whether the choices of a config bring it."""
        return all(operator.attrgetter(f)(config) in values for f, values in self.needs.items())

    def of(self, config: ModelConfig) -> "Param":
        """The line for this model: a scalar has none of the axes but ``layers``."""
        if self.name not in SCALES or getattr(config, self.name).form != "scalar":
            return self
        return dataclasses.replace(self, axes=tuple(a for a in self.axes if a == "layers"))

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        sizes = axis_sizes(config)
        return tuple(sizes[axis] for axis in self.axes)


def _alpha(name: str) -> dict[str, tuple[Any, ...]]:
    return {f"{name}.form": ("vector", "scalar")}


def _scale(name: str) -> dict[str, tuple[Any, ...]]:
    return {**_alpha(name), "folded": (False,)}


_PRE_NORM = {"pre_norm": ("rms",)}
_QK_NORM = {"qk_norm": (True,), "qk_form": ("rms_before_rope",)}
_ROWS: tuple[tuple[str, str, str, str, Mapping[str, tuple[Any, ...]]], ...] = (
    ("input_embedding", "vocab embed", "input_table", "h = row of the token", {}),
    ("layers/attention_norm", "layers embed", "vector", "RMSNorm(h) (4)", _PRE_NORM),
    ("layers/query_kernel", "layers embed heads head_dim", "block_matrix", "q = h W_q", {}),
    ("layers/key_kernel", "layers embed kv_heads head_dim", "block_matrix", "k = h W_k", {}),
    ("layers/value_kernel", "layers embed kv_heads head_dim", "block_matrix", "v = h W_v", {}),
    ("layers/query_norm", "layers head_dim", "vector", "RMSNorm(q)", _QK_NORM),
    ("layers/key_norm", "layers head_dim", "vector", "RMSNorm(k)", _QK_NORM),
    ("layers/s_qk", "layers kv_heads head_dim", "vector", "q, k times it (15, 16)", _scale("s_qk")),
    (f"layers/{FOLDED_MARK}", "layers heads head_dim", "vector", "q times it", {"folded": (True,)}),
    ("layers/out_kernel", "layers heads head_dim embed", "block_matrix", "h_A = heads W_o", {}),
    ("layers/alpha_a", "layers embed", "vector", "step to h_A (10)", _alpha("alpha_a")),
    ("layers/mlp_norm", "layers embed", "vector", "RMSNorm(h) (5)", _PRE_NORM),
    ("layers/up_kernel", "layers embed mlp", "block_matrix", "u = h W_u", {}),
    ("layers/gate_kernel", "layers embed mlp", "block_matrix", "nu = h W_nu", {}),
    ("layers/s_u", "layers mlp", "vector", "u times it (20)", _scale("s_u")),
    ("layers/s_v", "layers mlp", "vector", "nu times it and sqrt(width) (21)", _scale("s_v")),
    ("layers/down_kernel", "layers mlp embed", "block_matrix", "h_M = (u SiLU(nu)) W_oMLP", {}),
    ("layers/alpha_m", "layers embed", "vector", "step to h_M (11)", _alpha("alpha_m")),
    ("final_norm", "embed", "vector", "RMSNorm(h)", {"final_norm": ("rms",)}),
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
    return [p.of(config) for p in TABLE.values() if p.is_in(config)]


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


def has_scale(config: ModelConfig, name: str) -> bool:
    """Whether the network has this scale, learned or fixed, and not folded into a matrix."""
    folded = config.folded and not name.startswith("alpha")
    return getattr(config, name).form != "none" and not folded


def scale_factor(config: ModelConfig, name: str) -> float:
    """The effective value of a scale over its stored value (section 2.5)."""
    return initial_value(config, name) / getattr(config, name).scale


def initial_scale(config: ModelConfig, name: str) -> float:
    """The stored value of a scale at the start; of a fixed one always."""
    return getattr(config, name).scale


def fixed_scale(config: ModelConfig, name: str) -> jax.Array:
    """The stored value of a fixed scale in at least float32: (layers,), or () of s_z."""
    shape = () if name == "s_z" else (config.layers,)
    dtype = jnp.promote_types(config.param_dtype, jnp.float32)
    return jnp.full(shape, initial_scale(config, name), dtype)


def effective_scale(config: ModelConfig, name: str, stored: jax.Array) -> jax.Array:
    """The effective values (section 2.5) of a scale, one for each channel whatever its form.

    Args:
      config: of the model.
      name: of the scale.
      stored: in at least float32, (..., *channels) of a vector or (...) of another form, where ...
        are the layers, or nothing.

    Returns:
      (..., *channels) in the dtype of ``stored``.
    """
    value = stored * scale_factor(config, name)
    if getattr(config, name).form == "vector":
        return value
    sizes = axis_sizes(config)
    channels = tuple(sizes[axis] for axis in TABLE[name].module_axes)
    value = value.reshape(value.shape + (1,) * len(channels))
    return jnp.broadcast_to(value, value.shape[: -len(channels)] + channels)


def read_scale(config: ModelConfig, tree: Mapping[str, Any], name: str) -> jax.Array:
    """The effective values of a scale, (layers, *channels) or (vocab,), in at least float32.

    Args:
      config: of a model that has this scale.
      tree: the parameters among which a learned one is: all, or those under ``layers``.
      name: of the scale.
    """
    stored = sphere.promote(tree[name]) if name in tree else fixed_scale(config, name)
    return effective_scale(config, name, stored)


def depth_factors(config: ModelConfig) -> np.ndarray | None:
    """The factor (layers,) on the alphas of each layer in float64; None: 1 everywhere.

    The first layer has the factor 1. Both steps of a layer have the same.
    """
    k = 1.0 + np.arange(config.layers)
    factors = {"constant": None, "harmonic": 1 / k, "root": 1 / np.sqrt(k)}
    assert config.alpha_depth is not None
    return factors[config.alpha_depth]


def step_size(config: ModelConfig, alpha: Any, depth: Any) -> Any:
    """The step that the effective value of an alpha stands for, with its layer's factor."""
    alpha = abs(alpha) if config.alpha_sign == "absolute" else alpha
    return alpha if depth is None else alpha * depth


def learned_scales(
    config: ModelConfig, params: Any, widen: Callable[[Any], Any]
) -> Iterator[tuple[str, Any]]:
    """Yields the learned scales that a model has, (name, values as the network uses them).

    Args:
      config: of the model.
      params: its parameters.
      widen: a cast, of the stored values.

    The values are effective ones, in the shapes of the parameters without the padding of the
    vocabulary. Alphas are sizes of steps.
    """
    there = [TABLE[name].of(config) for name in SCALES if TABLE[name].is_in(config)]
    leaves = [params[p.name] if p.name == p.path else params["layers"][p.name] for p in there]
    stored = [real_vocab(leaf, p.axes, config) for leaf, p in zip(leaves, there)]
    depth = depth_factors(config)
    for p, leaf in zip(there, stored):
        value = widen(leaf) * scale_factor(config, p.name)
        if p.name.startswith("alpha"):
            of_layer = (-1, *(1,) * (value.ndim - 1))
            factor = None if depth is None else depth.reshape(of_layer).astype(value.dtype)
            value = step_size(config, value, factor)
        yield p.name, value
