"""Writes the tables, sentences and figures of the pages that come from the results.

    python experiments/page.py

On each of PAGES they stand between two marks, the first of which names one of BLOCKS below; the
figures are those of FIGURES, each a PNG and a CSV. Everything is computed from the tables of runs,
experiments/*/results.csv, and two lines of README.md from speedup-length/ and h200/. The suite
compares.
"""

import csv
import dataclasses
import functools
import itertools
import json
import math
import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ngpt_jax import plots
from ngpt_jax.files import write_atomically
from ngpt_jax.study import figures, plan, results, summary
from ngpt_jax.study.plan import Study
from ngpt_jax.study.results import Result
from ngpt_jax.study.summary import CellRow, SpeedUpRow
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
    for draw in FIGURES:
        if path := draw():
            print(path)


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
    """How much of a study has run, and what it cannot find; nothing where all is there."""
    losses = results.losses_of(study, rows)
    left = len(plan.forecast(study, losses))
    if not rows:
        return "not started."
    state = [f"**Not complete**: {len(rows)} of about {len(rows) + left} runs."] if left else []
    return " ".join([*state, *plan.given_up(study, losses)])


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
            ("relative to width 32", "shift", ".2f"),
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
        f"{_interval(line, 'shift', '.2f')} for {name}"
        for model, name in _RULES.items()
        if (line := shifts.get((last, model))) and line["shift"]
    ]
    widths = " to ".join(s.removeprefix("width") for s in (first, last))
    if not parts:
        return _state(study, rows)
    text = f"From width {widths} the best rate changes by a factor of {_enumerate(parts)}. "
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
    of = {c["model"]: c["losses"] for c in summary.cells_of(study, rows)}
    pairs = {"Adam": ("ngpt-ngpt", "gpt_qk-adamw"), "Muon": ("ngpt-muon", "gpt_qk-muon")}
    text = ""
    if all(model in of for pair in pairs.values() for model in pair):
        gains = [statistics.fmean(of[a]) - statistics.fmean(of[b]) for a, b in zip(*pairs.values())]
        apart = {name: _apart(of[a], of[b]) for name, (a, b) in pairs.items()}
        text = (
            f"Muon instead of Adam lowers the loss by {gains[0]:.3f} nats per token for nGPT and by"
            f" {gains[1]:.3f} for GPT with QK-norm. nGPT's loss is higher than GPT's by"
            f" {apart['Adam']} with Adam and by {apart['Muon']} with Muon (mean and standard error"
            " of the seeds' differences). "
        )
    return _paragraph(text + _state(study, rows))


