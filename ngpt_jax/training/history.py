"""What a run's folder tells: the logged losses, as numbers and as a plot, and the run's state."""

import fcntl
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from ngpt_jax import plots
from ngpt_jax.config import ConfigError
from ngpt_jax.files import matching
from ngpt_jax.model.params import num_params
from ngpt_jax.training import workdir as workdir_lib

_STYLES = ("-", "--", ":")
Curve = list[tuple[int, float]]  # (step, loss)


class Losses(NamedTuple):
    """The losses of a run in nats per token, at increasing steps.

    Attributes:
      train: means of the steps since the point before.
      held_out: by the name of the held-out set.
    """

    train: Curve
    held_out: dict[str, Curve]

    def at_end(self) -> float | None:
        """The newest held-out loss, the mean over the sets that were evaluated then."""
        last = [curve[-1] for curve in self.held_out.values()]
        newest = [loss for step, loss in last if step == max(last)[0]]
        return sum(newest) / len(newest) if newest else None


def read_losses(workdir: epath.PathLike) -> Losses:
    """The losses in the metrics of a run's folder; rows that a crash has cut are left out."""
    rows: dict[int, dict[str, Any]] = {}
    for path in matching(epath.Path(workdir), "metrics*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
                rows[row["step"]] = rows.get(row["step"], {}) | row
            except (ValueError, LookupError, TypeError):
                continue
    losses = Losses([], {})
    for step, row in sorted(rows.items()):
        if "train/loss" in row:
            losses.train.append((step, row["train/loss"]))
        for name, value in row.items():
            if name.startswith("eval/") and name.endswith("/loss"):
                losses.held_out.setdefault(name[len("eval/") : -len("/loss")], []).append(
                    (step, value)
                )
    return losses


def plot_losses(runs: dict[str, Losses], path: epath.Path) -> None:
    """Draws the losses of runs, one colour each, as a PNG, with the numbers beside it as CSV.

    Args:
      runs: by their names.
      path: of the PNG.
    """
    fig, (axis,) = plots.figure(width=6, height=4)
    table: list[dict[str, Any]] = []
    looks = plots.looks(runs)
    for name, losses in runs.items():
        color, marker = looks[name]
        start = f"{name}, " if len(runs) > 1 else ""
        dot = marker if len(losses.train) == 1 else ""  # a line of one point is invisible
        axis.plot(*_columns(losses.train), dot, color=color, alpha=0.45, label=f"{start}training")
        for style, (held_out, curve) in zip(itertools.cycle(_STYLES), losses.held_out.items()):
            label = f"{start}{held_out_title(held_out)}"
            axis.plot(*_columns(curve), color=color, marker=marker, linestyle=style, label=label)
        for kind, curve in {"training": losses.train, **losses.held_out}.items():
            table += [{"run": name, "set": kind, "step": s, "loss": loss} for s, loss in curve]
    curves = [curve for losses in runs.values() for curve in losses.held_out.values()]
    curves += [losses.train[len(losses.train) // 10 :] for losses in runs.values()]
    ends = [loss for curve in curves for _, loss in curve]
    if ends:  # the first steps would squeeze the rest
        low, high = min(ends), max(ends)
        axis.set_ylim(low - 0.08 * (high - low), high + 0.15 * (high - low) + 1e-3)
    axis.set(xlabel="step", ylabel="loss, nats per token")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.legend()
    plots.save(fig, path)
    plots.write_csv(path.with_suffix(".csv"), ["run", "set", "step", "loss"], table)


def held_out_title(name: str) -> str:
    """A held-out set for people; "held_out" is the share of a text that is held out."""
    return "held-out text" if name == "held_out" else f"held-out {name}"


def _columns(curve: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [loss for _, loss in curve]


class RunFacts(NamedTuple):
    """A run's folder in a line; ``state`` is running, finished, stopped or not readable."""

    folder: str
    kind: str
    parameters: str
    step: str
    held_out: str
    state: str


def list_runs(folder: str) -> Iterator[RunFacts]:
    """The runs in a folder, however deep; raises ConfigError where there is no such folder."""
    if not Path(folder).is_dir():
        raise ConfigError(f"no folder {folder!r}; give one that holds runs.")
    for file in sorted(Path(folder).rglob("config.json")):
        if (file.parent / "checkpoints").is_dir():
            yield _facts(file.parent)


def _facts(folder: Path) -> RunFacts:
    try:
        config = workdir_lib.read_config(str(folder), epath.Path(folder))
    except ConfigError:
        return RunFacts(str(folder), "-", "-", "-", "-", "not readable")
    losses = read_losses(folder)
    saved = [int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]
    logged = [step for curve in (losses.train, *losses.held_out.values()) for step, _ in curve[-1:]]
    step, loss, steps = max([0, *saved, *logged]), losses.at_end(), config.train.steps
    # A row may be of steps that were not saved, which are made again.
    evaluated = any(curve[-1][0] == steps for curve in losses.held_out.values())
    finished = evaluated and steps in saved
    return RunFacts(
        folder=str(folder),
        kind=config.model.kind,
        parameters=f"{num_params(config.model):,}",
        step=f"{step:,} of {steps:,}",
        held_out="-" if loss is None else f"{loss:.4f}",
        state=_state(folder, finished),
    )


def _state(folder: Path, finished: bool) -> str:
    try:
        with open(folder / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go again when it is closed
    except BlockingIOError:
        return "running"
    except OSError:  # no lock
        pass
    return "finished" if finished else "stopped"
