"""Kernels that go over rows: one description of loads, masks, loops and sums for all of them.

A program of the grid takes some rows, one after the other. The tile that holds a row is as wide as
the next power of two: what lies beyond the row, or after the last row, reads as zero and is not
written.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ngpt_jax.model import norms

Tile = jax.Array  # (1, width) float32
_ROWS = 16  # at most, of a program with sums: these are then 1/20 of the bytes of a backward pass
_PROGRAMS = 1024  # at least, where there are rows enough, to fill a GPU of 132 cores
_COLUMNS = 256  # of a warp, 8 of a thread: loads of 16 bytes in bfloat16, and no register spills


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
      body: (a tile of each array of rows, a tile of each vector) -> (a tile of each output, tiles
        to be summed over all rows), all float32 (1, width).
      rows: arrays (n, d) of any floating dtype up to float32.
      vectors: arrays (d,), float32, the same for all rows.
      dtypes: of the outputs (n, d).
      sums: how many sums there are.
      name: of the kernel in the compiled program.
      interpret: run it on any platform.

    Returns:
      The outputs (n, d), and the sums (d,) in float32.
    """
    n, d = rows[0].shape
    width = pl.next_power_of_2(d)
    per_program = min(_ROWS, pl.next_power_of_2(pl.cdiv(n, _PROGRAMS))) if sums else 1
    programs = pl.cdiv(n, per_program)

    def kernel(*refs):
        inputs, refs = refs[: len(rows)], refs[len(rows) :]
        constants, refs = refs[: len(vectors)], refs[len(vectors) :]
        outputs, totals = refs[: len(dtypes)], refs[len(dtypes) :]
        first = pl.program_id(0) * per_program
        there = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1) < d

        def load(ref, row, mask):
            tile = plgpu.load(ref.at[pl.ds(row, 1), :], mask=mask, other=0)
            return tile.astype(jnp.float32)

        def step(row, partial):
            mask = there & (first + row < n)
            tiles = [load(ref, row, mask) for ref in inputs]
            # Read again for each row, from cache: kept in registers they would take many.
            results, terms = body(*tiles, *(load(ref, 0, there) for ref in constants))
            for ref, result in zip(outputs, results):
                plgpu.store(ref.at[pl.ds(row, 1), :], result.astype(ref.dtype), mask=mask)
            return tuple(p + term for p, term in zip(partial, terms))

        partial = (jnp.zeros((1, width), jnp.float32),) * sums
        partial = jax.lax.fori_loop(0, per_program, step, partial)
        for ref, value in zip(totals, partial):
            plgpu.store(ref.at[:, :], value, mask=there)

    block = pl.BlockSpec((per_program, width), lambda i: (i, 0))
    vector = pl.BlockSpec((1, width), lambda i: (0, 0))
    partial = pl.BlockSpec((1, width), lambda i: (i, 0))
    results = pl.pallas_call(
        kernel,
        grid=(programs,),
        in_specs=[block] * len(rows) + [vector] * len(vectors),
        out_specs=[block] * len(dtypes) + [partial] * sums,
        out_shape=[jax.ShapeDtypeStruct((n, d), dtype) for dtype in dtypes]
        + [jax.ShapeDtypeStruct((programs, d), jnp.float32)] * sums,
        compiler_params=plgpu.CompilerParams(
            num_warps=min(16, max(1, width // _COLUMNS)), num_stages=1
        ),
        interpret=interpret,
        name=name,
    )(*rows, *(v[None] for v in vectors))
    outputs, partials = results[: len(dtypes)], results[len(dtypes) :]
    return outputs, [jnp.sum(p, 0) for p in partials]


def flat(x: jax.Array) -> jax.Array:
    """(..., d) as rows (n, d)."""
    return x.reshape(-1, x.shape[-1])


def inverse_norm(x: Tile) -> Tile:
    """1 / ||x|| as (1, 1); 0 where the squared norm is below the smallest normal number."""
    return norms.inverse_root(jnp.sum(x * x, 1, keepdims=True))


def unit_backward(y: Tile, inverse: Tile, g: Tile) -> Tile:
    """The cotangent of x from g, that of y = Norm(x): (g - y <y, g>) / ||x||."""
    return inverse * (g - y * jnp.sum(y * g, 1, keepdims=True))


def total(cotangents: Sequence[Tile]) -> Tile:
    """The sum of the cotangents of copies."""
    return functools.reduce(jnp.add, cotangents)
