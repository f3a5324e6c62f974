"""Trains nGPT and GPT side by side on the same batches: a table as they go, and a plot.

Examples:
  python -m ngpt_jax.tools.duel --config=quickstart
  python -m ngpt_jax.tools.duel --config=quickstart:debug --workdir=runs/trial

GPT is the experiment's variant gpt, with its own recipe. The runs lie in WORKDIR/ngpt and
WORKDIR/gpt; the same command goes on where it was stopped. It shows one seed of each: for a
comparison see python -m ngpt_jax.tools.compare.
"""

from pathlib import Path

from absl import flags

from ngpt_jax.config import ConfigError, command, experiment

_CONFIG = flags.DEFINE_string("config", None, "Experiment FILE[:variant,...], or its name.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs; runs/duel-NAME by default.")


def _main(overrides: list[tuple[str, str]]) -> int:
    if _CONFIG.value is None:
        raise ConfigError("Give an experiment: --config=quickstart (see --help).")
    path, variants = experiment.split_spec(_CONFIG.value)
    names = [name for name in variants.split(",") if name]
    if "gpt" in names:
        raise ConfigError("--config: leave out the variant gpt; both models are trained.")
    specs = {"ngpt": _CONFIG.value, "gpt": f"{path}:{','.join([*names, 'gpt'])}"}
    configs = {name: experiment.load_config(spec, overrides) for name, spec in specs.items()}
    from ngpt_jax.training.stop_signal import StopSignal

    stop = StopSignal()
    from ngpt_jax.training.duel import duel

    folder = _WORKDIR.value or Path("runs") / "-".join(["duel", Path(path).stem, *names])
    return duel(configs, folder, stop)


if __name__ == "__main__":
    command.run_command(_main)
