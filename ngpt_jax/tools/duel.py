"""Trains nGPT and GPT side by side on the same batches: a table as they go, and a plot.

Examples:
  python -m ngpt_jax.tools.duel --config=quickstart
  python -m ngpt_jax.tools.duel --config=quickstart:debug --workdir=runs/trial

GPT is the experiment's variant gpt, with its own recipe. The runs lie in WORKDIR/ngpt and
WORKDIR/gpt; the same command resumes them. It shows one seed of each: for a
comparison see python -m ngpt_jax.tools.compare.
"""

from pathlib import Path

from absl import flags

from ngpt_jax.config import ConfigError, command, experiment
from ngpt_jax.parallel.backend import enable_x64_if_used, set_xla_flags
from ngpt_jax.training.stop_signal import StopSignal

_CONFIG = flags.DEFINE_string("config", None, "Experiment FILE[:variant,...], or its name.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs; runs/duel-NAME by default.")


def _main(overrides: list[tuple[str, str]]) -> int:
    if _CONFIG.value is None:
        raise ConfigError("Give an experiment: --config=quickstart (see --help).")
    configs = experiment.load_pair(_CONFIG.value, overrides)
    set_xla_flags(configs["ngpt"].runtime.xla_flags)
    stop = StopSignal()
    from ngpt_jax.training import loop
    from ngpt_jax.training.duel import duel

    for config in configs.values():
        enable_x64_if_used(config.model)
    folder = _WORKDIR.value or Path("runs") / f"duel-{experiment.run_name(_CONFIG.value)}"
    return loop.exit_code(lambda: duel(configs, folder, stop))


if __name__ == "__main__":
    command.run_command(_main)
