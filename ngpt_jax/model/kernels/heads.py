"""Normalization, RoPE and scale of query and key heads: one Triton kernel in each direction.

A program takes some tokens of one sequence and some key heads with their queries. It goes over
these heads in turn and keeps RoPE's tables of its tokens in registers. Arrays of heads are seen as
lines (B, T, 2 heads, head_dim/2): the two halves of a head are two lines, and a tile is one line of
each token. A tile is as wide as the next power of two; what lies beyond a line or after the last
token reads as zero and is not written.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ngpt_jax.model import norms

Pair = tuple[jax.Array, jax.Array]  # a head's halves: tiles of float32

_WARPS = 8  # at most
_ELEMENTS = 256  # of a tile for each warp: 8 registers of a thread, and nothing spills
_HEADS = 8  # of a program at most, if a key head and its group are not more


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def rotate_heads(
    qk: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    q_scale: jax.Array | None,
    k_scale: jax.Array | None,
    form: str,
    eps: float = 0.0,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """:func:`ngpt_jax.model.heads.rotate_heads` on one device, computed in float32.

    The forward kernel reads qk and writes q and k. The backward kernel reads qk and the cotangents
    of q and k, and writes that of qk. For the scales it writes the sums over a program's tokens.

    Args:
      qk: (B, T, kv_heads, group + 1, head_dim), bfloat16, float16 or float32: for each key head its
        query heads, then the key.
      cos, sin: (T, head_dim/2) or (B, T, head_dim/2) float32.
      q_scale: (kv_heads, group, head_dim) or (head_dim,) float32. None: no factor.
      k_scale: (kv_heads, head_dim) or (head_dim,) float32. None: no factor.
      form: unit_after_rope or rms_before_rope. The second needs both
        scales.
      eps: for rms_before_rope.
      interpret: run it without a GPU.

    Returns:
      Queries (B, T, kv_heads, group, head_dim) and keys (B, T, kv_heads, head_dim), dtype of qk.
    """
    b, t, kv_heads, members, head_dim = qk.shape
    (q, k), _ = _call(
        functools.partial(_forward_kernel, form=form, eps=eps),
        (qk,), (cos, sin), (q_scale, k_scale),
        [kv_heads * (members - 1), kv_heads], False, interpret, "rotate_heads",
    )  # fmt: skip
    return q.reshape(b, t, kv_heads, members - 1, head_dim), k.reshape(b, t, kv_heads, head_dim)


def _rotate_heads_forward(qk, cos, sin, q_scale, k_scale, form, eps, interpret):
    out = rotate_heads(qk, cos, sin, q_scale, k_scale, form, eps, interpret)
    return out, (qk, cos, sin, q_scale, k_scale)


def _rotate_heads_backward(form, eps, interpret, residuals, g):
    qk, cos, sin, *scales = residuals
    (dqk,), sums = _call(
        functools.partial(_backward_kernel, form=form, eps=eps),
        (qk, *g), (cos, sin), scales,
        [qk.shape[2] * qk.shape[3]], True, interpret, "rotate_heads_backward",
    )  # fmt: skip
    dscales = (None if s is None else jnp.sum(p, 0).reshape(s.shape) for s, p in zip(scales, sums))
    return dqk.reshape(qk.shape), None, None, *dscales


rotate_heads.defvjp(_rotate_heads_forward, _rotate_heads_backward)


class _Plan(NamedTuple):
    """Sizes. Programs are numbered by sequence, block of tokens and part of the key heads."""

    sequences: int
    length: int  # T
    tokens: int  # of a program
    blocks: int  # of tokens in a sequence
    kv_heads: int  # of a program
    parts: int  # of the key heads
    group: int
    head_dim: int
    width: int  # of a tile

    @property
    def warps(self) -> int:
        return max(1, self.tokens * self.width // _ELEMENTS)

    @property
    def programs(self) -> int:
        return self.sequences * self.blocks * self.parts


def _plan(qk: jax.Array) -> _Plan:
    b, t, kv_heads, members, head_dim = qk.shape
    width = pl.next_power_of_2(head_dim // 2)
    tokens = min(pl.next_power_of_2(t), _WARPS * _ELEMENTS // width)
    divisors = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0]
    taken = max(n for n in divisors if n == 1 or n * members <= _HEADS)
    return _Plan(
        b, t, tokens, pl.cdiv(t, tokens), taken, kv_heads // taken, members - 1, head_dim, width
    )


def _call(
    kernel: Callable[..., None],
    arrays: Sequence[jax.Array],
    tables: Sequence[jax.Array],
    scales: Sequence[jax.Array | None],
    outputs: Sequence[int],
    with_sums: bool,
    interpret: bool,
    name: str,
) -> Any:
    """Runs a kernel over the lines of heads.

    Args:
      kernel: gets refs like arrays, tables, scales, outputs and sums, and the plan.
      arrays: heads; the first is qk.
      tables: cosines and sines.
      scales: of queries and keys.
      outputs: their numbers of heads.
      with_sums: whether there are sums for the scales.
      interpret, name: as for ``pallas_call``.

    Returns:
      The outputs as lines, in the dtype of qk; and for each scale None or float32
      (n, lines of the scale, head_dim/2), to be summed over n.
    """
    qk, plan = arrays[0], _plan(arrays[0])
    half = plan.head_dim // 2
    lines = [x.reshape(*x.shape[:2], -1, half) for x in arrays]
    scales = [None if s is None else s.reshape(-1, half) for s in scales]

    def place(p):
        return p // (plan.blocks * plan.parts), p // plan.parts % plan.blocks

    def by_token(n):
        return pl.BlockSpec((None, plan.tokens, n, plan.width), lambda p: (*place(p), 0, 0))

    def table(x):
        if x.ndim == 2:
            return pl.BlockSpec((plan.tokens, plan.width), lambda p: (place(p)[1], 0))
        return pl.BlockSpec((None, plan.tokens, plan.width), lambda p: (*place(p), 0))

    def whole(n):
        return pl.BlockSpec((n, plan.width), lambda p: (0, 0))

    def partial(n):  # programs of the same tokens share one where each head has lines of its own
        sharing = 1 if n == 2 else plan.parts
        block = pl.BlockSpec((None, n, plan.width), lambda p: (p // sharing, 0, 0))
        return block, jax.ShapeDtypeStruct((plan.programs // sharing, n, half), jnp.float32)

    sums = [None if s is None or not with_sums else partial(s.shape[0]) for s in scales]
    return pl.pallas_call(
        functools.partial(kernel, plan=plan),
        grid=(plan.programs,),
        in_specs=[
            [by_token(x.shape[2]) for x in lines],
            [table(x) for x in tables],
            [None if s is None else whole(s.shape[0]) for s in scales],
        ],
        out_specs=[[by_token(2 * n) for n in outputs], [s and s[0] for s in sums]],
        out_shape=[
            [jax.ShapeDtypeStruct((*qk.shape[:2], 2 * n, half), qk.dtype) for n in outputs],
            [s and s[1] for s in sums],
        ],
        compiler_params=plgpu.CompilerParams(num_warps=plan.warps, num_stages=1),
        interpret=interpret,
        name=name,
    )(lines, list(tables), scales)


def _forward_kernel(arrays, tables, scales, outputs, sums, *, plan, form, eps):
    del sums
    (qk,), (mask, there) = arrays, _masks(plan)
    cos, sin = (plgpu.load(t, mask=mask, other=0) for t in tables)

    def rotate(member, kind, head, carry):
        scale = _read_scale(scales[kind], head, there)
        x = _read(qk, member, mask)
        out = _forward(x, cos, sin, scale, form, eps, plan.head_dim)
        _write(outputs[kind], head, out, mask)
        return carry

    _each_head(plan, rotate, None)


def _backward_kernel(arrays, tables, scales, outputs, sums, *, plan, form, eps):
    (qk, *cotangents), (dqk,), (mask, there) = arrays, outputs, _masks(plan)
    cos, sin = (plgpu.load(t, mask=mask, other=0) for t in tables)

    def rotate(member, kind, head, totals):
        scale = _read_scale(scales[kind], head, there)
        x, g = _read(qk, member, mask), _read(cotangents[kind], head, mask)
        dx, dscale = _backward(x, g, cos, sin, scale, form, eps, plan.head_dim)
        _write(dqk, member, dx, mask)
        if dscale is None:
            return totals
        dscale = tuple(jnp.sum(d, 0, keepdims=True) for d in dscale)
        if totals[kind] is None:
            _write_sums(sums[kind], head, dscale, there)
            return totals
        added = tuple(t + d for t, d in zip(totals[kind], dscale))
        return (added, totals[1]) if kind == 0 else (totals[0], added)

    zero = jnp.zeros((1, plan.width), jnp.float32)
    totals = tuple(None if s is None or s.shape[0] > 2 else (zero, zero) for s in sums)
    for ref, total in zip(sums, _each_head(plan, rotate, totals)):
        if total is not None:
            _write_sums(ref, 0, total, there)


def _each_head(plan: _Plan, visit: Callable[..., Any], carry: Any) -> Any:
    """Calls ``carry = visit(index in qk, 0 for a query or 1 for a key, its index, carry)``."""
    first = pl.program_id(0) % plan.parts * plan.kv_heads

    def of_key(i, carry):
        key = first + i
        member, query = key * (plan.group + 1), key * plan.group
        carry = jax.lax.fori_loop(
            0, plan.group, lambda j, carry: visit(member + j, 0, query + j, carry), carry
        )
        return visit(member + plan.group, 1, key, carry)

    return jax.lax.fori_loop(0, plan.kv_heads, of_key, carry)


def _masks(plan: _Plan) -> tuple[jax.Array, jax.Array]:
    """What there is of a tile (tokens, width) and of a line (1, width)."""
    block = pl.program_id(0) // plan.parts % plan.blocks
    token = block * plan.tokens + jax.lax.broadcasted_iota(jnp.int32, (plan.tokens, plan.width), 0)
    channel = jax.lax.broadcasted_iota(jnp.int32, (plan.tokens, plan.width), 1)
    there = jax.lax.broadcasted_iota(jnp.int32, (1, plan.width), 1) < plan.head_dim // 2
    return (token < plan.length) & (channel < plan.head_dim // 2), there


def _read(ref: Any, head: Any, mask: jax.Array) -> Pair:
    a, b = (plgpu.load(ref.at[:, 2 * head + i, :], mask=mask, other=0) for i in (0, 1))
    return a.astype(jnp.float32), b.astype(jnp.float32)


def _write(ref: Any, head: Any, halves: Pair, mask: jax.Array) -> None:
    for i, x in enumerate(halves):
        plgpu.store(ref.at[:, 2 * head + i, :], x.astype(ref.dtype), mask=mask)


def _line(ref: Any, head: Any, i: int) -> Any:
    """Half i of a head's scale, or of the scale of all heads."""
    return ref.at[pl.ds(i if ref.shape[0] == 2 else 2 * head + i, 1), :]


