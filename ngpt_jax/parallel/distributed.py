"""Several processes as one program: start-up, and what they have to agree on."""

from __future__ import annotations

import itertools
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from ngpt_jax.config import ConfigError

T = TypeVar("T")

_ADVICE = (
    "start the same program on all workers (TPU pods: gcloud compute tpus tpu-vm ssh NAME"
    " --worker=all --command=...)"
)
_MESSAGE_BYTES = 2048
_PATIENCE = 7 * 24 * 3600 * 1000  # milliseconds
_rounds = itertools.count()


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
) -> None:
    """Joins this process with the others, before jax's first use of a device.

    On TPU VMs and under SLURM or Open MPI everything is found out; elsewhere all three facts are
    given. Without either this is a program of one process, and nothing happens.

    Args:
      coordinator_address: host:port of process 0.
      num_processes, process_id: how many, and which this is.
      timeout: seconds to wait for the others; then the program ends with a message.

    Raises:
      ConfigError: facts that are missing or wrong.
    """
    given = (coordinator_address, num_processes, process_id)
    if any(x is not None for x in given):
        _check_flags(*given)
    elif not _on_cluster():
        return
    where = f"the coordinator at {coordinator_address}" if coordinator_address else "the others"

    def give_up() -> None:
        # The runtime itself would abort with a stack trace, and does not let anyone catch it.
        print(
            f"error: {where} and all processes were not there within {timeout} s; {_ADVICE}, and"
            " see that the port is open.",
            file=sys.stderr,
            flush=True,
        )
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
    """The GPUs that a process sees, where it is the only one of the job on its host.

    None leaves it to jax: all devices, or under SLURM and Open MPI the one of the local rank.
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


def together(fn: Callable[[], T], error: type[Exception]) -> T:
    """Runs ``fn`` on every process; where it fails on one, all end with its message.

    Without this the others would wait for the failed one.

    Args:
      fn: local work, without collectives.
      error: what the others raise.
    """
    if jax.process_count() == 1:
        return fn()
    failed: Exception | None = None
    try:
        result = fn()
    except Exception as e:
        failed = e
    messages = _all_messages("" if failed is None else str(failed) or type(failed).__name__)
    if failed is not None:
        raise failed
    for process, message in enumerate(messages):
        if message:
            raise error(f"process {process}: {message}")
    return result


def _all_messages(message: str) -> list[str]:
    data = message.encode()[:_MESSAGE_BYTES]
    buffer = np.zeros(_MESSAGE_BYTES, np.uint8)
    buffer[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(buffer))
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def of_first(fn: Callable[[], str]) -> str:
    """What ``fn`` says on process 0, at most 2 KiB, on all of them; so also its errors."""
    text = together(lambda: fn() if is_first() else "", ConfigError)
    return text if jax.process_count() == 1 else _all_messages(text)[0]


def check_same(**facts: object) -> None:
    """Refuses, on all processes, to go on where they were started with different facts."""
    if jax.process_count() == 1:
        return
    values = _all_messages("\n".join(str(x) for x in facts.values()))
    for name, *of_processes in zip(facts, *(v.split("\n") for v in values)):
        for process, value in enumerate(of_processes):
            if value != of_processes[0]:
                raise ConfigError(
                    f"{name} of process {process} is not that of process 0; start all processes"
                    " with the same command, versions and files."
                )


def stop_agreed(poll: int) -> bool:
    """Whether a process was sent SIGTERM, told to all at the same poll.

    Args:
      poll: 1, 2, ...: every process asks equally often.
    """
    return multihost_utils.reached_preemption_sync_point(poll)


def first_then_rest(fn: Callable[[], T], error: type[Exception]) -> T:
    """Runs ``fn`` on process 0, which may take hours, and then on the others.

    What process 0 writes to a shared disk is there for the others. Where it fails, they do not
    begin.

    Args:
      fn: local work, without collectives.
      error: what the processes raise on which it did not fail.
    """
    if jax.process_count() == 1:
        return fn()
    outcome: list[Callable[[], T]] = []

    def run() -> None:
        try:
            result = fn()
            outcome.append(lambda: result)
        except Exception as e:
            failure = e

            def fail() -> T:
                raise failure

            outcome.append(fail)

    # By the runtime's own service: collectives give up after some minutes.
    number = next(_rounds)
    if is_first():
        run()
        first_failed = outcome[0].__name__ == "fail"
        runtime().key_value_set(f"ngpt_jax/first/{number}", str(first_failed))
    failed = runtime().blocking_key_value_get(f"ngpt_jax/first/{number}", _PATIENCE)
    if not is_first():
        # Nothing, where process 0 failed: its error is raised here too.
        outcome.append(lambda: cast(T, None)) if failed == "True" else run()
    runtime().wait_at_barrier(f"ngpt_jax_rest_{number}", _PATIENCE)
    return together(outcome[0], error)


def runtime() -> Any:
    """The client of jax's own service: keys with values, barriers; also for threads."""
    from jax._src import distributed as jax_distributed  # there is no public name for it

    assert jax_distributed.global_state.client is not None
    return jax_distributed.global_state.client


def leave(code: int) -> int:
    """The exit code of a program that others may still be waiting for.

    With several processes it ends here: jax's shutdown would wait for the others, who wait for this
    one. They are ended by the runtime, which misses it.
    """
    if jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
