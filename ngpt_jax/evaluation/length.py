"""Perplexity of texts longer than the training context, RoPE unchanged (figure 13 of the paper)."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ngpt_jax import plots
from ngpt_jax.config import ConfigError, command
from ngpt_jax.config.presets import title
from ngpt_jax.evaluation.scorers import held_out_documents, read_text, rolling_windows
from ngpt_jax.files import writing
from ngpt_jax.inference.loading import LoadedModel, check_finite, open_model
from ngpt_jax.terminal import Terminal, format_table

LengthRow = dict[str, Any]  # a line of length.csv or position.csv
_PER_OCTAVE = 2  # groups of positions


def compare(
    folders: Mapping[str, str],
    overrides: Sequence[tuple[str, str]],
    text: str | None,
    text_key: str | None,
    factor: int,
    most: int,
    out: str | None,
) -> str:
    """Measures one or two runs on the same tokens; writes length.csv, position.csv, length.png.

    Args:
      folders: of the runs, by the flag that names each.
      overrides: (dotted name, text) of config fields.
      text: a file, a folder or a glob; None: the first run's held-out text.
      text_key: the field or column that holds the text; None: that of the first run's config.
      factor: the longest sequence over the training context, a power of two.
      most: the longest sequences to read, at most.
      out: the folder; None: length/ in the first run's folder.

    Returns:
      The table and where the files lie. Raises ConfigError.
    """
    lengths_of(1, factor)  # refused before models are read
    folder = command.output_folder(next(iter(folders.values())), out, "length")
    labels = plots.run_labels(list(folders.values()))
    terminal = Terminal()
    with terminal.doing("loading the models"):
        models = [open_model(flag, path, None, overrides) for flag, path in folders.items()]
    first = models[0]
    if len({(m.config.model.context, m.tokenizer.fingerprint) for m in models}) > 1:
        raise ConfigError(
            "--against: the runs were trained with different contexts or tokenizers; compare runs"
            " that share both."
        )
    context, eod = first.config.model.context, first.tokenizer.eod
    lengths = lengths_of(context, factor)
    documents = _documents(first, next(iter(folders.values())), text, text_key, terminal)
    sequences = cut_sequences(documents, eod, lengths[-1], most)
    rows, positions, names = [], [], []
    for label, model in zip(labels, models):
        names.append(label := f"{title(model.config)} {label}")
        terminal.show(label, 0.0)
        progress = functools.partial(terminal.show, label)
        scored = score_lengths(model, sequences, lengths, progress)
        rows += by_length(label, scored, len(sequences))
        positions += by_position(label, scored[lengths[-1]])
    terminal.close()
    with writing(folder):
        plots.write_csv(folder / "length.csv", list(rows[0]), rows)
        plots.write_csv(folder / "position.csv", list(positions[0]), positions)
        plots.save(figure(rows, positions, names, context), folder / "length.png")
    summary = f"{len(sequences)} sequences of {lengths[-1]:,} tokens -> {folder}"
    return f"{format_table(table(rows, names))}\n{summary}"


def _documents(
    model: LoadedModel, workdir: str, text: str | None, text_key: str | None, terminal: Terminal
) -> list[np.ndarray]:
    """Token ids of each document; says which files are not read."""
    if text is not None:
        texts, left_out = read_text(text, text_key or model.config.data.text_key)
        for line in left_out:
            terminal.say(line)
        return model.tokenizer.encode_batch(texts)
    return held_out_documents(model, workdir, terminal)


def lengths_of(context: int, factor: int) -> list[int]:
    """context, 2 context, ... to factor * context; ``factor`` is a power of two."""
    if factor < 1 or factor & (factor - 1):
        raise ConfigError(f"--factor={factor} must be a power of two, 32 for example.")
    return [context << i for i in range(factor.bit_length())]


def cut_sequences(documents: Iterable[np.ndarray], eod: int, length: int, most: int) -> np.ndarray:
    """Sequences (n, length + 1), each of one document, at most ``most`` of them.

    The first one of a document begins with ``eod``, as in training. What is left at the end of a
    document, and documents that are too short, are left out. Raises ConfigError where none is long
    enough.
    """
    found, longest = [], 0
    for ids in documents:
        longest = max(longest, len(ids))
        found += [row for row, count in rolling_windows(ids, eod, length) if count == length]
        if len(found) >= most:
            break
    if not found:
        raise ConfigError(
            f"No document has the {length} tokens of the longest sequence (the longest document has"
            f" {longest}); give longer ones with --text, or a smaller --factor."
        )
    return np.array(found[:most])


def score_lengths(
    model: LoadedModel,
    sequences: np.ndarray,
    lengths: Sequence[int],
    progress: Callable[[float], None] = lambda share: None,
) -> dict[int, np.ndarray]:
    """Nats of every token of the same text, read in sequences of each length.

    Args:
      model: that reads them.
      sequences: (n, longest + 1) ids; each length divides ``longest``.
      lengths: of the sequences that they are cut into.
      progress: called with the share that is done.

    Returns:
      By length, (n * longest / length, length) nats. Raises ConfigError where they are not finite.
    """
    out = dict[int, np.ndarray]()
    for length in lengths:
        rows = [row for ids in sequences for row, _ in rolling_windows(ids[1:], ids[0], length)]
        batch_size = max(1, 16 * model.config.model.context // length)
        out[length] = -np.stack([log_probs for log_probs, _ in model.score(rows, batch_size)])
        check_finite(float(out[length].sum()))
        progress(len(out) / len(lengths))
    return out


def _measured(nats: np.ndarray) -> dict[str, float | None]:
    """Mean of nats (n, tokens), its standard error over the n sequences, and the perplexity."""
    means = nats.mean(axis=1, dtype=np.float64)
    mean = float(means.mean())
    error = float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else None
    return {"nats": mean, "error": error, "perplexity": math.exp(min(mean, 700))}


def by_length(label: str, scored: dict[int, np.ndarray], count: int) -> list[LengthRow]:
    """A row a length: the mean over the text, its error over the ``count`` longest sequences."""
    return [
        {"run": label, "length": length, **_measured(nats.reshape(count, -1))}
        for length, nats in scored.items()
    ]


def by_position(label: str, nats: np.ndarray) -> list[LengthRow]:
    """A row a group of positions of the longest sequences (n, length), ``first`` to ``last``.

    Positions count from 1. Groups grow by a factor of the square root of 2.
    """
    length = nats.shape[1]
    steps = _PER_OCTAVE * math.log2(length)
    ends = sorted({round(2 ** (i / _PER_OCTAVE)) for i in range(int(steps) + 1)} | {length})
    return [
        {"run": label, "first": start + 1, "last": end, **_measured(nats[:, start:end])}
        for start, end in itertools.pairwise([0, *ends])
    ]


def figure(
    lengths: Sequence[LengthRow],
    positions: Sequence[LengthRow],
    labels: Sequence[str],
    context: int,
) -> Any:
    """Perplexity by the length of the sequence, and by the position in the longest one."""
    fig, axes = plots.figure(1, 2)
    for label, look in plots.looks(labels).items():
        for axis, rows in zip(axes, (lengths, positions)):
            mine = [r for r in rows if r["run"] == label]
            x = [r["length"] if "length" in r else math.sqrt(r["first"] * r["last"]) for r in mine]
            y = [r["perplexity"] for r in mine]
            axis.plot(x, y, label=label, markersize=4, **look._asdict())
    axes[0].set(xlabel="tokens of a sequence", title="whole sequences")
    axes[1].set(xlabel="position in the longest sequence", title="by position")
    for axis in axes:
        axis.axvline(context, color="black", linewidth=0.8, linestyle=":")
        axis.set_ylabel("perplexity per token")
        plots.log_ticks(axis.yaxis)
    plots.log_ticks(axes[0].xaxis, [r["length"] for r in lengths])
    plots.log_ticks(axes[1].xaxis)
    plots.legend(fig, axes)
    return fig


def table(lengths: Sequence[LengthRow], labels: Sequence[str]) -> list[tuple[str, ...]]:
    """A line a length: perplexity of each run, with the nats per token and their standard error."""
    lines = [("tokens of a sequence", *labels)]
    for length in dict.fromkeys(r["length"] for r in lengths):
        cells = []
        for label in labels:
            (row,) = [r for r in lengths if (r["run"], r["length"]) == (label, length)]
            error = "" if row["error"] is None else f" ± {row['error']:.3f}"
            cells.append(f"{row['perplexity']:.4g}  ({row['nats']:.3f}{error} nats)")
        lines.append((f"{length:,}", *cells))
    return lines
