"""Sizes and checksums of a checkpoint's files, by which it is known to be whole.

They stand in the checkpoint's manifest.json, which is written last. A local file is read for it by
the process that wrote it, right then, while its machine has the bytes in memory, and forced to the
disk. gs:// knows the MD5 of what it holds and is asked for it: nothing is downloaded.
"""

import base64
import errno
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
from etils import epath

from ngpt_jax.files import is_remote, write_atomically

MANIFEST = "manifest.json"
_CHUNK = 1 << 22  # bytes; zlib lets other threads run while it reads one
_THREADS = 4


class DamagedCheckpoint(Exception):
    """A checkpoint is not as it was written; the message names the file and what is wrong."""


def measure(folder: epath.Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Sizes and checksums of files by their names in the folder, which are on the disk then.

    Raises what the storage raises.
    """
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _measure(folder / name), names)))


def measure_own(folder: epath.Path, process: int) -> dict[str, dict[str, Any]]:
    """As :func:`measure`, of the files that orbax has named after a process."""
    own = f"process_{process}"
    return measure(folder, (n for n in _files(folder) if own in n.replace("/", ".").split(".")))


def write(folder: epath.Path, facts: dict[str, Any], measured: dict[str, dict[str, Any]]) -> None:
    """Writes the manifest of all files in the folder.

    Args:
      folder: of the checkpoint.
      facts: JSON-able, written beside them.
      measured: what is already known of some files; others are measured here.

    Raises:
      OSError: the storage cannot be read or written.
    """
    names = _files(folder)
    known = {name: measured[name] for name in names if name in measured}
    files = known | measure(folder, (name for name in names if name not in known))
    write_atomically(folder / MANIFEST, _text({**facts, "files": files}))


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
            expected = files[name]
            found = _measure(folder / name, expected)
        except Exception as e:  # what a missing file raises depends on the storage
            if not (folder / name).exists():
                return f"{name} is missing"
            if isinstance(e, OSError) and e.errno == errno.EIO:
                return f"{name} cannot be read: {e.strerror}"
            raise
        if found["bytes"] != expected["bytes"]:
            return f"{name} is {found['bytes']} bytes, not {expected['bytes']}"
        return "" if found == expected else f"{name} has another checksum than when written"

    with ThreadPoolExecutor(_THREADS) as pool:
        for found in pool.map(problem, files):
            if found:
                raise DamagedCheckpoint(found)


def _files(folder: epath.Path) -> list[str]:
    """The names in the folder of all files, also of those in folders of it."""
    if is_remote(folder):
        storage, root = fsspec.url_to_fs(os.fspath(folder))
        storage.invalidate_cache()  # TensorStore and other processes write as well
        return [name.removeprefix(f"{root}/") for name in storage.find(root)]
    names: list[str] = []
    for path in folder.iterdir():
        within = _files(path) if path.is_dir() else [""]
        names += [f"{path.name}/{name}".rstrip("/") for name in within]
    return names


def _measure(path: epath.Path, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Bytes and checksum of a file; the checksum is of the kind that ``like`` has.

    Without ``like`` the file was just written: it is forced to the disk.
    """
    just_written, like = like is None, like or {}
    if is_remote(path) and "crc32" not in like:
        storage, name = fsspec.url_to_fs(os.fspath(path))
        found = storage.info(name)
        if "md5Hash" in found:
            return {"bytes": found["size"], "md5": found["md5Hash"]}
    size = crc = 0
    with path.open("rb") as f:
        if just_written and not is_remote(path):
            os.fsync(f.fileno())
        if "md5" in like:
            md5 = base64.b64encode(hashlib.file_digest(f, "md5").digest()).decode()
            return {"bytes": path.stat().length, "md5": md5}
        while chunk := f.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return {"bytes": size, "crc32": crc}


def _text(body: dict[str, Any]) -> str:
    """The text of a manifest. :func:`read` makes it anew and compares, so every byte counts."""
    crc = zlib.crc32(json.dumps(body, sort_keys=True).encode())
    return json.dumps({"crc32": crc, "manifest": body}, sort_keys=True, indent=1) + "\n"
