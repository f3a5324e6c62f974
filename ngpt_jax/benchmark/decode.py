"""Prefill and decoding of nGPT and of the GPT baseline, timed interleaved, on one device."""

import dataclasses
import statistics
import time
from typing import Any

import jax
import numpy as np

from ngpt_jax.benchmark import configs
from ngpt_jax.config import Config, ConfigError
from ngpt_jax.config.presets import of_kind
from ngpt_jax.config.resolve import resolve
from ngpt_jax.decoding import folding
from ngpt_jax.decoding.cache import CHUNK
from ngpt_jax.decoding.prefill import Decoder, prefill
from ngpt_jax.decoding.sampling import Sampling
from ngpt_jax.decoding.step import decode
from ngpt_jax.model.transformer import init_params
from ngpt_jax.terminal import format_table

SMALL = {"train.steps": 1}
_GREEDY = Sampling(temperature=0.0)


class _Timed:
    """A model with folded weights, and its seconds: of prefills, and a token by cache size."""

    def __init__(self, config: Config):
        self.model = config.model
        params = init_params(config.model, jax.random.key(0))
        self.weights = jax.jit(lambda p: folding.for_inference(config.model, p))(params)
        self.forget()

    def forget(self) -> None:
        self.prefills: list[float] = []
        self.tokens: dict[int, list[float]] = {}

    def prefill(self, batch_size: int, prompt: int, slots: int) -> Decoder:
        tokens, first = np.zeros((batch_size, prompt), np.int32), np.zeros(batch_size, np.int32)
        keys = jax.random.split(jax.random.key(0), batch_size)
        start = time.perf_counter()
        decoder = prefill(self.model, self.weights, tokens, first, slots, keys)
        jax.block_until_ready(decoder)
        self.prefills.append(time.perf_counter() - start)
        return decoder

    def decode(self, decoder: Decoder, slots: int) -> Decoder:
        start = time.perf_counter()
        decoder, ids, _ = decode(self.model, self.weights, decoder, CHUNK, _GREEDY, -1)
        jax.block_until_ready(ids)
        self.tokens.setdefault(slots, []).append((time.perf_counter() - start) / CHUNK)
        return decoder


def measure(
    config: Config, batch_size: int, prompt: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """Times a chunk of tokens of each model in turn; weights are folded, draws are greedy.

    Args:
      config: resolved, with its vocabulary size.
      batch_size: rows at one time.
      prompt: tokens of a prompt.
      tokens: to generate.
      rounds: texts of each model; one more comes before them, for compilation.

    Returns:
      JSON-able: medians for each model, and the medians of the ratios of what was made side by
      side.
    """
    timed = {kind: _Timed(resolve(of_kind(config, kind))) for kind in ("ngpt", "gpt")}
    if tokens < CHUNK or tokens % CHUNK:
        raise ConfigError(f"--tokens={tokens} must be a multiple of {CHUNK}: so many are a chunk.")
    small, large = prompt + tokens, 4 * (prompt + tokens)
    for number in range(rounds + 1):
        for slots in (small, large):
            decoders = {kind: t.prefill(batch_size, prompt, slots) for kind, t in timed.items()}
            for _ in range(tokens // CHUNK):
                for kind, t in timed.items():
                    decoders[kind] = t.decode(decoders[kind], slots)
        if number == 0:
            for t in timed.values():
                t.forget()
    ngpt, gpt = timed["ngpt"], timed["gpt"]
    pairs = {
        "prefill": zip(gpt.prefills, ngpt.prefills),
        "decode": zip(gpt.tokens[small], ngpt.tokens[small]),
    }
    models = {kind: _figures(t, batch_size, prompt, tokens // CHUNK) for kind, t in timed.items()}
    share = {what: statistics.median(g / n for g, n in both) for what, both in pairs.items()}
    return {
        "models": models,
        "ngpt_share_of_gpt": share,
        "slots": [small, large],
        "batch_size": batch_size,
        "prompt": prompt,
        "tokens": tokens,
        **configs.machine(),
        "device": jax.devices()[0].device_kind,
        "model": dataclasses.asdict(config.model),
    }


def _figures(t: _Timed, batch_size: int, prompt: int, per_round: int) -> dict[str, float]:
    small, large = sorted(t.tokens)
    seconds, quarter = t.tokens[small], per_round // 4
    rounds = [seconds[i : i + per_round] for i in range(0, len(seconds), per_round)]
    growth = [statistics.median(r[-quarter:]) / statistics.median(r[:quarter]) for r in rounds]
    prefill, decode = statistics.median(t.prefills), statistics.median(seconds)
    return {
        "prefill_ms": 1e3 * prefill,
        "prefill_tokens_per_second": batch_size * prompt / prefill,
        "decode_ms": 1e3 * decode,
        "decode_tokens_per_second": batch_size / decode,
        "last_quarter_over_first": statistics.median(growth),
        "decode_ms_large_cache": 1e3 * statistics.median(t.tokens[large]),
    }


def show(numbers: dict[str, Any]) -> str:
    """The numbers of :func:`measure` as a table."""
    small, large = numbers["slots"]
    rows: list[tuple[str, ...]] = [(
        "model", "prefill tokens/s", "decode tokens/s", "ms a step", "last/first quarter",
        f"ms, {large} slots",
    )]  # fmt: skip
    for kind, row in numbers["models"].items():
        rows.append((
            kind, f"{row['prefill_tokens_per_second']:,.0f}",
            f"{row['decode_tokens_per_second']:,.1f}", f"{row['decode_ms']:.2f}",
            f"{row['last_quarter_over_first']:.2f}", f"{row['decode_ms_large_cache']:.2f}",
        ))  # fmt: skip
    share = numbers["ngpt_share_of_gpt"]
    return "\n".join([
        format_table(rows),
        f"nGPT's tokens/s over GPT's: prefill {share['prefill']:.3f}, decode"
        f" {share['decode']:.3f} (medians of ratios side by side)",
        f"{numbers['batch_size']} rows, prompts of {numbers['prompt']} tokens,"
        f" {numbers['tokens']} generated, a cache of {small} slots; {numbers['device']},"
        f" {numbers['machine']}",
    ])  # fmt: skip
