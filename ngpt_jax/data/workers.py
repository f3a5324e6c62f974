"""What worker processes do about signals and about the end of their parent."""

import multiprocessing
import os
import threading

from ngpt_jax import signals


def follow_parent(*_: object) -> None:
    """Called in a worker: it ignores signals, and ends when its parent ends, even by SIGKILL."""
    signals.ignore()

    def watch() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
