"""The plots of a study, a panel a setting, a colour and a marker a model."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ngpt_jax import plots
from ngpt_jax.study import plan, results
from ngpt_jax.study.plan import Study
from ngpt_jax.study.results import Result
from ngpt_jax.study.summary import CellRow, OptimumRow, SpeedUpRow, curve_of

COSTS = {"steps": "steps", "tokens": "tokens", "flops": "FLOPs", "seconds": "seconds of training"}


def costs_to_draw(cells: Sequence[CellRow]) -> list[str]:
    """The costs against which the losses make figures that differ.

    Two figures are the same where for all models of a setting one cost is the same multiple of the
    other. A cost is left out, too, where runs were too short to be timed.
    """
    drawn: list[str] = []
    for cost in COSTS:
        if all(c[cost] for c in cells) and all(_differ(cells, cost, other) for other in drawn):
            drawn.append(cost)
    return drawn


def _differ(cells: Sequence[CellRow], cost: str, other: str) -> bool:
    ratios: dict[str, set[str]] = {}
    for c in cells:
        ratios.setdefault(c["setting"], set()).add(f"{c[cost] / c[other]:.6g}")
    return any(len(found) > 1 for found in ratios.values())


def _curve(
    axis: Any, model: str, look: plots.Look, x: list, y: list, low: list, high: list
) -> None:
    """A model's line, with bars from ``low`` to ``high``."""
    bars = [[a - b for a, b in zip(y, low)], [b - a for a, b in zip(y, high)]]
    axis.errorbar(
        x, y, bars, capsize=2, linewidth=1.4, markersize=4, label=model, **look._asdict()
    )  # fmt: skip


def losses(study: Study, cells: Sequence[CellRow], cost: str, path: Path) -> None:
    """Mean loss against a cost, with bars from the least to the largest seed."""
    settings, looks = _settings(study, cells), plots.looks(study.models)
    fig, axes = plots.figure(1, len(settings))
    for axis, setting in zip(axes, settings):
        for model in study.models:
            if mine := curve_of(cells, setting, model):
                columns = ([c[k] for c in mine] for k in (cost, "loss", "loss_min", "loss_max"))
                _curve(axis, model, looks[model], *columns)
        axis.set(title=setting, xlabel=COSTS[cost])
        first = next(iter(study.models))
        ticks = [c[cost] for c in cells if (c["setting"], c["model"]) == (setting, first)]
        plots.log_ticks(axis.xaxis, ticks)
    axes[0].set_ylabel("held-out nats per token")
    plots.legend(fig, axes)
    plots.save(fig, path)


def speedups(study: Study, rows: Sequence[SpeedUpRow], path: Path) -> None:
    """Speed-up in steps against the baseline's budget; an arrow begins at a bound."""
    rows = [s for s in rows if s["cost"] == "steps"]
    settings, looks = _settings(study, rows), plots.looks(study.models)
    base = study.baseline if isinstance(study.baseline, str) else "the baseline"
    fig, axes = plots.figure(1, len(settings))
    for axis, setting in zip(axes, settings):
        mine = [s for s in rows if s["setting"] == setting]
        lines = {m: [s for s in mine if s["model"] == m] for m in study.models}
        bounded(axis, lines, "steps", looks)
        axis.set(title=setting, xlabel=f"steps of {base}")
    axes[0].set_ylabel(f"steps of {base} / steps needed")
    plots.legend(fig, axes)
    plots.save(fig, path)


def bounded(
    axis: Any,
    lines: Mapping[str, Sequence[dict[str, Any]]],
    x: str,
    looks: Mapping[str, plots.Look],
) -> None:
    """Speed-ups with their intervals, a line a name, and a dotted one at 1.

    Where a speed-up is a bound, an arrow begins at it and points to where it may lie.

    Args:
      axis: of matplotlib; x is logarithmic.
      lines: rows of :func:`ngpt_jax.study.summary.speedups_of` by the line's name.
      x: the column that is drawn to the right.
      looks: of the names.
    """
    for place, (name, rows) in enumerate(lines.items()):
        aside = 1.03 ** (place - (len(lines) - 1) / 2)  # or bars would hide each other
        known = [s for s in rows if not s["bound"]]
        y = [s["speed_up"] for s in known]
        low = [min(s["low"] or v, v) for s, v in zip(known, y)]
        high = [max(s["high"] or v, v) for s, v in zip(known, y)]
        if rows:
            _curve(axis, name, looks[name], [s[x] * aside for s in known], y, low, high)
        for s in rows:
            if s["bound"]:
                foot = s[x] * aside, s["speed_up"]
                axis.plot(*foot, marker="_", color=looks[name].color)
                up = 22 if s["bound"] == ">" else -22
                axis.annotate(
                    "", foot, (0, up), textcoords="offset points",
                    arrowprops={"arrowstyle": "<-", "color": looks[name].color, "shrinkA": 0},
                )  # fmt: skip
    axis.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axis.margins(y=0.12)  # for the arrows
    plots.log_ticks(axis.xaxis, sorted({s[x] for rows in lines.values() for s in rows}))


