"""A run, made ready in numbered steps: from its start, or from its newest checkpoint on."""

import contextlib
import dataclasses
import faulthandler
import functools
import json
import time
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ngpt_jax import config as config_lib
from ngpt_jax.checkpoint.checkpoints import Checkpoints
from ngpt_jax.checkpoint.restoring import restore_params
from ngpt_jax.config import Config, ConfigError
from ngpt_jax.data import pipeline
from ngpt_jax.data.corpus import Corpus, load_corpus
from ngpt_jax.data.tokenizers.base import Tokenizer, check_tokenizer
from ngpt_jax.data.tokenizers.load import with_tokenizer
from ngpt_jax.files import digest_of, reason
from ngpt_jax.model.params import num_params
from ngpt_jax.optim.recipes import make_optimizer
from ngpt_jax.parallel import distributed
from ngpt_jax.parallel.mesh import BatchPlacer, check_eval_batch, make_mesh
from ngpt_jax.terminal import Terminal
from ngpt_jax.training import layout
from ngpt_jax.training import workdir as workdir_lib
from ngpt_jax.training.evaluator import Evaluator
from ngpt_jax.training.logger import Logger, Progress
from ngpt_jax.training.metrics import MetricWriter, write_on_first
from ngpt_jax.training.profile import Profile
from ngpt_jax.training.sample import sample_text
from ngpt_jax.training.saver import Saver
from ngpt_jax.training.step import TrainState
from ngpt_jax.training.stop_signal import StopSignal
from ngpt_jax.training.workdir import RunError

T = TypeVar("T")


@dataclasses.dataclass
class Run:
    """A run that is ready to go on.

    Attributes:
      state: after ``step`` steps.
      step: number of steps made.
      steps: length of the run.
      progress: is saved beside the state.
      next_batch: gives the batch of a step, this process's rows of it; None where no step is left.
      placer: moves it to the devices.
      train_step: the compiled step; None where no step is left.
      stop_asked: whether to stop; to be called at least once a step, by all processes.
      evaluator, logger, profile, saver: know what is due, and do it.
      sample: text from parameters.
    """

    state: TrainState
    step: int
    steps: int
    progress: Progress
    next_batch: Any
    placer: BatchPlacer
    train_step: Any
    stop_asked: Callable[[], bool]
    evaluator: Evaluator
    logger: Logger
    profile: Profile
    saver: Saver
    sample: Callable[[Any], str]


