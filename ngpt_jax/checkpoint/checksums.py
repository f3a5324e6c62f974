"""The list of a checkpoint's files with sizes and checksums, by which it is known to be whole."""

from __future__ import annotations

import errno
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from ngpt_jax.files import write_atomically

MANIFEST = "manifest.json"
_CHUNK = 1 << 22  # bytes; zlib lets other threads run while it counts one
_THREADS = 4


class Damaged(Exception):
    """A checkpoint is not as it was written; a clause names the file and what is wrong with it."""


def write(folder: epath.Path, facts: dict[str, Any]) -> None:
    """Lists all files of the folder, and JSON-able facts, in its manifest, the last file written.

    Raises OSError.
    """
    names = sorted(_files(folder))
    with ThreadPoolExecutor(_THREADS) as pool:
        measured = list(pool.map(lambda name: _measure(folder / name), names))
    files = {name: {"bytes": size, "crc32": crc} for name, (size, crc) in zip(names, measured)}
    (folder / MANIFEST).write_text(_text({**facts, "files": files}))


def read(folder: epath.Path) -> dict[str, Any]:
    """The facts and ``files`` of a manifest that is whole itself; else raises Damaged, OSError."""
    path = folder / MANIFEST
    if not path.exists():
        raise Damaged(f"{MANIFEST} is missing")
    try:
        text = path.read_bytes().decode()
        body = json.loads(text)["manifest"]
        if _text(body) == text:
            return body
    except (ValueError, KeyError, TypeError):
        pass
    raise Damaged(f"{MANIFEST} is not as it was written")


def change(folder: epath.Path, **facts: Any) -> None:
    """Other facts in a manifest, at once."""
    write_atomically(folder / MANIFEST, _text(read(folder) | facts))


def verify(folder: epath.Path) -> dict[str, Any]:
    """What :func:`read` gives, after every file was read and found as listed.

    Raises:
      Damaged: names the first file that is not.
      OSError: the storage as a whole cannot be read.
    """
    body = read(folder)

    def check(name: str) -> str:
        listed = body["files"][name]
        try:
            size, crc = _measure(folder / name)
        except Exception as e:  # what a missing file raises depends on the storage
            if not (folder / name).exists():
                return f"{name} is missing"
            if isinstance(e, OSError) and e.errno == errno.EIO:
                return f"{name} cannot be read: {e.strerror}"
            raise
        if size != listed["bytes"]:
            return f"{name} is {size} bytes, not {listed['bytes']}"
        return "" if crc == listed["crc32"] else f"{name} has another checksum than when written"

    with ThreadPoolExecutor(_THREADS) as pool:
        for problem in pool.map(check, body["files"]):
            if problem:
                raise Damaged(problem)
    return body


def _files(folder: epath.Path, prefix: str = "") -> list[str]:
    names: list[str] = []
    for path in folder.iterdir():
        name = prefix + path.name
        names += _files(path, name + "/") if path.is_dir() else [name]
    return names


def _measure(path: epath.Path) -> tuple[int, int]:
    size = crc = 0
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


def _text(body: dict[str, Any]) -> str:
    """A text in which no byte can change unnoticed: it is made again from what was read."""
    crc = zlib.crc32(json.dumps(body, sort_keys=True).encode())
    return json.dumps({"crc32": crc, "manifest": body}, sort_keys=True, indent=1) + "\n"
