"""Writes the tables and sentences of the pages that come from the results.

    python experiments/page.py

On each of PAGES they stand between two marks, the first of which names one of BLOCKS below.
Everything is computed from the tables in experiments/. The suite compares.
"""

import csv
import json
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from ngpt_jax.files import write_atomically
from ngpt_jax.study import plan, results, summary
from ngpt_jax.study.plan import Study
from ngpt_jax.study.results import Result
from ngpt_jax.terminal import format_duration

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "experiments/README.md")
_MARKED = re.compile(r"(<!-- page\.py: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """A page with what stands between its marks made anew."""
    return _MARKED.sub(lambda m: m[1] + BLOCKS[m[2]]() + "\n" + m[3], text)


def main() -> None:
    for name in PAGES:
        page = ROOT / name
        old = page.read_text(encoding="utf-8")
        new = filled(old)
        if new != old:
            write_atomically(page, new)
        print(f"{name}: {len(_MARKED.findall(new))} parts{'' if new == old else ', changed'}")


def _load(name: str, variant: str = "") -> tuple[Study, list[Result]]:
    """A study of this folder and its finished runs."""
    spec = str(ROOT / "experiments" / f"{name}.py") + (variant and f":{variant}")
    return results.load_study(spec), results.read(results.default_folder(spec) / "results.csv")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[f" {cell} " if cell else " " for cell in line] for line in (head, *rows)]
    cells.insert(1, ["---"] * len(head))
    return "\n".join(f"|{'|'.join(line)}|" for line in cells)


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)


def _spread(losses: Sequence[float]) -> str:
    """Mean, least and largest of the seeds."""
    return f"{statistics.fmean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"


def _state(study: Study, rows: Sequence[Result]) -> str:
    """How much of a study has run; nothing where all has."""
    left = len(plan.forecast(study, results.losses_of(study, rows)))
    return f"**Not complete**: {len(rows)} of about {len(rows) + left} runs." if left else ""


# ------------------------------------------------------------------------------- the learning rate

_RULES = {"ngpt": "nGPT", "nugpt": "nuGPT", "root_width": "`root_width`"}


def _interval(line: dict, name: str, digits: str) -> str:
    value, low, high = (format(line[name + part], digits) for part in ("", "_low", "_high"))
    return f"{value} ({low} to {high})"


def transfer_table() -> str:
    study, rows = _load("lr_transfer")
    optima = {(o["setting"], o["model"]): o for o in summary.optima_of(study, rows)}
    lowest = _lowest(study, rows)
    lines = []
    for model, name in _RULES.items():
        mine = [optima.get((setting, model)) for setting in study.settings]
        for label, column, digits in (
            (f"{name}: best rate", "optimum", ".2g"),
            ("over that at width 32", "shift", ".2f"),
        ):
            found = (_interval(o, column, digits) if o and o[column] else "-" for o in mine)
            lines.append([label, *found])
    for model, name in _RULES.items():
        mine = (lowest.get((setting, model)) for setting in study.settings)
        lines.append([f"{name}: lowest loss", *("-" if x is None else f"{x:.3f}" for x in mine)])
    return _table(["", *(s.replace("width", "width ") for s in study.settings)], lines)


def _lowest(study: Study, rows: Sequence[Result]) -> dict[tuple[str, str], float]:
    """The lowest mean over all seeds of a setting and model."""
    losses, out = results.losses_of(study, rows), {}
    for cell, runs in plan.chosen(study, losses).items():
        means = []
        for value in {p.value for p in plan.around(study, cell, runs[0].value)}:
            seeds = [
                losses.get(runs[0]._replace(value=value, seed=s), math.inf) for s in study.seeds
            ]
            means.append(statistics.fmean(seeds))
        out[cell[:2]] = min(means)
    return out


def transfer_sentence() -> str:
    study, rows = _load("lr_transfer")
    first, *_, last = study.settings
    shifts = {(o["setting"], o["model"]): o for o in summary.optima_of(study, rows)}
    parts = [
        f"to {_interval(line, 'shift', '.2f')} of its start for {name}"
        for model, name in _RULES.items()
        if (line := shifts.get((last, model))) and line["shift"]
    ]
    widths = " to ".join(s.removeprefix("width") for s in (first, last))
    text = f"From width {widths} the best number goes {', '.join(parts)}. " if parts else ""
    return _paragraph(text + _state(study, rows))


# ------------------------------------------------------------------------------------- the recipes

_RECIPES = {
    "ngpt": "Adam (`ngpt`, `adamw`)", "muon": "Muon (`muon`)", "ngpt2026": "`ngpt2026`",
    "adamh": "AdamH (`adamh`)", "muonh": "MuonH (`muonh`)", "lion": "Lion (`lion`)",
    "sgd": "SGD with momentum (`sgd`)",
}  # fmt: skip


def recipes_table() -> str:
    study, rows = _load("recipes")
    cells = {c["model"]: c for c in summary.cells_of(study, rows)}

    def cell(model: str) -> tuple[str, str]:
        if model not in study.models:
            return "", ""
        c = cells.get(model)
        if c is None:
            return "-", "-"
        return (_spread(c["losses"]) if c["loss"] < math.inf else "diverged"), f"{c['value']:g}"

    lines = []
    for recipe, name in _RECIPES.items():
        of_gpt = "adamw" if recipe == "ngpt" else recipe
        lines.append([name, *cell(f"ngpt-{recipe}"), *cell(f"gpt_qk-{of_gpt}")])
    return _table(["recipe", "nGPT", "rate", "GPT with QK-norm", "rate"], lines)


def recipes_sentence() -> str:
    study, rows = _load("recipes")
    loss = {c["model"]: c["loss"] for c in summary.cells_of(study, rows)}
    pairs = {"Adam": ("ngpt-ngpt", "gpt_qk-adamw"), "Muon": ("ngpt-muon", "gpt_qk-muon")}
    text = ""
    if all(model in loss for pair in pairs.values() for model in pair):
        gains = [loss[a] - loss[b] for a, b in zip(*pairs.values())]
        apart = {name: loss[a] - loss[b] for name, (a, b) in pairs.items()}
        text = (
            f"Muon instead of Adam is worth {gains[0]:.3f} nats a token to nGPT and {gains[1]:.3f}"
            f" to GPT with QK-norm. nGPT's loss is above GPT's by {apart['Adam']:.3f} with Adam and"
            f" by {apart['Muon']:.3f} with Muon. "
        )
    return _paragraph(text + _state(study, rows))


# --------------------------------------------------------------------------------- the quickstart


def _minutes(rows: Sequence[Result]) -> str:
    """The median time from the command to its end, as minutes:seconds."""
    return format_duration(statistics.median(r["seconds"] + r["other_seconds"] for r in rows))


def _quickstart() -> dict[str, list[Result]]:
    """The runs of quickstart.py:finals, by model."""
    study, rows = _load("quickstart", "finals")
    return {m: [r for r in rows if r["model"] == m] for m in study.models}


def quickstart_table() -> str:
    names = {"ngpt": "nGPT", "gpt": "GPT with QK-norm, `:gpt`"}
    lines = [
        [
            f"{names[model]} ({rows[0]['parameters']:,} parameters)",
            _spread([r["loss"] for r in rows]),
            _spread([r["bits_per_byte"] for r in rows]),
            _minutes(rows),
        ]
        for model, rows in _quickstart().items()
    ]
    return _table(["model", "nats a token", "bits a byte", "minutes"], lines)


# ------------------------------------------------------------------------------------- README.md


def numbers() -> str:
    """The table of README.md."""
    quick = _quickstart()
    bits = {m: _spread([r["bits_per_byte"] for r in rows]) for m, rows in quick.items()}
    minutes = f"{_minutes(quick['ngpt'])} and {_minutes(quick['gpt'])} minutes"
    lines = [
        ["quickstart, bits a byte", f"{bits['ngpt']}; QK-norm {bits['gpt']}", minutes],
        *_speedup_lines(),
        _length_line(),
        _h200_line(),
    ]
    return _table(["measured", "nGPT", "caveat"], lines)


def _speedup_lines() -> list[list[str]]:
    """The models of speedup.py over its GPT, at its largest budget."""
    study, rows = _load("speedup")
    found = {
        (s["setting"], s["model"], s["cost"]): s
        for s in summary.speedups_of(study, summary.cells_of(study, rows))
        if s["steps"] == study.budgets[-1]
    }

    lines = []
    names = {"prose128": "prose at 128", "prose512": "prose at 512", "stdlib128": "source at 128"}
    for setting, name in names.items():
        steps, time = (
            summary.show_row(found[setting, "ngpt", cost]) for cost in ("steps", "seconds")
        )
        of_qk = (f"{found[setting, 'gpt_qk', c]['speed_up']:.2f}" for c in ("steps", "seconds"))
        lines.append([
            f"speed-up, {name}", f"{steps} in steps, {time} in time", f"QK-norm {', '.join(of_qk)}",
        ])  # fmt: skip
    return lines


def _length_line() -> list[str]:
    found = {}
    for name in ("length", "length_gpt_qk"):
        path = ROOT / "experiments" / "speedup-length" / f"{name}.csv"
        with path.open(encoding="utf-8", newline="") as f:
            for row in csv.DictReader(f):
                found[row["run"].split("-")[1], int(row["length"])] = float(row["perplexity"])
    at = {model: f"{found[model, 2048]:.1f}" for model in ("ngpt", "gpt", "gpt_qk")}
    return [
        "perplexity at 4 times the training context",
        f"{at['ngpt']}; QK-norm {at['gpt_qk']}; GPT {at['gpt']}", "one run each",
    ]  # fmt: skip


def _h200_line() -> list[str]:
    path = ROOT / "experiments" / "h200" / "train_full_remat.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    return [
        "time of a step, 12 layers of width 768, H200",
        f"{found['ratios']['ngpt/gpt']:.2f} times GPT's",
        f"{found['steps']} steps of older code; never trained",
    ]


BLOCKS: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        transfer_table,
        transfer_sentence,
        recipes_table,
        recipes_sentence,
        quickstart_table,
        numbers,
    )
}

if __name__ == "__main__":
    main()
