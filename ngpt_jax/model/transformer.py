"""One Transformer, two kinds: nGPT and the GPT baseline of its paper.

Every parameter is declared once with the names of its axes; shapes, the axis of unit norm,
optimizer groups and the parameter table follow from the names. Equation numbers are those
of https://arxiv.org/abs/2410.01131.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ngpt_jax import sphere
from ngpt_jax.config import ConfigError, ModelConfig, Scale
from ngpt_jax.decoding.cache import LayerCache, Slots, attend_to_cache, write
from ngpt_jax.model.attention import SAVED_NAME, causal_attention, kernel_of
from ngpt_jax.model.embedding import embed_tokens
from ngpt_jax.model.rotary import apply_rope, rope_tables
from ngpt_jax.parallel import rules

Axes = tuple[str, ...]
# The one factor on q in weights whose scales are folded: by its name such weights are known.
FOLDED_MARK = "folded_qk_scale"

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED_NAME),
    "full": jax.checkpoint_policies.nothing_saveable,
}


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


def _declare(module: nn.Module, config: ModelConfig, name: str, axes: Axes, init: Any) -> Any:
    sizes = axis_sizes(config)
    shape = tuple(sizes[axis] for axis in axes)
    boxed = nn.with_logical_partitioning(init, axes)
    return module.param(name, boxed, shape, jnp.dtype(config.param_dtype))


def matrix(
    module: nn.Module,
    config: ModelConfig,
    name: str,
    axes: Axes,
    std_factor: float = 1.0,
    factor: jax.Array | None = None,
) -> jax.Array:
    """A matrix in the compute dtype: in nGPT a set of unit vectors along its embed axis.

    It is gathered where it is used: see :meth:`Block._linear`, embedding and loss.

    The parameter transform: vectors are put on the sphere at init, and, with
    ``normalize_on_read``, again wherever they are read, so that gradients are tangent.

    Args:
      module, config: where the parameter lives.
      name, axes: of the parameter.
      std_factor: of the initial standard deviation.
      factor: scales the vectors, broadcast against the matrix. (h W) * s = h (W * s), and
        there are fewer weights than activations to multiply.
    """
    assert config.init_std is not None
    axis = axes.index("embed")
    normal = nn.initializers.normal(config.init_std * std_factor)

    def init(key, shape, dtype):
        w = normal(key, shape, jnp.promote_types(dtype, jnp.float32))
        return (sphere.normalize(w, axis) if config.kind == "ngpt" else w).astype(dtype)

    w = _declare(module, config, name, axes, init)
    if config.normalize_on_read:
        w = sphere.normalize(w, axis)
    if factor is not None:
        w = sphere.promote(w) * factor
    return w.astype(config.dtype)


def scale(module: nn.Module, config: ModelConfig, name: str, axes: Axes, spec: Scale) -> jax.Array:
    """A learned scale, effective value in at least float32 (section 2.5)."""
    assert spec.scale is not None
    raw = _declare(module, config, name, axes, nn.initializers.constant(spec.scale))
    return sphere.promote(raw) * (spec.init / spec.scale)


def gain(module: nn.Module, config: ModelConfig, name: str, axis: str) -> jax.Array:
    """The learned gain of an RMSNorm, in at least float32."""
    return sphere.promote(_declare(module, config, name, (axis,), nn.initializers.ones))


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * gain over the last axis, in at least float32."""
    x32 = sphere.promote(x)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean_square + eps) * gain).astype(x.dtype)


def linear(x: jax.Array, kernel: jax.Array, contracted: int = 1) -> jax.Array:
    """Contracts the last axes of x (B, T, ...) with the first ones of a kernel.

    Written as one product of two matrices: XLA's CPU backend takes a third longer for the
    same product over more axes, forward and backward. Where the mesh cuts rows and positions
    both, they cannot be made one axis without communication.
    """
    if rules.axis_size(rules.current_mesh(), "context") > 1:
        return jnp.tensordot(x, kernel, contracted)
    size = math.prod(kernel.shape[:contracted])
    flat = x.reshape(-1, size) @ kernel.reshape(size, -1)
    return flat.reshape(*x.shape[:2], *kernel.shape[contracted:])


