"""Training: a run from its start, or its newest checkpoint, to its end."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping

import jax
from etils import epath

from ngpt_jax.config import Config, ConfigError
from ngpt_jax.data.preparing.folder import Stopped
from ngpt_jax.errors import drop_unwritten, is_out_of_memory, tell
from ngpt_jax.files import reason
from ngpt_jax.parallel import distributed
from ngpt_jax.terminal import Terminal, format_duration
from ngpt_jax.training import history
from ngpt_jax.training.setup import Run, open_run
from ngpt_jax.training.stop_signal import EXIT_RESUME, StopSignal
from ngpt_jax.training.workdir import RunError

_AGAIN = "run the same command again to resume"


def train(
    config: Config,
    workdir: epath.PathLike,
    allow_schedule_change: bool = False,
    stop: StopSignal | None = None,
) -> int:
    """Trains to the end of the schedule, or until a signal asks to stop.

    Args:
      config: resolved.
      workdir: the run's folder: a new one, or that of this very run, which then goes on.
      allow_schedule_change: go on with another length, batch size or learning rate.
      stop: hears of signals; None: one is made here.

    Returns:
      The exit code: 0 at the end, EXIT_RESUME when a signal stopped the run and it was saved.

    Raises:
      ConfigError: bad input.
      RunError: the run cannot go on.
    """
    stop = stop or StopSignal()
    terminal = Terminal(quiet=not distributed.is_first())
    with contextlib.ExitStack() as stack:
        stack.callback(stop.restore)
        stack.callback(terminal.close)
        try:
            run = open_run(config, workdir, allow_schedule_change, stop, terminal, stack)
        except Stopped:
            terminal.close()
            terminal.say(f"{stop.name}: stopped while preparing tokens; {_AGAIN}")
            return EXIT_RESUME
        for _ in steps_of(run):
            pass
        if not run.finished():
            saved = f"saved step {run.step}" if run.step else "stopped before the first step"
            terminal.say(f"{stop.name}: {saved}; {_AGAIN}")
            return EXIT_RESUME
        with terminal.doing("writing a sample"):
            text = run.sample(run.state.params)
        terminal.close()
        trained = format_duration(run.progress.seconds)
        terminal.say(f"{run.step:,} steps made in {trained}, evaluation and saves not counted")
        tell_results(run, terminal)
        if text:
            terminal.say("sample:")
            terminal.say(text)
        plot_losses({run.kind: run.workdir}, run.workdir, terminal)
        return 0


def exit_code(trained: Callable[[], int]) -> int:
    """The exit code of a program that trains; an error of a run is told in one line.

    Args:
      trained: trains, and returns 0 or EXIT_RESUME.
    """
    try:
        return trained()
    except (RunError, ConfigError) as e:
        tell(f"error: {e}")
        return distributed.leave(e.exit_code if isinstance(e, RunError) else 2)
    except jax.errors.JaxRuntimeError as e:
        # That of a kernel's own memory is a fault of the kernel.
        if not is_out_of_memory(e) or re.search("vmem|shared memory", str(e), re.IGNORECASE):
            raise
        tell(
            "error: the device has too little memory; set model.remat=full, raise train.accumulate,"
            " lower train.batch_size or eval.batch_size, and see what --dry_run says"
            f" ({reason(e)[:200]})"
        )
        return distributed.leave(1)
    except KeyboardInterrupt:
        return distributed.leave(130)
    finally:
        drop_unwritten()


def steps_of(run: Run) -> Iterator[None]:
    """Makes the steps, and what is due between them, to the end or a stop; yields after each."""
    evaluator, logger, saver = run.evaluator, run.logger, run.saver
    while True:
        # What is due after the steps so far. This comes first, as a start may have to make up for
        # what a stop has left undone.
        if evaluator.due(run.step) and not run.stop_asked():
            evaluator.evaluate(run.step, run.state.params, run.stop_asked)
        stopping = run.step == run.steps or run.stop_asked()
        if stopping or saver.due(run.step):
            logger.fetch(run.step)
            saver.save(run.step, run.state, dataclasses.asdict(logger.progress()))
        if stopping:
            break

        with logger.clock:
            with logger.data_clock:
                batch = run.next_batch(run.step + 1)
            run.profile.before_step(run.state)
            run.state, metrics = run.train_step(run.state, run.placer(batch))
        run.step += 1
        logger.add(run.step, metrics)
        if logger.due(run.step):
            logger.write_row(run.step, run.state.params)
        saver.look_at_clock(run.step)
        yield

    run.profile.end(run.state)
    with run.terminal.doing(f"saving step {run.step}"):
        saver.finish(run.step)


def tell_results(run: Run, terminal: Terminal, start: str = "") -> None:
    """Says the held-out results, each line after ``start``."""
    for name, result in run.evaluator.results.items():
        terminal.say(
            f"{start}{history.held_out_title(name)}: {result['loss']:.4f} nats/token,"
            f" {result['bits_per_byte']:.4f} bits/byte ({result['tokens']:,.0f} tokens)"
        )


def plot_losses(runs: Mapping[str, epath.Path], folder: epath.Path, terminal: Terminal) -> None:
    """Draws the losses of runs into loss.png. That it cannot be written ends no finished run."""
    if not distributed.is_first():
        return
    try:
        losses = {name: history.read_losses(path) for name, path in runs.items()}
        history.plot_losses(losses, folder / "loss.png")
        terminal.say(f"losses: {folder / 'loss.png'}")
    except Exception as e:  # matplotlib has many kinds
        terminal.say(f"warning: loss.png cannot be written: {reason(e)}")
