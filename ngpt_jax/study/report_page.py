"""One HTML page of a study: no network, no scripts, pictures inside."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ngpt_jax.files import write_atomically
from ngpt_jax.study import savings
from ngpt_jax.study.plan import Study
from ngpt_jax.terminal import format_duration

Row = Mapping[str, Any]

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


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], text: int = 2) -> str:
    """A table; the first ``text`` columns are words, the others numbers."""

    def cell(tag: str, place: int, value: Any) -> str:
        kind = ' class="text"' if place < text else ""
        return f"<{tag}{kind}>{html.escape(str(value))}</{tag}>"

    head = "".join(cell("th", i, c) for i, c in enumerate(columns))
    body = "".join(
        "<tr>" + "".join(cell("td", i, v) for i, v in enumerate(row)) + "</tr>\n" for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>'
        "</div>"
    )


def picture(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    caption = html.escape(caption)
    kind = ' class="tall"' if path.name == "tuning.png" else ""
    return (
        f'<figure><div class="wide"><img{kind} alt="{caption}"'
        f' src="data:image/png;base64,{data}"></div>\n'
        f"<figcaption>{caption} <code>{path.name}</code></figcaption></figure>"
    )


def _number(x: Any, form: str) -> str:
    return "-" if x is None else format(x, form)


def _loss(x: float | None) -> str:
    return "-" if x is None else "diverged" if x == math.inf else f"{x:.4f}"


def _loss_table(study: Study, cells: Sequence[Row]) -> str:
    tuned = (study.tuned or "").rsplit(".", 1)[-1]
    names = {"steps": "steps"}
    if tuned:
        names |= {"value": tuned}
    names |= {"loss": "loss"}
    if len(study.seeds) > 1:
        names |= {"loss_min": "least", "loss_max": "largest"}
    if tuned:
        names |= {
            "loss_first_seed": "first seed",
            "loss_at_value_below": f"at {tuned} below",
            "loss_at_value_above": "above",
        }
    names |= {
        "bits_per_byte": "bits a byte",
        "tokens_per_parameter": "tokens a parameter",
        "seconds": "seconds",
        "tokens_per_second": "tokens/s",
    }
    if any(c["diverged"] for c in cells):
        names |= {"diverged": "diverged"}
    forms = {
        "steps": ",", "tokens_per_parameter": ".1f", "value": "g", "bits_per_byte": ".4f",
        "seconds": ".0f", "tokens_per_second": ",.0f", "diverged": "",
    }  # fmt: skip

    def show(cell: Row, name: str) -> str:
        return _number(cell[name], forms[name]) if name in forms else _loss(cell[name])

    rows = [[c["setting"], c["model"], *(show(c, name) for name in names)] for c in cells]
    return table(["setting", "model", *names.values()], rows)


def _speedup_table(study: Study, speedups: Sequence[Row]) -> str:
    by = {(s["setting"], s["model"], s["steps"], s["cost"]): s for s in speedups}
    keys = list(dict.fromkeys((s["setting"], s["model"], s["steps"]) for s in speedups))
    columns = ["setting", "model", f"steps of {study.baseline}", "in steps", "in FLOPs", "in time"]

    def show(key: tuple, cost: str) -> str:
        s = by.get((*key, cost))
        if s is None:
            return "-"
        text = savings.show(savings.SpeedUp(s["speed_up"], s["bound"], s["low"], s["high"]))
        return text.replace(" to ", "\u00a0to\u00a0")  # an interval stays on one line

    rows = [
        [k[0], k[1], f"{k[2]:,}", *(show(k, c) for c in ("steps", "flops", "seconds"))]
        for k in keys
    ]
    return table(columns, rows)


def write(
    page: Path,
    experiment: str,
    study: Study,
    rows: Sequence[Row],
    cells: Sequence[Row],
    speedups: Sequence[Row],
    pictures: Mapping[str, str],
    lost: Sequence[str],
) -> None:
    """Writes the page.

    Args:
      page: its path; pictures lie beside it.
      experiment, study: the study.
      rows: of all runs.
      cells, speedups: from report.cells_of and report.speedups_of.
      pictures: caption by file name, in order.
      lost: what was not found, a line each.
    """
    from ngpt_jax.study.report import facts_of
    from ngpt_jax.study.results import default_folder

    # Runs may be made in one checkout for the results of another: the name of the folder decides.
    usual = page.parent.name == default_folder(experiment).name
    elsewhere = "" if usual else f" --out={page.parent}"
    title = study.title or f"Comparison: {experiment}"
    wanted = len(study.settings) * len(study.models) * len(study.budgets)
    seconds = sum(r["seconds"] or 0 for r in rows)
    diverged = sum(r["status"] == "diverged" for r in rows)
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts += [f"<p>{html.escape(text)}</p>" for text in study.notes.strip().split("\n\n") if text]
    seeds = "1 seed" if len(study.seeds) == 1 else f"{len(study.seeds)} seeds"
    state = "complete" if len(cells) == wanted else f"so far: {len(cells)} of {wanted} cells"
    parts += [f"<p><strong>Not found: {html.escape(line)}</strong></p>" for line in lost]
    parts.append(
        f"<p>{len(rows)} runs ({diverged} diverged), {format_duration(seconds)} of training,"
        f" {seeds}; {state}. Each point is a run of its own with its whole schedule.</p>"
    )
    if speedups:
        parts += [
            "<h2>Speed-up at equal loss</h2>",
            f"<p>How many times fewer steps (FLOPs, seconds) a model needs for the mean loss that"
            f" {html.escape(str(study.baseline))} reaches at a budget: straight lines between"
            " budgets in the logarithm of the cost; &gt; and &lt;: outside of what they cover."
            " Seconds: steps times the median seconds a step of a model's runs in that setting."
            + (
                f" In brackets a 95 % bootstrap interval over {seeds}, within what"
                " the budgets cover; with so few seeds it is rough."
                if len(study.seeds) > 1
                else ""
            )
            + "</p>",
            _speedup_table(study, speedups),
        ]
    parts += [picture(page.parent / name, caption) for name, caption in pictures.items()]
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
    parts += [f"<li>{html.escape(text)}</li>" for text in facts_of(rows)]
    parts += [
        "</ul>",
        "<p>Every run, with the command that makes it: <code>results.csv</code>. Again:"
        f" <code>python -m ngpt_jax.tools.compare --experiment={html.escape(experiment)}"
        f"{html.escape(elsewhere)}</code>;"
        " one run once more, with its loss compared: <code>--check=NAME</code>, e.g."
        f" <code>{html.escape(_example(rows))}</code>.</p>",
    ]
    write_atomically(
        page,
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n",
    )


def _example(rows: Sequence[Row]) -> str:
    from ngpt_jax.study.results import point_of

    return point_of(dict(rows[0])).name if rows else "NAME"
