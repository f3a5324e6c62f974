"""Text from a trained model, as it comes.

Examples:
  python -m ngpt_jax.tools.sample --workdir=runs/quickstart --prompt='def main('
  python -m ngpt_jax.tools.sample --workdir=runs/quickstart --prompt_file=start.txt --tokens=500 \\
      --temperature=0.7 --top_p=0.95 --seed=3
  head -c 200 story.txt | python -m ngpt_jax.tools.sample --workdir=runs/quickstart --prompt=- \\
      --stop=$'\\n\\n'
  python -m ngpt_jax.tools.sample --workdir=runs/1b --prompt='Once' --prompt='Twice' \\
      --config.model.dtype=bfloat16 --config.mesh.tensor=4

One prompt streams to the terminal; several are generated together and printed one after the other.
A prompt is read as the start of a document. Text ends after --tokens, at a stop string, at the end
of the document, or where the context is full.
--config.NAME=VALUE changes the run's config for here: where the tokenizer lies (data.tokenizer),
model.dtype, the mesh (one device is used where none of mesh.* is given).
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags, logging

from ngpt_jax.config import ConfigError, command
from ngpt_jax.files import reason

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a training run.")
_STEP = flags.DEFINE_integer("step", None, "The checkpoint; the newest by default.")
_PROMPT = flags.DEFINE_multi_string(
    "prompt", None, "Text to go on from, - for standard input; repeat it for more. Default: none."
)
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "A UTF-8 file that is the prompt.")
_TOKENS = flags.DEFINE_integer("tokens", 256, "Tokens to generate, at most.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Of the softmax; 0: the likeliest token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k likeliest tokens; 0: from all.")
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Draw from the fewest likeliest tokens that together have this probability."
)
_MIN_P = flags.DEFINE_float(
    "min_p", 0.0, "Draw from tokens at least this share as likely as the likeliest one."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draw.", lower_bound=0, upper_bound=2**32 - 1)
_STOP = flags.DEFINE_multi_string("stop", [], "Text at which to stop; repeat it for more.")
_CONTEXT = flags.DEFINE_integer(
    "context", None, "Tokens of prompt and text together; that of the training by default.",
    lower_bound=2,
)  # fmt: skip


def _prompts() -> list[str]:
    prompts = list(_PROMPT.value or [])
    if prompts.count("-") > 1:
        raise ConfigError("--prompt=- is given twice; standard input is read once.")
    where = "--prompt=-"
    try:
        texts = [_standard_input() if p == "-" else p for p in prompts]
        if _PROMPT_FILE.value is not None:
            where = f"--prompt_file={_PROMPT_FILE.value}"
            texts.append(Path(_PROMPT_FILE.value).expanduser().read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise ConfigError(f"{where} cannot be read: {reason(e)}.") from e
    except UnicodeError as e:
        raise ConfigError(f"{where} is not UTF-8 text ({reason(e)}); convert it first.") from e
    if any(re.search("[\ud800-\udfff]", text) for text in [*texts, *_STOP.value]):
        raise ConfigError("A --prompt or --stop is not UTF-8 text; convert it first.")
    return texts or [""]


def _standard_input() -> str:
    if sys.stdin is None:
        raise ConfigError("--prompt=-: standard input is closed.")
    # Not as the locale has it: a container's takes any bytes.
    sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")  # type: ignore[union-attr]
    return sys.stdin.read()


def _main(overrides: list[tuple[str, str]]) -> None:
    if _WORKDIR.value is None:
        raise ConfigError("--workdir is needed: the folder of a training run.")
    from ngpt_jax.inference.loading import open_model

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax tells much of what it reads
    prompts = _prompts()
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    model = open_model("workdir", _WORKDIR.value, _STEP.value, overrides)
    how: dict[str, Any] = {
        "temperature": _TEMPERATURE.value, "top_k": _TOP_K.value, "top_p": _TOP_P.value,
        "min_p": _MIN_P.value, "seed": _SEED.value, "stop": _STOP.value,
        "context": _CONTEXT.value,
    }  # fmt: skip
    start = time.perf_counter()
    if len(prompts) == 1:
        stream = model.stream(prompts[0], _TOKENS.value, **how)
        first = next(stream, "")  # refusals come before anything is printed
        print(prompts[0] + first, end="", flush=True)
        for piece in stream:
            print(piece, end="", flush=True)
        print()
        reasons, count = [stream.result.stop_reason], len(stream.result.ids)
    else:
        results = model.generate(prompts, _TOKENS.value, **how)
        for number, (prompt, result) in enumerate(zip(prompts, results), start=1):
            print(f"--- {number} of {len(prompts)}\n{prompt}{result.text}")
        reasons, count = [r.stop_reason for r in results], sum(len(r.ids) for r in results)
    seconds = time.perf_counter() - start
    ends = ", ".join(_ENDS[r] for r in dict.fromkeys(reasons))
    print(
        f"[{count} tokens in {seconds:.1f} s, compilation included; {ends}]",
        file=sys.stderr,
    )


_ENDS = {
    "tokens": "as many as asked for",
    "context": "the context is full (--context allows more)",
    "document": "the document ended",
    "stop": "a stop string was met",
}


if __name__ == "__main__":
    command.run_command(_main)
