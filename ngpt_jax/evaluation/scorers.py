"""What a model makes of tasks and of texts: accuracies, perplexities, bits per byte.

All as EleutherAI's lm-evaluation-harness has it (0.4.13), without it:

- White space at the end of a context goes to the continuation; both are encoded together, and what
  comes after the ids of the context alone is the continuation (``TemplateLM._encode_pair``).
- What is too long for the model loses its start, so that the continuation fits.
- ``acc`` chooses the continuation with the largest log-probability, ``acc_norm`` divides it by the
  length in characters first, the space that sets it off from the prompt not counted; of equals
  the first is chosen. Where there is one continuation, ``acc`` asks whether greedy decoding gives
  it, and ``perplexity`` is exp(mean of -log p(continuation)).
- A text is scored in windows of the training context, each token once: a window begins with the
  last token of the one before it, and the last one reaches back as far as it can
  (``get_rolling_token_windows`` with context_len=1).

As in training, a text begins with the end-of-document token. Only a continuation that is longer
than the model's context is another matter: the harness's own models refuse it, here it is scored
in windows as a text is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ngpt_jax.config import ConfigError
from ngpt_jax.data.list_files import find_files
from ngpt_jax.data.text import text_files
from ngpt_jax.data.tokenizers.base import Tokenizer, utf8
from ngpt_jax.evaluation.tasks import Task
from ngpt_jax.inference.loading import LoadedModel, check_finite
from ngpt_jax.model.transformer import init_params
from ngpt_jax.training import layout

Ids = Sequence[int]
Progress = Callable[[float], None]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[Ids, Ids]:
    """Ids of a context, the end-of-document token first, and of its continuation."""
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole = tokenizer.encode(stripped + continuation)
    start = tokenizer.encode(stripped) if stripped else []
    return [tokenizer.eod, *start], whole[len(start) :]


def rolling_windows(ids: Ids, prefix: int, length: int) -> Iterator[tuple[Ids, int]]:
    """Cuts a text for a model with a context of ``length`` tokens, so that each id counts once.

    Args:
      ids: of the text.
      prefix: the id before it.
      length: of the model's context.

    Yields:
      (row, count): at most length + 1 ids, and how many of the last of them count.
    """
    if len(ids):
        done = min(length, len(ids))
        yield [prefix, *ids[:done]], done
        while done < len(ids):
            end = min(done + length, len(ids))
            yield ids[end - length - 1 : end], end - done
            done = end


def windows(context: Ids, continuation: Ids, length: int) -> list[tuple[Ids, int]]:
    """(row, count) as in :func:`rolling_windows`; one in which all of the continuation counts.

    Several where the continuation is longer than ``length``.
    """
    if len(continuation) <= length:
        return [([*context, *continuation][-length - 1 :], len(continuation))]
    return list(rolling_windows(continuation, context[-1], length))


class Likelihood(NamedTuple):
    """Of a continuation: its log-probability in nats, and whether greedy decoding gives it."""

    log_prob: float
    greedy: bool


def log_likelihoods(
    model: LoadedModel,
    cut: Sequence[Sequence[tuple[Ids, int]]],
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[Likelihood]:
    """What a model gives to texts that were cut into windows, (row, count) each.

    Args:
      model: to ask.
      cut: the windows of each text.
      batch_size: windows of the training context at one time.
      progress: called with the share done.

    Raises ConfigError where the model gives no finite number.
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
    """An example and what a model made of it.

    Attributes:
      id, label: of the example.
      found: of each of its pairs.
      lengths: of the continuations in characters, the task's delimiter not counted.
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
    """The examples of a task with what was found for their pairs, one after the other."""
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
    """Each example as the model sees it, and how many did not fit into its context.

    Raises ConfigError for a continuation that the tokenizer merges into its context.
    """
    length = model.config.model.context
    cut, too_long = [], 0
    for example in task.examples:
        pairs = [encode_pair(model.tokenizer, *pair) for pair in example.pairs]
        if not all(continuation for _, continuation in pairs):
            raise ConfigError(
                f"--tasks: {str(task.path)!r}, id {example.id!r}: a continuation has no token of"
                " its own, the tokenizer merges it into the context; begin it with a space."
            )
        too_long += any(len(c) + len(t) > length + 1 for c, t in pairs)
        cut += [windows(c, t, length) for c, t in pairs]
    return attach(task, log_likelihoods(model, cut, batch_size, progress)), too_long


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of zeros and ones and its standard error, sqrt(p (1 - p) / (n - 1)).

    None where there is one value alone.
    """
    n, p = len(values), float(np.mean(values))
    return p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None


def perplexity(nats: float) -> float:
    """exp(nats), inf where that is too large a number."""
    return math.exp(nats) if nats < 700 else math.inf


