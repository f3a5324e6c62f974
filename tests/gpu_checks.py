"""What tests/gpu_session.py runs. Each function returns (result, facts for the line).

``agrees`` and ``differs`` are results of checks, ``measured`` of timings.
"""

import dataclasses
import functools
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import test_golden

from ngpt_jax import config as config_lib
from ngpt_jax.benchmark import configs, train_step
from ngpt_jax.benchmark import decode as decode_benchmark
from ngpt_jax.config import Config
from ngpt_jax.export.reference_layout import to_reference
from ngpt_jax.model import heads, norms
from ngpt_jax.model.kernels import cross_entropy, residual, rms, swiglu
from ngpt_jax.model.kernels import heads as heads_kernel
from ngpt_jax.model.rotary import rope_tables
from ngpt_jax.model.transformer import init_params
from ngpt_jax.parallel import rules
from ngpt_jax.parallel.backend import set_xla_flags
from ngpt_jax.training.step import summed_nats

EPS = 1e-6
Outcome = tuple[str, dict[str, Any]]


def machine(dry: bool) -> dict[str, str]:
    """Device, driver and versions. Ends the process with code 2 where there is no GPU to check."""
    device = jax.devices()[0]
    if not dry and rules.platform_of(device) != "gpu":
        print(f"error: jax finds no NVIDIA GPU, only {device.device_kind}; --dry needs none.")
        sys.exit(2)
    driver = "none"
    if not dry and (smi := shutil.which("nvidia-smi")):
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        driver = done.stdout.split("\n")[0].strip()
    platform = " ".join(device.client.platform_version.split())
    return {
        "device": device.device_kind, "driver": driver, "jax": jax.__version__,
        "platform": platform,
    }  # fmt: skip


def device_works() -> bool:
    """Whether the process can still compute: after a fault on the device it cannot."""
    try:
        return float(jnp.arange(4.0).sum()) == 6
    except Exception:
        return False


def outcome(good: bool, summary: str, **facts: Any) -> Outcome:
    return ("agrees" if good else "differs"), {"summary": summary, **facts}


def make_config(**fields: Any) -> Config:
    """A resolved config of a small model; names as "section.field"."""
    values = config_lib.default_config()
    values.model.update(layers=2, width=16, heads=2, context=16, vocab_size=60, loss_chunk=64)
    values.train.update(steps=8, batch_size=4)
    values.update_from_flattened_dict(fields)
    return config_lib.from_config_dict(values)


def relative(x: Any, truth: Any) -> float:
    """||x - truth|| / ||truth|| over all numbers."""
    x, truth = (np.asarray(y, np.float64) for y in (x, truth))
    return float(np.linalg.norm(x - truth) / max(np.linalg.norm(truth), 1e-300))


# ---------------------------------------------------------------------------- golden numbers


def golden_exact(kind: str, state: str) -> Outcome:
    """Logits, hidden states, loss and gradients in float64: to 1e-9."""
    with jax.enable_x64(True):
        return _passes(test_golden.test_forward_and_gradients, kind, state, 128)


def golden_steps(kind: str) -> Outcome:
    """Twenty steps of training in float64: to 1e-9."""
    with jax.enable_x64(True):
        return _passes(test_golden.test_twenty_training_steps, kind, "pert")


def _passes(test: Any, *arguments: Any) -> Outcome:
    try:
        test(None, make_config, *arguments)
    except AssertionError as e:
        return outcome(False, " ".join(str(e).split())[:200] or "an assertion failed")
    return outcome(True, "to 1e-9")


# Relative errors of logits and of all gradients together. A CPU has 4e-7 and 6e-7, 0.011 and 0.016.
GOLDEN_BOUNDS = {"float32": (3e-6, 6e-6), "bfloat16": (0.03, 0.05)}


def golden_rounded(kind: str, dtype: str, kernels: str) -> Outcome:
    """Logits and gradients of a model that computes in float32 or bfloat16, weights float32."""
    fields = {"model.attention": "xla", "model.kernels": kernels}
    config, golden, params = test_golden.load(make_config, kind, "pert", "float32", **fields)
    model = dataclasses.replace(config.model, dtype=dtype)
    batch = {name: jnp.asarray(golden[name[0].replace("i", "x").replace("t", "y")], jnp.int32)
             for name in ("inputs", "targets")}  # fmt: skip
    with jax.default_matmul_precision("highest"):
        logits, _ = test_golden.forward(dataclasses.replace(config, model=model), params,
                                        golden["x"])  # fmt: skip
        grads = jax.jit(jax.grad(lambda p: summed_nats(model, p, batch) / golden["y"].size))(params)
    of_logits = relative(logits, golden["logits"])
    own = to_reference(jax.tree.map(np.asarray, grads), model)
    names = sorted(own)
    flat = [
        np.concatenate([np.ravel(of[prefix + n]) for n in names])
        for of, prefix in ((own, ""), (golden, "grad/"))
    ]
    of_grads = relative(*flat)
    bounds = GOLDEN_BOUNDS[dtype]
    return outcome(
        of_logits <= bounds[0] and of_grads <= bounds[1],
        f"logits {of_logits:.1e}, gradients {of_grads:.1e}",
        logits=of_logits, gradients=of_grads, bounds=bounds,
    )  # fmt: skip


