"""Scores of a trained model: tasks such as HellaSwag from local files, and any text.

Examples:
  python -m ngpt_jax.tools.evaluate --workdir=runs/1b --tasks=lambada_openai,hellaswag \\
      --tasks_dir=evals
  python -m ngpt_jax.tools.evaluate --workdir=runs/1b --tasks=my/questions.jsonl --untrained
  python -m ngpt_jax.tools.evaluate --workdir=runs/1b --text=book.txt
  python -m ngpt_jax.tools.evaluate --workdir=runs/1b --tasks=hellaswag --tasks_dir=evals --harness
  python -m ngpt_jax.tools.evaluate --workdir=runs/1b --tasks=wsc273,piqa --harness

A task is a file NAME.jsonl or NAME.jsonl.gz in --tasks_dir, or a path. It holds an example a line:
  {"id": 7, "context": "...", "continuations": [" one", " two"], "label": 0}
  {"id": 7, "contexts": ["... he", "... she"], "continuation": " left.", "label": 1}
Of several continuations the likeliest is chosen (acc), or the likeliest a character (acc_norm); one
alone (LAMBADA's last word) is right where greedy decoding gives it (acc), and has a perplexity,
exp(mean -log p). Beside each score stand its standard error and what choosing blindly gives.
Contexts that do not fit into the model's lose their start.

--text is a file, a folder or a glob of .txt, .jsonl (.gz, .zst) or .parquet: perplexity a token and
bits a byte. Each token is scored once, in windows of the training context that begin where the one
before ended; the last one reaches back (lm_eval's loglikelihood_rolling; its windows have
context_len=1). Documents are read one by one, their end is not scored.

--harness runs the tasks through EleutherAI's lm-evaluation-harness (pip install 'ngpt-jax[eval]'):
the same files without a network, and its own tasks, by their names, with one.
--config.NAME=VALUE changes the run's config for here: where the tokenizer lies (data.tokenizer),
data.text_key, model.dtype, the mesh (one device is used where none of mesh.* is given).

--out gets evaluate.json, and NAME.csv with each example's choice and log-probabilities.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

from ngpt_jax.config import ConfigError, command
from ngpt_jax.evaluation import tasks as tasks_lib
from ngpt_jax.evaluation.tasks import Task
from ngpt_jax.files import reason, write_atomically
from ngpt_jax.terminal import Terminal, format_duration

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a training run.")
_STEP = flags.DEFINE_integer("step", None, "The checkpoint; the newest by default.")
_TASKS = flags.DEFINE_list("tasks", [], "Names in --tasks_dir, or paths of .jsonl files.")
_TASKS_DIR = flags.DEFINE_string("tasks_dir", None, "Folder of NAME.jsonl and NAME.jsonl.gz.")
_TEXT = flags.DEFINE_string("text", None, "A text: a file, a folder or a glob.")
_LIMIT = flags.DEFINE_integer(
    "limit", None, "Only the first so many examples of each task.", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 16, "Windows of the training context at one time.", lower_bound=1
)
_UNTRAINED = flags.DEFINE_bool(
    "untrained", False, "Beside it the same model with fresh weights (train.seed)."
)
_HARNESS = flags.DEFINE_bool("harness", False, "Run the tasks through lm-evaluation-harness.")
_OUT = flags.DEFINE_string("out", None, "Folder for the results; WORKDIR/evaluate by default.")

Tables = dict[str, tuple[list[str], list[dict[str, Any]]]]  # columns and rows by task


def _find_tasks() -> tuple[list[Task], list[str]]:
    """The tasks of local files, and the names that are left to the harness."""
    found, names = [], []
    for name in _TASKS.value:
        path = tasks_lib.find_task(name, _TASKS_DIR.value)
        if path is not None:
            found.append(tasks_lib.read_task(path, _LIMIT.value))
        elif _HARNESS.value:
            names.append(name)
        else:
            raise tasks_lib.unknown_task(name, _TASKS_DIR.value)
    several = [*(task.name for task in found), *names]
    if twice := [name for name in several if several.count(name) > 1]:
        raise ConfigError(f"--tasks: {twice[0]} is there twice; rename a file, or drop one.")
    return found, names


def _progress(terminal: Terminal, label: str) -> Any:
    start = time.perf_counter()

    def show(share: float) -> None:
        left = (time.perf_counter() - start) * (1 - share) / share
        terminal.show(label, share, f"{share:.0%}, {format_duration(left)} left")
        terminal.tell(f"{label}: {share:.0%}, {format_duration(left)} left", seconds=30)

    return show


def _evaluate(
    model: Any, label: str, tasks: Sequence[Task], names: Sequence[str], texts: Sequence[str]
) -> tuple[dict[str, Any], Tables]:
    """Results by task and of the text, and the tables of examples."""
    from ngpt_jax.evaluation import scorers

    terminal, batch_size = Terminal(), _BATCH_SIZE.value
    results: dict[str, Any] = {}
    tables: Tables = {}
    if _HARNESS.value and (tasks or names):
        from ngpt_jax.evaluation import harness

        found = harness.run_harness(model, tasks, names, _LIMIT.value, batch_size)
        results, tables = found.results, found.samples
        tables |= {task.name: scorers.table(task, found.scored[task.name]) for task in tasks}
    else:
        for task in tasks:
            show = _progress(terminal, f"{task.name}{label}")
            scored, too_long = scorers.score_task(model, task, batch_size, show)
            results[task.name] = scorers.summarize(task, scored) | {"too_long": too_long}
            tables[task.name] = scorers.table(task, scored)
            terminal.close()
    out: dict[str, Any] = {"tasks": results}
    if texts:
        show = _progress(terminal, f"text{label}")
        out["text"] = scorers.score_text(model, texts, batch_size, show)
        terminal.close()
    return out, tables


def _show(found: Sequence[dict[str, Any]], step: int, context: int) -> str:
    from ngpt_jax.evaluation import scorers
    from ngpt_jax.terminal import format_table

    models = [f"step {step}", "untrained"][: len(found)]
    rows: list[tuple[str, ...]] = [("", "measure", *models, "chance")]
    notes = []
    for name, first in found[0]["tasks"].items():
        count = first["examples"]
        told = name if count is None else f"{name} ({count:,})"
        rows += scorers.rows_of(told, [f["tasks"].get(name) for f in found])
        if first.get("too_long"):
            notes.append(
                f"{name}: {first['too_long']:,} of {count:,} do not fit into the context of"
                f" {context:,} tokens and lose their start."
            )
    if text := found[0].get("text"):
        told = f"text ({text['tokens']:,} tokens)"
        rows += scorers.rows_of(told, [f["text"] for f in found])
    return "\n".join([format_table(rows), *notes])


def _main(overrides: list[tuple[str, str]]) -> None:
    if _WORKDIR.value is None:
        raise ConfigError("--workdir is needed: the folder of a training run.")
    if not _TASKS.value and _TEXT.value is None:
        raise ConfigError("--tasks or --text is needed: what to evaluate on.")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax tells much of what it reads
    tasks, names = _find_tasks()
    if _HARNESS.value:
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        if not names:  # local files need no network, and do not ask for one
            os.environ.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1")
        from ngpt_jax.evaluation import harness  # noqa: F401, where it is not, say so now
    from ngpt_jax.evaluation import scorers
    from ngpt_jax.inference import opening
    from ngpt_jax.inference.loading import open_model
    from ngpt_jax.model.params import num_params, refuse_folded

    config = opening.read_config("workdir", _WORKDIR.value, overrides)
    texts = [] if _TEXT.value is None else scorers.read_text(_TEXT.value, config.data.text_key)
    out = command.output_folder(_WORKDIR.value, _OUT.value, "evaluate")
    model = open_model("workdir", _WORKDIR.value, _STEP.value, overrides)
    if _UNTRAINED.value:
        refuse_folded(model.config.model)
    results, tables = _evaluate(model, "", tasks, names, texts)
    found, written = [results], {f"{name}.csv": table for name, table in tables.items()}
    config, step = model.config, model.step
    if _UNTRAINED.value:
        model = scorers.untrained(model)
        results, tables = _evaluate(model, ", untrained", tasks, names, texts)
        found.append(results)
        written |= {f"{name}.untrained.csv": table for name, table in tables.items()}
    version = importlib.metadata.version("lm_eval") if _HARNESS.value else None
    report = {
        "workdir": _WORKDIR.value, "step": step, "kind": config.model.kind,
        "parameters": num_params(config.model), "context": config.model.context,
        "tokenizer": model.tokenizer.name, "lm_eval": version, "limit": _LIMIT.value,
        **found[0],
    }  # fmt: skip
    if len(found) > 1:
        report["untrained"] = found[1]
    _write(out, report, written)
    print(_show(found, step, config.model.context))
    print(f"{out}: {', '.join(['evaluate.json', *sorted(written)])}")


def _write(out: Path, report: dict[str, Any], tables: Tables) -> None:
    from ngpt_jax import plots

    try:
        for name, (columns, rows) in tables.items():
            plots.write_csv(out / name.replace("/", "_"), columns, rows)
        write_atomically(out / "evaluate.json", json.dumps(report, indent=2) + "\n")
    except OSError as e:
        raise ConfigError(f"{e.filename or out} cannot be written: {reason(e)}.") from e


if __name__ == "__main__":
    command.run_command(_main)
