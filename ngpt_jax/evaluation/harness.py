"""Runs EleutherAI's lm-evaluation-harness on a trained model; needs the extra eval.

Examples:
  >>> import lm_eval, ngpt_jax  # doctest: +SKIP
  >>> from ngpt_jax.evaluation.harness import NgptLM  # doctest: +SKIP
  >>> model = NgptLM(ngpt_jax.load("runs/quickstart"))  # doctest: +SKIP
  >>> lm_eval.simple_evaluate(model=model, tasks=["wsc273"])["results"]  # doctest: +SKIP

Importing this module makes the model known to the harness as "ngpt_jax", with the arguments
workdir, step and batch_size: ``simple_evaluate(model="ngpt_jax", model_args="workdir=RUN", ...)``.
"""

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

from ngpt_jax.config import ConfigError
from ngpt_jax.config.convert import did_you_mean
from ngpt_jax.errors import install_hint
from ngpt_jax.evaluation import scorers
from ngpt_jax.evaluation.scorers import Likelihood, Scored
from ngpt_jax.evaluation.tasks import Task
from ngpt_jax.files import reason
from ngpt_jax.inference import arguments
from ngpt_jax.inference.loading import LoadedModel, load

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from tqdm import tqdm
except ImportError as e:
    raise ConfigError(f"The harness needs lm_eval ({reason(e)}): {install_hint('eval')}.") from e


