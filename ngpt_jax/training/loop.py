"""A run from its start, or its newest checkpoint, to its end."""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import math
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ngpt_jax import config as config_lib
from ngpt_jax.config import Config, ConfigError
from ngpt_jax.data import pipeline
from ngpt_jax.data.sources import load_corpus
from ngpt_jax.data.tokenizers import Tokenizer, load_tokenizer
from ngpt_jax.model.sampling import sample
from ngpt_jax.model.transformer import num_params
from ngpt_jax.optim.recipes import make_optimizer
from ngpt_jax.parallel import distributed
from ngpt_jax.parallel.mesh import BatchPlacer, check_eval_batch, make_mesh
from ngpt_jax.training import layout, throughput
from ngpt_jax.training.checkpoint import Checkpoints
from ngpt_jax.training.evaluate import SummedNats, evaluate, make_summed_nats
from ngpt_jax.training.metrics import MetricWriter, NoWriter, Terminal
from ngpt_jax.training.step import summarize_params
from ngpt_jax.training.stop_signal import StopSignal
from ngpt_jax.training.workdir import check_shared, claim_workdir

EXIT_RESUME = 75  # EX_TEMPFAIL: stopped by a signal after saving; the same command goes on


class RunError(RuntimeError):
    """The run cannot go on; one line says why and what to do."""


def enable_x64_if_used(config: Config) -> None:
    """JAX makes float64 arrays only where it is told to."""
    if "float64" in (config.model.dtype, config.model.param_dtype):
        jax.config.update("jax_enable_x64", True)


def with_tokenizer(config: Config) -> tuple[Config, Tokenizer]:
    """The tokenizer, and the config with its vocabulary filled in."""
    tokenizer = load_tokenizer(config.data)
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"The tokenizer's ids go up to {tokenizer.vocab_size - 1}, but model.vocab_size ="
            f" {vocab_size}; set it to at least {tokenizer.vocab_size}, or to None."
        )
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    return dataclasses.replace(config, model=model), tokenizer


