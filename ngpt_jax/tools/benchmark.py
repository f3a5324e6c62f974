"""Times training steps of nGPT, of our GPT baseline and of a plain-jax GPT, interleaved.

Examples:
  python -m ngpt_jax.tools.benchmark
  python -m ngpt_jax.tools.benchmark --steps=30 --json=benchmark.json
  python -m ngpt_jax.tools.benchmark --config=experiments/124m.py --config.train.batch_size=32 \\
      --config.model.vocab_size=32000
  python -m ngpt_jax.tools.benchmark --config=experiments/1b.py:ctx4k --config.train.batch_size=8 \\
      --config.model.vocab_size=32000 --config.model.attention=xla

With --config: nGPT and GPT on the mesh of all devices here, as training runs them, with the
config's shapes, batch, dtype, kernels and remat.

Without --config: 4 layers, width 256, 4 heads, 8192 token ids, 8 windows of 256 tokens, float32,
layers unrolled as the plain GPT's are. The plain GPT (ngpt_jax/tools/plain_gpt.py) has the same
shapes and the same optimizer; it is float32, with 4 * width hidden units and no grouped queries.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import flags

from ngpt_jax import config as config_lib
from ngpt_jax.benchmark import plain_gpt
from ngpt_jax.config import Config, ConfigError, command, experiment
from ngpt_jax.config.presets import of_kind
from ngpt_jax.config.resolve import resolve
from ngpt_jax.data.tokenizers.load import with_tokenizer
from ngpt_jax.files import write_atomically
from ngpt_jax.model.params import padded_vocab_size
from ngpt_jax.optim.recipes import make_optimizer
from ngpt_jax.optim.schedules import make_schedule
from ngpt_jax.parallel.backend import enable_x64_if_used, set_xla_flags
from ngpt_jax.parallel.mesh import BatchPlacer, make_mesh
from ngpt_jax.training import layout, throughput

MODELS = ("ngpt", "gpt", "plain")
_CONFIG = flags.DEFINE_string("config", None, "Experiment FILE[:variant,...] to take shapes from.")
_MODELS = flags.DEFINE_list(
    "models", None, "Which of ngpt, gpt, plain to time; all, or with --config the first two."
)
_STEPS = flags.DEFINE_integer("steps", 20, "Timed steps of each model.", lower_bound=3)
_WARMUP = flags.DEFINE_integer("warmup", 3, "Steps of each model before the clock.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Also write the numbers to this file.")


def default_shape() -> ml_collections.ConfigDict:
    config = config_lib.default_config()
    config.model.width = 256
    config.model.context = 256
    config.model.vocab_size = 8192
    config.model.scan_layers = False
    config.train.batch_size = 8
    config.train.steps = 1000
    return config


def _plain_shapes(config: Config) -> None:
    m = config.model
    if (m.dtype, m.mlp_width, m.kv_heads) != ("float32", 4 * m.width, m.heads):
        raise ConfigError(
            "The plain GPT is float32, with mlp_width = 4 * width and kv_heads = heads;"
            " leave it out with --models=ngpt,gpt."
        )


class Stepper(NamedTuple):
    """A compiled step, its first state, its batch, and bytes a device that it needs."""

    step: Any
    state: Any
    batch: Any
    peak_bytes: int | None


def make_stepper(model: str, config: Config, tokens: np.ndarray) -> Stepper:
    """One of MODELS in the shapes of ``config``, on ``tokens`` (batch, context + 1)."""
    assert config.train.steps is not None
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    if model == "plain":
        _plain_shapes(config)
        m = config.model
        init, step = plain_gpt.make_train_step(make_schedule(config.optimizer, config.train.steps))
        params = plain_gpt.init(jax.random.key(0), m.layers, m.width, m.heads, padded_vocab_size(m))
        state: Any = (params, init(params))
        compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
        return Stepper(compiled, state, jax.device_put(batch), _peak_bytes(compiled))
    config = resolve(of_kind(config, model))
    mesh = make_mesh(config)
    config, _ = layout.for_mesh(config, mesh)
    compiled = layout.lower_train_step(config, mesh).compile()
    tx, _ = make_optimizer(config)
    state = layout.first_state(config, tx, mesh)
    placer = BatchPlacer(mesh, config.train.batch_size, config.model.context)
    # Weights and ids of documents, where the config has them: all targets of one document.
    like = layout.abstract_batch(config, mesh)
    batch = {name: np.ones(x.shape, x.dtype) for name, x in like.items()} | batch
    placed = placer({name: x[placer.rows] for name, x in batch.items()})
    return Stepper(compiled, state, placed, _peak_bytes(compiled))


def _peak_bytes(compiled: Any) -> int | None:
    memory = compiled.memory_analysis()
    return None if memory is None else getattr(memory, "peak_memory_in_bytes", None)


def measure(
    config: Config, models: list[str], steps: int, warmup: int
) -> tuple[dict[str, list[float]], dict[str, int | None]]:
    """Seconds of each timed step, one step of each model in turn, and bytes a device of each."""
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
    return seconds, {model: run.peak_bytes for model, run in runs.items()}


def report(
    config: Config, seconds: dict[str, list[float]], peak_bytes: dict[str, int | None]
) -> dict[str, Any]:
    """Medians, tokens/s, MFU, and the median of the ratios of steps made side by side."""
    tokens = config.train.batch_size * config.model.context

    def ratio(a: str, b: str) -> float | None:
        if a not in seconds or b not in seconds:
            return None
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b]))

    rows = {
        model: {
            "median_ms": 1e3 * statistics.median(times),
            "min_ms": 1e3 * min(times),
            "tokens_per_second": tokens / statistics.median(times),
            "mfu": throughput.mfu(config.model, tokens / statistics.median(times)),
            "peak_bytes": peak_bytes[model],
        }
        for model, times in seconds.items()
    }
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "models": rows,
        "device_peak_bytes": stats.get("peak_bytes_in_use"),
        "ratios": {"ngpt/gpt": ratio("ngpt", "gpt"), "gpt/plain": ratio("gpt", "plain")},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "jax": jax.__version__,
        "steps": len(next(iter(seconds.values()))),
        "model": dataclasses.asdict(config.model),
        "batch_size": config.train.batch_size,
    }


def show(numbers: dict[str, Any]) -> str:
    head = f"{'model':8} {'median ms':>10} {'least ms':>10} {'tokens/s':>10} {'MFU':>6}"
    lines = [f"{head} {'peak GiB':>9}"]
    for model, row in numbers["models"].items():
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        lines.append(
            f"{model:8} {row['median_ms']:10.1f} {row['min_ms']:10.1f}"
            f" {row['tokens_per_second']:10,.0f} {mfu:>6} {(row['peak_bytes'] or 0) / 2**30:9.2f}"
        )
    for name, value in numbers["ratios"].items():
        if value is not None:
            lines.append(f"{name}: {value:.3f} (median of the ratios of steps side by side)")
    if (peak := numbers["device_peak_bytes"]) is not None:
        lines.append(
            f"peak in use on the first device, all models together: {peak / 2**30:.2f} GiB"
        )
    lines.append(f"{numbers['steps']} steps each on {numbers['device']}, {numbers['machine']}")
    return "\n".join(lines)


def _main(overrides: list[tuple[str, str]]) -> None:
    models = _MODELS.value or list(MODELS if _CONFIG.value is None else MODELS[:2])
    if bad := [m for m in models if m not in MODELS]:
        raise ConfigError(f"--models: unknown model {bad[0]!r}; known are {', '.join(MODELS)}.")
    command.check_output(json=_JSON.value)
    config = experiment.load_config(_CONFIG.value or default_shape(), overrides)
    set_xla_flags(config.runtime.xla_flags)
    if config.model.vocab_size is None:
        config, _ = with_tokenizer(config)
    enable_x64_if_used(config.model)
    numbers = report(config, *measure(config, models, _STEPS.value, _WARMUP.value))
    print(show(numbers))
    if _JSON.value:
        write_atomically(Path(_JSON.value), json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    command.run_command(_main)
