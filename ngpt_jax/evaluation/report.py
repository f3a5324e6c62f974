"""A trained model scored on tasks and a text: the results as a table, as JSON and as CSV files."""

import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ngpt_jax import plots
from ngpt_jax.config import command
from ngpt_jax.data.tokenizers.base import lost_characters, warnings_of_loss
from ngpt_jax.evaluation import scorers
from ngpt_jax.evaluation.scorers import Scored
from ngpt_jax.evaluation.tasks import Task
from ngpt_jax.files import write_atomically, writing
from ngpt_jax.inference import opening
from ngpt_jax.inference.loading import LoadedModel, open_model
from ngpt_jax.model.params import num_params, refuse_folded
from ngpt_jax.terminal import Terminal, format_duration, format_table

Table = tuple[list[str], list[dict[str, Any]]]  # columns and rows


class Wanted(NamedTuple):
    """What to score a model on.

    Attributes:
      tasks: from local files.
      names: of the harness's own tasks.
      text: a file, a folder or a glob; None: no text, and without tasks the run's held-out text.
      text_key: the field or column that holds the text; None: that of the run's config.
      limit: only the first so many examples of each task; None: all.
      batch_size: sequences of the training context at one time.
      harness: run the tasks through lm-evaluation-harness.
    """

    tasks: list[Task]
    names: list[str]
    text: str | None
    text_key: str | None
    limit: int | None
    batch_size: int
    harness: bool


def evaluate(
    workdir: str,
    step: int | None,
    overrides: Sequence[tuple[str, str]],
    wanted: Wanted,
    untrained: bool,
    out: str | None,
) -> str:
    """Scores a run's model, and writes evaluate.json and a CSV file for each task.

    Args:
      workdir, step, overrides: the run, as of :func:`.loading.open_model`.
      wanted: what to score it on.
      untrained: also score the model with fresh weights.
      out: the folder of the files; None: WORKDIR/evaluate.

    Returns:
      The table and what was written. Raises ConfigError.
    """
    if wanted.harness:
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        if not wanted.names:  # local files need no network: do not ask for one
            os.environ.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1")
        from ngpt_jax.evaluation import harness as _  # noqa: F401, where it is missing, say so now
    config = opening.read_config("workdir", workdir, overrides)
    texts: list[str] = []
    notes: list[str] = []
    if wanted.text is not None:
        texts, notes = scorers.read_text(wanted.text, wanted.text_key or config.data.text_key)
    folder = command.output_folder(workdir, out, "evaluate")
    terminal = Terminal()
    with terminal.doing("loading the model"):
        model = open_model("workdir", workdir, step, overrides)
    terminal.close()
    if wanted.text is None and not (wanted.tasks or wanted.names):
        documents = scorers.held_out_documents(model, workdir, terminal)
        texts = [model.tokenizer.decode(ids) for ids in documents]
        notes = ["the text is the run's held-out text"]
    if not model.tokenizer.lossless:
        lost, total = lost_characters(model.tokenizer, texts)
        notes += warnings_of_loss(model.tokenizer.name, lost / max(total, 1))
    if untrained:
        refuse_folded(model.config.model)
    found: dict[str, Any] = {}
    files: dict[str, Table] = {}
    for name in ("", "untrained")[: 1 + untrained]:
        scored = scorers.untrained(model) if name else model
        found[name], tables = _score(scored, name and f", {name}", wanted, texts)
        files |= {f"{task}{name and f'.{name}'}.csv": table for task, table in tables.items()}
    report = {
        "workdir": workdir, "step": model.step, "kind": config.model.kind,
        "parameters": num_params(model.config.model), "context": config.model.context,
        "tokenizer": model.tokenizer.name,
        "lm_eval": importlib.metadata.version("lm_eval") if wanted.harness else None,
        "limit": wanted.limit, "notes": notes, **found.pop(""), **found,
    }  # fmt: skip
    with writing(folder):
        for name, (columns, rows) in files.items():
            plots.write_csv(folder / name.replace("/", "_"), columns, rows)
        write_atomically(folder / "evaluate.json", json.dumps(report, indent=2) + "\n")
    return f"{show(report)}\n{folder}: {', '.join(['evaluate.json', *sorted(files)])}"


