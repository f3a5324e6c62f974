"""A run: its data, state, metrics and checkpoints, from the start or a checkpoint on."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from ngpt_jax.checkpoint.checkpoints import CheckpointError, Checkpoints, restore_params
from ngpt_jax.config import Config, ConfigError
from ngpt_jax.data import pipeline
from ngpt_jax.data.corpus import Corpus, load_corpus
from ngpt_jax.data.tokenizers.base import Tokenizer
from ngpt_jax.data.tokenizers.load import load_tokenizer
from ngpt_jax.files import digest_of, reason
from ngpt_jax.model.transformer import num_params
from ngpt_jax.optim.recipes import make_optimizer
from ngpt_jax.parallel import distributed
from ngpt_jax.parallel.mesh import BatchPlacer
from ngpt_jax.terminal import Terminal
from ngpt_jax.training import layout
from ngpt_jax.training import workdir as workdir_lib
from ngpt_jax.training.evaluator import (
    Summary,
    SummedNats,
    diagnose,
    evaluate,
    make_summary,
    make_summed_nats,
)
from ngpt_jax.training.metrics import MetricWriter, NoWriter
from ngpt_jax.training.step import TrainState, summarize_params
from ngpt_jax.training.stop_signal import StopSignal
from ngpt_jax.training.workdir import RunError


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


class Run:
    """What the loop holds on to between steps; made from the workdir as it is found."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        mesh: Mesh,
        workdir: epath.Path,
        stop: StopSignal,
        terminal: Terminal,
        allow_schedule_change: bool,
    ):
        self.tokenizer, self.stop, self.mesh, self.workdir = tokenizer, stop, mesh, workdir
        self.terminal = terminal
        self.config, kernel = distributed.together(
            lambda: layout.for_mesh(config, mesh), ConfigError
        )

        def check_workdir() -> list[str]:
            return workdir_lib.check_workdir(workdir, config, allow_schedule_change)

        distributed.together(check_workdir, ConfigError)
        corpus = self._load_corpus()
        self.eval_sets = corpus.held_out
        distributed.check_same(
            text=corpus.fingerprint,
            held_out=[(s.name, len(s.stream), s.fingerprint) for s in self.eval_sets],
        )
        self._lock = self._on_first(lambda: workdir_lib.lock_workdir(workdir))
        changed = distributed.together(check_workdir, ConfigError)  # nobody came in between
        workdir_lib.check_shared(workdir)
        self.checkpoints = Checkpoints(workdir, config.checkpoint)
        distributed.check_same(newest_checkpoint=self.checkpoints.latest_step())
        # Whose position it is: the same place in another text would mean nothing. There is no
        # random state but the seeds in the config.
        self._facts = {
            "data": corpus.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "config": dataclasses.asdict(config),
            "versions": workdir_lib.versions(),
        }
        # position counts windows consumed; losses are those of accepted steps since the last row.
        self.progress: dict[str, Any] = {"position": 0, "losses": [], "seconds": 0.0}
        self.resumed = self.checkpoints.latest_step() is not None
        self.state = self._restore() if self.resumed else self._first_state()
        self.step = int(self.state.step)
        steps = config.train.steps
        assert steps is not None and config.eval.batch_size is not None
        if self.step > steps:
            raise ConfigError(
                f"train.steps = {steps}, but the run in --workdir={workdir} is at step"
                f" {self.step} already; raise it."
            )
        self.steps = steps
        self.pending: list[dict[str, jax.Array]] = []  # of steps not yet fetched
        self.dataset = make_dataset(config, corpus)
        self.writer: MetricWriter | NoWriter = NoWriter()
        if (writer := self._on_first(lambda: MetricWriter(workdir, self.step, config))) is not None:
            self.writer = writer
        # Last, so that a start that is refused leaves the folder as it was.
        facts = {
            "data": corpus.fingerprint,
            "held_out": digest_of(f"{s.name} {s.fingerprint}" for s in corpus.held_out),
            "tokenizer": tokenizer.fingerprint,
        }
        self._on_first(lambda: workdir_lib.write_versions(workdir, **facts))
        self._on_first(lambda: workdir_lib.write_config(workdir, config))
        self.results = self.writer.results  # of the last evaluation, on process 0
        # The steps last evaluated and saved, and when, by process 0's clock.
        self.evaluated = self.step if self._were_evaluated() else -1
        self.saved_at = time.monotonic()
        self._greet(corpus.tokens, changed, kernel)
        self.placer = BatchPlacer(mesh, config.train.batch_size, config.model.context)
        self.eval_placer = BatchPlacer(mesh, config.eval.batch_size, config.model.context)
        self.nats_fn: SummedNats = make_summed_nats(self.config)
        self.summary_fn: Summary = make_summary(self.config)
        self.summarize = jax.jit(lambda params: summarize_params(config.model, params))

    def _load_corpus(self) -> Corpus:
        data = self.config.data

        def load() -> Corpus:
            return load_corpus(
                data, self.tokenizer, self.config.model.context, self.terminal,
                lambda: self.stop.name is not None,
            )  # fmt: skip

        corpus = distributed.first_then_rest(load, ConfigError)
        self.terminal.close()  # the bar of the preparation
        return corpus

    def _first_state(self) -> TrainState:
        """At step 0, from another run's weights where ``init_from`` says so."""
        tx, _ = make_optimizer(self.config)
        state = layout.first_state(self.config, tx, self.mesh)
        if self.config.init_from is None:
            return state
        like = layout.abstract_state(self.config, tx, self.mesh).params
        params, progress = restore_params(self.config.init_from, like)
        self._check_tokenizer(progress, f"--config.init_from={self.config.init_from}")
        return state._replace(params=params)

    def _restore(self) -> TrainState:
        tx, _ = make_optimizer(self.config)
        like = layout.abstract_state(self.config, tx, self.mesh)
        state, saved = self.checkpoints.restore(like)
        self._check_tokenizer(saved, f"--workdir={self.workdir}")
        if saved["data"] != self._facts["data"]:
            raise ConfigError(
                f"--workdir={self.workdir}: the training text is not the one that this run began"
                " with (another Python, or changed files); choose another --workdir."
            )
        self.progress = {name: saved[name] for name in self.progress}
        return state

    def _check_tokenizer(self, saved: dict[str, Any], where: str) -> None:
        if saved["tokenizer"] != self.tokenizer.fingerprint:
            raise ConfigError(
                f"{where}: data.tokenizer is not the one that this run was trained with"
                f" ({saved['tokenizer'][:8]}, not {self.tokenizer.fingerprint[:8]}); give that one."
            )

    def _were_evaluated(self) -> bool:
        """Whether metrics of all held-out sets are there for the restored step."""
        names = {s.name for s in self.eval_sets}
        # The last step's evaluation is that of the whole sets.
        needs = {"loss", "bits_per_byte"} if self.step == self.steps else {"loss"}

        def known() -> str:
            return str(all(needs <= set(self.results.get(name, {})) for name in names))

        return distributed.of_first(known) == "True"

    def _on_first(self, fn: Callable[[], Any]) -> Any:
        """Runs fn, which writes into the workdir, on process 0; its errors end all."""

        def run():
            try:
                return fn() if distributed.is_first() else None
            except OSError as e:
                what = e.filename or self.workdir
                raise ConfigError(f"{what} cannot be written: {reason(e)}.") from e

        return distributed.together(run, ConfigError)

    def _greet(self, tokens: int, changed: list[str], kernel: str) -> None:
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
        if self.resumed:
            done = " (the end; delete the folder or choose --workdir to train anew)"
            say(f"resumed from step {self.step}{done if self.step == self.steps else ''}")
            for difference in changed:
                say(f"changed: {difference}")

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.terminal.close()
        try:
            self.writer.close()
        finally:
            with self._save_errors():
                self.checkpoints.close()
        if self._lock is not None:
            self._lock.close()

    def poll(self) -> bool:
        """Whether to stop; says that this process is alive, and tells of saves that failed."""
        if seconds := self.config.runtime.hang_seconds:
            faulthandler.dump_traceback_later(seconds, repeat=True, file=2)
        with self._save_errors():
            self.checkpoints.check_for_errors()
        return self.stop()

    @contextlib.contextmanager
    def _save_errors(self) -> Iterator[None]:
        """A save that failed ends the run, or is told, as ``checkpoint.on_error`` says."""
        try:
            yield
        except CheckpointError as e:
            if self.config.checkpoint.on_error == "stop":
                raise RunError(str(e)) from e
            self.terminal.say(f"warning: {e}")

    def save(self) -> None:
        """Starts a save of this step; one that was evaluated may be among the best."""
        self.fetch()
        held_out = self.held_out_loss() if self.evaluated == self.step else None
        self.saved_at = time.monotonic()
        with self._save_errors():
            self.checkpoints.save(self.state, self.progress | self._facts, held_out)

    def end_saves(self) -> None:
        """Waits for the last save; raises RunError where this step could not be saved."""
        with self._save_errors():
            self.checkpoints.close()
        saved = self.checkpoints.latest_step()
        if self.step and saved != self.step:
            raise RunError(
                f"Step {self.step} could not be saved; the last checkpoint is"
                f" {'none' if saved is None else f'step {saved}'}. The same command goes on from"
                " there."
            )

    def held_out_loss(self) -> float | None:
        """Mean over the held-out sets of the last evaluation, as process 0 knows it."""
        told = distributed.of_first(
            lambda: repr(statistics.fmean(r["loss"] for r in self.results.values()))
        )
        return float(told)

    def minutes_are_over(self) -> bool:
        """Whether ``checkpoint.minutes`` have passed since the last save, on process 0."""
        minutes = self.config.checkpoint.minutes
        if not minutes:
            return False
        return (
            distributed.of_first(lambda: str(time.monotonic() - self.saved_at > 60 * minutes))
            == "True"
        )

    def fetch(self) -> dict[str, float]:
        """Waits for the device; done only when a row or a checkpoint is due.

        Returns:
          The last step's metrics. Raises RunError where too many steps in a row were skipped.
        """
        fetched = [
            {name: float(x) for name, x in metrics.items()}
            for metrics in jax.device_get(self.pending)
        ]
        first = self.step - len(fetched) + 1
        self.pending = []
        for step, metrics in enumerate(fetched, start=first):
            if not metrics["skipped_in_row"]:
                self.progress["losses"].append(metrics["loss"])
            elif metrics["skipped_in_row"] >= self.config.train.max_skipped:
                raise workdir_lib.Diverged(self._too_many_skipped(step, metrics))
        return fetched[-1] if fetched else {}

    def _too_many_skipped(self, step: int, metrics: dict[str, float]) -> str:
        with contextlib.suppress(CheckpointError):
            self.checkpoints.close()  # the save under way may end well
        saved = self.checkpoints.latest_step()
        many = int(metrics["skipped_in_row"])
        return (
            f"{many} steps in a row were skipped, the last of them step {step} (loss"
            f" {metrics['loss']:.4g}, gradient norm {metrics['grad_norm']:.4g}); the last"
            f" checkpoint is {'none' if saved is None else f'step {saved}'}. Try a lower"
            " optimizer.learning_rate, more optimizer.warmup_steps, model.dtype=float32, or a"
            " larger train.spike_deviations if that is set; look at the data of these steps."
        )

    def write(self, row: dict[str, float | None]) -> None:
        """A row of metrics; a full disk ends the run in a line."""

        def write() -> None:
            try:
                self.writer.write(self.step, row)
            except OSError as e:
                raise RunError(
                    f"{e.filename or self.workdir / 'metrics.jsonl'} cannot be written:"
                    f" {reason(e)}; make room, and start the same command again."
                ) from e

        distributed.together(write, RunError)

    def evaluate(self) -> None:
        """Evaluates every held-out set once for this step; the last step reads all of it."""
        limit = self.config.eval.batches if self.step < self.steps else None
        results: dict[str, dict[str, float]] = {}
        for eval_set in self.eval_sets:
            start = time.perf_counter()
            try:
                result = evaluate(
                    self.config, self.state.params, eval_set, self.nats_fn, self.eval_placer, limit,
                    self.poll,
                )  # fmt: skip
            except ConfigError as e:  # a file that was damaged since the start
                raise RunError(str(e)) from e
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
        row: dict[str, float | None] = {
            f"eval/{name}/{key}": value
            for name, result in results.items() for key, value in result.items()
        }  # fmt: skip
        try:
            found = diagnose(
                self.config, self.state.params, self.eval_sets[0], self.summary_fn, self.eval_placer
            )
        except ConfigError as e:
            raise RunError(str(e)) from e
        # One row: a stopped or killed evaluation leaves nothing, and is made again.
        self.write(row | {f"diagnose/{name}": value for name, value in found.items()})
        self.evaluated, self.results = self.step, results


def make_dataset(config: Config, corpus: Corpus) -> Any:
    """Training windows without end, in the order of ``data.seed``."""
    if config.data.source == "mixture":
        weights = {name: source.weight for name, source in config.data.mixture.items()}
        return pipeline.mixed_dataset(corpus.train, weights, config.data.seed)
    return pipeline.train_dataset(corpus.train[""], config.data.seed)
