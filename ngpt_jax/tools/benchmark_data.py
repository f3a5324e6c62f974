"""Times what feeds training: tokenizing, preparing shards, and reading sequences.

Examples:
  python -m ngpt_jax.tools.benchmark_data --paths=prose.jsonl.gz --tokenizer=llama2.json
  python -m ngpt_jax.tools.benchmark_data --tokenizer=gpt2/ --workers=8 --json=data.json

Prints tokens per second of the tokenizer's library alone on one core, of the preparation (with one
process, and with --workers) and its peak memory, and of the loader on one core. Without --paths the
text is the source of Python's standard library.
"""

from absl import flags

from ngpt_jax.config import DataConfig, command

_PATHS = flags.DEFINE_multi_string("paths", [], "Text, as --config.data.paths of training.")
_TOKENIZER = flags.DEFINE_string("tokenizer", "byte", "As --config.data.tokenizer of training.")
_WORKERS = flags.DEFINE_integer("workers", None, "Processes; one a core by default.", lower_bound=1)
_CONTEXT = flags.DEFINE_integer("context", 128, "Tokens of a sequence.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 16, "Sequences of a batch.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Timings of each; the best counts.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Also write the numbers to this file.")


def _main(overrides: list[tuple[str, str]]) -> None:
    command.refuse_overrides(overrides)
    command.check_output(json=_JSON.value)
    from ngpt_jax.benchmark import data

    source = "text" if _PATHS.value else "stdlib"
    config = DataConfig(source=source, paths=tuple(_PATHS.value), tokenizer=_TOKENIZER.value)
    numbers = data.measure(config, _WORKERS.value, _BATCH.value, _CONTEXT.value, _ROUNDS.value)
    print(data.show(numbers))
    command.write_json(_JSON.value, numbers)


if __name__ == "__main__":
    command.run_command(_main)