# ---------------------------------------------------------------------------- kernels


def kernel(name: str, shape: Sequence[int], dtype: str, **options: Any) -> Outcome:
    """A kernel and its XLA form, values and gradients, each against the XLA form in float64."""
    own, reference, arguments = KERNELS[name](shape, dtype, **options)
    return compare(own, reference, arguments)


def compare(own: Any, reference: Any, arguments: Any) -> Outcome:
    """Whether ``own`` errs as little as ``reference``; both are functions of the arguments.

    An output's error is relative to its norm; its worst error is relative to its largest number.
    """
    mine, usual = jax.jit(lambda a: (own(*a), reference(*a)))(arguments)

    def wide(x):
        return x.astype("float64") if jnp.issubdtype(x.dtype, jnp.floating) else x

    @jax.jit
    def errors(arguments, mine, usual):
        truth = reference(*jax.tree.map(wide, arguments))
        rows = []
        for m, u, t in zip(mine, usual, truth, strict=True):
            off = [jnp.linalg.norm((wide(x) - t).ravel()) for x in (m, u.astype(m.dtype))]
            size, largest = jnp.linalg.norm(t.ravel()), jnp.max(jnp.abs(t))
            worst = jnp.max(jnp.abs(wide(m) - t)) / largest
            rows.append(jnp.stack([off[0] / size, off[1] / size, worst]))
        return jnp.stack(rows)

    with jax.enable_x64(True):
        found = np.asarray(errors(arguments, mine, usual))
    good = True
    for (of_kernel, of_xla, worst), m, u in zip(found, mine, usual, strict=True):
        bound = 2.0**-7 if m.dtype == jnp.bfloat16 else 2e-5
        good &= m.shape == u.shape and of_kernel <= 1.05 * of_xla + 2e-6 and worst <= bound
    return outcome(
        bool(good), f"errors of kernel and XLA {found[:, 0].max():.1e} {found[:, 1].max():.1e}",
        kernel=found[:, 0].tolist(), xla=found[:, 1].tolist(), worst=found[:, 2].tolist(),
    )  # fmt: skip


def _interpreted() -> bool:
    return rules.platform() == "cpu"


def _normal(seed: int, shape: Sequence[int], dtype: Any = "float32") -> jax.Array:
    return jax.random.normal(jax.random.key(seed), tuple(shape), "float32").astype(dtype)


def _differentiated(own: Any, reference: Any, primals: Sequence[jax.Array]) -> Any:
    """(own, reference, arguments) of functions that return values and gradients."""
    outputs = jax.eval_shape(own, *primals)
    cotangents = tuple(_normal(100 + i, y.shape, y.dtype) for i, y in enumerate(outputs))

    def of(function):
        def run(primals, cotangents):
            out, pull = jax.vjp(function, *primals)
            return (*out, *pull(cotangents))

        return run

    return of(own), of(reference), (tuple(primals), cotangents)


def _residual(shape, dtype, normalize_h, copies):
    step = functools.partial(
        residual.residual_step, normalize_h=normalize_h, copies=copies, interpret=_interpreted()
    )

    def reference(h, f, alpha):
        return (norms.residual_step(h, f, alpha, normalize_h),) * copies

    alpha = 0.1 * jnp.abs(_normal(2, shape[-1:]))
    h = _normal(0, shape)
    h = h if normalize_h else norms.unit(h)
    return _differentiated(step, reference, (h.astype(dtype), _normal(1, shape, dtype), alpha))


def _swiglu(shape, dtype):
    uv = _normal(0, (shape[0], 2, shape[1]), dtype)
    return _differentiated(
        lambda uv: (swiglu.swiglu(uv, interpret=_interpreted()),),
        lambda uv: (norms.joined_swiglu(uv),),
        (uv,),
    )


def _add_rms_norm(shape, dtype):
    own = functools.partial(rms.add_rms_norm, eps=EPS, interpret=_interpreted())
    gain = 1 + 0.2 * _normal(2, shape[-1:])

    def reference(h, f, gain):
        x = h + f
        return x, norms.rms_norm(x, gain, EPS)

    # Sixteenths: their sum is exact in bfloat16, so that nothing but the norm is compared.
    h, f = (jnp.clip(jnp.round(16 * _normal(i, shape)) / 16, -4, 4).astype(dtype) for i in (0, 1))
    return _differentiated(own, reference, (h, f, gain))


