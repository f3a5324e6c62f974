"""Runs the points of a study, each as a process of its own, side by side, until none is due."""

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, NamedTuple

from ngpt_jax.config import ConfigError
from ngpt_jax.files import write_atomically
from ngpt_jax.study import plan, results
from ngpt_jax.study.cores import lanes, pinned, release, take, take_cores
from ngpt_jax.study.plan import Point, Study
from ngpt_jax.study.results import Result
from ngpt_jax.terminal import Terminal, format_duration
from ngpt_jax.training.stop_signal import EXIT_DIVERGED, EXIT_RESUME, StopSignal

_INPUTS = ("data", "held_out", "config")  # columns that make runs comparable
Stopped = Callable[[], str | None]  # the name of the signal that was received, if one was
_LOOK = 5.0  # seconds between looks at the running runs' metrics and at what others left free


class PointFailed(RuntimeError):
    """A run ended with an error that training does not know: one line."""


class Comparison(NamedTuple):
    """A study and its files.

    Attributes:
      experiment: the file that defines it, as its runs' --config.
      study: what the file's get_study() returned.
      table: the CSV file of the results.
      runs: the folder of the runs' folders and logs.
    """

    experiment: str
    study: Study
    table: Path
    runs: Path

    def log_of(self, point: Point) -> Path:
        return self.runs / f"{point.name}.log"

    def starts_of(self, point: Point) -> Path:
        """A JSON file with what made a run, one dict for each start; see :func:`_origins`."""
        return self.runs / f"{point.name}.starts.json"


class Running(NamedTuple):
    point: Point
    process: subprocess.Popen
    locks: list[IO[str]]  # of the point and of its cores
    origins: list[Result]  # see _origins
    started: float | None = None  # time.monotonic(); None: it goes on with an earlier process's run


def start(
    c: Comparison, point: Point, cores: Iterable[int], locks: list[IO[str]]
) -> subprocess.Popen:
    """Starts ``python -m ngpt_jax.main`` for a point, with its output in RUNS/NAME.log."""
    command = [
        sys.executable, "-m", "ngpt_jax.main",
        *results.command_of(c.experiment, c.study, point), f"--workdir={c.runs / point.name}",
    ]  # fmt: skip
    # A run is one process, also where a cluster started this program as one of several.
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_"))}
    environment = mine | ({} if c.study.cores is None else {"JAX_PLATFORMS": "cpu"})
    with pinned(cores), open(c.log_of(point), "a", encoding="utf-8") as log:
        # In a session of its own: Ctrl-C reaches it only through this program, once.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=environment, pass_fds=[f.fileno() for f in locks], start_new_session=True,
        )  # fmt: skip


def _origins(c: Comparison, point: Point) -> list[Result]:
    """The columns of a run that tell what makes it: of each start, and of the one that comes now.

    A run may go on with other code, or on another machine: its row tells all of them.
    """
    path, versions = c.starts_of(point), c.runs / point.name / "versions.json"
    origins: list[Result] = []
    if versions.exists():  # else no start came so far as to train
        origins = json.loads(path.read_text(encoding="utf-8")) if path.exists() else [{}]
        found = json.loads(versions.read_text(encoding="utf-8"))
        origins[-1] |= {name: found[name] for name in results.MACHINE}
    origins.append(results.origin_of(c.experiment, c.study, point))
    write_atomically(path, json.dumps(origins, indent=1) + "\n")
    return origins


def run_all(c: Comparison, terminal: Terminal, stopped: Stopped) -> list[str]:
    """Runs the points that are due until none is, or until stopped.

    Each finished run is added to the table at once. One that fails does not end the others, and is
    not tried again here. When ``stopped`` names a signal, the runs save their state and end.

    Returns:
      A line for each run that failed.
    """
    c.runs.mkdir(parents=True, exist_ok=True)
    running: list[Running] = []
    failed: dict[Point, str] = {}
    waiting = False
    try:
        while True:
            rows = results.read(c.table)
            losses = results.losses_of(c.study, rows)
            taken = {*failed, *(r.point for r in running)}
            due = [p for p in plan.due(c.study, losses) if p not in taken]
            for point in due:
                if stopped() or len(running) == lanes(c.study.cores):
                    break
                if (run := _try(c, point)) is not None:
                    running.append(run)
            if not running and (stopped() or not due):
                return list(failed.values())
            if not running and not waiting:
                waiting = True
                terminal.say(f"waiting: other programs have {len(due)} runs, or the cores")
            status = functools.partial(_status, c, rows, running)
            full = len(running) == lanes(c.study.cores)
            for run in _wait(running, full, stopped, terminal, status):
                running.remove(run)
                try:
                    _finish(c, run, terminal, bool(stopped()))
                except PointFailed as e:
                    failed[run.point] = str(e)
                    terminal.say(f"error: {e}")
    finally:
        for run in running:  # after an error in this program
            run.process.terminate()
        for run in running:
            run.process.wait()
            release(run.locks)


