"""Cross-entropy in chunks of tokens, so that only the logits of one chunk are in memory.

The gradient is computed together with the loss: a chunk's logits are used for both and dropped, and
nothing is computed twice.

On a mesh each device makes chunks of its own tokens. The table is gathered over ``fsdp`` once
before the loop, and its gradient is reduced once after the loop. Where ``tensor`` shards the
vocabulary, the loop communicates a maximum and two sums for each token, and nothing else.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ngpt_jax.model.embedding import gather_rows, local_rows, scatter_rows, table_spec
from ngpt_jax.parallel import rules


def num_chunks(batch: int, length: int, chunk: int) -> int:
    """The smallest divisor of ``length`` that gives at most ``chunk`` tokens in a chunk."""
    wanted = -(-batch * length // chunk)
    return next(n for n in range(min(wanted, length), length + 1) if length % n == 0)


def _max_and_sum(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The maximum m of each row and the sum of exp(logit - m), each (N, 1); all logits finite.

    In one pass over the logits on NVIDIA GPUs. Elsewhere in two: a TPU takes the maximum while it
    writes the product, and CPUs vectorize no sum of pairs (the loss takes 1.5 times as long).
    """
    return jax.lax.platform_dependent(logits, cuda=_one_pass, default=_two_passes)


def _two_passes(logits):
    top = jnp.max(logits, axis=-1, keepdims=True)
    return top, jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True)


def _one_pass(logits):
    def add(a, b):  # two pairs of a maximum, and a sum relative to it
        (top_a, sum_a), (top_b, sum_b) = a, b
        less = jnp.exp(-jnp.abs(top_a - top_b))
        total = jnp.where(top_a > top_b, sum_a + sum_b * less, sum_a * less + sum_b)
        return jnp.maximum(top_a, top_b), total

    nothing = jnp.array(jnp.finfo(logits.dtype).min), jnp.zeros((), logits.dtype)
    top, total = jax.lax.reduce((logits, jnp.ones_like(logits)), nothing, add, (1,))
    return top[:, None], total[:, None]


CHUNK = 2048  # tokens, where a config leaves the choice to the devices and none were asked


def auto_chunk(rows: int, tokens: int, memory: float | None, platform: str) -> int:
    """How many tokens a chunk should have.

    A chunk's logits take 6 bytes each: float32, and their gradient in bfloat16. The more tokens a
    chunk has, the fewer times the float32 gradient of the table is read and written: of the 124M
    model's step of 32,768 tokens on an H100, chunks of 2,048 tokens move 158.5 GB, of 8,192 154.7
    GB and of 32,768 152.9 GB, with 15.5, 16.6 and 20.7 GiB of temporary memory. So the logits get
    a 50th of the device's memory, which gives 8,192 there and 1,024 on a TPU v5e.

    On a CPU they get 64 MiB: with 32,000 ids chunks of 256 tokens were the fastest of 64 to 2,048
    (0.9 of the time of one chunk), and with 320 ids one chunk of 2,048 was.

    Args:
      rows: of the padded vocabulary on a device: those of a shard where ``tensor`` cuts it.
      tokens: of a microbatch on a device.
      memory: bytes of a device; None: not known, then 16 GiB are assumed.
      platform: of the device, such as gpu.

    Returns:
      A power of two, or ``tokens`` where these are fewer.
    """
    memory = 2**34 if memory is None else memory
    room = 64 * 2**20 if platform == "cpu" else memory / 50
    fits = max(1, int(room / (6 * rows)))
    return min(tokens, 2 ** (fits.bit_length() - 1))


class _Static(NamedTuple):
    """The arguments of the loss that are no arrays, and whether gradients are wanted."""

    vocab_size: int
    chunk: int
    kernels: str
    interpret: bool
    with_grads: bool