def _settings(study: Study, rows: Sequence[dict[str, Any]]) -> list[str]:
    return [s for s in study.settings if any(r["setting"] == s for r in rows)]


def tuning(study: Study, rows: Sequence[Result], path: Path) -> None:
    """Loss of the first seed against the tuned field, a panel a model too, a line a budget.

    The value that a complete cell took is ringed.
    """
    of_points = results.losses_of(study, rows)
    best = {cell: runs[0] for cell, runs in plan.chosen(study, of_points).items()}
    panels, looks = (
        [(s, m) for s in study.settings for m in study.models],
        plots.looks(study.models),
    )
    columns = len(study.models) if len(study.models) <= 4 else 3
    fig, axes = plots.figure(-(-len(panels) // columns), columns, height=2.8, width=3.4)
    for axis, (setting, model) in zip(axes, panels):
        values: list[float] = []
        for i, steps in enumerate(study.budgets):
            line = sorted(
                (p.value, x) for p, x in of_points.items()
                if (p.setting, p.model, p.steps, p.seed) == (setting, model, steps, study.seeds[0])
                and p.value is not None and math.isfinite(x)
            )  # fmt: skip
            if not line:
                continue
            shade = 0.75 * (1 - (i + 1) / len(study.budgets))
            axis.plot(
                *zip(*line), markersize=3, alpha=1 - shade, label=f"{steps:,} steps",
                **looks[model]._asdict(),
            )  # fmt: skip
            ringed = best.get((setting, model, steps))
            if ringed is not None and math.isfinite(loss := of_points[ringed]):
                x = ringed.value
                axis.plot(x, loss, "o", markersize=9, fillstyle="none", color=looks[model].color)
            values += [v for v, _ in line]
        axis.set(title=f"{setting}, {model}", xlabel=(study.tuned or "").rsplit(".", 1)[-1])
        if values:
            plots.log_ticks(axis.xaxis, values)
            if model == next(iter(study.models)) and len(study.budgets) > 1:
                axis.legend(fontsize=7)
    for axis in axes[::columns]:
        axis.set_ylabel("held-out nats per token")
    for axis in axes[len(panels) :]:
        axis.remove()
    plots.save(fig, path)


def transfer(
    study: Study, rows: Sequence[Result], optima: Sequence[OptimumRow], path: Path
) -> None:
    """Loss at the largest budget against the tuned field, a panel a model, a line a setting.

    The mean over the seeds that ran; a bar of the seeds' optima stands below each line's lowest
    point.
    """
    of_points, steps = results.losses_of(study, rows), study.budgets[-1]
    looks = plots.looks(study.settings)
    fig, axes = plots.figure(1, len(study.models), width=3.6)
    for axis, model in zip(axes, study.models):
        values: set[float] = set()
        for setting in study.settings:
            seeds: dict[float, list[float]] = {}
            for p, x in of_points.items():
                own = (p.setting, p.model, p.steps) == (setting, model, steps)
                if own and p.value is not None and math.isfinite(x):
                    seeds.setdefault(p.value, []).append(x)
            if not seeds:
                continue
            tried = sorted(seeds)
            means = [statistics.fmean(seeds[v]) for v in tried]
            axis.plot(tried, means, markersize=3, label=setting, **looks[setting]._asdict())
            values |= seeds.keys()
            for o in optima:
                if (o["setting"], o["model"], o["steps"]) == (setting, model, steps):
                    low, high, color = o["optimum_low"], o["optimum_high"], looks[setting].color
                    if low is not None:
                        axis.plot([low, high], [min(means)] * 2, "|-", color=color, linewidth=3)
        axis.set(title=model, xlabel=(study.tuned or "").rsplit(".", 1)[-1])
        if values:
            plots.log_ticks(axis.xaxis, sorted(values))
    axes[0].set_ylabel(f"held-out nats per token, {steps:,} steps")
    plots.legend(fig, axes)
    plots.save(fig, path)


def models(study: Study, cells: Sequence[CellRow], path: Path) -> None:
    """Losses at the largest budget, a row a model, a dot a seed: for sweeps and ablations."""
    steps = study.budgets[-1]
    names = [m for m in study.models if any(c["model"] == m for c in cells)][::-1]
    height, looks = max(2.2, 0.6 + 0.24 * len(names)), plots.looks(study.models)
    fig, axes = plots.figure(1, len(study.settings), height=height, width=5)
    for axis, setting in zip(axes, study.settings):
        for c in cells:
            if (c["setting"], c["steps"]) != (setting, steps):
                continue
            place, look = names.index(c["model"]), looks[c["model"]]
            finite = [x for x in c["losses"] if x < math.inf]
            axis.plot(finite, [place] * len(finite), ls="", fillstyle="none", **look._asdict())
            if len(finite) == c["seeds"] > 1:
                axis.plot(c["loss"], place, "|", color=look.color, markersize=14)
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [])
        axis.set(
            title=setting,
            xlabel=f"held-out nats per token, {steps:,} steps",
            ylim=(-0.7, len(names) - 0.3),
        )
    plots.save(fig, path)
