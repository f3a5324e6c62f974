"""The report of a study: cells.csv, speedup.csv, plots as PNG, and report.html over them."""

from collections.abc import Sequence
from pathlib import Path

from ngpt_jax import plots
from ngpt_jax.files import lock
from ngpt_jax.study import figures, page, plan, results
from ngpt_jax.study.plan import Study
from ngpt_jax.study.results import Result
from ngpt_jax.study.summary import CELL_COLUMNS, SPEEDUP_COLUMNS, cells_of, speedups_of

_PICTURES = (
    "speedup.png", "loss.png", "tuning.png", *(f"loss_{cost}.png" for cost in figures.COSTS)
)  # fmt: skip


def write(experiment: str, study: Study, rows: Sequence[Result], out: Path) -> Path:
    """Writes the report into ``out``, in the place of an older one; returns the page's path."""
    rows = results.in_study(study, rows)
    cells = cells_of(study, rows)
    speedups = speedups_of(study, cells)
    captions: dict[str, str] = {}
    with lock(out / results.LOCK):  # another program may be writing the report too
        for name in ("speedup.csv", *_PICTURES):
            (out / name).unlink(missing_ok=True)
        plots.write_csv(
            out / "cells.csv", CELL_COLUMNS, [{k: c[k] for k in CELL_COLUMNS} for c in cells]
        )
        if speedups:
            plots.write_csv(out / "speedup.csv", SPEEDUP_COLUMNS, speedups)
            figures.speedups(study, speedups, out / "speedup.png")
            captions["speedup.png"] = "Speed-up at equal loss, by the baseline's budget."
        if cells and len(study.budgets) > 1:
            for cost, name in figures.COSTS.items():
                if all(c[cost] for c in cells):  # else too short to be timed
                    figures.losses(study, cells, cost, out / f"loss_{cost}.png")
                    captions[f"loss_{cost}.png"] = (
                        f"Held-out loss against {name}: mean, least and largest of the seeds."
                    )
        if cells and len(study.budgets) == 1:
            figures.models(study, cells, out / "loss.png")
            captions["loss.png"] = "Held-out loss: each seed a dot, the bar their mean."
        if rows and study.tuned is not None:
            figures.tuning(study, rows, out / "tuning.png")
            captions["tuning.png"] = (
                f"Tuning of {study.tuned} with the first seed; the best one ringed."
            )
        lost = plan.given_up(study, results.losses_of(study, rows))
        path = out / "report.html"
        page.write(path, experiment, study, rows, cells, speedups, captions, lost)
    return path
