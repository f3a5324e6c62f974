"""The table of a study's finished runs: a CSV file to which several programs may add."""

import csv
import json
import math
import re
import shlex
import statistics
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ngpt_jax import config as config_lib
from ngpt_jax import plots
from ngpt_jax.config import Config, ConfigError
from ngpt_jax.config.experiment import call_in_file, file_and_variants, load_config, run_name
from ngpt_jax.config.presets import value_of_kind
from ngpt_jax.files import digest_of, lock, reason
from ngpt_jax.study.plan import Losses, Point, Study, check, chosen, overrides_of

Result = dict[str, Any]  # one run: a line of the table

# Each column with its type.
COLUMNS: dict[str, type] = {
    "setting": str, "model": str, "steps": int, "value": float, "seed": int,
    "status": str,  # done or diverged
    "loss": float,  # held-out nats per token, mean over the held-out sets
    "loss_by_set": str,  # of each held-out set: NAME=LOSS with spaces between
    "bits_per_byte": float,
    "tokens": int, "parameters": int, "flops": float,
    "seconds": float,  # of training, without evaluation and compilation
    "other_seconds": float,  # start, compilation, evaluation, saving; none where it was stopped
    "tokens_per_second": float,  # median over the run's intervals
    "cpu": str, "cores": int, "devices": str, "python": str, "jax": str, "jaxlib": str,
    "commit": str,  # of the code, with + where it was changed since
    "data": str, "held_out": str,  # fingerprints of the training and the held-out tokens
    "config": str,  # digest of what decides about the loss
    "command": str,
}  # fmt: skip
# The columns that say on what a run was made.
MACHINE = ("cpu", "cores", "devices", "python", "jax", "jaxlib")
LOCK = ".lock"  # of a study's folder, in which several programs may write
_LATER = {"other_seconds", "loss_by_set"}  # older tables lack it
_NEEDED = (
    "setting", "model", "steps", "seed", "status", "tokens", "parameters", "flops", "seconds",
    "config",
)  # fmt: skip


def load_study(spec: str) -> Study:
    """The study that get_study(variants) of FILE[:variant,...] returns; raises ConfigError."""
    study = call_in_file("experiment", spec, "get_study")
    check(study)
    return study


def default_folder(experiment: str) -> Path:
    """The folder of the results of FILE[:variant,...]: FILE-variant, beside the file.

    In the current folder for an experiment that was installed with the package.
    """
    path, _ = file_and_variants(experiment)
    installed = Path(path).resolve().is_relative_to(Path(__file__).parents[1])
    folder = Path() if installed else Path(path).parent
    return folder / run_name(experiment)


def command_of(experiment: str, study: Study, point: Point) -> list[str]:
    """Arguments of ``python -m ngpt_jax.main`` for a point, without its workdir."""
    flags = [f"--config.{name}={text}" for name, text in overrides_of(study, point)]
    return [f"--config={experiment}", *flags]


def config_of(experiment: str, study: Study, point: Point) -> Config:
    return load_config(experiment, overrides_of(study, point))


def digest(config: Config) -> str:
    """A digest of the fields that can change the loss and are not at their default.

    A table stays good when later versions have new fields: these are at their default, or at the
    value that the kind's preset gives. Fingerprints tell the text apart, not its path.
    """
    lines = []
    for field, default, value in config_lib.differences(Config(), config):
        if field.digest_default is not None:
            default = field.digest_default
        elif not field.always_in_digest:
            default = value_of_kind(config, field.name, default)
        if field.effect.loss and value != default:
            lines.append(f"{field.name}: {default!r} -> {value!r}")
    return digest_of(lines)[:12]


def read(path: Path) -> list[Result]:
    """The rows of a table, none where the file does not exist; raises ConfigError."""
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as f:
            reader = csv.DictReader(f, strict=True)
            names = reader.fieldnames or ()
            if missing := set(COLUMNS) - _LATER - set(names):
                raise ValueError(f"no column {min(missing)}")
            if set(names) - set(COLUMNS) or len(set(names)) < len(names):
                raise ValueError("columns that are not known, or are there twice")
            rows = [_parse(line, reader.line_num) for line in reader]
        points = Counter(map(point_of, rows))
        if twice := [point.name for point, count in points.items() if count > 1]:
            raise ValueError(f"two rows of {twice[0]}")
        return rows
    except (OSError, ValueError, csv.Error) as e:
        raise ConfigError(f"{path} cannot be read: {reason(e)}; mend it.") from e


