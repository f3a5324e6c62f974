"""SwiGLU as one kernel in each direction."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_COLUMNS = 1024  # of a program: with 4 warps 8 of a thread, loads of 16 bytes in bfloat16
_WARPS = 4


def swiglu(uv: jax.Array, *, interpret: bool = False) -> jax.Array:
    """u SiLU(v), computed in float32.

    The backward kernel reads uv and the cotangent, and writes the cotangent of uv as one array.

    Args:
      uv: (..., 2, m), bfloat16, float16 or float32: u and v.
      interpret: run the kernels on any platform.

    Returns:
      (..., m) in the dtype of uv.
    """
    m = uv.shape[-1]
    return _swiglu(uv.reshape(-1, 2, m), interpret).reshape(*uv.shape[:-2], m)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _swiglu(uv, interpret):
    def body(u, v):
        return [u * (v * _sigmoid(v))]

    return _call(body, [uv], 1, "swiglu", interpret)[:, 0]


def _forward(uv, interpret):
    return _swiglu(uv, interpret), uv


def _backward(interpret, uv, g):
    def body(u, v, g):
        sigmoid = _sigmoid(v)
        return [g * (v * sigmoid), g * u * (sigmoid * (1 + v * (1 - sigmoid)))]

    return (_call(body, [uv, g[:, None]], 2, "swiglu_backward", interpret),)


_swiglu.defvjp(_forward, _backward)


def _sigmoid(v):
    return 1 / (1 + jnp.exp(-v))


def _call(body, inputs, parts, name, interpret):
    """(n, parts, m) from inputs (n, 1 or 2, m), elementwise.

    Args:
      body: (a float32 tile of each part of each input) -> a tile of each part of the output.
      inputs: the output has the dtype of the first.
      parts: 1 or 2.
      name: of the kernel in the compiled program.
      interpret: run it on any platform.
    """
    n, _, m = inputs[0].shape
    columns = min(_COLUMNS, pl.next_power_of_2(m))
    blocks = pl.cdiv(m, columns)  # of a row; neighbours in memory are neighbours in the grid

    def kernel(*refs):
        *refs, out = refs
        column = jax.lax.broadcasted_iota(jnp.int32, (1, 1, columns), 2)
        there = pl.program_id(0) % blocks * columns + column < m

        def part(ref, i):
            return ref.at[:, pl.ds(i, 1), :]

        tiles = [
            plgpu.load(part(ref, i), mask=there, other=0).astype(jnp.float32)
            for ref in refs
            for i in range(ref.shape[1])
        ]
        for i, tile in enumerate(body(*tiles)):
            plgpu.store(part(out, i), tile.astype(out.dtype), mask=there)

    def block(parts):
        return pl.BlockSpec((1, parts, columns), lambda i: (i // blocks, 0, i % blocks))

    return pl.pallas_call(
        kernel,
        grid=(n * blocks,),
        in_specs=[block(x.shape[1]) for x in inputs],
        out_specs=block(parts),
        out_shape=jax.ShapeDtypeStruct((n, parts, m), inputs[0].dtype),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name=name,
    )(*inputs)
