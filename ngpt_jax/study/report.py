"""What a study's table says: summaries as CSV, plots as PNG, and one page of HTML over them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ngpt_jax import plots
from ngpt_jax.study import plan, report_page, results
from ngpt_jax.study.plan import Study
from ngpt_jax.study.results import Row
from ngpt_jax.study.savings import Cell, speed_up

COSTS = {
    "steps": "steps",
    "tokens": "tokens",
    "flops": "FLOPs",
    "seconds": "seconds of training",
}
_PICTURES = ("speedup.png", "loss.png", "tuning.png", *(f"loss_{cost}.png" for cost in COSTS))
CELL_COLUMNS = (
    "setting model steps value seeds diverged loss loss_min loss_max loss_std loss_first_seed"
    " loss_at_value_below loss_at_value_above bits_per_byte tokens tokens_per_parameter flops"
    " seconds tokens_per_second"
).split()
SPEEDUP_COLUMNS = "setting model baseline steps cost bound speed_up low high".split()


def cells_of(study: Study, rows: Sequence[Row]) -> list[Row]:
    """One row a complete cell: mean and spread over its seeds at the best value.

    ``loss`` is inf where a seed diverged. ``seconds`` are steps times the median seconds a step of
    all runs of that model and setting: a run alone tells how busy the machine was.
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
        out,
        key=lambda c: (order[0].index(c["setting"]), order[1].index(c["model"]), c["steps"]),
    )


def of_model(cells: Sequence[Row], setting: str, model: str) -> list[Row]:
    """The cells of a curve; those where a seed diverged have no place on it."""
    return [
        c for c in cells
        if (c["setting"], c["model"]) == (setting, model) and c["loss"] < math.inf
    ]  # fmt: skip


def speedups_of(study: Study, cells: Sequence[Row]) -> list[Row]:
    """Speed-up of each model over the baseline at the loss of each of the baseline's cells."""
    out: list[Row] = []
    if study.baseline is None:
        return out
    for setting in study.settings:
        base = of_model(cells, setting, study.baseline)
        for model in study.models:
            mine = of_model(cells, setting, model)
            if model == study.baseline or len(mine) < 2:
                continue
            for target, cost in itertools.product(base, ("steps", "flops", "seconds")):
                if not target[cost] or not all(c[cost] for c in mine):
                    continue  # too short to be timed
                s = speed_up(
                    Cell(target[cost], target["losses"]),
                    [Cell(c[cost], c["losses"]) for c in mine],
                )
                out.append({
                    "setting": setting, "model": model, "baseline": study.baseline,
                    "steps": target["steps"], "cost": cost, "bound": s.bound,
                    "speed_up": s.value, "low": s.low, "high": s.high,
                })  # fmt: skip
    return out


