"""Compares models fairly: every point of a grid its own full schedule, rates tuned for each model.

Examples:
  python -m ngpt_jax.tools.compare --experiment=experiments/speedup.py
  python -m ngpt_jax.tools.compare --experiment=experiments/speedup.py --dry_run
  python -m ngpt_jax.tools.compare --experiment=experiments/speedup.py --report_only
  python -m ngpt_jax.tools.compare --experiment=experiments/speedup.py \\
      --check=stdlib128-ngpt-500-0.02-seed0

The experiment file defines get_config(variants), as for training, and get_study(), what to compare:
models, settings, budgets, the field to tune, seeds (see ngpt_jax/tools/study.py). The same command
goes on where it was stopped, and skips what is done. Several of them on one --out, on one machine
or on many that share it, share the work.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from ngpt_jax import config_file
from ngpt_jax.config import ConfigError
from ngpt_jax.terminal import Terminal, format_duration
from ngpt_jax.tools import plots, report, results, runner, study
from ngpt_jax.tools.study import Study
from ngpt_jax.training.stop_signal import StopSignal

_EXPERIMENT = flags.DEFINE_string(
    "experiment", None, "File with get_config() and get_study()[:variant,...]."
)
_OUT = flags.DEFINE_string("out", None, "Folder of the results; the file's name without .py.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "List the runs that are due, and stop.")
_REPORT_ONLY = flags.DEFINE_bool("report_only", False, "Write the report of what is there.")
_CHECK = flags.DEFINE_string(
    "check", None, "Run this point of the table once more, apart, and compare its loss."
)


def load_study(spec: str) -> Study:
    """What get_study(variants) of FILE[:variant,...] returns, checked."""
    plan = config_file.call_in_file("experiment", spec, "get_study")
    study.check(plan)
    return plan


def check_point(experiment: str, plan: Study, table: Path, name: str) -> int:
    """Runs a point of the table again; 0 where its loss is the same to the last bit."""
    rows = {results.point_of(row).name: row for row in results.read(table)}
    if name not in rows:
        raise ConfigError(
            f"--check: {table} has no {name}; it has e.g. {next(iter(rows), 'no rows')}."
        )
    old, terminal, stop = rows[name], Terminal(), StopSignal()
    point = results.point_of(old)
    with tempfile.TemporaryDirectory() as folder:
        held = runner.claim(Path(folder), name)
        assert held is not None
        cores = runner.slots(plan.cores)[0]
        terminal.say(f"{name}: about {format_duration(old['seconds'])}")
        run = runner.start(experiment, plan, point, Path(folder), cores, held)
        while (code := run.process.poll()) is None:
            if stop.name:
                run.process.kill()
            time.sleep(0.2)
        stop.restore()
        if stop.name:
            return runner.EXIT_RESUME
        if code not in (0, runner.EXIT_DIVERGED):
            raise runner.PointFailed(runner.last_line(Path(folder) / f"{name}.log"))
        new = results.row_of(
            experiment, plan, point, Path(folder) / name, code == runner.EXIT_DIVERGED
        )
    for column in ("cpu", "cores", "devices", "python", "jax", "jaxlib", "data", "config"):
        if old[column] != new[column]:
            terminal.say(f"{column} differs: {old[column]} in the table, {new[column]} here")
    same = old["loss"] == new["loss"] and old["status"] == new["status"]
    text = "the same to the last bit" if same else f"{new['loss'] - old['loss']:+.3g}"
    terminal.say(f"loss in the table {old['loss']!r}, now {new['loss']!r}: {text}")
    if not same and (spread := report.spread_of(plan, results.read(table), point)) is not None:
        terminal.say(f"spread over seeds in that cell (largest less smallest): {spread:.3g}")
    return 0 if same else 1


def _main(overrides: list[tuple[str, str]]) -> int:
    if overrides:
        raise ConfigError("--config.… is for training; here the experiment file sets fields.")
    if _EXPERIMENT.value is None:
        raise ConfigError("Give --experiment=experiments/speedup.py (see --help).")
    experiment = _EXPERIMENT.value
    plan = load_study(experiment)
    path, _, variants = experiment.partition(":")
    stem = "-".join([Path(path).stem, *filter(None, variants.split(","))])
    out = Path(_OUT.value) if _OUT.value else Path(path).parent / stem
    table = out / "results.csv"
    rows = results.read(table)
    results.check_rows(experiment, plan, rows, table)
    todo = study.forecast(plan, results.losses_of(plan, rows))
    for point in todo:  # bad fields are told before any run starts
        results.config_of(experiment, plan, point)
    if _CHECK.value:
        return check_point(experiment, plan, table, _CHECK.value)
    if _DRY_RUN.value:
        for point in study.due(plan, results.losses_of(plan, rows)):
            print(f"due: {point.name}")
        left = runner.seconds_left(plan, rows, len(runner.slots(plan.cores)))
        eta = "" if left is None else f", about {format_duration(left)}"
        print(f"{len(rows)} rows; about {len(todo)} runs to come{eta} -> {out}")
        return 0
    plots.require_matplotlib()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"--out={out} cannot be made: {e.strerror}.") from e
    complete, terminal = True, Terminal()
    if not _REPORT_ONLY.value:
        stop = StopSignal()
        try:
            complete = runner.run_all(
                experiment, plan, table, out / "runs", terminal, lambda: stop.name
            )
        finally:
            terminal.close()
            stop.restore()
    page = report.write(experiment, plan, results.read(table), out)
    terminal.say(f"report -> {page}")
    return 0 if complete else runner.EXIT_RESUME


def main(overrides: list[tuple[str, str]]) -> int:
    try:
        return _main(overrides)
    except runner.PointFailed as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    config_file.run_command(main)
