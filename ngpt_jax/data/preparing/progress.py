"""Progress of work on data, told also while a single document or file takes long."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from ngpt_jax.terminal import Terminal, format_duration

_LONG = 5.0  # seconds without progress after which it is told what is being done


class Progress:
    """Shows progress and the time that is left; as a context, also what takes long.

    A thread tells it, so that the work itself need not return to say something.

    Args:
      label: what is being done.
      terminal: to show it on; None: nothing is shown.
      doing: as of :meth:`doing`.
    """

    def __init__(self, label: str, terminal: Terminal | None, doing: str = ""):
        self._label, self._terminal = label, terminal
        self._sizes: Sequence[int] = ()
        self._start, self._first, self._share, self._tokens = time.monotonic(), -1.0, 0.0, 0
        self._doing, self._since = doing, self._start
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._tell, daemon=True)

    def __enter__(self) -> Progress:
        if self._terminal is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._terminal is not None:
            self._thread.join()

    def doing(self, what: str) -> None:
        """Names what is being done from now on, for the case that it takes long."""
        with self._lock:
            self._doing, self._since = what, time.monotonic()

    def begin(self, sizes: Sequence[int]) -> None:
        """Starts the clock; ``sizes`` are those of the groups to go through."""
        self._sizes, self._start = sizes, time.monotonic()

    def show(self, group: int, done: int, tokens: int) -> None:
        """Shows that ``done`` of a group's size are read, and ``tokens`` more are written."""
        if self._terminal is None:
            return
        share = min((sum(self._sizes[:group]) + done) / max(sum(self._sizes), 1), 1.0)
        self._first = share if self._first < 0 else self._first
        self._tokens += tokens
        seconds = max(time.monotonic() - self._start, 1e-9)
        status = f"{self._tokens / seconds:,.0f} tokens/s"
        if share > self._first:
            left = (1 - share) / (share - self._first) * seconds
            status += f"  eta {format_duration(left)}"
        with self._lock:
            self._share = share
            self._say(status)

    def _tell(self) -> None:
        while not self._end.wait(0.5):
            with self._lock:
                waited = time.monotonic() - self._since
                if self._doing and waited > _LONG:
                    self._say(f"{self._doing} for {format_duration(waited)}")

    def _say(self, status: str) -> None:
        assert self._terminal is not None
        self._terminal.show(self._label, self._share if self._sizes else None, status)