def open_run(
    config: Config,
    path: epath.PathLike,
    allow_schedule_change: bool,
    stop: StopSignal,
    terminal: Terminal,
    stack: contextlib.ExitStack,
) -> Run:
    """Makes a run ready. All processes call it, and meet in its collectives in this order.

    Args:
      config: resolved.
      path: the run's folder.
      allow_schedule_change: go on with another length, batch size or learning rate.
      stop: hears of signals.
      terminal: for the user.
      stack: closes what is opened here, also where a later step fails.

    Raises:
      ConfigError: bad input.
      RunError: another program uses the folder.
      Stopped: a signal came while text was prepared.
    """
    # 1. All processes hear of signals, and were given the same config.
    stop.attach()
    distributed.check_same(config=zlib.crc32(config_lib.to_json(config).encode()))

    # 2. Tokenizer, mesh and attention kernel fit the config. The folder will tell of ``config``;
    # ``on_mesh`` has the kernel for the devices here.
    def fit() -> tuple[epath.Path, Config, Tokenizer, Mesh, Config, str]:
        with_vocab, tokenizer = with_tokenizer(config)
        mesh = make_mesh(with_vocab)
        check_eval_batch(with_vocab.eval.batch_size, mesh)
        workdir = workdir_lib.open_workdir(str(path))
        return workdir, with_vocab, tokenizer, mesh, *layout.for_mesh(with_vocab, mesh)

    workdir, config, tokenizer, mesh, on_mesh, kernel = distributed.together(fit, ConfigError)
    if jax.default_backend() != "cpu" and config.runtime.compilation_cache:
        cache = epath.Path(config.runtime.compilation_cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache))
    stack.enter_context(jax.set_mesh(mesh))

    # 3. The folder is new, or that of this run.
    def check_workdir() -> list[str]:
        return workdir_lib.check_workdir(workdir, config, allow_schedule_change)

    distributed.together(check_workdir, ConfigError)

    # 4. Process 0 prepares the text where need be; all have the same.
    def load() -> Corpus:
        return load_corpus(
            config.data, tokenizer, config.model.context, terminal, lambda: stop.name is not None
        )

    corpus = distributed.first_then_rest(load, ConfigError)
    terminal.close()  # the bar of the preparation
    distributed.check_same(
        text=corpus.fingerprint,
        held_out=[(s.name, len(s.stream), s.fingerprint) for s in corpus.held_out],
    )

    # 5. No other program uses the folder from here on, and all processes see it.
    if (lock := _on_first(workdir, lambda: workdir_lib.lock_workdir(workdir))) is not None:
        stack.enter_context(lock)
    changed = distributed.together(check_workdir, ConfigError)  # nobody came in between
    workdir_lib.check_shared(workdir)

    # 6. The state: from the newest checkpoint, which is whole, or a new one.
    checkpoints = Checkpoints(workdir, config.checkpoint)
    distributed.check_same(newest_checkpoint=checkpoints.latest_step())
    resumed = checkpoints.latest_step() is not None
    if resumed:
        state, progress = _restore(on_mesh, mesh, checkpoints, workdir, tokenizer, corpus)
    else:
        state, progress = _first_state(on_mesh, mesh, tokenizer), Progress()
    step, steps = int(state.step), config.train.steps
    assert steps is not None
    if step > steps:
        raise ConfigError(
            f"train.steps = {steps}, but the run in --workdir={workdir} is at step {step} already;"
            " raise it."
        )

    # 7. The logs end at this step. The folder tells what it holds: the last thing to be written,
    # so that a start that is refused leaves it as it was.
    shown = dataclasses.asdict(config)
    project = config.log.wandb_project
    writer = _on_first(workdir, lambda: MetricWriter(workdir, step, project, shown))
    if writer is not None:
        stack.callback(writer.close)
    facts = {
        "data": corpus.fingerprint,
        "held_out": digest_of(f"{s.name} {s.fingerprint}" for s in corpus.held_out),
        "tokenizer": tokenizer.fingerprint,
    }
    _on_first(workdir, lambda: workdir_lib.write_start(workdir, config, facts))

    # 8. What is due between the steps.
    write = functools.partial(write_on_first, writer)
    results = distributed.of_first(lambda: json.dumps(writer.results if writer else {}))
    evaluator = Evaluator(
        on_mesh, corpus.held_out, mesh, write, terminal.say, (step, json.loads(results))
    )
    # The place in the data means nothing in another text. There is no random state to save: all
    # comes from the seeds in the config.
    saved = {"data": facts["data"], "tokenizer": facts["tokenizer"], "config": shown}
    saved["versions"] = workdir_lib.versions()
    saver = Saver(checkpoints, config.checkpoint, saved, evaluator.loss_at, terminal.say)
    stack.callback(saver.close)
    logger = Logger(on_mesh, progress, write, terminal, saver.last_saved)
    profile = Profile(config.profile, workdir, terminal.say)

    # 9. A call that comes late, as a step hangs, shows where the threads are.
    hang_seconds = config.runtime.hang_seconds
    stack.callback(faulthandler.cancel_dump_traceback_later)

    def stop_asked() -> bool:
        if hang_seconds:
            faulthandler.dump_traceback_later(hang_seconds, repeat=True, file=2)
        saver.check()
        return stop()

    # 10. The user is told what runs.
    _greet(terminal.say, on_mesh, mesh, kernel, corpus.tokens, workdir)
    if resumed:
        done = " (the end; delete the folder or choose --workdir to train anew)"
        terminal.say(f"resumed from step {step}{done if step == steps else ''}")
        for difference in changed:
            terminal.say(f"changed: {difference}")

    # 11. Batches are read ahead while the step is compiled.
    next_batch = train_step = None
    placer = BatchPlacer(mesh, config.train.batch_size, config.model.context)
    if step < steps:
        next_batch = _read_batches(config, corpus, progress, placer.rows, stack)
        start = time.perf_counter()
        train_step = layout.lower_train_step(on_mesh, mesh).compile()
        logger.compile_seconds = time.perf_counter() - start
        terminal.say(f"compiled the step in {logger.compile_seconds:.1f} s")

    sample = functools.partial(sample_text, on_mesh.model, config.sample, tokenizer)
    return Run(
        state, step, steps, progress, next_batch, placer, train_step, stop_asked, evaluator, logger,
        profile, saver, sample,
    )  # fmt: skip


