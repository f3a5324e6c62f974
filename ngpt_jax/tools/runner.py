"""Runs the points of a study, each as a process of its own, side by side, until none is due."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from ngpt_jax.terminal import Terminal, format_duration
from ngpt_jax.tools import results, study
from ngpt_jax.tools.study import Point, Study

EXIT_DIVERGED = 3  # of main
EXIT_RESUME = 75


class PointFailed(RuntimeError):
    """A run ended with an error that is none of training's: one line."""


class Running(NamedTuple):
    point: Point
    process: subprocess.Popen
    claim: IO[str]
    cores: tuple[int, ...]


def available_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def slots(cores: int | None) -> list[tuple[int, ...]]:
    """Which cores each of the runs side by side has; one run on everything where ``cores`` is None.

    Raises ValueError where there are too few.
    """
    here = available_cores()
    if cores is None:
        return [()]
    if cores > len(here):
        raise ValueError(f"the study pins each run to {cores} cores, and {len(here)} are here")
    return [tuple(here[i : i + cores]) for i in range(0, len(here) - cores + 1, cores)]


@contextmanager
def pinned(cores: tuple[int, ...]) -> Iterator[None]:
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


def claim(folder: Path, name: str) -> IO[str] | None:
    """Takes a point for this program, and for the run that inherits the file; None if taken."""
    file = open(folder / f"{name}.claim", "a", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        file.close()
        return None


def start(experiment: str, plan: Study, point: Point, runs: Path, cores, held: IO[str]) -> Running:
    """Starts ``python -m ngpt_jax.main`` for a point, its output in RUNS/NAME.log."""
    workdir = runs / point.name
    command = [
        sys.executable, "-m", "ngpt_jax.main",
        *results.command_of(experiment, plan, point), f"--workdir={workdir}",
    ]  # fmt: skip
    environment = dict(os.environ)
    if plan.cores is not None:
        environment["JAX_PLATFORMS"] = "cpu"
    with pinned(cores), open(runs / f"{point.name}.log", "a", encoding="utf-8") as log:
        # A session of its own: Ctrl-C reaches it through us, once.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=environment, pass_fds=[held.fileno()], start_new_session=True,
        )  # fmt: skip
    return Running(point, process, held, cores)


def run_all(
    experiment: str,
    plan: Study,
    table: Path,
    runs: Path,
    terminal: Terminal,
    stopped: Callable[[], str | None],
) -> bool:
    """Runs what is due until nothing is, or until stopped.

    Args:
      experiment: the file, as its runs' --config.
      plan: its study.
      table: the CSV file; each finished run is added at once.
      runs: the folder of the runs' folders and logs.
      terminal: for people.
      stopped: asked all the time; the name of a signal ends the runs, each saving its state.

    Returns:
      Whether the study is complete. Raises PointFailed.
    """
    runs.mkdir(parents=True, exist_ok=True)
    free, waiting = slots(plan.cores), False
    running: list[Running] = []
    try:
        while True:
            rows = results.read(table)
            losses = results.losses_of(plan, rows)
            due = [p for p in study.due(plan, losses) if p not in {r.point for r in running}]
            for point in due if not stopped() else []:
                if not free:
                    break
                if (held := claim(runs, point.name)) is None:
                    continue
                if point in results.losses_of(plan, results.read(table)):  # ended meanwhile
                    held.close()
                    continue
                running.append(start(experiment, plan, point, runs, free.pop(0), held))
            if not running and (stopped() or not due):
                return not due
            if not running and not waiting:
                waiting = True
                terminal.say(f"waiting for {len(due)} runs that other programs have under way")
            remaining = seconds_left(plan, rows, len(slots(plan.cores)))
            ended = _wait(running, stopped, terminal, _status(plan, losses, running, remaining))
            for run in ended:
                running.remove(run)
                free.append(run.cores)
                _finish(experiment, plan, table, runs, terminal, run, bool(stopped()))
    finally:
        for run in running:  # after an error in one of them, or in this program
            run.process.terminate()
        for run in running:
            run.process.wait()
            run.claim.close()


def _wait(running: list[Running], stopped, terminal: Terminal, status: str) -> list[Running]:
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
        terminal.show(status, 0.0)
        time.sleep(0.2)
    return []


def _status(plan: Study, losses, running: list[Running], remaining: float | None) -> str:
    total = len(losses) + len(study.forecast(plan, losses))
    names = ", ".join(run.point.name for run in running)
    eta = "" if remaining is None else f", eta about {format_duration(remaining)}"
    return f"{len(losses)} of about {total} runs{eta}; now {names}"


def seconds_left(plan: Study, rows: list[results.Row], lanes: int) -> float | None:
    """Until the study's end, from what a step took so far; None where nothing has run."""
    speed: dict[tuple[str, str] | None, float] = {}
    for row in rows:
        if row["status"] == "done" and row["steps"]:
            each = row["seconds"] / row["steps"]
            speed[row["setting"], row["model"]] = speed[None] = each
    if not speed:
        return None
    left = study.forecast(plan, results.losses_of(plan, rows))
    return sum(p.steps * speed.get((p.setting, p.model), speed[None]) for p in left) / lanes


def _finish(
    experiment: str, plan: Study, table: Path, runs: Path, terminal: Terminal, run: Running,
    stopping: bool,
) -> None:  # fmt: skip
    """Adds the row of a run that has ended, or leaves it for another time."""
    point, code = run.point, run.process.returncode
    try:
        if code == EXIT_RESUME or (code < 0 and stopping):  # it goes on next time
            return
        if code not in (0, EXIT_DIVERGED):
            raise PointFailed(
                f"{point.name} ended with code {code}: {last_line(runs / f'{point.name}.log')}"
            )
        row = results.row_of(experiment, plan, point, runs / point.name, code == EXIT_DIVERGED)
        results.add(table, plan, row)
    finally:
        run.claim.close()
    rows = results.read(table)
    remaining = seconds_left(plan, rows, len(slots(plan.cores)))
    left = len(study.forecast(plan, results.losses_of(plan, rows)))
    loss = "diverged" if row["loss"] is None else f"{row['loss']:.4f} nats/token"
    terminal.say(
        f"{point.name}: {loss} in {format_duration(row['seconds'])};"
        f" about {left} runs and {format_duration(remaining or 0)} left"
    )


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else f"see {log}"
