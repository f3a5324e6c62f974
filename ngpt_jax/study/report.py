"""The report of a study: cells.csv, speedup.csv, plots as PNG, and report.html over them.

The page needs no network and has no scripts; the pictures are inside.
"""

import base64
import html
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ngpt_jax import plots
from ngpt_jax.files import write_atomically
from ngpt_jax.study import figures, plan, results, summary
from ngpt_jax.study.plan import Study
from ngpt_jax.study.results import Result
from ngpt_jax.study.summary import CellRow, SpeedUpRow
from ngpt_jax.terminal import format_duration

_PICTURES = (
    "speedup.png", "loss.png", "transfer.png", "tuning.png",
    *(f"loss_{cost}.png" for cost in figures.COSTS),
)  # fmt: skip
_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; margin: 0; }
main { max-width: 1280px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2rem; }
p { max-width: 75ch; }
/* Shadows at the edges tell that there is more to scroll to; the covers scroll along. */
.wide { overflow-x: auto; background:
  linear-gradient(90deg, #fff 40%, #fff0) 0 / 3rem 100% no-repeat local,
  linear-gradient(270deg, #fff 40%, #fff0) 100% / 3rem 100% no-repeat local,
  linear-gradient(90deg, #0003, #0000) 0 / .6rem 100% no-repeat scroll,
  linear-gradient(270deg, #0003, #0000) 100% / .6rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap;
         border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, th.text, td.text { text-align: left; }
thead th { border-bottom: 2px solid #888; white-space: normal; vertical-align: bottom; }
figure { margin: 1.5rem 0; } figcaption { color: #555; font-size: .875rem; }
img { max-width: 100%; height: auto; }
code { background: #f3f3f3; padding: 0 .2em; overflow-wrap: anywhere; }
@media (max-width: 700px) {
  table { font-size: .75rem; } th, td { padding: .25rem .3rem; white-space: normal; }
  figure .wide img { max-width: none; height: 260px; width: auto; }
  figure .wide img.tall { height: 620px; }
}
"""


def write(experiment: str, study: Study, rows: Sequence[Result], out: Path) -> Path:
    """Writes the report into ``out``, in the place of an older one; returns the page's path.

    The caller has the lock of that folder's table, from before it read the rows.
    """
    rows = results.in_study(study, rows)
    cells = summary.cells_of(study, rows)
    speedups = summary.speedups_of(study, cells)
    captions: dict[str, str] = {}
    for name in ("speedup.csv", "optima.csv", *_PICTURES):
        (out / name).unlink(missing_ok=True)
    lines = [{name: c[name] for name in summary.CELL_COLUMNS} for c in cells]
    plots.write_csv(out / "cells.csv", summary.CELL_COLUMNS, lines)
    if speedups:
        plots.write_csv(out / "speedup.csv", summary.SPEEDUP_COLUMNS, speedups)
        figures.speedups(study, speedups, out / "speedup.png")
        captions["speedup.png"] = (
            "Speed-up at equal loss, by the baseline's budget. An arrow: more (less) than where"
            " it begins; the budgets do not reach so far."
        )
    if cells and len(study.budgets) > 1:
        for cost in figures.costs_to_draw(cells):
            figures.losses(study, cells, cost, out / f"loss_{cost}.png")
            captions[f"loss_{cost}.png"] = (
                f"Held-out loss against {figures.COSTS[cost]}: mean, least and largest of the"
                f" seeds.{_lost(cells)}"
            )
    if cells and len(study.budgets) == 1:
        figures.models(study, cells, out / "loss.png")
        caption = "Held-out loss: a mark for each seed, a bar at their mean."
        captions["loss.png"] = caption + _lost(cells)
    if rows and study.near:
        optima = summary.optima_of(study, rows)
        plots.write_csv(out / "optima.csv", summary.OPTIMUM_COLUMNS, optima)
        figures.transfer(study, rows, optima, out / "transfer.png")
        captions["transfer.png"] = (
            f"Loss against {study.tuned}: the mean of the seeds that ran. A bar spans the"
            " seeds' optima, see optima.csv."
        )
    # With near and one line a model, the figure above has it.
    single = len(study.settings) == len(study.budgets) == len(study.seeds) == 1
    if rows and study.tuned is not None and not (study.near and single):
        figures.tuning(study, rows, out / "tuning.png")
        captions["tuning.png"] = (
            f"Tuning of {study.tuned} with the first seed; what a finished cell took is ringed."
            " Runs that diverged are not drawn."
        )
    path = out / "report.html"
    _write_page(path, experiment, study, rows, cells, speedups, captions)
    return path


def _lost(cells: Sequence[CellRow]) -> str:
    """Says which cells a figure of losses lacks, or shows in part, as runs diverged."""
    lost = [f"{c['setting']} {c['model']} at {c['steps']:,}" for c in cells if c["diverged"]]
    return f" Runs diverged, so the means are not drawn: {', '.join(lost)}." if lost else ""


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], text: int = 2) -> str:
    """A table; the first ``text`` columns are words, the others numbers."""

    def cell(tag: str, place: int, value: Any) -> str:
        kind = ' class="text"' if place < text else ""
        return f"<{tag}{kind}>{html.escape(str(value))}</{tag}>"

    head = "".join(cell("th", i, c) for i, c in enumerate(columns))
    body = "".join(
        "<tr>" + "".join(cell("td", i, v) for i, v in enumerate(row)) + "</tr>\n" for row in rows
    )
    head = f"<thead><tr>{head}</tr></thead>"
    return f'<div class="wide"><table>{head}\n<tbody>\n{body}</tbody></table></div>'


def picture(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    caption = html.escape(caption)
    kind = ' class="tall"' if path.name == "tuning.png" else ""
    return (
        f'<figure><div class="wide"><img{kind} alt="{caption}"'
        f' src="data:image/png;base64,{data}"></div>\n'
        f"<figcaption>{caption} <code>{path.name}</code></figcaption></figure>"
    )


def _loss(x: float | None) -> str:
    return "-" if x is None else "diverged" if x == math.inf else f"{x:.4f}"


def _format(spec: str) -> Callable[[Any], str]:
    return lambda x: "-" if x is None else format(x, spec)


def _loss_table(study: Study, cells: Sequence[CellRow]) -> str:
    tuned = (study.tuned or "").rsplit(".", 1)[-1]
    several, diverged = len(study.seeds) > 1, any(c["diverged"] for c in cells)
    # Column of a cell, its name here, how it is written, whether it is shown.
    columns: list[tuple[str, str, Callable[[Any], str], bool]] = [
        ("setting", "setting", str, True),
        ("model", "model", str, True),
        ("steps", "steps", _format(","), True),
        ("value", tuned, _format("g"), bool(tuned)),
        ("loss", "loss", _loss, True),
        ("loss_min", "least", _loss, several),
        ("loss_max", "largest", _loss, several),
        ("loss_first_seed", "first seed", _loss, bool(tuned)),
        ("loss_at_value_below", f"at {tuned} below", _loss, bool(tuned)),
        ("loss_at_value_above", "above", _loss, bool(tuned)),
        ("bits_per_byte", "bits per byte", _format(".4f"), True),
        ("tokens_per_parameter", "tokens per parameter", _format(".1f"), True),
        ("seconds", "seconds", _format(".0f"), True),
        ("tokens_per_second", "tokens/s", _format(",.0f"), True),
        ("diverged", "diverged", str, diverged),
    ]
    columns = [c for c in columns if c[-1]]
    rows = [[write(cell[column]) for column, _, write, _ in columns] for cell in cells]
    return table([name for _, name, _, _ in columns], rows)


def _speedup_table(speedups: Sequence[SpeedUpRow]) -> str:
    costs = {"steps": "in steps", "flops": "in FLOPs", "seconds": "in time"}
    lines: dict[tuple, dict[str, str]] = {}
    for s in speedups:
        text = summary.show(s)
        line = lines.setdefault((s["setting"], s["model"], s["baseline"], f"{s['steps']:,}"), {})
        line[s["cost"]] = text.replace(" to ", "\u00a0to\u00a0")  # an interval stays on one line
    rows = [[*key, *(line.get(cost, "-") for cost in costs)] for key, line in lines.items()]
    return table(["setting", "model", "over", "its steps", *costs.values()], rows, text=3)


def _write_page(
    page: Path,
    experiment: str,
    study: Study,
    rows: Sequence[Result],
    cells: Sequence[CellRow],
    speedups: Sequence[SpeedUpRow],
    captions: Mapping[str, str],
) -> None:
    """Writes the page.

    Args:
      page: its path; the pictures lie beside it.
      experiment, study: the study.
      rows: the results of all runs.
      cells, speedups: from summary.cells_of and summary.speedups_of.
      captions: of the pictures by file name, in order.
    """
    # The results of one checkout may be made in another one: the ends of the paths decide.
    here, default = page.parent.absolute(), results.default_folder(experiment).absolute()
    usual = here.parts[-2:] == default.parts[-2:]
    elsewhere = "" if usual else f" --out={page.parent}"
    title = study.title or f"Comparison: {experiment}"
    wanted = len(study.settings) * len(study.models) * len(study.budgets)
    seconds = sum(r["seconds"] or 0 for r in rows)
    diverged = sum(r["status"] == "diverged" for r in rows)
    example = results.point_of(rows[0]).name if rows else "NAME"
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts += [f"<p>{html.escape(text)}</p>" for text in study.notes.strip().split("\n\n") if text]
    seeds = "1 seed" if len(study.seeds) == 1 else f"{len(study.seeds)} seeds"
    state = "complete" if len(cells) == wanted else f"so far: {len(cells)} of {wanted} cells"
    lost = plan.given_up(study, results.losses_of(study, rows))
    parts += [f"<p><strong>Not found: {html.escape(line)}</strong></p>" for line in lost]
    parts.append(
        f"<p>{len(rows)} runs ({diverged} diverged), {format_duration(seconds)} of training,"
        f" {seeds}; {state}. Each point is a run of its own with its whole schedule.</p>"
    )
    if speedups:
        interval = (
            f" In brackets a 95 % interval from the spread over {seeds}, within what the budgets"
            " cover; the choice of recipe and tuned value is not in it."
        )
        parts += [
            "<h2>Speed-up at equal loss</h2>",
            "<p>How many times fewer steps (FLOPs, seconds) a model needs than the other one for"
            " one mean loss. At each budget it is the loss of the worse model, or that of the"
            " better one where its curve begins below. Between budgets a monotone"
            " cubic through the losses; &gt; and &lt;: outside of what both cover."
            " Seconds: steps times the median seconds a step of a model's runs of that shape on one"
            " machine."
            f"{interval if len(study.seeds) > 1 else ''}</p>",
            _speedup_table(speedups),
        ]
    parts += [picture(page.parent / name, caption) for name, caption in captions.items()]
    parts += ["<h2>Losses</h2>", _loss_table(study, cells)]
    if study.tuned is not None:
        parts.append(
            f"<p>{html.escape(study.tuned)} is tuned in each cell with seed {study.seeds[0]}, until"
            " the best value has a worse one on either side; all seeds run with the best one.</p>"
        )
    if study.trials:
        parts += [
            "<h2>Trials of the search for the recipes</h2>",
            table(["model", "runs"], list(study.trials.items()), text=1),
        ]
    parts += ["<h2>Made with</h2>", "<ul>"]
    parts += [f"<li>{html.escape(text)}</li>" for text in summary.machines_of(rows)]
    parts += [
        "</ul>",
        "<p>Every run, with the command that makes it: <code>results.csv</code>. Again:"
        f" <code>python -m ngpt_jax.tools.compare --experiment={html.escape(experiment)}"
        f"{html.escape(elsewhere)}</code>;"
        " one run once more, with its loss compared: <code>--check=NAME</code>, e.g."
        f" <code>{html.escape(example)}</code>.</p>",
    ]
    head = (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
    )
    write_atomically(page, head + "\n".join(parts) + "\n</main></body></html>\n")
