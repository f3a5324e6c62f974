"""Look-up of token ids in a table whose rows may be sharded over the mesh.

``gather_rows``, ``scatter_rows`` and ``local_rows`` are called inside ``shard_map``, on a device's
shard of a table. The loss uses them too.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ngpt_jax.parallel import rules


def table_spec(shape: tuple[int, ...], mesh: Any) -> P:
    """The sharding of a table (vocab, embed) on the mesh."""
    axes = ("vocab", "embed")
    return rules.param_spec(axes, dict(zip(axes, shape)), mesh, name="a token table")


def gather_rows(table: jax.Array, mesh: Any) -> jax.Array:
    """The rows of all devices along ``fsdp``."""
    if rules.axis_size(mesh, "fsdp") == 1:
        return table
    return jax.lax.all_gather(table, "fsdp", axis=0, tiled=True)


def scatter_rows(d_table: jax.Array, token_axes: tuple[str, ...], mesh: Any) -> jax.Array:
    """This device's rows of a table's gradient, summed over the tokens of all devices.

    Args:
      d_table: the gradient of the gathered table from this device's tokens.
      token_axes: mesh axes along which devices hold different tokens.
      mesh: the current mesh.
    """
    n = rules.axis_size(mesh, "fsdp")
    if others := tuple(a for a in token_axes if a != "fsdp"):
        d_table = jax.lax.psum(d_table, others)
    if n == 1:
        return d_table
    if "fsdp" in token_axes:
        return jax.lax.psum_scatter(d_table, "fsdp", scatter_dimension=0, tiled=True)
    rows = d_table.shape[0] // n  # all devices along fsdp hold the same tokens
    return jax.lax.dynamic_slice_in_dim(d_table, jax.lax.axis_index("fsdp") * rows, rows)


def local_rows(ids: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """The row of each id in this device's shard along ``tensor``, and whether it is there.

    Where it is not there, the row is 0.
    """
    row = ids - jax.lax.axis_index("tensor") * num_rows
    here = (row >= 0) & (row < num_rows)
    return jnp.where(here, row, 0), here


@jax.custom_vjp
def embed_tokens(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """The rows (B, T, embed) of ``table`` (vocab, embed) for ``tokens`` (B, T).

    The gradient of a row is summed over its tokens in at least float32, whatever the dtype of
    the table.
    """
    mesh = rules.current_mesh()
    if mesh is None:
        return jnp.take(table, tokens, axis=0)
    cut = rules.axis_size(mesh, "tensor") > 1

    def on_device(table, tokens):
        table = gather_rows(table, mesh)
        if not cut:
            return jnp.take(table, tokens, axis=0)
        row, here = local_rows(tokens, table.shape[0])
        found = jnp.where(here[..., None], jnp.take(table, row, axis=0), 0)
        return jax.lax.psum(found, "tensor")  # all terms but one are zero

    spec = rules.activation_spec(("batch", "length"), tokens.shape, mesh)
    return jax.shard_map(
        on_device,
        in_specs=(table_spec(table.shape, mesh), spec),
        out_specs=P(*spec, None),
        check_vma=False,
    )(table, tokens)


def _forward(table, tokens):
    # An array without columns remembers the table's rows and dtype, and needs no memory.
    return embed_tokens(table, tokens), (tokens, jnp.zeros((table.shape[0], 0), table.dtype))


def _sum_rows(num_rows, dtype, tokens, grad):
    total = jnp.zeros((num_rows, grad.shape[-1]), jnp.promote_types(dtype, jnp.float32))
    return total.at[tokens].add(grad.astype(total.dtype)).astype(dtype)


def _backward(residuals, grad):
    tokens, empty = residuals
    num_rows, dtype = empty.shape[0], empty.dtype
    mesh = rules.current_mesh()
    if mesh is None:
        return _sum_rows(num_rows, dtype, tokens, grad), None
    parts = rules.axis_size(mesh, "tensor")
    spec = rules.activation_spec(("batch", "length"), tokens.shape, mesh)

    def on_device(tokens, grad):
        rows = num_rows // parts
        if parts > 1:
            tokens, here = local_rows(tokens, rows)
            grad = jnp.where(here[..., None], grad, 0)
        return scatter_rows(_sum_rows(rows, dtype, tokens, grad), rules.spec_axes(spec), mesh)

    d_table = jax.shard_map(
        on_device,
        in_specs=(spec, P(*spec, None)),
        out_specs=table_spec((num_rows, grad.shape[-1]), mesh),
        check_vma=False,
    )(tokens, grad)
    return d_table, None


embed_tokens.defvjp(_forward, _backward)