def _apart(a: Sequence[float], b: Sequence[float], sign: str = "") -> str:
    """Mean and standard error of the differences of seeds."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{statistics.fmean(differences):{sign}.3f} ± {error:.3f}"


# --------------------------------------------------------------------------------- the fair table

_TEXTS = {
    "stdlib128": "Python source", "prose128": "prose", "prose1024": "prose, context 1,024",
    "prose128x128": "prose, width 128",
}  # fmt: skip
_ARMS = {
    "ngpt": "nGPT, Adam", "gpt_qk": "GPT with QK-norm, Adam",
    "ngpt_muon": "nGPT, Muon", "gpt_qk_muon": "GPT with QK-norm, Muon",
}  # fmt: skip
_VARIANTS = {
    "": "This table", "long": "130 tokens per parameter", "context": "Context 1,024",
    "width": "Width 128",
}  # fmt: skip
_WIDTHS = {"prose128": 64, "prose128x128": 128}
_PAIRS = {"ngpt": "with Adam", "ngpt_muon": "with Muon"}  # nGPT over GPT with QK-norm
_COSTS = {"steps": "steps", "seconds": "time"}
_STEADY = 0.1  # of its median, at most: by how much the middle half of step times may differ


@functools.cache
def _fair() -> tuple[list[CellRow], list[SpeedUpRow], str]:
    """The cells of fair.py and its variants, the speed-ups over them all, and what is missing."""
    cells, missing = [], []
    studies = {variant: _load("fair", variant) for variant in _VARIANTS}
    timed = [row for _, rows in studies.values() for row in rows]
    for variant, what in _VARIANTS.items():
        study, rows = studies[variant]
        cells += summary.cells_of(study, rows, timed)
        if state := _state(study, rows):
            missing.append(f"{what} (`fair.py{variant and ':' + variant}`): {state}")
    cells.sort(key=lambda c: (list(_TEXTS).index(c["setting"]), c["steps"]))
    busy = {c["setting"] for c in cells if c["seconds_spread"] > _STEADY}
    told = [s for s in _speedups(cells) if s["cost"] == "steps" or s["setting"] not in busy]
    return cells, told, " ".join(missing)


def _speedups(cells: Sequence[CellRow]) -> list[SpeedUpRow]:
    """Of all settings, each with its tokens per parameter and its context."""
    study, _ = _load("fair")
    together = dataclasses.replace(study, settings={s: {} for s in _TEXTS})
    tokens = {(setting, steps): tokens for setting, steps, tokens in _budgets(cells)}
    return [
        s | {
            "tokens_per_parameter": tokens[s["setting"], s["steps"]],
            "context": 1024 if s["setting"] == "prose1024" else 128,
        }
        for s in summary.speedups_of(together, cells)
    ]  # fmt: skip


def _budgets(cells: Sequence[CellRow]) -> list[tuple[str, int, float]]:
    """(setting, steps, tokens per parameter) of the lines of the tables, by the first model."""
    first = {(c["setting"], c["steps"]): c["tokens_per_parameter"] for c in reversed(cells)}
    return [(*key, tokens) for key, tokens in reversed(first.items())]


def _with_rate(c: CellRow) -> str:
    """Mean and standard deviation of the seeds, and the learning rate."""
    if c["loss"] == math.inf:
        return f"diverged ({c['value']:g})"
    return f"{c['loss']:.3f} ± {c['loss_std']:.3f} ({c['value']:g})"


def fair_losses() -> str:
    cells, _, _ = _fair()
    of_cell = {(c["setting"], c["model"], c["steps"]): c for c in cells}

    def loss(setting: str, model: str, steps: int) -> str:
        c = of_cell.get((setting, model, steps))
        return _with_rate(c) if c else "-"

    lines = [
        [_TEXTS[setting], f"{tokens:.0f}", *(loss(setting, m, steps) for m in _ARMS)]
        for setting, steps, tokens in _budgets(cells)
    ]
    return _table(["text", "tokens per parameter", *_ARMS.values()], lines)


def fair_speedups() -> str:
    cells, speedups, _ = _fair()
    shown = {(s["setting"], s["model"], s["steps"], s["cost"]): summary.show(s) for s in speedups}
    lines = [
        [
            _TEXTS[setting], f"{tokens:.0f}",
            *(shown.get((setting, m, steps, c), "-") for m in _PAIRS for c in _COSTS),
        ]
        for setting, steps, tokens in _budgets(cells)
    ]  # fmt: skip
    lines = [line for line in lines if set(line[2:]) != {"-"}]
    head = [f"{name}: in {cost}" for name in _PAIRS.values() for cost in _COSTS.values()]
    return _table(["text", "tokens per parameter", *head], lines)


def fair_state() -> str:
    return _paragraph(_fair()[2])


def _range(values: Sequence[float], digits: str) -> str:
    low, high = (format(x, digits) for x in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _cases() -> dict[tuple[str, int], dict[str, CellRow]]:
    """The cells of each line of the tables that has all models and both speed-ups in steps."""
    cells, speedups, _ = _fair()
    there = Counter(
        (s["setting"], s["steps"])
        for s in speedups
        if s["cost"] == "steps" and s["model"] in _PAIRS
    )
    lines = {
        key: {c["model"]: c for c in cells if (c["setting"], c["steps"]) == key}
        for key, count in there.items()
        if count == len(_PAIRS)
    }
    return {key: line for key, line in lines.items() if set(line) == set(_ARMS)}


def _told(some: Sequence[SpeedUpRow]) -> str:
    """'0.80 to 1.08 (intervals: 5 containing 1, 1 below 1)'."""
    counts = {
        "above 1": sum(s["low"] > 1 for s in some),
        "containing 1": sum(s["low"] <= 1 <= s["high"] for s in some),
        "below 1": sum(s["high"] < 1 for s in some),
    }
    found = ", ".join(f"{n} {where}" for where, n in counts.items() if n)
    return f"{_range([s['speed_up'] for s in some], '.2f')} (intervals: {found})"


def fair_answer() -> str:
    """The answer: who is faster with each optimizer, what Muon does, who is best."""
    cells, speedups, _ = _fair()
    cases = _cases()
    if not cases:
        return ""

    def speed(model: str) -> str:
        mine = [s for s in speedups if s["model"] == model and (s["setting"], s["steps"]) in cases]
        steps, time = ([s for s in mine if s["cost"] == cost] for cost in _COSTS)
        known = f", known in {len(time)} cases" if len(time) < len(steps) else ""
        told = [
            f"{_told(s)} in {name}" for name, s in (("steps", steps), (f"time{known}", time)) if s
        ]
        return f"nGPT's speed-up {_PAIRS[model]} is {' and '.join(told)}."

    def less(a: str, b: str) -> str:
        return _range([line[b]["loss"] - line[a]["loss"] for line in cases.values()], ".3f")

    lengths: dict[str, list[float]] = {}
    for setting, steps, tokens in _budgets(cells):
        if (setting, steps) in cases:
            lengths.setdefault(setting, []).append(tokens)
    where = [f"on {_TEXTS[s]} at {_range(found, '.0f')}" for s, found in lengths.items()]
    best = Counter(min(line, key=lambda m: line[m]["loss"]) for line in cases.values())
    return _paragraph(
        f"There are {len(cases)} cases (lines of [the table](#the-fair-table)),"
        f" {_enumerate(where)} tokens per parameter. {' '.join(map(speed, _PAIRS))} Muon"
        f" instead of Adam lowers the loss of nGPT by {less('ngpt_muon', 'ngpt')} nats per token,"
        f" and that of GPT with QK-norm by {less('gpt_qk_muon', 'gpt_qk')}. The lowest loss is that"
        f" of {_enumerate([f'{_ARMS[m]}, in {n}' for m, n in best.most_common()])} of"
        f" {len(cases)} cases."
    )


def fair_doubts() -> str:
    """What the first seed, which tunes, and the spacing of the rates do to the result."""
    cells, speedups, _ = _fair()

    def change(other_cells: Sequence[CellRow]) -> str:
        both = (
            [s for s in found if s["cost"] == "steps" and s["model"] in _PAIRS]
            for found in (speedups, _speedups(other_cells))
        )
        pairs = list(zip(*both, strict=True))
        changes = [other["speed_up"] - s["speed_up"] for s, other in pairs]
        below = [other["high"] < 1 for s, other in pairs if s["high"] < 1]
        _, (s, other) = max(zip(changes, pairs), key=lambda found: abs(found[0]))
        return (
            f"change by {min(changes):+.2f} to {max(changes):+.2f} (most"
            f" {_PAIRS[s['model']]} on {_TEXTS[s['setting']]} at {s['tokens_per_parameter']:.0f}"
            f" tokens per parameter: {s['speed_up']:.2f} becomes {other['speed_up']:.2f}), and"
            f" {sum(below)} of the {len(below)} intervals below 1 stay below 1"
        )

    def missed(c: CellRow) -> float:
        """How far a parabola through the best rate and its neighbours goes below the best one."""
        below, here, above = (
            c[f"loss_{name}"] for name in ("at_value_below", "first_seed", "at_value_above")
        )
        bend, slope = (below + above) / 2 - here, (above - below) / 2
        return slope**2 / (4 * bend) if max(below, above) < math.inf else 0.0

    of_ngpt, of_gpt = (
        statistics.fmean(missed(c) for c in cells if c["model"].startswith(kind))
        for kind in ("ngpt", "gpt")
    )
    lower = [c | {"losses": [x - missed(c) for x in c["losses"]]} for c in cells]
    return _paragraph(
        "Without the first seed, which was used for tuning, the speed-ups in steps"
        f" {change([c | {'losses': c['losses'][1:]} for c in cells])}. Neighbouring learning rates"
        " differ by a factor of two. A parabola through the losses at the best rate and its two"
        f" neighbours has its minimum on average {of_ngpt:.4f} nats lower for nGPT and"
        f" {of_gpt:.4f} for GPT. With these minima the speed-ups {change(lower)}."
    )


def _course(rows: Sequence[SpeedUpRow], x: str, unit: str) -> str:
    """'with Adam it is 1.05 (...) at 5 tokens and 0.90 (...) at 36, a ratio of 0.86 (...)'.

    Nothing of a model that has but one place on the axis, and no ratio of what is a bound.
    """
    parts = []
    for model, name in _PAIRS.items():
        mine = sorted((s for s in rows if s["model"] == model), key=lambda s: s[x])
        if len(mine) < 2:
            continue
        first, last = mine[0], mine[-1]
        ratio = last["speed_up"] / first["speed_up"]
        # The interval of the ratio, the two taken as independent.
        error = math.exp(math.hypot(*(math.log(s["high"] / s["low"]) / 2 for s in (first, last))))
        of_first, of_last = (f"{summary.show(s)} at {s[x]:,.0f}" for s in (first, last))
        text = f"{name} it is {of_first} {unit} and {of_last}"
        if not first["bound"] + last["bound"]:
            low, high = ratio / error, ratio * error
            text += f", a ratio of {ratio:.2f} ({low:.2f} to {high:.2f})"
            if not low <= 1 <= high:
                text += ", a clear change"
        parts.append(text)
    return "; ".join(parts)


def growth_part() -> str:
    """A sentence for each text that has two budgets or more, and the figure."""
    texts = []
    for setting in ("stdlib128", "prose128"):
        rows = [s for s in _fair()[1] if s["setting"] == setting and s["cost"] == "steps"]
        if course := _course(rows, "tokens_per_parameter", "tokens per parameter"):
            texts.append(f"On {_TEXTS[setting]}, {course}.")
    if not texts:
        return "Speed-up against tokens per parameter: not measured yet."
    picture = "![speed-up in steps against tokens per parameter, a panel a text](fair/growth.png)"
    text = (
        "The speed-up in steps by the length of training, of the shortest and the longest (a change"
        f" is clear where the interval of its ratio excludes 1). {' '.join(texts)}"
    )
    return f"{_paragraph(text)}\n\n{picture}"


def _enumerate(items: Sequence[str]) -> str:
    """'a, b and c'."""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def context_part() -> str:
    rows = [s for s in _at_both_contexts() if s["cost"] == "steps"]
    course = _course(rows, "context", "tokens of context")
    if not course:
        return "Speed-up against the context: not measured yet."
    text = (
        f"The speed-up in steps by the context. On prose at 36 tokens per parameter, {course}. The"
        " ratio is the speed-up at 1,024 over that at 128."
    )
    return f"{_paragraph(text)}\n\n![speed-up in steps against the context](fair/context.png)"


def _at_both_contexts() -> list[SpeedUpRow]:
    both = ("prose128", "prose1024")
    return [s for s in _fair()[1] if s["steps"] == 4080 and s["setting"] in both]


def growth() -> str:
    """Speed-up of nGPT over GPT with QK-norm against tokens per parameter, a panel a text."""
    panels = {
        _TEXTS[setting]: [s for s in _fair()[1] if s["setting"] == setting]
        for setting in ("stdlib128", "prose128")
    }
    return _draw("growth", panels, "tokens_per_parameter", "tokens per parameter")


def context() -> str:
    """The same against the context, on prose at the budget that both contexts have."""
    panels = {f"{_TEXTS['prose128']}, 36 tokens per parameter": _at_both_contexts()}
    return _draw("context", panels, "context", "context (tokens)")


def _draw(name: str, panels: Mapping[str, Sequence[SpeedUpRow]], x: str, label: str) -> str:
    """Draws speed-ups in steps as experiments/fair/NAME.png, with a CSV; returns the path.

    Nothing where there is but one place on the axis.

    Args:
      name: of the files.
      panels: the speed-ups of each panel by its title.
      x: the column of the axis.
      label: of the axis.
    """
    panels = {
        title: [s for s in some if s["cost"] == "steps" and s["model"] in _PAIRS]
        for title, some in panels.items()
    }
    rows = [s for some in panels.values() for s in some]
    if len({s[x] for s in rows}) < 2:
        return ""
    of_models = plots.looks(_load("fair")[0].models)
    looks = {text: of_models[model] for model, text in _PAIRS.items()}
    fig, axes = plots.figure(1, len(panels))
    for axis, (title, some) in zip(axes, panels.items()):
        axis.sharey(axes[0])
        mine = [s | {x: round(s[x])} for s in some]
        lines = {text: [s for s in mine if s["model"] == m] for m, text in _PAIRS.items()}
        figures.bounded(axis, lines, x, looks)
        axis.set(title=title, xlabel=label)
    axes[0].set_ylabel("speed-up of nGPT in steps")
    plots.legend(fig, axes)
    path = ROOT / "experiments" / "fair" / f"{name}.png"
    plots.save(fig, path)
    columns = ["setting", "model", "baseline", "steps", x, "bound", "speed_up", "low", "high"]
    plots.write_csv(path.with_suffix(".csv"), columns, [{c: s[c] for c in columns} for s in rows])
    return str(path.relative_to(ROOT))


# What fair.py:ablation changes, as the page says it.
_PIECES = {
    "ngpt_muon": {
        "": "none",
        "no_projection": "no projection: matrices are on the sphere at the start only",
        "free_weights": "free weights, as GPT has them: neither normalized nor projected",
        "no_qk_norm": "no QK-norm, s_qk only",
        "alpha0.05": "alpha starts at 0.05 (the paper's) instead of 0.2",
        "alpha0.35": "alpha starts at 0.35",
        "alpha0.5+fixed": "no learned step: Norm(h + Norm(f(h))), alpha fixed at 0.5",
        "s_z1": "s_z starts at 1 (the paper's) instead of 10",
        "s_z10+fixed": "s_z fixed at 10",
        "paper_scales": (
            "`scale` of alpha, s_qk and s_z is 1/sqrt(width) (the paper's) instead of 0.5"
        ),
        "warmup10": "warm-up over a tenth of the run instead of none",
    },
    "gpt_qk_muon": {
        "": "none",
        "unit_weights": "unit weights: projected as nGPT's are",
        "decay0.1": "weight decay 0.1 instead of 0",
        "warmup0": "no warm-up instead of a fifth of the run",
    },
}  # fmt: skip


def _ablation() -> dict[str, CellRow]:
    return {c["model"]: c for c in summary.cells_of(*_load("fair", "ablation"))}


def ablation_table() -> str:
    cells, lines = _ablation(), []
    for model, pieces in _PIECES.items():
        for piece, text in pieces.items():
            name = f"{model}{piece and '+' + piece}"
            more = _more(cells, name) if piece else ""
            lines.append([_ARMS[model], text, _with_rate(cells[name]), more])
    return _table(["model", "change", "nats per token (rate)", "difference to unchanged"], lines)


def _more(cells: dict[str, CellRow], name: str) -> str:
    """How much higher the loss is with the change that a name tells."""
    return _apart(cells[name]["losses"], cells[name.partition("+")[0]]["losses"], "+")


def why_part() -> str:
    """What the table of single pieces says, in a paragraph."""
    cells = _ablation()
    more = functools.partial(_more, cells)
    lowest = {m: min(c["loss"] for n, c in cells.items() if n.startswith(m)) for m in _PIECES}
    return _paragraph(
        "No single piece explains why nGPT is behind. Unit weights suit nGPT and do not suit GPT:"
        f" nGPT without the projection is worse ({more('ngpt_muon+no_projection')} nats per token),"
        f" so is nGPT with free weights ({more('ngpt_muon+free_weights')}), and so is GPT with unit"
        f" weights ({more('gpt_qk_muon+unit_weights')}). Where the scales start matters as much:"
        f" in so short a run the paper's start costs {more('ngpt_muon+alpha0.05')} for alpha and"
        f" {more('ngpt_muon+s_z1')} for s_z. QK-norm changes nothing"
        f" ({more('ngpt_muon+no_qk_norm')} without it). A fixed step of 0.5 is no worse than"
        f" learned ones ({more('ngpt_muon+alpha0.5+fixed')}). Nor is either recipe the best of the"
        f" table: GPT gains without warm-up ({more('gpt_qk_muon+warmup0')}). The lowest mean of the"
        f" table is {lowest['ngpt_muon']:.3f} for nGPT and {lowest['gpt_qk_muon']:.3f} for GPT with"
        " QK-norm."
    )


def width_part() -> str:
    """A sentence for each budget that both widths have."""
    by_tokens: dict[int, list[SpeedUpRow]] = {}
    for s in _fair()[1]:
        if s["setting"] in _WIDTHS and s["cost"] == "steps":
            row = s | {"width": _WIDTHS[s["setting"]]}
            by_tokens.setdefault(round(s["tokens_per_parameter"]), []).append(row)
    texts = []
    for tokens, rows in sorted(by_tokens.items()):
        if course := _course(rows, "width", "channels"):
            texts.append(f"At {tokens} tokens per parameter, {course}.")
    if not texts:
        return "Speed-up at twice the width: not measured yet."
    return _paragraph(
        f"The speed-up in steps on prose by the width. {' '.join(texts)} The ratio is the speed-up"
        " at 128 channels over that at 64."
    )


# --------------------------------------------------------------------------------- the quickstart


def _minutes(rows: Sequence[Result]) -> str:
    """The median time from the command to its end, as minutes:seconds."""
    return format_duration(statistics.median(r["seconds"] + r["other_seconds"] for r in rows))


def _quickstart() -> dict[str, list[Result]]:
    """The runs of quickstart.py:finals, by model."""
    study, rows = _load("quickstart", "finals")
    return {m: mine for m in study.models if (mine := [r for r in rows if r["model"] == m])}


def quickstart_table() -> str:
    names = {
        "ngpt": "nGPT, Muon", "gpt": "GPT with QK-norm, Muon, `:gpt`",
        "paper": "nGPT, Adam, `:paper`",
    }  # fmt: skip
    lines = [
        [
            f"{names[model]} ({rows[0]['parameters']:,} parameters)",
            _spread([r["loss"] for r in rows]),
            _spread([r["bits_per_byte"] for r in rows]),
            _minutes(rows),
        ]
        for model, rows in _quickstart().items()
    ]
    return _table(["model", "nats per token", "bits per byte", "minutes"], lines)


# ------------------------------------------------------------------------------------- README.md


def numbers() -> str:
    """The table of README.md."""
    quick = _quickstart()
    bits = {m: _spread([r["bits_per_byte"] for r in rows]) for m, rows in quick.items()}
    minutes = f"{_minutes(quick['ngpt'])}, {_minutes(quick['gpt'])} min:s"
    lines = [
        ["quickstart, bits/byte", f"nGPT {bits['ngpt']}, GPT {bits['gpt']}", minutes],
        *_speedup_lines(),
        _length_line(),
        _h200_line(),
    ]
    return _table(["measured", "result", "note"], lines)


def _speedup_lines() -> list[list[str]]:
    """nGPT over GPT with QK-norm, at the largest budget of each text."""
    lines = []
    texts = {"prose128": "prose", "stdlib128": "Python source"}
    for (setting, text), (model, name) in itertools.product(texts.items(), _PAIRS.items()):
        mine = [s for s in _fair()[1] if (s["setting"], s["model"]) == (setting, model)]
        if not mine:
            continue
        most = max(s["steps"] for s in mine)
        last = {s["cost"]: s for s in mine if s["steps"] == most}
        costs = {name: last[cost] for cost, name in _COSTS.items() if cost in last}
        shown = [f"{name} {summary.show(s)}" for name, s in costs.items()]
        tokens = last["steps"]["tokens_per_parameter"]
        lines.append([
            f"speed-up, {name.removeprefix('with ')}, {text}", ", ".join(shown),
            f"{tokens:.0f} tokens/parameter",
        ])  # fmt: skip
    return lines


def _length_line() -> list[str]:
    found = {}
    for name in ("length", "length_gpt_qk"):
        path = ROOT / "experiments" / "speedup-length" / f"{name}.csv"
        with path.open(encoding="utf-8", newline="") as f:
            for row in csv.DictReader(f):
                found[row["run"].split("-")[1], int(row["length"])] = float(row["perplexity"])
    at = {
        model: ", ".join(f"{found[model, length]:.2f}" for length in (512, 2048))
        for model in ("ngpt", "gpt_qk")
    }
    return [
        "perplexity at 1, 4 times the context",
        f"nGPT {at['ngpt']}; GPT {at['gpt_qk']}",
        "[1 seed](experiments/earlier.md)",
    ]  # fmt: skip


def _h200_line() -> list[str]:
    path = ROOT / "experiments" / "h200" / "train_full_remat.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    return [
        "time of a step, 12 layers of width 768, H200",
        f"nGPT {found['ratios']['ngpt/gpt']:.2f} of GPT without QK-norm",
        f"{found['steps']} steps, older code",
    ]


FIGURES = (growth, context)
BLOCKS: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        transfer_table,
        transfer_sentence,
        recipes_table,
        recipes_sentence,
        fair_losses,
        fair_speedups,
        fair_state,
        fair_answer,
        fair_doubts,
        growth_part,
        context_part,
        ablation_table,
        why_part,
        width_part,
        quickstart_table,
        numbers,
    )
}

if __name__ == "__main__":
    main()
