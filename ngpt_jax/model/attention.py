"""Causal attention: one function, three kernels.

``xla`` runs everywhere and holds the scores in memory. ``splash`` is the Pallas kernel for TPUs and
``cudnn`` is cuDNN's flash attention; both compute scores block by block.

On a mesh the kernel runs inside ``shard_map``: each device has its rows, its heads (``tensor``) and
its positions (``context``). With several devices along ``context``, a device gathers the keys and
values of all positions for its queries. cuDNN takes no offset of positions, so there the devices
exchange heads for positions instead.
"""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from ngpt_jax import sphere
from ngpt_jax.config import ConfigError, ModelConfig
from ngpt_jax.parallel import rules

SAVED_NAME = "attention"  # of the result of xla and splash
_LANES = 128  # lanes of a TPU's vector unit; splash's blocks are multiples of this


_is_named = jax.checkpoint_policies.save_only_these_names(SAVED_NAME)


def keep_attention(primitive: Any, *args: Any, **params: Any) -> bool:
    """What remat=attention keeps: attention's result. cuDNN's is kept together with what else its
    backward pass reads; else it would be computed again for that.
    """
    of_cudnn = primitive.name.startswith("dot_product_attention_fwd")
    return of_cudnn or _is_named(primitive, *args, **params)


def choose_kernel(
    config: ModelConfig, mesh: Mesh | AbstractMesh, platform: str, capability: str | None = None
) -> tuple[str, str]:
    """The attention kernel for a model, and the reason for it.

    Args:
      config: resolved; ``config.attention`` is the name of a kernel or "auto".
      mesh: shards heads and positions.
      platform: of the mesh's devices, which need not be those of this process.
      capability: ``compute_capability`` of the devices, if they are GPUs and it is known.

    Raises:
      ConfigError: ``config.attention`` names a kernel that does not run there.
    """
    obstacles = {
        "splash": _splash_obstacle(config, mesh, platform),
        "cudnn": _cudnn_obstacle(config, mesh, platform, capability),
        "xla": None,
    }
    if config.attention != "auto":
        if (obstacle := obstacles[config.attention]) is not None:
            raise ConfigError(
                f"model.attention = {config.attention} cannot be used: {obstacle}; set it to auto"
                " or xla."
            )
        return config.attention, "as configured"
    best = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform, "xla")
    if (obstacle := obstacles[best]) is not None:
        return "xla", f"not {best}: {obstacle}"
    return best, f"auto on {platform}"


def softmax_scale(config: ModelConfig) -> float:
    """The factor on q k^T: sqrt(head_dim) or 1 / sqrt(head_dim). In folded weights it is in q."""
    assert config.head_dim is not None
    if config.folded:
        return 1.0
    root = math.sqrt(config.head_dim)
    return root if config.softmax_scale == "sqrt" else 1 / root


