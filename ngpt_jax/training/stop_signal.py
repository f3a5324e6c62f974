"""SIGTERM and Ctrl-C: the loop asks whether to stop, and all processes get the same answer."""

import os
import signal
from typing import Any

EXIT_RESUME = 75  # EX_TEMPFAIL: stopped by a signal after saving; the same command goes on


class StopSignal:
    """Remembers SIGTERM and the first Ctrl-C; a second Ctrl-C quits at once.

    It is made before jax is loaded, so that no signal is missed. With several processes a signal to
    one of them stops all at the same call: jax then handles SIGTERM itself, and Ctrl-C is passed on
    as SIGTERM.

    Attributes:
      name: of the signal that came; None before.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._polls, self._several, self._interrupted = 0, False, False
        self._old = {s: signal.signal(s, self._on) for s in (signal.SIGINT, signal.SIGTERM)}

    def attach(self) -> None:
        """To be called after the processes have met."""
        import jax

        self._several = jax.process_count() > 1
        if self._several and self.name is not None:  # came before: tell the other processes
            self.name = None
            os.kill(os.getpid(), signal.SIGTERM)

    def _on(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        if self._several and number == signal.SIGINT:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.name = signal.Signals(number).name

    def __call__(self) -> bool:
        """Whether to stop. With several processes, all have to ask equally often."""
        if self._several and self.name is None:
            from ngpt_jax.parallel import distributed

            self._polls += 1
            if distributed.stop_agreed(self._polls):
                self.name = "SIGTERM"
        return self.name is not None

    def restore(self) -> None:
        """Puts the earlier signal handlers back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
