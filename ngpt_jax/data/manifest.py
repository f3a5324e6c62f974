"""A folder of prepared tokens: what its manifest.json says, and the check that it is so."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from etils import epath

from ngpt_jax.config import ConfigError
from ngpt_jax.data.corpus_files import open_binary
from ngpt_jax.data.tokenizers.loading import Tokenizer
from ngpt_jax.files import digest_of

NAME = "manifest.json"
VERSION = 1
FORMATS = ("bin", "array_record")


@dataclasses.dataclass(frozen=True)
class ShardFacts:
    file: str
    tokens: int
    bytes: int  # of the file
    sha256: str


@dataclasses.dataclass(frozen=True)
class SetFacts:
    """A set: train, or held out. ``bytes`` is the length of its text in UTF-8."""

    documents: int
    bytes: int
    shards: tuple[ShardFacts, ...]

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Facts of a prepared folder.

    Attributes:
      source: fingerprint of the text and of all that the tokens depend on.
      format: bin, or array_record (a document a record).
      dtype: of a token.
      tokenizer: name, fingerprint, vocab_size, eod.
      sets: by name; "train" is among them.
    """

    source: str
    format: str
    dtype: str
    tokenizer: dict[str, Any]
    sets: dict[str, SetFacts]

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, indent=1) + "\n"

    def fingerprint(self, name: str) -> str:
        """Of a set's tokens in their order."""
        shards = self.sets[name].shards
        head = f"{self.dtype} {self.tokenizer['fingerprint']}"
        return digest_of([head, *(f"{shard.tokens} {shard.sha256}" for shard in shards)])


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    names = ("name", "fingerprint", "vocab_size", "eod")
    return {name: getattr(tokenizer, name) for name in names}


def read_manifest(folder: epath.Path, field: str) -> Manifest:
    """The manifest of a folder; raises ConfigError for one that is not whole."""
    file = folder / NAME
    try:
        values = json.loads(file.read_text())
        if values.pop("version") != VERSION:
            raise ValueError("it is of another version of ngpt_jax")
        sets = {
            name: SetFacts(**facts | {"shards": tuple(ShardFacts(**s) for s in facts["shards"])})
            for name, facts in values.pop("sets").items()
        }
        manifest = Manifest(sets=sets, **values)
        if manifest.format not in FORMATS or manifest.dtype not in ("uint16", "uint32"):
            raise ValueError("format or dtype is wrong")
        for name in ("train", *sets):
            check_set(sets[name], manifest)
        tokenizer_facts(SimpleNamespace(**manifest.tokenizer))
        [manifest.fingerprint(name) for name in sets]
        return manifest
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise ConfigError(
            f"{field}: {str(file)!r} is damaged ({type(e).__name__}: {e}); prepare the folder anew."
        ) from e


def check_set(facts: SetFacts, manifest: Manifest) -> None:
    """Raises ValueError or TypeError for facts that cannot be."""
    counts = [facts.documents, facts.bytes, *(n for s in facts.shards for n in (s.tokens, s.bytes))]
    if not facts.shards or any(type(n) is not int or n < 1 for n in counts):
        raise ValueError("a number is wrong")
    if any(type(s.file) is not str or type(s.sha256) is not str for s in facts.shards):
        raise ValueError("a name is wrong")
    size = np.dtype(manifest.dtype).itemsize
    if manifest.format == "bin" and any(s.tokens * size != s.bytes for s in facts.shards):
        raise ValueError("tokens and bytes of a shard disagree")


def check_manifest(manifest: Manifest, folder: epath.Path, tokenizer: Tokenizer, field: str):
    """Refuses another tokenizer, and shards that are missing or have another size."""
    made_with = manifest.tokenizer
    if made_with["fingerprint"] != tokenizer.fingerprint:
        raise ConfigError(
            f"data.tokenizer: {str(folder)!r} was prepared with the tokenizer"
            f" {made_with['name']!r} ({made_with['vocab_size']:,} ids, fingerprint"
            f" {made_with['fingerprint'][:8]}), not {tokenizer.name!r} ({tokenizer.vocab_size:,},"
            f" {tokenizer.fingerprint[:8]}); give that one, or prepare anew."
        )
    check_shards(manifest, folder, field)


def check_shards(manifest: Manifest, folder: epath.Path, field: str) -> None:
    """Refuses shards that are missing or have another size."""
    for facts in manifest.sets.values():
        for shard in facts.shards:
            file = folder / shard.file
            if not file.is_file():
                raise ConfigError(f"{field}: {str(file)!r} is missing; prepare the folder anew.")
            if (size := file.stat().length) != shard.bytes:
                raise ConfigError(
                    f"{field}: {str(file)!r} has {size:,} bytes, not {shard.bytes:,}; it is"
                    " damaged, prepare the folder anew."
                )


def verify(manifest: Manifest, folder: epath.Path, field: str) -> None:
    """Reads every shard and compares its sha256; raises ConfigError."""
    for facts in manifest.sets.values():
        for shard in facts.shards:
            if sha256_of(folder / shard.file) != shard.sha256:
                raise ConfigError(
                    f"{field}: {str(folder / shard.file)!r} was altered; prepare the folder anew."
                )


def sha256_of(file: epath.Path) -> str:
    with open_binary(file) as f:
        return hashlib.file_digest(cast(Any, f), "sha256").hexdigest()