@register_model("ngpt_jax")
class NgptLM(TemplateLM):
    """A loaded model with the harness's interface.

    Texts begin with the end-of-document token, as in training. A continuation longer than the
    context is scored in windows, as a text is. A prompt to generate from loses its start where
    max_gen_toks would not fit behind it, but at least half of the context is kept.

    Args:
      model: from ``ngpt_jax.load``.
      batch_size: sequences of the training context at one time; auto is 16.
      workdir, step: the run to load the model from, where ``model`` is None.
    """

    def __init__(
        self,
        model: LoadedModel | None = None,
        batch_size: int | str = 16,
        workdir: str | None = None,
        step: int | None = None,
    ):
        super().__init__()
        if model is None:
            if workdir is None:
                raise ConfigError("The model ngpt_jax needs model_args: workdir=RUN.")
            model = load(str(workdir), step)
        self.model = model
        if isinstance(batch_size, str):
            text = "16" if batch_size.startswith("auto") else batch_size.strip()
            batch_size = int(text) if text.isdecimal() else batch_size
        self.batch_size = arguments.integer("batch_size", batch_size, 1)

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eod

    @property
    def max_length(self) -> int:
        """The context, in tokens."""
        return self.model.config.model.context

    @property
    def max_gen_toks(self) -> int:
        """For tasks that do not say it."""
        return min(256, self.max_length // 2)

    @property
    def tokenizer_name(self) -> str:
        return self.model.tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids, the end-of-document token first unless ``add_special_tokens`` is False."""
        ids = self.model.tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.eot_token_id, *ids]

    def tok_decode(self, tokens: Sequence[int], **kwargs: Any) -> str:
        return self.model.tokenizer.decode(tokens)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        for (_, text), _, continuation in requests:
            if not continuation:
                raise ConfigError(
                    f"The continuation {text!r:.60} has no token of its own: the tokenizer merges"
                    " it into the context; begin it with a space."
                )
        cut = [scorers.windows(c, t, self.max_length) for _, c, t in requests]
        return [(f.log_prob, f.greedy) for f in self._score(cut, "log-likelihoods", disable_tqdm)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        cut = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            cut.append(list(scorers.rolling_windows(ids, self.prefix_token_id, self.max_length)))
        return [f.log_prob for f in self._score(cut, "texts", disable_tqdm)]

    def _score(self, cut: Any, label: str, quiet: bool) -> list[Likelihood]:
        with tqdm(total=100, unit="%", desc=label, disable=quiet) as bar:

            def show(share: float) -> None:
                bar.update(round(100 * share) - bar.n)

            return scorers.log_likelihoods(self.model, cut, self.batch_size, show)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string, the end of the document, or max_gen_toks.

        From a task's generation_kwargs it reads until, max_gen_toks and its aliases, do_sample,
        temperature, top_k, top_p, min_p and seed.
        """
        groups: dict[str, list[int]] = {}  # how to generate -> requests
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        out: dict[int, str] = {}
        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm) as bar:
            for key, members in groups.items():
                how = normalize_gen_kwargs(json.loads(key), self.max_gen_toks)
                tokens = how["max_gen_toks"]
                room = max(self.max_length - tokens, self.max_length // 2)
                prompts = {i: self.tok_encode(requests[i].args[0])[-room:] for i in members}
                members.sort(key=lambda i: -len(prompts[i]))
                chosen = {k: how[k] for k in ("top_k", "top_p", "min_p", "seed") if k in how}
                temperature = how.get("temperature", 1.0) if how["do_sample"] else 0.0
                stop = [text for text in how["until"] if text]
                for start in range(0, len(members), self.batch_size):
                    some = members[start : start + self.batch_size]
                    texts = self.model.generate(
                        [prompts[i] for i in some], tokens, temperature=temperature, stop=stop,
                        **chosen,
                    )  # fmt: skip
                    out.update((i, text.text) for i, text in zip(some, texts))
                    bar.update(len(some))
        return [out[i] for i in range(len(requests))]


def task_config(task: Task, cache: str) -> dict[str, Any]:
    """The harness's description of a local task; the harness reads the file itself.

    Args:
      task: the local task.
      cache: a folder for the harness's own copy.
    """
    config: dict[str, Any] = {
        "task": task.name, "test_split": "test", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(task.path)}, "cache_dir": cache},
        "num_fewshot": 0, "metadata": {"version": 1.0},
    }  # fmt: skip
    acc = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    if task.kind == "completion":
        return config | {
            "output_type": "loglikelihood", "doc_to_text": "context",
            "doc_to_target": lambda doc: doc["continuations"][0],
            "metric_list": [
                acc,
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        }  # fmt: skip
    config |= {"output_type": "multiple_choice", "target_delimiter": task.delimiter}
    cut = len(task.delimiter)
    if task.kind == "contexts":
        return config | {
            "doc_to_text": "label", "doc_to_choice": "contexts", "metric_list": [acc],
            "doc_to_target": lambda doc: doc["continuation"][cut:],
        }  # fmt: skip
    return config | {
        "doc_to_text": "context", "doc_to_target": "label",
        "doc_to_choice": lambda doc: [text[cut:] for text in doc["continuations"]],
        "metric_list": [acc, acc | {"metric": "acc_norm"}],
    }  # fmt: skip


class Harnessed(NamedTuple):
    """The harness's results.

    Attributes:
      results: by task, with the names of :func:`.scorers.summarize`; a measure under a filter is
        called measure,filter.
      scored: the examples of the local tasks.
      samples: columns and rows of the examples of its own tasks.
    """

    results: dict[str, dict[str, Any]]
    scored: dict[str, list[Scored]]
    samples: dict[str, tuple[list[str], list[dict[str, Any]]]]


def run_harness(
    model: LoadedModel,
    tasks: Sequence[Task],
    names: Sequence[str] = (),
    limit: int | None = None,
    batch_size: int = 16,
) -> Harnessed:
    """Runs tasks through ``lm_eval.simple_evaluate``.

    Args:
      model: that is evaluated.
      tasks: of local files, which need no network.
      names: of the harness's own tasks, whose data it gets from the network.
      limit: only the first so many examples of each; the local tasks were read with the same limit.
        None: all.
      batch_size: sequences of the training context at one time.

    Raises ConfigError for an unknown name, and for data that cannot be loaded.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # The bootstrap of a perplexity would fork processes, which does not go with JAX's threads.
    os.environ["DISABLE_MULTIPROC"] = "1"
    for task in tasks:
        if task.kind == "contexts":
            for example in task.examples:
                if not all(context for context, _ in example.pairs):
                    raise ConfigError(
                        f"--tasks={task.name}: a context of {example.id!r} is empty, which lm_eval"
                        " cannot read; leave out --harness."
                    )
    manager = TaskManager(include_defaults=bool(names))
    for name in names:
        if name not in manager.all_tasks:
            meant = did_you_mean(name, manager.all_tasks)
            raise ConfigError(f"--tasks={name}: neither a local file nor a task of lm_eval.{meant}")
    with tempfile.TemporaryDirectory() as cache:
        specs: dict[str, Any] = {name: name for name in names}
        specs |= {task.name: task_config(task, cache) for task in tasks}
        for name, spec in specs.items():
            try:
                manager.load([spec if isinstance(spec, str) else dict(spec)])
            except Exception as e:  # whatever the harness and its data sets raise
                raise ConfigError(f"--tasks={name}: lm_eval cannot load it ({reason(e)}).") from e
        found = lm_eval.simple_evaluate(
            model=NgptLM(model, batch_size), tasks=list(specs.values()), task_manager=manager,
            limit=limit, bootstrap_iters=1000,
        )  # fmt: skip
    local = {task.name: task for task in tasks}
    scored, samples = {}, {}
    for name, some in found["samples"].items():
        if name in local:
            likelihoods = [Likelihood(*r) for sample in some for r in sample["filtered_resps"]]
            scored[name] = scorers.attach(local[name], likelihoods)
        else:
            samples[name] = _sample_rows(some)
    results = {}
    for name, numbers in found["results"].items():
        own = scorers.summarize(local[name], scored[name]) if name in local else {}
        count = found.get("n-samples", {}).get(name, {}).get("effective")
        results[name] = {"examples": count, "chance": own.get("chance"), **_plain(numbers)}
    return Harnessed(results, scored, samples)


def _plain(numbers: dict[str, Any]) -> dict[str, float]:
    """{"acc,none": 0.5, "acc_stderr,none": ...} without the filter that is none."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in numbers.items()
        if "," in key and isinstance(value, int | float)
    }


def _sample_rows(samples: Sequence[dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    measures = samples[0]["metrics"] if samples else []
    rows = [
        {"id": s["doc_id"], "filter": s["filter"], "target": s["target"],
         "responses": json.dumps(s["filtered_resps"], default=str)}
        | {m: s.get(m) for m in measures}
        for s in samples
    ]  # fmt: skip
    return ["id", "filter", "target", *measures, "responses"], rows
