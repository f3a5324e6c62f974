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

from absl import flags, logging

from ngpt_jax import plots
from ngpt_jax.config import ConfigError, command
from ngpt_jax.config.presets import title
from ngpt_jax.diagnose import figures, measures
from ngpt_jax.diagnose import tables as tables_lib
from ngpt_jax.files import reason
from ngpt_jax.inference import opening

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
        (path, opening.read_config(flag, path, overrides),
         opening.find_checkpoint(flag, path, _STEP.value))
        for flag, path in folders.items()
    ]  # fmt: skip
    layers = _chosen_layers(min(config.model.layers for _, config, _ in found))
    out = command.output_folder(_WORKDIR.value, _OUT.value, "diagnose")

    names = [Path(path).name for path in folders.values()]
    if len(set(names)) < len(names):
        names = list(folders.values())
    runs, tables, notes = [], [], []
    for name, (path, config, checkpoint) in zip(names, found):
        run = measures.open_run(f"{title(config)} {name}", path, config, checkpoint)
        measured, note = tables_lib.measure(run, layers, _WINDOWS.value)
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
    print(tables_lib.show(runs, [tables_lib.headlines(table) for table in tables]))
    for note in notes:
        print(note)
    print(f"{out}: {', '.join(written)} (.png, .csv)")


if __name__ == "__main__":
    command.run_command(_main)
