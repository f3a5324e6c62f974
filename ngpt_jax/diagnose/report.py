"""All figures and tables of one run, or of one laid over another, and its numbers in short."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ngpt_jax import plots
from ngpt_jax.checkpoint.folder import find_checkpoint
from ngpt_jax.config import ConfigError, command
from ngpt_jax.config.fields import SCALES
from ngpt_jax.config.presets import title
from ngpt_jax.diagnose import figures, measures
from ngpt_jax.diagnose.measures import Row
from ngpt_jax.diagnose.run_state import RunState, load_text, read_state, seen_ids
from ngpt_jax.files import writing
from ngpt_jax.inference.opening import read_config
from ngpt_jax.model.inspect import BLOCKS, HEAD_KERNELS, MLP_KERNELS, TABLES
from ngpt_jax.terminal import format_table

Tables = dict[str, list[Row]]


def diagnose(
    folders: Mapping[str, str],
    step: int | None,
    overrides: Sequence[tuple[str, str]],
    layers: Sequence[str] | None,
    sequences: int,
    out: str | None,
) -> str:
    """Measures runs and draws them, each figure as NAME.png with its numbers in NAME.csv.

    Args:
      folders: of the runs, by the flag that names each.
      step: of the checkpoint of each; None: the newest.
      overrides: (dotted name, text) of config fields.
      layers: whose queries and keys are shown, as text; None: the two in the middle.
      sequences: held-out ones for angles and attention.
      out: the folder; None: diagnose/ in the first run's folder.

    Returns:
      The headlines as a table, why something is missing, and what was written. Raises ConfigError.
    """
    found = [
        (path, read_config(flag, path, overrides), find_checkpoint(flag, path, step))
        for flag, path in folders.items()
    ]
    chosen = _chosen_layers(layers, min(config.model.layers for _, config, _ in found))
    labels = plots.run_labels(list(folders.values()))
    folder = command.output_folder(next(iter(folders.values())), out, "diagnose")
    runs, measured, notes = [], [], []
    for label, (path, config, checkpoint) in zip(labels, found):
        run = read_state(f"{title(config)} {label}", path, config, checkpoint)
        of_run, note = measure(run, chosen, sequences)
        runs.append(run._replace(state=run.state._replace(params=None, opt_state=None)))
        measured.append(of_run)
        notes += [note] if note else []
    written = []
    with writing(folder):
        for name, draw in figures.FIGURES.items():
            if rows := [row for of_run in measured for row in of_run.get(name, [])]:
                plots.write_csv(folder / f"{name}.csv", list(rows[0]), rows)
                plots.save(draw(rows, [run.label for run in runs]), folder / f"{name}.png")
                written.append(name)
    numbers = show(runs, [headlines(of_run) for of_run in measured])
    return "\n".join([numbers, *notes, f"{folder}: {', '.join(written)} (.png, .csv)"])


def _chosen_layers(layers: Sequence[str] | None, count: int) -> list[int] | None:
    """The layers of --layers in order; ``count`` is how many the smaller model has."""
    if layers is None:
        return None
    if not layers or not all(text.isdecimal() for text in layers):
        raise ConfigError(f"--layers wants numbers such as 1,2, got {','.join(layers)!r}.")
    chosen = sorted({int(text) for text in layers})
    if chosen[-1] >= count:
        raise ConfigError(f"--layers: there is no layer {chosen[-1]}; the last one is {count - 1}.")
    return chosen


def measure(run: RunState, layers: list[int] | None, sequences: int) -> tuple[Tables, str]:
    """Rows for every figure, and why some are missing, or nothing.

    Args:
      layers: whose queries and keys are looked at; None: the two in the middle.
      sequences: of held-out text.
    """
    tables: Tables = {
        "condition": measures.condition_numbers(run),
        "scales": measures.scales(run),
        "scale_histograms": measures.scale_histograms(run),
        "query_key": measures.query_and_key(run, layers or middle_layers(run)),
    }
    seen, left_out = None, "angles, entropy, rotation and gradient are left out"
    try:
        corpus = load_text(run)
        seen = seen_ids(run, corpus)
        tables["angles"] = measures.angles(run, corpus, sequences)
        tables["entropy"] = measures.attention_entropy(run, corpus, sequences)
        left_out = "rotation and gradient are left out"
        tables["rotation"], tables["gradient"] = measures.rotation_and_gradient(run, corpus, seen)
        note = ""
    except ConfigError as e:
        note = f"{run.label}: {left_out}: {e}"
    tables["embeddings"] = measures.embeddings(run, seen)
    return tables, note


def middle_layers(run: RunState) -> list[int]:
    middle = (run.config.model.layers - 1) // 2
    return sorted({middle, min(middle + 1, run.config.model.layers - 1)})


def _values(rows: list[Row], name: str, **wanted: Any) -> list[float]:
    """The values of a column, None left out, in rows that have what is wanted in other columns."""
    some = (r for r in rows if all(r[key] == x for key, x in wanted.items()))
    return [r[name] for r in some if r[name] is not None]


def _mean(rows: list[Row], name: str, **wanted: Any) -> float | None:
    values = _values(rows, name, **wanted)
    return float(np.mean(values)) if values else None


def headlines(tables: Tables) -> dict[str, float | None]:
    """One run's numbers in short; None where they do not apply or were left out."""
    out: dict[str, float | None] = {}
    for name in (*HEAD_KERNELS, *MLP_KERNELS):
        for column, suffix in (("condition", ""), ("renormalized", ", renormalized")):
            values = _values(tables["condition"], column, matrix=name, head="median")
            what = f"condition number: {name.removesuffix('_kernel')}{suffix}"
            out[what] = float(np.median(values)) if values else None
    out["token ids that the text does not have, left out"] = tables["embeddings"][0]["ids_left_out"]
    for table in TABLES:
        name = table.replace("_", " ")
        norms, eigenvalues, cosines = (
            _values(tables["embeddings"], "value", table=table, quantity=quantity)
            for quantity in ("norm", "eigenvalue_over_median", "cosine")
        )
        out[f"{name}: norms, std / mean"] = float(np.std(norms) / (np.mean(norms) or 1))
        out[f"{name}: largest eigenvalue / median"] = max(eigenvalues)
        out[f"{name}: median cosine"] = float(np.median(cosines))
    for name in SCALES:
        alpha = name.startswith("alpha")
        column = "mean_abs" if alpha else "mean"
        out[f"mean |{name}|" if alpha else f"mean {name}"] = _mean(
            tables["scales"], column, scale=name
        )
    for block in BLOCKS:
        for quantity, what in (("proposal", "h to its proposal"), ("step", "h before to after")):
            mean = _mean(tables.get("angles", []), "mean", block=block, quantity=quantity)
            out[f"degrees, {block}: {what}"] = mean
    out["attention entropy (nats)"] = _mean(tables.get("entropy", []), "nats")
    out["attention entropy / log(visible)"] = _mean(tables.get("entropy", []), "normalized")
    groups: dict[str, tuple[str, ...]] = {"blocks": (*HEAD_KERNELS, *MLP_KERNELS)}
    groups |= {table.replace("_", " "): (table,) for table in TABLES}
    for group, names in groups.items():
        rotation = [r for r in tables.get("rotation", []) if r["matrix"] in names]
        for rate, at in (("own", "the step's own rate"), ("peak", "the peak rate")):
            out[f"rotation, {group}: degrees a step at {at}"] = _mean(rotation, "mean", rate=rate)
    for group, names in groups.items():
        gradient = [r for r in tables.get("gradient", []) if r["matrix"] in names]
        radial = sum(r["radial_norm"] ** 2 for r in gradient)
        whole = radial + sum(r["tangential_norm"] ** 2 for r in gradient)
        out[f"radial share of |gradient|^2, {group}"] = radial / whole if whole else None
    return out


def show(runs: list[RunState], numbers: list[dict[str, float | None]]) -> str:
    """A column a run; lines that apply to none are left out."""
    rows: list[tuple[str, ...]] = [("", *(f"{r.label}, step {int(r.state.step)}" for r in runs))]
    for name in numbers[0]:
        values = [n[name] for n in numbers]
        if any(x is not None for x in values):
            rows.append((name, *("-" if x is None else f"{x:.4g}" for x in values)))
    return format_table(rows)
