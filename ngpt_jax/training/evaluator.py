"""Held-out loss: summed nats over a set, per token and as bits per byte."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from ngpt_jax.config import Config
from ngpt_jax.data import pipeline
from ngpt_jax.data.token_files import EvalSet
from ngpt_jax.model import inspect
from ngpt_jax.model.transformer import compute_params
from ngpt_jax.parallel.mesh import BatchPlacer
from ngpt_jax.training.step import Batch, summed_nats

SummedNats = Callable[[Any, Batch], jax.Array]
Summary = Callable[[Any, Batch], dict[str, jax.Array]]


def make_summed_nats(config: Config) -> SummedNats:
    """Jitted (params, batch) -> summed nats over the batch's weighted targets."""
    model = config.model
    return jax.jit(lambda params, batch: summed_nats(model, compute_params(model, params), batch))


def evaluate(
    config: Config,
    params: Any,
    eval_set: EvalSet,
    nats_fn: SummedNats,
    placer: BatchPlacer,
    limit: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Loss of ``params`` on a held-out set.

    Args:
      config: resolved.
      params: the parameters.
      eval_set: tokens and the bytes that they stand for.
      nats_fn: from :func:`make_summed_nats`.
      placer: moves batches of ``config.eval.batch_size`` windows to the devices.
      limit: batches to read; None reads the whole set, each target once.
      stopped: polled at each batch.

    Returns:
      loss (nats a token; end-of-document counts as a token), perplexity, tokens, and, for
      the whole set alone, bits_per_byte = nats / ln 2 / UTF-8 bytes. None if stopped.
    """
    assert config.eval.batch_size is not None
    batches: Iterator[dict[str, Any]] = pipeline.eval_batches(
        eval_set, config.model.context, config.eval.batch_size, limit, config.data.mask_documents
    )
    sums: list[jax.Array] = []
    tokens = 0.0
    for batch in batches:
        if stopped():
            return None
        tokens += float(batch["weights"].sum())
        placed = placer({k: v[placer.rows] for k, v in batch.items()})
        # One at a time: collectives of two programs in flight can wait for each other on CPUs.
        jax.block_until_ready(sums[-1:])
        sums.append(nats_fn(params, placed))
    nats = math.fsum(float(s) for s in jax.device_get(sums))
    out = {"loss": nats / tokens, "perplexity": math.exp(min(nats / tokens, 700)), "tokens": tokens}
    if limit is None:
        out["bits_per_byte"] = nats / math.log(2) / eval_set.num_bytes
    return out


_summarize = jax.jit(inspect.summarize, static_argnums=0)  # one for all runs of a program


def make_summary(config: Config) -> Summary:
    """Jitted (params, batch) -> scalars by name, of :func:`.diagnostics.summarize`."""
    return functools.partial(_summarize, config.model)


def diagnose(
    config: Config, params: Any, eval_set: EvalSet, summary_fn: Summary, placer: BatchPlacer
) -> dict[str, float]:
    """What ``params`` look like inside, on the first batch of a held-out set.

    Args: as :func:`evaluate` has them; ``summary_fn`` is from :func:`make_summary`.
    """
    assert config.eval.batch_size is not None
    (batch,) = pipeline.eval_batches(
        eval_set, config.model.context, config.eval.batch_size, 1, config.data.mask_documents
    )
    placed = placer({k: v[placer.rows] for k, v in batch.items()})
    return {name: float(x) for name, x in jax.device_get(summary_fn(params, placed)).items()}
