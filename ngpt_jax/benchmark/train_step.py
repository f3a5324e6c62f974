"""Training steps of nGPT, of the GPT baseline and of a plain-jax GPT, timed interleaved."""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ngpt_jax.benchmark import configs, plain_gpt
from ngpt_jax.config import Config, ConfigError
from ngpt_jax.config.presets import of_kind
from ngpt_jax.config.resolve import resolve
from ngpt_jax.model.params import padded_vocab_size
from ngpt_jax.optim.recipes import make_optimizer
from ngpt_jax.optim.schedules import make_schedule
from ngpt_jax.parallel.mesh import BatchPlacer, make_mesh
from ngpt_jax.terminal import format_table
from ngpt_jax.training import layout, throughput

MODELS = ("ngpt", "gpt", "plain", "gpt_qk_norm")
# The small model in which all of them have the same shapes.
SMALL = {
    "model.context": 256, "model.scan_layers": False, "train.batch_size": 8, "train.steps": 1000,
}  # fmt: skip


class Stepper(NamedTuple):
    """A compiled step, its state and its batch."""

    step: Any
    state: Any
    batch: Any


def make_stepper(model: str, config: Config, tokens: np.ndarray) -> Stepper:
    """One of MODELS in the shapes of ``config``, on ``tokens`` (batch, context + 1)."""
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    if model == "plain":
        return _plain_stepper(config, batch)
    config = config_of(model, config)
    mesh = make_mesh(config)
    config, _ = layout.for_mesh(config, mesh)
    compiled = layout.lower_train_step(config, mesh).compile()
    state = layout.first_state(config, make_optimizer(config)[0], mesh)
    placer = BatchPlacer(mesh, config.train.batch_size, config.model.context)
    # Weights and segment ids, where the config has them: every target counts, in one document.
    like = layout.abstract_batch(config, mesh)
    batch = {name: np.ones(x.shape, x.dtype) for name, x in like.items()} | batch
    return Stepper(compiled, state, placer({name: x[placer.rows] for name, x in batch.items()}))


def config_of(model: str, config: Config) -> Config:
    """The resolved config of one of MODELS, but for plain, in the shapes of ``config``."""
    config = of_kind(config, model.removesuffix("_qk_norm"))
    if model == "gpt_qk_norm":
        choices = dataclasses.replace(config.model, qk_norm=True)
        config = dataclasses.replace(config, model=choices)
    return resolve(config)


def _plain_stepper(config: Config, batch: dict[str, np.ndarray]) -> Stepper:
    m = config.model
    if (m.dtype, m.mlp_width, m.kv_heads) != ("float32", 4 * m.width, m.heads):
        raise ConfigError(
            "The plain GPT is float32, with mlp_width = 4 * width and kv_heads = heads;"
            " leave it out with --models=ngpt,gpt."
        )
    if jax.device_count() > 1:
        raise ConfigError(
            f"The plain GPT runs on one device, and there are {jax.device_count()}; leave it out"
            " with --models=ngpt,gpt."
        )
    assert config.train.steps is not None
    init, step = plain_gpt.make_train_step(make_schedule(config.optimizer, config.train.steps))
    params = plain_gpt.init(jax.random.key(0), m.layers, m.width, m.heads, padded_vocab_size(m))
    state = (params, init(params))
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    return Stepper(compiled, state, jax.device_put(batch))


def measure(config: Config, models: Sequence[str], steps: int, warmup: int) -> dict[str, Any]:
    """Times one step of each model in turn.

    Args:
      config: resolved, with its vocabulary size.
      models: some of MODELS.
      steps: timed ones, of each model.
      warmup: steps of each model before them.

    Returns:
      JSON-able: medians, tokens per second, MFU and peak bytes a device for each model, and the
      medians of the ratios of steps that were made side by side.
    """
    rng = np.random.default_rng(0)
    assert config.model.vocab_size is not None
    shape = (config.train.batch_size, config.model.context + 1)
    tokens = rng.integers(0, config.model.vocab_size, shape, np.int32)
    runs = {model: make_stepper(model, config, tokens) for model in models}
    seconds: dict[str, list[float]] = {model: [] for model in models}
    for i in range(warmup + steps):
        for model, run in runs.items():
            start = time.perf_counter()
            state, _ = jax.block_until_ready(run.step(run.state, run.batch))
            if i >= warmup:
                seconds[model].append(time.perf_counter() - start)
            runs[model] = run._replace(state=state)
    tokens_per_step = config.train.batch_size * config.model.context

    def ratio(a: str, b: str) -> float | None:
        if a not in seconds or b not in seconds:
            return None
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b]))

    rows = {}
    for model, times in seconds.items():
        rate = tokens_per_step / statistics.median(times)
        memory = runs[model].step.memory_analysis()
        rows[model] = {
            "median_ms": 1e3 * statistics.median(times),
            "min_ms": 1e3 * min(times),
            "tokens_per_second": rate,
            "mfu": throughput.mfu(config.model, rate),
            "peak_bytes": getattr(memory, "peak_memory_in_bytes", None),
        }
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "models": rows,
        "device_peak_bytes": stats.get("peak_bytes_in_use"),
        "ratios": {
            "ngpt/gpt": ratio("ngpt", "gpt"),
            "ngpt/gpt_qk_norm": ratio("ngpt", "gpt_qk_norm"),
            "gpt/plain": ratio("gpt", "plain"),
        },
        **configs.machine(),
        "steps": steps,
        "model": dataclasses.asdict(config.model),
        "batch_size": config.train.batch_size,
    }


def show(numbers: dict[str, Any]) -> str:
    """The numbers of :func:`measure` as a table."""
    rows: list[tuple[str, ...]] = [
        ("model", "median ms", "least ms", "tokens/s", "MFU", "peak GiB")
    ]
    for model, row in numbers["models"].items():
        rows.append((
            model, f"{row['median_ms']:.1f}", f"{row['min_ms']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
            f"{(row['peak_bytes'] or 0) / throughput.GIB:.2f}",
        ))  # fmt: skip
    lines = [format_table(rows)]
    for name, value in numbers["ratios"].items():
        if value is not None:
            lines.append(f"{name}: {value:.3f} (median of the ratios of steps side by side)")
    if (peak := numbers["device_peak_bytes"]) is not None:
        lines.append(
            f"peak in use on the first device, all models together: {peak / throughput.GIB:.2f} GiB"
        )
    lines.append(f"{numbers['steps']} steps each on {numbers['device']}, {numbers['machine']}")
    return "\n".join(lines)
