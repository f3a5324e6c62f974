"""What a study's table says: summaries as CSV, plots as PNG, and one page of HTML over them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ngpt_jax.tools import plots, report_page, results, study
from ngpt_jax.tools.results import Row
from ngpt_jax.tools.speedup import Cell, SpeedUp, speed_up
from ngpt_jax.tools.study import Point, Study

COSTS = {
    "steps": "steps",
    "tokens": "tokens",
    "flops": "FLOPs",
    "seconds": "seconds of training",
}
CELL_COLUMNS = (
    "setting model steps value at_edge seeds loss loss_min loss_max loss_std bits_per_byte tokens"
    " tokens_per_parameter flops seconds tokens_per_second"
).split()
SPEEDUP_COLUMNS = "setting model baseline steps cost bound speed_up low high".split()


def cells_of(plan: Study, rows: Sequence[Row]) -> list[Row]:
    """One row a complete cell: mean and spread over its seeds at the best value."""
    losses = results.losses_of(plan, rows)
    by_point = {results.point_of(row): row for row in rows}
    out = []
    for (setting, model, steps), points in study.chosen(plan, losses).items():
        runs = [by_point[p] for p in points]
        found = [losses[p] for p in points]
        finite = max(found) < math.inf
        bits = [r["bits_per_byte"] for r in runs if r["bits_per_byte"] is not None]
        out.append({
            "setting": setting, "model": model, "steps": steps, "value": points[0].value,
            "at_edge": study.at_edge(plan, losses, points), "seeds": len(runs),
            "loss": statistics.fmean(found), "loss_min": min(found), "loss_max": max(found),
            "loss_std": statistics.stdev(found) if finite and len(found) > 1 else None,
            "bits_per_byte": statistics.fmean(bits) if bits else None,
            "tokens": runs[0]["tokens"],
            "tokens_per_parameter": runs[0]["tokens"] / runs[0]["parameters"],
            "flops": runs[0]["flops"],
            "seconds": statistics.median(r["seconds"] for r in runs),
            "tokens_per_second": statistics.median(r["tokens_per_second"] or 0 for r in runs),
            "losses": found,
        })  # fmt: skip
    order = list(plan.settings), list(plan.models)
    return sorted(
        out,
        key=lambda c: (order[0].index(c["setting"]), order[1].index(c["model"]), c["steps"]),
    )


def speedups_of(plan: Study, cells: Sequence[Row]) -> list[Row]:
    """Speed-up of each model over the baseline at the loss of each of the baseline's cells."""
    out: list[Row] = []
    if plan.baseline is None or len(plan.budgets) < 2:
        return out
    for setting in plan.settings:
        for model in plan.models:
            mine = [c for c in cells if (c["setting"], c["model"]) == (setting, model)]
            base = [c for c in cells if (c["setting"], c["model"]) == (setting, plan.baseline)]
            if model == plan.baseline or len(mine) < 2:
                continue
            for target in base:
                for cost in ("steps", "flops", "seconds"):
                    s = speed_up(
                        Cell(target[cost], target["losses"]),
                        [Cell(c[cost], c["losses"]) for c in mine],
                    )
                    out.append({
                        "setting": setting, "model": model, "baseline": plan.baseline,
                        "steps": target["steps"], "cost": cost, "bound": s.bound,
                        "speed_up": s.value, "low": s.low, "high": s.high,
                    })  # fmt: skip
    return out


def spread_of(plan: Study, rows: Sequence[Row], point: Point) -> float | None:
    """Largest less smallest loss over the seeds of a point's cell; None where it has no others."""
    losses = results.losses_of(plan, rows)
    cell = [
        x for p, x in losses.items()
        if (p.setting, p.model, p.steps, p.value)
        == (point.setting, point.model, point.steps, point.value) and math.isfinite(x)
    ]  # fmt: skip
    return max(cell) - min(cell) if len(cell) > 1 else None


def as_speedup(row: Row) -> SpeedUp:
    return SpeedUp(row["speed_up"], row["bound"], row["low"], row["high"])


