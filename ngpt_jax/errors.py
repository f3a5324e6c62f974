"""What a program tells its user: the one error that is meant for people, how to install what is
missing, and lines on stderr.
"""

import contextlib
import io
import os
import sys


class ConfigError(ValueError):
    """Bad input of the user's: one line that names the field and the mend."""


def install_hint(extra: str) -> str:
    """How to install what an extra of pyproject.toml holds: the package is in no registry."""
    return f"pip install '.[{extra}]' in the clone of ngpt_jax"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of XLA says that the device has too little memory."""
    return any(text in str(error) for text in ("RESOURCE_EXHAUSTED", "Ran out of memory"))


def tell(line: str) -> None:
    """A line on stderr. That nobody can read it ends nothing."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def mend_output() -> None:
    r"""Lets stdout and stderr write \xe9, say, where their encoding has no such character.

    Where one was closed before the start, what is written to it is lost.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def drop_unwritten() -> None:
    """Throws away what stdout and stderr cannot write; Python would change the exit code for it.

    For the end of programs whose work lies in files, as that of training does.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
