"""One save of a checkpoint, in the background: whole on all processes, or failed on all."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import itertools
import json
import os
import re
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from ngpt_jax.checkpoint import checksums
from ngpt_jax.checkpoint.folder import CheckpointFolder
from ngpt_jax.checkpoint.quiet import await_last_words, quiet_orbax
from ngpt_jax.parallel import distributed
from ngpt_jax.terminal import format_bytes

_T = TypeVar("_T")
_TIMEOUT = 3600  # seconds until a write, or another process, is given up
_counter = itertools.count()  # equal on all processes, which save together


class Save:
    """Writes checkpoint N: begun on the training thread, finished on a thread of its own.

    N's temporary folder holds state/ (by orbax, every process its part) and progress/metadata
    (JSON) as orbax's CheckpointManager would lay them. When all processes have written theirs and
    measured them, process 0 merges them, writes the checksums of all files, and only then commits.

    Attributes:
      problem: why the save failed, the same on all processes; empty where it is whole.
    """

    def __init__(
        self, folder: CheckpointFolder, step: int, state: dict[str, Any], progress: str,
        facts: dict[str, Any], done: Callable[[Save], None],
    ):  # fmt: skip
        """Copies the state to the host before it returns.

        Args:
          folder: in which :func:`prepare` has made the folders of this save.
          step: N.
          state: trees of arrays by name.
          progress: JSON text.
          facts: JSON-able, written beside the checksums.
          done: called at the end, on the thread of the save.
        """
        self.step, self.problem = step, ""
        number = next(_counter)
        self.key = f"ngpt_jax/save/{number}"
        _forget(f"ngpt_jax/save/{number - 1}")
        self._folder, self._progress, self._facts, self._done = folder, progress, facts, done
        self._needs = state_bytes(state)
        self._temporary = folder.temporary(step)
        self._handler = ocp.StandardCheckpointHandler()  # of this save: none is spoilt by another
        self._writes: list[Any] = []
        self._not_started: Exception | None = None
        self._committed = False
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(quiet_orbax())
        try:
            arguments = ocp.args.StandardSave(state)
            write = self._handler.async_save(self._temporary.get() / "state", args=arguments)
            self._writes = _run(write) or []
        except Exception as e:  # told together with the others' in the background
            self._not_started = e
        self._thread = threading.Thread(target=self._work, name=f"save {step}")
        self._thread.start()

    def join(self) -> None:
        """Waits for the end of the save."""
        self._thread.join()

    def _work(self) -> None:
        with self._quiet:
            try:
                measured = self._on_all("written", self._wait)
                if not self.problem:
                    self._on_all("committed", lambda: self._commit(measured))
            except Exception as e:  # another process did not answer
                self.problem = why(e)
            if self.problem and distributed.is_first() and not self._committed:
                with contextlib.suppress(Exception):  # what stays is removed by the next save
                    self._temporary.get().rmtree(missing_ok=True)
            self._handler.close()
            self._writes, self._not_started = [], None  # they hold what orbax still has to say
            if self.problem:
                await_last_words(_TIMEOUT)
        self._done(self)

    def _wait(self) -> dict[str, Any]:
        """Waits for the writes of this process; returns the checksums of its files."""
        if self._not_started is not None:
            raise self._not_started
        for write in self._writes:
            write.result(timeout=_TIMEOUT)
        return checksums.measure_own(self._temporary.get(), jax.process_index())

    def _commit(self, measured: list[dict[str, Any]]) -> None:
        if not distributed.is_first():
            return
        temporary = self._temporary.get()
        self._handler.finalize(temporary / "state")
        (temporary / "progress" / "metadata").write_text(self._progress)
        checksums.write(temporary, self._facts, dict(collections.ChainMap(*measured)))
        _run(self._temporary.finalize())
        self._committed = True

    def _on_all(self, name: str, fn: Callable[[], Any]) -> list[Any]:
        """Runs fn on all processes, and returns what it gave on each (JSON-able).

        Where it failed, ``problem`` says why on the first process on which it did.
        """
        problem, result = "", None
        try:
            result = fn()
        except Exception as e:
            problem = why(e)
            if _errno(e) == errno.ENOSPC:
                problem = no_space(self._folder.free_bytes(), self._needs)
        told = [json.loads(x) for x in share(f"{self.key}/{name}", json.dumps([problem, result]))]
        failed = [(process, theirs) for process, (theirs, _) in enumerate(told) if theirs]
        for process, theirs in failed[:1]:
            self.problem = f"process {process}: {theirs}" if process else theirs
        return [result for _, result in told]


def prepare(folder: CheckpointFolder, step: int, state: dict[str, Any]) -> str:
    """Makes the folders of a save, on process 0.

    Returns:
      Why there is no room for it, in which case nothing is written; or nothing. Raises what the
      storage raises.
    """
    folder.remove_leftovers()  # of a failed save
    free, needs = folder.free_bytes(), state_bytes(state)
    if free < needs:
        return no_space(free, needs)
    temporary = folder.temporary(step)
    _run(temporary.create())
    for item in ("state", "progress"):
        (temporary.get() / item).mkdir()
    return ""


def share(key: str, text: str) -> list[str]:
    """The texts of all processes, through the coordinator: threads may not use the devices."""
    if jax.process_count() == 1:
        return [text]
    client = distributed.coordinator()
    client.key_value_set(f"{key}/{jax.process_index():08}", f"={text}")
    client.wait_at_barrier(key, _TIMEOUT * 1000)
    return [value[1:] for _, value in sorted(client.key_value_dir_get(key))]


def _forget(key: str) -> None:
    """Takes from the coordinator's memory what all processes have read."""
    if jax.process_count() > 1 and distributed.is_first():
        distributed.coordinator().key_value_delete(key + "/")


def state_bytes(state: dict[str, Any]) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(state))


def no_space(free: float, needs: int) -> str:
    return (
        f"no space left on device; {format_bytes(free)} free, the checkpoint needs"
        f" {format_bytes(needs)}"
    )


def why(error: BaseException) -> str:
    """An error's reason in few words; orbax, TensorStore and XLA use many."""
    if code := _errno(error):
        reason = os.strerror(code)
        return reason[:1].lower() + reason[1:]
    if isinstance(error, TimeoutError):
        return f"not written within {_TIMEOUT} s"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's
    return int(found[1]) if found else None


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    """Runs a coroutine to its end in this thread."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()
