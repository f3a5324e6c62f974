"""Scores of a trained model: tasks such as HellaSwag from local files, and any text.

Examples:
  python -m ngpt_jax.tools.evaluate --workdir=runs/quickstart
  python -m ngpt_jax.tools.evaluate --workdir=runs/1b --tasks=lambada_openai,hellaswag \\
      --tasks_dir=evals
  python -m ngpt_jax.tools.evaluate --workdir=runs/1b --tasks=my/questions.jsonl --untrained
  python -m ngpt_jax.tools.evaluate --workdir=runs/1b --text=book.txt
  python -m ngpt_jax.tools.evaluate --workdir=runs/1b --tasks=hellaswag --tasks_dir=evals --harness
  python -m ngpt_jax.tools.evaluate --workdir=runs/1b --tasks=wsc273,piqa --harness

A task is a file NAME.jsonl or NAME.jsonl.gz in --tasks_dir, or a path. Each line is an example:
  {"id": 7, "context": "...", "continuations": [" one", " two"], "label": 0}
  {"id": 7, "contexts": ["... he", "... she"], "continuation": " left.", "label": 1}
The model chooses the continuation with the highest log-probability (acc), or with the highest one a
character (acc_norm). A single continuation, as LAMBADA's last word, is right where greedy decoding
gives it (acc); it also has a perplexity, exp(mean -log p). Beside each score stand its standard
error and the score of a blind choice. A context that is too long for the model loses its start.

Without --tasks and --text, the run's held-out text is scored. --text is a file, a folder or a glob
of .txt, .jsonl (.gz, .zst) or .parquet. The scores are perplexity per token and bits per byte.
Files of other kinds, and text that the tokenizer loses, are reported. Each token is scored once, in
windows of the training context: each begins where the one before ended, and the last one reaches
back (as in lm_eval's loglikelihood_rolling with context_len=1). Documents are read one by one;
their end is not scored.

--harness runs the tasks through EleutherAI's lm-evaluation-harness (pip install '.[eval]'):
local files without a network, and the harness's own tasks, by their names, with one.
--config.NAME=VALUE changes the run's config for this command: where the tokenizer lies
(data.tokenizer), model.dtype, the mesh (one device unless some mesh.* is given).

--out gets evaluate.json, and NAME.csv with the choice and log-probabilities of each example.
"""

from absl import flags

from ngpt_jax.config import ConfigError, command

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a training run.")
_STEP = flags.DEFINE_integer("step", None, "The checkpoint; the newest by default.")
_TASKS = flags.DEFINE_list("tasks", [], "Names in --tasks_dir, or paths of .jsonl files.")
_TASKS_DIR = flags.DEFINE_string("tasks_dir", None, "Folder of NAME.jsonl and NAME.jsonl.gz.")
_TEXT = flags.DEFINE_string("text", None, "A text: a file, a folder or a glob.")
_TEXT_KEY = flags.DEFINE_string(
    "text_key",
    None,
    "The field of a .jsonl line or column of a .parquet file of --text; the run's data.text_key by"
    " default.",
)
_LIMIT = flags.DEFINE_integer(
    "limit", None, "Only the first so many examples of each task.", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 16, "Sequences of the training context at one time.", lower_bound=1
)
_UNTRAINED = flags.DEFINE_bool(
    "untrained", False, "Also score the same model with fresh weights (train.seed)."
)
_HARNESS = flags.DEFINE_bool("harness", False, "Run the tasks through lm-evaluation-harness.")
_OUT = flags.DEFINE_string("out", None, "Folder for the results; WORKDIR/evaluate by default.")


def _main(overrides: list[tuple[str, str]]) -> None:
    if _WORKDIR.value is None:
        raise ConfigError("--workdir is needed: the folder of a training run.")
    if not _TASKS.value:
        for flag in (_TASKS_DIR, _LIMIT, _HARNESS):
            if flag.present:
                raise ConfigError(f"--{flag.name} is for --tasks; give some, or leave it out.")
    from ngpt_jax.evaluation.tasks import find_tasks

    tasks, names = find_tasks(_TASKS.value, _TASKS_DIR.value, _LIMIT.value, _HARNESS.value)
    from ngpt_jax.evaluation import report  # slow to import: bad tasks are told first

    wanted = report.Wanted(
        tasks, names, _TEXT.value, _TEXT_KEY.value, _LIMIT.value, _BATCH_SIZE.value, _HARNESS.value
    )
    print(report.evaluate(
        _WORKDIR.value, _STEP.value, overrides, wanted, _UNTRAINED.value, _OUT.value
    ))  # fmt: skip


if __name__ == "__main__":
    command.run_command(_main)
