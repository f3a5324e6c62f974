"""The paper's figures from a run's checkpoint: matrices, scales, angles, attention, steps.

Examples:
  python -m ngpt_jax.tools.diagnose --workdir=runs/quickstart
  python -m ngpt_jax.tools.diagnose --workdir=runs/ngpt --against=runs/gpt --out=figures
  python -m ngpt_jax.tools.diagnose --workdir=runs/ngpt --step=2000 --layers=3,4 \\
      --config.data.paths=/data/owt_llama2

Each figure is a PNG with its numbers beside it as CSV; a second run is laid over the first.
What is measured on parameters alone needs the checkpoint only. Angles and the entropy of attention
are those on the run's held-out text, rotation and gradients those of its next training batch, with
the optimizer's moments: where the text is not here they are left out, with a line that says why.
--config.NAME=VALUE changes the config of the runs for here: where text and tokenizer lie
(data.paths, data.cache), train.accumulate where a batch does not fit. One device is used.

Layers are counted from 0. Rotation is told at two learning rates: that which the schedule has for
the next step (0 at the end of a cosine), and the peak, optimizer.learning_rate.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging

from ngpt_jax import config_file
from ngpt_jax.config import ConfigError
from ngpt_jax.files import is_remote, reason
from ngpt_jax.tools import diagnose_figures as figures
from ngpt_jax.tools import diagnose_measures as measures
from ngpt_jax.tools import plots
from ngpt_jax.tools.diagnose_measures import Opened, Row
from ngpt_jax.training.diagnostics import HEAD_KERNELS, MLP_KERNELS, SCALES, TABLES
from ngpt_jax.training.layout import format_table

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a training run.")
_AGAINST = flags.DEFINE_string("against", None, "The folder of a run to lay over it.")
_STEP = flags.DEFINE_integer(
    "step", None, "The checkpoint, of both runs; the newest of each by default."
)
_OUT = flags.DEFINE_string("out", None, "Folder for the figures; WORKDIR/diagnose by default.")
_LAYERS = flags.DEFINE_list(
    "layers",
    None,
    "Layers, from 0, whose queries and keys are shown; two in the middle by default.",
)
_WINDOWS = flags.DEFINE_integer(
    "windows", 16, "Held-out windows for angles and attention.", lower_bound=1
)

_KINDS = {"ngpt": "nGPT", "gpt": "GPT"}
Tables = dict[str, list[Row]]

# Name of the files -> how to draw them.
_FIGURES: dict[str, Callable[..., Any]] = {
    "embeddings": figures.embeddings,
    "condition": figures.condition_numbers,
    "scales": figures.scales,
    "scale_histograms": figures.scale_histograms,
    "query_key": figures.query_and_key,
    "angles": figures.angles,
    "entropy": figures.entropy,
    "rotation": figures.rotation,
    "gradient": figures.gradient,
}


def measure(run: Opened, layers: list[int] | None, windows: int) -> tuple[Tables, str]:
    """Rows for every figure, and why some are missing, or nothing.

    Args:
      layers: whose queries and keys are looked at; None: the two in the middle.
      windows: of held-out text.
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
        corpus = measures.load_text(run)
        tables["angles"] = measures.angles(run, corpus, windows)
        tables["entropy"] = measures.attention_entropy(run, corpus, windows)
        left_out = "rotation and gradient are left out"
        tables["rotation"], tables["gradient"] = measures.rotation_and_gradient(run, corpus)
    except ConfigError as e:
        return tables, f"{run.label}: {left_out}: {e}"
    return tables, ""


def middle_layers(run: Opened) -> list[int]:
    middle = (run.config.model.layers - 1) // 2
    return sorted({middle, min(middle + 1, run.config.model.layers - 1)})


# ------------------------------------------------------------------------------ headline numbers


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


def show(runs: list[Opened], numbers: list[dict[str, float | None]]) -> str:
    """A column a run; lines that apply to none are left out."""
    rows: list[tuple[str, ...]] = [("", *(f"{r.label}, step {int(r.state.step)}" for r in runs))]
    for name in numbers[0]:
        values = [n[name] for n in numbers]
        if any(x is not None for x in values):
            rows.append((name, *("-" if x is None else f"{x:.4g}" for x in values)))
    return format_table(rows)


# ----------------------------------------------------------------------------------- the command


def _out_folder(workdir: str) -> Path:
    if _OUT.value is None and is_remote(workdir):
        raise ConfigError(f"--out is needed: figures cannot be written to {workdir}.")
    folder = Path(_OUT.value or Path(workdir).expanduser() / "diagnose")
    config_file.check_output(out=str(folder))
    try:
        folder.mkdir(exist_ok=True)
    except OSError as e:
        raise ConfigError(f"--out={folder} cannot be made: {reason(e)}.") from e
    return folder


def _chosen_layers(least: int) -> list[int] | None:
    """The layers of --layers, where the smaller model has ``least``."""
    if _LAYERS.value is None:
        return None
    if not all(text.isdecimal() for text in _LAYERS.value) or not _LAYERS.value:
        raise ConfigError(f"--layers wants numbers such as 1,2, got {','.join(_LAYERS.value)!r}.")
    layers = sorted({int(text) for text in _LAYERS.value})
    if layers[-1] >= least:
        raise ConfigError(f"--layers: there is no layer {layers[-1]}; the last one is {least - 1}.")
    return layers


def _main(overrides: list[tuple[str, str]]) -> None:
    if _WORKDIR.value is None:
        raise ConfigError("--workdir is needed: the folder of a training run.")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax tells much of what it reads
    plots.require_matplotlib()
    folders = {"workdir": _WORKDIR.value}
    if _AGAINST.value is not None:
        folders["against"] = _AGAINST.value
    found = [
        (path, measures.read_config(flag, path, overrides),
         measures.find_checkpoint(flag, path, _STEP.value))
        for flag, path in folders.items()
    ]  # fmt: skip
    layers = _chosen_layers(min(config.model.layers for _, config, _ in found))
    out = _out_folder(_WORKDIR.value)

    names = [Path(path).name for path in folders.values()]
    if len(set(names)) < len(names):
        names = list(folders.values())
    runs, tables, notes = [], [], []
    for name, (path, config, checkpoint) in zip(names, found):
        run = measures.open_run(f"{_KINDS[config.model.kind]} {name}", path, config, checkpoint)
        measured, note = measure(run, layers, _WINDOWS.value)
        runs.append(run._replace(state=run.state._replace(params=None, opt_state=None)))
        tables.append(measured)
        notes += [note] if note else []
    written = []
    labels = [run.label for run in runs]
    try:
        for name, draw in _FIGURES.items():
            if rows := [row for table in tables for row in table.get(name, [])]:
                plots.write_csv(out / f"{name}.csv", list(rows[0]), rows)
                plots.save(draw(rows, labels), out / f"{name}.png")
                written.append(name)
    except OSError as e:
        raise ConfigError(f"{e.filename or out} cannot be written: {reason(e)}.") from e
    print(show(runs, [headlines(table) for table in tables]))
    for note in notes:
        print(note)
    print(f"{out}: {', '.join(written)} (.png, .csv)")


if __name__ == "__main__":
    config_file.run_command(_main)
