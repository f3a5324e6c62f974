"""What a person sees: a progress bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from rich import console as rich_console
from rich import progress as rich_progress

_BAR = 12  # characters
_SILENCE = 8.0  # seconds after which a line tells that work goes on


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
        self._lock = threading.RLock()  # "doing" shows from a thread of its own
        self._shown = 0.0
        self._told = self._start = time.monotonic()
        self._label, self._status = "", ""
        self._share: float | None = None

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        with self._lock, _unread():
            self._told = time.monotonic()
            if self._bar:
                self._bar.console.print(text, markup=False, emoji=False, soft_wrap=True)
            elif not self._quiet:
                print(text, flush=True)

    def wants_news(self) -> bool:
        """Whether :meth:`show` would show something: it is asked before that is looked up."""
        now = time.monotonic()
        return not self._quiet and now >= (self._shown if self._draws else self._told + _SILENCE)

    def show(self, label: str, share: float | None, status: str | None = None) -> None:
        """Moves the bar; without a bar a line, where nothing was printed for a while.

        Args:
          label: what is being done.
          share: of it that is done; None: not known.
          status: more; None: as before. Then the bar moves at most five times a second, as that
            costs time.
        """
        now = time.monotonic()
        if self._quiet:
            return
        with self._lock:
            self._label, self._share = label, share
            self._status = self._status if status is None else status
            if not self._draws:
                if now >= self._told + _SILENCE:
                    self.say("  ".join(filter(None, (label, self._percent(), self._status))))
            elif status is not None or now >= self._shown:
                self._shown = now + 0.2
                self._draw(self._status)

    def _percent(self) -> str:
        return "" if self._share is None else f"{self._share:4.0%}"

    def _draw(self, status: str) -> None:
        with _unread():
            if self._bar is None:
                self._bar = rich_progress.Progress(
                    rich_progress.TextColumn("{task.fields[label]}", markup=False),
                    rich_progress.TextColumn("{task.fields[share]}", markup=True),
                    rich_progress.TextColumn("{task.fields[status]}", markup=False),
                    console=self._console,
                    auto_refresh=False,
                    transient=True,
                )
                self._task = self._bar.add_task("", total=1.0, label="", share="", status="")
                self._bar.start()
            full = round(_BAR * (self._share or 0.0))
            bar = (
                "" if self._share is None else f"[cyan]{'━' * full}[/][dim]{'━' * (_BAR - full)}[/]"
            )
            self._bar.update(
                self._task, refresh=True, label=self._label, share=f"{bar} {self._percent()}",
                status=status,
            )  # fmt: skip

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[Callable[[float], None]]:
        """Shows what is done inside, and for how long: it may take a while, and print nothing.

        Yields a function that takes the share of it that is done, for the time that is left.
        """
        start, end, done = time.monotonic(), threading.Event(), 0.0

        def tell() -> None:
            while not end.wait(0.5):
                seconds = time.monotonic() - start
                line = f"{what}, {format_duration(seconds)}"
                if done:
                    line += f", {done:.0%}, eta {format_duration(seconds * (1 - done) / done)}"
                with self._lock:
                    if end.is_set() or self._quiet:
                        return
                    if self._draws:
                        self._draw(line)
                    elif time.monotonic() >= self._told + _SILENCE:
                        self.say(line)

        def show_done(share: float) -> None:
            nonlocal done
            done = share

        threading.Thread(target=tell, name="terminal", daemon=True).start()
        try:
            yield show_done
        finally:
            with self._lock:
                end.set()
                if self._bar:
                    self._draw(self._status)

    def elapsed(self) -> str:
        """Since this object was made."""
        return format_duration(time.monotonic() - self._start)

    def tell(self, text: str, seconds: float = 0.0) -> None:
        """Prints a line where there is no bar, and nothing was printed for ``seconds``."""
        if not self._bar and time.monotonic() >= self._told + seconds:
            self.say(text)

    def close(self) -> None:
        """Takes the bar away; a new one may follow."""
        with self._lock:
            if self._bar:
                with _unread():
                    self._bar.stop()
                self._bar = None
            self._label, self._share, self._status = "", None, ""
