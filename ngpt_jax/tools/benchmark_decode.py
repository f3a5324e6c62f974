"""Times prefill and decoding of nGPT and of the GPT baseline, interleaved.

Examples:
  python -m ngpt_jax.tools.benchmark_decode
  python -m ngpt_jax.tools.benchmark_decode --batch_size=8 --tokens=512 --json=decode.json
  python -m ngpt_jax.tools.benchmark_decode --config=experiments/124m.py --prompt=768 \\
      --config.model.vocab_size=32000

Without --config: 4 layers, width 256, 4 heads, 8192 token ids, float32. Weights are folded, as a
loaded model's are; tokens are drawn greedily; one device is used. Beside the time a token it tells
that of the last quarter of the tokens over the first one's, and how long a token takes with a
cache of four times as many slots: attention reads the whole cache.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from ngpt_jax import config as config_lib
from ngpt_jax.config import Config, command, experiment
from ngpt_jax.config.presets import of_kind
from ngpt_jax.config.resolve import resolve
from ngpt_jax.decoding import folding
from ngpt_jax.decoding.cache import CHUNK
from ngpt_jax.decoding.prefill import Decoder, prefill
from ngpt_jax.decoding.sampling import Sampling
from ngpt_jax.decoding.step import decode
from ngpt_jax.files import write_atomically
from ngpt_jax.model.transformer import init_params
from ngpt_jax.training.loop import enable_x64_if_used
from ngpt_jax.training.setup import with_tokenizer

_CONFIG = flags.DEFINE_string("config", None, "Experiment FILE[:variant,...] to take shapes from.")
_BATCH = flags.DEFINE_integer("batch_size", 1, "Rows at one time.", lower_bound=1)
_PROMPT = flags.DEFINE_integer("prompt", 512, "Tokens of a prompt.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 256, "Tokens to generate.", lower_bound=64)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Texts of each model.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Also write the numbers to this file.")
_GREEDY = Sampling(temperature=0.0)


class _Timed:
    """A model with its weights, and its seconds: of prefills, and a token by size of the cache."""

    def __init__(self, config: Config, kind: str):
        config = resolve(of_kind(config, kind))
        self.model = config.model
        params = init_params(self.model, jax.random.key(0))
        self.weights = jax.jit(lambda p: folding.for_inference(self.model, p))(params)
        self.prefills: list[float] = []
        self.chunks: dict[int, list[float]] = {}

    def prefill(self, slots: int) -> Decoder:
        tokens = np.zeros((_BATCH.value, _PROMPT.value), np.int32)
        first = np.zeros(_BATCH.value, np.int32)
        keys = jax.random.split(jax.random.key(0), _BATCH.value)
        start = time.perf_counter()
        decoder = prefill(self.model, self.weights, tokens, first, slots, keys)
        jax.block_until_ready(decoder)
        self.prefills.append(time.perf_counter() - start)
        return decoder

    def decode(self, decoder: Decoder, slots: int) -> Decoder:
        start = time.perf_counter()
        decoder, ids, _ = decode(self.model, self.weights, decoder, CHUNK, _GREEDY, -1)
        jax.block_until_ready(ids)
        self.chunks.setdefault(slots, []).append((time.perf_counter() - start) / CHUNK)
        return decoder


def measure(config: Config) -> dict[str, _Timed]:
    """Rounds of texts, a chunk of each model in turn; those of the first round do not count."""
    timed = {kind: _Timed(config, kind) for kind in ("ngpt", "gpt")}
    slots = _PROMPT.value + _TOKENS.value
    for round_ in range(_ROUNDS.value + 1):
        for size in (slots, 4 * slots):
            decoders = {kind: t.prefill(size) for kind, t in timed.items()}
            for _ in range(_TOKENS.value // CHUNK):
                for kind, t in timed.items():
                    decoders[kind] = t.decode(decoders[kind], size)
        if round_ == 0:  # compiled
            for t in timed.values():
                t.prefills, t.chunks = [], {}
    return timed


def report(config: Config, timed: dict[str, _Timed]) -> dict[str, Any]:
    """Medians, and the medians of the ratios of chunks made side by side."""
    small, large = sorted(next(iter(timed.values())).chunks)
    per_round = _TOKENS.value // CHUNK
    quarter = per_round // 4
    models = {}
    for kind, t in timed.items():
        seconds = t.chunks[small]
        rounds = [seconds[i : i + per_round] for i in range(0, len(seconds), per_round)]
        growth = [statistics.median(r[-quarter:]) / statistics.median(r[:quarter]) for r in rounds]
        prefill = statistics.median(t.prefills)
        models[kind] = {
            "prefill_ms": 1e3 * prefill,
            "prefill_tokens_per_second": _BATCH.value * _PROMPT.value / prefill,
            "decode_ms": 1e3 * statistics.median(seconds),
            "decode_tokens_per_second": _BATCH.value / statistics.median(seconds),
            "last_quarter_over_first": statistics.median(growth),
            "decode_ms_large_cache": 1e3 * statistics.median(t.chunks[large]),
        }

    def share(of: str) -> float:
        pairs = (
            zip(timed["gpt"].prefills, timed["ngpt"].prefills)
            if of == "prefill"
            else zip(timed["gpt"].chunks[small], timed["ngpt"].chunks[small])
        )
        return statistics.median(g / n for g, n in pairs)

    return {
        "models": models,
        "ngpt_share_of_gpt": {of: share(of) for of in ("prefill", "decode")},
        "slots": [small, large],
        "batch_size": _BATCH.value,
        "prompt": _PROMPT.value,
        "tokens": _TOKENS.value,
        "device": jax.devices()[0].device_kind,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "jax": jax.__version__,
        "model": dataclasses.asdict(config.model),
    }


def show(numbers: dict[str, Any]) -> str:
    small, large = numbers["slots"]
    lines = [
        f"{'model':6} {'prefill tokens/s':>17} {'decode tokens/s':>16} {'ms a step':>10}"
        f" {'last/first quarter':>19} {f'ms, {large} slots':>16}"
    ]
    for kind, row in numbers["models"].items():
        lines.append(
            f"{kind:6} {row['prefill_tokens_per_second']:17,.0f}"
            f" {row['decode_tokens_per_second']:16,.1f} {row['decode_ms']:10.2f}"
            f" {row['last_quarter_over_first']:19.2f} {row['decode_ms_large_cache']:16.2f}"
        )
    shares = numbers["ngpt_share_of_gpt"]
    lines.append(
        f"nGPT's tokens/s over GPT's: prefill {shares['prefill']:.3f}, decode"
        f" {shares['decode']:.3f} (medians of ratios side by side)"
    )
    lines.append(
        f"{numbers['batch_size']} rows, prompts of {numbers['prompt']} tokens,"
        f" {numbers['tokens']} generated, a cache of {small} slots; {numbers['device']},"
        f" {numbers['machine']}"
    )
    return "\n".join(lines)


def _main(overrides: list[tuple[str, str]]) -> None:
    command.check_output(json=_JSON.value)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # the kernel is told for each shape
    if _CONFIG.value is None:
        shape = config_lib.default_config()
        shape.model.update(width=256, vocab_size=8192)
        shape.train.steps = 1
    config = experiment.load_config(_CONFIG.value or shape, overrides)
    if config.model.vocab_size is None:
        config, _ = with_tokenizer(config)
    enable_x64_if_used(config)
    numbers = report(config, measure(config))
    print(show(numbers))
    if _JSON.value:
        write_atomically(Path(_JSON.value), json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    command.run_command(_main)
