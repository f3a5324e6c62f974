"""All tables of a run, and its numbers in short."""

from __future__ import annotations

from typing import Any

import numpy as np

from ngpt_jax.config import ConfigError
from ngpt_jax.diagnose import measures
from ngpt_jax.diagnose.measures import Row
from ngpt_jax.diagnose.run_state import RunState, load_text
from ngpt_jax.model.inspect import HEAD_KERNELS, MLP_KERNELS, SCALES, TABLES
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


def _mean(rows: list[Row], name: str, **wanted: Any) -> float | None:
    values = [r[name] for r in rows if all(r[key] == x for key, x in wanted.items())]
    values = [x for x in values if x is not None]
    return float(np.mean(values)) if values else None


def headlines(tables: Tables) -> dict[str, float | None]:
    """One run's numbers in short; None where they do not apply or were left out."""
    out: dict[str, float | None] = {}
    condition = [r for r in tables["condition"] if r["head"] == "median"]
    for name in (*HEAD_KERNELS, *MLP_KERNELS):
        for column, told in (("condition", ""), ("renormalized", ", renormalized")):
            values = [r[column] for r in condition if r["matrix"] == name]
            known = [x for x in values if x is not None]
            what = f"condition number: {name.removesuffix('_kernel')}{told}"
            out[what] = float(np.median(known)) if known else None
    for table in TABLES:
        short = table.replace("_", " ")
        some = [r for r in tables["embeddings"] if r["table"] == table]
        norms = [r["value"] for r in some if r["quantity"] == "norm"]
        eigen = [r["value"] for r in some if r["quantity"] == "eigenvalue_over_median"]
        out[f"{short}: norms, std / mean"] = float(np.std(norms) / (np.mean(norms) or 1))
        out[f"{short}: largest eigenvalue / median"] = max(eigen)
        out[f"{short}: median cosine"] = float(
            np.median([r["value"] for r in some if r["quantity"] == "cosine"])
        )
    for name in SCALES:
        told = f"mean |{name}|" if name.startswith("alpha") else f"mean {name}"
        out[told] = _mean(tables["scales"], "mean", scale=name)
    angles = tables.get("angles", [])
    for block in ("attention", "mlp"):
        for quantity, told in (("proposal", "h to its proposal"), ("step", "h before to after")):
            what = f"degrees, {block}: {told}"
            out[what] = _mean(angles, "mean", block=block, quantity=quantity)
    out["attention entropy (nats)"] = _mean(tables.get("entropy", []), "nats")
    out["attention entropy / log(visible)"] = _mean(tables.get("entropy", []), "normalized")
    rotation, gradient = tables.get("rotation", []), tables.get("gradient", [])
    groups = (
        ("blocks", (*HEAD_KERNELS, *MLP_KERNELS)),
        *((t.replace("_", " "), (t,)) for t in TABLES),
    )
    for told, names in groups:
        of_group = [r for r in rotation if r["matrix"] in names]
        for rate, at in (("own", "the step's own rate"), ("peak", "the peak rate")):
            out[f"rotation, {told}: degrees a step at {at}"] = _mean(of_group, "mean", rate=rate)
    for told, names in groups:
        parts = [r for r in gradient if r["matrix"] in names]
        radial = sum(r["radial_norm"] ** 2 for r in parts)
        whole = radial + sum(r["tangential_norm"] ** 2 for r in parts)
        out[f"radial share of |gradient|^2, {told}"] = radial / whole if whole else None
    return out


def show(runs: list[RunState], numbers: list[dict[str, float | None]]) -> str:
    """A column a run; lines that apply to none are left out."""
    rows: list[tuple[str, ...]] = [("", *(f"{r.label}, step {int(r.state.step)}" for r in runs))]
    for name in numbers[0]:
        values = [n[name] for n in numbers]
        if any(x is not None for x in values):
            rows.append((name, *("-" if x is None else f"{x:.4g}" for x in values)))
    return format_table(rows)