def summarize(task: Task, scored: Sequence[Scored]) -> dict[str, Any]:
    """Scores of a task: examples, acc, acc_stderr, and by kind acc_norm, perplexity, chance.

    chance is what choosing blindly gives, the mean of 1 / number of choices; None for completions.
    """
    out: dict[str, Any] = {"examples": len(scored), "chance": None}
    if task.kind == "completion":
        out["acc"], out["acc_stderr"] = mean_and_error([s.found[0].greedy for s in scored])
        out["perplexity"] = perplexity(-float(np.mean([s.found[0].log_prob for s in scored])))
        return out
    out["chance"] = float(np.mean([1 / len(s.found) for s in scored]))
    out["acc"], out["acc_stderr"] = mean_and_error([s.chosen == s.label for s in scored])
    if task.kind == "choices":  # under contexts the continuation is the same, and so its length
        right = [s.chosen_norm == s.label for s in scored]
        out["acc_norm"], out["acc_norm_stderr"] = mean_and_error(right)
    return out


def table(task: Task, scored: Sequence[Scored]) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows, an example each: what was chosen, the label, log-probabilities."""
    if task.kind == "completion":
        rows: list[dict[str, Any]] = [
            {"id": s.id, "greedy": int(s.found[0].greedy), "log_prob": s.found[0].log_prob}
            for s in scored
        ]
        return ["id", "greedy", "log_prob"], rows
    most = max(len(s.found) for s in scored)
    norm = ["chosen_norm"] if task.kind == "choices" else []
    rows = [
        {"id": s.id, "chosen": s.chosen, "chosen_norm": s.chosen_norm, "label": s.label}
        | {f"log_prob_{i}": f.log_prob for i, f in enumerate(s.found)}
        for s in scored
    ]
    columns = ["id", "chosen", *norm, "label", *(f"log_prob_{i}" for i in range(most))]
    return columns, [{c: row[c] for c in columns if c in row} for row in rows]


def read_text(path: str, text_key: str) -> list[str]:
    """Documents of a file, a folder or a glob of .txt, .jsonl and so on; raises ConfigError."""
    texts = [
        text
        for file in find_files([path], "--text", text_files.SUFFIXES)
        for text, _ in text_files.read_documents(file, "--text", text_key, "--text_key")
    ]
    if not texts:
        raise ConfigError(f"--text={path} holds no text; give another file.")
    return texts


def score_text(
    model: LoadedModel,
    texts: Sequence[str],
    batch_size: int = 16,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity a token, and bits a byte of UTF-8, over documents that are read one by one.

    The end of a document does not count, in nats or in bytes (in training it counts in the nats).
    """
    length, eod = model.config.model.context, model.tokenizer.eod
    ids: list[Any] = [model.tokenizer.encode_batch([text])[0] for text in texts]
    cut = [list(rolling_windows(row, eod, length)) for row in ids]
    nats = -sum(f.log_prob for f in log_likelihoods(model, cut, batch_size, progress))
    tokens, size = sum(map(len, ids)), sum(len(utf8(text)) for text in texts)
    return {
        "documents": len(texts), "tokens": tokens, "bytes": size, "nats_per_token": nats / tokens,
        "perplexity": perplexity(nats / tokens), "bits_per_byte": nats / math.log(2) / size,
    }  # fmt: skip


def untrained(model: LoadedModel) -> LoadedModel:
    """The model as it was before its training: fresh weights from train.seed.

    Raises ConfigError for folded weights, which nothing can be trained from.
    """
    config = model.config.model
    key = jax.random.key(model.config.train.seed)
    out = layout.param_shardings(config, model.mesh)
    with jax.set_mesh(model.mesh):
        params = jax.jit(lambda: init_params(config, key), out_shardings=out)()
    return LoadedModel(model.config, model.tokenizer, params, model.mesh, 0)


def rows_of(name: str, results: Sequence[Mapping[str, Any] | None]) -> list[tuple[str, ...]]:
    """Lines of a table: name, what is measured, the value of each result with its error, chance.

    Args:
      name: of the task or the text.
      results: of :func:`summarize`, :func:`score_text` or the harness: those of each model.
    """
    first = results[0] or {}
    measures = [
        key
        for key, value in first.items()
        if isinstance(value, float) and key != "chance" and not key.endswith("_stderr")
    ]
    rows = []
    for measure in measures:
        cells = [_cell(result or {}, measure) for result in results]
        chance = first.get("chance") if measure in ("acc", "acc_norm") else None
        rows.append((name, measure, *cells, "" if chance is None else f"{chance:.4f}"))
        name = ""
    return rows


def _cell(result: Mapping[str, Any], measure: str) -> str:
    value, error = result.get(measure), result.get(f"{measure}_stderr")
    if not isinstance(value, float):
        return "-"
    told = [f"{x:.4f}" if x < 100 else f"{x:.4g}" for x in (value, error) if isinstance(x, float)]
    return " ± ".join(told)
