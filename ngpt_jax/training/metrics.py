"""Where metrics go: metrics.jsonl, TensorBoard, W&B, and the terminal."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import tensorboardX
from rich import console as rich_console
from rich import progress as rich_progress

from ngpt_jax.config import Config, ConfigError


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


class MetricWriter:
    """Appends rows of scalars to the run's logs; rows past ``start_step`` are dropped first,
    so that a resumed run has none twice.
    """

    def __init__(self, workdir: Path, start_step: int, config: Config):
        self._path = workdir / "metrics.jsonl"
        self._drop_rows_past(start_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=start_step + 1
        )
        self._wandb = _start_wandb(config, workdir) if config.log.wandb_project else None

    def _drop_rows_past(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step and step > 0:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                break  # the half line of a crash; nothing whole follows it
        write_atomically(self._path, "".join(kept))

    def write(self, step: int, row: dict[str, float]) -> None:
        """One row; None values are left out."""
        row = {name: value for name, value in row.items() if value is not None}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        for name, value in row.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(row, step=step)

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class NoWriter:
    """What the processes write that are not the first: nothing."""

    def write(self, step: int, row: dict[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


def _start_wandb(config: Config, workdir: Path) -> Any:
    try:
        import wandb
    except ImportError as e:
        raise ConfigError(
            "log.wandb_project needs wandb: pip install 'ngpt-jax[wandb]', or set it to None."
        ) from e
    id_file = workdir / "wandb_id"
    if not id_file.exists():
        write_atomically(id_file, secrets.token_hex(8))
    try:
        return wandb.init(
            project=config.log.wandb_project,
            config=dataclasses.asdict(config),
            dir=str(workdir),
            name=workdir.name,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
        )
    except Exception as e:  # not logged in, no network: wandb has many kinds
        raise ConfigError(
            f"log.wandb_project: wandb did not start ({e}); or set it to None."
        ) from e


def format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Terminal:
    """A progress bar on a terminal, plain lines elsewhere, nothing where ``quiet``."""

    def __init__(self, start_step: int, steps: int, quiet: bool = False):
        self._steps, self._quiet = steps, quiet
        self._console = rich_console.Console(file=sys.stdout, highlight=False)
        self._bar: rich_progress.Progress | None = None
        self._last_update = 0.0
        if self._console.is_terminal and not quiet:
            self._bar = rich_progress.Progress(
                rich_progress.TextColumn("step {task.completed:>6}/{task.total}"),
                rich_progress.BarColumn(bar_width=12),
                rich_progress.TextColumn("{task.fields[status]}"),
                console=self._console,
                auto_refresh=False,
            )
            self._task = self._bar.add_task("", total=steps, completed=start_step, status="")
            self._bar.start()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar:
            self._bar.console.print(text, markup=False, emoji=False, soft_wrap=True)
        elif not self._quiet:
            print(text, flush=True)

    def advance(self, step: int) -> None:
        if self._bar and time.monotonic() - self._last_update > 0.2:
            self._last_update = time.monotonic()
            self._bar.update(self._task, completed=step, refresh=True)

    def train_row(self, step: int, row: dict[str, Any]) -> None:
        """Shows an interval's loss, speed and time to go."""
        rate = row["train/tokens_per_second"]
        eta = format_duration(row["train/eta_seconds"])
        status = f"loss {row['train/loss']:.4f}  {rate:,.0f} tokens/s  eta {eta}"
        if self._bar:
            self._bar.update(self._task, completed=step, status=status, refresh=True)
            return
        extra = f"  grad {row['train/grad_norm']:.3f}  lr {row['train/learning_rate']:.2e}"
        self.say(f"step {step:>6}/{self._steps}  {status}{extra}")

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