def kernel_of(config: ModelConfig, length: int) -> str:
    """The kernel for ``length`` positions: the config's, or with "auto" the choice for the devices
    of the current mesh. Without a mesh the devices are those of the process.

    A prompt can have a length that the config's kernel does not take: then it is xla.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if config.attention == "splash" and _shard_length(length, mesh) % _LANES:
        return "xla"
    if config.attention != "auto":
        return config.attention
    device = rules.current_device()
    capability = getattr(device, "compute_capability", None)
    config = dataclasses.replace(config, context=length)
    kernel, why = choose_kernel(config, mesh, device.platform, capability)
    logging.info("attention kernel: %s (%s)", kernel, why)
    return kernel


def _shard_length(length: int, mesh: Mesh | AbstractMesh) -> int:
    return length // rules.axis_size(mesh, "context")


def _splash_obstacle(config: ModelConfig, mesh, platform: str) -> str | None:
    assert config.head_dim is not None
    length = _shard_length(config.context, mesh)
    if platform != "tpu":
        return f"it is for TPUs, and the devices are of type {platform}"
    if config.dtype == "float64":
        return "it knows no float64"
    if config.head_dim % 64:
        return f"it needs head_dim 64 or a multiple, not {config.head_dim}"
    if length % _LANES:
        return f"it needs a multiple of {_LANES} positions a device, not {length}"
    return None


def _cudnn_obstacle(config: ModelConfig, mesh, platform: str, capability) -> str | None:
    assert config.head_dim is not None
    if platform not in ("gpu", "cuda"):
        return f"cuDNN is for NVIDIA GPUs, and the devices are of type {platform}"
    if capability is not None and not re.fullmatch(r"([89]|\d\d+)(\.\d)?", capability):
        return (
            f"it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or more, not {capability}"
        )
    if config.dtype != "bfloat16":
        return f"it computes in bfloat16, and model.dtype is {config.dtype}"
    if config.head_dim % 8 or config.head_dim > 128:
        return f"it needs head_dim at most 128 and a multiple of 8, not {config.head_dim}"
    heads = config.heads // rules.axis_size(mesh, "tensor")
    if heads % rules.axis_size(mesh, "context"):
        return (
            f"mesh.context = {rules.axis_size(mesh, 'context')} does not divide the {heads} heads"
            " of a device"
        )
    return None


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: float,
    segment_ids: jax.Array | None = None,
    kernel: str = "xla",
    interpret: bool = False,
) -> jax.Array:
    """softmax(scale * q k^T + causal mask) v, with the softmax in at least float32.

    Args:
      query: (B, T, heads, head_dim).
      key, value: (B, T, kv_heads, head_dim). Key head i serves heads / kv_heads query heads, the
        first of which is i * heads / kv_heads.
      scale: see :func:`softmax_scale`.
      segment_ids: (B, T) integers; a position attends to its own segment only. None: no segments.
      kernel: xla, splash or cudnn, see :func:`choose_kernel`.
      interpret: run splash's kernel without a TPU, slowly, for tests.

    Returns:
      (B, T, heads, head_dim) in the dtype of ``value``.
    """
    mesh = rules.current_mesh()
    length = query.shape[1]
    if mesh is not None and key.shape[2] % rules.axis_size(mesh, "tensor"):
        # Key heads that do not divide: give each query head a copy of its own, and shard those.
        key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    if mesh is None:
        positions = _Positions(length)
        blocks = _splash_kernel(query.shape, positions, interpret) if kernel == "splash" else None
        return _KERNELS[kernel](query, key, value, scale, segment_ids, positions, blocks)

    q_spec = rules.activation_spec(("batch", "length", "heads", "head_dim"), query.shape, mesh)
    kv_spec = rules.activation_spec(("batch", "length", "kv_heads", "head_dim"), key.shape, mesh)
    positions = _Positions(length, rules.axis_size(mesh, "context") if q_spec[1] else 1)
    blocks = blocks_spec = None
    if kernel == "splash":
        local_shape = jax.sharding.NamedSharding(mesh, q_spec).shard_shape(query.shape)
        blocks = _splash_kernel(local_shape, positions, interpret)
        blocks_spec = blocks.manual_sharding_spec(
            jax.sharding.NamedSharding(mesh, P(None, q_spec[1]))
        )

    def on_device(q, k, v, segments, blocks):
        if kernel == "cudnn" and positions.shards > 1:
            return _exchange_heads(q, k, v, scale, segments, positions)
        k, v = positions.gather(k), positions.gather(v)
        return _KERNELS[kernel](q, k, v, scale, segments, positions, blocks)

    return jax.shard_map(
        on_device,
        in_specs=(q_spec, kv_spec, kv_spec, P(q_spec[0], None), blocks_spec),
        out_specs=q_spec,
        check_vma=False,
    )(query, key, value, segment_ids, blocks)


@dataclasses.dataclass(frozen=True)
class _Positions:
    """The positions of this device's queries: one of ``shards`` equal shards of ``length``."""

    length: int
    shards: int = 1

    def first(self) -> jax.Array | int:
        if self.shards == 1:
            return 0
        return jax.lax.axis_index("context") * (self.length // self.shards)

    def gather(self, x: jax.Array) -> jax.Array:
        """An array (B, T / shards, ...) with all positions."""
        if self.shards == 1:
            return x
        return jax.lax.all_gather(x, "context", axis=1, tiled=True)

    def cut(self, x: jax.Array) -> jax.Array:
        """An array (B, T) with this device's positions only."""
        size = self.length // self.shards
        return jax.lax.dynamic_slice_in_dim(x, self.first(), size, axis=1)


def _exchange_heads(q, k, v, scale, segments, positions: _Positions) -> jax.Array:
    """Runs cuDNN on all positions of a part of the heads."""
    if k.shape[2] % positions.shards:
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    exchange = functools.partial(jax.lax.all_to_all, axis_name="context", tiled=True)
    q, k, v = (exchange(x, split_axis=2, concat_axis=1) for x in (q, k, v))
    out = _KERNELS["cudnn"](q, k, v, scale, segments, _Positions(positions.length), None)
    return exchange(out, split_axis=1, concat_axis=2)


# --------------------- the kernels: queries are (B, T / shards, ...), keys and values (B, T, ...)


def _xla(q, k, v, scale, segments, positions: _Positions, blocks: None) -> jax.Array:
    batch, num_queries, heads, head_dim = q.shape
    length, kv_heads = k.shape[1:3]
    # Heads before positions: then both products are batched matmuls without further copies.
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q, k, v))
    group = heads // kv_heads  # queries of a group share their keys: they are one matrix
    q = q.reshape(batch, kv_heads, group, num_queries, head_dim)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    queries = None if segments is None else positions.cut(segments)

    def attend(first: int, last: int, seen: int) -> jax.Array:
        """The result for the queries from first to last; they see keys before ``seen``."""
        block = q[..., first:last, :].reshape(batch, kv_heads, -1, head_dim)
        logits = scale * jnp.matmul(block, k[:, :, :seen].mT, preferred_element_type=dtype)
        rows = positions.first() + jnp.arange(first, last)
        visible = jnp.arange(seen) <= rows[:, None]
        if queries is not None:
            own = queries[:, first:last, None] == segments[:, None, :seen]
            visible = (visible & own)[:, None]
        visible = jnp.concatenate([visible] * group, axis=-2)  # (..., group * t, seen)
        # -inf, not a large number: every row sees at least itself, and exp(-inf) is exactly 0.
        probs = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
        out = probs.astype(v.dtype) @ v[:, :, :seen]
        return out.reshape(batch, heads, -1, head_dim)

    # In blocks of queries, each with only the keys that it can see. That saves up to half of the
    # work and most of the memory. With sharded positions the keys are not known at compile time.
    count = 1 if positions.shards > 1 else max(1, min(8, length // 128))
    size = -(-length // count)
    ends = [num_queries] if count == 1 else [min(size * (i + 1), length) for i in range(count)]
    starts = [0, *ends[:-1]]
    parts = [attend(i, j, length if count == 1 else j) for i, j in zip(starts, ends)]
    return jnp.moveaxis(jnp.concatenate(parts, axis=2), 1, 2)


def block_size(length: int) -> int:
    """Positions in a block of splash attention: the largest of 512, 256, 128 that divides them."""
    return next(size for size in (512, 256, _LANES) if length % size == 0)


def _splash_kernel(shape: tuple[int, ...], positions: _Positions, interpret: bool) -> Any:
    """Splash's kernel for queries of this shape on a device: a pytree with the mask's blocks."""
    # Imported here because Pallas takes a second to load.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    _, num_queries, heads, _ = shape
    q, kv = block_size(num_queries), block_size(positions.length)
    causal = splash_attention_mask.CausalMask((positions.length, positions.length))
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([causal] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv
        ),
        head_shards=1,  # the mask is the same for all heads
        q_seq_shards=positions.shards,
        residual_checkpoint_name=SAVED_NAME,
        interpret=interpret,
    )


def _splash(q, k, v, scale, segments, positions: _Positions, blocks: Any) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    q = (sphere.promote(q) * scale).astype(q.dtype)  # the kernel has no scale of its own
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q, k, v))  # (B, heads, T, head_dim)
    ids = None
    if segments is not None:
        ids = splash_attention_kernel.SegmentIds(q=positions.cut(segments), kv=segments)
    return jnp.moveaxis(jax.vmap(blocks)(q, k, v, ids), 1, 2).astype(v.dtype)


def _cudnn(q, k, v, scale, segments, positions: _Positions, blocks: None) -> jax.Array:
    mask = None if segments is None else segments[:, None, :, None] == segments[:, None, None, :]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=scale, is_causal=True, implementation="cudnn"
    )


_KERNELS = {"xla": _xla, "splash": _splash, "cudnn": _cudnn}
