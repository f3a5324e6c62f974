"""The steps of a block between its products: in XLA's form, or as one fused kernel each.

The XLA forms stand in :mod:`.norms` and :mod:`.heads`. The kernels stand in :mod:`.kernels`, give
the same results but for rounding, and move fewer bytes on NVIDIA GPUs. On a mesh a kernel runs
inside ``shard_map``, on each device's rows, heads and hidden units.
"""

from collections.abc import Callable
from typing import Any

import jax

from ngpt_jax.config import ConfigError, ModelConfig
from ngpt_jax.model import heads, norms
from ngpt_jax.parallel import rules

Axes = tuple[str | None, ...]

# Devices on which every kernel ran and agreed with its XLA form: device_kind -> when. Only there
# does kernels=auto take the kernels. None yet: they were compiled for GPUs and run interpreted.
VERIFIED: dict[str, str] = {}

_HIDDEN: Axes = ("batch", "length", "embed")


def choose_kernels(config: ModelConfig, device: jax.Device) -> tuple[str, str]:
    """``xla`` or ``pallas`` for a model on devices like this one, and the reason.

    Raises ConfigError where ``model.kernels`` asks for kernels that do not run there.
    """
    platform, kind, obstacle = rules.platform_of(device), device.device_kind, None
    if platform != "gpu":
        obstacle = f"the kernels are for NVIDIA GPUs, and the devices are of type {platform}"
    elif config.dtype == "float64":
        obstacle = "the kernels know no float64"
    if config.kernels == "auto":
        if obstacle is None and kind in VERIFIED:
            return "pallas", f"they agreed on {kind}, {VERIFIED[kind]}"
        return "xla", obstacle or f"the kernels have never run on {kind}"
    if config.kernels == "pallas" and obstacle is not None:
        raise ConfigError(
            f"model.kernels = pallas cannot be used: {obstacle}; set it to auto or xla."
        )
    return config.kernels, "as configured"


def joins_products(config: ModelConfig) -> bool:
    """Whether q with k, and up with gate, are one product each.

    A GPU then reads x once and launches fewer kernels. On TPUs, XLA would lay the halves out anew.
    """
    return config.kernels == "pallas" or rules.platform() == "gpu"


def residual_step(
    config: ModelConfig,
    h: jax.Array,
    f: jax.Array,
    alpha: jax.Array,
    normalize_h: bool,
    copies: int,
) -> tuple[jax.Array, ...]:
    """:func:`norms.residual_step`, several times: the kernel adds the gradients of its readers."""
    if config.kernels != "pallas":
        return (norms.residual_step(h, f, alpha, normalize_h),) * copies
    from ngpt_jax.model.kernels import residual

    def step(h, f, alpha):
        return residual.residual_step(
            h, f, alpha, normalize_h=normalize_h, copies=copies, interpret=interpreted()
        )

    return _on_shards(step, (_HIDDEN, _HIDDEN, (None,)), (_HIDDEN,) * copies, h, f, alpha)


def add_rms_norm(
    config: ModelConfig, h: jax.Array, f: jax.Array, gain: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sum h + f in the dtype of h, and its RMSNorm (equations 4 and 5)."""
    if config.kernels != "pallas":
        moved = (h + f).astype(h.dtype)
        return moved, norms.rms_norm(moved, gain, config.rms_eps)
    from ngpt_jax.model.kernels import rms

    def step(h, f, gain):
        return rms.add_rms_norm(h, f, gain, config.rms_eps, interpret=interpreted())

    return _on_shards(step, (_HIDDEN, _HIDDEN, (None,)), (_HIDDEN, _HIDDEN), h, f, gain)


def rotate_heads(
    config: ModelConfig,
    qk: jax.Array,
    tables: tuple[jax.Array, jax.Array],
    q_scale: jax.Array | None,
    k_scale: jax.Array | None,
    form: str,
) -> tuple[jax.Array, jax.Array]:
    """:func:`heads.rotate_heads`, with queries and ``q_scale`` as (..., heads, head_dim)."""
    batch, length, kv_heads, _, head_dim = qk.shape
    if q_scale is not None and q_scale.ndim > 1:
        q_scale = q_scale.reshape(kv_heads, -1, head_dim)
    if config.kernels == "pallas" and form != "none":  # RoPE alone is one pass in XLA too
        q, k = _rotate_on_shards(config, qk, tables, q_scale, k_scale, form)
    else:
        q, k = heads.rotate_heads(qk, *tables, q_scale, k_scale, form, config.rms_eps)
    return q.reshape(batch, length, -1, head_dim), k


def _rotate_on_shards(
    config: ModelConfig, qk: Any, tables: Any, q_scale: Any, k_scale: Any, form: str
):
    from ngpt_jax.model.kernels import heads as kernel

    def rotate(qk, cos, sin, q_scale, k_scale):
        return kernel.rotate_heads(
            qk, cos, sin, q_scale, k_scale, form=form, eps=config.rms_eps, interpret=interpreted()
        )

    def of_scale(scale: jax.Array | None) -> Axes | None:  # (head_dim,), or one for each head
        if scale is None or scale.ndim == 1:
            return scale if scale is None else (None,)
        return ("kv_heads", *(None,) * (scale.ndim - 1))

    rows = ("batch", "length", None)[-tables[0].ndim :]
    keys: Axes = ("batch", "length", "kv_heads", None)
    both: Axes = (*keys[:3], None, None)
    return _on_shards(
        rotate, (both, rows, rows, of_scale(q_scale), of_scale(k_scale)), (both, keys),
        qk, *tables, q_scale, k_scale,
    )  # fmt: skip


def joined_swiglu(config: ModelConfig, up_gate: jax.Array) -> jax.Array:
    """:func:`norms.joined_swiglu`."""
    if config.kernels != "pallas":
        return norms.joined_swiglu(up_gate)
    from ngpt_jax.model.kernels import swiglu

    def kernel(up_gate):
        return swiglu.swiglu(up_gate, interpret=interpreted())

    axes: Axes = ("batch", "length", None, "mlp")
    return _on_shards(kernel, (axes,), ("batch", "length", "mlp"), up_gate)


def interpreted() -> bool:
    """Whether kernels run interpreted: slowly and without a GPU, for tests."""
    return rules.platform() == "cpu"


def _on_shards(f: Callable[..., Any], in_axes: Any, out_axes: Any, *args: Any) -> Any:
    """f on each device's shards of arrays whose axes have these names; None: no such argument."""
    mesh = rules.current_mesh()
    if mesh is None:
        return f(*args)
    in_specs = tuple(
        None if a is None else rules.activation_spec(axes, a.shape, mesh)
        for axes, a in zip(in_axes, args, strict=True)
    )
    shapes = jax.eval_shape(f, *args)

    def spec(axes: Axes, shape: Any) -> Any:
        return rules.activation_spec(axes, shape.shape, mesh)

    several = isinstance(shapes, tuple)
    out_specs = tuple(map(spec, out_axes, shapes)) if several else spec(out_axes, shapes)
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)
