"""A run from its start, or its newest checkpoint, to its end."""

from __future__ import annotations

import contextlib
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from ngpt_jax import config as config_lib
from ngpt_jax.config import Config, ConfigError
from ngpt_jax.data import pipeline
from ngpt_jax.data.preparing.preparation import Stopped
from ngpt_jax.decoding import folding, generation
from ngpt_jax.decoding.sampling import Sampling
from ngpt_jax.files import reason
from ngpt_jax.parallel import distributed
from ngpt_jax.parallel.mesh import check_eval_batch, make_mesh
from ngpt_jax.terminal import Terminal, format_duration
from ngpt_jax.training import layout, throughput
from ngpt_jax.training import workdir as workdir_lib
from ngpt_jax.training.setup import Run, RunError, with_tokenizer
from ngpt_jax.training.stop_signal import EXIT_RESUME, StopSignal


def enable_x64_if_used(config: Config) -> None:
    """JAX makes float64 arrays only where it is told to."""
    if "float64" in (config.model.dtype, config.model.param_dtype):
        jax.config.update("jax_enable_x64", True)


def train(
    config: Config,
    workdir: epath.PathLike,
    allow_schedule_change: bool = False,
    stop: StopSignal | None = None,
) -> int:
    """Trains to the end of the schedule, or until SIGTERM or Ctrl-C.

    Args:
      config: resolved.
      workdir: the run's folder, new or of this very run, which is then gone on with.
      allow_schedule_change: go on with another length, batch size or learning rate.
      stop: what was made before to hear of signals; None: made here.

    Returns:
      The exit code: 0 at the end, EXIT_RESUME when stopped by a signal after saving.
    """
    stop = stop or StopSignal()
    terminal = Terminal(quiet=not distributed.is_first())
    try:
        stop.attach()
        distributed.check_same(config=zlib.crc32(config_lib.to_json(config).encode()))

        def check():
            with_vocab, tokenizer = with_tokenizer(config)
            mesh = make_mesh(with_vocab)
            check_eval_batch(with_vocab, mesh)
            return with_vocab, tokenizer, mesh, workdir_lib.open_workdir(str(workdir))

        config_, tokenizer, mesh, folder = distributed.together(check, ConfigError)
        if jax.default_backend() != "cpu" and config.runtime.compilation_cache:
            cache = epath.Path(config.runtime.compilation_cache).expanduser()
            jax.config.update("jax_compilation_cache_dir", str(cache))
        with jax.set_mesh(mesh):
            run = Run(config_, tokenizer, mesh, folder, stop, terminal, allow_schedule_change)
            try:
                return _train(run)
            finally:
                run.close()
    except Stopped:
        terminal.close()
        terminal.say(f"{stop.name}: stopped while preparing tokens; the same command goes on")
        return EXIT_RESUME
    finally:
        stop.restore()


def _train(run: Run) -> int:
    _train_loop(run)
    run.end_saves()
    if run.step < run.steps or run.evaluated < run.steps:
        saved = f"saved step {run.step}" if run.step else "stopped before the first step"
        run.terminal.say(f"{run.stop.name}: {saved}; the same command goes on from there")
        return EXIT_RESUME
    _finish(run)
    return 0


def _train_loop(run: Run) -> None:
    with contextlib.ExitStack() as stack:
        _steps(run, stack)


def _steps(run: Run, stack: contextlib.ExitStack) -> None:
    config = run.config
    interval: _Interval | None = None
    if run.step < run.steps:
        start = time.perf_counter()
        batches = pipeline.train_batches(
            run.dataset, config.train.batch_size, run.progress["position"], config.data.threads,
            config.data.prefetch, run.placer.rows, config.data.workers,
        )  # fmt: skip
        stack.callback(batches.close)  # ends its threads or processes
        compiled = layout.lower_train_step(config, run.mesh).compile()
        compile_seconds = time.perf_counter() - start
        run.terminal.say(f"compiled the step in {compile_seconds:.1f} s")
        interval = _Interval(run, compile_seconds)
    while True:
        pause = time.perf_counter()
        due = run.step > 0 and (run.step % config.eval.every == 0 or run.step == run.steps)
        best = False
        if due and run.evaluated != run.step and not run.poll():
            run.evaluate()
            if config.checkpoint.keep_best and run.evaluated == run.step:
                loss = run.held_out_loss()
                best = loss is not None and run.checkpoints.is_best(loss)
        last = run.step == run.steps or run.poll()
        if last and interval is not None:
            interval.end_trace()
        late = interval is not None and interval.save_is_due
        if run.step > 0 and (last or best or late or run.step % config.checkpoint.every == 0):
            run.save()
        if last:
            return
        assert interval is not None
        interval.start += time.perf_counter() - pause
        interval.step(compiled, batches)


