"""All tables of a run, and its numbers in short."""

from typing import Any

import numpy as np

from ngpt_jax.config import ConfigError
from ngpt_jax.config.fields import SCALES
from ngpt_jax.diagnose import measures
from ngpt_jax.diagnose.measures import Row
from ngpt_jax.diagnose.run_state import RunState, load_text
from ngpt_jax.model.inspect import BLOCKS, HEAD_KERNELS, MLP_KERNELS, TABLES
from ngpt_jax.terminal import format_table

Tables = dict[str, list[Row]]


def measure(run: RunState, layers: list[int] | None, sequences: int) -> tuple[Tables, str]:
    """Rows for every figure, and why some are missing, or nothing.

    Args:
      layers: whose queries and keys are looked at; None: the two in the middle.
      sequences: of held-out text.
    """
    tables: Tables = {
        "embeddings": measures.embeddings(run),
        "condition": measures.condition_numbers(run),
        "scales": measures.scales(run),
        "scale_histograms": measures.scale_histograms(run),
        "query_key": measures.query_and_key(run, layers or middle_layers(run)),
    }
    left_out = "angles, entropy, rotation and gradient are left out"
    try:
        corpus = load_text(run)
        tables["angles"] = measures.angles(run, corpus, sequences)
        tables["entropy"] = measures.attention_entropy(run, corpus, sequences)
        left_out = "rotation and gradient are left out"
        tables["rotation"], tables["gradient"] = measures.rotation_and_gradient(run, corpus)
    except ConfigError as e:
        return tables, f"{run.label}: {left_out}: {e}"
    return tables, ""


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
        what = f"mean |{name}|" if name.startswith("alpha") else f"mean {name}"
        out[what] = _mean(tables["scales"], "mean", scale=name)
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