def _look(study: Study, model: str) -> dict[str, Any]:
    place = list(study.models).index(model)
    return {
        "color": plots.COLORS[place % len(plots.COLORS)],
        "marker": plots.MARKERS[(place + place // len(plots.COLORS)) % len(plots.MARKERS)],
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


def plot_losses(study: Study, cells: Sequence[Row], cost: str, path: Path) -> None:
    """Loss against a cost, a panel a setting: means, with bars from least to largest seed."""
    settings = [s for s in study.settings if any(c["setting"] == s for c in cells)]
    fig, axes = plots.figure(1, len(settings))
    for axis, setting in zip(axes, settings):
        for model in study.models:
            mine = of_model(cells, setting, model)
            if not mine:
                continue
            means = [c["loss"] for c in mine]
            bars = [
                [m - c["loss_min"] for m, c in zip(means, mine)],
                [c["loss_max"] - m for m, c in zip(means, mine)],
            ]
            x = [c[cost] for c in mine]
            axis.errorbar(x, means, bars, capsize=2, linewidth=1.4, **_look(study, model))
        axis.set(title=setting, xlabel=COSTS[cost], ylabel="held-out nats a token", xscale="log")
        first = next(iter(study.models))
        ticks = [c[cost] for c in cells if (c["setting"], c["model"]) == (setting, first)]
        _log_axis(axis.xaxis, ticks)
        axis.legend()
    plots.save(fig, path)


def plot_tuning(study: Study, rows: Sequence[Row], path: Path) -> None:
    """Loss against the tuned field, a panel a setting and model, a line a budget (first seed)."""
    losses = results.losses_of(study, rows)
    count = len(study.settings) * len(study.models)
    columns = len(study.models) if len(study.models) <= 4 else 3
    fig, axes = plots.figure(-(-count // columns), columns, height=2.8, width=3.4)
    panels = [(s, m) for s in study.settings for m in study.models]
    for axis, (setting, model) in zip(axes, panels):
        values: list[float] = []
        for i, steps in enumerate(study.budgets):
            line = sorted(
                (p.value, x) for p, x in losses.items()
                if (p.setting, p.model, p.steps, p.seed) == (setting, model, steps, study.seeds[0])
                and p.value is not None and math.isfinite(x)
            )  # fmt: skip
            if not line:
                continue
            shade = 0.75 * (1 - (i + 1) / len(study.budgets))
            color = plots.COLORS[list(study.models).index(model) % len(plots.COLORS)]
            axis.plot(
                *zip(*line), marker="o", markersize=3, color=color, alpha=1 - shade,
                label=f"{steps:,} steps",
            )  # fmt: skip
            best = min(line, key=lambda v: v[1])
            axis.plot(*best, marker="o", markersize=8, fillstyle="none", color=color)
            values += [v for v, _ in line]
        axis.set(title=f"{setting}, {model}", xscale="log", ylabel="held-out nats a token")
        axis.set_xlabel((study.tuned or "").rsplit(".", 1)[-1])
        if values:
            _log_axis(axis.xaxis, values)
            axis.xaxis.set_tick_params(rotation=45)
            if model == next(iter(study.models)):
                axis.legend(fontsize=7)
    for axis in axes[count:]:
        axis.remove()
    plots.save(fig, path)


def plot_speedups(study: Study, speedups: Sequence[Row], path: Path) -> None:
    """Speed-up in steps against the baseline's budget, a panel a setting."""
    ours = [s for s in speedups if s["cost"] == "steps"]
    settings = [s for s in study.settings if any(r["setting"] == s for r in ours)]
    fig, axes = plots.figure(1, len(settings))
    for axis, setting in zip(axes, settings):
        for model in study.models:
            mine = [s for s in ours if (s["setting"], s["model"]) == (setting, model)]
            if not mine:
                continue
            y = [s["speed_up"] for s in mine]
            ends = [(s["low"] or s["speed_up"], s["high"] or s["speed_up"]) for s in mine]
            bars = [
                [max(0.0, x - low) for x, (low, _) in zip(y, ends)],
                [max(0.0, high - x) for x, (_, high) in zip(y, ends)],
            ]
            x = [s["steps"] for s in mine]
            axis.errorbar(x, y, bars, capsize=2, linewidth=1.4, **_look(study, model))
            for s in mine:
                if s["bound"]:
                    place = (s["steps"], s["speed_up"])
                    axis.annotate(s["bound"], place, xytext=(4, 4), textcoords="offset points")
        axis.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        axis.set(
            title=setting, xscale="log", xlabel=f"steps of {study.baseline}",
            ylabel=f"steps of {study.baseline} / steps needed",
        )  # fmt: skip
        _log_axis(axis.xaxis, [s["steps"] for s in ours])
        axis.legend()
    plots.save(fig, path)


def plot_arms(study: Study, cells: Sequence[Row], path: Path) -> None:
    """Losses at the largest budget as dots, a panel a setting: for sweeps and ablations."""
    steps = study.budgets[-1]
    settings = list(study.settings)
    names = [m for m in study.models if any(c["model"] == m for c in cells)][::-1]
    height = max(2.2, 0.6 + 0.24 * len(names))
    fig, axes = plots.figure(1, len(settings), height=height, width=5)
    for axis, setting in zip(axes, settings):
        for place, model in enumerate(names):
            for c in cells:
                if (c["setting"], c["model"], c["steps"]) == (setting, model, steps):
                    color = plots.COLORS[0]
                    finite = [x for x in c["losses"] if x < math.inf]
                    axis.plot(finite, [place] * len(finite), "o", color=color, alpha=0.4)
                    if len(finite) == c["seeds"]:
                        axis.plot(c["loss"], place, "|", color=color, markersize=14)
        axis.set_yticks(range(len(names)), names)
        axis.set(title=setting, xlabel=f"held-out nats a token after {steps:,} steps")
    plots.save(fig, path)


def write(experiment: str, study: Study, rows: Sequence[Row], out: Path) -> Path:
    """Writes cells.csv, speedup.csv, the plots and report.html into ``out``.

    Returns:
      The path of the page.
    """
    rows = results.in_study(study, rows)
    cells = cells_of(study, rows)
    speedups = speedups_of(study, cells)
    made: dict[str, str] = {}
    with results.locked(out):  # another program may be about to do the same
        for name in ("speedup.csv", *_PICTURES):
            (out / name).unlink(missing_ok=True)
        plain = [{k: c[k] for k in CELL_COLUMNS} for c in cells]
        plots.write_csv(out / "cells.csv", CELL_COLUMNS, plain)
        if speedups:
            plots.write_csv(out / "speedup.csv", SPEEDUP_COLUMNS, speedups)
            plot_speedups(study, speedups, out / "speedup.png")
            made["speedup.png"] = "Speed-up at equal loss, by the baseline's budget."
        if cells and len(study.budgets) > 1:
            for cost, name in COSTS.items():
                if not all(c[cost] for c in cells):
                    continue  # too short to be timed
                plot_losses(study, cells, cost, out / f"loss_{cost}.png")
                made[f"loss_{cost}.png"] = (
                    f"Held-out loss against {name}: mean, least and largest of the seeds."
                )
        if cells and len(study.budgets) == 1:
            plot_arms(study, cells, out / "loss.png")
            made["loss.png"] = "Held-out loss: each seed a dot, the bar their mean."
        if rows and study.tuned is not None:
            plot_tuning(study, rows, out / "tuning.png")
            text = f"Tuning of {study.tuned} with the first seed; the best one ringed."
            made["tuning.png"] = text
        page = out / "report.html"
        lost = plan.given_up(study, results.losses_of(study, rows))
        report_page.write(page, experiment, study, rows, cells, speedups, made, lost)
    return page


def facts_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The machines, versions and commits that rows come from, the most frequent first."""
    texts = [
        f"{r['cpu']}, {r['cores'] or 'all'} core(s), {r['devices']}, Python {r['python']},"
        f" jax {r['jax']}, commit {r['commit']}"
        for r in rows
    ]
    return [
        f"{texts.count(t)} runs: {t}" for t in sorted(set(texts), key=lambda t: -texts.count(t))
    ]
