"""The folder of a run: is it this run's, what may change, and do all processes see it."""

import datetime
import importlib.metadata
import json
import os
import platform
import secrets
import sys
import time
import zlib
from collections.abc import Callable
from typing import IO, Any

import jax
from etils import epath

from ngpt_jax import config as config_lib
from ngpt_jax import files
from ngpt_jax.config import Config, ConfigError
from ngpt_jax.config.convert import fields
from ngpt_jax.config.facts import FREE, OWN, SCHEDULE
from ngpt_jax.errors import install_hint
from ngpt_jax.parallel import distributed
from ngpt_jax.parallel.backend import available_cores
from ngpt_jax.training.stop_signal import EXIT_DIVERGED


class RunError(RuntimeError):
    """The run cannot go on; one line says why and what to do."""

    exit_code = 1


class Diverged(RunError):
    """Too many steps in a row were skipped."""

    exit_code = EXIT_DIVERGED


_RUN, _SCHEDULE, _FREE = OWN.resume, SCHEDULE.resume, FREE.resume


def changes(old: Config, new: Config) -> dict[str, list[str]]:
    """Differences of two configs, by what a change does to a run (config/facts.py)."""
    found: dict[str, list[str]] = {_RUN: [], _SCHEDULE: [], _FREE: []}
    constant = old.optimizer.schedule == new.optimizer.schedule == "constant"
    constant = constant and old.optimizer.base_steps is None  # else the rate follows the length
    for difference in config_lib.differences(old, new):
        field = difference.field
        # The length of a run without a schedule decides nothing but its end.
        length = constant and field.name in ("train.steps", "train.tokens")
        found[_FREE if length else field.effect.resume].append(str(difference))
    return found


def reads_weights_otherwise(saved: Any, config: Config) -> str:
    """How the model differs from that of a run whose weights are taken; "" where it does not.

    Args:
      saved: that run's config, as it stands in its checkpoints.
      config: resolved.
    """
    found = []
    for field in fields(config):
        own = field.effect.resume == _RUN and field.name != "model.init_std"  # has no effect then
        if own and field.name.startswith("model."):
            value = saved
            for name in field.name.split("."):
                value = value.get(name, {}) if isinstance(value, dict) else {}
            if value != {} and value != field.value:
                found.append(f"{field.name}: {value} -> {field.value}")
    return _some(found)


def check_workdir(workdir: epath.Path, config: Config, allow_schedule_change: bool) -> list[str]:
    """Refuses a folder that is neither new nor this run's; writes nothing.

    Args:
      workdir: the folder.
      config: resolved.
      allow_schedule_change: go on with another length, batch size or learning rate.

    Returns:
      The differences between the config and that of the last start.

    Raises ConfigError.
    """
    where, checkpoints = f"--workdir={workdir}", workdir / "checkpoints"
    with files.reading(where):
        if workdir.exists() and not workdir.is_dir():
            raise ConfigError(f"{where} is a file; give a folder.")
        if not (workdir / "config.json").exists():
            held = ["checkpoints"] if checkpoints.is_dir() and any(checkpoints.iterdir()) else []
            # Those of a start that was killed early are empty; others would be overwritten.
            metrics = files.matching(workdir, "metrics*.jsonl")
            held += [path.name for path in metrics if path.stat().length]
            if held:
                raise ConfigError(
                    f"{where} holds {held[0]} but no config.json; choose another --workdir."
                )
            return []
    found = changes(read_config(where, workdir), config)
    if found[_RUN]:
        raise ConfigError(
            f"{where} holds another run ({_some(found[_RUN])}); choose another --workdir, or delete"
            " it."
        )
    if found[_SCHEDULE] and not allow_schedule_change:
        raise ConfigError(
            f"{where} holds a run with another schedule ({_some(found[_SCHEDULE])});"
            " choose another --workdir, or change it with --allow_schedule_change."
        )
    return found[_SCHEDULE] + found[_FREE]


def read_config(where: str, workdir: epath.Path) -> Config:
    """The config of a run's folder, as its newest start resolved it; raises ConfigError."""
    saved = workdir / "config.json"
    with files.reading(where):
        text = saved.read_bytes()
    try:
        return config_lib.from_saved(text.decode())
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as e:
        raise ConfigError(f"{saved} cannot be read ({e}); choose another folder.") from e


def _some(differences: list[str]) -> str:
    rest = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
    return "; ".join(differences[:3]) + rest


