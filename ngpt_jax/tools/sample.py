"""Generates text with a trained model, and prints it as it comes.

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
--config.NAME=VALUE changes the run's config for this command: where the tokenizer lies
(data.tokenizer), model.dtype, the mesh (one device unless some mesh.* is given).
"""

import sys

from absl import flags

from ngpt_jax.config import ConfigError, command
from ngpt_jax.config.facts import check_seed

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a training run.")
_STEP = flags.DEFINE_integer("step", None, "The checkpoint; the newest by default.")
_PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "Text to continue, - for standard input; repeat the flag for several prompts."
)
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "A UTF-8 file that is the prompt.")
_TOKENS = flags.DEFINE_integer("tokens", 256, "Tokens to generate, at most.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.8, "Of the softmax; 0 takes the likeliest token."
)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k likeliest tokens; 0: from all.")
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Draw from the fewest likeliest tokens that together have this probability."
)
_MIN_P = flags.DEFINE_float(
    "min_p", 0.0, "Draw from tokens at least this share as likely as the likeliest one."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the random draws; below 2^32.")
_STOP = flags.DEFINE_multi_string("stop", [], "Text at which to stop; repeat the flag for several.")
_CONTEXT = flags.DEFINE_integer(
    "context", None, "Tokens of prompt and text together; the training context by default.",
    lower_bound=2,
)  # fmt: skip


def _main(overrides: list[tuple[str, str]]) -> None:
    if _WORKDIR.value is None:
        raise ConfigError("--workdir is needed: the folder of a training run.")
    check_seed("--seed", _SEED.value)
    from ngpt_jax.inference import sample
    from ngpt_jax.inference.loading import open_model
    from ngpt_jax.terminal import Terminal

    prompts = sample.read_prompts(_PROMPT.value, _PROMPT_FILE.value, _STOP.value)
    terminal = Terminal(quiet=not sys.stdout.isatty())  # what is piped is text alone
    with terminal.doing("loading the model"):
        model = open_model("workdir", _WORKDIR.value, _STEP.value, overrides)
    terminal.close()
    sample.print_texts(
        model, prompts, _TOKENS.value, temperature=_TEMPERATURE.value, top_k=_TOP_K.value,
        top_p=_TOP_P.value, min_p=_MIN_P.value, seed=_SEED.value, stop=_STOP.value,
        context=_CONTEXT.value,
    )  # fmt: skip


if __name__ == "__main__":
    command.run_command(_main)
