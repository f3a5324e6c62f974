"""Scores of a model on tasks and texts: accuracies, perplexities, bits per byte.

They are computed as in EleutherAI's lm-evaluation-harness (0.4.13), without it:

- White space at the end of a context goes to the continuation. Both are encoded together; the ids
  after those of the context alone are the continuation (``TemplateLM._encode_pair``).
- A context that is too long for the model loses its start, so that the continuation fits.
- ``acc`` chooses the continuation with the largest log-probability. ``acc_norm`` first divides it
  by the length in characters, without the space that separates it from the prompt. Of equals the
  first is chosen. For a single continuation, ``acc`` is whether greedy decoding gives it, and
  ``perplexity`` is exp(mean of -log p(continuation)).
- A text is scored in windows of the training context, each token once. A window begins with the
  last token of the one before it, and the last window reaches back as far as it can
  (``get_rolling_token_windows`` with context_len=1).

As in training, a text begins with the end-of-document token. One thing differs: the harness's own
models refuse a continuation longer than the model's context; here it is scored in windows, as a
text is.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ngpt_jax.config import ConfigError
from ngpt_jax.data.corpus import held_out_digest, load_corpus
from ngpt_jax.data.list_files import find_files
from ngpt_jax.data.text import text_files
from ngpt_jax.data.tokenizers.base import Tokenizer
from ngpt_jax.evaluation.tasks import Task
from ngpt_jax.files import reason
from ngpt_jax.inference.loading import Ids, LoadedModel, check_finite
from ngpt_jax.model.transformer import init_params
from ngpt_jax.terminal import Terminal
from ngpt_jax.training import layout
from ngpt_jax.training.workdir import check_held_out, open_workdir

Progress = Callable[[float], None]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[Ids, Ids]:
    """Ids of a context, which begin with the end-of-document token, and of its continuation."""
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole = tokenizer.encode(stripped + continuation)
    start = tokenizer.encode(stripped) if stripped else []
    return [tokenizer.eod, *start], whole[len(start) :]


def rolling_windows(ids: Ids, prefix: int, length: int) -> Iterator[tuple[Ids, int]]:
    """Cuts a text into windows for a model with a context of ``length`` tokens.

    Args:
      ids: of the text.
      prefix: the id before the text.
      length: of the model's context.

    Yields:
      (row, count): at most length + 1 ids, of which the last ``count`` are scored. So each id of
      the text is scored once.
    """
    if len(ids):
        done = min(length, len(ids))
        yield [prefix, *ids[:done]], done
        while done < len(ids):
            end = min(done + length, len(ids))
            yield ids[end - length - 1 : end], end - done
            done = end


def windows(context: Ids, continuation: Ids, length: int) -> list[tuple[Ids, int]]:
    """One (row, count), as of :func:`rolling_windows`, in which the whole continuation is scored.

    Several where the continuation is longer than ``length``.
    """
    if len(continuation) <= length:
        return [([*context, *continuation][-length - 1 :], len(continuation))]
    return list(rolling_windows(continuation, context[-1], length))


class Likelihood(NamedTuple):
    """A continuation's log-probability in nats, and whether greedy decoding gives it."""

    log_prob: float
    greedy: bool


