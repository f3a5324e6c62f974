"""Signals that stop a run: the loop asks whether to stop; all processes get the same answer."""

import os
import signal
from typing import Any

from ngpt_jax import signals

EXIT_DIVERGED = 3  # too many steps in a row were skipped
EXIT_RESUME = 75  # EX_TEMPFAIL: stopped by a signal after saving; to be resumed
_ANSWER = "received: stopping as soon as all is saved; a second Ctrl-C waits for one save at most"


class StopSignal:
    """Remembers that one of ``signals.STOP_SIGNALS`` came.

    A second Ctrl-C quits after the save in progress, if there is one.

    It is made before jax is loaded, so that no signal is missed. With several processes a signal to
    one of them stops all at the same call: jax then handles SIGTERM itself, and the other signals
    are passed on as SIGTERM.

    Attributes:
      name: of the signal that came; None before.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._polls, self._several, self._interrupted = 0, False, False
        self._listener = signals.Listener(self._on, _ANSWER)

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
        if self._several and number != signal.SIGTERM:
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
        self._listener.close()
