"""The results of a study in short: its cells, its speed-ups, the machines of its runs."""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import PchipInterpolator

from ngpt_jax.study import plan, results
from ngpt_jax.study.plan import Study
from ngpt_jax.study.results import Result

# A line of cells.csv. It also has the "losses" of the seeds, the machine it was "timed_on", and
# the "seconds_spread": by how much of the median the middle half of step times differs there.
CellRow = dict[str, Any]
SpeedUpRow = dict[str, Any]  # a line of speedup.csv
CELL_COLUMNS = (
    "setting model steps value seeds diverged loss loss_min loss_max loss_std loss_first_seed"
    " loss_at_value_below loss_at_value_above bits_per_byte tokens tokens_per_parameter flops"
    " seconds tokens_per_second"
).split()
OptimumRow = dict[str, Any]  # a line of optima.csv
OPTIMUM_COLUMNS = (
    "setting model steps best optimum optimum_low optimum_high shift shift_low shift_high"
).split()
SPEEDUP_COLUMNS = "setting model baseline steps cost bound speed_up low high".split()


def cells_of(
    study: Study, rows: Sequence[Result], timed: Sequence[Result] | None = None
) -> list[CellRow]:
    """A line for each complete cell: mean and spread over its seeds at the best value.

    ``loss`` is inf where a seed diverged. ``seconds`` are steps times the median seconds a step of
    all finished runs of that model with the same FLOPs a step, whatever the text, as a single run
    depends on how busy the machine was. Those on one machine count (``timed_on``): that which made
    most of the runs with these FLOPs a step, of any model, among those that this model has runs on.

    Args:
      study: what was asked for.
      rows: the results of its runs.
      timed: the runs whose time counts, if not ``rows``: those of several studies, for example.
    """
    losses = results.losses_of(study, rows)
    by_point = {results.point_of(row): row for row in rows}
    paces = _paces(rows if timed is None else timed)
    out = []
    for (setting, model, steps), points in plan.chosen(study, losses).items():
        runs = [by_point[p] for p in points]
        found = [losses[p] for p in points]
        bits = [r["bits_per_byte"] for r in runs if r["bits_per_byte"] is not None]
        below, above = plan.neighbours(study, losses, points[0])
        machine, pace, spread = paces.get(_shape(runs[0]), (None, 0.0, 0.0))
        seconds = steps * pace
        finite = max(found) < math.inf
        out.append({
            "setting": setting, "model": model, "steps": steps, "value": points[0].value,
            "seeds": len(runs), "diverged": sum(x == math.inf for x in found),
            "loss": statistics.fmean(found), "loss_min": min(found), "loss_max": max(found),
            "loss_std": statistics.stdev(found) if finite and len(found) > 1 else None,
            "loss_first_seed": found[0], "loss_at_value_below": below,
            "loss_at_value_above": above,
            "bits_per_byte": statistics.fmean(bits) if bits else None,
            "tokens": runs[0]["tokens"],
            "tokens_per_parameter": runs[0]["tokens"] / runs[0]["parameters"],
            "flops": runs[0]["flops"],
            "seconds": seconds,
            "tokens_per_second": runs[0]["tokens"] / seconds if seconds else 0.0,
            "losses": found, "timed_on": machine, "seconds_spread": spread,
        })  # fmt: skip
    order = list(study.settings), list(study.models)
    return sorted(
        out, key=lambda c: (order[0].index(c["setting"]), order[1].index(c["model"]), c["steps"])
    )


Shape = tuple[str, int]  # model, FLOPs a step
Machine = tuple[str, int, str]  # CPU, cores, devices


def _shape(row: Result) -> Shape:
    return row["model"], round(row["flops"] / row["steps"])


def _paces(rows: Sequence[Result]) -> dict[Shape, tuple[Machine, float, float]]:
    """By shape: a machine, the median seconds a step there, and their relative spread."""
    paces: dict[Shape, dict[Machine, list[float]]] = {}
    runs: Counter[tuple[int, Machine]] = Counter()
    for r in rows:
        if r["seconds"] and r["status"] == "done":  # one that diverged was cut short
            shape, machine = _shape(r), (r["cpu"], r["cores"], r["devices"])
            paces.setdefault(shape, {}).setdefault(machine, []).append(r["seconds"] / r["steps"])
            runs[shape[1], machine] += 1
    out = {}
    for shape, of_machine in paces.items():
        machine = max(of_machine, key=lambda m: (runs[shape[1], m], repr(m)))
        pace = statistics.median(of_machine[machine])
        low, high = np.quantile(of_machine[machine], (0.25, 0.75)).tolist()
        out[shape] = machine, pace, (high - low) / pace
    return out


