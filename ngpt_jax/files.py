"""Paths, local or gs://; files that are written whole or not at all; locks on files."""

import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, TYPE_CHECKING

from ngpt_jax.errors import ConfigError, tell

if TYPE_CHECKING:
    from etils import epath


def matching(folder: "epath.Path", pattern: str) -> list["epath.Path"]:
    """Sorted entries of a folder whose names match; none where there is no folder.

    Unlike ``epath.Path.glob`` it does not read brackets in the folder's own path as a pattern.
    """
    try:
        names = [entry.name for entry in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for name in sorted(fnmatch.filter(names, pattern))]


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL such as gs://bucket/run."""
    return "://" in os.fspath(path)


def write_atomically(path: os.PathLike[str] | str, content: str | bytes) -> None:
    """Writes a file; a reader sees the old content or the new one, never a part."""
    body = content.encode("utf-8") if isinstance(content, str) else content
    if is_remote(path):
        from etils import epath

        epath.Path(path).write_bytes(body)  # an object appears as a whole
        return
    folder, name = os.path.split(os.fspath(path))
    # By chance, as machines that share a disk may have processes of one number.
    temporary = os.path.join(folder, f".{name}.{secrets.randbits(63)}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(body)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def writing(where: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError of what is written inside, to files in ``where``, into a ConfigError."""
    try:
        yield
    except OSError as e:
        raise ConfigError(f"{e.filename or where} cannot be written: {reason(e)}.") from e


@contextlib.contextmanager
def writing_cache(cache: str | os.PathLike[str]) -> Iterator[None]:
    """As :func:`writing`, for files in the folder that the field data.cache names."""
    try:
        yield
    except OSError as e:
        where = f"data.cache = {os.fspath(cache)!r}"
        raise ConfigError(f"{where} cannot be written: {reason(e)}; give another folder.") from e


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Turns an OSError of what is read inside into a ConfigError that begins with ``where``."""
    try:
        yield
    except OSError as e:
        raise ConfigError(f"{where} cannot be read: {reason(e)}.") from e


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Removes what killed calls of :func:`write_atomically` left in a folder of this program's."""
    if not is_remote(folder):
        for name in os.listdir(folder):
            if re.fullmatch(r"\..+\.\d+\.tmp", name):
                os.unlink(os.path.join(folder, name))


def lock(path: str | os.PathLike[str], keep_waiting: Callable[[], bool] = lambda: True) -> IO[str]:
    """Opens a local file and locks it against every other call, of this process or of another.

    The lock ends when the file is closed, at the latest with this process and the child processes
    that inherited the file. Where the file system has no locks, a warning says so, and the file is
    returned without one.

    Args:
      path: made where it is missing; its text stays.
      keep_waiting: asked five times a second while the file is locked; False ends the wait.

    Returns:
      The open file; what is written is appended.

    Raises:
      BlockingIOError: the file is still locked when the wait ends.
      OSError: the file cannot be opened.
    """
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115
    try:
        while True:
            try:
                # Not lockf: its lock would be lost when this process closes another descriptor.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):  # both mean that it is locked
                if not keep_waiting():
                    raise BlockingIOError(errno.EAGAIN, "is locked", os.fspath(path)) from None
                time.sleep(0.2)
                continue
            except OSError as e:
                tell(
                    f"warning: {path} cannot be locked ({reason(e)}); make sure yourself that no"
                    " other program uses its folder."
                )
            return file
    except BaseException:
        file.close()
        raise


def digest_of(lines: Iterable[str]) -> str:
    """sha256 of lines of text, as hexadecimal digits."""
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def reason(error: BaseException) -> str:
    """The reason of an error of reading or writing, in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
