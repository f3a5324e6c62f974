"""Runs the points of a study, each as a process of its own, side by side, until none is due."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from ngpt_jax.config import ConfigError
from ngpt_jax.study import plan, results
from ngpt_jax.study.plan import Point, Study
from ngpt_jax.study.results import Origin
from ngpt_jax.terminal import Terminal, format_duration
from ngpt_jax.training.stop_signal import EXIT_RESUME, StopSignal

EXIT_DIVERGED = 3  # workdir.Diverged.exit_code, without loading jax


class PointFailed(RuntimeError):
    """A run ended with an error that is none of training's: one line."""


class Running(NamedTuple):
    point: Point
    process: subprocess.Popen
    locks: list[IO[str]]  # of the point and of its cores
    origin: Origin


def available_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def lanes(cores: int | None) -> int:
    """How many runs go side by side; raises ConfigError where there are too few cores."""
    here = len(available_cores())
    if cores is not None and cores > here:
        raise ConfigError(f"get_study(): each run is pinned to {cores} cores, and {here} are here.")
    return 1 if cores is None else here // cores


def lock(path: Path) -> IO[str] | None:
    """Takes a file for this program, and for the run that inherits it; None if it is taken."""
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        file.close()
        return None


def take_cores(cores: int | None) -> dict[int, IO[str]] | None:
    """Cores that no other run of any study on this machine has, with their locks.

    Empty where runs are not pinned; None where too few are free.
    """
    if cores is None:
        return {}
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"ngpt_jax-cores-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    taken: dict[int, IO[str]] = {}
    for core in available_cores():
        if (held := lock(folder / str(core))) is not None:
            taken[core] = held
        if len(taken) == cores:
            return taken
    for held in taken.values():
        held.close()
    return None


@contextmanager
def pinned(cores: Iterable[int]) -> Iterator[None]:
    """What is started inside has these cores alone, as far as the system can do that."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def start(
    experiment: str,
    study: Study,
    point: Point,
    runs: Path,
    cores: Iterable[int],
    locks: list[IO[str]],
) -> Running:
    """Starts ``python -m ngpt_jax.main`` for a point, its output in RUNS/NAME.log."""
    command = [
        sys.executable, "-m", "ngpt_jax.main",
        *results.command_of(experiment, study, point), f"--workdir={runs / point.name}",
    ]  # fmt: skip
    environment = dict(os.environ)
    if study.cores is not None:
        environment["JAX_PLATFORMS"] = "cpu"
    with pinned(cores), open(runs / f"{point.name}.log", "a", encoding="utf-8") as log:
        # A session of its own: Ctrl-C reaches it through us, once.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=environment, pass_fds=[f.fileno() for f in locks], start_new_session=True,
        )  # fmt: skip
    return Running(point, process, locks, results.origin_of(experiment, study, point))


def release(locks: Iterable[IO[str]]) -> None:
    for held in locks:
        held.close()


def run_all(
    experiment: str,
    study: Study,
    table: Path,
    runs: Path,
    terminal: Terminal,
    stopped: Callable[[], str | None],
) -> bool:
    """Runs what is due until nothing is, or until stopped.

    Args:
      experiment: the file, as its runs' --config.
      study: its study.
      table: the CSV file; each finished run is added at once.
      runs: the folder of the runs' folders and logs.
      terminal: for people.
      stopped: asked all the time; the name of a signal ends the runs, each saving its state.

    Returns:
      Whether the study is complete. Raises PointFailed.
    """
    runs.mkdir(parents=True, exist_ok=True)
    running: list[Running] = []
    waiting = False
    try:
        while True:
            rows = results.read(table)
            losses = results.losses_of(study, rows)
            due = [p for p in plan.due(study, losses) if p not in {r.point for r in running}]
            for point in due:
                if stopped() or len(running) == lanes(study.cores):
                    break
                if (run := _try(experiment, study, point, table, runs)) is not None:
                    running.append(run)
            if not running and (stopped() or not due):
                return not due
            if not running and not waiting:
                waiting = True
                terminal.say(f"waiting: other programs have {len(due)} runs, or the cores")
            for run in _wait(running, stopped, terminal, *_status(study, rows, running)):
                running.remove(run)
                _finish(experiment, study, table, runs, terminal, run, bool(stopped()))
    finally:
        for run in running:  # after an error in one of them, or in this program
            run.process.terminate()
        for run in running:
            run.process.wait()
            release(run.locks)


def _try(experiment: str, study: Study, point: Point, table: Path, runs: Path) -> Running | None:
    """Starts a point, if no other program has it and there are cores for it."""
    if (held := lock(runs / f"{point.name}.claim")) is None:
        return None
    cores = take_cores(study.cores)
    # It may have ended in another program since the table was read.
    if cores is None or point in results.losses_of(study, results.read(table)):
        release([held, *(cores or {}).values()])
        return None
    return start(experiment, study, point, runs, cores, [held, *cores.values()])


def _wait(
    running: list[Running], stopped: Callable[[], str | None], terminal: Terminal, share: float,
    status: str,
) -> list[Running]:  # fmt: skip
    """Those that ended; waits for one, or, for other programs' runs, some seconds."""
    told, since = False, time.monotonic()
    while running or time.monotonic() - since < 5:
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
        terminal.show(status, share)
        time.sleep(0.2)
    return []


