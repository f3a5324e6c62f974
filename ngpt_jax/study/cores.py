"""The CPU cores that a run has for itself, and locks that keep other programs from a run."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ngpt_jax.config import ConfigError
from ngpt_jax.files import lock
from ngpt_jax.parallel.backend import available_cores


def lanes(cores: int | None) -> int:
    """How many runs go side by side; raises ConfigError where there are too few cores."""
    here = len(available_cores())
    if cores is not None and cores > here:
        raise ConfigError(f"get_study(): each run is pinned to {cores} cores, and {here} are here.")
    return 1 if cores is None else here // cores


def take(path: Path) -> IO[str] | None:
    """Locks a file for this program, and for the run that inherits it; None if it is locked."""
    try:
        return lock(path, keep_waiting=lambda: False)
    except BlockingIOError:
        return None


def take_cores(cores: int | None) -> dict[int, IO[str]] | None:
    """Cores that no other run of any study on this machine has, with their locks.

    Empty where runs are not pinned; None where too few are free.
    """
    if cores is None:
        return {}
    folder = Path(tempfile.gettempdir()) / f"ngpt_jax-cores-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    taken: dict[int, IO[str]] = {}
    for core in available_cores():
        if (held := take(folder / str(core))) is not None:
            taken[core] = held
        if len(taken) == cores:
            return taken
    release(taken.values())
    return None


def release(locks: Iterable[IO[str]]) -> None:
    for held in locks:
        held.close()


@contextmanager
def pinned(cores: Iterable[int]) -> Iterator[None]:
    """Processes that are started inside run on these cores alone, where the system can do that."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
