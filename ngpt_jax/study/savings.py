"""Speed-up at equal loss: how much less a model needs to reach what the baseline reached."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Runs(NamedTuple):
    """The runs of one budget: what each cost (steps, FLOPs or seconds), and their losses."""

    cost: float
    losses: Sequence[float]  # one a seed


Curve = Sequence[Runs]  # of one model, costs ascending


class SpeedUp(NamedTuple):
    """How many times less a model needs.

    Attributes:
      value: the factor.
      bound: ">" or "<" where the curve does not reach so far, else "".
      low, high: the ends of the interval, within what the curve covers; None for a single seed.
    """

    value: float
    bound: str
    low: float | None
    high: float | None


def cost_at(costs: Sequence[float], losses: Sequence[float], loss: float) -> tuple[float, str]:
    """The cost at which a loss is reached, on straight lines between points in (log cost, loss).

    Args:
      costs: ascending.
      losses: at those costs, finite.
      loss: the one to reach.

    Returns:
      (cost, "") for the smallest such cost; (the first cost, ">") where the first point is already
      below the loss, so that less would do; (the last cost, "<") where no point reaches it.
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
    """The baseline's cost for its mean loss over what a model needs for the same loss.

    The interval is a bootstrap over seeds. In each resample, every budget of both models draws as
    many of its own losses as it has, with replacement; the interval's ends are percentiles of the
    speed-ups. It is rough with three seeds. A resample that leaves the curve counts with its end.

    Args:
      baseline: its runs of one budget.
      curve: the model's runs, a budget each.
      resamples: how many.
      level: the probability that the interval covers.
      seed: of the resampling.
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
