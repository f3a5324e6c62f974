"""What feeds training, timed: tokenizing, preparing shards, reading sequences."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ngpt_jax.config import DataConfig
from ngpt_jax.data import pipeline
from ngpt_jax.data.corpus import load_corpus
from ngpt_jax.data.text.sources import open_source
from ngpt_jax.data.text.units import read_texts
from ngpt_jax.data.tokenizers.base import Tokenizer
from ngpt_jax.data.tokenizers.load import load_tokenizer
from ngpt_jax.parallel.backend import available_cores

_CHARACTERS = 20_000_000  # for the library alone


def measure(
    config: DataConfig, workers: int | None, batch_size: int, context: int, rounds: int
) -> dict[str, Any]:
    """Times the parts in turn, as the speed of a machine changes; the best of the rounds counts.

    Args:
      config: of text and tokenizer.
      workers: processes of the preparation; None: one a core.
      batch_size, context: of what the loader reads.
      rounds: timings of each part.

    Returns:
      JSON-able, tokens per second: "library", the tokenizer's library alone on one core; "one" and
      "all", the preparation with one process and with all workers; "loader", on one core. And
      "tokens" of the text, "peak_mib" of a process of the preparation.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    cores = len(available_cores())
    workers = workers or cores
    tokenizer = load_tokenizer(config)
    found: dict[str, list[float]] = {"library": [], "one": [], "all": [], "loader": []}
    for _ in range(rounds):
        found["library"].append(_library_alone(config, tokenizer))
        for name, count in (("one", 1), ("all", workers)):
            rate, peak, tokens = _preparation(config, count)
            found[name].append(rate)
        found["loader"].append(_loader(config, tokenizer, batch_size, context))
    return {
        **{name: max(rates) for name, rates in found.items()},
        "workers": workers, "cores": cores, "peak_mib": peak, "tokens": tokens,
        "tokenizer": tokenizer.name, "rounds": rounds,
    }  # fmt: skip


def _library(tokenizer: Any) -> Callable[[Sequence[str]], int]:
    """A function that counts the tokens of texts with the call that the library's users make."""
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
    """Tokens per second of one core."""
    texts, characters = [], 0
    units = open_source(config, cache=config.cache).train
    with tempfile.TemporaryDirectory() as folder:
        for text in read_texts(units, lambda unit: unit.fetch(Path(folder), lambda what: None)):
            texts.append(text)
            characters += len(text)
            if characters > _CHARACTERS:
                break
    count = _library(tokenizer)
    portions = [texts[i : i + 64] for i in range(0, len(texts), 64)]
    start = time.perf_counter()
    tokens = sum(count(portion) for portion in portions)
    return tokens / (time.perf_counter() - start)


def _preparation(config: DataConfig, workers: int) -> tuple[float, float, int]:
    """Tokens per second, peak MiB of a process, and tokens, of the command run as a process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "ngpt_jax.data.prepare", f"--out={folder}/out",
            f"--source={config.source}", *(f"--paths={path}" for path in config.paths),
            f"--tokenizer={config.tokenizer}", f"--workers={workers}",
        ]  # fmt: skip
        # Started by a small process: Linux counts what the starting one held before as the child's.
        code = (
            "import resource, subprocess, sys, time; start = time.perf_counter();"
            " subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
            " print(time.perf_counter() - start,"
            " resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
        )
        said = subprocess.run(
            [sys.executable, "-c", code, *command], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        seconds, peak = map(float, said.split())
        sets = json.loads(Path(folder, "out/manifest.json").read_text())["sets"].values()
        tokens = sum(shard["tokens"] for facts in sets for shard in facts["shards"])
        return tokens / seconds, peak, tokens


def _loader(config: DataConfig, tokenizer: Tokenizer, batch_size: int, context: int) -> float:
    """Tokens per second of one core that reads sequences of a prepared text."""
    corpus = load_corpus(config, tokenizer, context)
    dataset = pipeline.train_dataset(corpus.train[""], 0)
    batches = pipeline.train_batches(dataset, batch_size, 0, config.threads, config.prefetch)
    next(batches)
    start, count = time.process_time(), max(100, 1_000_000 // (batch_size * context))
    for _ in range(count):
        next(batches)
    return count * batch_size * context / (time.process_time() - start)


def show(numbers: dict[str, Any]) -> str:
    """The numbers of :func:`measure` as a table."""
    n = numbers
    a_core = n["all"] / min(n["workers"], n["cores"])
    return "\n".join([
        f"{n['tokens']:,} tokens, tokenizer {n['tokenizer']}, {n['cores']} cores; tokens/s, best of"
        f" {n['rounds']}",
        f"library alone, one core        {n['library']:>14,.0f}",
        f"preparation, one process       {n['one']:>14,.0f}  ratio {n['one'] / n['library']:.2f}",
        f"preparation, {n['workers']} workers{'':9}  {n['all']:>14,.0f}  a core {a_core:,.0f},"
        f" ratio {a_core / n['library']:.2f}",
        f"loader, one core               {n['loader']:>14,.0f}",
        f"peak memory of a process of the preparation: {n['peak_mib']:,.0f} MiB",
    ])  # fmt: skip
