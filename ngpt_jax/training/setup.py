"""A run, made ready in numbered steps: from its start, or from its newest checkpoint on."""

import contextlib
import dataclasses
import faulthandler
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ngpt_jax.checkpoint.checkpoints import Checkpoints
from ngpt_jax.checkpoint.restoring import restore_params
from ngpt_jax.config import Config, ConfigError
from ngpt_jax.config.convert import fields
from ngpt_jax.data import pipeline
from ngpt_jax.data.corpus import Corpus, held_out_digest, load_corpus
from ngpt_jax.data.tokenizers.base import Tokenizer, check_tokenizer
from ngpt_jax.data.tokenizers.load import with_tokenizer
from ngpt_jax.files import digest_of, reason, writing
from ngpt_jax.model.params import axis_sizes, num_params, param_list
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
_FEW_ROWS = 128  # of a vocabulary, rounded up to fit the hardware
_MANY_EPOCHS = 100


@dataclasses.dataclass
class Run:
    """A run that is ready to go on.

    Attributes:
      state: after ``step`` steps.
      step, steps: how many were made, and how many there will be.
      progress: is saved beside the state.
      next_batch: gives this process's rows of the batch of a step; None where no step is left.
      placer: moves them to the devices.
      train_step: the compiled step; None where no step is left.
      stop_asked: whether to stop; all processes call it equally often, at least once a step.
      evaluator, logger, profile, saver: know what is due, and do it.
      sample: text from parameters.
      terminal: for the user.
      workdir, kind: the run's folder, and the kind of its model.
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
    terminal: Terminal
    workdir: epath.Path
    kind: str

    def finished(self) -> bool:
        """Whether the run is at its end, the last evaluation included."""
        return self.step == self.steps and not self.evaluator.due(self.step)


def open_run(
    config: Config, path: epath.PathLike, allow_schedule_change: bool, stop: StopSignal,
    terminal: Terminal, stack: contextlib.ExitStack,
) -> Run:  # fmt: skip
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
    distributed.check_same(**{field.name: field.value for field in fields(config)})

    # 2. Tokenizer and mesh fit the config. The folder will tell of ``config``; in ``on_mesh`` all
    # that depends on the devices here is decided.
    def fit() -> tuple[epath.Path, Config, Tokenizer, Mesh, Config, dict[str, str]]:
        with_vocab, tokenizer = with_tokenizer(config)
        mesh = make_mesh(with_vocab)
        check_eval_batch(with_vocab.eval.batch_size, mesh)
        workdir = workdir_lib.open_workdir(str(path))
        return workdir, with_vocab, tokenizer, mesh, *layout.for_mesh(with_vocab, mesh)

    workdir, config, tokenizer, mesh, on_mesh, told = distributed.together(fit, ConfigError)
    _keep_compiled(config.runtime.compilation_cache)
    stack.enter_context(jax.set_mesh(mesh))

    # 3. The folder is new, or that of this run.
    def check_workdir() -> list[str]:
        return workdir_lib.check_workdir(workdir, config, allow_schedule_change)

    distributed.together(check_workdir, ConfigError)

    # 4. Process 0 prepares the text where that is needed; all processes have the same.
    def load() -> Corpus:
        return load_corpus(
            config.data, tokenizer, config.model.context, terminal, lambda: stop.name is not None
        )

    corpus = distributed.first_then_rest(load, ConfigError)
    terminal.close()  # the bar of the preparation
    held_out = [(s.name, len(s.stream), s.fingerprint) for s in corpus.held_out]
    distributed.check_same(text=corpus.fingerprint, held_out=held_out)

    # 5. No other program uses the folder from here on, and all processes see it.
    is_new, say = not workdir.exists(), terminal.say
    if (lock := _on_first(workdir, lambda: workdir_lib.lock_workdir(workdir, say=say))) is not None:
        stack.enter_context(lock)
    stack.callback(workdir_lib.remove_if_unused, workdir, is_new)
    changed = distributed.together(check_workdir, ConfigError)  # nobody came in between
    workdir_lib.check_shared(workdir)

    # 6. The state: from the newest checkpoint, which is whole, or a new one.
    with terminal.doing("reading the newest checkpoint"):
        checkpoints = Checkpoints(workdir, config.checkpoint)
    restored = checkpoints.latest_step()
    distributed.check_same(newest_checkpoint=restored)
    tx, _ = make_optimizer(on_mesh)
    like = layout.abstract_state(on_mesh, tx, mesh)
    progress, otherwise = Progress(), ""
    with terminal.doing("initializing" if restored is None else f"restoring step {restored}"):
        if restored is not None:
            state, progress = _restore(checkpoints, like, f"--workdir={workdir}", tokenizer, corpus)
        else:
            params = None
            if (other := config.init_from) is not None:
                params, theirs = restore_params(other, like.params)
                check_tokenizer(tokenizer, theirs["tokenizer"], f"--config.init_from={other}")
                otherwise = workdir_lib.reads_weights_otherwise(theirs.get("config"), config)
            state = layout.first_state(on_mesh, tx, mesh, params)
    step, steps = int(state.step), config.train.steps
    assert steps is not None
    if step > steps:
        raise ConfigError(
            f"train.steps = {steps}, but the run in --workdir={workdir} is at step {step} already;"
            f" raise {'train.steps' if config.train.tokens is None else 'train.tokens'}."
        )

    # 7. The logs end at this step, before its evaluation if that was of another held-out text.
    shown, project = dataclasses.asdict(config), config.log.wandb_project
    facts = {
        "data": corpus.fingerprint,
        "held_out": held_out_digest(corpus),
        "tokenizer": tokenizer.fingerprint,
    }

    def open_logs() -> MetricWriter:
        before = workdir_lib.read_facts(workdir)
        same = before.get("held_out", facts["held_out"]) == facts["held_out"]
        if not same and config.checkpoint.keep_best:
            say(
                "warning: the held-out text is not the one before; checkpoint.keep_best compares"
                " losses of both."
            )
        return MetricWriter(workdir, step, project, shown, same)

    writer = _on_first(workdir, open_logs)
    if writer is not None:
        stack.callback(writer.close)

    # 8. What is due between the steps. A checkpoint tells of which text it is, as its place in the
    # data means nothing in another one; all that is random comes from the seeds in the config.
    write = functools.partial(write_on_first, writer)
    found = distributed.of_first(lambda: json.dumps(writer.results if writer else {}))
    evaluator = Evaluator(on_mesh, corpus.held_out, mesh, write, terminal, step, json.loads(found))
    saved = {"data": facts["data"], "tokenizer": facts["tokenizer"], "config": shown}
    saved["versions"] = workdir_lib.versions()
    saver = Saver(checkpoints, config.checkpoint, saved, evaluator.loss_at, say)
    stack.callback(saver.close)
    logger = Logger(on_mesh, progress, write, terminal, saver.last_saved)

    # 9. Where a step hangs, the next call comes late, and the stacks of all threads are printed.
    hang_seconds = config.runtime.hang_seconds
    stack.callback(faulthandler.cancel_dump_traceback_later)

    def stop_asked() -> bool:
        if hang_seconds:
            faulthandler.dump_traceback_later(hang_seconds, repeat=True, file=2)
        saver.check()
        return stop()

    # 10. The user is told what runs.
    model, batch_size = on_mesh.model, config.train.batch_size
    say(
        f"{model.kind}, {num_params(model):,} parameters, {steps:,} steps of"
        f" {batch_size * model.context:,} tokens, {corpus.tokens:,} tokens of text"
        f" ({config.data.source}) -> {workdir}"
    )
    if otherwise:
        say(f"warning: the model of {config.init_from} is another one ({otherwise})")
    for warning in size_warnings(config, tokenizer, corpus.tokens):
        say(f"warning: {warning}")
    if mesh.size > 1:
        say(layout.describe_mesh(mesh))
        say(layout.parameter_table(on_mesh, mesh))
    say("; ".join(f"model.{name}: {what}" for name, what in told.items()))
    if restored is not None:
        end = " (the end; delete the folder or choose --workdir to train anew)"
        say(f"resumed from step {step}{end if step == steps else ''}")
        for difference in changed:
            say(f"changed: {difference}")

    # 11. Batches are read ahead while the step is compiled.
    next_batch = train_step = None
    placer = BatchPlacer(mesh, batch_size, model.context)
    if step < steps:
        dataset = pipeline.make_dataset(config.data, corpus)
        batches = pipeline.train_batches(
            dataset, batch_size, progress.position, config.data.threads, config.data.prefetch,
            placer.rows, config.data.workers,
        )  # fmt: skip
        stack.callback(batches.close)  # ends its threads or processes
        next_batch = functools.partial(_next_batch, batches, progress, batch_size)
        start = time.perf_counter()
        with terminal.doing("compiling the step"):
            train_step = layout.lower_train_step(on_mesh, mesh).compile()
        logger.compile_seconds = time.perf_counter() - start
        say(f"compiled the step in {logger.compile_seconds:.1f} s")

    # 12. The folder tells what it holds: last of all, so that a start that is refused, or whose
    # step does not compile, leaves it as it was.
    _on_first(workdir, lambda: workdir_lib.write_start(workdir, config, facts))
    profile = Profile(config.profile, workdir, say)
    sample = functools.partial(sample_text, model, config.sample, tokenizer)
    return Run(
        state, step, steps, progress, next_batch, placer, train_step, stop_asked, evaluator, logger,
        profile, saver, sample, terminal, workdir, kind=model.kind,
    )  # fmt: skip


def size_warnings(config: Config, tokenizer: Tokenizer, tokens: int) -> list[str]:
    """What looks like a mistake in the sizes of vocabulary and text, one line each.

    Args:
      config: resolved.
      tokenizer: of the run.
      tokens: to train on; 0: not known.
    """
    out, model = [], config.model
    assert model.vocab_size is not None
    unused = model.vocab_size - tokenizer.vocab_size
    if unused > max(_FEW_ROWS, tokenizer.vocab_size // 10):
        with_rows = [p.shape(model) for p in param_list(model) if "vocab" in p.axes]
        each = sum(map(math.prod, with_rows)) // axis_sizes(model)["vocab"]
        out.append(
            f"model.vocab_size = {model.vocab_size:,}, but {tokenizer.name} has"
            f" {tokenizer.vocab_size:,} tokens: {unused:,} rows are never used, and"
            f" {unused * each:,} parameters cannot learn."
        )
    epochs = epochs_of(config, tokens) if tokens else 0
    if epochs > _MANY_EPOCHS:
        out.append(
            f"the run reads its {tokens:,} tokens of text {epochs:,.0f} times; give more text, or"
            " fewer train.steps."
        )
    return out


def epochs_of(config: Config, tokens: int) -> float:
    """How often a run reads its text."""
    assert config.train.steps is not None
    return config.train.steps * config.train.batch_size * config.model.context / tokens


def _keep_compiled(folder: str | None) -> None:
    """Keeps compiled programs in a folder, unless JAX_COMPILATION_CACHE_DIR names one."""
    given = getattr(jax.config, "jax_compilation_cache_dir", None)
    if folder is None or given is not None:
        return
    cache = epath.Path(folder).expanduser()
    if jax.default_backend() == "cpu":  # compiled for this very CPU
        cache /= f"cpu-{digest_of([workdir_lib.cpu_model()])[:16]}"
    jax.config.update("jax_compilation_cache_dir", str(cache))


def _on_first(workdir: epath.Path, fn: Callable[[], T]) -> T | None:
    """Runs ``fn``, which writes into the folder, on process 0 alone; its errors end all."""

    def run() -> T | None:
        with writing(workdir):
            return fn() if distributed.is_first() else None

    return distributed.together(run, ConfigError)


def _restore(
    checkpoints: Checkpoints, like: TrainState, where: str, tokenizer: Tokenizer, corpus: Corpus
) -> tuple[TrainState, Progress]:
    """State and progress of the newest checkpoint, which has to be of this text."""
    state, saved = checkpoints.restore(like)
    check_tokenizer(tokenizer, saved["tokenizer"], where)
    if saved["data"] != corpus.fingerprint:
        raise ConfigError(
            f"{where}: the training text is not the one that this run began with (another Python,"
            " or changed files); choose another --workdir."
        )
    return state, Progress(**{f.name: saved[f.name] for f in dataclasses.fields(Progress)})


def _next_batch(
    batches: Iterator[dict[str, np.ndarray]], progress: Progress, batch_size: int, step: int
) -> dict[str, np.ndarray]:
    """The batch of a step; moves the position in the data."""
    try:
        batch = next(batches)
    except ConfigError as e:  # a file that was damaged since the start
        raise RunError(str(e)) from e
    except Exception as e:  # of grain, where a worker was killed
        raise RunError(f"The sequences of step {step} cannot be read: {reason(e)}.") from e
    progress.position += batch_size
    return batch