def log_likelihoods(
    model: LoadedModel,
    cut: Sequence[Sequence[tuple[Ids, int]]],
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[Likelihood]:
    """The likelihood of each text, given its windows.

    Args:
      model: that reads them.
      cut: for each text its windows, (row, count) each.
      batch_size: sequences of the training context at one time.
      progress: called with the share that is done.

    Raises ConfigError where a log-probability is not finite.
    """
    rows = [row for some in cut for row, _ in some]
    found = iter(model.score(rows, batch_size, progress))
    out = []
    for some in cut:
        log_prob, greedy = 0.0, True
        for _, count in some:
            log_probs, likeliest = next(found)
            log_prob += float(np.sum(log_probs[len(log_probs) - count :], dtype=np.float64))
            greedy &= bool(np.all(likeliest[len(likeliest) - count :]))
        check_finite(log_prob)
        out.append(Likelihood(log_prob, greedy))
    return out


class Scored(NamedTuple):
    """An example with the likelihoods that a model gives to its continuations.

    Attributes:
      id, label: of the example.
      found: one for each pair.
      lengths: of the continuations in characters, without the task's delimiter.
    """

    id: int | str
    label: int
    found: tuple[Likelihood, ...]
    lengths: tuple[int, ...]

    @property
    def chosen(self) -> int:
        """Index of the continuation with the largest log-probability."""
        return int(np.argmax([f.log_prob for f in self.found]))

    @property
    def chosen_norm(self) -> int:
        """The same with log-probabilities a character."""
        return int(np.argmax([f.log_prob / n for f, n in zip(self.found, self.lengths)]))


def attach(task: Task, found: Sequence[Likelihood]) -> list[Scored]:
    """The examples of a task, with the likelihoods of all their pairs in order."""
    rest = iter(found)
    return [
        Scored(
            example.id,
            example.label,
            tuple(next(rest) for _ in example.pairs),
            tuple(len(text) - len(task.delimiter) for _, text in example.pairs),
        )
        for example in task.examples
    ]


def score_task(
    model: LoadedModel, task: Task, batch_size: int = 16, progress: Progress | None = None
) -> tuple[list[Scored], int]:
    """Each example scored, and how many of them did not fit into the model's context.

    Raises ConfigError for a continuation that the tokenizer merges into its context.
    """
    length = model.config.model.context
    cut, too_long = [], 0
    for example in task.examples:
        pairs = [encode_pair(model.tokenizer, *pair) for pair in example.pairs]
        if not all(continuation for _, continuation in pairs):
            raise ConfigError(
                f"--tasks: {str(task.path)!r}, id {example.id!r}: a continuation has no token of"
                " its own: the tokenizer merges it into the context; begin it with a space."
            )
        too_long += any(len(c) + len(t) > length + 1 for c, t in pairs)
        cut += [windows(c, t, length) for c, t in pairs]
    return attach(task, log_likelihoods(model, cut, batch_size, progress)), too_long


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of zeros and ones, and its standard error sqrt(p (1 - p) / (n - 1)).

    The error is None where there is only one value.
    """
    n, p = len(values), float(np.mean(values))
    return p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None


def perplexity(nats: float) -> float:
    """exp(nats), at most exp(700): JSON knows no infinity."""
    return math.exp(min(nats, 700))


def summarize(task: Task, scored: Sequence[Scored]) -> dict[str, Any]:
    """Scores of a task: examples, acc, acc_stderr, and depending on its kind acc_norm, perplexity.

    Also chance, the score of a blind choice: the mean of 1 / number of choices, None for
    completions.
    """
    out: dict[str, Any] = {"examples": len(scored), "chance": None}
    if task.kind == "completion":
        out["acc"], out["acc_stderr"] = mean_and_error([s.found[0].greedy for s in scored])
        out["perplexity"] = perplexity(-float(np.mean([s.found[0].log_prob for s in scored])))
        return out
    out["chance"] = float(np.mean([1 / len(s.found) for s in scored]))
    out["acc"], out["acc_stderr"] = mean_and_error([s.chosen == s.label for s in scored])
    if task.kind == "choices":  # under several contexts the length is always the same
        right = [s.chosen_norm == s.label for s in scored]
        out["acc_norm"], out["acc_norm_stderr"] = mean_and_error(right)
    return out


def read_text(path: str, text_key: str) -> tuple[list[str], list[str]]:
    """Documents of a file, a folder or a glob of .txt, .jsonl and so on; raises ConfigError.

    Returns:
      The documents, and a line (or none) that counts and names files that are not read.
    """
    holds = functools.partial(text_files.holds_documents, text_key=text_key)
    files, left_out = find_files([path], "--text", text_files.SUFFIXES, holds)
    units = [text_files.read_documents(file, "--text", text_key, "--text_key") for file in files]
    texts = [text for unit in units for text, _ in unit if text]
    if not texts:
        raise ConfigError(f"--text={path} holds no text; give another file.")
    return texts, left_out


def held_out_documents(model: LoadedModel, workdir: str, terminal: Terminal) -> list[np.ndarray]:
    """Token ids of the documents of the held-out sets of the run in a folder.

    Raises ConfigError where they are not here, or where the text here is another one.
    """
    config = model.config
    try:
        corpus = load_corpus(config.data, model.tokenizer, config.model.context, terminal)
        check_held_out(open_workdir(workdir), held_out_digest(corpus), corpus.fingerprint)
    except (ConfigError, OSError) as e:
        raise ConfigError(f"The run's held-out text is not here ({reason(e)}); give --text.") from e
    documents = []
    for held_out in corpus.held_out:
        ids = held_out.stream.read(0, len(held_out.stream))
        documents += np.split(ids, np.flatnonzero(ids == model.tokenizer.eod))
    documents = [ids[ids != model.tokenizer.eod] for ids in documents]
    return [ids for ids in documents if len(ids)]


def score_text(
    model: LoadedModel, texts: Sequence[str], batch_size: int = 16, progress: Progress | None = None
) -> dict[str, Any]:
    """Perplexity per token, and bits per byte, of documents that are read one by one.

    The bytes are those of the UTF-8 that the tokens stand for. The end of a document is not scored
    (in training it is). Raises ConfigError where there are no tokens.
    """
    length, eod = model.config.model.context, model.tokenizer.eod
    ids: list[Any] = [model.tokenizer.encode_batch([text])[0] for text in texts]
    size = sum(model.tokenizer.text_bytes(text, row.tolist()) for text, row in zip(texts, ids))
    if not size:
        raise ConfigError("The texts hold no tokens: there is nothing to score; give others.")
    cut = [list(rolling_windows(row, eod, length)) for row in ids]
    nats = -sum(f.log_prob for f in log_likelihoods(model, cut, batch_size, progress))
    tokens = sum(map(len, ids))
    return {
        "documents": len(texts), "tokens": tokens, "bytes": size, "nats_per_token": nats / tokens,
        "perplexity": perplexity(nats / tokens), "bits_per_byte": nats / math.log(2) / size,
    }  # fmt: skip


def untrained(model: LoadedModel) -> LoadedModel:
    """The model as it was before its training: fresh weights from train.seed."""
    config = model.config.model
    key = jax.random.key(model.config.train.seed)
    out = layout.param_shardings(config, model.mesh)
    with jax.set_mesh(model.mesh):
        params = jax.jit(lambda: init_params(config, key), out_shardings=out)()
    return LoadedModel(model.config, model.tokenizer, params, model.mesh, 0)