class _Interval:
    """Steps and what they showed since the last row of metrics."""

    def __init__(self, run: Run, compile_seconds: float):
        self.run = run
        self.compile_seconds: float | None = compile_seconds
        self.rates: list[float] = []
        self.tracing = False
        self.first_step = run.step
        self.save_is_due = False  # by the clock
        self.restart()

    def restart(self) -> None:
        """Starts the clock anew."""
        self.start, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def step(self, compiled: Callable, batches: Iterator) -> None:
        run, config = self.run, self.run.config
        before = time.perf_counter()
        try:
            batch = next(batches)
        except ConfigError as e:  # a file that was damaged since the start
            raise RunError(str(e)) from e
        except Exception as e:  # of grain, where a worker was killed
            raise RunError(
                f"The windows of step {run.step + 1} cannot be read: {reason(e)}."
            ) from e
        self.waited += time.perf_counter() - before
        self._profile()
        run.state, metrics = compiled(run.state, run.placer(batch))
        run.step += 1
        self.steps += 1
        run.progress["position"] += config.train.batch_size
        run.pending.append(metrics)
        self.save_is_due = False
        if run.step % config.log.every == 0 or run.step == run.steps:
            self.log(run.fetch())
            self.save_is_due = run.minutes_are_over()
        run.terminal.show(f"step {run.step:>6}/{run.steps}", run.step / run.steps)

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
        losses = run.progress["losses"]
        row: dict[str, Any] = {
            "loss": statistics.fmean(losses) if losses else None,
            **{name: metrics[name] for name in ("grad_norm", "learning_rate", "skipped")},
            "tokens": run.step * tokens_per_step,
            "seconds": run.progress["seconds"],
            "tokens_per_second": rate,
            "mfu": throughput.mfu(config.model, rate),
            "data_wait_seconds": self.waited / self.steps,
            "compile_seconds": self.compile_seconds,
            "eta_seconds": (run.steps - run.step) * tokens_per_step / usual_rate,
            **{name: float(value) for name, value in run.summarize(run.state.params).items()},
        }
        run.write({f"train/{name}": value for name, value in row.items()})
        self._show(row)
        run.progress["losses"] = []
        self.compile_seconds = None
        self.restart()

    def _show(self, row: dict[str, Any]) -> None:
        run = self.run
        loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
        eta = format_duration(row["eta_seconds"])
        status = f"loss {loss}  {row['tokens_per_second']:,.0f} tokens/s  eta {eta}"
        skipped = f"  {row['skipped']:.0f} skipped" if row["skipped"] else ""
        label = f"step {run.step:>6}/{run.steps}"
        run.terminal.show(label, run.step / run.steps, status + skipped)
        more = f"  grad {row['grad_norm']:.3f}  lr {row['learning_rate']:.2e}"
        run.terminal.tell(f"{label}  {status}{more}{skipped}")


def _finish(run: Run) -> None:
    """Held-out results and a sample of text."""
    config = run.config
    run.terminal.close()  # the bar has done its work; what follows stays
    for name, result in run.results.items():
        run.terminal.say(
            f"held-out {name}: {result['loss']:.4f} nats/token,"
            f" {result['bits_per_byte']:.4f} bits/byte"
        )
    if config.sample.tokens:
        run.terminal.say("sample:")
        run.terminal.say(config.sample.prompt + _sample(run))


def _sample(run: Run) -> str:
    """Text after ``sample.prompt``, as long as there is room in the context."""
    model, how = run.config.model, run.config.sample
    prompt = [run.tokenizer.eod, *run.tokenizer.encode(how.prompt)][-(model.context - 1) :]
    weights = jax.jit(lambda params: folding.for_inference(model, params))(run.state.params)
    chunks = generation.generate(
        model, weights, [prompt],
        min(how.tokens, model.context - len(prompt)), Sampling(how.temperature), how.seed,
    )  # fmt: skip
    return run.tokenizer.decode(np.concatenate([ids[0] for ids, _ in chunks]).tolist())
