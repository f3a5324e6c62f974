"""Times training steps of nGPT, of the GPT baseline and of a plain-jax GPT, interleaved.

Examples:
  python -m ngpt_jax.tools.benchmark
  python -m ngpt_jax.tools.benchmark --steps=30 --json=benchmark.json
  python -m ngpt_jax.tools.benchmark --models=ngpt,gpt_qk_norm
  python -m ngpt_jax.tools.benchmark --config=experiments/124m.py --config.train.batch_size=32 \\
      --config.model.vocab_size=32000
  python -m ngpt_jax.tools.benchmark --config=experiments/1b.py:ctx4k --config.train.batch_size=8 \\
      --config.model.vocab_size=32000 --config.model.attention=xla

With --config: nGPT and GPT on the mesh of all devices here, as training runs them, with the
config's shapes, batch size, dtype, kernels and remat. What makes a kind (QK-norm, its optimizer,
its scales) is that of its model.kind, not the experiment's.

Without --config: 4 layers, width 256, 4 heads, 8192 token ids, 8 sequences of 256 tokens, float32,
layers unrolled as the plain GPT's are. The plain GPT (ngpt_jax/benchmark/plain_gpt.py) has the same
shapes and the same optimizer; it is float32, with 4 * width hidden units and no grouped queries.
"""

from absl import flags

from ngpt_jax.config import ConfigError, command

_CONFIG = flags.DEFINE_string("config", None, "Experiment FILE[:variant,...] to take shapes from.")
_MODELS = flags.DEFINE_list(
    "models", None,
    "Which of ngpt, gpt, plain, gpt_qk_norm (the baseline with QK-norm) to time; the first three,"
    " or with --config the first two.",
)  # fmt: skip
_STEPS = flags.DEFINE_integer("steps", 20, "Timed steps of each model.", lower_bound=3)
_WARMUP = flags.DEFINE_integer("warmup", 3, "Steps of each model before them.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Also write the numbers to this file.")


def _main(overrides: list[tuple[str, str]]) -> None:
    command.check_output(json=_JSON.value)
    from ngpt_jax.benchmark import configs, train_step
    from ngpt_jax.parallel.backend import set_xla_flags

    known = train_step.MODELS
    models = _MODELS.value or list(known[: 3 if _CONFIG.value is None else 2])
    if bad := [m for m in models if m not in known]:
        raise ConfigError(f"--models: unknown model {bad[0]!r}; known are {', '.join(known)}.")
    config = configs.load(_CONFIG.value, overrides, train_step.SMALL)
    set_xla_flags(config.runtime.xla_flags)
    numbers = train_step.measure(config, models, _STEPS.value, _WARMUP.value)
    print(train_step.show(numbers))
    command.write_json(_JSON.value, numbers)


if __name__ == "__main__":
    command.run_command(_main)
