"""The cross-entropy of a chunk and the gradient of its logits: one Triton kernel.

A program takes one row of the logits. Up to 32,768 of them stay in registers and are read once.
A longer row is read twice, block by block; the second time it comes from the L2 cache as far as the
rows in work, one or two a multiprocessor, fit there.

A vocabulary that is cut over devices needs no kernel: the devices communicate between the sums
and the gradient, and there XLA moves no more bytes than kernels would. The same holds for the loss
without a gradient.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_WHOLE = 32_768  # the longest row in registers: 32 of each of the 1,024 threads
_BLOCK = 16_384  # of a longer row


def cross_entropy_gradient(
    logits: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    vocab_size: int,
    dtype: jnp.dtype,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """-log softmax(logits)[target] of each row, and the gradient of its weighted sum.

    Args:
      logits: (N, padded vocab) float32, finite.
      targets: (N,) ids below ``vocab_size``.
      weights: (N,) float32.
      vocab_size: columns in use. The others get no probability and no gradient.
      dtype: of the gradient.
      interpret: run it without a GPU.

    Returns:
      Nats (N,) float32, without the weights; and the gradient (N, padded vocab),
      (softmax(logits) - one-hot(target)) * weight.
    """
    n, columns = logits.shape
    whole = columns <= _WHOLE
    block = pl.next_power_of_2(columns) if whole else _BLOCK
    blocks = pl.cdiv(columns, block)
    lowest = jnp.finfo(jnp.float32).min

    def kernel(logits, targets, weights, nats, gradient):
        y = plgpu.load(targets.at[pl.ds(0, 1)])
        w = plgpu.load(weights.at[pl.ds(0, 1)])

        def columns_of(i):
            return i * block + jnp.arange(block, dtype=jnp.int32)

        def load(i):
            mask = columns_of(i) < vocab_size
            return plgpu.load(logits.at[pl.ds(i * block, block)], mask=mask, other=lowest)

        def add(i, x, sums):
            top, total, picked = sums
            above = jnp.maximum(top, jnp.max(x))
            total = total * jnp.exp(top - above) + jnp.sum(jnp.exp(x - above))
            return above, total, picked + jnp.sum(jnp.where(columns_of(i) == y, x, 0.0))

        def write(i, x):
            column = columns_of(i)
            d = (jnp.exp(x - log_total) - jnp.where(column == y, 1.0, 0.0)) * w
            here = gradient.at[pl.ds(i * block, block)]
            plgpu.store(here, d.astype(dtype), mask=column < columns)

        zero = jnp.zeros((), jnp.float32)
        sums = zero + lowest, zero, zero
        if whole:
            x = load(0)
            sums = add(0, x, sums)
        else:
            sums = jax.lax.fori_loop(0, blocks, lambda i, sums: add(i, load(i), sums), sums)
        top, total, picked = sums
        log_total = jnp.log(total) + top
        plgpu.store(nats.at[pl.ds(0, 1)], jnp.full((1,), log_total - picked))
        if whole:
            write(0, x)
        else:
            jax.lax.fori_loop(0, blocks, lambda i, _: write(i, load(i)), None)

    warps = min(32, max(1, block // 512))
    row = pl.BlockSpec((None, block * blocks), lambda i: (i, 0))
    value = pl.BlockSpec((1,), lambda i: (i,))
    return pl.pallas_call(
        kernel,
        grid=(n,),
        in_specs=[row, value, value],
        out_specs=[value, row],
        out_shape=[
            jax.ShapeDtypeStruct((n,), jnp.float32),
            jax.ShapeDtypeStruct((n, columns), dtype),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="cross_entropy_gradient",
    )(logits, targets, weights)
