"""What the steps return, gathered into a row of metrics and a line for the user."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from ngpt_jax.config import Config
from ngpt_jax.terminal import Terminal, format_duration
from ngpt_jax.training import throughput
from ngpt_jax.training.metrics import Row
from ngpt_jax.training.step import summarize_params
from ngpt_jax.training.workdir import Diverged


@dataclasses.dataclass
class Progress:
    """Where a run is, saved with each checkpoint.

    Attributes:
      position: sequences consumed: the place in the data.
      losses: of the accepted steps since the last row of metrics.
      seconds: of training, over all starts; without evaluations and saves.
    """

    position: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


class Stopwatch:
    """Adds up the seconds that pass inside ``with stopwatch:``."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


class Logger:
    """Keeps what each step returns, and writes a row every ``log.every`` steps and at the last.

    Attributes:
      clock: runs during steps; what passes meanwhile counts as training.
      data_clock: runs while a step waits for its batch.
      loss: of the last row; None where all its steps were skipped, or before.
      terminal: shows the run.
    """

    def __init__(
        self, config: Config, progress: Progress, write: Callable[[int, Row], None],
        terminal: Terminal, last_saved: Callable[[], str],
    ):  # fmt: skip
        """
        Args:
          config: resolved.
          progress: of the run; its losses and seconds are kept up to date.
          write: takes a step and its row of metrics.
          terminal: shows the run.
          last_saved: names the newest checkpoint, for a run that ends.
        """
        assert config.train.steps is not None
        self._model, self._steps, self._every = config.model, config.train.steps, config.log.every
        self._context = config.model.context
        self._tokens_per_step = config.train.batch_size * self._context
        self._max_skipped = config.train.max_skipped
        self._progress, self._write, self.terminal = progress, write, terminal
        self._last_saved = last_saved
        model = config.model
        self._summarize = jax.jit(lambda params: summarize_params(model, params))
        self.compile_seconds: float | None = None  # told in the next row
        self._rates: list[float] = []  # tokens/s of the rows
        self._pending: list[dict[str, jax.Array]] = []  # of steps that are not yet fetched
        self.loss: float | None = None
        self._last: jax.Array | None = None  # loss of the last step that is known to be finished
        self._rate, self._end = "", 0.0  # as of the last row: tokens/s, and the end of the run
        self._restart()

    def _restart(self) -> None:
        self.clock, self.data_clock, self._steps_of_row = Stopwatch(), Stopwatch(), 0

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes what a step returned; the device may still be at it."""
        self._pending.append(metrics)
        self._steps_of_row += 1
        if self.terminal.wants_news():
            self._show_finished(step)

    def _show_finished(self, step: int) -> None:
        """Shows the last step that the device has finished; ``step`` is the last that was added."""
        unfinished = 0
        for metrics in reversed(self._pending):
            loss: Any = metrics["loss"]  # mypy does not know is_ready
            if loss.is_ready():
                self._last = loss
                break
            unfinished += 1
        self._show_at(step - unfinished)

    def due(self, step: int) -> bool:
        """Whether a row is due after this many steps."""
        return step % self._every == 0 or step == self._steps

    def fetch(self, step: int) -> dict[str, float]:
        """Waits for the device; done only when a row or a checkpoint is due.

        Args:
          step: the last step that was added.

        Returns:
          Its metrics; nothing where they were fetched before.

        Raises:
          Diverged: too many steps in a row were skipped.
        """
        with self.clock:
            for number, of_step in enumerate(self._pending, start=step - len(self._pending) + 1):
                jax.block_until_ready(of_step)
                self._last = of_step["loss"]
                if self.terminal.wants_news():
                    self._show_at(number)
            fetched = [
                {name: float(x) for name, x in metrics.items()}
                for metrics in jax.device_get(self._pending)
            ]
        self._pending = []
        for number, metrics in enumerate(fetched, start=step - len(fetched) + 1):
            if not metrics["skipped_in_row"]:
                self._progress.losses.append(metrics["loss"])
            elif metrics["skipped_in_row"] >= self._max_skipped:
                raise Diverged(
                    f"{int(metrics['skipped_in_row'])} steps in a row were skipped, the last of"
                    f" them step {number} (loss {metrics['loss']:.4g}, gradient norm"
                    f" {metrics['grad_norm']:.4g}); the last checkpoint is {self._last_saved()}."
                    " Try a lower optimizer.learning_rate, more optimizer.warmup_steps,"
                    " model.dtype=float32, or a larger train.spike_deviations if that is set; look"
                    " at the data of these steps."
                )
        return fetched[-1] if fetched else {}

    def progress(self) -> Progress:
        """That of the run, with the seconds since the last row, as a checkpoint has it."""
        seconds = self._progress.seconds + self.clock.seconds
        return dataclasses.replace(self._progress, seconds=seconds)

    def write_row(self, step: int, params: Any) -> None:
        """Writes the row of the steps since the last one."""
        metrics, progress = self.fetch(step), self._progress
        seconds, tokens = self.clock.seconds, self._tokens_per_step
        progress.seconds += seconds
        rate = self._steps_of_row * tokens / seconds
        self._rates.append(rate)
        usual_rate = statistics.median(self._rates[-5:])
        with self.terminal.doing("measuring the parameters"):  # compiled at the first row
            summary = jax.device_get(self._summarize(params))
        row: Row = {
            "loss": statistics.fmean(progress.losses) if progress.losses else None,
            **{name: metrics[name] for name in ("grad_norm", "learning_rate", "skipped")},
            "tokens": progress.position * self._context,
            "seconds": progress.seconds,
            "tokens_per_second": rate,
            "mfu": throughput.mfu(self._model, rate),
            "data_wait_seconds": self.data_clock.seconds / self._steps_of_row,
            "compile_seconds": self.compile_seconds,
            "eta_seconds": (self._steps - step) * tokens / usual_rate,
            **{name: float(value) for name, value in summary.items()},
        }
        self._write(step, {f"train/{name}": value for name, value in row.items()})
        self.loss = row["loss"]
        self._show(step, row)
        progress.losses, self.compile_seconds = [], None
        self._restart()

    def _label(self, step: int) -> str:
        return f"step {step:>6}/{self._steps}"

    def _show_at(self, step: int) -> None:
        loss = "" if self._last is None else f"loss {float(self._last):.4f}"
        left = max(0.0, self._end - time.monotonic())
        eta = f"eta {format_duration(left)}" if self._end else ""
        elapsed = f"elapsed {self.terminal.elapsed()}"
        shown = "  ".join(filter(None, (loss, self._rate, eta, elapsed)))
        self.terminal.show(self._label(step), step / self._steps, shown)

    def _show(self, step: int, row: dict[str, Any]) -> None:
        loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
        skipped = f"  {row['skipped']:.0f} skipped" if row["skipped"] else ""
        rate = f"{row['tokens_per_second']:,.0f} tokens/s"
        eta = f"eta {format_duration(row['eta_seconds'])}"
        more = f"  grad {row['grad_norm']:.3f}  lr {row['learning_rate']:.2e}"
        self.terminal.tell(f"{self._label(step)}  loss {loss}  {rate}  {eta}{more}{skipped}")
        self._rate, self._end = rate + skipped, time.monotonic() + row["eta_seconds"]
        self._show_at(step)
