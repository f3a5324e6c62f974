"""Prompts from a command line, and what a model says after them on a terminal."""

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ngpt_jax.config import ConfigError
from ngpt_jax.files import reason
from ngpt_jax.inference.loading import LoadedModel

_ENDS = {
    "tokens": "as many as asked for",
    "context": "the context is full (--context allows more)",
    "document": "the document ended",
    "stop": "a stop string was met",
}


def read_prompts(prompts: Sequence[str], file: str | None, stops: Sequence[str]) -> list[str]:
    """The texts of --prompt, where - stands for standard input, and of --prompt_file.

    One empty prompt where there is none. Raises ConfigError, also where a prompt or one of
    ``stops`` is not UTF-8.
    """
    if prompts.count("-") > 1:
        raise ConfigError("--prompt=- is given twice; standard input is read once.")
    where = "--prompt=-"
    try:
        texts = [_standard_input() if p == "-" else p for p in prompts]
        if file is not None:
            where = f"--prompt_file={file}"
            texts.append(Path(file).expanduser().read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise ConfigError(f"{where} cannot be read: {reason(e)}.") from e
    except UnicodeError as e:
        raise ConfigError(f"{where} is not UTF-8 text ({reason(e)}); convert it first.") from e
    if any(re.search("[\ud800-\udfff]", text) for text in [*texts, *stops]):
        raise ConfigError("A --prompt or --stop is not UTF-8 text; convert it first.")
    return texts or [""]


def _standard_input() -> str:
    if sys.stdin is None:
        raise ConfigError("--prompt=-: standard input is closed.")
    # Not in the locale's encoding: that of a container takes any bytes.
    sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")  # type: ignore[union-attr]
    return sys.stdin.read()


def print_texts(model: LoadedModel, prompts: Sequence[str], tokens: int, **how: Any) -> None:
    """Prints prompts with what the model says after them, and counts to standard error.

    One prompt is streamed; several are generated together and printed one after the other.

    Args:
      model, prompts, tokens, how: as of :meth:`.LoadedModel.generate`.
    """
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    start = time.perf_counter()
    if len(prompts) == 1:
        stream = model.stream(prompts[0], tokens, **how)
        first = next(stream, "")  # bad values are refused before anything is printed
        print(prompts[0] + first, end="", flush=True)
        for piece in stream:
            print(piece, end="", flush=True)
        print()
        results = [stream.result]
    else:
        results = model.generate(prompts, tokens, **how)
        for number, (prompt, result) in enumerate(zip(prompts, results), start=1):
            print(f"--- {number} of {len(prompts)}\n{prompt}{result.text}")
    seconds, count = time.perf_counter() - start, sum(len(r.ids) for r in results)
    ends = ", ".join(_ENDS[end] for end in dict.fromkeys(r.stop_reason for r in results))
    print(f"[{count} tokens in {seconds:.1f} s, compilation included; {ends}]", file=sys.stderr)
