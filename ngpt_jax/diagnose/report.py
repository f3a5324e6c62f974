"""All figures and tables of one run, or of one laid over another, written into a folder."""

from collections.abc import Mapping, Sequence

from ngpt_jax import plots
from ngpt_jax.checkpoint.folder import find_checkpoint
from ngpt_jax.config import ConfigError, command
from ngpt_jax.config.presets import title
from ngpt_jax.diagnose import figures, tables
from ngpt_jax.diagnose.run_state import read_state
from ngpt_jax.files import writing
from ngpt_jax.inference.opening import read_config


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
    plots.require_matplotlib()
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
        of_run, note = tables.measure(run, chosen, sequences)
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
    headlines = tables.show(runs, [tables.headlines(of_run) for of_run in measured])
    return "\n".join([headlines, *notes, f"{folder}: {', '.join(written)} (.png, .csv)"])


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
