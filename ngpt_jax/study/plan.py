"""A study: the runs of which it consists, and those that are due, given the results so far.

Pure functions: no files, no processes. A cell is a setting (a corpus, a context), a model and a
budget. In each cell a field, usually the learning rate, is tuned with the first seed. Cells of the
smallest and the largest budget try the whole ladder of values; the others start from the best value
of the next smaller budget and its two neighbours. Tuning goes on until the best value has a worse
one on either side. Then the other seeds run with the best value. The runs that are due follow from
complete stages alone, so the order in which runs end changes nothing.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from ngpt_jax.config import ConfigError
from ngpt_jax.config.convert import field_named
from ngpt_jax.config.facts import check_seed

# Fields of the config by dotted name.
Overrides = Mapping[str, Any]
MAX_WALK = 8  # rungs beyond the ladder; a study that needs more has the wrong ladder


@dataclasses.dataclass(frozen=True)
class Study:
    """What an experiment file's ``get_study()`` returns.

    Attributes:
      models: overrides by name, in the order of the tables. See :func:`grid` for sweeps.
      settings: overrides by name: corpora, contexts, sizes.
      recipes: further overrides by setting and model, for what a model needs in one setting only.
      budgets: values of train.steps, ascending; each run has its own full schedule.
      seeds: of the initial weights and of the order of the data; the first one is for tuning.
      tuned: the field that is tuned; None: no field.
      ladders: values of ``tuned`` for each model, ascending, a constant factor apart, at least 3.
      near: so many values on either side of the best run with all seeds too, to tell where the
        optimum lies.
      baseline: the model that the others are compared with, or that of each model by name.
      cores: CPU cores that each run is pinned to; as many runs go side by side as cores allow.
        None: one run at a time, on the devices that jax finds.
      trials: how many runs the search for each model's recipe took, for the report.
      title, notes: for the report.
    """

    models: Mapping[str, Overrides]
    settings: Mapping[str, Overrides]
    budgets: Sequence[int]
    seeds: Sequence[int] = (0,)
    recipes: Mapping[str, Mapping[str, Overrides]] = dataclasses.field(default_factory=dict)
    tuned: str | None = None
    ladders: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    near: int = 0
    baseline: str | Mapping[str, str] | None = None
    cores: int | None = None
    trials: Mapping[str, int] = dataclasses.field(default_factory=dict)
    title: str = ""
    notes: str = ""


class Point(NamedTuple):
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


Cell = tuple[str, str, int]  # setting, model, steps
Losses = Mapping[Point, float]  # held-out loss of finished runs; inf where one diverged


class OffLadder(ConfigError):
    """A cell whose best value was not found within MAX_WALK rungs of its ladder.

    Nor, of course, among values that the field does not take.
    """


def grid(fields: Mapping[str, Sequence[Any]]) -> dict[str, Overrides]:
    """Models (or settings): all combinations of values of some fields.

    Raises ConfigError where two have the same name.

    >>> list(grid({"optimizer.b2": (0.95, 0.99), "model.s_z.init": (1.0, 10.0)}))[:2]
    ['b2=0.95,s_z.init=1.0', 'b2=0.95,s_z.init=10.0']
    """
    out: dict[str, Overrides] = {}
    for values in itertools.product(*fields.values()):
        name = ",".join(f"{f.split('.', 1)[-1]}={v}" for f, v in zip(fields, values))
        name = re.sub(_NOT_IN_NAMES, "_", name)
        if name in out:
            raise ConfigError(f"grid(): two of its models are called {name!r}.")
        out[name] = dict(zip(fields, values))
    return out


_NOT_IN_NAMES = r"[^\w=,.+-]"
_TYPES = {
    Mapping: "a dict", Sequence: "a tuple", str: "text", int: "a whole number", type(None): "None",
}  # fmt: skip


def _kinds(hint: Any) -> tuple[type, ...]:
    """The types of an attribute of Study: (Mapping,) for Mapping[str, int]."""
    parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return tuple(get_origin(part) or part for part in parts)


@functools.cache
def _takes(name: str) -> Callable[[float], bool]:
    """Whether the field with this name takes a value."""
    field = field_named(name)
    return field.allowed.holds if field else lambda value: True


def check(study: Study) -> None:
    """Raises ConfigError for a study that makes no sense."""

    def require(ok: bool, message: str) -> None:
        if not ok:
            raise ConfigError(f"get_study(): {message}")

    require(
        isinstance(study, Study),
        "it must return a Study of ngpt_jax.study.plan (is a return missing?).",
    )
    for what, hint in get_type_hints(Study).items():
        value, kinds = getattr(study, what), _kinds(hint)
        wanted = " or ".join(_TYPES[kind] for kind in kinds)
        require(isinstance(value, kinds), f"{what} must be {wanted}, not {value!r}.")
    for what in ("models", "settings"):
        arms = getattr(study, what)
        require(len(arms) > 0, f"{what} must be a dict, not empty.")
        for name in arms:
            good = isinstance(name, str) and bool(name) and not re.search(_NOT_IN_NAMES, name)
            require(good, f"{name!r}: a name is made of letters, digits and _ = , . + -")
    overrides = {f"models[{m!r}]": fields for m, fields in study.models.items()}
    overrides |= {f"settings[{s!r}]": fields for s, fields in study.settings.items()}
    for setting, models in study.recipes.items():
        require(setting in study.settings, f"recipes: there is no setting {setting!r}.")
        require(isinstance(models, Mapping), f"recipes[{setting!r}] must be a dict of models.")
        for model, fields in models.items():
            require(model in study.models, f"recipes[{setting!r}]: there is no model {model!r}.")
            overrides[f"recipes[{setting!r}][{model!r}]"] = fields
    for what, fields in overrides.items():
        require(isinstance(fields, Mapping), f"{what} must be a dict of fields.")
        for field, value in fields.items():
            known = field_named(str(field))
            require(known is not None, f"{what}: unknown field {field!r}.")
            own = field == study.tuned or (known is not None and known.set_by_study)
            require(not own, f"{what}: {field} is set by the study itself.")
            require(value != () and value != [], f"{what}: {field} is empty.")
    names = [f"{s}-{m}" for s in study.settings for m in study.models]
    require(len(set(names)) == len(names), "names of settings and models run into each other.")
    for what, least in (("budgets", 1), ("seeds", 0)):
        values = getattr(study, what)
        good = len(values) > 0 and all(isinstance(x, int) and x >= least for x in values)
        good = good and list(values) == sorted(set(values))
        message = f"{what} must be one or more whole numbers from {least} on, ascending"
        require(good, f"{message}, not {values!r}.")
    for seed in study.seeds:
        check_seed("seeds: each", seed)
    for pair in baselines(study).items():
        for name in pair:
            none = f"{name!r} is none of the models {', '.join(study.models)}."
            require(isinstance(name, str) and name in study.models, f"baseline {none}")
        require(pair[0] != pair[1], f"baseline: {pair[0]!r} is its own.")
    require(study.cores is None or study.cores > 0, "cores must be positive, or None.")
    require(study.tuned is not None or not study.ladders, "ladders need a field in tuned.")
    require(0 <= study.near <= MAX_WALK, f"near must be 0 to {MAX_WALK}, not {study.near}.")
    require(study.tuned is not None or not study.near, "near needs a field in tuned.")
    if study.tuned is None:
        return
    tuned = field_named(study.tuned)
    require(
        tuned is not None and tuned.type in (float, float | None),
        f"tuned must name a field that is a float, not {study.tuned!r}; sweep others with grid().",
    )
    for model in {**study.models, **study.ladders}:
        require(model in study.models, f"ladders: there is no model {model!r}.")
        ladder = study.ladders.get(model, ())
        require(isinstance(ladder, tuple | list), f"ladders[{model!r}] must be a tuple.")
        positive = all(isinstance(x, int | float) and x > 0 for x in ladder)
        factors = [b / a for a, b in itertools.pairwise(ladder)] if positive else []
        name = f"ladders[{model!r}]"
        good = len(ladder) >= 3 and bool(factors) and min(factors) > 1
        require(good, f"{name} must hold three or more positive values, ascending.")
        require(min(factors) >= 1.02, f"{name}: values must lie 2 % apart or more.")
        good = max(factors) < 1.2 * min(factors)
        require(good, f"{name} must have a constant factor between values.")


def baselines(study: Study) -> dict[str, str]:
    """The baseline of each model that has one."""
    if isinstance(study.baseline, Mapping):
        return dict(study.baseline)
    base = study.baseline
    return {} if base is None else {m: base for m in study.models if m != base}


def overrides_of(study: Study, point: Point) -> list[tuple[str, str]]:
    """(dotted name, text) of every field that a point sets, as on a command line."""
    values: dict[str, Any] = {
        **study.settings[point.setting],
        **study.models[point.model],
        **study.recipes.get(point.setting, {}).get(point.model, {}),
        "train.steps": point.steps,
        "train.seed": point.seed,
        "data.seed": point.seed,
    }
    if study.tuned is not None:
        values[study.tuned] = point.value
    out = []
    for name, value in values.items():
        parts = value if isinstance(value, tuple | list) else (value,)
        out += [(name, repr(float(v)) if isinstance(v, float) else str(v)) for v in parts]
    return out


def rung(ladder: Sequence[float], index: int) -> float:
    """Value number ``index`` of a ladder, which is extended at both ends by its factor."""
    if 0 <= index < len(ladder):
        return float(ladder[index])
    factor = (ladder[-1] / ladder[0]) ** (1 / (len(ladder) - 1))
    end, steps = (ladder[0], index) if index < 0 else (ladder[-1], index - len(ladder) + 1)
    return float(f"{end * factor**steps:.3g}")


def cells(study: Study) -> list[Cell]:
    """All cells, the smallest budgets first."""
    places = itertools.product(study.budgets, study.settings, study.models)
    return [(setting, model, steps) for steps, setting, model in places]


def tune(
    study: Study, losses: Losses, setting: str, model: str, steps: int
) -> tuple[float | None, list[Point]]:
    """The best value of a cell, or the runs that are needed next to find it.

    Returns:
      (value, []) once the best value has a worse one on either side, with None for a study that
      tunes no field. Else (None, points that are due), none where the next smaller budget has to be
      tuned first. Raises OffLadder.
    """
    if study.tuned is None:
        return None, []
    ladder = study.ladders[model]
    where = f"{setting}, {model}, {steps} steps"
    budgets = list(study.budgets)
    place = budgets.index(steps)
    if place in (0, len(budgets) - 1):
        indices = set(range(len(ladder)))
    else:
        smaller = budgets[place - 1]
        try:
            below, _ = tune(study, losses, setting, model, smaller)
        except OffLadder as e:
            raise OffLadder(f"{where}: not tuned, as {smaller} steps are not.") from e
        if below is None:
            return None, []
        start = _index(study, model, below)
        indices = {start - 1, start, start + 1}
    while True:
        points = {i: Point(setting, model, steps, rung(ladder, i), study.seeds[0]) for i in indices}
        if due := [points[i] for i in sorted(points) if points[i] not in losses]:
            return None, due
        best = min(indices, key=lambda i: (losses[points[i]], i))
        if not math.isfinite(losses[points[best]]):
            best = min(indices)  # all diverged: a lower value may not
        beyond = {best - 1, best + 1} - indices
        if not beyond:
            return rung(ladder, best), []
        indices |= beyond
        if min(indices) < -MAX_WALK or max(indices) >= len(ladder) + MAX_WALK:
            raise OffLadder(
                f"{where}: no best {study.tuned} within {MAX_WALK} rungs of the ladder, or all runs"
                " diverged; give another ladder or recipe."
            )
        if outside := [x for i in beyond if not _takes(study.tuned)(x := rung(ladder, i))]:
            raise OffLadder(
                f"{where}: the best {study.tuned} is {rung(ladder, best):g}, beside values that it"
                f" does not take ({outside[0]:g}); give another ladder."
            )


def _index(study: Study, model: str, value: float) -> int:
    ladder, far = study.ladders[model], MAX_WALK + study.near + 1
    return next(i for i in range(-far, len(ladder) + far) if rung(ladder, i) == value)


def _tuned_cells(study: Study, losses: Losses) -> Iterator[tuple[Cell, float | None, list[Point]]]:
    """(cell, best value, points due to find it) of the cells that have one or the other."""
    for cell in cells(study):
        try:
            value, points = tune(study, losses, *cell)
        except OffLadder:
            continue
        if points or value is not None or study.tuned is None:
            yield cell, value, points


def given_up(study: Study, losses: Losses) -> list[str]:
    """A line for each cell whose best value cannot be found."""
    lines = []
    for cell in cells(study):
        try:
            tune(study, losses, *cell)
        except OffLadder as e:
            lines.append(str(e))
    return list(dict.fromkeys(lines))


def due(study: Study, losses: Losses) -> list[Point]:
    """The runs that can start now, in the order to start them: smallest budgets first."""
    out: list[Point] = []
    for cell, value, points in _tuned_cells(study, losses):
        seeds = [] if points else around(study, cell, value)
        out += points + [p for p in seeds if p not in losses]
    return out


def around(study: Study, cell: Cell, value: float | None) -> list[Point]:
    """The runs of all seeds with the best value of a cell, and with ``near`` values beside it."""
    values = [value]
    if value is not None and study.near:
        ladder = study.ladders[cell[1]]
        index = _index(study, cell[1], value)
        values = [rung(ladder, index + i) for i in range(-study.near, study.near + 1)]
    return [Point(*cell, v, seed) for v in values for seed in study.seeds]


def forecast(study: Study, losses: Losses) -> list[Point]:
    """All runs still to come, on the guess that best values lie in the middle of the ladder."""
    guessed = dict(losses)
    out: list[Point] = []
    while points := due(study, guessed):
        out += points
        for p in points:
            guessed[p] = 0.0
            if p.value is not None:
                ladder = study.ladders[p.model]
                away = abs(_index(study, p.model, p.value) - (len(ladder) - 1) / 2)
                cell = [x for q, x in losses.items() if q._replace(value=p.value) == p]
                guessed[p] = away + max(filter(math.isfinite, cell), default=0.0)
    return out


def chosen(study: Study, losses: Losses) -> dict[Cell, list[Point]]:
    """The finished runs of all seeds with the best value, by cell; complete cells alone."""
    out = {}
    for cell, value, points in _tuned_cells(study, losses):
        runs = [Point(*cell, value, seed) for seed in study.seeds]
        if not points and all(p in losses for p in runs):
            out[cell] = runs
    return out


def neighbours(study: Study, losses: Losses, point: Point) -> tuple[float | None, float | None]:
    """Losses of the first seed at the next smaller and the next larger value of the ladder."""
    if point.value is None:
        return None, None
    ladder, tuning = study.ladders[point.model], point._replace(seed=study.seeds[0])
    index = _index(study, point.model, point.value)
    below, above = rung(ladder, index - 1), rung(ladder, index + 1)
    return losses.get(tuning._replace(value=below)), losses.get(tuning._replace(value=above))