def _score(
    model: LoadedModel, label: str, wanted: Wanted, texts: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Table]]:
    """Results by task and of the text, and a table of the examples of each task."""
    terminal = Terminal()
    results: dict[str, Any] = {}
    tables: dict[str, Table] = {}
    if wanted.harness and (wanted.tasks or wanted.names):
        from ngpt_jax.evaluation import harness

        found = harness.run_harness(
            model, wanted.tasks, wanted.names, wanted.limit, wanted.batch_size
        )
        results, tables = found.results, found.samples
        tables |= {task.name: examples(task, found.scored[task.name]) for task in wanted.tasks}
    else:
        for task in wanted.tasks:
            progress = _progress(terminal, f"{task.name}{label}")
            scored, too_long = scorers.score_task(model, task, wanted.batch_size, progress)
            results[task.name] = scorers.summarize(task, scored) | {"too_long": too_long}
            tables[task.name] = examples(task, scored)
            terminal.close()
    out: dict[str, Any] = {"tasks": results}
    if texts:
        progress = _progress(terminal, f"text{label}")
        out["text"] = scorers.score_text(model, texts, wanted.batch_size, progress)
        terminal.close()
    return out, tables


def _progress(terminal: Terminal, label: str) -> Callable[[float], None]:
    start = time.perf_counter()

    def show(share: float) -> None:
        left = (time.perf_counter() - start) * (1 - share) / share
        terminal.show(label, share, f"eta {format_duration(left)}")

    return show


def examples(task: Task, scored: Sequence[Scored]) -> Table:
    """A row an example: what was chosen, the label, log-probabilities."""
    if task.kind == "completion":
        rows: list[dict[str, Any]] = [
            {"id": s.id, "greedy": int(s.found[0].greedy), "log_prob": s.found[0].log_prob}
            for s in scored
        ]
        return ["id", "greedy", "log_prob"], rows
    most = max(len(s.found) for s in scored)
    norm = ["chosen_norm"] if task.kind == "choices" else []
    columns = ["id", "chosen", *norm, "label", *(f"log_prob_{i}" for i in range(most))]
    rows = [
        {"id": s.id, "chosen": s.chosen, "chosen_norm": s.chosen_norm, "label": s.label}
        | {f"log_prob_{i}": f.log_prob for i, f in enumerate(s.found)}
        for s in scored
    ]
    return columns, [{c: row[c] for c in columns if c in row} for row in rows]


def show(report: Mapping[str, Any]) -> str:
    """The table of evaluate.json's results, with notes."""
    results = [report, *filter(None, [report.get("untrained")])]
    models = [f"step {report['step']}", "untrained"][: len(results)]
    lines: list[tuple[str, ...]] = [("", "measure", *models, "chance")]
    notes = list(report["notes"])
    for name, first in report["tasks"].items():
        count = first["examples"]
        counted = name if count is None else f"{name} ({count:,})"
        lines += table_lines(counted, [r["tasks"].get(name) for r in results])
        if first.get("too_long"):
            notes.append(
                f"{name}: {first['too_long']:,} of {count:,} do not fit into the context of"
                f" {report['context']:,} tokens and lose their start."
            )
    if text := report.get("text"):
        lines += table_lines(f"text ({text['tokens']:,} tokens)", [r["text"] for r in results])
    return "\n".join([format_table(lines), *notes])


def table_lines(name: str, results: Sequence[Mapping[str, Any] | None]) -> list[tuple[str, ...]]:
    """Lines of a table: name, what is measured, the value of each result with its error, chance.

    Args:
      name: of the task or the text.
      results: of each model, from :func:`.scorers.summarize`, :func:`.scorers.score_text` or the
        harness.
    """
    first = results[0] or {}
    measures = [
        key
        for key, value in first.items()
        if isinstance(value, float) and key != "chance" and not key.endswith("_stderr")
    ]
    lines = []
    for measure in measures:
        cells = [_cell(result or {}, measure) for result in results]
        chance = first.get("chance") if measure in ("acc", "acc_norm") else None
        lines.append((name, measure, *cells, "" if chance is None else f"{chance:.4f}"))
        name = ""
    return lines


def _cell(result: Mapping[str, Any], measure: str) -> str:
    value, error = result.get(measure), result.get(f"{measure}_stderr")
    if not isinstance(value, float):
        return "-"
    shown = [f"{x:.4f}" if x < 100 else f"{x:.4g}" for x in (value, error) if isinstance(x, float)]
    return " ± ".join(shown)