def _try(c: Comparison, point: Point) -> Running | None:
    """Starts a point, if no other program has it and there are cores for it."""
    if (held := take(c.runs / f"{point.name}.claim")) is None:
        return None
    cores = take_cores(c.study.cores)
    # Another program may have finished it since the table was read.
    if cores is None or point in results.losses_of(c.study, results.read(c.table)):
        release([held, *(cores or {}).values()])
        return None
    started = None if (c.runs / point.name).exists() else time.monotonic()
    return _start(c, point, cores, [held, *cores.values()], started)


def _start(
    c: Comparison,
    point: Point,
    cores: Iterable[int],
    locks: list[IO[str]],
    started: float | None = None,
) -> Running:
    origins = _origins(c, point)
    return Running(point, start(c, point, cores, locks), locks, origins, started)


def _wait(
    running: Sequence[Running],
    full: bool,
    stopped: Stopped,
    terminal: Terminal,
    status: Callable[[], tuple[str, float]],
) -> list[Running]:
    """Waits until a run ends, and returns those that have ended.

    Unless ``full``, with no room for a further run, it returns none after a while: other
    programs may have left cores or runs. When stopped, it tells the runs to save their state.
    """
    told, since = False, time.monotonic()
    shown, looked = status(), since
    while full or (running and stopped()) or time.monotonic() - since < _LOOK:
        if stopped() and not told:
            told = True
            terminal.close()
            terminal.say(f"{stopped()}: {len(running)} runs save their state")
            for run in running:
                run.process.terminate()
        if ended := [run for run in running if run.process.poll() is not None]:
            return ended
        if not running and stopped():
            return []
        if time.monotonic() - looked > _LOOK:
            shown, looked = status(), time.monotonic()
        terminal.show(*shown)
        time.sleep(0.2)
    return []


def _status(c: Comparison, rows: list[Result], running: list[Running]) -> tuple[str, float]:
    """A line about the study, and the share of its runs that is done."""
    steps = {run.point: _steps_made(c.runs / run.point.name) for run in running}
    done, (count, left) = len(results.in_study(c.study, rows)), _forecast(c.study, rows, steps)
    names = ", ".join(run.point.name for run in running)
    begun = sum(n / point.steps for point, n in steps.items())
    share = (done + begun) / (done + count)
    return f"{done} of about {done + count} runs{left}; now {names}", share


def _steps_made(workdir: Path) -> int:
    """The last step of which a run tells."""
    try:
        rows = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return json.loads(rows[-1])["step"]
    except (OSError, ValueError, IndexError):  # none yet, or one that is being written
        return 0


def to_come(study: Study, rows: list[Result]) -> str:
    """ "about 12 runs to come, about 1:23:45 left"."""
    count, left = _forecast(study, rows)
    return f"about {count} runs to come{left}"


def _forecast(
    study: Study, rows: list[Result], made: Mapping[Point, int] = MappingProxyType({})
) -> tuple[int, str]:
    """How many runs are still to come, and ", about 1:23:45 left".

    ``made`` has the steps that running ones have made.

    A run takes its steps times the median seconds a step of the finished runs of its setting and
    model, and their median of ``other_seconds``: start, compilation, evaluation. Where there are
    none, those of all runs count. What no run tells is said to be unknown.
    """
    points = plan.forecast(study, results.losses_of(study, rows))
    if not points:
        return 0, ""
    done = [row for row in rows if row["status"] == "done" and row["steps"] and row["seconds"]]
    if not done:
        return len(points), ", for how long is not known before one has ended"
    step = _medians((row, row["seconds"] / row["steps"]) for row in done)
    other = _medians((r, x) for r in done if (x := r.get("other_seconds")) is not None)
    seconds = 0.0
    for p in points:
        key = p.setting, p.model
        seconds += (p.steps - made.get(p, 0)) * step.get(key, step[None])
        seconds += other.get(key, other.get(None, 0.0))
    left = f", about {format_duration(seconds / lanes(study.cores))} left"
    return len(points), left + ("" if other else " without start and evaluation (not known)")


