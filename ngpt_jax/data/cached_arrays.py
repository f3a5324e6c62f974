"""Arrays computed once and kept in the cache folder."""

import json
import os
import secrets
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ngpt_jax.files import write_atomically, writing_cache


def cached_arrays(
    cache: Path, key: str, compute: Callable[[], list[np.ndarray]]
) -> list[np.ndarray]:
    """What ``compute`` returned the first time, memory-mapped from files.

    Args:
      cache: folder; several processes may use it at a time.
      key: names the arrays.
      compute: called where the files are missing or damaged.

    Raises ConfigError where the files cannot be written.
    """
    folder = cache / "indices" / key[:32]
    try:
        return _load_arrays(folder)
    except (OSError, ValueError, EOFError, TypeError):
        arrays = compute()
    with writing_cache(cache):
        folder.mkdir(parents=True, exist_ok=True)
        for number, array in enumerate(arrays):
            temporary = folder / f".{number}.{secrets.token_hex(8)}.npy"
            with open(temporary, "wb") as f:
                np.save(f, array)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, folder / f"{number}.npy")
        crcs = [zlib.crc32((folder / f"{n}.npy").read_bytes()) for n in range(len(arrays))]
        write_atomically(folder / "crc32.json", json.dumps(crcs))
        return _load_arrays(folder)


def _load_arrays(folder: Path) -> list[np.ndarray]:
    arrays = []
    for number, crc in enumerate(json.loads((folder / "crc32.json").read_text())):
        file = folder / f"{number}.npy"
        if zlib.crc32(file.read_bytes()) != crc:
            raise ValueError("damaged")
        arrays.append(np.load(file, mmap_mode="r"))
    return arrays
