"""The Transformer. Choices in its config make it nGPT, the GPT baseline of its paper, or a variant.

Its parameters, and which choice brings each, stand in :mod:`ngpt_jax.model.params`. Equation
numbers are those of https://arxiv.org/abs/2410.01131.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ngpt_jax import sphere
from ngpt_jax.config import ModelConfig
from ngpt_jax.model import fused, heads, norms
from ngpt_jax.model.attention import (
    SAVED_NAME,
    causal_attention,
    keep_attention,
    kernel_of,
    softmax_scale,
)
from ngpt_jax.model.declare import declare, gain, matrix, scale
from ngpt_jax.model.embedding import embed_tokens
from ngpt_jax.model.params import FOLDED_MARK, TABLE, depth_factors, refuse_folded, step_size
from ngpt_jax.model.rotary import rope_tables
from ngpt_jax.parallel import rules

# inputs and targets (B, T) int32.
# weights (B, T) float32, if some targets do not count: 0 on padding.
# segment_ids (B, T) int32, if attention stays within documents: padding has an id of its own.
# positions (B, T) int32 in the document, together with segment_ids. GPT needs only differences of
# positions, but nGPT scales rotated channels by s_qk, so that the start of a document matters.
Batch = dict[str, jax.Array]
Ids = jax.Array | None  # (B, T) int32

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": keep_attention,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def _scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    """x times a factor, in the dtype of x."""
    return (sphere.promote(x) * factor).astype(x.dtype)


def _remats(config: ModelConfig) -> bool:
    """Whether blocks are computed again in the backward pass; auto that nobody decided is none."""
    return config.remat not in ("none", "auto")


def _copies(config: ModelConfig) -> int:
    """How many equal hidden states a block gives to the next.

    With fused kernels one for each reader, which are the products for q with k, that for v and the
    residual step: the step before adds their gradients. But a scan, or remat, would keep them all.
    """
    fuses = config.kernels == "pallas" and config.pre_norm == "none"
    return 3 if fuses and _unrolls(config) and not _remats(config) else 1


def _unrolls(config: ModelConfig) -> bool:
    return config.scan_layers is False  # None that nobody decided: scanned


def linear(x: jax.Array, kernel: jax.Array, contracted: int = 1) -> jax.Array:
    """The product of x (B, T, ...) and a kernel, over the last axes of x.

    It is written as a product of two matrices, because XLA's CPU backend takes a third longer for
    the same product over more axes, forward and backward. A mesh that shards positions is an
    exception: there, making one axis of rows and positions would need communication.
    """
    if rules.axis_size(rules.current_mesh(), "context") > 1:
        return jnp.tensordot(x, kernel, contracted)
    size = math.prod(kernel.shape[:contracted])
    flat = x.reshape(-1, size) @ kernel.reshape(size, -1)
    return flat.reshape(*x.shape[:2], *kernel.shape[contracted:])


def add(h: jax.Array, f: jax.Array, alpha: None) -> jax.Array:
    """h + f in the dtype of h."""
    del alpha
    return (h + f).astype(h.dtype)


# model.residual -> the function (h, f, alpha) that moves the hidden state h by a branch's output f.
RESIDUALS: dict[str, Callable[[jax.Array, jax.Array, Any], jax.Array]] = {
    "add": add,
    "lerp": norms.lerp,
    "slerp": sphere.slerp,
    "exp": norms.exponential_step,
}


class Block(nn.Module):
    """Two branches, attention and MLP. After each, the hidden state h (B, T, embed) makes a step.

    nGPT:  h <- Norm(h + alpha * (Norm(f(h)) - h))     equations 10 and 11
    GPT:   h <- h + f(RMSNorm(h))                      equations 4 and 5

    The config's choices decide which norms and scales there are. One whose parameter is not in
    the model does nothing.

    Attributes:
      config: of the model.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        hidden: tuple[jax.Array, ...],
        tables: tuple[jax.Array, jax.Array],
        segment_ids: jax.Array | None = None,
        depth: jax.Array | None = None,
    ) -> tuple[tuple[jax.Array, ...], None]:
        """Both steps of h.

        Args:
          hidden: h (B, T, embed), once or as often as :func:`_copies` says, all equal.
          tables: cosines and sines of RoPE.
          segment_ids: (B, T); attention stays within positions of the same id. None: no limits.
          depth: factor on this layer's alphas, a number. None: 1.

        Returns:
          h as it came, and None: the form that nn.scan wants.
        """
        c = self.config
        copies, h = len(hidden), hidden[0]
        x = self._rms_norm(h, "attention_norm")
        f = self._attention(x, x if copies == 1 else hidden[1], tables, segment_ids)
        h = hidden[-1]
        # In nGPT h is a unit vector already. In the first block its norm takes the radial part of
        # this step out of the gradient of the input table, as in the authors' code.
        if c.residual == "add" and c.branch_norm == "none" and c.pre_norm == "rms":
            mlp_gain = gain(self, c, "mlp_norm")
            assert mlp_gain is not None
            middle, x = fused.add_rms_norm(c, h, f, mlp_gain)
        else:
            x, middle = self._step(h, f, "alpha_a", depth, 2, normalize_h=True)
            x = self._rms_norm(x, "mlp_norm")
        self._sow_angles("attention", h, f, middle)
        f = self._mlp(x)
        hidden = self._step(middle, f, "alpha_m", depth, copies)
        self._sow_angles("mlp", middle, f, hidden[0])
        hidden = tuple(rules.constrain(h, "batch", "length", "embed") for h in hidden)
        self.sow("intermediates", "hidden", hidden[0])
        return tuple(h.astype(c.dtype) for h in hidden), None

    def _rms_norm(self, x: jax.Array, name: str) -> jax.Array:
        c = self.config
        return norms.rms_norm(x, gain(self, c, name), c.rms_eps)

    def _step(
        self,
        h: jax.Array,
        f: jax.Array,
        name: str,
        depth: jax.Array | None,
        copies: int,
        normalize_h: bool = False,
    ) -> tuple[jax.Array, ...]:
        """Copies of the hidden state h, normalized first or not, moved by a branch's output f."""
        c = self.config
        assert c.residual is not None
        alpha = scale(self, c, name)
        alpha = alpha if alpha is None else step_size(c, alpha, depth)
        if c.residual == "lerp" and c.branch_norm == "unit":
            assert alpha is not None
            return fused.residual_step(c, h, f, alpha, normalize_h, copies)
        if c.residual != "add" and normalize_h:
            h = norms.unit(h)
        if c.branch_norm == "unit":
            f = norms.unit(sphere.promote(f))
        return (RESIDUALS[c.residual](h, f, alpha),) * copies

    def _sow_angles(self, name: str, h: jax.Array, f: jax.Array, moved: jax.Array) -> None:
        """Sows the angles (B, T, 2) from h to f and from h to moved, in radians, if asked for.

        Angles and not states, because the states of all layers together would be large.
        """
        if self.is_mutable_collection("angles"):
            a, b, c = (sphere.normalize(sphere.promote(x)) for x in (h, f, moved))
            self.sow("angles", name, jnp.stack([sphere.angle(a, b), sphere.angle(a, c)], axis=-1))

    def _linear(self, x: jax.Array, name: str, contracted: int = 1) -> Any:
        """The product of x (B, T, ...) and a matrix."""
        w = matrix(self, self.config, name)
        return self._product(x, w, TABLE[name].module_axes, contracted)

    def _product(self, x: jax.Array, w: jax.Array, axes: tuple[str, ...], contracted: int = 1):
        """The product of x (B, T, ...) and w, which is gathered over fsdp for it."""
        c = self.config

        def product(x, w):
            return linear(x, rules.gather(w, axes), contracted)

        if not _remats(c) and rules.axis_size(rules.current_mesh(), "fsdp") > 1:
            # Gather again in the backward pass, or the gathered matrices of all layers would be
            # in memory until then.
            w = rules.lay_out(w, axes)
            product = jax.checkpoint(product, prevent_cse=_unrolls(c))
        return product(x, w)

    def _attention(self, x: jax.Array, x_v: jax.Array, tables, segment_ids) -> jax.Array:
        """What attention returns; x_v equals x and is read for the values."""
        c = self.config
        # The order in which parameters are declared decides their random numbers.
        w_q, w_k, w_v = (matrix(self, c, f"{name}_kernel") for name in ("query", "key", "value"))
        qk, rotate = self._query_key(x, w_q, w_k, tables)
        v = self._product(x_v, w_v, TABLE["value_kernel"].module_axes)
        if self.is_mutable_collection("intermediates"):  # else there is nothing to trace twice
            for name, y in zip(("query", "key"), rotate(qk)):
                self.sow("intermediates", name, y)
        kernel = kernel_of(c, x.shape[1])

        def attend(qk, v):
            return causal_attention(*rotate(qk), v, softmax_scale(c), segment_ids, kernel)

        if kernel == "splash" and not _remats(c):
            # Else q, k and v would be kept as the kernel wants them, heads of 64 padded to 128
            # lanes, besides q and k before the rotation.
            attend = jax.checkpoint(
                attend, prevent_cse=_unrolls(c), policy=REMAT_POLICIES["attention"]
            )
        out = attend(qk, v)  # (B, T, heads, head_dim)
        if kernel != "cudnn":  # whose own result is kept, and need not be twice
            out = checkpoint_name(out, SAVED_NAME)
        out = self._linear(out, "out_kernel", contracted=2)
        return rules.constrain(out, "batch", "length", "embed")

    def _query_key(self, x: jax.Array, w_q: jax.Array, w_k: jax.Array, tables) -> tuple[Any, Any]:
        """The products of x for q and k, and the function that makes q and k of them for attention.

        As one product its result holds for each key head the queries that it serves, then itself.
        Where the mesh does not divide the key heads, there are two products.
        """
        c = self.config
        assert c.kv_heads and c.head_dim
        form, scales = "unit_after_rope" if c.qk_norm else "none", None
        if c.qk_norm and c.qk_form == "rms_before_rope":
            form, scales = c.qk_form, (gain(self, c, "query_norm"), gain(self, c, "key_norm"))
        factors = self._factors_of_heads()
        if scales is None:
            scales, factors = factors, (None, None)

        def scaled(q_k):
            return tuple(y if f is None else _scaled(y, f) for y, f in zip(q_k, factors))

        def rotate_both(both):
            return scaled(fused.rotate_heads(c, both, tables, *scales, form))

        def rotate_each(q_k):
            rotated = (heads.rotate(y, *tables, f, form, c.rms_eps) for y, f in zip(q_k, scales))
            return scaled(rotated)

        divided = c.kv_heads % rules.axis_size(rules.current_mesh(), "tensor") == 0
        if fused.joins_products(c) and divided:
            w_q = w_q.reshape(c.width, c.kv_heads, -1, c.head_dim)
            w = jnp.concatenate([w_q, w_k[:, :, None]], axis=2)
            axes = ("embed", "kv_heads", "joined", "head_dim")
            return self._product(x, w, axes), rotate_both
        names = ("query_kernel", "key_kernel")
        products = (
            self._product(x, w, TABLE[name].module_axes) for name, w in zip(names, (w_q, w_k))
        )
        return tuple(products), rotate_each

    def _factors_of_heads(self) -> tuple[jax.Array | None, jax.Array | None]:
        """What multiplies q (heads, head_dim) and k (kv_heads, head_dim) after RoPE; None: 1."""
        c = self.config
        if c.folded:
            factor = declare(self, c, FOLDED_MARK, nn.initializers.ones)
            return rules.gather(factor, TABLE[FOLDED_MARK].module_axes), None
        s_qk = scale(self, c, "s_qk")
        if s_qk is None:
            return None, None
        # The same s_qk scales q and k (equations 15, 16): (q s) . (k s) = q . (k s^2).
        return None, jnp.square(rules.gather(s_qk, TABLE["s_qk"].module_axes))

    def _mlp(self, x: jax.Array) -> jax.Array:
        c = self.config
        s_u, s_v = scale(self, c, "s_u"), scale(self, c, "s_v")  # equations 20, 21
        if s_v is not None:
            s_v = s_v * math.sqrt(c.width)  # SiLU depends on the size of its input
        up, gate = matrix(self, c, "up_kernel", s_u), matrix(self, c, "gate_kernel", s_v)
        if fused.joins_products(c):
            both = self._product(x, jnp.stack([up, gate], axis=1), ("embed", "joined", "mlp"))
            hidden = fused.joined_swiglu(c, both)
        else:
            axes = ("embed", "mlp")
            hidden = norms.swiglu(self._product(x, up, axes), self._product(x, gate, axes))
        hidden = rules.constrain(hidden, "batch", "length", "mlp")
        out = self._linear(hidden, "down_kernel")
        return rules.constrain(out, "batch", "length", "embed")