def _on_first(workdir: epath.Path, fn: Callable[[], T]) -> T | None:
    """Runs ``fn``, which writes into the folder, on process 0 alone; its errors end all."""

    def run() -> T | None:
        try:
            return fn() if distributed.is_first() else None
        except OSError as e:
            raise ConfigError(f"{e.filename or workdir} cannot be written: {reason(e)}.") from e

    return distributed.together(run, ConfigError)


def _first_state(config: Config, mesh: Mesh, tokenizer: Tokenizer) -> TrainState:
    """At step 0; with the weights of another run where ``init_from`` names one."""
    tx, _ = make_optimizer(config)
    state = layout.first_state(config, tx, mesh)
    if config.init_from is None:
        return state
    like = layout.abstract_state(config, tx, mesh).params
    params, theirs = restore_params(config.init_from, like)
    check_tokenizer(tokenizer, theirs["tokenizer"], f"--config.init_from={config.init_from}")
    return state._replace(params=params)


def _restore(
    config: Config,
    mesh: Mesh,
    checkpoints: Checkpoints,
    workdir: epath.Path,
    tokenizer: Tokenizer,
    corpus: Corpus,
) -> tuple[TrainState, Progress]:
    """State and progress of the newest checkpoint, which has to be of the same text."""
    tx, _ = make_optimizer(config)
    state, saved = checkpoints.restore(layout.abstract_state(config, tx, mesh))
    check_tokenizer(tokenizer, saved["tokenizer"], f"--workdir={workdir}")
    if saved["data"] != corpus.fingerprint:
        raise ConfigError(
            f"--workdir={workdir}: the training text is not the one that this run began with"
            " (another Python, or changed files); choose another --workdir."
        )
    return state, Progress(**{f.name: saved[f.name] for f in dataclasses.fields(Progress)})


def _greet(
    say: Callable[[str], None],
    config: Config,
    mesh: Mesh,
    kernel: str,
    tokens: int,
    workdir: epath.Path,
) -> None:
    model, train = config.model, config.train
    say(
        f"{model.kind}, {num_params(model):,} parameters, {train.steps:,} steps of"
        f" {train.batch_size * model.context:,} tokens, {tokens:,} tokens of text"
        f" ({config.data.source}) -> {workdir}"
    )
    if mesh.size > 1:
        say(f"{layout.describe_mesh(mesh)}; {kernel}")
        say(layout.parameter_table(config, mesh))
    elif jax.default_backend() != "cpu":
        say(kernel)


def make_dataset(config: Config, corpus: Corpus) -> Any:
    """Training sequences without end, in the order of ``data.seed``."""
    if config.data.source == "mixture":
        weights = {name: source.weight for name, source in config.data.mixture.items()}
        return pipeline.mixed_dataset(corpus.train, weights, config.data.seed)
    return pipeline.train_dataset(corpus.train[""], config.data.seed)


def _read_batches(
    config: Config,
    corpus: Corpus,
    progress: Progress,
    rows: np.ndarray,
    stack: contextlib.ExitStack,
) -> Callable[[int], dict[str, np.ndarray]]:
    """Begins to read ahead; returns a function that gives the batch of a step.

    It takes the batches in order, and moves ``progress.position`` with each.
    """
    batch_size, data = config.train.batch_size, config.data
    batches = pipeline.train_batches(
        make_dataset(config, corpus), batch_size, progress.position, data.threads, data.prefetch,
        rows, data.workers,
    )  # fmt: skip
    stack.callback(batches.close)  # ends its threads or processes

    def next_batch(step: int) -> dict[str, np.ndarray]:
        try:
            batch = next(batches)
        except ConfigError as e:  # a file that was damaged since the start
            raise RunError(str(e)) from e
        except Exception as e:  # of grain, where a worker was killed
            raise RunError(f"The sequences of step {step} cannot be read: {reason(e)}.") from e
        progress.position += batch_size
        return batch

    return next_batch
