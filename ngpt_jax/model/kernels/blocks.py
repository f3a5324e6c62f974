"""Kernels that go over rows: one description of loads, masks, loops and sums for all of them.

A program of the grid takes some rows, one tile of them at a time. A tile is as wide as the next
power of two of the rows' length; what lies beyond a row or after the last row reads as zero and is
not written.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

Tile = jax.Array  # (rows at once, width) float32
_ROWS = 32  # of a program with sums: the sums are then 1/40 of the bytes of a backward pass
_PROGRAMS = 1024  # at least, where there are rows enough: they fill the largest of today's GPUs


def over_rows(
    body: Callable[..., tuple[Sequence[Tile], Sequence[Tile]]],
    rows: Sequence[jax.Array],
    vectors: Sequence[jax.Array],
    dtypes: Sequence[jnp.dtype],
    *,
    sums: int = 0,
    name: str,
    interpret: bool,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """One kernel that computes rows from rows.

    Args:
      body: (a tile of each array of rows, each vector as (1, width)) -> (a tile of each output,
        tiles to be summed over all rows), all float32. It sums along axis 1.
      rows: arrays (n, d) of any floating dtype up to float32.
      vectors: arrays (d,), float32, the same for all rows.
      dtypes: of the outputs (n, d).
      sums: how many sums there are.
      name: of the kernel in the compiled program.
      interpret: run it without a GPU.

    Returns:
      The outputs (n, d), and the sums (d,) in float32.
    """
    n, d = rows[0].shape
    width = pl.next_power_of_2(d)
    tile, warps = _tile(width)
    steps = min(_ROWS, pl.next_power_of_2(pl.cdiv(n, _PROGRAMS))) // tile if sums else 1
    steps = max(steps, 1)
    programs = pl.cdiv(n, tile * steps)

    def kernel(*refs):
        inputs, refs = refs[: len(rows)], refs[len(rows) :]
        constants, refs = refs[: len(vectors)], refs[len(vectors) :]
        outputs, totals = refs[: len(dtypes)], refs[len(dtypes) :]
        first = pl.program_id(0) * tile * steps
        row = jax.lax.broadcasted_iota(jnp.int32, (tile, width), 0)
        there = jax.lax.broadcasted_iota(jnp.int32, (tile, width), 1) < d
        line = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1) < d
        constants = [plgpu.load(ref.at[:, :], mask=line, other=0) for ref in constants]

        def step(i, partial):
            mask = there & (first + i * tile + row < n)
            here = (pl.ds(i * tile, tile), slice(None))
            tiles = [
                plgpu.load(ref.at[here], mask=mask, other=0).astype(jnp.float32) for ref in inputs
            ]
            results, terms = body(*tiles, *constants)
            for ref, result in zip(outputs, results):
                plgpu.store(ref.at[here], result.astype(ref.dtype), mask=mask)
            return tuple(p + jnp.sum(t, 0, keepdims=True) for p, t in zip(partial, terms))

        zero = (jnp.zeros((1, width), jnp.float32),) * sums
        partial = jax.lax.fori_loop(0, steps, step, zero) if steps > 1 else step(0, zero)
        for ref, value in zip(totals, partial):
            plgpu.store(ref.at[:, :], value, mask=line)

    block = pl.BlockSpec((tile * steps, width), lambda i: (i, 0))
    vector = pl.BlockSpec((1, width), lambda i: (0, 0))
    partial = pl.BlockSpec((1, width), lambda i: (i, 0))
    results = pl.pallas_call(
        kernel,
        grid=(programs,),
        in_specs=[block] * len(rows) + [vector] * len(vectors),
        out_specs=[block] * len(dtypes) + [partial] * sums,
        out_shape=[jax.ShapeDtypeStruct((n, d), dtype) for dtype in dtypes]
        + [jax.ShapeDtypeStruct((programs, d), jnp.float32)] * sums,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name=name,
    )(*rows, *(v[None] for v in vectors))
    outputs, partials = results[: len(dtypes)], results[len(dtypes) :]
    return outputs, [jnp.sum(p, 0) for p in partials]


def _tile(width: int) -> tuple[int, int]:
    """Rows at once and warps of a program."""
    return 1, min(8, max(1, width // 256))


def flat(x: jax.Array) -> jax.Array:
    """(..., d) as rows (n, d)."""
    return x.reshape(-1, x.shape[-1])


def inverse_norm(x: Tile) -> Tile:
    """1 / ||x|| of each row (rows, 1); 0 where the squared norm is below the smallest normal."""
    square = jnp.sum(x * x, 1, keepdims=True)
    there = square >= jnp.finfo(jnp.float32).tiny
    return jnp.where(there, jax.lax.rsqrt(jnp.where(there, square, 1)), 0)


def unit_backward(y: Tile, inverse: Tile, g: Tile) -> Tile:
    """The cotangent of x from g, that of y = Norm(x): (g - y <y, g>) / ||x||."""
    return inverse * (g - y * jnp.sum(y * g, 1, keepdims=True))


def total(cotangents: Sequence[Tile]) -> Tile:
    """The sum of the cotangents of copies."""
    return functools.reduce(jnp.add, cotangents)