def _read_scale(ref: Any, head: Any, there: jax.Array) -> Pair | None:
    if ref is None:
        return None
    a, b = (plgpu.load(_line(ref, head, i), mask=there, other=0) for i in (0, 1))
    return a, b


def _write_sums(ref: Any, head: Any, halves: Pair, there: jax.Array) -> None:
    for i, x in enumerate(halves):
        plgpu.store(_line(ref, head, i), x, mask=there)


def _forward(
    x: Pair,
    cos: jax.Array,
    sin: jax.Array,
    scale: Pair | None,
    form: str,
    eps: float,
    head_dim: int,
) -> Pair:
    """The result for one head of each token, as :mod:`ngpt_jax.model.heads` defines it."""
    if form == "unit_after_rope":
        return _times(_normalized(_turn(x, cos, sin), form, eps, head_dim)[0], scale)
    return _turn(_times(_normalized(x, form, eps, head_dim)[0], scale), cos, sin)


def _backward(
    x: Pair,
    g: Pair,
    cos: jax.Array,
    sin: jax.Array,
    scale: Pair | None,
    form: str,
    eps: float,
    head_dim: int,
) -> tuple[Pair, Pair | None]:
    """The gradients of :func:`_forward` for x, and for scale before the sum over tokens.

    With y = Norm(x) the gradient for x is (g - y <y, g>) / ||x||, and likewise for RMSNorm.
    """
    if form == "unit_after_rope":
        x = _turn(x, cos, sin)
    else:
        g = _turn(g, cos, -sin)
    y, inverse = _normalized(x, form, eps, head_dim)
    (a, b), dscale = y, None if scale is None else (g[0] * y[0], g[1] * y[1])
    ga, gb = _times(g, scale)
    along = jnp.sum(a * ga + b * gb, axis=-1, keepdims=True)
    if form == "rms_before_rope":
        along = along / head_dim
    dx = inverse * (ga - a * along), inverse * (gb - b * along)
    return (_turn(dx, cos, -sin) if form == "unit_after_rope" else dx), dscale


def _turn(x: Pair, cos: jax.Array, sin: jax.Array) -> Pair:
    a, b = x
    return a * cos - b * sin, b * cos + a * sin


def _times(x: Pair, scale: Pair | None) -> Pair:
    return x if scale is None else (x[0] * scale[0], x[1] * scale[1])


def _normalized(x: Pair, form: str, eps: float, head_dim: int) -> tuple[Pair, jax.Array]:
    """The vectors divided by their norm, and what they were multiplied by."""
    a, b = x
    square = jnp.sum(a * a + b * b, axis=-1, keepdims=True)
    if form == "rms_before_rope":
        inverse = jax.lax.rsqrt(square / head_dim + eps)
    else:
        inverse = norms.inverse_root(square)
    return (a * inverse, b * inverse), inverse