class _Run:
    """What the loop holds on to between steps; see :func:`train`."""

    def __init__(
        self, config: Config, tokenizer: Tokenizer, mesh: Mesh, workdir: Path, stop: StopSignal
    ):
        self.tokenizer, self.stop, self.mesh, self.workdir = tokenizer, stop, mesh, workdir
        self.config, kernel = layout.for_mesh(config, mesh)
        tokens, self.eval_sets = distributed.together(self._read, ConfigError)
        # What the position counts in: the same place in another text would mean nothing.
        text = {"tokens": len(tokens), "crc32": zlib.crc32(tokens.data)}
        distributed.check_same(
            config=zlib.crc32(config_lib.to_json(config).encode()),
            text=json.dumps(text),
            held_out=[(s.name, len(s.tokens), zlib.crc32(s.tokens.data)) for s in self.eval_sets],
        )
        self.dataset = pipeline.train_dataset(tokens, config.model.context, config.data.seed)
        self._on_first(lambda: claim_workdir(workdir, config))
        check_shared(workdir)
        self.checkpoints = Checkpoints(workdir, config.checkpoint)
        distributed.check_same(newest_checkpoint=self.checkpoints.latest_step())
        # position counts windows consumed; evaluated is the last step evaluated, with results.
        self.progress: dict[str, Any] = {
            "position": 0, "evaluated": -1, "results": {}, "losses": [], "seconds": 0.0,
            "text": text,
        }  # fmt: skip
        tx, _ = make_optimizer(config)
        resumed = self.checkpoints.latest_step() is not None
        if resumed:
            like = layout.abstract_state(config, tx, mesh)
            self.state, self.progress = self.checkpoints.restore(like)
            if self.progress["text"] != text:
                raise ConfigError(
                    f"--workdir={workdir}: the training text is not the one that this run began"
                    " with (another Python, or changed files); choose another --workdir."
                )
        else:
            self.state = layout.first_state(config, tx, mesh)
        self.step = int(self.state.step)
        steps = config.train.steps
        assert steps is not None and config.eval.batch_size is not None
        self.steps = steps
        self.terminal = Terminal(self.step, steps, quiet=not distributed.is_first())
        self.writer: MetricWriter | NoWriter = NoWriter()
        if (writer := self._on_first(lambda: MetricWriter(workdir, self.step, config))) is not None:
            self.writer = writer
        self._greet(len(tokens), resumed, kernel)
        self.placer = BatchPlacer(mesh, config.train.batch_size, config.model.context)
        self.eval_placer = BatchPlacer(mesh, config.eval.batch_size, config.model.context)
        self.nats_fn: SummedNats = make_summed_nats(self.config)
        self.summarize = jax.jit(lambda params: summarize_params(config.model, params))

    def _read(self) -> tuple[np.ndarray, list[pipeline.EvalSet]]:
        corpus = load_corpus(self.config.data)
        tokens = pipeline.join_documents(corpus.train, self.tokenizer)
        return tokens, [
            pipeline.make_eval_set(name, documents, self.tokenizer)
            for name, documents in corpus.held_out.items()
        ]

    def _on_first(self, fn: Callable[[], Any]) -> Any:
        """Runs fn, which writes into the workdir, on process 0; its errors end all."""

        def run():
            try:
                return fn() if distributed.is_first() else None
            except OSError as e:
                what = e.filename or self.workdir
                raise ConfigError(f"{what} cannot be written: {e.strerror or e}.") from e

        return distributed.together(run, ConfigError)

    def _greet(self, tokens: int, resumed: bool, kernel: str) -> None:
        config, say = self.config, self.terminal.say
        say(
            f"{config.model.kind}, {num_params(config.model):,} parameters,"
            f" {self.steps:,} steps of {config.train.batch_size * config.model.context:,} tokens,"
            f" {tokens:,} tokens of text ({config.data.source}) -> {self.workdir}"
        )
        if self.mesh.size > 1:
            say(f"{layout.describe_mesh(self.mesh)}; {kernel}")
            say(layout.parameter_table(config, self.mesh))
        elif jax.default_backend() != "cpu":
            say(kernel)
        if resumed:
            done = " (the end; delete the folder or choose --workdir to train anew)"
            say(f"resumed from step {self.step}{done if self.step == self.steps else ''}")

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.terminal.close()
        self.writer.close()
        self.checkpoints.close()

    def poll(self) -> bool:
        """Whether to stop; says that this process is alive."""
        if seconds := self.config.runtime.hang_seconds:
            faulthandler.dump_traceback_later(seconds, repeat=True, file=2)
        return self.stop()

    def save(self) -> None:
        self.fetch_losses()
        self.checkpoints.save(self.state, self.progress)

    def fetch_losses(self) -> None:
        """Waits for the device; done only when a row or a checkpoint is due.

        Raises RunError for a loss that is not finite, before what followed from it is saved.
        """
        losses = [float(x) for x in jax.device_get(self.progress["losses"])]
        self.progress["losses"] = losses
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            saved = self.checkpoints.latest_step()
            raise RunError(
                f"The loss is {losses[bad[0]]} at step {self.step - len(losses) + bad[0] + 1}; the"
                f" last checkpoint is {'none' if saved is None else f'step {saved}'}. Try a lower"
                " optimizer.learning_rate."
            )

    def evaluate(self) -> None:
        """Evaluates every held-out set once for this step; the last step reads all of it."""
        limit = self.config.eval.batches if self.step < self.steps else None
        results: dict[str, dict[str, float]] = {}
        for eval_set in self.eval_sets:
            start = time.perf_counter()
            result = evaluate(
                self.config, self.state.params, eval_set, self.nats_fn, self.eval_placer, limit,
                self.poll,
            )  # fmt: skip
            if result is None:
                return
            results[eval_set.name] = result
            seconds = time.perf_counter() - start
            bits = f"  {result['bits_per_byte']:.4f} bits/byte" if "bits_per_byte" in result else ""
            self.terminal.say(
                f"step {self.step:>6}/{self.steps}  held-out {eval_set.name}:"
                f" {result['loss']:.4f} nats/token{bits}  ({result['tokens']:,.0f} tokens,"
                f" {seconds:.1f} s)"
            )
        for name, result in results.items():  # all or none: a stopped evaluation is made again
            row = {f"eval/{name}/{key}": value for key, value in result.items()}
            self.writer.write(self.step, row)
        self.progress["evaluated"], self.progress["results"] = self.step, results


def train(config: Config, workdir: Path) -> int:
    """Trains to the end of the schedule, or until SIGTERM or Ctrl-C.

    Args:
      config: resolved.
      workdir: the run's folder, new or of this very run, which is then gone on with.

    Returns:
      The exit code: 0 at the end, EXIT_RESUME when stopped by a signal after saving.
    """
    config, tokenizer = distributed.together(lambda: with_tokenizer(config), ConfigError)
    mesh = make_mesh(config)
    check_eval_batch(config, mesh)
    if jax.default_backend() != "cpu" and config.runtime.compilation_cache:
        cache = Path(config.runtime.compilation_cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache))
    stop = StopSignal()
    try:
        with jax.set_mesh(mesh):
            run = _Run(config, tokenizer, mesh, workdir, stop)
            try:
                return _train(run)
            finally:
                run.close()
    finally:
        stop.restore()


def _train(run: _Run) -> int:
    _train_loop(run)
    if run.step < run.steps or run.progress["evaluated"] < run.steps:
        saved = f"saved step {run.step}" if run.step else "stopped before the first step"
        run.terminal.say(f"{run.stop.name}: {saved}; the same command goes on from there")
        return EXIT_RESUME
    _finish(run)
    return 0


