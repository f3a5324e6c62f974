"""How a model fares on texts longer than its training windows, RoPE unchanged (figure 13)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ngpt_jax import plots
from ngpt_jax.config import ConfigError
from ngpt_jax.inference.loading import LoadedModel, check_finite

Row = dict[str, Any]
_PER_OCTAVE = 2  # groups of positions


def lengths_of(context: int, factor: int) -> list[int]:
    """context, 2 context, ... to factor * context, which is a power of two times as long."""
    if factor < 1 or factor & (factor - 1):
        raise ConfigError(f"--factor={factor} must be a power of two, 32 for example.")
    return [context << i for i in range(factor.bit_length())]


def cut_windows(documents: Iterable[np.ndarray], eod: int, length: int, most: int) -> np.ndarray:
    """Windows (n, length + 1) that lie within one document each, at most ``most`` of them.

    The first window of a document begins with ``eod``, as in training. What is left at the end of a
    document, and documents that are too short, are left out. Raises ConfigError where none is long
    enough.
    """
    found: list[np.ndarray] = []
    longest = 0
    for document in documents:
        ids = np.concatenate([[eod], document])
        longest = max(longest, len(ids) - 1)
        for start in range(0, len(ids) - length, length):
            found.append(ids[start : start + length + 1])
            if len(found) == most:
                return np.stack(found)
    if not found:
        raise ConfigError(
            f"No document has the {length} tokens of the longest window (the longest document has"
            f" {longest}); give longer ones with --text, or a smaller --factor."
        )
    return np.stack(found)


def score_windows(
    model: LoadedModel,
    windows: np.ndarray,
    lengths: Sequence[int],
    progress: Callable[[float], None] = lambda share: None,
) -> dict[int, np.ndarray]:
    """Nats of every token of the same text, read in windows of each length.

    Args:
      model: to ask.
      windows: (n, longest + 1) ids; a length divides the longest one.
      lengths: of the windows that they are cut into.
      progress: called with the share that is done.

    Returns:
      By length, (n * longest / length, length) nats. Raises ConfigError where they are not finite.
    """
    longest, out = windows.shape[1] - 1, dict[int, np.ndarray]()
    for length in lengths:
        starts = range(0, longest, length)
        rows = [w[i : i + length + 1].tolist() for w, i in itertools.product(windows, starts)]
        batch = max(1, 16 * model.config.model.context // length)
        out[length] = -np.stack([log_probs for log_probs, _ in model.score(rows, batch)])
        check_finite(float(out[length].sum()))
        progress(len(out) / len(lengths))
    return out


def _measured(windows: np.ndarray) -> dict[str, float | None]:
    """Mean, its standard error over windows (n, tokens), and the perplexity."""
    means = windows.mean(axis=1, dtype=np.float64)
    nats = float(means.mean())
    error = float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else None
    return {"nats": nats, "error": error, "perplexity": math.exp(min(nats, 700))}


def by_length(label: str, scored: dict[int, np.ndarray], windows: int) -> list[Row]:
    """A row a length: the mean over the whole text; errors are those over the longest windows."""
    return [
        {"run": label, "length": length, **_measured(nats.reshape(windows, -1))}
        for length, nats in scored.items()
    ]


def by_position(label: str, nats: np.ndarray) -> list[Row]:
    """A row a group of positions of the longest windows (n, length): from ``first`` to ``last``.

    Groups grow by a factor of the square root of 2; positions count from 1, the tokens read.
    """
    length = nats.shape[1]
    steps = _PER_OCTAVE * math.log2(length)
    ends = sorted({round(2 ** (i / _PER_OCTAVE)) for i in range(int(steps) + 1)} | {length})
    rows = []
    for start, end in itertools.pairwise([0, *ends]):
        rows.append({"run": label, "first": start + 1, "last": end,
                     **_measured(nats[:, start:end])})  # fmt: skip
    return rows


def figure(lengths: Sequence[Row], positions: Sequence[Row], contexts: dict[str, int]) -> Any:
    """Perplexity by the length of the window, and by the position in the longest one."""
    fig, axes = plots.figure(1, 2)
    for place, (label, context) in enumerate(contexts.items()):
        look: dict[str, Any] = {"color": plots.COLORS[place], "label": label, "markersize": 4}
        mine = [r for r in lengths if r["run"] == label]
        axes[0].plot(
            [r["length"] for r in mine], [r["perplexity"] for r in mine],
            marker=plots.MARKERS[place], **look,
        )  # fmt: skip
        mine = [r for r in positions if r["run"] == label]
        axes[1].plot(
            [math.sqrt(r["first"] * r["last"]) for r in mine], [r["perplexity"] for r in mine],
            marker=plots.MARKERS[place], **look,
        )  # fmt: skip
        for axis in axes:
            axis.axvline(context, color=plots.COLORS[place], linewidth=0.8, linestyle=":")
    axes[0].set(xlabel="tokens of a window", title="whole windows")
    axes[1].set(xlabel="position in the longest window", title="by position")
    for axis in axes:
        axis.set(xscale="log", yscale="log", ylabel="perplexity a token")
        axis.legend()
    return fig


def table(lengths: Sequence[Row], labels: Sequence[str]) -> list[tuple[str, ...]]:
    """A line a length: perplexity of each run, with the nats a token and their standard error."""
    rows = [("tokens of a window", *labels)]
    for length in dict.fromkeys(r["length"] for r in lengths):
        cells = []
        for label in labels:
            (row,) = [r for r in lengths if (r["run"], r["length"]) == (label, length)]
            error = "" if row["error"] is None else f" ± {row['error']:.3f}"
            cells.append(f"{row['perplexity']:.4g}  ({row['nats']:.3f}{error} nats)")
        rows.append((f"{length:,}", *cells))
    return rows