class Block(nn.Module):
    """Attention and MLP, each followed by a step of the hidden state h (B, T, embed).

    nGPT:  h <- Norm(h + alpha * (Norm(f(h)) - h))     equations 10 and 11
    GPT:   h <- h + f(RMSNorm(h))                      equations 4 and 5

    With a cache, attention also sees what is in it; returned beside h is the cache with the keys
    and values of these positions.

    Attributes:
      config: of the model.
      after_first: h comes from a block, and is a unit vector but for rounding: its norm is left
        out, which in decoding costs as much as a small product. Training keeps it.
    """

    config: ModelConfig
    after_first: bool = False

    @nn.compact
    def __call__(
        self,
        h: jax.Array,
        tables: tuple[jax.Array, jax.Array],
        segment_ids: jax.Array | None,
        cache: LayerCache | None = None,
        slots: Slots | None = None,
    ):
        c = self.config
        x = self._norm(h, "attention_norm")
        proposal, cache = self._attention(x, tables, segment_ids, cache, slots)
        if c.kind == "ngpt" and not self.after_first:
            # h is a unit vector; in the first block this takes the radial part of this step
            # out of the gradient of the token table, as the authors' code does.
            h = sphere.normalize(h)
        middle = self._step(h, proposal, "alpha_a")
        self._sow_angles("attention", h, proposal, middle)
        proposal = self._mlp(self._norm(middle, "mlp_norm"))
        h = self._step(middle, proposal, "alpha_m")
        self._sow_angles("mlp", middle, proposal, h)
        h = rules.constrain(h, "batch", "length", "embed")
        self.sow("intermediates", "hidden", h)
        return h.astype(c.dtype), cache  # (carry, to stack or None): the form nn.scan wants

    def _norm(self, x: jax.Array, name: str, axis: str = "embed") -> jax.Array:
        c = self.config
        return x if c.kind == "ngpt" else rms_norm(x, gain(self, c, name, axis), c.rms_eps)

    def _step(self, h: jax.Array, proposal: jax.Array, name: str) -> jax.Array:
        c = self.config
        if c.kind == "gpt":
            return h + proposal
        alpha = jnp.abs(scale(self, c, name, ("embed",), getattr(c, name)))
        return sphere.lerp(h, sphere.normalize(sphere.promote(proposal)), alpha)

    def _sow_angles(self, name: str, h: jax.Array, proposal: jax.Array, moved: jax.Array) -> None:
        """(B, T, 2) radians from h to the proposal and to where the step leads, where asked for.

        Angles, not the states: those of all layers together would be large.
        """
        if self.is_mutable_collection("angles"):
            a, b, c = (sphere.normalize(sphere.promote(x)) for x in (h, proposal, moved))
            self.sow("angles", name, jnp.stack([sphere.angle(a, b), sphere.angle(a, c)], axis=-1))

    def _linear(self, x: jax.Array, name: str, axes: Axes, contracted: int = 1, **how) -> jax.Array:
        """The product of x (B, T, ...) and a matrix that is gathered for it alone."""
        c = self.config
        w = matrix(self, c, name, axes, **how)

        def product(x, w):
            return linear(x, rules.gather(w, axes), contracted)

        if c.remat == "none" and rules.axis_size(rules.current_mesh(), "fsdp") > 1:
            # Or the gathered matrices of all layers would wait for the backward pass.
            w = rules.lay_out(w, axes)
            product = jax.checkpoint(product, prevent_cse=not c.scan_layers)
        return product(x, w)

    def _attention(
        self, h: jax.Array, tables, segment_ids, cache: LayerCache | None, slots: Slots | None
    ) -> tuple[jax.Array, LayerCache | None]:
        c = self.config
        assert c.head_dim is not None and c.kv_heads is not None
        q = self._linear(h, "query_kernel", ("embed", "heads", "head_dim"))
        k = self._linear(h, "key_kernel", ("embed", "kv_heads", "head_dim"))
        v = self._linear(h, "value_kernel", ("embed", "kv_heads", "head_dim"))
        if c.kind == "ngpt":
            q, k = apply_rope(q, tables), apply_rope(k, tables)
            q, k = self._unit_heads(q), self._unit_heads(k)
            if c.folded:
                factor = _declare(self, c, FOLDED_MARK, ("heads", "head_dim"), nn.initializers.ones)
                q = (sphere.promote(q) * rules.gather(factor, ("heads", "head_dim"))).astype(
                    q.dtype
                )
                softmax_scale = 1.0
            else:
                # The same s_qk scales q and k (equations 15, 16): (q s) . (k s) = q . (k s^2).
                s_qk = scale(self, c, "s_qk", ("kv_heads", "head_dim"), c.s_qk)
                s_qk = rules.gather(s_qk, ("kv_heads", "head_dim"))
                k = (sphere.promote(k) * jnp.square(s_qk)).astype(k.dtype)
                softmax_scale = math.sqrt(c.head_dim)
        else:
            if c.qk_norm:
                q = self._norm(q, "query_norm", "head_dim")
                k = self._norm(k, "key_norm", "head_dim")
            q, k = apply_rope(q, tables), apply_rope(k, tables)
            softmax_scale = 1 / math.sqrt(c.head_dim)
        self.sow("intermediates", "query", q)
        self.sow("intermediates", "key", k)
        if cache is not None:
            assert slots is not None
            cache = write(cache, k, v, slots)
        # (B, T, heads, head_dim)
        if cache is None or slots is None or slots.empty:
            kernel_name = kernel_of(c, h.shape[1])
            out = causal_attention(q, k, v, softmax_scale, segment_ids, kernel_name)
        else:
            out = attend_to_cache(q, cache, softmax_scale, slots)
        out = checkpoint_name(out, SAVED_NAME)
        axes = ("heads", "head_dim", "embed")
        out = self._linear(out, "out_kernel", axes, contracted=2, std_factor=self._out_std())
        return rules.constrain(out, "batch", "length", "embed"), cache

    def _unit_heads(self, x: jax.Array) -> jax.Array:
        return sphere.normalize(x) if self.config.qk_norm else x

    def _mlp(self, h: jax.Array) -> jax.Array:
        c = self.config
        s_u = s_v = None
        if c.kind == "ngpt" and not c.folded:  # equations 20, 21; sqrt(d) matters for v alone
            s_u = scale(self, c, "s_u", ("mlp",), c.s_u)
            s_v = scale(self, c, "s_v", ("mlp",), c.s_v) * math.sqrt(c.width)
        u = self._linear(h, "up_kernel", ("embed", "mlp"), factor=s_u)
        v = self._linear(h, "gate_kernel", ("embed", "mlp"), factor=s_v)
        hidden = rules.constrain(u * nn.silu(v), "batch", "length", "mlp")
        out = self._linear(hidden, "down_kernel", ("mlp", "embed"), std_factor=self._out_std())
        return rules.constrain(out, "batch", "length", "embed")

    def _out_std(self) -> float:
        return (2 * self.config.layers) ** -0.5