def _status(study: Study, rows: list[results.Row], running: list[Running]) -> tuple[float, str]:
    done = len(results.in_study(study, rows))
    total = done + len(plan.forecast(study, results.losses_of(study, rows)))
    names = ", ".join(run.point.name for run in running)
    return done / total, f"{done} of about {total} runs{_eta(study, rows)}; now {names}"


def _eta(study: Study, rows: list[results.Row]) -> str:
    left = seconds_left(study, rows)
    return "" if left is None else f", about {format_duration(left)} left"


def seconds_left(study: Study, rows: list[results.Row]) -> float | None:
    """Until the study's end, from what a step took so far; None where nothing has run.

    Without the time that starts, compilation and evaluation take.
    """
    speed: dict[tuple[str, str] | None, float] = {}
    for row in rows:
        if row["status"] == "done" and row["steps"]:
            each = row["seconds"] / row["steps"]
            speed[row["setting"], row["model"]] = speed[None] = each
    if not speed:
        return None
    left = plan.forecast(study, results.losses_of(study, rows))
    return sum(p.steps * speed.get((p.setting, p.model), speed[None]) for p in left) / lanes(
        study.cores
    )


def _finish(
    experiment: str, study: Study, table: Path, runs: Path, terminal: Terminal, run: Running,
    stopping: bool,
) -> None:  # fmt: skip
    """Adds the row of a run that has ended, or leaves it for another time."""
    point, code = run.point, run.process.returncode
    log = runs / f"{point.name}.log"
    try:
        if code == EXIT_RESUME or (code < 0 and stopping):  # it goes on next time
            return
        if code not in (0, EXIT_DIVERGED):
            raise PointFailed(f"{point.name} {_how_it_ended(code, log)}")
        row = results.row_of(
            experiment, study, point, runs / point.name, code == EXIT_DIVERGED, run.origin
        )
        results.add(table, study, row)
    finally:
        release(run.locks)
    loss = "diverged" if row["loss"] is None else f"{row['loss']:.4f} nats/token"
    rows = results.read(table)
    left = len(plan.forecast(study, results.losses_of(study, rows)))
    terminal.say(
        f"{point.name}: {loss} in {format_duration(row['seconds'])};"
        f" about {left} runs to come{_eta(study, rows)}"
    )


def run_again(experiment: str, study: Study, table: Path, name: str) -> int:
    """Runs a point of the table again; 0 where its loss is the same to the last bit."""
    rows = {results.point_of(r).name: r for r in results.in_study(study, results.read(table))}
    if name not in rows:
        example = f"it has e.g. {next(iter(rows))}" if rows else "it has none of this study"
        raise ConfigError(f"--check: {table} has no {name}; {example}.")
    old, terminal, stop = rows[name], Terminal(), StopSignal()
    point = results.point_of(old)
    with tempfile.TemporaryDirectory() as folder:
        while (cores := take_cores(study.cores)) is None:
            terminal.tell("waiting for cores that other runs have", seconds=60)
            if stop.name:
                return EXIT_RESUME
            time.sleep(1)
        terminal.say(f"{name}: about {format_duration(old['seconds'])}")
        run = start(experiment, study, point, Path(folder), cores, [*cores.values()])
        try:
            while (code := run.process.poll()) is None and not stop.name:
                time.sleep(0.2)
        finally:
            run.process.kill()
            run.process.wait()
            stop.restore()
        if code is None:
            return EXIT_RESUME
        if code not in (0, EXIT_DIVERGED):
            raise PointFailed(f"{name} {_how_it_ended(code, Path(folder) / f'{name}.log')}")
        new = results.row_of(
            experiment, study, point, Path(folder) / name, code == EXIT_DIVERGED, run.origin
        )
    for column in (
        "cpu", "cores", "devices", "python", "jax", "jaxlib", "data", "held_out", "config",
    ):  # fmt: skip
        if old[column] != new[column]:
            terminal.say(f"{column} differs: {old[column]} in the table, {new[column]} here")
    same = old["loss"] == new["loss"] and old["status"] == new["status"]
    told = [f"{r['status']}, loss {r['loss']!r}" for r in (old, new)]
    terminal.say(f"in the table: {told[0]}; now: {told[1]}")
    if same:
        terminal.say("the same to the last bit")
    elif None not in (old["loss"], new["loss"]):
        terminal.say(f"difference: {new['loss'] - old['loss']:+.3g} nats a token")
        if (spread := results.spread_of(study, results.read(table), point)) is not None:
            terminal.say(f"spread of its cell (largest less smallest seed): {spread:.3g}")
    return 0 if same else 1


def _how_it_ended(code: int, log: Path) -> str:
    if code < 0:
        return f"was ended by signal {-code} (9: out of memory?); see {log}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"ended with code {code}: {lines[-1] if lines else ''} (see {log})"
