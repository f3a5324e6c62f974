"""Compares models fairly: every point of a grid its own full schedule, rates tuned for each model.

Examples:
  python -m ngpt_jax.tools.compare --experiment=experiments/speedup.py
  python -m ngpt_jax.tools.compare --experiment=experiments/speedup.py --dry_run
  python -m ngpt_jax.tools.compare --experiment=experiments/speedup.py --report_only
  python -m ngpt_jax.tools.compare --experiment=experiments/speedup.py \\
      --check=stdlib128-ngpt-500-0.014-seed0

The experiment file defines get_config(variants), as for training, and get_study(), what to compare:
models, settings, budgets, the field to tune, seeds (see ngpt_jax/tools/study.py). The same command
goes on where it was stopped, and skips what is done. Several of them on one --out, on one machine
or on many that share it, share the work.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from absl import flags

from ngpt_jax import plots
from ngpt_jax.config import ConfigError, command
from ngpt_jax.files import is_remote, reason
from ngpt_jax.study import plan, report, results, runner
from ngpt_jax.terminal import Terminal, format_duration
from ngpt_jax.training.stop_signal import EXIT_RESUME, StopSignal

_EXPERIMENT = flags.DEFINE_string(
    "experiment", None, "File with get_config() and get_study()[:variant,...]."
)
_OUT = flags.DEFINE_string("out", None, "Folder of the results; the file's name without .py.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "List the runs that are due, and stop.")
_REPORT_ONLY = flags.DEFINE_bool("report_only", False, "Write the report of what is there.")
_CHECK = flags.DEFINE_string(
    "check", None, "Run this point of the table once more, apart, and compare its loss."
)


def _out_folder(experiment: str) -> Path:
    if _OUT.value and is_remote(_OUT.value):
        raise ConfigError(f"--out={_OUT.value}: give a folder on a local or mounted disk.")
    return Path(_OUT.value).expanduser() if _OUT.value else results.default_folder(experiment)


def _main(overrides: list[tuple[str, str]]) -> int:
    if overrides:
        raise ConfigError("--config.… is for training; here the experiment file sets fields.")
    if _EXPERIMENT.value is None:
        raise ConfigError("Give --experiment=experiments/speedup.py (see --help).")
    experiment = _EXPERIMENT.value
    study = results.load_study(experiment)
    out = _out_folder(experiment)
    table = out / "results.csv"
    if _REPORT_ONLY.value and not table.exists():
        raise ConfigError(f"--report_only: there is no {table}; give the --out of a study.")
    rows = results.read(table)
    results.check_rows(experiment, study, rows, table)
    todo = plan.forecast(study, results.losses_of(study, rows))
    for point in todo:  # bad fields are told before any run starts
        results.config_of(experiment, study, point)
    runner.lanes(study.cores)
    if _CHECK.value:
        return runner.run_again(experiment, study, table, _CHECK.value)
    if _DRY_RUN.value:
        for point in plan.due(study, results.losses_of(study, rows)):
            print(f"due: {point.name}")
        left = runner.seconds_left(study, rows)
        eta = "" if left is None else f", about {format_duration(left)}"
        print(f"{len(rows)} rows; about {len(todo)} runs to come{eta} -> {out}")
        return 0
    plots.require_matplotlib()
    out.mkdir(parents=True, exist_ok=True)
    complete, terminal = True, Terminal()
    if not _REPORT_ONLY.value:
        stop = StopSignal()
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # a closed terminal, not nohup
            signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        try:
            complete = runner.run_all(
                experiment, study, table, out / "runs", terminal, lambda: stop.name
            )
        finally:
            terminal.close()
            stop.restore()
    rows = results.read(table)
    terminal.say(f"report -> {report.write(experiment, study, rows, out)}")
    lost = plan.given_up(study, results.losses_of(study, rows))
    for line in lost:
        print(f"error: {line}", file=sys.stderr)
    return 1 if lost else 0 if complete else EXIT_RESUME


def main(overrides: list[tuple[str, str]]) -> int:
    try:
        return _main(overrides)
    except runner.PointFailed as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `| head`
        raise
    except OSError as e:  # a full disk, a folder that cannot be written, no locks
        raise ConfigError(f"{e.filename or _OUT.value}: {reason(e)}.") from e
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    command.run_command(main)
