"""Shards of tokens, written under temporary names until they are whole."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from ngpt_jax.data import manifest as manifest_lib
from ngpt_jax.data.manifest import SetFacts, ShardFacts
from ngpt_jax.data.preparing.tokenize import Tokens
from ngpt_jax.files import is_remote, reason

TEMPORARY = ".segment"  # start of the names of temporary folders


class ShardWriter:
    """One new shard of each set; they get their final names together, when all are whole.

    Args:
      out: folder of the shards.
      format: bin or array_record.

    Raises OSError.
    """

    def __init__(self, out: epath.Path, format: str):
        self._out, self._format = out, format
        self._folder = tempfile.mkdtemp(
            prefix=TEMPORARY, dir=None if is_remote(self._out) else str(self._out)
        )
        self._files: dict[str, Any] = {}
        self._facts: dict[str, list[int]] = {}  # documents, bytes of text, tokens

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            with contextlib.suppress(Exception):  # only after a failure, which is told already
                file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def tokens(self, name: str) -> int:
        """Tokens of a set so far."""
        return self._facts.get(name, [0, 0, 0])[2]

    def add(self, some: Iterable[Tokens]) -> None:
        for tokens in some:
            if tokens.name not in self._files:
                self._files[tokens.name] = _open_writer(self._path(tokens.name), self._format)
                self._facts[tokens.name] = [0, 0, 0]
            file = self._files[tokens.name]
            with _writing():
                if self._format == "bin":
                    file.write(tokens.ids.tobytes())
                else:
                    for start, end in itertools.pairwise([0, *tokens.ends]):
                        file.write(tokens.ids[start:end].tobytes())
            more = (len(tokens.ends), tokens.bytes, len(tokens.ids))
            self._facts[tokens.name] = [a + b for a, b in zip(self._facts[tokens.name], more)]

    def _path(self, name: str) -> epath.Path:
        return epath.Path(self._folder) / name

    def commit(self, numbers: Mapping[str, int]) -> dict[str, SetFacts]:
        """Moves the shards into the folder under their names.

        Args:
          numbers: how many shards each set has in the folder already.

        Returns:
          What was written of each set.
        """
        new = {}
        for name, file in self._files.items():
            with _writing():
                file.close()
            documents, num_bytes, tokens = self._facts[name]
            path = self._path(name)
            shard = f"{name}-{numbers.get(name, 0):05}.{self._format}"
            facts = ShardFacts(shard, tokens, path.stat().length, manifest_lib.sha256_of(path))
            if is_remote(self._out):
                path.copy(self._out / shard, overwrite=True)
            else:
                with open(path, "rb") as f:
                    os.fsync(f.fileno())
                os.replace(path, self._out / shard)
            new[name] = SetFacts(documents, num_bytes, (facts,))
        self._files = {}
        shutil.rmtree(self._folder, ignore_errors=True)
        return new


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Makes an OSError of the RuntimeError that array_record raises for a full disk."""
    try:
        yield
    except RuntimeError as e:
        raise OSError(reason(e)) from e


def _open_writer(path: epath.Path, format: str) -> Any:
    if format == "bin":
        return open(path, "wb")
    from array_record.python.array_record_module import ArrayRecordWriter

    return ArrayRecordWriter(str(path), "group_size:1")
