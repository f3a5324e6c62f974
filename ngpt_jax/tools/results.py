"""The table of a study's finished runs, a CSV file that several programs may add to."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import functools
import hashlib
import json
import math
import shlex
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ngpt_jax import config_file
from ngpt_jax.config import Config, ConfigError
from ngpt_jax.tools import plots
from ngpt_jax.tools.study import Losses, Point, Study, overrides_of

Row = dict[str, Any]

# Of each column: its type.
COLUMNS: dict[str, type] = {
    "setting": str, "model": str, "steps": int, "value": float, "seed": int,
    "status": str,  # done or diverged
    "loss": float,  # held-out nats a token, mean over the held-out sets
    "bits_per_byte": float,
    "tokens": int, "parameters": int, "flops": float,
    "seconds": float,  # of training, without evaluation and compilation
    "tokens_per_second": float,  # median over the run's intervals
    "cpu": str, "cores": int, "devices": str, "python": str, "jax": str, "jaxlib": str,
    "commit": str,
    "data": str,  # fingerprint of the training tokens
    "config": str,  # of the fields that make the run what it is
    "command": str,
}  # fmt: skip


def command_of(experiment: str, study: Study, point: Point) -> list[str]:
    """Arguments of ``python -m ngpt_jax.main`` for a point, without its workdir."""
    flags = [f"--config.{name}={text}" for name, text in overrides_of(study, point)]
    return [f"--config={experiment}", *flags]


def config_of(experiment: str, study: Study, point: Point) -> Config:
    return config_file.load_config(experiment, overrides_of(study, point))


def digest(config: Config) -> str:
    """Of what makes a run what it is; new fields of later versions leave it as it was."""
    from ngpt_jax.training.workdir import identity

    return hashlib.sha256(identity(config).encode()).hexdigest()[:12]


def read(path: Path) -> list[Row]:
    """The rows of a table, none where there is no file; raises ConfigError."""
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as f:
            lines = list(csv.DictReader(f))
        return [
            {c: kind(row[c]) if row[c] else None for c, kind in COLUMNS.items()} for row in lines
        ]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(
            f"{path} cannot be read ({type(e).__name__}: {e}); mend or delete it."
        ) from e


def point_of(row: Row) -> Point:
    return Point(row["setting"], row["model"], row["steps"], row["value"], row["seed"])


def losses_of(study: Study, rows: Sequence[Row]) -> Losses:
    """Held-out losses of the runs of a study, inf where one diverged; other rows are left out."""
    out = {}
    for row in rows:
        point = point_of(row)
        if point.setting in study.settings and point.model in study.models:
            out[point] = row["loss"] if row["status"] == "done" else math.inf
    return out


def check_rows(experiment: str, study: Study, rows: Sequence[Row], path: Path) -> None:
    """Refuses rows that were made with other settings than the study has now."""
    known = losses_of(study, rows)
    stale = [
        row for row in rows
        if point_of(row) in known and row["steps"] in study.budgets
        and row["config"] != digest(config_of(experiment, study, point_of(row)))
    ]  # fmt: skip
    if stale:
        raise ConfigError(
            f"{path}: {len(stale)} of {len(rows)} rows were made with other settings than"
            f" {experiment} has now (the first: {point_of(stale[0]).name}); delete them, or choose"
            " another --out."
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    with open(folder / ".lock", "a", encoding="utf-8") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def add(path: Path, study: Study, row: Row) -> None:
    """Adds a row, in the place that the study's order gives it."""
    with locked(path.parent):
        rows = [r for r in read(path) if point_of(r) != point_of(row)] + [row]
        names = list(study.settings), list(study.models)

        def place(row: Any) -> tuple:
            setting, model = (
                known.index(name) if name in known else len(known)
                for known, name in zip(names, (row["setting"], row["model"]))
            )
            return setting, model, row["steps"], row["value"] or 0.0, row["seed"]

        plots.write_csv(path, list(COLUMNS), sorted(rows, key=place))


def row_of(experiment: str, study: Study, point: Point, workdir: Path, diverged: bool) -> Row:
    """The row of a finished run, from its folder."""
    from ngpt_jax.model.transformer import num_params
    from ngpt_jax.training.throughput import train_flops_per_token

    resolved = config_of(experiment, study, point)
    config = config_file.config_lib.from_config_dict(
        json.loads((workdir / "config.json").read_text())
    )
    versions = json.loads((workdir / "versions.json").read_text())
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    rates = [m["train/tokens_per_second"] for m in metrics if "train/tokens_per_second" in m]
    last: dict[str, float] = {}
    for row in metrics:
        last |= row
    names = [key.rsplit("/", 1)[0] for key in last if key.startswith("eval/")]
    sets = sorted(set(names))

    def mean(metric: str) -> float | None:
        values = [last[f"{name}/{metric}"] for name in sets if f"{name}/{metric}" in last]
        return None if diverged or not values else statistics.fmean(values)

    tokens = point.steps * config.train.batch_size * config.model.context
    return {
        "setting": point.setting, "model": point.model, "steps": point.steps,
        "value": point.value, "seed": point.seed,
        "status": "diverged" if diverged else "done",
        "loss": mean("loss"), "bits_per_byte": mean("bits_per_byte"),
        "tokens": tokens, "parameters": num_params(config.model),
        "flops": tokens * train_flops_per_token(config.model),
        "seconds": round(last.get("train/seconds", 0.0), 2),
        "tokens_per_second": round(statistics.median(rates)) if rates else None,
        **{name: versions[name] for name in ("cpu", "cores", "devices", "python", "jax", "jaxlib")},
        "commit": _commit(), "data": versions["data"][:12], "config": digest(resolved),
        "command": shlex.join(
            ["python", "-m", "ngpt_jax.main", *command_of(experiment, study, point)]
        ),
    }  # fmt: skip


@functools.cache
def _commit() -> str | None:
    """Of the checkout that this code lies in, + where it was changed since."""
    here = Path(__file__).parent
    asked = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=10"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