def curve_of(cells: Sequence[CellRow], setting: str, model: str) -> list[CellRow]:
    """The cells of one setting and model in which no seed diverged, budgets ascending."""
    mine = (c for c in cells if (c["setting"], c["model"]) == (setting, model))
    return [c for c in mine if c["loss"] < math.inf]


class Runs(NamedTuple):
    """The runs of one budget: what each cost (steps, FLOPs or seconds), and their losses."""

    cost: float
    losses: Sequence[float]  # one a seed


Curve = Mapping[int, Runs]  # of one model by budget, ascending


class SpeedUp(NamedTuple):
    """How many times less a model needs.

    Attributes:
      value: the factor.
      bound: ">" or "<" where no curve covers the other model's loss, else "".
      low, high: the ends of the interval, within what the curve covers; None for a single seed.
    """

    value: float
    bound: str
    low: float | None
    high: float | None


_STRAIGHT = 0.4  # of exponents from 0 (log) to 0.6, the one with the least bias on measured curves


def cost_at(costs: ArrayLike, losses: ArrayLike, loss: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The cost at which a loss is reached, on a monotone cubic (PCHIP) through the points.

    Against cost**-0.4 measured losses lie nearly on a line. Against log cost they bend: two budgets
    a factor of four apart would ask 16 % too much between them, and the end of a curve would be
    too flat. Curves, N of them, are computed at once.

    Args:
      costs: (points,), ascending.
      losses: (points, N) at those costs, finite.
      loss: (N,), the one to reach.

    Returns:
      (cost, bound), each (N,): the smallest such cost, and 0; or the first cost and 1 where the
      first point is already below the loss, so that less would do; or the last cost and -1 where
      no point reaches it.
    """
    at = np.asarray(costs, np.float64)
    x = -((at / at[0]) ** -_STRAIGHT)
    y, target = np.asarray(losses, np.float64), np.asarray(loss, np.float64)
    reached = y <= target
    point = np.where(reached.any(axis=0), reached.argmax(axis=0), len(x) - 1)
    bound = np.where(reached[0] & (y[0] < target), 1, np.where(reached.any(axis=0), 0, -1))
    if len(x) == 1:
        return at[point], bound
    piece = np.maximum(point - 1, 0)  # reached within this one, from its left end on
    cubic = PchipInterpolator(x, y, axis=0).c[:, piece, np.arange(y.shape[1])]
    low, high = np.zeros_like(target), x[piece + 1] - x[piece]
    for _ in range(60):
        middle = (low + high) / 2
        above = np.polyval(cubic, middle) > target
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    inside = (bound == 0) & (point > 0)
    found = at[0] * (-x[piece] - high) ** (-1 / _STRAIGHT)
    return np.where(inside, found, at[point]), bound


def speed_up(
    baseline: Curve,
    curve: Curve,
    budget: int,
    draws: int = 2000,
) -> SpeedUp:
    """The baseline's cost over the model's, for one mean loss at a budget of both.

    The loss is the higher one of their two there: the worse one has spent the budget, and the cost
    of the better one is read off its curve. Where that curve begins below, it is the lower loss,
    and the cost of the worse one is read off. Where the model has no runs of that budget, it is the
    baseline's loss.

    The interval, of 95 %, comes from the spread over seeds, which at each budget is taken to be
    that of both models together. In each draw every mean moves as its error may, with that spread
    as little known as it is (Student's t); the interval's ends are percentiles of the speed-ups. A
    draw that leaves a curve counts with its end. The choice of the tuned value and of the recipe is
    not in it.

    Args:
      baseline, curve: the runs of both.
      budget: one of the baseline's.
      draws: how many.
    """
    base_costs, costs = ([cell.cost for cell in c.values()] for c in (baseline, curve))
    base_place = list(baseline).index(budget)
    place = list(curve).index(budget) if budget in curve else None

    def ratio(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        base_losses, losses = means[: len(baseline)], means[len(baseline) :]
        cost, bound = cost_at(costs, losses, base_losses[base_place])
        value = base_costs[base_place] / cost
        if place is None:
            return value, bound
        cost, other_bound = cost_at(base_costs, base_losses, losses[place])
        other = cost / costs[place], -other_bound  # to need less makes the model slower
        worse = losses[place] > base_losses[base_place]
        take = np.where(worse, (other_bound == 0) | (bound != 0), (other_bound == 0) & (bound != 0))
        return np.where(take, other[0], value), np.where(take, other[1], bound)

    cells = [*baseline.values(), *curve.values()]
    means = np.array([[statistics.fmean(cell.losses)] for cell in cells])
    (value,), (bound,) = ratio(means)
    sign = {1: ">", 0: "", -1: "<"}[int(bound)]
    if min(len(cell.losses) for cell in cells) < 2:
        return SpeedUp(float(value), sign, None, None)
    rng = np.random.default_rng(0)
    spreads = {}
    for n in dict.fromkeys([*baseline, *curve]):
        there = [c[n].losses for c in (baseline, curve) if n in c]
        freedom = sum(len(x) - 1 for x in there)
        squares = sum(statistics.variance(x) * (len(x) - 1) for x in there)
        spreads[n] = np.sqrt(squares / rng.chisquare(freedom, draws))
    errors = [
        spreads[n] * rng.standard_normal(draws) / math.sqrt(len(runs.losses))
        for c in (baseline, curve)
        for n, runs in c.items()
    ]
    ratios, _ = ratio(means + np.stack(errors))
    low, high = np.quantile(ratios, [0.025, 0.975])
    return SpeedUp(float(value), sign, float(low), float(high))


def show(row: SpeedUpRow) -> str:
    """'1.52 (1.44 to 1.60)' for a line of speedup.csv, with > or < where the curve ends."""
    interval = "" if row["low"] is None else f" ({row['low']:.2f} to {row['high']:.2f})"
    return f"{row['bound']}{row['speed_up']:.2f}{interval}"


def speedups_of(study: Study, cells: Sequence[CellRow]) -> list[SpeedUpRow]:
    """The speed-up of each model over its baseline, at each of the baseline's budgets.

    In steps, in FLOPs, and in seconds where both were timed on the same machine.
    """
    out: list[SpeedUpRow] = []
    for setting, (model, baseline) in itertools.product(
        study.settings, plan.baselines(study).items()
    ):
        base, mine = (curve_of(cells, setting, m) for m in (baseline, model))
        if len(mine) < 2:
            continue
        for target, cost in itertools.product(base, ("steps", "flops", "seconds")):
            cells_ = (*base, *mine)
            if cost == "seconds" and len({c["timed_on"] for c in cells_}) > 1:
                continue
            if not all(c[cost] for c in cells_):
                continue
            of_base, of_model = (
                {c["steps"]: Runs(c[cost], c["losses"]) for c in curve} for curve in (base, mine)
            )
            s = speed_up(of_base, of_model, target["steps"])
            out.append({
                "setting": setting, "model": model, "baseline": baseline,
                "steps": target["steps"], "cost": cost, "bound": s.bound,
                "speed_up": s.value, "low": s.low, "high": s.high,
            })  # fmt: skip
    return out


def optima_of(study: Study, rows: Sequence[Result]) -> list[OptimumRow]:
    """Where the optimum of the tuned field lies in each cell, for studies with ``near``.

    For each seed, the lowest point of the parabola in (log value, loss) that is fitted to the best
    value of the cell and its neighbours, at most as far away as the last of them. ``optimum`` is
    the geometric mean over the seeds, low and high are the least and the largest. ``shift`` is the
    optimum over that of the first setting with the same model, budget and seed.
    """
    losses = results.losses_of(study, rows)
    of_cell = {}
    for cell, runs in plan.chosen(study, losses).items():
        points = plan.around(study, cell, runs[0].value)
        if all(losses.get(p, math.inf) < math.inf for p in points):
            of_cell[cell] = runs[0].value, _optima(study, points, losses)
    out = []
    for (setting, model, steps), (best, optima) in of_cell.items():
        first = of_cell.get((next(iter(study.settings)), model, steps))
        line = {"setting": setting, "model": model, "steps": steps, "best": best}
        shifts = optima - first[1] if first else np.array([math.nan])
        for name, values in (("optimum", optima), ("shift", shifts)):
            there = bool(np.isfinite(values).all())
            ends = values.mean(), values.min(), values.max()
            for part, end in zip(("", "_low", "_high"), ends):
                line[name + part] = math.exp(end) if there else None
        out.append(line)
    return out


def _optima(study: Study, points: Sequence[plan.Point], losses: plan.Losses) -> np.ndarray:
    """The logarithm of each seed's optimum; NaN where the losses have no lowest point."""
    found = []
    for seed in study.seeds:
        mine = [(math.log(p.value), losses[p]) for p in points if p.value and p.seed == seed]
        x, y = np.transpose(mine)
        a, b, _ = np.polyfit(x - x.mean(), y, 2)
        lowest = np.clip(x.mean() - b / (2 * a), x[0], x[-1]) if a > 0 else math.nan
        found.append(lowest)
    return np.array(found)


def machines_of(rows: Sequence[Result]) -> list[str]:
    """The machines, versions and commits that made the runs, the most frequent first."""
    texts = Counter(
        f"{r['cpu']}, {r['cores'] or 'all'} core(s), {r['devices']}, Python {r['python']},"
        f" jax {r['jax']}, commit {r['commit']}"
        for r in rows
    )
    return [f"{n} runs: {t}" for t, n in sorted(texts.items(), key=lambda item: (-item[1], item))]
