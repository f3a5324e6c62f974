"""The results of a study in short: its cells, its speed-ups, the machines of its runs."""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ngpt_jax.study import plan, results
from ngpt_jax.study.plan import Study
from ngpt_jax.study.results import Result
from ngpt_jax.study.savings import Runs, speed_up

CellRow = dict[str, Any]  # a line of cells.csv; "losses" are those of the seeds
SpeedUpRow = dict[str, Any]  # a line of speedup.csv
CELL_COLUMNS = (
    "setting model steps value seeds diverged loss loss_min loss_max loss_std loss_first_seed"
    " loss_at_value_below loss_at_value_above bits_per_byte tokens tokens_per_parameter flops"
    " seconds tokens_per_second"
).split()
SPEEDUP_COLUMNS = "setting model baseline steps cost bound speed_up low high".split()


def cells_of(study: Study, rows: Sequence[Result]) -> list[CellRow]:
    """A line for each complete cell: mean and spread over its seeds at the best value.

    ``loss`` is inf where a seed diverged. ``seconds`` are steps times the median seconds a step of
    all runs of that model and setting, as a single run depends on how busy the machine was.
    """
    losses = results.losses_of(study, rows)
    by_point = {results.point_of(row): row for row in rows}
    pace: dict[tuple[str, str], list[float]] = {}  # seconds a step, by setting and model
    for r in rows:
        if r["seconds"]:
            pace.setdefault((r["setting"], r["model"]), []).append(r["seconds"] / r["steps"])
    out = []
    for (setting, model, steps), points in plan.chosen(study, losses).items():
        runs = [by_point[p] for p in points]
        found = [losses[p] for p in points]
        bits = [r["bits_per_byte"] for r in runs if r["bits_per_byte"] is not None]
        below, above = plan.neighbours(study, losses, points[0])
        seconds = steps * statistics.median(pace.get((setting, model), [0.0]))
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
            "losses": found,
        })  # fmt: skip
    order = list(study.settings), list(study.models)
    return sorted(
        out, key=lambda c: (order[0].index(c["setting"]), order[1].index(c["model"]), c["steps"])
    )


def curve_of(cells: Sequence[CellRow], setting: str, model: str) -> list[CellRow]:
    """The cells of one setting and model in which no seed diverged, budgets ascending."""
    return [
        c for c in cells
        if (c["setting"], c["model"]) == (setting, model) and c["loss"] < math.inf
    ]  # fmt: skip


def speedups_of(study: Study, cells: Sequence[CellRow]) -> list[SpeedUpRow]:
    """The speed-up of each model over the baseline, at the loss of each of the baseline's cells.

    In steps, in FLOPs, and in seconds where runs were long enough to be timed.
    """
    out: list[SpeedUpRow] = []
    if study.baseline is None:
        return out
    for setting, model in itertools.product(study.settings, study.models):
        base, mine = (curve_of(cells, setting, m) for m in (study.baseline, model))
        if model == study.baseline or len(mine) < 2:
            continue
        for target, cost in itertools.product(base, ("steps", "flops", "seconds")):
            if not all(c[cost] for c in (target, *mine)):
                continue
            of_model = [Runs(c[cost], c["losses"]) for c in mine]
            s = speed_up(Runs(target[cost], target["losses"]), of_model)
            out.append({
                "setting": setting, "model": model, "baseline": study.baseline,
                "steps": target["steps"], "cost": cost, "bound": s.bound,
                "speed_up": s.value, "low": s.low, "high": s.high,
            })  # fmt: skip
    return out


def machines_of(rows: Sequence[Result]) -> list[str]:
    """The machines, versions and commits that made the runs, the most frequent first."""
    texts = Counter(
        f"{r['cpu']}, {r['cores'] or 'all'} core(s), {r['devices']}, Python {r['python']},"
        f" jax {r['jax']}, commit {r['commit']}"
        for r in rows
    )
    return [f"{n} runs: {t}" for t, n in sorted(texts.items(), key=lambda item: (-item[1], item))]