class Transformer(nn.Module):
    """From token ids (B, T) to logits (B, T, padded vocab).

    Parameters are a plain nested dict. Those of the blocks are stacked along a first axis
    "layers", whether the blocks are scanned or unrolled.
    """

    config: ModelConfig

    def setup(self):
        c = self.config
        self.input_table = matrix(self, c, "input_embedding")
        block = Block
        if _remats(c):
            policy = REMAT_POLICIES[c.remat]
            block = nn.remat(Block, prevent_cse=_unrolls(c), policy=policy)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0, "angles": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=c.layers,
            unroll=c.layers if _unrolls(c) else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        s_z = scale(self, c, "s_z")
        self.final_gain = gain(self, c, "final_norm")
        self.output_table = matrix(
            self, c, "output_embedding", factor=None if s_z is None else s_z[:, None]
        )

    def hidden_and_table(
        self, tokens: jax.Array, segment_ids: Ids = None, positions: Ids = None
    ) -> tuple[jax.Array, jax.Array]:
        """The last hidden states (B, T, embed), and the output table (vocab, embed) times s_z.

        Args:
          tokens: (B, T) ids.
          segment_ids: (B, T); attention stays within positions of the same id.
          positions: (B, T) for RoPE; None: 0 to T - 1 in each sequence.
        """
        c = self.config
        assert c.head_dim is not None
        h = embed_tokens(self.input_table, tokens)
        self.sow("intermediates", "embedded", h)
        dtype = jnp.promote_types(c.dtype, jnp.float32)
        where = jnp.arange(tokens.shape[1]) if positions is None else positions
        tables = rope_tables(where, c.head_dim, c.rope_base, dtype)
        factors = depth_factors(c)
        wide = jnp.promote_types(c.param_dtype, jnp.float32)
        depth = None if factors is None else jnp.asarray(factors, wide)
        hidden, _ = self.layers((h,) * _copies(c), tables, segment_ids, depth)
        return norms.rms_norm(hidden[0], self.final_gain, c.rms_eps), self.output_table

    def __call__(
        self, tokens: jax.Array, segment_ids: Ids = None, positions: Ids = None
    ) -> jax.Array:
        """Logits (B, T, padded vocab) in at least float32 (equations 1 and 3), -inf for padding."""
        h, table = self.hidden_and_table(tokens, segment_ids, positions)
        return output_logits(self.config, h, table)


def output_logits(config: ModelConfig, h: jax.Array, table: jax.Array) -> jax.Array:
    """Logits (B, T, padded vocab) in at least float32, -inf for ids that pad the vocabulary."""
    assert config.vocab_size is not None
    dtype = jnp.promote_types(config.dtype, jnp.float32)
    logits = jnp.einsum("btd,vd->btv", h, table, preferred_element_type=dtype)
    real = jnp.arange(table.shape[0]) < config.vocab_size
    return jnp.where(real, logits, -jnp.inf)


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Random parameters as a plain nested dict; raises ConfigError for a folded config."""
    refuse_folded(config)
    config = dataclasses.replace(config, attention="xla", remat="none")  # of no effect on init
    return nn.unbox(Transformer(config).init(key, jnp.zeros((1, 2), jnp.int32))["params"])