def _look(plan: Study, model: str) -> dict[str, Any]:
    place = list(plan.models).index(model)
    return {
        "color": plots.COLORS[place % len(plots.COLORS)],
        "marker": plots.MARKERS[place % len(plots.MARKERS)],
        "markersize": 4,
        "label": model,
    }


def _log_axis(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with these values as its ticks."""
    from matplotlib import ticker

    axis.set_ticks(sorted(set(values)))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: short(x)))


def short(x: float) -> str:
    """1234567 -> 1.23M."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.3g}{unit}"
    return f"{x:.3g}"


def plot_losses(plan: Study, cells: Sequence[Row], cost: str, path: Path) -> None:
    """Loss against a cost, a panel a setting: means, with bars from least to largest seed."""
    settings = [s for s in plan.settings if any(c["setting"] == s for c in cells)]
    fig, axes = plots.figure(1, len(settings))
    for axis, setting in zip(axes, settings):
        for model in plan.models:
            mine = [c for c in cells if (c["setting"], c["model"]) == (setting, model)]
            if not mine:
                continue
            means = [c["loss"] for c in mine]
            bars = [
                [m - c["loss_min"] for m, c in zip(means, mine)],
                [c["loss_max"] - m for m, c in zip(means, mine)],
            ]
            x = [c[cost] for c in mine]
            axis.errorbar(x, means, bars, capsize=2, linewidth=1.4, **_look(plan, model))
        axis.set(title=setting, xlabel=COSTS[cost], ylabel="held-out nats a token", xscale="log")
        first = next(iter(plan.models))
        ticks = [c[cost] for c in cells if (c["setting"], c["model"]) == (setting, first)]
        _log_axis(axis.xaxis, ticks)
        axis.legend()
    plots.save(fig, path)


def plot_tuning(plan: Study, rows: Sequence[Row], path: Path) -> None:
    """Loss against the tuned field, a panel a setting and model, a line a budget (first seed)."""
    losses = results.losses_of(plan, rows)
    fig, axes = plots.figure(len(plan.settings), len(plan.models), height=2.8, width=3.4)
    panels = [(s, m) for s in plan.settings for m in plan.models]
    for axis, (setting, model) in zip(axes, panels):
        values: list[float] = []
        for i, steps in enumerate(plan.budgets):
            line = sorted(
                (p.value, x) for p, x in losses.items()
                if (p.setting, p.model, p.steps, p.seed) == (setting, model, steps, plan.seeds[0])
                and p.value is not None and math.isfinite(x)
            )  # fmt: skip
            if not line:
                continue
            shade = 0.75 - 0.75 * i / max(1, len(plan.budgets) - 1)
            color = plots.COLORS[list(plan.models).index(model) % len(plots.COLORS)]
            axis.plot(
                *zip(*line), marker="o", markersize=3, color=color, alpha=1 - shade,
                label=f"{steps:,} steps",
            )  # fmt: skip
            best = min(line, key=lambda v: v[1])
            axis.plot(*best, marker="o", markersize=8, fillstyle="none", color=color)
            values += [v for v, _ in line]
        axis.set(title=f"{setting}, {model}", xscale="log", ylabel="held-out nats a token")
        axis.set_xlabel((plan.tuned or "").rsplit(".", 1)[-1])
        if values:
            _log_axis(axis.xaxis, values)
            axis.xaxis.set_tick_params(rotation=45)
            if model == next(iter(plan.models)):
                axis.legend(fontsize=7)
    plots.save(fig, path)


def plot_speedups(plan: Study, speedups: Sequence[Row], path: Path) -> None:
    """Speed-up in steps against the baseline's budget, a panel a setting."""
    ours = [s for s in speedups if s["cost"] == "steps"]
    settings = [s for s in plan.settings if any(r["setting"] == s for r in ours)]
    fig, axes = plots.figure(1, len(settings))
    for axis, setting in zip(axes, settings):
        for model in plan.models:
            mine = [s for s in ours if (s["setting"], s["model"]) == (setting, model)]
            if not mine:
                continue
            y = [s["speed_up"] for s in mine]
            bars = [
                [max(0.0, s["speed_up"] - s["low"]) for s in mine],
                [max(0.0, s["high"] - s["speed_up"]) for s in mine],
            ]
            x = [s["steps"] for s in mine]
            axis.errorbar(x, y, bars, capsize=2, linewidth=1.4, **_look(plan, model))
            for s in mine:
                if s["bound"]:
                    place = (s["steps"], s["speed_up"])
                    axis.annotate(s["bound"], place, xytext=(4, 4), textcoords="offset points")
        axis.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        axis.set(
            title=setting, xscale="log", xlabel=f"steps of {plan.baseline}",
            ylabel=f"steps of {plan.baseline} / steps needed",
        )  # fmt: skip
        _log_axis(axis.xaxis, [s["steps"] for s in ours])
        axis.legend()
    plots.save(fig, path)


def plot_arms(plan: Study, cells: Sequence[Row], path: Path) -> None:
    """Losses at the largest budget as dots, a panel a setting: for sweeps and ablations."""
    steps = plan.budgets[-1]
    settings = list(plan.settings)
    height = max(2.2, 0.6 + 0.24 * len(plan.models))
    fig, axes = plots.figure(1, len(settings), height=height, width=5)
    for axis, setting in zip(axes, settings):
        names = list(plan.models)[::-1]
        for place, model in enumerate(names):
            for c in cells:
                if (c["setting"], c["model"], c["steps"]) == (setting, model, steps):
                    color = plots.COLORS[0]
                    axis.plot(c["losses"], [place] * c["seeds"], "o", color=color, alpha=0.4)
                    axis.plot(c["loss"], place, "|", color=color, markersize=14)
        axis.set_yticks(range(len(names)), names)
        axis.set(title=setting, xlabel=f"held-out nats a token after {steps:,} steps")
    plots.save(fig, path)


def write(experiment: str, plan: Study, rows: Sequence[Row], out: Path) -> Path:
    """Writes cells.csv, speedup.csv, the plots and report.html into ``out``.

    Returns:
      The path of the page.
    """
    cells = cells_of(plan, rows)
    speedups = speedups_of(plan, cells)
    plots.write_csv(
        out / "cells.csv", CELL_COLUMNS, [{k: c[k] for k in CELL_COLUMNS} for c in cells]
    )
    made: dict[str, str] = {}
    if speedups:
        plots.write_csv(out / "speedup.csv", SPEEDUP_COLUMNS, speedups)
        plot_speedups(plan, speedups, out / "speedup.png")
        made["speedup.png"] = "Speed-up at equal loss, by the baseline's budget."
    if cells and len(plan.budgets) > 1:
        for cost, name in COSTS.items():
            plot_losses(plan, cells, cost, out / f"loss_{cost}.png")
            made[f"loss_{cost}.png"] = (
                f"Held-out loss against {name}: mean, least and largest of the seeds."
            )
    if cells and len(plan.budgets) == 1:
        plot_arms(plan, cells, out / "loss.png")
        made["loss.png"] = "Held-out loss: each seed a dot, the bar their mean."
    if rows and plan.tuned is not None:
        plot_tuning(plan, rows, out / "tuning.png")
        made["tuning.png"] = f"Tuning of {plan.tuned} with the first seed; the best one ringed."
    page = out / "report.html"
    report_page.write(page, experiment, plan, rows, cells, speedups, made)
    return page


def facts_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The machines and versions that rows come from, the most frequent first."""
    names = ("cpu", "cores", "devices", "python", "jax")
    texts = [
        f"{r['cpu']}, {r['cores']} core(s), {r['devices']}, Python {r['python']}, jax {r['jax']}"
        for r in rows
        if all(r[n] is not None for n in names)
    ]
    return sorted(set(texts), key=lambda t: -texts.count(t))
