"""What a person sees: a progress bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Sequence

from rich import console as rich_console
from rich import progress as rich_progress


def format_duration(seconds: float) -> str:
    """Such as 1:02:05, or 2:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_bytes(count: float) -> str:
    """Such as 1.5 KiB; GiB are the largest unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.2f} GiB"


def format_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of text as aligned columns; the first row is underlined."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _unread() -> contextlib.AbstractContextManager[None]:
    """Around what is written to people, who may be unable to read it."""
    return contextlib.suppress(OSError, ValueError)  # UnicodeEncodeError is a ValueError


class _Console(rich_console.Console):
    def on_broken_pipe(self) -> None:
        """Without this rich would end the program."""
        self.quiet = True


class Terminal:
    """A progress bar on a terminal, plain lines elsewhere, nothing where ``quiet``.

    A closed pipe, a terminal that has gone or a full disk does not end a run.
    """

    def __init__(self, quiet: bool = False):
        self._quiet = quiet
        self._console = _Console(file=sys.stdout, highlight=False)
        self._draws = self._console.is_terminal and not self._console.is_dumb_terminal
        self._bar: rich_progress.Progress | None = None
        self._shown = self._told = 0.0
        self._status = ""

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        with _unread():
            if self._bar:
                self._bar.console.print(text, markup=False, emoji=False, soft_wrap=True)
            elif not self._quiet:
                print(text, flush=True)

    def show(self, label: str, share: float, status: str | None = None) -> None:
        """Moves the bar; without a new status at most five times a second, as that costs time."""
        now = time.monotonic()
        if self._quiet or not self._draws or (status is None and now < self._shown):
            return
        self._shown = now + 0.2
        if self._bar is None:
            self._bar = rich_progress.Progress(
                rich_progress.TextColumn("{task.fields[label]}"),
                rich_progress.BarColumn(bar_width=12),
                rich_progress.TextColumn("{task.fields[status]}"),
                console=self._console,
                auto_refresh=False,
            )
            self._task = self._bar.add_task("", total=1.0, label=label, status="")
            with _unread():
                self._bar.start()
        self._status = self._status if status is None else status
        with _unread():
            self._bar.update(
                self._task, completed=share, refresh=True, label=label, status=self._status
            )

    def tell(self, text: str, seconds: float = 0.0) -> None:
        """Prints a line where there is no bar, at most one in ``seconds``."""
        now = time.monotonic()
        if not self._bar and now >= self._told:
            self._told = now + seconds
            self.say(text)

    def close(self) -> None:
        """Ends the bar; a new one may follow."""
        if self._bar:
            with _unread():
                self._bar.stop()
            self._bar, self._status = None, ""