def _train_loop(run: _Run) -> None:
    config, progress = run.config, run.progress
    interval: _Interval | None = None
    if run.step < run.steps:
        start = time.perf_counter()
        batches: Iterator[dict[str, np.ndarray]] = pipeline.train_batches(
            run.dataset, config.train.batch_size, progress["position"],
            config.data.threads, config.data.prefetch, run.placer.rows,
        )  # fmt: skip
        compiled = layout.lower_train_step(config, run.mesh).compile()
        compile_seconds = time.perf_counter() - start
        run.terminal.say(f"compiled the step in {compile_seconds:.1f} s")
        interval = _Interval(run, compile_seconds)
    while True:
        pause = time.perf_counter()
        due = run.step > 0 and (run.step % config.eval.every == 0 or run.step == run.steps)
        if due and progress["evaluated"] != run.step and not run.poll():
            run.evaluate()
        last = run.step == run.steps or run.poll()
        if last and interval is not None:
            interval.end_trace()
        if run.step > 0 and (last or run.step % config.checkpoint.every == 0):
            run.save()
        if last:
            return
        assert interval is not None
        interval.start += time.perf_counter() - pause
        interval.step(compiled, batches)


class _Interval:
    """Steps and what they showed since the last row of metrics."""

    def __init__(self, run: _Run, compile_seconds: float):
        self.run = run
        self.compile_seconds: float | None = compile_seconds
        self.rates: list[float] = []
        self.tracing = False
        self.first_step = run.step
        self.restart()

    def restart(self) -> None:
        """Starts the clock anew."""
        self.start, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def step(self, compiled: Callable, batches: Iterator) -> None:
        run, config = self.run, self.run.config
        before = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - before
        self._profile()
        run.state, metrics = compiled(run.state, run.placer(batch))
        run.step += 1
        self.steps += 1
        run.progress["position"] += config.train.batch_size
        run.progress["losses"].append(metrics["loss"])
        if run.step % config.log.every == 0 or run.step == run.steps:
            run.fetch_losses()
            self.log({name: float(value) for name, value in metrics.items()})
        run.terminal.advance(run.step)

    def _profile(self) -> None:
        """Starts and ends the trace of the steps that ``config.profile`` names."""
        profile, done = self.run.config.profile, self.run.step - self.first_step
        if profile.num_steps and done == profile.first_step:
            jax.profiler.start_trace(str(self.run.workdir / "profile"))
            self.tracing = True
        if self.tracing and done == profile.first_step + profile.num_steps:
            self.end_trace()

    def end_trace(self) -> None:
        if self.tracing:
            jax.block_until_ready(self.run.state)
            jax.profiler.stop_trace()
            self.tracing = False
            self.run.terminal.say(
                f"trace of {self.run.config.profile.num_steps} steps -> {self.run.workdir}/profile"
            )

    def log(self, metrics: dict[str, float]) -> None:
        run, config = self.run, self.run.config
        seconds = time.perf_counter() - self.start
        run.progress["seconds"] += seconds
        tokens_per_step = config.train.batch_size * config.model.context
        rate = self.steps * tokens_per_step / seconds
        self.rates.append(rate)
        usual_rate = statistics.median(self.rates[-5:])
        metrics["loss"] = statistics.fmean(run.progress["losses"])
        row = {
            **metrics,
            "tokens": run.step * tokens_per_step,
            "seconds": run.progress["seconds"],
            "tokens_per_second": rate,
            "mfu": throughput.mfu(config.model, rate),
            "data_wait_seconds": self.waited / self.steps,
            "compile_seconds": self.compile_seconds,
            "eta_seconds": (run.steps - run.step) * tokens_per_step / usual_rate,
            **{name: float(value) for name, value in run.summarize(run.state.params).items()},
        }
        row = {f"train/{name}": value for name, value in row.items()}
        run.writer.write(run.step, row)
        run.terminal.train_row(run.step, row)
        run.checkpoints.check_for_errors()
        run.progress["losses"] = []
        self.compile_seconds = None
        self.restart()


def _finish(run: _Run) -> None:
    """Held-out results and a sample of text."""
    config = run.config
    run.terminal.close()  # the bar has done its work; what follows stays
    for name, result in run.progress["results"].items():
        run.terminal.say(
            f"held-out {name}: {result['loss']:.4f} nats/token,"
            f" {result['bits_per_byte']:.4f} bits/byte"
        )
    if config.sample.tokens:
        prompt = [run.tokenizer.eod, *run.tokenizer.encode(config.sample.prompt)]
        ids = sample(
            config.model, run.state.params, prompt, config.sample.tokens,
            config.sample.temperature, config.sample.seed,
        )  # fmt: skip
        run.terminal.say("sample:")
        run.terminal.say(config.sample.prompt + run.tokenizer.decode(ids))
