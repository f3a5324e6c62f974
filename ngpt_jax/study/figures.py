"""The plots of a study, a panel a setting, a colour a model."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ngpt_jax import plots
from ngpt_jax.study import results
from ngpt_jax.study.plan import Study
from ngpt_jax.study.results import Result
from ngpt_jax.study.summary import CellRow, SpeedUpRow, curve_of

COSTS = {"steps": "steps", "tokens": "tokens", "flops": "FLOPs", "seconds": "seconds of training"}


def _color(study: Study, model: str) -> str:
    return plots.COLORS[list(study.models).index(model) % len(plots.COLORS)]


def _curve(study: Study, axis: Any, model: str, x: list, y: list, low: list, high: list) -> None:
    """A model's line, with bars from ``low`` to ``high``."""
    place = list(study.models).index(model)
    marker = plots.MARKERS[(place + place // len(plots.COLORS)) % len(plots.MARKERS)]
    bars = [[a - b for a, b in zip(y, low)], [b - a for a, b in zip(y, high)]]
    axis.errorbar(
        x, y, bars, capsize=2, linewidth=1.4, color=_color(study, model), marker=marker,
        markersize=4, label=model,
    )  # fmt: skip


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


def losses(study: Study, cells: Sequence[CellRow], cost: str, path: Path) -> None:
    """Mean loss against a cost, with bars from the least to the largest seed."""
    settings = [s for s in study.settings if any(c["setting"] == s for c in cells)]
    fig, axes = plots.figure(1, len(settings))
    for axis, setting in zip(axes, settings):
        for model in study.models:
            if mine := curve_of(cells, setting, model):
                columns = ([c[k] for c in mine] for k in (cost, "loss", "loss_min", "loss_max"))
                _curve(study, axis, model, *columns)
        axis.set(title=setting, xlabel=COSTS[cost], ylabel="held-out nats a token", xscale="log")
        first = next(iter(study.models))
        ticks = [c[cost] for c in cells if (c["setting"], c["model"]) == (setting, first)]
        _log_axis(axis.xaxis, ticks)
        axis.legend()
    plots.save(fig, path)


def speedups(study: Study, rows: Sequence[SpeedUpRow], path: Path) -> None:
    """Speed-up in steps against the baseline's budget."""
    rows = [s for s in rows if s["cost"] == "steps"]
    settings = [s for s in study.settings if any(r["setting"] == s for r in rows)]
    fig, axes = plots.figure(1, len(settings))
    for axis, setting in zip(axes, settings):
        for model in study.models:
            mine = [s for s in rows if (s["setting"], s["model"]) == (setting, model)]
            if not mine:
                continue
            x, y = [s["steps"] for s in mine], [s["speed_up"] for s in mine]
            low = [min(s["low"] or v, v) for s, v in zip(mine, y)]
            high = [max(s["high"] or v, v) for s, v in zip(mine, y)]
            _curve(study, axis, model, x, y, low, high)
            for s in mine:
                if s["bound"]:
                    place = (s["steps"], s["speed_up"])
                    axis.annotate(s["bound"], place, xytext=(4, 4), textcoords="offset points")
        axis.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        baseline = f"steps of {study.baseline}"
        axis.set(title=setting, xscale="log", xlabel=baseline, ylabel=f"{baseline} / steps needed")
        _log_axis(axis.xaxis, [s["steps"] for s in rows])
        axis.legend()
    plots.save(fig, path)


def tuning(study: Study, rows: Sequence[Result], path: Path) -> None:
    """Loss of the first seed against the tuned field, a panel a model too, a line a budget."""
    of_points = results.losses_of(study, rows)
    panels = [(s, m) for s in study.settings for m in study.models]
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
            shade, color = 0.75 * (1 - (i + 1) / len(study.budgets)), _color(study, model)
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
    for axis in axes[len(panels) :]:
        axis.remove()
    plots.save(fig, path)


def models(study: Study, cells: Sequence[CellRow], path: Path) -> None:
    """Losses at the largest budget, a row a model, a dot a seed: for sweeps and ablations."""
    steps = study.budgets[-1]
    names = [m for m in study.models if any(c["model"] == m for c in cells)][::-1]
    height = max(2.2, 0.6 + 0.24 * len(names))
    fig, axes = plots.figure(1, len(study.settings), height=height, width=5)
    for axis, setting in zip(axes, study.settings):
        for c in cells:
            if (c["setting"], c["steps"]) != (setting, steps):
                continue
            place, color = names.index(c["model"]), plots.COLORS[0]
            finite = [x for x in c["losses"] if x < math.inf]
            axis.plot(finite, [place] * len(finite), "o", color=color, alpha=0.4)
            if len(finite) == c["seeds"]:
                axis.plot(c["loss"], place, "|", color=color, markersize=14)
        axis.set_yticks(range(len(names)), names)
        axis.set(title=setting, xlabel=f"held-out nats a token after {steps:,} steps")
    plots.save(fig, path)