def _rotate_heads(shape, dtype, form, per_row):
    b, t, kv_heads, group, head_dim = shape
    positions = jnp.arange(t) + jnp.arange(b)[:, None] if per_row else jnp.arange(t)
    tables = rope_tables(positions, head_dim, 10_000.0)
    scale_shapes = {
        "unit_after_rope": [(kv_heads, group, head_dim), (kv_heads, head_dim)],
        "rms_before_rope": [(head_dim,), (head_dim,)],
        "none": [],
    }[form]
    scales = [1 + 0.2 * _normal(i + 1, s) for i, s in enumerate(scale_shapes)]

    def own(qk, *scales):
        return heads_kernel.rotate_heads(
            qk, *tables, *(scales or (None, None)), form=form, eps=EPS, interpret=_interpreted()
        )

    def reference(qk, *scales):
        return heads.rotate_heads(qk, *tables, *(scales or (None, None)), form, EPS)

    qk = _normal(0, (b, t, kv_heads, group + 1, head_dim), dtype)
    return _differentiated(own, reference, (qk, *scales))


def _cross_entropy(shape, dtype):
    n, vocab, columns = shape
    logits = 3 * _normal(0, (n, columns))
    targets = jax.random.randint(jax.random.key(1), (n,), 0, vocab, "int32")
    weights = jax.random.bernoulli(jax.random.key(2), 0.9, (n,)).astype("float32")

    def own(logits, targets, weights):
        return cross_entropy.cross_entropy_gradient(
            logits, targets, weights, vocab, jnp.dtype(dtype), interpret=_interpreted()
        )

    def reference(logits, targets, weights):
        def loss(x):
            picked = jnp.take_along_axis(x, targets[:, None], -1)[:, 0]
            nats = jax.nn.logsumexp(x[:, :vocab], axis=-1) - picked
            return jnp.sum(nats * weights), nats

        gradient, nats = jax.grad(loss, has_aux=True)(logits)
        return nats, gradient

    return own, reference, (logits, targets, weights)


KERNELS = {
    "residual_step": _residual,
    "swiglu": _swiglu,
    "rotate_heads": _rotate_heads,
    "cross_entropy": _cross_entropy,
    "add_rms_norm": _add_rms_norm,
}


# ---------------------------------------------------------------------------- a whole model


def model(kind: str, dtype: str, dry: bool) -> Outcome:
    """Loss and gradients with kernels and without, against those without in float32."""
    layers, width, context, vocab = (1, 32, 16, 60) if dry else (4, 320, 200, 1000)
    fields = {
        "model.kind": kind, "model.qk_norm": True, "model.layers": layers, "model.width": width,
        "model.heads": width // 16, "model.kv_heads": width // 32, "model.context": context,
        "model.vocab_size": vocab, "model.loss_chunk": 128, "model.attention": "xla",
    }  # fmt: skip
    config = make_config(**fields).model
    params = init_params(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, context + 1), 0, vocab, "int32")
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}

    def run(**choices):
        chosen = dataclasses.replace(config, **choices)
        with jax.default_matmul_precision("highest"):
            loss, grads = jax.jit(
                jax.value_and_grad(lambda p: summed_nats(chosen, p, batch) / tokens.size)
            )(params)
        return float(loss), jax.tree.leaves(grads)

    loss, truth = run(kernels="xla")
    (loss_xla, xla), (loss_own, own) = (run(kernels=k, dtype=dtype) for k in ("xla", "pallas"))
    of_xla, of_own = (max(map(relative, grads, truth)) for grads in (xla, own))
    slack = 2e-5 if dtype == "float32" else 2e-3
    good = of_own <= 1.1 * of_xla + slack and abs(loss_own - loss) <= 1.1 * abs(
        loss_xla - loss
    ) + slack * abs(loss)
    return outcome(
        bool(good),
        f"gradients {of_own:.1e} and of XLA {of_xla:.1e}; loss off by {loss_own - loss:.1e}",
        gradients={"pallas": of_own, "xla": of_xla},
        losses={"float32": loss, "pallas": loss_own, "xla": loss_xla},
    )


# ---------------------------------------------------------------------------- timings


def train(spec: str | None, overrides: Mapping[str, str], steps: int) -> Outcome:
    """Steps of nGPT and of GPT with QK-norm, in turn; ratios are medians of neighbours."""
    config = configs.load(spec, list(overrides.items()), train_step.SMALL)
    set_xla_flags(config.runtime.xla_flags)
    numbers = train_step.measure(config, ("ngpt", "gpt_qk_norm"), steps, 3)
    return "measured", _without_model(numbers, spec, overrides)


def decode(
    spec: str | None, overrides: Mapping[str, str], rows: int, prompt: int, tokens: int, rounds: int
) -> Outcome:
    """Tokens per second of generation, nGPT and GPT."""
    config = configs.load(spec, list(overrides.items()), decode_benchmark.SMALL)
    numbers = decode_benchmark.measure(config, rows, prompt, tokens, rounds)
    return "measured", _without_model(numbers, spec, overrides)


def _without_model(numbers: dict[str, Any], spec: Any, overrides: Any) -> dict[str, Any]:
    """The numbers with what they were asked for instead of all fields of the model."""
    own = {name: value for name, value in numbers.items() if name not in ("model", "device", "jax")}
    return {**own, "config": spec, "overrides": dict(overrides)}
