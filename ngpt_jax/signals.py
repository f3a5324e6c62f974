"""The signals that ask a program to stop, answered at once in one line."""

import contextlib
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

# Of people (Ctrl-C, a terminal that is closed) and of machines: spot instances send SIGTERM, SLURM
# sends SIGUSR1 or SIGUSR2, and SIGXCPU tells that the CPU time is nearly used up.
STOP_SIGNALS = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU,
)  # fmt: skip
_ALWAYS = (signal.SIGINT, signal.SIGTERM)  # shells ignore SIGINT for what runs in the background


class Listener:
    """Handles the signals that ask to stop, until :meth:`close`; made on the main thread.

    Python calls a handler only between two steps of the interpreter, so not inside a long call into
    C, as that of a tokenizer (in some versions of jax, of XLA's compiler too). The line that
    answers the first signal is therefore printed by a thread of its own. A signal that is ignored,
    as nohup does with SIGHUP, stays ignored.
    """

    def __init__(self, handler: Callable[[int, Any], None], answer: str):
        """
        Args:
          handler: of each signal, called on the main thread.
          answer: printed at the first signal, after its name.
        """
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._answer, self._old = answer, {}
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._answer_first, name="signals", daemon=True).start()
        for number in STOP_SIGNALS:
            if number in _ALWAYS or signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._old[number] = signal.signal(number, handler)

    def _answer_first(self) -> None:
        answer = self._answer
        with open(self._read, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if answer and number[0] in STOP_SIGNALS:
                    with contextlib.suppress(OSError, ValueError):  # nobody reads it
                        print(f"{signal.Signals(number[0]).name} {answer}", flush=True)
                    answer = ""

    def close(self) -> None:
        """Puts the earlier handlers back."""
        for number, handler in self._old.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._write)


def ignore() -> None:
    """Lets a worker process ignore the signals: its parent decides what they mean."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Processes that are started inside are born with the signals blocked.

    So Ctrl-C, which goes to all processes of a terminal, does not end a worker that is about to
    call :func:`ignore`. In this process they wait until the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        multiprocessing.resource_tracker.ensure_running()  # its start would unblock some
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
