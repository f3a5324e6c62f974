"""Hides what orbax prints where a write fails: the save raises the error, told in one line."""

import contextlib
import gc
import logging
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

_LAST_WORDS = 1.0  # seconds after a failed save in which TensorStore's own threads may still fail


class _NoStacks(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text = str(record.msg)
        of_a_write = any(word in text for word in ("serialize", "OSError", "os_error_code"))
        never_retrieved = "never retrieved" in text and of_a_write
        return not never_retrieved and "_SignalingThread.run() raised" not in text


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Hides what orbax and Python print of failed writes, until it is left.

    orbax logs the stack of every array whose write fails. Writes under way at the first failure
    fail too, or end after orbax has closed their event loop, and Python prints each of these. The
    filter and the hook are those of the whole process, so they stay for one save only.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    no_stacks, before = _NoStacks(), sys.unraisablehook

    def hook(args: Any) -> None:
        if str(args.exc_value) != "Event loop is closed":
            before(args)

    for logger in loggers:
        logger.addFilter(no_stacks)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(no_stacks)
        if sys.unraisablehook is hook:
            sys.unraisablehook = before


def await_last_words(timeout: float) -> None:
    """Waits, after a failed save, until the other writes have failed as well."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            with contextlib.suppress(Exception):  # join raises what the thread ended with
                thread.join(timeout)
    time.sleep(_LAST_WORDS)
    gc.collect()  # tasks whose error nobody asked for say so when they are collected
