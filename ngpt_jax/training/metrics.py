"""Where metrics go: metrics.jsonl, TensorBoard and W&B."""

import contextlib
import json
import math
import os
import re
import secrets
import time
from typing import Any

from etils import epath
from tensorboardX import event_file_writer, summary
from tensorboardX.proto.event_pb2 import Event, SessionLog

from ngpt_jax.config import ConfigError
from ngpt_jax.errors import install_hint
from ngpt_jax.files import is_remote, matching, reason, write_atomically
from ngpt_jax.parallel import distributed
from ngpt_jax.training.workdir import RunError

Row = dict[str, float | None]  # scalars by name; what is None is left out
Results = dict[str, dict[str, float]]  # of an evaluation: metrics by held-out set


class MetricWriter:
    """Appends rows of scalars to the run's logs.

    Rows past ``start_step`` are dropped first: the steps after it are made again. On gs://, where
    nothing can be appended, each start has a file of its own, metrics-N.jsonl, and there is no
    TensorBoard.

    Attributes:
      path: the file of this start.
      results: of the evaluation at ``start_step``; empty if there was none.
    """

    def __init__(
        self, workdir: epath.Path, start_step: int, wandb_project: str | None = None,
        config: dict[str, Any] | None = None, same_held_out: bool = True,
    ):  # fmt: skip
        """
        Args:
          workdir: the run's folder.
          start_step: the step that the run goes on from.
          wandb_project: of Weights & Biases; None: not used.
          config: shown there.
          same_held_out: whether the held-out text is that of the rows; if not, the evaluation at
            ``start_step`` is dropped too.

        Raises:
          ConfigError: W&B does not start.
          OSError: the folder cannot be written.
        """
        # First, as it may refuse to start.
        self._wandb = _start_wandb(wandb_project, config, workdir) if wandb_project else None
        found = {_start_number(path.name): path for path in matching(workdir, "metrics*.jsonl")}
        old = [path for number, path in sorted(found.items()) if number >= -1]
        self.results: Results = {}
        for path in old:
            self._keep_rows_up_to(start_step, path, same_held_out)
        remote = is_remote(workdir)
        name = f"metrics-{max([-1, *found]) + 1:04}.jsonl" if remote else "metrics.jsonl"
        self.path, self._text = workdir / name, ""
        self._file = None if remote else open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self._tensorboard = None if remote else _TensorBoard(workdir, start_step)

    def _keep_rows_up_to(self, step: int, path: epath.Path, same_held_out: bool) -> None:
        text, kept = path.read_bytes(), []
        for line in text.splitlines(keepends=True):
            try:
                row = json.loads(line.decode())
                at_step, evaluated = row["step"] == step, any(n.startswith("eval/") for n in row)
                if at_step and evaluated and not same_held_out:
                    continue
                if row["step"] <= step and step > 0:
                    kept.append(line if line.endswith(b"\n") else line + b"\n")
                if row["step"] == step:
                    self._remember(row)
            except (ValueError, KeyError, TypeError):
                continue  # the half line of a crash
        if (new := b"".join(kept)) != text:
            write_atomically(path, new.decode())

    def _remember(self, row: dict[str, float]) -> None:
        for key, value in row.items():
            kind, _, rest = key.partition("/")
            if kind == "eval":
                name, _, metric = rest.rpartition("/")
                self.results.setdefault(name, {})[metric] = value

    def write(self, step: int, row: Row) -> None:
        """Writes one row; what is None or not finite is left out."""
        some = {name: x for name, x in row.items() if x is not None and math.isfinite(x)}
        line = json.dumps({"step": step, **some}) + "\n"
        if self._file is None:
            self._text += line
            self.path.write_text(self._text)
        else:
            self._file.write(line)
            self._file.flush()
        if self._tensorboard is not None:
            self._tensorboard.write(step, some)
        if self._wandb is not None:
            self._wandb.log(some, step=step)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a row whose failure was told before
            if self._tensorboard is not None:
                self._tensorboard.close()
            if self._file is not None:
                self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def write_on_first(writer: MetricWriter | None, step: int, row: Row) -> None:
    """Writes a row on process 0, which has the writer; where that fails, all raise RunError."""

    def write() -> None:
        if writer is None:
            return
        try:
            writer.write(step, row)
        except OSError as e:
            raise RunError(
                f"{e.filename or writer.path} cannot be written: {reason(e)}; make room, and start"
                " the same command again."
            ) from e

    distributed.together(write, RunError)


def _start_number(name: str) -> int:
    """Of a file of metrics: -1 for metrics.jsonl, N for metrics-N.jsonl; -2 for other files."""
    found = re.fullmatch(r"metrics(?:-(\d{4,}))?\.jsonl", name)
    return -2 if found is None else int(found[1] or -1)


class _TensorBoard:
    """Event files of scalars, written at once.

    Not tensorboardX's SummaryWriter: it writes from a thread, which ends when the disk is full, and
    then the program waits for it for ever.
    """

    def __init__(self, workdir: epath.Path, start_step: int):
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        # Two starts within a second must not share a file.
        suffix = f".{os.getpid()}.{secrets.token_hex(4)}"
        self._writer = event_file_writer.EventsWriter(str(folder / "events"), suffix)
        # Hides what an earlier start has written past the restored step.
        start = SessionLog(status=SessionLog.START)
        self._write(Event(step=start_step + 1, session_log=start))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
        self._writer.flush()

    def write(self, step: int, row: dict[str, float]) -> None:
        values = [value for name, x in row.items() for value in summary.scalar(name, x).value]
        self._write(Event(step=step, summary=summary.Summary(value=values)))

    def close(self) -> None:
        self._writer.close()


def _start_wandb(project: str, config: dict[str, Any] | None, workdir: epath.Path) -> Any:
    try:
        import wandb
    except ImportError as e:
        raise ConfigError(
            f"log.wandb_project needs wandb: {install_hint('wandb')}, or set it to None."
        ) from e
    id_file = workdir / "wandb_id"
    if not id_file.exists():
        write_atomically(id_file, secrets.token_hex(8))
    try:
        return wandb.init(
            project=project,
            config=config,
            dir=None if is_remote(workdir) else str(workdir),
            name=workdir.name,
            id=id_file.read_text(),
            resume="allow",
        )
    except Exception as e:  # not logged in, no network: wandb has many kinds
        raise ConfigError(
            f"log.wandb_project: wandb did not start ({e}); or set it to None."
        ) from e
