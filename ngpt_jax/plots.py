"""Plots as PNG with the numbers beside them as CSV, in one style."""

import csv
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from ngpt_jax.errors import ConfigError
from ngpt_jax.files import write_atomically

# People who cannot tell red from green can tell these (Okabe and Ito).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_OWN = ("ngpt", "gpt", "gpt_qk")  # models that look the same in all figures
_MOST_TICKS = 7
_DIGITS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7))  # of ticks in each decade


class Look(NamedTuple):
    color: str
    marker: str


def looks(names: Iterable[str]) -> dict[str, Look]:
    """How each model or run is drawn, by its name.

    nGPT, GPT and GPT with QK-norm (a name that is the kind or begins with it, as "nGPT myrun") have
    a look of their own, whatever their order; the others get the looks after these. Colours return
    after 7 names, with another marker.
    """
    places, free, count = dict[str, int](), itertools.count(len(_OWN)), len(COLORS)
    for name in dict.fromkeys(names):
        kind = name.split(" ")[0].lower()
        own = kind in _OWN and _OWN.index(kind) not in places.values()
        places[name] = _OWN.index(kind) if own else next(free)
    return {
        n: Look(COLORS[i % count], MARKERS[(i + i // count) % count]) for n, i in places.items()
    }


def short(x: float) -> str:
    """1234 -> 1,234 and 1234567 -> 1.23M."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(x) >= size:
            return f"{x / size:.3g}{unit}"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def log_ticks(axis: Any, values: Iterable[float] = ()) -> None:
    """Makes an x or y axis logarithmic; its ticks are plain numbers that do not overlap.

    Args:
      axis: its limits are final.
      values: where ticks are wanted; none: at round numbers.
    """
    from matplotlib import ticker

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = sorted(axis.get_view_interval())
    decades = [10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    choices = [[d * e for e in decades for d in digits] for digits in _DIGITS]
    choices.append(list(ticker.MaxNLocator(4).tick_values(low, high)))  # for less than a decade
    inside = [[x for x in choice if low <= x <= high] for choice in choices]
    wanted = sorted(set(values)) or next((c for c in inside if len(c) > 2), inside[-1])
    least = (high / low) ** (1 / (_MOST_TICKS + 0.5))  # the factor between neighbours
    ticks = wanted[:1]
    for x in wanted:
        if x >= ticks[-1] * least:
            ticks.append(x)
    axis.set_ticks(ticks, [short(x) for x in ticks])
    axis.set_minor_locator(ticker.NullLocator())


def legend(fig: Any, axes: Sequence[Any]) -> None:
    """One legend for all panels, below them."""
    named: dict[str, Any] = {}
    for panel in axes:
        named |= {name: handle for handle, name in zip(*panel.get_legend_handles_labels())}
    if named:
        fits = int(fig.get_figwidth() * 15 / (8 + max(map(len, named))))  # of 8 points
        columns = max(1, min(len(named), fits))
        fig.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns)


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
