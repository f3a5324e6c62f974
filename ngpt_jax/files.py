"""Paths, local or gs://, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from typing import IO

from ngpt_jax.errors import ConfigError


def is_remote(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


def write_atomically(path: os.PathLike[str], text: str) -> None:
    """Writes a file so that a reader sees the old text or the new one, never a part."""
    if is_remote(path):
        from etils import epath

        epath.Path(path).write_text(text)  # an object appears as a whole
        return
    folder, name = os.path.split(os.fspath(path))
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def lock(path: str | os.PathLike[str], wait: bool = False) -> IO[str] | None:
    """Takes the exclusive lock of a local file, which is made where it is missing.

    Args:
      path: of the file.
      wait: until other programs have released it.

    Returns:
      The open file. Closing it releases the lock, once every process that inherited the file has
      closed it too. None where another program has the lock and ``wait`` is False.
    """
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        file.close()
        return None


@contextlib.contextmanager
def writing(where: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError of what is written inside, to files in ``where``, into a ConfigError."""
    try:
        yield
    except OSError as e:
        raise ConfigError(f"{e.filename or where} cannot be written: {reason(e)}.") from e


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Removes what killed calls of :func:`write_atomically` have left; nobody else may write."""
    if not is_remote(folder):
        for name in os.listdir(folder):
            if re.fullmatch(r"\..+\.\d+\.tmp", name):
                os.unlink(os.path.join(folder, name))


def digest_of(lines: Iterable[str]) -> str:
    """sha256 of lines of text, as hexadecimal digits."""
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def reason(error: BaseException) -> str:
    """What an error of reading or writing says, in short."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