def lock_workdir(
    workdir: epath.Path, patience: float = 60.0, say: Callable[[str], None] = lambda line: None
) -> IO[str] | None:
    """Makes the folder, and keeps other programs out of it until the returned file is closed.

    Args:
      workdir: the folder.
      patience: seconds to wait for a process that is about to end.
      say: told that it waits.

    Returns:
      The lock; None on remote storage, which has no locks.

    Raises:
      RunError: another process uses the folder.
      OSError: the folder cannot be written.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    if files.is_remote(workdir):
        return None
    deadline, told = time.monotonic() + patience, False

    def keep_waiting() -> bool:
        nonlocal told
        if not told and patience:
            say(f"waiting up to {patience:.0f} s for another process, which uses {workdir}")
        told = True
        return time.monotonic() < deadline

    try:
        file = files.lock(workdir / ".lock", keep_waiting)
    except BlockingIOError as e:
        raise RunError(
            f"--workdir={workdir} is in use by another process; wait for its end, or choose"
            " another --workdir."
        ) from e
    files.remove_leftovers(workdir)
    file.truncate(0)
    file.write(secrets.token_hex(16))  # by which other hosts know the folder
    file.flush()
    return file


def remove_if_unused(workdir: epath.Path, is_new: bool) -> None:
    """Removes the folder of a start that failed (its config is missing), if that start made it."""
    if is_new and distributed.is_first() and not (workdir / "config.json").exists():
        workdir.rmtree(missing_ok=True)


def write_start(workdir: epath.Path, config: Config, facts: dict[str, str]) -> None:
    """Writes what the newest start runs with, and last the config: it makes the folder this run's.

    Args:
      workdir: the folder.
      config: resolved.
      facts: to stand beside the versions: fingerprints of text and tokenizer.

    Raises OSError.
    """
    files.write_atomically(
        workdir / "versions.json", json.dumps(versions() | facts, indent=2) + "\n"
    )
    files.write_atomically(workdir / "config.json", config_lib.to_json(config))


def read_facts(workdir: epath.Path) -> dict[str, Any]:
    """What :func:`write_start` wrote into versions.json; nothing where that cannot be read."""
    try:
        facts = json.loads((workdir / "versions.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def check_held_out(workdir: epath.Path, held_out: str, data: str) -> None:
    """Refuses another held-out text than the newest start of a run had; raises ConfigError.

    Args:
      workdir: the run's folder.
      held_out, data: fingerprints of the held-out text here, and of that to train on.
    """
    facts, here = read_facts(workdir), {"held_out": held_out, "data": data}
    known = next((name for name in here if name in facts), None)  # older runs noted data alone
    if known is None:
        raise ConfigError(
            f"{workdir / 'versions.json'} does not tell which text was held out (weights that were"
            " trained elsewhere have none)."
        )
    if facts[known] != here[known]:
        raise ConfigError("the text here is not the run's (another Python, or other files).")


def check_shared(workdir: epath.Path, patience: float = 60.0) -> None:
    """Refuses a workdir that is not the same folder for all processes.

    Args:
      workdir: locked by process 0.
      patience: seconds in which the others must see what process 0 has written; NFS shows old
        entries for up to a minute.
    """
    file = workdir / ".lock"
    if files.is_remote(workdir) or jax.process_count() == 1:
        return
    text = distributed.of_first(lambda: str(zlib.crc32(file.read_bytes())))

    def look() -> None:
        deadline = time.monotonic() + patience
        while not (file.exists() and str(zlib.crc32(file.read_bytes())) == text):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"--workdir={workdir} is not the folder of process 0; give one on storage"
                    " that all hosts share."
                )
            time.sleep(0.5)

    distributed.together(look, ConfigError)


def open_workdir(path: str) -> epath.Path:
    """The folder that --workdir names; raises ConfigError where its storage cannot be used."""
    if not os.fspath(path):
        raise ConfigError("--workdir is empty; name a folder.")
    workdir = epath.Path(path).expanduser()
    if files.is_remote(workdir):
        try:
            workdir.exists()
        except Exception as e:  # of gcsfs and what it uses: not installed, not allowed
            why = f"{type(e).__name__}: {files.reason(e)}"
            raise ConfigError(
                f"--workdir={path} cannot be reached ({why}); gs:// needs"
                f" {install_hint('gcs')}, and credentials."
            ) from e
    return workdir


def cpu_model() -> str:
    """Name, family, model and stepping, where Linux tells them: compiled code depends on these."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            pairs = (line.partition(":") for line in f.read().split("\n\n")[0].splitlines())
        facts = {name.strip(): value.strip() for name, _, value in pairs}
        numbers = "/".join(facts[name] for name in ("cpu family", "model", "stepping"))
        return f"{facts['model name']} {numbers}"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def versions() -> dict[str, Any]:
    """What runs here: command, machine, versions of packages; a study's table takes some of it."""
    packages = "ngpt-jax jax jaxlib flax optax orbax-checkpoint grain numpy tokenizers".split()
    found: dict[str, Any] = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(),
        "command": sys.argv,
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cores": len(available_cores()),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        **found,
    }
