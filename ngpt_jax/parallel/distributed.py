"""Several processes as one program: how they start, and how they agree."""

import itertools
import json
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from ngpt_jax.config import ConfigError
from ngpt_jax.errors import drop_unwritten, tell
from ngpt_jax.files import digest_of

T = TypeVar("T")

_ADVICE = (
    "start the same program on all workers (TPU pods: gcloud compute tpus tpu-vm ssh NAME"
    " --worker=all --command=...)"
)
_MESSAGE_BYTES = 2048
_CHARACTERS = 500  # of UTF-8, with their number before them, fit into a message
_PATIENCE = 7 * 24 * 3600 * 1000  # milliseconds
_rounds = itertools.count()  # equal on all processes


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
) -> None:
    """Joins this process with the others, before jax's first use of a device.

    On TPU VMs and under SLURM or Open MPI jax finds the other processes; elsewhere the three
    arguments tell. In a program of one process nothing happens.

    Args:
      coordinator_address: host:port of process 0.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      timeout: seconds to wait for the others; then the program ends with a message.

    Raises:
      ConfigError: arguments are missing or wrong.
    """
    given = (coordinator_address, num_processes, process_id)
    if any(x is not None for x in given):
        _check_flags(*given)
    elif not _on_cluster():
        return
    where = f"the coordinator at {coordinator_address} or " if coordinator_address else ""

    def give_up() -> None:
        # jax itself would abort with a stack trace, which nobody can catch.
        silent = f"{where}some of the other processes did not answer within {timeout} s"
        mend = f"{_ADVICE}, and see that the port is open."
        tell(f"error: {silent}; {mend}")
        os._exit(1)

    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            *given, local_device_ids=_all_gpus(), initialization_timeout=timeout + 60
        )
    except (RuntimeError, ValueError) as e:
        raise ConfigError(f"jax.distributed.initialize failed ({e}); {_ADVICE}.") from e
    finally:
        timer.cancel()


def _check_flags(address: str | None, num_processes: int | None, process_id: int | None) -> None:
    if address is None or num_processes is None or process_id is None:
        raise ConfigError(
            "Give all of --coordinator_address=HOST:PORT, --num_processes and --process_id, or"
            " none of them."
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"--coordinator_address must be HOST:PORT, got {address!r}.")
    if not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--process_id = {process_id} must be at least 0 and below --num_processes ="
            f" {num_processes}."
        )


def _on_cluster() -> bool:
    """Whether jax will find the other processes by itself."""
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
        return True
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    tpu = any(Path("/dev").glob("accel*")) or Path("/dev/vfio/0").exists()
    cpu = os.environ.get("JAX_PLATFORMS", "").startswith("cpu")
    return tpu and not cpu and os.environ.get("TPU_SKIP_MDS_QUERY") is None


def _all_gpus() -> list[int] | None:
    """The GPUs of this host, where no other process of the job runs on it.

    None lets jax choose: all devices, or under SLURM and Open MPI that of the local rank.
    """
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE"))
    tasks = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", tasks)
    if tasks is None or not all(re.fullmatch(r"1(\(x\d+\))?", n) for n in tasks.split(",")):
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else list(Path("/dev").glob("nvidia[0-9]*"))
    return list(range(len(gpus))) or None


def is_first() -> bool:
    """Whether this process writes logs and talks to the user."""
    return jax.process_index() == 0


def _try(fn: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """(what a function returned, the error that it raised)."""
    try:
        return fn(), None
    except Exception as e:
        return None, e


def together(fn: Callable[[], T], error: type[Exception]) -> T:
    """Runs ``fn`` on every process; where it fails on one, all raise an error with its message.

    Without this the others would wait for the failed process.

    Args:
      fn: local work, without collectives.
      error: what the other processes raise.

    Returns:
      What ``fn`` returned on this process.
    """
    return fn() if jax.process_count() == 1 else _raise_together(*_try(fn), error)


def _raise_together(result: Any, own: Exception | None, error: type[Exception]) -> Any:
    """The result of this process, where no process has an error of its ``own``; all call it."""
    messages = _all_messages("" if own is None else str(own) or type(own).__name__)
    if own is not None:
        raise own
    for process, message in enumerate(messages):
        if message:
            raise error(f"process {process}: {message}")
    return result


def _all_messages(message: str) -> list[str]:
    """The messages of all processes, each cut to 2 KiB."""
    data = message.encode()[:_MESSAGE_BYTES]
    buffer = np.zeros(_MESSAGE_BYTES, np.uint8)
    buffer[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(buffer))
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def of_first(fn: Callable[[], str]) -> str:
    """The text that ``fn`` returns on process 0, on all processes; so also its error."""
    text = together(lambda: fn() if is_first() else "", ConfigError)
    if jax.process_count() == 1:
        return text
    length, _, found = _all_messages(f"{len(text)} {text[:_CHARACTERS]}")[0].partition(" ")
    while len(found) < int(length):
        found += _all_messages(text[len(found) : len(found) + _CHARACTERS])[0]
    return found


def check_same(**facts: object) -> None:
    """Refuses, on all processes, to go on where they were started with different facts.

    Args:
      **facts: any number, of any length as text; the first that differs is named.
    """
    if jax.process_count() == 1:
        return
    own = {name: digest_of([str(fact)])[:16] for name, fact in facts.items()}
    first = json.loads(of_first(lambda: json.dumps(own)))

    def compare() -> None:
        for name in sorted(own.keys() | first.keys()):
            if own.get(name) != first.get(name):
                raise ConfigError(
                    f"{name} of process {jax.process_index()} is not that of process 0; start all"
                    " processes with the same command, versions and files."
                )

    together(compare, ConfigError)


def stop_agreed(poll: int) -> bool:
    """Whether a process was sent SIGTERM; all processes get the same answer at the same poll.

    Args:
      poll: 1, 2, ...: every process asks equally often.
    """
    return multihost_utils.reached_preemption_sync_point(poll)


def first_then_rest(fn: Callable[[], T], error: type[Exception]) -> T:
    """Runs ``fn`` on process 0, which may take hours, and then on the others.

    So the others find on a shared disk what process 0 has written there. If it fails on process 0,
    it does not run on the others; if it fails on any, all raise, as :func:`together` does.

    Args:
      fn: local work, without collectives.
      error: what the processes raise on which it did not fail.

    Returns:
      What ``fn`` returned on this process.
    """
    if jax.process_count() == 1:
        return fn()
    # The wait is the coordinator's: collectives give up after some minutes.
    client, key = coordinator(), f"ngpt_jax/first_then_rest/{next(_rounds)}"
    result, own = None, None
    if is_first():
        result, own = _try(fn)
        client.key_value_set(key, "done" if own is None else "failed")
    elif client.blocking_key_value_get(key, _PATIENCE) == "done":
        result, own = _try(fn)
    client.wait_at_barrier(f"{key}/end", _PATIENCE)
    return _raise_together(result, own, error)  # where process 0 failed, its error


def coordinator() -> Any:
    """The client of jax's coordination service: keys with values, barriers; threads may use it."""
    from jax._src import distributed as jax_distributed  # there is no public name for it

    assert jax_distributed.global_state.client is not None
    return jax_distributed.global_state.client


def leave(code: int) -> int:
    """The exit code, for a program that other processes may still be waiting for.

    With several processes the program ends here, without jax's shutdown: that would wait for the
    others, which wait for this process. The coordination service notices its end, and ends them.
    """
    if jax.process_count() > 1:
        drop_unwritten()
        if is_first():
            time.sleep(2)  # the service ends with this process, and aborts those that are left
        os._exit(code)
    return code
