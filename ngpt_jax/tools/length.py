"""Perplexity beyond the training context: by length of the window, and by position in it.

Examples:
  python -m ngpt_jax.tools.length --workdir=runs/ngpt --against=runs/gpt --text=books/
  python -m ngpt_jax.tools.length --workdir=runs/1b --text=pg19.jsonl.gz --factor=8 --windows=64

The same tokens are read in windows of the training context, of twice as many tokens, and so on to
--factor times; RoPE is unchanged (figure 13 of the paper). Windows lie within one document. Without
--text it is the held-out text of the run. Written into --out: length.csv, position.csv, length.png.
--config.NAME=VALUE changes the runs' config for here: where the tokenizer lies (data.tokenizer),
the field of a .jsonl line or column of .parquet that is the text (data.text_key), model.dtype, the
mesh.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from absl import flags, logging

from ngpt_jax import plots
from ngpt_jax.config import ConfigError, command
from ngpt_jax.config.presets import title
from ngpt_jax.data.corpus import load_corpus
from ngpt_jax.evaluation import length as measures
from ngpt_jax.evaluation import scorers
from ngpt_jax.files import reason
from ngpt_jax.inference.loading import LoadedModel, open_model
from ngpt_jax.terminal import Terminal, format_table

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a training run.")
_AGAINST = flags.DEFINE_string("against", None, "The folder of a run to compare it with.")
_TEXT = flags.DEFINE_string(
    "text", None, "A file, folder or glob of .txt, .jsonl, ...; the run's held-out text by default."
)
_FACTOR = flags.DEFINE_integer("factor", 32, "The longest window over the training context.")
_WINDOWS = flags.DEFINE_integer("windows", 32, "Longest windows to read.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "Folder of the results; WORKDIR/length by default.")


def _documents(model: LoadedModel) -> list[np.ndarray]:
    """Token ids of each document."""
    if _TEXT.value is not None:
        texts = scorers.read_text(_TEXT.value, model.config.data.text_key)
        return model.tokenizer.encode_batch(texts)
    try:
        config = model.config
        corpus = load_corpus(config.data, model.tokenizer, config.model.context)
    except (ConfigError, OSError) as e:
        raise ConfigError(f"The run's held-out text is not here ({reason(e)}); give --text.") from e
    documents = []
    for held_out in corpus.held_out:
        ids = held_out.stream.read(0, len(held_out.stream))
        documents += np.split(ids, np.flatnonzero(ids == model.tokenizer.eod))
    return [ids[ids != model.tokenizer.eod] for ids in documents]


def _labels(paths: list[str]) -> list[str]:
    """Names of the folders, or their paths where two have one name."""
    whole = [str(Path(path).expanduser().resolve()) for path in paths]
    if len(set(whole)) < len(whole):
        raise ConfigError(
            "--against is the folder of --workdir; give another run, or leave it out."
        )
    names = [Path(path).name for path in whole]
    return names if len(set(names)) == len(names) else whole


def _main(overrides: list[tuple[str, str]]) -> None:
    if _WORKDIR.value is None:
        raise ConfigError("--workdir is needed: the folder of a training run.")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax tells much of what it reads
    plots.require_matplotlib()
    measures.lengths_of(1, _FACTOR.value)  # refused before models are read
    out = command.output_folder(_WORKDIR.value, _OUT.value, "length")
    folders = {"workdir": _WORKDIR.value} | ({"against": _AGAINST.value} if _AGAINST.value else {})
    labels = _labels(list(folders.values()))
    first, *others = models = [
        open_model(flag, path, None, overrides) for flag, path in folders.items()
    ]
    for other in others:
        if (other.config.model.context, other.tokenizer.fingerprint) != (
            first.config.model.context, first.tokenizer.fingerprint,
        ):  # fmt: skip
            raise ConfigError(
                "--against: the runs were trained with other contexts or tokenizers; compare runs"
                " that share both."
            )
    lengths = measures.lengths_of(first.config.model.context, _FACTOR.value)
    windows = measures.cut_windows(
        _documents(first), first.tokenizer.eod, lengths[-1], _WINDOWS.value
    )
    terminal = Terminal()
    rows, positions, contexts = [], [], {}
    for label, model in zip(labels, models):
        label = f"{title(model.config)} {label}"
        terminal.show(label, 0.0)
        progress = functools.partial(terminal.show, label)
        scored = measures.score_windows(model, windows, lengths, progress)
        rows += measures.by_length(label, scored, len(windows))
        positions += measures.by_position(label, scored[lengths[-1]])
        contexts[label] = model.config.model.context
    terminal.close()
    try:
        plots.write_csv(out / "length.csv", list(rows[0]), rows)
        plots.write_csv(out / "position.csv", list(positions[0]), positions)
        plots.save(measures.figure(rows, positions, contexts), out / "length.png")
    except OSError as e:
        raise ConfigError(f"{e.filename or out} cannot be written: {reason(e)}.") from e
    print(format_table(measures.table(rows, list(contexts))))
    print(f"{len(windows)} windows of {lengths[-1]:,} tokens -> {out}")


if __name__ == "__main__":
    command.run_command(_main)
