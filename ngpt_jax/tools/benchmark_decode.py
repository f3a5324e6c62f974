"""Times prefill and decoding of nGPT and of the GPT baseline, interleaved.

Examples:
  python -m ngpt_jax.tools.benchmark_decode
  python -m ngpt_jax.tools.benchmark_decode --batch_size=8 --tokens=512 --json=decode.json
  python -m ngpt_jax.tools.benchmark_decode --config=experiments/124m.py --prompt=768 \\
      --config.model.vocab_size=32000

Without --config: 4 layers, width 256, 4 heads, 8192 token ids, float32. Weights are folded, as a
loaded model's are; tokens are drawn greedily; one device is used. Beside the time of a token stand
two more numbers: the time of the last quarter of the tokens over that of the first quarter, and the
time of a token with a KV cache of four times as many slots, all of which attention reads.
"""

from absl import flags

from ngpt_jax.config import command

_CONFIG = flags.DEFINE_string("config", None, "Experiment FILE[:variant,...] to take shapes from.")
_BATCH = flags.DEFINE_integer("batch_size", 1, "Rows at one time.", lower_bound=1)
_PROMPT = flags.DEFINE_integer("prompt", 512, "Tokens of a prompt.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 256, "Tokens to generate.", lower_bound=64)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Texts of each model.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Also write the numbers to this file.")


def _main(overrides: list[tuple[str, str]]) -> None:
    command.check_output(json=_JSON.value)
    from ngpt_jax.benchmark import configs, decode

    config = configs.load(_CONFIG.value, overrides, decode.SMALL)
    numbers = decode.measure(config, _BATCH.value, _PROMPT.value, _TOKENS.value, _ROUNDS.value)
    print(decode.show(numbers))
    command.write_json(_JSON.value, numbers)


if __name__ == "__main__":
    command.run_command(_main)
