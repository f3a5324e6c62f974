"""SwiGLU as one kernel in each direction."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_COLUMNS = 1024  # of a program
_WARPS = 4


def swiglu(uv: jax.Array, *, interpret: bool = False) -> jax.Array:
    """u * SiLU(v), computed in float32.

    The backward kernel reads uv and the cotangent and writes that of uv as one array.

    Args:
      uv: (..., 2, m), bfloat16, float16 or float32: u and v.
      interpret: run the kernels without a GPU.

    Returns:
      (..., m) in the dtype of uv.
    """
    m = uv.shape[-1]
    return _swiglu(uv.reshape(-1, 2, m), interpret).reshape(*uv.shape[:-2], m)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _swiglu(uv, interpret):
    def kernel(uv_ref, out_ref):
        u, v = _load(uv_ref, m, 0), _load(uv_ref, m, 1)
        _store(out_ref, m, 0, u * (v * _sigmoid(v)))

    n, _, m = uv.shape
    return _call(kernel, [uv], 1, "swiglu", interpret).reshape(n, m)


def _forward(uv, interpret):
    return _swiglu(uv, interpret), uv


def _backward(interpret, uv, g):
    def kernel(uv_ref, g_ref, out_ref):
        u, v, g = _load(uv_ref, m, 0), _load(uv_ref, m, 1), _load(g_ref, m, 0)
        sigmoid = _sigmoid(v)
        _store(out_ref, m, 0, g * (v * sigmoid))
        _store(out_ref, m, 1, g * u * (sigmoid * (1 + v * (1 - sigmoid))))

    m = uv.shape[-1]
    return (_call(kernel, [uv, g[:, None]], 2, "swiglu_backward", interpret),)


_swiglu.defvjp(_forward, _backward)


def _sigmoid(v):
    return 1 / (1 + jnp.exp(-v))


def _call(kernel, inputs, parts, name, interpret):
    """The kernel over blocks of inputs (n, 1 or 2, m); its output is (n, parts, m)."""
    n, _, m = inputs[0].shape
    columns = min(_COLUMNS, pl.next_power_of_2(m))

    def block(parts):
        return pl.BlockSpec((1, parts, columns), lambda i, j: (i, 0, j))

    return pl.pallas_call(
        kernel,
        grid=(n, pl.cdiv(m, columns)),
        in_specs=[block(x.shape[1]) for x in inputs],
        out_specs=block(parts),
        out_shape=jax.ShapeDtypeStruct((n, parts, m), inputs[0].dtype),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name=name,
    )(*inputs)


def _place(ref, m, part):
    """Where the block's columns of a part lie, and which of them there are."""
    columns = ref.shape[-1]
    column = jax.lax.broadcasted_iota(jnp.int32, (1, 1, columns), 2)
    return ref.at[:, pl.ds(part, 1), :], pl.program_id(1) * columns + column < m


def _load(ref, m, part):
    place, there = _place(ref, m, part)
    return plgpu.load(place, mask=there, other=0).astype(jnp.float32)


def _store(ref, m, part, value):
    place, there = _place(ref, m, part)
    plgpu.store(place, value.astype(ref.dtype), mask=there)
