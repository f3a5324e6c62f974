"""Times what feeds training: tokenizing, preparing shards, and reading windows.

Examples:
  python -m ngpt_jax.tools.benchmark_data --paths=prose.jsonl.gz --tokenizer=llama2.json
  python -m ngpt_jax.tools.benchmark_data --tokenizer=gpt2/ --workers=8 --json=data.json

Tells tokens/s of the tokenizer's library alone on one core, of the preparation (one process, and
--workers of them) and its peak memory, and of the loader on one core. The text is the standard
library's source without --paths.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from ngpt_jax.config import DataConfig, command
from ngpt_jax.data.text.sources import open_source
from ngpt_jax.data.tokenizers.base import Tokenizer
from ngpt_jax.data.tokenizers.load import load_tokenizer
from ngpt_jax.files import write_atomically

_PATHS = flags.DEFINE_multi_string("paths", [], "Text, as --config.data.paths of training.")
_TOKENIZER = flags.DEFINE_string("tokenizer", "byte", "As --config.data.tokenizer of training.")
_WORKERS = flags.DEFINE_integer("workers", None, "Processes; one a core by default.", lower_bound=1)
_CONTEXT = flags.DEFINE_integer("context", 128, "Tokens of a window.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 16, "Windows of a batch.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Timings of each; the best counts.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Also write the numbers to this file.")
_CHARACTERS = 20_000_000  # for the library alone


def _library(tokenizer: Any) -> Callable[[Sequence[str]], int]:
    """The library's own call, as its users make it: counts tokens."""
    kind = type(tokenizer).__name__
    if kind == "JsonTokenizer":
        encode = tokenizer.tokenizer.encode_batch
        return lambda texts: sum(len(e.ids) for e in encode(texts, add_special_tokens=False))
    if kind == "SentencePieceTokenizer":
        return lambda texts: sum(map(len, tokenizer.processor.encode(texts, num_threads=1)))
    if kind == "TiktokenTokenizer":
        encode_one = tokenizer.encoding.encode_ordinary
        return lambda texts: sum(len(encode_one(text)) for text in texts)
    return lambda texts: sum(len(text.encode()) for text in texts)


def _library_alone(config: DataConfig, tokenizer: Tokenizer) -> float:
    """Tokens/s of one core."""
    texts, characters = [], 0
    units = open_source(config).train
    for text, _ in itertools.chain.from_iterable(unit.read() for unit in units):
        texts.append(text)
        characters += len(text)
        if characters > _CHARACTERS:
            break
    count = _library(tokenizer)
    portions = [texts[i : i + 64] for i in range(0, len(texts), 64)]
    start = time.perf_counter()
    tokens = sum(count(portion) for portion in portions)
    return tokens / (time.perf_counter() - start)


def _preparation(workers: int) -> tuple[float, float, int]:
    """Tokens/s, peak MiB of a process, and tokens, of the command in a process of its own."""
    folder = tempfile.mkdtemp()
    source = [f"--paths={path}" for path in _PATHS.value]
    command = [
        sys.executable, "-m", "ngpt_jax.data.prepare", f"--out={folder}/out",
        f"--source={'text' if source else 'stdlib'}", *source, f"--tokenizer={_TOKENIZER.value}",
        f"--workers={workers}",
    ]  # fmt: skip
    try:
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        sets = json.loads(Path(folder, "out/manifest.json").read_text())["sets"].values()
        tokens = sum(shard["tokens"] for facts in sets for shard in facts["shards"])
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        return tokens / seconds, peak, tokens
    finally:
        shutil.rmtree(folder)


def _loader(config: DataConfig, tokenizer: Tokenizer) -> float:
    """Tokens/s of one core that reads windows of a prepared text."""
    from ngpt_jax.data import pipeline
    from ngpt_jax.data.corpus import load_corpus

    corpus = load_corpus(config, tokenizer, _CONTEXT.value)
    dataset = pipeline.train_dataset(corpus.train[""], 0)
    batches = pipeline.train_batches(dataset, _BATCH.value, 0, config.threads, config.prefetch)
    next(batches)
    start, count = time.process_time(), max(100, 1_000_000 // (_BATCH.value * _CONTEXT.value))
    for _ in range(count):
        next(batches)
    return count * _BATCH.value * _CONTEXT.value / (time.process_time() - start)


def _main(overrides: list[tuple[str, str]]) -> int:
    del overrides
    command.check_output(json=_JSON.value)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    cores = os.cpu_count() or 1
    workers = _WORKERS.value or cores
    source = "text" if _PATHS.value else "stdlib"
    config = DataConfig(source=source, paths=tuple(_PATHS.value), tokenizer=_TOKENIZER.value)
    tokenizer = load_tokenizer(config)
    found: dict[str, list[float]] = {"library": [], "one": [], "all": [], "loader": []}
    peak, tokens = 0.0, 0
    for _ in range(_ROUNDS.value):  # in turn: the machine's speed moves
        found["library"].append(_library_alone(config, tokenizer))
        for name, number in (("one", 1), ("all", workers)):
            rate, peak, tokens = _preparation(number)
            found[name].append(rate)
        found["loader"].append(_loader(config, tokenizer))
    best = {name: max(rates) for name, rates in found.items()}
    busy = min(workers, cores)
    print(f"{tokens:,} tokens, tokenizer {tokenizer.name}, {cores} cores; tokens/s, best of"
          f" {_ROUNDS.value}")  # fmt: skip
    print(f"library alone, one core        {best['library']:>14,.0f}")
    print(f"preparation, one process       {best['one']:>14,.0f}  ratio"
          f" {best['one'] / best['library']:.2f}")  # fmt: skip
    a_core = best["all"] / busy
    print(f"preparation, {workers} workers{'':9}  {best['all']:>14,.0f}  a core"
          f" {a_core:,.0f}, ratio {a_core / best['library']:.2f}")  # fmt: skip
    print(f"loader, one core               {best['loader']:>14,.0f}")
    print(f"peak memory of a process of the preparation: {peak:,.0f} MiB")
    if _JSON.value:
        numbers = {**best, "workers": workers, "cores": cores, "peak_mib": peak, "tokens": tokens}
        write_atomically(Path(_JSON.value), json.dumps(numbers, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    command.run_command(_main)
