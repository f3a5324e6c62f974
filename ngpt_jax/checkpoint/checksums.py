"""Sizes and checksums of a checkpoint's files, by which it is known to be whole.

They stand in the checkpoint's manifest.json, which is written last.
"""

import errno
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from ngpt_jax.files import write_atomically

MANIFEST = "manifest.json"
_CHUNK = 1 << 22  # bytes; zlib lets other threads run while it reads one
_THREADS = 4


class DamagedCheckpoint(Exception):
    """A checkpoint is not as it was written; the message names the file and what is wrong."""


def write(folder: epath.Path, facts: dict[str, Any]) -> None:
    """Writes the manifest of all files in the folder, with further JSON-able facts.

    Raises OSError.
    """
    names = sorted(_files(folder))
    with ThreadPoolExecutor(_THREADS) as pool:
        measured = list(pool.map(lambda name: _measure(folder / name), names))
    files = {name: {"bytes": size, "crc32": crc} for name, (size, crc) in zip(names, measured)}
    (folder / MANIFEST).write_text(_text({**facts, "files": files}))


def read(folder: epath.Path) -> dict[str, Any]:
    """The facts and ``files`` of the manifest, which is checked itself.

    Raises DamagedCheckpoint, OSError.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise DamagedCheckpoint(f"{MANIFEST} is missing")
    try:
        text = path.read_bytes().decode()
        body = json.loads(text)["manifest"]
        if _text(body) == text:
            return body
    except (ValueError, KeyError, TypeError):
        pass
    raise DamagedCheckpoint(f"{MANIFEST} is not as it was written")


def change(folder: epath.Path, **facts: Any) -> None:
    """Replaces facts in the manifest, in one step."""
    write_atomically(folder / MANIFEST, _text(read(folder) | facts))


def verify(folder: epath.Path) -> None:
    """Reads every file of a checkpoint and compares it with the manifest.

    Raises:
      DamagedCheckpoint: names the first file that differs.
      OSError: the storage as a whole cannot be read.
    """
    files = read(folder)["files"]

    def problem(name: str) -> str:
        try:
            size, crc = _measure(folder / name)
        except Exception as e:  # what a missing file raises depends on the storage
            if not (folder / name).exists():
                return f"{name} is missing"
            if isinstance(e, OSError) and e.errno == errno.EIO:
                return f"{name} cannot be read: {e.strerror}"
            raise
        if size != files[name]["bytes"]:
            return f"{name} is {size} bytes, not {files[name]['bytes']}"
        return (
            "" if crc == files[name]["crc32"] else f"{name} has another checksum than when written"
        )

    with ThreadPoolExecutor(_THREADS) as pool:
        for found in pool.map(problem, files):
            if found:
                raise DamagedCheckpoint(found)


def _files(folder: epath.Path, prefix: str = "") -> list[str]:
    names: list[str] = []
    for path in folder.iterdir():
        name = prefix + path.name
        names += _files(path, name + "/") if path.is_dir() else [name]
    return names


def _measure(path: epath.Path) -> tuple[int, int]:
    """Bytes and crc32 of a file."""
    size = crc = 0
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


def _text(body: dict[str, Any]) -> str:
    """The text of a manifest. :func:`read` makes it anew and compares, so every byte counts."""
    crc = zlib.crc32(json.dumps(body, sort_keys=True).encode())
    return json.dumps({"crc32": crc, "manifest": body}, sort_keys=True, indent=1) + "\n"