def _parse(line: dict[str, str], number: int) -> Result:
    """A row from line ``number`` of a table; raises ValueError."""
    row: Result = {}
    for name, kind in COLUMNS.items():
        try:
            row[name] = kind(text) if (text := line.get(name)) else None
        except ValueError as e:
            raise ValueError(f"line {number}, column {name}: {e}") from e

    def require(ok: bool, name: str) -> None:
        if not ok:
            raise ValueError(f"line {number}, column {name}: {line.get(name)!r} cannot be")

    for name in _NEEDED:
        require(row[name] is not None, name)
    if None in line:
        raise ValueError(f"line {number} has more cells than the first line")
    require(row["status"] in ("done", "diverged"), "status")
    has_loss = row["loss"] is not None
    require(has_loss == (row["status"] == "done"), "loss")
    require(not has_loss or 0 <= row["loss"] < math.inf, "loss")
    for name in ("steps", "tokens", "parameters", "flops"):
        require(0 < row[name] < math.inf, name)
    require(0 <= row["seconds"] < math.inf, "seconds")
    require(math.isfinite(row["other_seconds"] or 0.0), "other_seconds")
    require(row["value"] is None or 0 < row["value"] < math.inf, "value")
    return row


def point_of(row: Result) -> Point:
    return Point(*(row[name] for name in Point._fields))


def losses_of(study: Study, rows: Sequence[Result]) -> Losses:
    """Held-out losses of a study's runs, inf for those that diverged; other rows are left out."""
    out = {}
    for row in rows:
        point = point_of(row)
        if point.setting in study.settings and point.model in study.models:
            out[point] = row["loss"] if row["status"] == "done" else math.inf
    return out


def in_study(study: Study, rows: Sequence[Result]) -> list[Result]:
    """The rows whose points belong to a study, whatever the value of the tuned field."""
    return [
        row for row in rows
        if row["setting"] in study.settings and row["model"] in study.models
        and row["steps"] in study.budgets and row["seed"] in study.seeds
        and (row["value"] is None) == (study.tuned is None)
    ]  # fmt: skip


def check_rows(experiment: str, study: Study, rows: Sequence[Result], path: Path) -> None:
    """Raises ConfigError for rows of other settings than the study has now, or of other text."""
    rows = in_study(study, rows)
    stale = [r for r in rows if r["config"] != digest(config_of(experiment, study, point_of(r)))]
    if stale:
        raise ConfigError(
            f"{path}: {len(stale)} of {len(rows)} rows were made with other settings than"
            f" {experiment} has now (the first: {point_of(stale[0]).name}); delete them and their"
            f" folders in {path.parent / 'runs'}, or choose another --out."
        )
    for setting in study.settings:
        for what in ("data", "held_out"):
            found = {r[what] for r in rows if r["setting"] == setting}
            if len(found) > 1:
                raise ConfigError(
                    f"{path}: rows of {setting} come from different text (column {what}: "
                    f"{', '.join(sorted(map(str, found)))}); delete those of the other text, and"
                    f" their folders in {path.parent / 'runs'}."
                )


def _check_same_text(study: Study, rows: Sequence[Result], new: Result, path: Path) -> None:
    """Refuses a new row of another text than those of its setting that the study has."""
    for old in in_study(study, rows):
        if old["setting"] == new["setting"] and any(old[x] != new[x] for x in ("data", "held_out")):
            name = point_of(new).name
            raise ConfigError(
                f"{name} read another text than {point_of(old).name} (Python {new['python']} here,"
                f" {old['python']} there); delete {path.parent / 'runs' / name}, and go on with"
                " that text, or choose another --out."
            )


def spread_of(study: Study, rows: Sequence[Result], point: Point) -> float | None:
    """Largest less smallest loss over the seeds of a point's cell at its best value.

    The point itself is left out, as its loss is in question. None where less than two are left.
    """
    losses = losses_of(study, rows)
    cell = chosen(study, losses).get((point.setting, point.model, point.steps), [])
    found = [x for p in cell if p != point and math.isfinite(x := losses[p])]
    return max(found) - min(found) if len(found) > 1 else None


