"""Trains nGPT, or the GPT baseline.

Examples:
  python -m ngpt_jax.main --config=quickstart
  python -m ngpt_jax.main --config=124m:gpt --workdir=runs/gpt \\
      --config.train.batch_size=32 --config.optimizer.learning_rate=1e-3
  python -m ngpt_jax.main --config=1b --dry_run
  python -m ngpt_jax.main --help_config

The same command resumes from the newest checkpoint in its workdir. With several processes, run it
on all of them: on TPU pods and under SLURM they find each other, elsewhere add
--coordinator_address, --num_processes and --process_id.
"""

import contextlib
import shlex
from pathlib import Path

from absl import flags

from ngpt_jax.config import Config, ConfigError, command, experiment
from ngpt_jax.parallel.backend import enable_x64_if_used, set_xla_flags
from ngpt_jax.training.stop_signal import StopSignal

_CONFIG = flags.DEFINE_string(
    "config", None, "FILE[:variant,...], or a name; set a field with --config.section.field=value."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; runs/NAME by default.")
_PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Print every field as resolved, and stop.")
_HELP_CONFIG = flags.DEFINE_bool(
    "help_config", False, "Print every field and its default, and stop."
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Check everything, print parameters and memory, and stop."
)
_ALLOW_SCHEDULE_CHANGE = flags.DEFINE_bool(
    "allow_schedule_change", False, "Resume with another length, batch size or learning rate."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where several do not find each other."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_START_TIMEOUT = flags.DEFINE_integer(
    "start_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1
)


def _next_commands(workdir: str | Path, prompt: str, overrides: list[tuple[str, str]]) -> str:
    """What to do with a finished run, ready to paste."""
    commands: list[tuple[str, ...]] = [
        ("sample", f"--workdir={workdir}", f"--prompt={prompt if prompt.strip() else 'The'}"),
        ("evaluate", f"--workdir={workdir}"),
    ]
    path, variants = experiment.split_spec(_CONFIG.value or "")
    others = ",".join(name for name in experiment.names_of(variants) if name != "gpt")
    given = [(name, value) for name, value in overrides if name != "model.kind"]
    with contextlib.suppress(ConfigError):  # there is no such pair of models
        spec = f"{path}{others and f':{others}'}"
        experiment.load_pair(spec, given)
        flags = (f"--config.{name}={value}" for name, value in given)
        commands.append(("duel", f"--config={spec}", f"--workdir={workdir}-duel", *flags))
    lines = (f"  python -m ngpt_jax.tools.{name} {shlex.join(args)}" for name, *args in commands)
    return "\n".join(["next:", *lines])


def _main(overrides: list[tuple[str, str]]) -> int:
    if _HELP_CONFIG.value and _CONFIG.value is None:
        print(experiment.describe(Config()))
        return 0
    if _CONFIG.value is None:
        raise ConfigError("Give an experiment: --config=quickstart (see --help).")
    config = experiment.load_config(_CONFIG.value, overrides)
    if _HELP_CONFIG.value or _PRINT_CONFIG.value:
        print(experiment.describe(config))
        return 0
    set_xla_flags(config.runtime.xla_flags)
    # Before jax, so that no signal is lost while it loads.
    stop = None if _DRY_RUN.value else StopSignal()
    # jax and the rest are slow to load: only once the input is known to be good.
    from ngpt_jax.terminal import Terminal

    terminal = Terminal()
    with terminal.doing("loading jax"):
        from ngpt_jax.parallel import distributed
        from ngpt_jax.training import dry_run, loop

        distributed.initialize(
            _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _START_TIMEOUT.value
        )
    terminal.close()
    enable_x64_if_used(config.model)
    if _DRY_RUN.value:
        text, problem = dry_run.report(config)
        print(text)
        if problem is not None:
            raise problem
        return 0
    default = Path("runs") / experiment.run_name(_CONFIG.value)
    workdir = default if _WORKDIR.value is None else _WORKDIR.value

    def train() -> int:
        code = loop.train(config, workdir, _ALLOW_SCHEDULE_CHANGE.value, stop)
        if code == 0 and distributed.is_first():
            Terminal().say(_next_commands(workdir, config.sample.prompt, overrides))
        return code

    return loop.exit_code(train)


if __name__ == "__main__":
    command.run_command(_main)
