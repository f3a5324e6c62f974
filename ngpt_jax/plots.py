"""Plots as PNG with the numbers beside them as CSV, in one style."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from ngpt_jax.errors import ConfigError
from ngpt_jax.files import write_atomically

# One colour a model; people who cannot tell red from green can tell these (Okabe and Ito).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def run_labels(folders: Sequence[str]) -> list[str]:
    """The names of runs in figures and tables: those of their folders, or whole paths.

    Paths where two folders have the same name. Raises ConfigError where two are the same folder.
    """
    paths = [Path(folder).expanduser().resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ConfigError(
            "--against is the folder of --workdir; give another run, or leave it out."
        )
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else list(map(str, paths))


def figure(rows: int = 1, columns: int = 1, width: float = 4.2, height: float = 3.4) -> Any:
    """(figure, list of its axes), each ``width`` by ``height`` inches."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("agg")  # no display
    style: dict[Any, Any] = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e6e6e6",
        "legend.frameon": False,
        "legend.fontsize": 8,
        "axes.titlesize": 10,
        "axes.labelsize": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
    }
    pyplot.rcParams.update(style)  # not only here: titles and legends are made later
    fig, axes = pyplot.subplots(
        rows, columns, figsize=(columns * width, rows * height), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    return fig, list(axes.flat)


def save(fig: Any, path: epath.PathLike) -> None:
    """Writes a PNG of 64 colours (a third of the bytes), whole or not at all; frees the figure."""
    from matplotlib import pyplot
    from PIL import Image  # matplotlib depends on it

    drawn, picture = io.BytesIO(), io.BytesIO()
    fig.savefig(drawn, dpi=130, format="png")
    pyplot.close(fig)
    Image.open(drawn).convert("RGB").quantize(64).save(picture, "png", optimize=True)
    write_atomically(path, picture.getvalue())


def write_csv(
    path: epath.PathLike, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]
) -> None:
    """Writes rows as CSV with a header: floats in full; None, and what is missing, as nothing."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, out.getvalue())
