"""Speed-up at equal loss: how much less a model needs to reach what the baseline reached."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Runs(NamedTuple):
    """Runs of one budget: what each cost (steps, tokens, FLOPs or seconds) and their losses."""

    cost: float
    losses: Sequence[float]  # one a seed


Curve = Sequence[Runs]  # of one model, costs ascending


class SpeedUp(NamedTuple):
    """``value`` times less; ``bound`` is "" or, where the curve ends before, ">" or "<".

    ``low`` and ``high`` are the interval's ends, within what the curve covers; None where there is
    one seed.
    """

    value: float
    bound: str
    low: float | None
    high: float | None


def cost_at(costs: Sequence[float], losses: Sequence[float], loss: float) -> tuple[float, str]:
    """What it costs to reach a loss, on straight lines between points in (log cost, loss).

    Args:
      costs: ascending.
      losses: at those costs, finite.
      loss: the one to reach.

    Returns:
      (cost, "") for the smallest such cost; (the first cost, ">") where the first point lies below
      the loss already, so that less would do; (the last cost, "<") where no point reaches it.
    """
    if losses[0] <= loss:
        return costs[0], "" if losses[0] == loss else ">"
    for (c, a), (d, b) in itertools.pairwise(zip(costs, losses)):
        if b <= loss:
            part = (a - loss) / (a - b)
            return math.exp(math.log(c) + part * (math.log(d) - math.log(c))), ""
    return costs[-1], "<"


def speed_up(
    baseline: Runs, curve: Curve, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> SpeedUp:
    """The baseline's cost in a cell over what the model needs for the same mean loss.

    The interval is a bootstrap over seeds: in each resample every cell of both models draws as many
    of its own losses as it has, with replacement; the percentiles of the resampled speed-ups. With
    three seeds it is rough, and where a resample leaves the curve it stops at its end.
    """
    costs = [cell.cost for cell in curve]

    def ratio(target: float, losses: Sequence[float]) -> tuple[float, str]:
        cost, bound = cost_at(costs, losses, target)
        return baseline.cost / cost, bound

    value, bound = ratio(_mean(baseline.losses), [_mean(cell.losses) for cell in curve])
    if min(len(cell.losses) for cell in (baseline, *curve)) < 2:
        return SpeedUp(value, bound, None, None)
    rng = np.random.default_rng(seed)

    def draw(runs: Runs) -> np.ndarray:
        x = np.asarray(runs.losses, np.float64)
        return x[rng.integers(0, len(x), (resamples, len(x)))].mean(axis=1)

    targets, drawn = draw(baseline), np.stack([draw(cell) for cell in curve], axis=1)
    ratios = [ratio(t, losses)[0] for t, losses in zip(targets.tolist(), drawn.tolist())]
    tail = (1 - level) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return SpeedUp(value, bound, float(low), float(high))


def _mean(x: Sequence[float]) -> float:
    return math.fsum(x) / len(x)


def show(s: SpeedUp) -> str:
    """'1.52 (1.44 to 1.60)', with > or < where the curve ends."""
    interval = "" if s.low is None else f" ({s.low:.2f} to {s.high:.2f})"
    return f"{s.bound}{s.value:.2f}{interval}"
