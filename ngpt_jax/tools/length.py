"""Perplexity beyond the training context: by length of the sequence, and by position in it.

Examples:
  python -m ngpt_jax.tools.length --workdir=runs/ngpt --against=runs/gpt --text=books/
  python -m ngpt_jax.tools.length --workdir=runs/1b --text=pg19.jsonl.gz --factor=8 --windows=64

The same tokens are read in sequences of the training context, of twice as many tokens, and so on up
to --factor times; RoPE is unchanged (figure 13 of the paper). A sequence lies within one document.
Without --text, the run's held-out text is read. Written to --out: length.csv, position.csv,
length.png.
--config.NAME=VALUE changes the runs' config for this command: where the tokenizer lies
(data.tokenizer), model.dtype, the mesh.
"""

from absl import flags

from ngpt_jax.config import ConfigError, command

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a training run.")
_AGAINST = flags.DEFINE_string("against", None, "The folder of a run to compare it with.")
_TEXT = flags.DEFINE_string(
    "text", None, "A file, folder or glob of .txt, .jsonl, ...; the run's held-out text by default."
)
_TEXT_KEY = flags.DEFINE_string(
    "text_key",
    None,
    "The field of a .jsonl line or column of a .parquet file of --text; the run's data.text_key by"
    " default.",
)
_FACTOR = flags.DEFINE_integer("factor", 32, "The longest sequence over the training context.")
_WINDOWS = flags.DEFINE_integer("windows", 32, "Longest sequences to read.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "Folder of the results; WORKDIR/length by default.")


def _main(overrides: list[tuple[str, str]]) -> None:
    if _WORKDIR.value is None:
        raise ConfigError("--workdir is needed: the folder of a training run.")
    from ngpt_jax.evaluation import length

    folders = {"workdir": _WORKDIR.value} | ({"against": _AGAINST.value} if _AGAINST.value else {})
    print(length.compare(
        folders, overrides, _TEXT.value, _TEXT_KEY.value, _FACTOR.value, _WINDOWS.value, _OUT.value
    ))  # fmt: skip


if __name__ == "__main__":
    command.run_command(_main)
