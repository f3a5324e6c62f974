"""Held-out loss: when an evaluation is due, and how it is made."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from ngpt_jax.config import Config, ConfigError, ModelConfig
from ngpt_jax.data import pipeline
from ngpt_jax.data.token_files import EvalSet
from ngpt_jax.model import inspect
from ngpt_jax.model.folding import compute_params, folded_config
from ngpt_jax.parallel import distributed
from ngpt_jax.parallel.mesh import BatchPlacer
from ngpt_jax.terminal import Terminal
from ngpt_jax.training.history import held_out_title
from ngpt_jax.training.metrics import Results, Row
from ngpt_jax.training.step import summed_nats
from ngpt_jax.training.workdir import RunError

# One program each for all runs of a process.
_summarize = jax.jit(inspect.summarize, static_argnums=0)
_summed_nats = jax.jit(
    lambda model, params, batch: summed_nats(
        folded_config(model), compute_params(model, params), batch
    ),
    static_argnums=0,
)


class Evaluator:
    """Evaluates the held-out sets every ``eval.every`` steps, and after the last step.

    Attributes:
      step: the step that was evaluated last; -1: none.
      results: of that evaluation.
      terminal: for the user.
      prefix: of what is said, where several models are trained.
    """

    def __init__(
        self, config: Config, eval_sets: Sequence[EvalSet], mesh: Mesh,
        write: Callable[[int, Row], None], terminal: Terminal, step: int, results: Results,
    ):  # fmt: skip
        """
        Args:
          config: resolved.
          eval_sets: the held-out sets.
          mesh: of the devices.
          write: takes a step and its row of metrics.
          terminal: for the user.
          step: the one that the run goes on from.
          results: what is known of it from the logs.
        """
        assert config.eval.batch_size is not None and config.train.steps is not None
        self._model, self._eval_sets = config.model, eval_sets
        self._write, self.terminal, self.prefix = write, terminal, ""
        self._config, self._steps = config.eval, config.train.steps
        self._shape = config.model.context, config.eval.batch_size
        self._mask_documents = config.data.mask_documents
        self._placer = BatchPlacer(mesh, config.eval.batch_size, config.model.context)
        # The evaluation of the last step reads the whole sets.
        needs = {"loss", "bits_per_byte"} if step == self._steps else {"loss"}
        self.step, self.results = -1, results
        if all(needs <= set(results.get(s.name, {})) for s in eval_sets):
            self._remember(step, results)

    def _remember(self, step: int, results: Results) -> None:
        self.step, self.results = step, results
        loss = statistics.fmean(result["loss"] for result in results.values())
        self._loss = float(distributed.of_first(lambda: repr(loss)))

    def loss_at(self, step: int) -> float | None:
        """The held-out loss of a step, the mean over the sets, where it is the last evaluated.

        It is the same float on all processes.
        """
        return self._loss if step == self.step else None

    def due(self, step: int) -> bool:
        """Whether an evaluation is due after this many steps."""
        last = step == self._steps
        return step > 0 and (last or step % self._config.every == 0) and step != self.step

    def evaluate(self, step: int, params: Any, stop_asked: Callable[[], bool]) -> None:
        """Evaluates every set and writes one row; after the last step the sets are read whole.

        Where ``stop_asked`` (at each batch) says yes, nothing is written, and the evaluation stays
        due: the next start makes it.
        """
        results: Results = {}
        try:
            for eval_set in self._eval_sets:
                start = time.perf_counter()
                limit = self._config.batches if step < self._steps else None
                tokens = pipeline.num_eval_tokens(eval_set, *self._shape, limit)
                what = f"{self.prefix}evaluating {tokens:,} tokens of {eval_set.name}"
                with self.terminal.doing(what) as show:
                    result = evaluate(
                        self._model, params, self._batches(eval_set, limit), self._placer, tokens,
                        eval_set.num_bytes if limit is None else None, stop_asked, show,
                    )  # fmt: skip
                if result is None:
                    return
                results[eval_set.name] = result
                if step < self._steps:  # the last results are told at the end of the run
                    title = f"{self.prefix}{held_out_title(eval_set.name)}"
                    self.terminal.say(
                        f"step {step:>6}/{self._steps}  {title}:"
                        f" {result['loss']:.4f} nats/token"
                        f"  ({tokens:,} tokens, {time.perf_counter() - start:.1f} s)"
                    )
            (batch,) = self._batches(self._eval_sets[0], 1)
        except ConfigError as e:  # a file that was damaged since the start
            raise RunError(str(e)) from e
        with self.terminal.doing("measuring angles and norms"):
            inside = jax.device_get(_summarize(self._model, params, self._placer(batch)))
        row: Row = {
            f"eval/{n}/{key}": x for n, found in results.items() for key, x in found.items()
        }
        self._write(step, row | {f"diagnose/{name}": float(x) for name, x in inside.items()})
        self._remember(step, results)

    def _batches(self, eval_set: EvalSet, limit: int | None) -> Iterator[dict[str, Any]]:
        return pipeline.eval_batches(
            eval_set, *self._shape, limit, self._mask_documents, self._placer.rows
        )


def evaluate(
    model: ModelConfig, params: Any, batches: Iterator[dict[str, Any]], placer: BatchPlacer,
    tokens: int, num_bytes: int | None = None, stop_asked: Callable[[], bool] = lambda: False,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, float] | None:  # fmt: skip
    """Loss of ``params`` on a held-out set.

    Args:
      model: resolved.
      params: its parameters.
      batches: this process's rows of them, as :func:`pipeline.eval_batches` gives them.
      placer: moves them to the devices.
      tokens: how many the batches hold, all processes together.
      num_bytes: UTF-8 bytes of the text, where the batches hold all of a set.
      stop_asked: asked at each batch.
      progress: takes the share that is done.

    Returns:
      loss (nats per token; end-of-document counts as a token), perplexity, tokens, and with
      ``num_bytes`` bits_per_byte = nats / ln 2 / num_bytes. None where it was asked to stop.
    """
    sums: list[jax.Array] = []
    done = 0
    for batch in batches:
        if stop_asked():
            return None
        placed = placer(batch)
        # One at a time: collectives of two programs in flight can wait for each other on CPUs.
        jax.block_until_ready(sums[-1:])
        sums.append(_summed_nats(model, params, placed))
        done += placed["inputs"].size
        progress(min(done / max(tokens, 1), 1.0))
    nats = math.fsum(float(s) for s in jax.device_get(sums))
    out = {
        "loss": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700)),
        "tokens": float(tokens),
    }
    return out if num_bytes is None else out | {"bits_per_byte": nats / math.log(2) / num_bytes}
