"""The figures of ``diagnose``, each from the rows of its table; a colour and a marker a run."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ngpt_jax import plots
from ngpt_jax.model.inspect import BLOCKS, HEAD_KERNELS, MLP_KERNELS, TABLES

Rows = list[dict[str, Any]]
Draw = Callable[[Any, Rows, str, str], None]  # (axes, one run's rows, its label, its colour)

_KERNELS = (*HEAD_KERNELS, *MLP_KERNELS)
_DEPTH = "layer / (layers - 1)"


def _only(rows: Rows, **wanted: Any) -> Rows:
    return [r for r in rows if all(r[name] == value for name, value in wanted.items())]


def _column(rows: Rows, name: str) -> np.ndarray:
    return np.array([math.nan if r[name] is None else r[name] for r in rows], float)


def _title(name: str) -> str:
    return name.removesuffix("_kernel").replace("_", " ")


def _runs(rows: Rows, labels: Sequence[str]) -> Iterator[tuple[Rows, str, str]]:
    """(rows, label, colour) of each run that has some."""
    for label, look in plots.looks(labels).items():
        if own := _only(rows, run=label):
            yield own, label, look.color


def _marker(color: str) -> str:
    return plots.MARKERS[plots.COLORS.index(color)]


def _line(axes: Any, rows: Rows, name: str, color: str, **how: Any) -> None:
    axes.plot(
        _column(rows, "depth"), _column(rows, name), color=color, marker=_marker(color), ms=3, **how
    )


def _band(axes: Any, rows: Rows, low: str, high: str, color: str, x: str = "depth") -> None:
    where = _column(rows, x)
    axes.fill_between(where, _column(rows, low), _column(rows, high), color=color, alpha=0.15, lw=0)


def _from_zero(axes: Any) -> None:
    top = axes.dataLim.y1
    axes.set_ylim(0, 1.07 * top if math.isfinite(top) and top > 0 else 1)


def embeddings(rows: Rows, labels: Sequence[str]) -> Any:
    """Norms, eigenvalues and cosines of both tables (figure 4)."""
    fig, axes = plots.figure(len(TABLES), 3)
    quantities = {
        "norm": ("norm of a row", "row, sorted"),
        "eigenvalue_over_median": ("covariance: eigenvalue / median", "eigenvalue, sorted"),
        "cosine": ("cosine of two rows", "pair, sorted"),
    }
    for i, (table, quantity) in enumerate((t, q) for t in TABLES for q in quantities):
        what, sorted_ = quantities[quantity]
        log = quantity == "eigenvalue_over_median"
        some = _only(rows, table=table, quantity=quantity)
        for own, label, color in _runs(some, labels):
            values = _column(own, "value")
            # A logarithmic axis cannot show eigenvalues of 0.
            values = np.where(values > 0, values, math.nan) if log else values
            left_out = own[0]["ids_left_out"]
            label = f"{label} without {left_out:,} ids never seen" if left_out else label
            axes[i].plot(_column(own, "position"), values, color=color, label=label)
        axes[i].set(title=_title(table), xlabel=f"{sorted_} (0 to 1)", ylabel=what)
        if log:
            found = _column(some, "value")
            low, high = min(found[found > 0], default=1), max(found, default=1)
            axes[i].set(ylim=(min(0.1, low / 1.3), max(10, 1.3 * high)))
            plots.log_ticks(axes[i].yaxis)
        if quantity == "norm":
            axes[i].set_ylim(0, 1.1 * max(_column(some, "value").max(), 1))
    plots.legend(fig, axes)
    return fig


def condition_numbers(rows: Rows, labels: Sequence[str]) -> Any:
    """Median over heads by depth; dotted with the vectors renormalized (figures 5 and 10)."""
    fig, axes = plots.figure(2, 4, 3.2, 2.8)
    # One scale for all panels; infinite values are not shown.
    found = np.concatenate([_column(rows, name) for name in ("condition", "renormalized")])
    top = max(found[np.isfinite(found)], default=1)
    for panel, name in zip(axes, _KERNELS):
        for own, label, color in _runs(_only(rows, matrix=name, head="median"), labels):
            _line(panel, own, "condition", color, label=label)
            if own[0]["renormalized"] is not None:
                again = f"{label}, renormalized"
                _line(panel, own, "renormalized", color, ls=":", label=again)
        panel.set(title=_title(name), xlabel=_DEPTH, ylabel="condition number")
        panel.set(ylim=(1, 1.3 * max(10, top)))
        plots.log_ticks(panel.yaxis)
    axes[-1].set_axis_off()
    plots.legend(fig, axes)
    return fig


def scales(rows: Rows, labels: Sequence[str]) -> Any:
    """Means by depth (figure 6); alphas have a sign where the model gives them one."""
    fig, axes = plots.figure(1, 3, 3.8, 3.2)
    alphas = [r for r in rows if r["scale"].startswith("alpha")]
    signed = any(r["mean"] < r["mean_abs"] for r in alphas)
    alpha = "alpha" if signed else "|alpha|"
    panels = {alpha: ("alpha_a", "alpha_m"), "s_qk": ("s_qk",), "s_u, s_v": ("s_u", "s_v")}
    for panel, (what, names) in zip(axes, panels.items()):
        quantity = "mean" if what == "alpha" else "mean_abs"
        for name, style in zip(names, ("-", "--")):
            for own, label, color in _runs(_only(rows, scale=name), labels):
                _line(panel, own, quantity, color, ls=style, label=f"{label}: {name}")
        panel.set(title=f"mean {what}", xlabel=_DEPTH)
        if quantity == "mean":
            panel.axhline(0, color="black", lw=0.5)
        else:
            _from_zero(panel)
        if panel.lines:
            panel.legend()
    return fig


def scale_histograms(rows: Rows, labels: Sequence[str]) -> Any:
    """Densities over channels, a line a layer, first layers dark (figures 6 and 14)."""
    from matplotlib import colormaps

    runs = [label for label in labels if _only(rows, run=label)]
    names = list(dict.fromkeys(r["scale"] for r in rows))
    columns = 3
    fig, axes = plots.figure(-(-len(runs) * len(names) // columns), columns, 3.6, 2.6)
    for i, (run, name) in enumerate((run, name) for run in runs for name in names):
        own = _only(rows, run=run, scale=name)
        layers = list(dict.fromkeys(r["layer"] for r in own))
        for j, layer in enumerate(layers):
            some = _only(own, layer=layer)
            color = colormaps["viridis"](0.9 * j / max(len(layers) - 1, 1))
            edges = [*_column(some, "from"), some[-1]["to"]]
            ends = layer is not None and j in (0, len(layers) - 1)
            label = f"layer {layer}" if ends else None
            axes[i].stairs(_column(some, "density"), edges, color=color, label=label)
        axes[i].set(title=f"{run}: {name}" if len(runs) > 1 else name, xlabel=name)
        if i % columns == 0:
            axes[i].set_ylabel("density")
            axes[i].legend()
    for empty in axes[len(runs) * len(names) :]:
        empty.set_axis_off()
    return fig


def query_and_key(rows: Rows, labels: Sequence[str]) -> Any:
    """Norms of vectors and singular values of heads in chosen layers (figures 11 and 12)."""
    chosen = sorted({(r["layer"], r["matrix"]) for r in rows}, key=lambda c: (c[0], c[1][0] == "k"))
    fig, axes = plots.figure(2, len(chosen), 3.4, 3.0)
    for i, (layer, matrix) in enumerate(chosen):
        norms, singular = (
            _only(rows, layer=layer, matrix=matrix, quantity=quantity)
            for quantity in ("norm", "singular_value")
        )
        above, below = axes[i], axes[i + len(chosen)]
        for own, label, color in _runs(norms, labels):
            above.plot(_column(own, "position"), _column(own, "value"), color=color, label=label)
        for own, _, color in _runs(singular, labels):
            label = f"condition {own[0]['median_condition']:.3g}"
            below.plot(_column(own, "position"), _column(own, "value"), color=color, label=label)
            _band(below, own, "least", "greatest", color, x="position")
        above.set(title=f"layer {layer}: {_title(matrix)}", xlabel="vector, sorted (0 to 1)")
        _from_zero(above)
        below.set(xlabel="singular value, sorted (0 to 1)")
        if max(_column(singular, "greatest")) > 0:
            plots.log_ticks(below.yaxis)
        below.legend()
    axes[0].set_ylabel("norm along embed")
    axes[len(chosen)].set_ylabel("singular value, median and\nrange over heads")
    plots.legend(fig, axes[: len(chosen)])
    return fig


def angles(rows: Rows, labels: Sequence[str]) -> Any:
    """Mean and 10 % to 90 % of tokens: angle to the proposal above, of the step below."""
    fig, axes = plots.figure(2, 2, 4.2, 2.8)
    panels = [(quantity, block) for quantity in ("proposal", "step") for block in BLOCKS]
    for panel, (quantity, block) in zip(axes, panels):
        for own, label, color in _runs(_only(rows, quantity=quantity, block=block), labels):
            _line(panel, own, "mean", color, label=label)
            _band(panel, own, "p10", "p90", color)
        between = "h and its proposal" if quantity == "proposal" else "h before and after"
        panel.set(title=block, xlabel=_DEPTH, ylabel=f"degrees: {between}")
        _from_zero(panel)
    plots.legend(fig, axes)
    return fig


def entropy(rows: Rows, labels: Sequence[str]) -> Any:
    """A point a head, the line is the mean over heads."""
    fig, axes = plots.figure(1, 2)
    titles = {"nats": "entropy (nats)", "normalized": "entropy / log(visible positions)"}
    for panel, (name, what) in zip(axes, titles.items()):
        for own, label, color in _runs(rows, labels):
            where, values = _column(own, "depth"), _column(own, name)
            panel.scatter(where, values, color=color, s=8, alpha=0.5, lw=0)
            places = np.unique(where)
            means = [values[where == place].mean() for place in places]
            panel.plot(places, means, color=color, label=label)
        panel.set(title="attention", xlabel=_DEPTH, ylabel=what)
        _from_zero(panel)
    plots.legend(fig, axes)
    return fig


def _by_matrix(rows: Rows, labels: Sequence[str], draw: Draw, tables: Draw, what: str) -> Any:
    """A panel for each kernel of a block by depth, and one for both tables."""
    fig, axes = plots.figure(2, 4, 3.2, 2.8)
    for panel, name in zip(axes, _KERNELS):
        for own, label, color in _runs(_only(rows, matrix=name), labels):
            draw(panel, own, label, color)
        panel.set(title=_title(name), xlabel=_DEPTH, ylabel=what)
    for own, label, color in _runs([r for r in rows if r["matrix"] in TABLES], labels):
        tables(axes[-1], own, label, color)
    axes[-1].set(title="embeddings", ylabel=what, xlim=(-0.5, 1.5))
    axes[-1].set_xticks([0, 1], [_title(name).split()[0] for name in TABLES])
    for panel in axes:
        _from_zero(panel)
    plots.legend(fig, axes)
    return fig


def rotation(rows: Rows, labels: Sequence[str]) -> Any:
    """Degrees a step at the peak rate, mean and 10 % to 90 % of vectors; dashed at the own rate."""

    def draw(panel, own, label, color):
        peak, now = _only(own, rate="peak"), _only(own, rate="own")
        _line(panel, peak, "mean", color, label=f"{label}, peak rate")
        _band(panel, peak, "p10", "p90", color)
        _line(panel, now, "mean", color, ls="--", label=f"{label}, rate of the step")

    def tables(panel, own, _, color):
        for rate, fill in (("peak", color), ("own", "none")):
            some = _only(own, rate=rate)
            mean, low, high = (_column(some, name) for name in ("mean", "p10", "p90"))
            where = np.arange(len(some)) + 0.15 * plots.COLORS.index(color)
            panel.plot(where, mean, color=color, ls="", marker=_marker(color), mfc=fill)
            if rate == "peak":
                panel.vlines(where, low, high, color=color, alpha=0.4)

    return _by_matrix(rows, labels, draw, tables, "degrees a step")


def gradient(rows: Rows, labels: Sequence[str]) -> Any:
    """Share of the gradient's squared norm that is radial."""

    def draw(panel, own, label, color):
        _line(panel, own, "radial_share", color, label=label)

    def tables(panel, own, _, color):
        values = _column(own, "radial_share")
        panel.plot(range(len(values)), values, color=color, ls="", marker=_marker(color))

    return _by_matrix(rows, labels, draw, tables, "radial share of |g|^2")


# How the rows of each table are drawn, by the name of its files.
FIGURES: dict[str, Callable[[Rows, Sequence[str]], Any]] = {
    "embeddings": embeddings, "condition": condition_numbers,
    "scales": scales, "scale_histograms": scale_histograms, "query_key": query_and_key,
    "angles": angles, "entropy": entropy,
    "rotation": rotation, "gradient": gradient,
}  # fmt: skip
