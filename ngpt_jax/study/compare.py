"""A study from its experiment file: the runs that are due, one run again, the report."""

from collections.abc import Sequence
from pathlib import Path

from ngpt_jax.config import ConfigError
from ngpt_jax.data.corpus import check_corpus
from ngpt_jax.data.tokenizers.load import with_tokenizer
from ngpt_jax.errors import tell
from ngpt_jax.files import is_remote, lock
from ngpt_jax.study import plan, report, results, runner
from ngpt_jax.terminal import Terminal
from ngpt_jax.training.stop_signal import EXIT_RESUME, StopSignal


def compare(
    experiment: str, out: str | None, dry_run: bool, report_only: bool, check: str | None
) -> int:
    """Runs what is due, and writes the report; see the flags of ``tools.compare``.

    Returns:
      The exit code: EXIT_RESUME where a signal stopped it before the end, 1 where a run failed or
      a cell was given up, else 0. Raises ConfigError, runner.PointFailed, OSError.
    """
    study = results.load_study(experiment)
    if out and is_remote(out):
        raise ConfigError(f"--out={out}: give a folder on a local or mounted disk.")
    folder = Path(out).expanduser() if out else results.default_folder(experiment)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out={folder} is a file; give a folder.")
    c = runner.Comparison(experiment, study, folder / "results.csv", folder / "runs")
    if report_only and not c.table.exists():
        raise ConfigError(f"--report_only: there is no {c.table}; give the --out of a study.")
    rows = results.read(c.table)
    results.check_rows(experiment, study, rows, c.table)
    losses = results.losses_of(study, rows)
    runner.lanes(study.cores)
    terminal = Terminal()
    if check:
        return runner.run_again(c, check, terminal)
    if not report_only:
        _check_runs(experiment, study, plan.forecast(study, losses))
    if dry_run:
        for point in plan.due(study, losses):
            print(f"due: {point.name}")
        print(f"{len(rows)} rows; {runner.to_come(study, rows)} -> {folder}")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    failed, stopped = ([], False) if report_only else _run_all(c, terminal)
    with lock(folder / results.LOCK):  # another program may add a row, or write the report too
        rows = results.read(c.table)
        terminal.say(f"report -> {report.write(experiment, study, rows, folder)}")
    lost = plan.given_up(study, results.losses_of(study, rows))
    if failed:
        lost.append(f"{len(failed)} failed and will be tried by the next start: {failed[0]}")
    for line in lost:
        tell(f"error: {line}")
    return EXIT_RESUME if stopped else 1 if lost else 0


def _check_runs(experiment: str, study: plan.Study, points: Sequence[plan.Point]) -> None:
    """Refuses bad fields and missing text before any run starts; raises ConfigError."""
    text_of = set[tuple[str, str]]()
    for point in points:
        try:
            config = results.config_of(experiment, study, point)
            if (point.setting, point.model) not in text_of:
                text_of.add((point.setting, point.model))
                check_corpus(config.data, with_tokenizer(config)[1])
        except ConfigError as e:
            raise ConfigError(f"{point.name}: {e}") from e


def _run_all(c: runner.Comparison, terminal: Terminal) -> tuple[list[str], bool]:
    """Runs what is due until a signal comes; returns failures, and whether a signal ended it."""
    stop = StopSignal()
    try:
        failed = runner.run_all(c, terminal, lambda: stop.name)
        due = plan.due(c.study, results.losses_of(c.study, results.read(c.table)))
        return failed, bool(stop.name and due)
    finally:
        terminal.close()
        stop.restore()
