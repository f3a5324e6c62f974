"""A study: which runs it consists of, and which of them are due, given the results so far.

Pure functions: no files, no processes. A cell is a setting (a corpus, a context), a model and a
budget. In each cell a field, the learning rate usually, is tuned with the first seed: on the whole
ladder of values in the cells of the smallest and the largest budget, in between on the best value
of the budget below and its neighbours; and on from there until the best value has a worse one on
either side. The other seeds then run with the best value. What is due follows from results of
finished stages alone, so the order in which runs end changes nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ngpt_jax.config import ConfigError

# Fields of the config by dotted name; a function is called with the steps of the run.
Overrides = Mapping[str, Any]
MAX_WALK = 8  # rungs beyond the ladder: whoever needs more has the wrong ladder


@dataclasses.dataclass(frozen=True)
class Study:
    """What an experiment file's ``get_study()`` returns.

    Attributes:
      models: overrides by name, the first one first in tables. See :func:`grid` for sweeps.
      settings: overrides by name: corpora, contexts, sizes.
      budgets: train.steps, ascending; each run has a whole schedule of its own.
      seeds: of init and of the order of the data; the first one tunes.
      tuned: the field that is tuned; None: nothing is.
      ladders: values of ``tuned`` for each model, ascending, a constant factor apart, at least 3.
      baseline: the model whose losses the others have to reach.
      cores: CPU cores that each run is pinned to, as many runs side by side as there are cores;
        None: one run at a time, on whatever devices jax finds.
      trials: runs of the search for each model's recipe, for the report.
      title, notes: for the report.
    """

    models: Mapping[str, Overrides]
    settings: Mapping[str, Overrides]
    budgets: Sequence[int]
    seeds: Sequence[int] = (0,)
    tuned: str | None = None
    ladders: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    baseline: str | None = None
    cores: int | None = None
    trials: Mapping[str, int] = dataclasses.field(default_factory=dict)
    title: str = ""
    notes: str = ""


@dataclasses.dataclass(frozen=True)
class Point:
    """One run: a cell, a value of the tuned field (None where nothing is tuned) and a seed."""

    setting: str
    model: str
    steps: int
    value: float | None
    seed: int

    @property
    def name(self) -> str:
        value = "" if self.value is None else f"-{self.value:g}"
        return f"{self.setting}-{self.model}-{self.steps}{value}-seed{self.seed}"


Losses = Mapping[Point, float]  # held-out loss of finished runs; inf where one diverged


def grid(fields: Mapping[str, Sequence[Any]]) -> dict[str, Overrides]:
    """Models (or settings) that are all combinations of values of some fields.

    >>> list(grid({"optimizer.b2": (0.95, 0.99), "model.s_z.init": (1.0, 10.0)}))
    ['b2=0.95,s_z.init=1.0', 'b2=0.95,s_z.init=10.0', 'b2=0.99,s_z.init=1.0', 'b2=0.99,s_z.init=10.0']
    """  # noqa: E501
    out: dict[str, Overrides] = {}
    for values in itertools.product(*fields.values()):
        name = ",".join(f"{f.split('.', 1)[-1]}={v}" for f, v in zip(fields, values))
        out[name] = dict(zip(fields, values))
    return out


def check(study: Study) -> None:
    """Refuses a study that makes no sense, before any run."""

    def require(ok: bool, message: str) -> None:
        if not ok:
            raise ConfigError(f"get_study(): {message}")

    require(
        isinstance(study, Study),
        "it must return a Study of ngpt_jax.tools.study (is a return missing?).",
    )
    require(bool(study.models and study.settings), "models and settings must not be empty.")
    for name in (*study.models, *study.settings):
        plain = name.translate(str.maketrans("", "", "_=,.+-"))
        require(
            plain.isalnum(),
            f"{name!r}: a name is made of letters, digits and _ = , . + -",
        )
    for what in ("budgets", "seeds"):
        values = list(getattr(study, what))
        require(
            bool(values) and values == sorted(set(values)), f"{what} must be ascending, not empty."
        )
    require(
        study.baseline is None or study.baseline in study.models,
        f"baseline {study.baseline!r} is none of the models {', '.join(study.models)}.",
    )
    require(study.tuned is not None or not study.ladders, "ladders need a field in tuned.")
    for model in study.models if study.tuned else ():
        ladder = list(study.ladders.get(model, ()))
        factors = [b / a for a, b in itertools.pairwise(ladder) if a > 0]
        require(
            len(ladder) >= 3 and len(factors) == len(ladder) - 1 and min(factors) > 1,
            f"ladders[{model!r}] must hold three or more positive values, ascending.",
        )
        require(
            max(factors) < 1.2 * min(factors),
            f"ladders[{model!r}] must have a constant factor between values.",
        )


def overrides_of(study: Study, point: Point) -> list[tuple[str, str]]:
    """(dotted name, text) of every field that a point sets, as the command line takes them."""
    values: dict[str, Any] = {
        **study.settings[point.setting],
        **study.models[point.model],
        "train.steps": point.steps,
        "train.seed": point.seed,
        "data.seed": point.seed,
    }
    if study.tuned is not None:
        values[study.tuned] = point.value
    out = []
    for name, value in values.items():
        value = value(point.steps) if isinstance(value, Callable) else value  # type: ignore[arg-type]
        parts = value if isinstance(value, tuple | list) else (value,)
        out += [(name, repr(v) if isinstance(v, float) else str(v)) for v in parts]
    return out


def rung(ladder: Sequence[float], index: int) -> float:
    """Value number ``index`` of a ladder, which goes on at both ends by its factor."""
    if 0 <= index < len(ladder):
        return ladder[index]
    factor = (ladder[-1] / ladder[0]) ** (1 / (len(ladder) - 1))
    end, steps = (ladder[0], index) if index < 0 else (ladder[-1], index - len(ladder) + 1)
    return float(f"{end * factor**steps:.3g}")


def cells(study: Study) -> Iterator[tuple[str, str, int]]:
    """(setting, model, steps), the smallest budgets first."""
    for steps in study.budgets:
        for setting in study.settings:
            for model in study.models:
                yield setting, model, steps


def tune(
    study: Study, losses: Losses, setting: str, model: str, steps: int
) -> tuple[float | None, list[Point]]:
    """The best value of a cell, or the runs that it takes to find it.

    Returns:
      (value, []) once the best value has a worse one on either side (None where nothing is
      tuned), else (None, points that are due); both empty where the budget below comes first.
    """
    if study.tuned is None:
        return None, []
    ladder = study.ladders[model]
    budgets = list(study.budgets)
    place = budgets.index(steps)
    if place in (0, len(budgets) - 1):
        indices = set(range(len(ladder)))
    else:
        below, _ = tune(study, losses, setting, model, budgets[place - 1])
        if below is None:
            return None, []
        start = _index(ladder, below)
        indices = {start - 1, start, start + 1}
    while True:
        points = {i: Point(setting, model, steps, rung(ladder, i), study.seeds[0]) for i in indices}
        if due := [points[i] for i in sorted(points) if points[i] not in losses]:
            return None, due
        best = min(indices, key=lambda i: (losses[points[i]], i))
        if not math.isfinite(losses[points[best]]):
            best = min(indices)  # all diverged: lower values may not
        beyond = {best - 1, best + 1} - indices
        if not beyond:
            return rung(ladder, best), []
        indices |= beyond
        if min(indices) < -MAX_WALK or max(indices) >= len(ladder) + MAX_WALK:
            raise ConfigError(
                f"{setting}, {model}, {steps} steps: no best {study.tuned} within {MAX_WALK}"
                " rungs of the ladder; give another ladder in get_study()."
            )


def _index(ladder: Sequence[float], value: float) -> int:
    reach = range(-MAX_WALK - 1, len(ladder) + MAX_WALK + 1)
    return next(i for i in reach if rung(ladder, i) == value)


def due(study: Study, losses: Losses) -> list[Point]:
    """The runs that can start now, in the order in which they should, smallest budgets first."""
    out: list[Point] = []
    for setting, model, steps in cells(study):
        value, points = tune(study, losses, setting, model, steps)
        if points:
            out += points
        elif value is not None or study.tuned is None:
            out += [
                p
                for seed in study.seeds
                if (p := Point(setting, model, steps, value, seed)) not in losses
            ]
    return out


def forecast(study: Study, losses: Losses) -> list[Point]:
    """All runs still to come, if the best values of cells not yet tuned lie mid-ladder."""
    guessed = dict(losses)
    out: list[Point] = []
    while points := due(study, guessed):
        out += points
        for p in points:
            guessed[p] = 0.0
            if p.value is not None:
                ladder = study.ladders[p.model]
                away = abs(_index(ladder, p.value) - (len(ladder) - 1) / 2)
                cell = [x for q, x in losses.items() if dataclasses.replace(q, value=p.value) == p]
                guessed[p] = away + max(filter(math.isfinite, cell), default=0.0)
    return out


def chosen(study: Study, losses: Losses) -> dict[tuple[str, str, int], list[Point]]:
    """The finished runs of all seeds with the best value, for each cell that is complete."""
    out = {}
    for setting, model, steps in cells(study):
        value, points = tune(study, losses, setting, model, steps)
        if points or (value is None and study.tuned is not None):
            continue
        runs = [Point(setting, model, steps, value, seed) for seed in study.seeds]
        if all(p in losses for p in runs):
            out[setting, model, steps] = runs
    return out


def at_edge(study: Study, losses: Losses, points: Iterable[Point]) -> bool:
    """Whether the value of these runs lacks a finished neighbour on one side."""
    if study.tuned is None:
        return False
    first = next(iter(points))
    index = _index(study.ladders[first.model], first.value or 0.0)
    sides = (rung(study.ladders[first.model], index + side) for side in (-1, 1))
    return not all(
        dataclasses.replace(first, value=v, seed=study.seeds[0]) in losses for v in sides
    )
