"""The cross-entropy of a chunk and the gradient of its logits: one Triton kernel.

A program takes one row of the logits. It keeps the first block of the row in registers; up to
32,768 tokens of the vocabulary are read from memory once. What is beyond is read a second time.

A vocabulary that is cut over devices needs no kernel: the devices communicate between the sums
and the gradient, and there XLA moves no more bytes than kernels would. The same holds for the loss
without a gradient.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_BLOCK = 32_768  # of float32: 32 registers of each of the 1,024 threads
_PER_WARP = 1024


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
    block = min(_BLOCK, pl.next_power_of_2(columns))
    blocks = pl.cdiv(columns, block)

    def kernel(logits, targets, weights, nats, gradient):
        y = plgpu.load(targets.at[pl.ds(0, 1)])
        w = plgpu.load(weights.at[pl.ds(0, 1)])
        lane = jnp.arange(block, dtype=jnp.int32)

        def tile(i):
            mask, lowest = i * block + lane < vocab_size, jnp.finfo(jnp.float32).min
            return plgpu.load(logits.at[pl.ds(i * block, block)], mask=mask, other=lowest)

        def add(i, x, top, total, picked):
            above = jnp.maximum(top, jnp.max(x))
            total = total * jnp.exp(top - above) + jnp.sum(jnp.exp(x - above))
            return above, total, picked + jnp.sum(jnp.where(i * block + lane == y, x, 0.0))

        def write(i, x):
            column = i * block + lane
            d = (jnp.exp(x - log_total) - jnp.where(column == y, 1.0, 0.0)) * w
            here = gradient.at[pl.ds(i * block, block)]
            plgpu.store(here, d.astype(dtype), mask=column < columns)

        first = tile(0)
        top = jnp.max(first)
        sums = add(0, first, top, jnp.float32(0), jnp.float32(0))
        if blocks > 1:
            sums = jax.lax.fori_loop(1, blocks, lambda i, s: add(i, tile(i), *s), sums)
        top, total, picked = sums
        log_total = jnp.log(total) + top
        plgpu.store(nats.at[pl.ds(0, 1)], jnp.full((1,), log_total - picked))
        write(0, first)
        if blocks > 1:
            jax.lax.fori_loop(1, blocks, lambda i, _: write(i, tile(i)), None)

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
        compiler_params=plgpu.CompilerParams(num_warps=max(1, block // _PER_WARP), num_stages=1),
        interpret=interpret,
        name="cross_entropy_gradient",
    )(logits, targets, weights)