def _scan_chunks(hidden, table, targets, weights, static, cut=False, backward_table=None):
    """On one device: the summed nats and, ``with_grads``, the gradients of hidden and table.

    The gradient of hidden goes through ``backward_table`` where there is one. With ``cut`` both
    tables are this device's shards of the rows along ``tensor``, and the gradient of hidden is the
    contribution of these rows.
    """
    vocab_size, chunk, kernels, interpret, with_grads = static
    tokens, width = targets.size, hidden.shape[-1]
    n = num_chunks(1, tokens, chunk)
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    ids = jnp.arange(table.shape[0])
    if cut:
        ids = ids + jax.lax.axis_index("tensor") * table.shape[0]
    padded = cut or table.shape[0] > vocab_size
    # Between the sums and the gradient the devices of a cut vocabulary communicate.
    fused = kernels == "pallas" and with_grads and not cut and dtype == jnp.float32

    def gradients(carry, nats, d_logits, h):
        sum_nats, d_table = carry
        d_table = d_table + jnp.matmul(d_logits.T, h, preferred_element_type=dtype)
        through = table if backward_table is None else backward_table
        return (sum_nats + nats, d_table), d_logits @ through

    def body(carry, chunk_inputs):
        h, y, w = chunk_inputs  # (tokens, embed), (tokens,), (tokens,)
        logits = jnp.matmul(h, table.T, preferred_element_type=dtype)  # (tokens, vocab)
        if fused:
            # Imported here because Pallas takes a second to load.
            from ngpt_jax.model.kernels.cross_entropy import cross_entropy_gradient

            nats, d_logits = cross_entropy_gradient(
                logits, y, w, vocab_size, hidden.dtype, interpret=interpret
            )
            return gradients(carry, jnp.sum(nats * w), d_logits, h)
        row, here = local_rows(y, table.shape[0]) if cut else (y, None)
        picked = jnp.take_along_axis(logits, row[:, None], axis=-1)
        if padded:  # a finite number, whose differences are no NaN
            logits = jnp.where(ids < vocab_size, logits, jnp.finfo(dtype).min)
        top, total = _max_and_sum(logits)
        if cut:
            picked = jnp.where(here[:, None], picked, 0)
            own, top = top, jax.lax.pmax(top, "tensor")
            total, picked = jax.lax.psum((total * jnp.exp(own - top), picked), "tensor")
        log_total = jnp.log(total) + top
        nats = jnp.sum((log_total - picked)[:, 0] * w)
        if not with_grads:
            return carry + nats, None
        hit = ids == y[:, None]
        d_logits = (jnp.exp(logits - log_total) - hit) * w[:, None]
        return gradients(carry, nats, d_logits.astype(hidden.dtype), h)

    zero = jnp.zeros((), dtype)
    carry = (zero, jnp.zeros(table.shape, dtype)) if with_grads else zero
    inputs = (
        hidden.reshape(n, tokens // n, width),
        targets.reshape(n, tokens // n),
        weights.astype(dtype).reshape(n, tokens // n),
    )
    if n == 1:  # without the cost of a loop
        carry, d_hidden = body(carry, jax.tree.map(lambda x: x[0], inputs))
        d_hidden = None if d_hidden is None else d_hidden[None]
    else:
        carry, d_hidden = jax.lax.scan(body, carry, inputs)
    if not with_grads:
        return carry, None
    nats, d_table = carry
    return nats, (d_hidden.reshape(hidden.shape), d_table.astype(table.dtype))


def _on_mesh(hidden, table, targets, weights, static, backward_table=None):
    mesh = rules.current_mesh()
    if mesh is None:
        return _scan_chunks(hidden, table, targets, weights, static, backward_table=backward_table)
    cut = rules.axis_size(mesh, "tensor") > 1
    token_spec = rules.activation_spec(("batch", "length"), targets.shape, mesh)
    rows_spec = table_spec(table.shape, mesh)
    axes = rules.spec_axes(token_spec)

    def on_device(hidden, table, targets, weights, backward_table=None):
        whole, through = gather_rows(table, mesh), backward_table
        if through is not None:
            through = gather_rows(through, mesh)
        nats, grads = _scan_chunks(hidden, whole, targets, weights, static, cut, through)
        nats = jax.lax.psum(nats, axes) if axes else nats
        if not static.with_grads:
            return nats, None
        d_hidden, d_table = grads
        d_hidden = jax.lax.psum(d_hidden, "tensor") if cut else d_hidden
        # The barrier makes XLA reduce d_table now. Otherwise it keeps the whole of it through the
        # backward pass of the blocks, and reduces it at the end.
        return nats, jax.lax.optimization_barrier((d_hidden, scatter_rows(d_table, axes, mesh)))

    hidden_spec = P(*token_spec, None)
    out_specs = (P(), (hidden_spec, rows_spec) if static.with_grads else None)
    tables = () if backward_table is None else (backward_table,)
    return jax.shard_map(
        on_device,
        in_specs=(hidden_spec, rows_spec, token_spec, token_spec, *(rows_spec,) * len(tables)),
        out_specs=out_specs,
        check_vma=False,
    )(hidden, table, targets, weights, *tables)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def cross_entropy(
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    vocab_size: int,
    chunk: int,
    kernels: str = "xla",
    interpret: bool = False,
    backward_table: jax.Array | None = None,
) -> jax.Array:
    """Weighted sum of -log softmax(hidden table^T)[target], in nats.

    Args:
      hidden: (B, T, embed).
      table: (padded vocab, embed), in the dtype of ``hidden``.
      targets: (B, T) token ids.
      weights: (B, T), 0 for a target that does not count. Not differentiated.
      vocab_size: rows of the table in use. The others get no probability and no gradient.
      chunk: tokens on each device whose logits are in memory at one time.
      kernels: xla, or pallas: a fused kernel for NVIDIA GPUs makes the gradient of the logits.
        float64 and a vocabulary that is cut over ``tensor`` are computed as with xla.
      interpret: run the kernel without a GPU.
      backward_table: the gradient of ``hidden`` is that of the logits times this table, in place
        of ``table``, see :mod:`.logit_gradient`. Not differentiated.

    Returns:
      A scalar in at least float32. Products run in the dtype of ``hidden`` and accumulate
      in at least float32.
    """
    del backward_table
    static = _Static(vocab_size, chunk, kernels, interpret, with_grads=False)
    return _on_mesh(hidden, table, targets, weights, static)[0]


def _forward(hidden, table, targets, weights, vocab_size, chunk, kernels, interpret, backward):
    static = _Static(vocab_size, chunk, kernels, interpret, with_grads=True)
    return _on_mesh(hidden, table, targets, weights, static, backward)


def _backward(vocab_size, chunk, kernels, interpret, grads, cotangent):
    del vocab_size, chunk, kernels, interpret
    d_hidden, d_table = ((g * cotangent).astype(g.dtype) for g in grads)
    return d_hidden, d_table, None, None, None


cross_entropy.defvjp(_forward, _backward)
