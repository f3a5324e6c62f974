"""Two models side by side: both make each step on the same batch."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from ngpt_jax.config import Config, ConfigError
from ngpt_jax.data.preparing.folder import Stopped
from ngpt_jax.terminal import Terminal
from ngpt_jax.training import loop
from ngpt_jax.training.setup import Run, open_run
from ngpt_jax.training.stop_signal import EXIT_RESUME, StopSignal


def duel(configs: Mapping[str, Config], folder: epath.PathLike, stop: StopSignal) -> int:
    """Trains models in turns and shows their losses in one table, and in one plot at the end.

    Each is an ordinary run in a folder of its own, so a stopped duel goes on.

    Args:
      configs: two or more by their names, resolved; they read the same batches.
      folder: for the folders of the runs, named as the configs, and the plot.
      stop: hears of signals.

    Returns:
      The exit code, as :func:`ngpt_jax.training.loop.train`.

    Raises:
      ConfigError: bad input, or configs that do not read the same batches.
      RunError: a run cannot go on.
    """
    _check_same_batches(configs)
    terminal, runs = Terminal(), {}
    losses: dict[str, float] = {}  # of the newest step of each
    with contextlib.ExitStack() as stack:
        stack.callback(stop.restore)
        stack.callback(terminal.close)
        for name, config in configs.items():
            path = epath.Path(folder) / name
            try:
                run = open_run(config, path, False, stop, terminal, stack)
            except Stopped:
                return EXIT_RESUME
            run.logger.terminal = Terminal(quiet=True)
            run.evaluator.prefix = f"{name}: "
            run.train_step = _waiting(run.train_step, losses, name)
            runs[name] = run
        _take_turns(runs, losses, terminal)
        terminal.close()
        if not all(run.finished() for run in runs.values()):
            terminal.say(f"{stop.name}: saved; run the same command again to resume")
            return EXIT_RESUME
        for name, run in runs.items():
            loop.tell_results(run, terminal, f"{name}: ")
        ends = {name: run.evaluator.loss_at(run.step) or 0.0 for name, run in runs.items()}
        best, *_, worst = sorted(ends, key=lambda name: ends[name])
        lead = f"{best} is {ends[worst] - ends[best]:.4f} nats/token below {worst}"
        terminal.say(f"{lead}; that is one seed of each")
        loop.plot_losses(
            {name: run.workdir for name, run in runs.items()}, epath.Path(folder), terminal
        )
        return 0


def _check_same_batches(configs: Mapping[str, Config]) -> None:
    def facts(config: Config) -> tuple[Any, ...]:
        train = config.train
        return train.steps, train.batch_size, config.model.context, config.data, config.eval

    first, *rest = map(facts, configs.values())
    if any(other != first for other in rest):
        raise ConfigError(
            "the models read different batches; give them the same train.steps, train.batch_size,"
            " model.context, data and eval."
        )


def _waiting(train_step: Any, losses: dict[str, float], name: str) -> Callable[..., Any]:
    """The step, which then returns only when the device is done: each model has its own clock."""

    def step(state: Any, batch: Any) -> Any:
        state, metrics = jax.block_until_ready(train_step(state, batch))
        losses[name] = float(metrics["loss"])
        return state, metrics

    return step


def _take_turns(runs: Mapping[str, Run], newest: dict[str, float], terminal: Terminal) -> None:
    """Makes all steps; the run that is behind goes first. Says a row of losses for each row."""
    turns = {name: loop.steps_of(run) for name, run in runs.items()}
    losses: dict[int, dict[str, str]] = {}
    steps = next(iter(runs.values())).steps
    width = max(8, *map(len, runs))
    terminal.say("  ".join(["  step", *(f"{name:>{width}}" for name in runs), "training loss"]))
    while turns:
        name = min(turns, key=lambda name: runs[name].step)
        run = runs[name]
        if next(turns[name], turns) is turns:  # at its end
            del turns[name]
            continue
        if run.logger.due(run.step) and run.logger.loss is not None:
            row = losses.setdefault(run.step, {})
            row.setdefault(name, f"{run.logger.loss:{width}.4f}")
            if len(row) == len(runs):
                del losses[run.step]
                terminal.say("  ".join([f"{run.step:6}", *(row[name] for name in runs)]))
        if terminal.wants_news() or run.step == steps:
            now = "  ".join(f"{name} {newest[name]:.4f}" for name in runs if name in newest)
            status = f"{now}  elapsed {terminal.elapsed()}"
            terminal.show(f"step {run.step:>6}/{steps}", run.step / steps, status)