class Transformer(nn.Module):
    """Token ids (B, T) to logits (B, T, padded vocab).

    Parameters are a plain nested dict; those of the blocks are stacked along a first axis
    "layers", whether the blocks are scanned or unrolled.
    """

    config: ModelConfig

    def setup(self):
        c = self.config
        self.input_table = matrix(self, c, "input_embedding", ("vocab", "embed"))
        block = Block
        if c.remat != "none":
            policy = REMAT_POLICIES[c.remat]
            block = nn.remat(Block, prevent_cse=not c.scan_layers, policy=policy)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0, "angles": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=c.layers,
            unroll=1 if c.scan_layers else c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        s_z = None
        if c.kind == "ngpt" and not c.folded:
            s_z = scale(self, c, "s_z", ("vocab",), c.s_z)[:, None]
        if c.kind == "gpt":
            self.final_gain = gain(self, c, "final_norm", "embed")
        self.output_table = matrix(self, c, "output_embedding", ("vocab", "embed"), factor=s_z)

    def hidden(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """The last hidden states (B, T, embed), ready for the output table.

        Args:
          tokens: (B, T) ids.
          segment_ids: (B, T); attention stays within positions of the same id.
          positions: (B, T) for RoPE; None: 0 to T - 1 in each window.
        """
        c = self.config
        assert c.head_dim is not None
        h = embed_tokens(self.input_table, tokens)
        self.sow("intermediates", "embedded", h)
        dtype = jnp.promote_types(c.dtype, jnp.float32)
        where = jnp.arange(tokens.shape[1]) if positions is None else positions
        tables = rope_tables(where, c.head_dim, c.rope_base, dtype)
        h, _ = self.layers(h, tables, segment_ids)
        return rms_norm(h, self.final_gain, c.rms_eps) if c.kind == "gpt" else h

    def hidden_and_table(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The last hidden states and the output table (vocab, embed), times s_z in nGPT."""
        return self.hidden(tokens, segment_ids, positions), self.output_table

    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Logits in at least float32 (equations 1 and 3); those of padding are -inf."""
        h, table = self.hidden_and_table(tokens, segment_ids, positions)
        return output_logits(self.config, h, table)


def output_logits(config: ModelConfig, h: jax.Array, table: jax.Array) -> jax.Array:
    """Logits (B, T, padded vocab) in at least float32; those of padding are -inf."""
    assert config.vocab_size is not None
    dtype = jnp.promote_types(config.dtype, jnp.float32)
    logits = jnp.einsum("btd,vd->btv", h, table, preferred_element_type=dtype)
    real = jnp.arange(table.shape[0]) < config.vocab_size
    return jnp.where(real, logits, -jnp.inf)


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Parameters as a plain nested dict, on the sphere for nGPT; raises ConfigError if folded."""
    refuse_folded(config)
    return nn.unbox(_init_boxed(config, key))


def _init_boxed(config: ModelConfig, key: jax.Array):
    tokens = jnp.zeros((1, 2), jnp.int32)
    config = dataclasses.replace(config, attention="xla", remat="none")  # of no effect on init
    return Transformer(config).init(key, tokens)["params"]


@functools.cache
def param_axes(config: ModelConfig) -> dict[str, Any]:
    """A tree like the parameters with each leaf's axis names, a tuple of strings."""
    boxed = jax.eval_shape(functools.partial(_init_boxed, config), jax.random.key(0))
    specs = nn.get_partition_spec(boxed)
    return jax.tree.map(tuple, specs, is_leaf=lambda s: isinstance(s, jax.sharding.PartitionSpec))


def refuse_folded(config: ModelConfig) -> None:
    if config.folded:
        raise ConfigError(
            "model.folded: these weights have their scales multiplied in, which is for inference"
            " alone; train from the raw ones."
        )


def is_axes(leaf: Any) -> bool:
    """For ``is_leaf``: a leaf of :func:`param_axes`."""
    return isinstance(leaf, tuple) and all(isinstance(a, str) for a in leaf)


def is_matrix(axes: Axes) -> bool:
    """A matrix has the embed axis and one other besides layers; all else is a scale vector."""
    return "embed" in axes and len(set(axes) - {"layers"}) > 1


def unit_axes(config: ModelConfig) -> dict[str, Any]:
    """A tree like the parameters with the axis of unit norm, None for vectors and for GPT.

    This is what :func:`ngpt_jax.projection.keep_params_on_sphere` takes. Raises ConfigError for
    folded weights, whose vectors have other norms.
    """
    refuse_folded(config)

    def unit_axis(axes: Axes) -> int | None:
        return axes.index("embed") if config.kind == "ngpt" and is_matrix(axes) else None

    return jax.tree.map(unit_axis, param_axes(config), is_leaf=is_axes)


def compute_params(config: ModelConfig, params: Any) -> Any:
    """Parameters as the network reads them: matrices rounded to the compute dtype.

    Cast once for all passes of a step; gradients with respect to the result have the compute
    dtype too. With ``normalize_on_read`` a matrix is normalized first and rounded where it is read.
    """
    if config.normalize_on_read:
        return params

    def cast(p, axes):
        return p.astype(config.dtype) if is_matrix(axes) else p

    return jax.tree.map(cast, params, param_axes(config))


def real_vocab(leaf: Any, axes: Axes, config: ModelConfig) -> Any:
    """A parameter without the rows of padding, for counts, means and exports."""
    if "vocab" not in axes:
        return leaf
    index = [slice(None)] * len(axes)
    index[axes.index("vocab")] = slice(config.vocab_size)
    return leaf[tuple(index)]


def num_params(config: ModelConfig) -> int:
    """Parameters of the model, padding left out."""
    sizes = axis_sizes(config) | {"vocab": config.vocab_size}
    leaves = jax.tree.leaves(param_axes(config), is_leaf=is_axes)
    return sum(math.prod(sizes[a] for a in axes) for axes in leaves)