def _medians(
    values: Iterable[tuple[Result, float]],
) -> dict[tuple[str, str] | None, float]:
    """The median of values by their rows' setting and model, and of all of them under None."""
    groups: dict[tuple[str, str] | None, list[float]] = {}
    for row, value in values:
        for key in ((row["setting"], row["model"]), None):
            groups.setdefault(key, []).append(value)
    return {key: statistics.median(found) for key, found in groups.items()}


def _finish(c: Comparison, run: Running, terminal: Terminal, stopping: bool) -> None:
    """Adds the result of a run that has ended, unless it only saved its state to go on later."""
    code = run.process.returncode
    try:
        if code == EXIT_RESUME or (code < 0 and stopping):
            return
        row = _result(c, run)
        results.add(c.table, c.study, row)
    finally:
        release(run.locks)
    loss = "diverged" if row["loss"] is None else f"{row['loss']:.4f} nats/token"
    left = to_come(c.study, results.read(c.table))
    terminal.say(f"{run.point.name}: {loss} in {format_duration(row['seconds'])}; {left}")


def _result(c: Comparison, run: Running) -> Result:
    """The result of a run that has ended; raises PointFailed where it failed."""
    code, log = run.process.returncode, c.log_of(run.point)
    if code in (0, EXIT_DIVERGED):
        workdir, diverged = c.runs / run.point.name, code == EXIT_DIVERGED
        row = results.row_of(c.experiment, c.study, run.point, workdir, diverged, run.origins)
        if run.started is not None:
            row["other_seconds"] = round(time.monotonic() - run.started - row["seconds"], 2)
        return row
    if code < 0:
        how = f"was ended by signal {-code} (9: out of memory?); see {log}"
    else:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        # After the error of a traceback jax may add more lines.
        told = next((line for line in reversed(lines) if "rror" in line), (lines or [""])[-1])
        how = f"ended with code {code}: {told} (see {log})"
    raise PointFailed(f"{run.point.name} {how}")


def run_again(c: Comparison, name: str, terminal: Terminal) -> int:
    """Runs a point of the table once more, in a folder of its own, and compares the results.

    Returns:
      The exit code: 0 where the loss is the same to the last bit, or where the machine, the
      versions or the commit are others and it is within the spread of the seeds; else 1.
    """
    rows = {results.point_of(r).name: r for r in results.in_study(c.study, results.read(c.table))}
    if name not in rows:
        example = f"it has e.g. {next(iter(rows))}" if rows else "it has none of this study"
        raise ConfigError(f"--check: {c.table} has no {name}; {example}.")
    old, stop = rows[name], StopSignal()
    with tempfile.TemporaryDirectory() as folder:
        apart = c._replace(runs=Path(folder))
        while (cores := take_cores(c.study.cores)) is None:
            terminal.tell("waiting for cores that other runs have", seconds=60)
            if stop.name:
                return EXIT_RESUME
            time.sleep(1)
        expected = old["seconds"] + (old["other_seconds"] or 0.0)
        terminal.say(f"{name}: about {format_duration(expected)}")
        run = _start(apart, results.point_of(old), cores, [*cores.values()])
        try:
            while (code := run.process.poll()) is None and not stop.name:
                time.sleep(0.2)
        finally:
            run.process.kill()
            run.process.wait()
            stop.restore()
        if code is None:
            return EXIT_RESUME
        try:
            new = _result(apart, run)
        except PointFailed:
            terminal.say(apart.log_of(run.point).read_text(errors="replace"))
            raise
    differ = [c for c in (*results.MACHINE, "commit", *_INPUTS) if old[c] != new[c]]
    for column in differ:
        terminal.say(f"{column} differs: {old[column]} in the table, {new[column]} here")
    if "commit" not in differ and (old["commit"] or "+").endswith("+"):
        differ.append("commit")
        terminal.say("commit: the code of the table is not known, as it was not committed")
    before, now = (f"{r['status']}, loss {r['loss']!r}" for r in (old, new))
    terminal.say(f"in the table: {before}; now: {now}")
    if before == now:
        terminal.say("the same to the last bit")
        return 0
    if None in (old["loss"], new["loss"]):
        return 1
    difference = new["loss"] - old["loss"]
    terminal.say(f"difference: {difference:+.3g} nats per token")
    spread = results.spread_of(c.study, results.read(c.table), results.point_of(old))
    if spread is None:
        terminal.say("its cell has no two other seeds to compare it with")
        return 1
    terminal.say(f"spread of the other seeds of its cell (largest less smallest): {spread:.3g}")
    alike = abs(difference) <= spread and differ and not set(_INPUTS).intersection(differ)
    if alike:
        terminal.say("within the spread, as it may be elsewhere")
    return 0 if alike else 1
