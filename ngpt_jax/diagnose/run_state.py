"""A run's checkpoint with the optimizer's moments, and the text that the run reads."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from ngpt_jax.checkpoint.restoring import restore
from ngpt_jax.config import Config, ConfigError
from ngpt_jax.data import pipeline
from ngpt_jax.data.corpus import Corpus, held_out_digest, load_corpus
from ngpt_jax.data.tokenizers.base import check_tokenizer
from ngpt_jax.data.tokenizers.load import with_tokenizer
from ngpt_jax.files import reason
from ngpt_jax.optim import recipes
from ngpt_jax.parallel.backend import enable_x64_if_used
from ngpt_jax.parallel.mesh import make_mesh
from ngpt_jax.terminal import Terminal
from ngpt_jax.training import layout
from ngpt_jax.training.step import TrainState
from ngpt_jax.training.workdir import check_held_out, open_workdir

Batch = dict[str, np.ndarray]


class RunState(NamedTuple):
    """A run as it was at a checkpoint.

    Attributes:
      label: its name in tables and figures.
      workdir: its folder.
      config: resolved.
      state: on the first device here.
      progress: what the checkpoint holds beside the state: the position in the data and so on.
    """

    label: str
    workdir: epath.Path
    config: Config
    state: TrainState
    progress: dict[str, Any]


def read_state(label: str, path: str, config: Config, checkpoint: epath.Path) -> RunState:
    """Reads a checkpoint of the run in the folder ``path``; raises ConfigError."""
    enable_x64_if_used(config.model)
    mesh = make_mesh(config, jax.devices()[:1])
    config, _ = layout.for_mesh(config, mesh)
    like = layout.abstract_state(config, recipes.make_optimizer(config)[0], mesh)
    where = f"{checkpoint} is not of the model and optimizer in {path}/config.json"
    mend = "put the config.json of its run there"
    state, progress = restore(checkpoint, like._asdict(), where, mend)
    return RunState(label, open_workdir(path), config, like._replace(**state), progress)


def load_text(run: RunState) -> Corpus:
    """The run's own text; raises ConfigError where it is not here, or is another one."""
    try:
        config, tokenizer = with_tokenizer(run.config)
        check_tokenizer(tokenizer, run.progress["tokenizer"], "the run")
        corpus = load_corpus(config.data, tokenizer, config.model.context, Terminal())
    except OSError as e:
        raise ConfigError(f"{e.filename or 'the text'} cannot be read: {reason(e)}.") from e
    if corpus.fingerprint != run.progress["data"]:
        raise ConfigError("the text here is not the one that the run was trained on.")
    check_held_out(run.workdir, held_out_digest(corpus), corpus.fingerprint)
    return corpus


def seen_ids(run: RunState, corpus: Corpus) -> np.ndarray:
    """Which token ids the training text has, (vocab_size,) bool; reads it until it had all.

    Rows of other ids tell nothing: they stay as they began, or all move away from every token.
    """
    seen = np.zeros(run.config.model.vocab_size or 0, bool)
    for sequences in corpus.train.values():
        for chunk in sequences.stream.chunks():
            seen[chunk] = True
            if seen.all():
                return seen
    return seen


def held_out_sequences(run: RunState, corpus: Corpus, count: int) -> Iterator[Batch]:
    """The first sequences of the first held-out set, as batches of one."""
    context, mask = run.config.model.context, run.config.data.mask_documents
    return pipeline.eval_batches(corpus.held_out[0], context, 1, count, mask)


def next_batch(run: RunState, corpus: Corpus) -> Batch:
    """The training batch that the run would read next."""
    batches = pipeline.train_batches(
        pipeline.make_dataset(run.config.data, corpus), run.config.train.batch_size,
        run.progress["position"], threads=0, prefetch=1,
    )  # fmt: skip
    try:
        return next(batches)
    finally:
        batches.close()