def add(path: Path, study: Study, row: Result) -> None:
    """Adds a row in the study's order; it replaces an older row of the same point.

    Raises ConfigError for one of another text than the other rows of its setting.
    """
    with lock(path.parent / LOCK):
        others = [r for r in read(path) if point_of(r) != point_of(row)]
        _check_same_text(study, others, row, path)
        rows = [*others, row]
        names = list(study.settings), list(study.models)

        def place(row: Any) -> tuple:
            setting, model = (
                known.index(name) if name in known else len(known)
                for known, name in zip(names, (row["setting"], row["model"]))
            )
            return setting, model, row["steps"], row["value"] or 0.0, row["seed"]

        plots.write_csv(path, list(COLUMNS), sorted(rows, key=place))


def origin_of(experiment: str, study: Study, point: Point) -> Result:
    """The columns that are noted at the start of a run, as files may change while it runs."""
    config = digest(config_of(experiment, study, point))
    return {"config": config, "commit": _commit(file_and_variants(experiment)[0])}


def _commit(experiment: str) -> str | None:
    """The commit of this code, with + where it or the experiment was changed since.

    The experiment is its file, and what it imports from beside it; outside of the clone it does not
    count. None where the code is not that of a clone.
    """
    package, file = Path(__file__).parent.parent, Path(experiment).resolve()
    text = file.read_text(encoding="utf-8")
    imported = re.findall(r"^(?:from|import) (\w+)", text, re.M)
    beside = [p for p in file.parent.glob("*.py") if p.stem in imported]
    own = [p for p in (file, *beside) if p.is_relative_to(package.parent)]

    def git(*arguments: str | Path) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else the clone of another project
        changed = git("status", "--porcelain", "--", ".", *own)
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def row_of(
    experiment: str,
    study: Study,
    point: Point,
    workdir: Path,
    diverged: bool,
    origins: Sequence[Result],
) -> Result:
    """The row of a finished run, from its folder.

    A run whose held-out loss is not finite counts as diverged.

    Args:
      experiment, study, point: the run.
      workdir: its folder.
      diverged: whether it ended as such.
      origins: of each start what :func:`origin_of` returns, the last one last; of the earlier ones
        also the columns of MACHINE. Where they differ, the row has all: "a then b".
    """
    from ngpt_jax.model.params import num_params
    from ngpt_jax.training.throughput import train_flops_per_token

    text = (workdir / "config.json").read_text(encoding="utf-8")
    config = config_lib.from_saved(text)
    versions = json.loads((workdir / "versions.json").read_text(encoding="utf-8"))
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rates = [m["train/tokens_per_second"] for m in metrics if "train/tokens_per_second" in m]
    last: dict[str, float] = {name: x for row in metrics for name, x in row.items()}
    final = metrics[-1] if metrics else {}  # the last evaluation is the last row
    sets = {key.rsplit("/", 1)[0] for key in last if key.startswith("eval/")}
    diverged = diverged or not sets or not all(f"{name}/loss" in final for name in sets)

    def mean(metric: str) -> float | None:
        values = [final[f"{name}/{metric}"] for name in sorted(sets) if f"{name}/{metric}" in final]
        return None if diverged or not values else statistics.fmean(values)

    by_set = [f"{name[5:]}={final[f'{name}/loss']}" for name in sorted(sets) if not diverged]
    command = shlex.join(["python", "-m", "ngpt_jax.main", *command_of(experiment, study, point)])
    tokens = point.steps * config.train.batch_size * config.model.context
    starts = [*origins[:-1], {name: versions[name] for name in MACHINE} | origins[-1]]

    def all_of(name: str) -> Any:
        found = [s.get(name, "unknown") for s in starts]
        return found[-1] if len(set(found)) == 1 else " then ".join(map(str, dict.fromkeys(found)))

    return {
        **point._asdict(), "status": "diverged" if diverged else "done",
        "loss": mean("loss"), "loss_by_set": " ".join(by_set),
        "bits_per_byte": mean("bits_per_byte"),
        "tokens": tokens, "parameters": num_params(config.model),
        "flops": tokens * train_flops_per_token(config.model),
        "seconds": round(last.get("train/seconds", 0.0), 2),
        "tokens_per_second": round(statistics.median(rates)) if rates else None,
        **{name: all_of(name) for name in (*MACHINE, "commit")}, "cores": versions["cores"],
        "config": origins[-1]["config"], "command": command,
        "data": versions["data"][:12], "held_out": versions["held_out"][:12],
    }  # fmt: skip
