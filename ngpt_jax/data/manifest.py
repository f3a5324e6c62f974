"""manifest.json of a prepared folder: what it says, and checks of the folder against it."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from etils import epath

from ngpt_jax.config import ConfigError
from ngpt_jax.config.sources import TOKEN_FORMATS
from ngpt_jax.data.list_files import PREPARED
from ngpt_jax.data.open_files import open_binary
from ngpt_jax.data.tokenizers.base import (
    LITTLE_LOST,
    Tokenizer,
    check_tokenizer,
    warnings_of_loss,
)
from ngpt_jax.files import digest_of, reading

NAME = PREPARED
VERSION = 1
_MOST_LOST = 0.5  # share of the text that a tokenizer may lose


@dataclasses.dataclass(frozen=True)
class ShardFacts:
    """A shard; ``bytes`` is the size of its file."""

    file: str
    tokens: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class SetFacts:
    """The training set or a held-out one.

    ``bytes`` is the length of its text in UTF-8; of a held-out set, of what its tokens stand for.
    """

    documents: int
    bytes: int
    shards: tuple[ShardFacts, ...]

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds.

    Attributes:
      source: fingerprint of everything that the tokens depend on.
      format: bin, or array_record (a document a record).
      dtype: of a token.
      tokenizer: name, fingerprint, vocab_size, eod; and lost, the share of the characters (without
        white space) that decoding does not give back, where it is not small.
      sets: by name; "train" is among them.
      empty: documents that were left out because they have no text.
      origin: OWNER/NAME@COMMIT of a data set of the Hugging Face Hub.
    """

    source: str
    format: str
    dtype: str
    tokenizer: dict[str, Any]
    sets: dict[str, SetFacts]
    empty: int = 0
    origin: str = ""

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, indent=1) + "\n"

    def shards(self) -> list[ShardFacts]:
        """Those of all sets."""
        return [shard for facts in self.sets.values() for shard in facts.shards]

    def fingerprint(self, name: str) -> str:
        """Fingerprint of a set's tokens in their order."""
        shards = self.sets[name].shards
        head = f"{self.dtype} {self.tokenizer['fingerprint']}"
        return digest_of([head, *(f"{shard.tokens} {shard.sha256}" for shard in shards)])


def check_lost(lost: Sequence[int], manifest: Manifest, least: int = 1) -> Manifest:
    """The manifest with the share of characters that the tokenizer loses.

    Args:
      lost: how many characters are lost, and how many there are.
      manifest: without it.
      least: characters that tell.

    Raises ConfigError: more than half is lost.
    """
    share = lost[0] / lost[1] if lost[1] >= least else 0.0
    if share > _MOST_LOST:
        raise ConfigError(
            f"The tokenizer {manifest.tokenizer['name']!r} loses {share:.0%} of the text: that many"
            " characters have no token; give a tokenizer that was made for this text."
        )
    if share < LITTLE_LOST:
        return manifest
    return dataclasses.replace(manifest, tokenizer=manifest.tokenizer | {"lost": round(share, 4)})


def notes(manifest: Manifest) -> list[str]:
    """Lines that warn the user."""
    return warnings_of_loss(manifest.tokenizer["name"], manifest.tokenizer.get("lost", 0.0))


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """``Manifest.tokenizer`` of a tokenizer."""
    names = ("name", "fingerprint", "vocab_size", "eod")
    return {name: getattr(tokenizer, name) for name in names}


def read_manifest(folder: epath.Path, field: str) -> Manifest:
    """The manifest of a folder; raises ConfigError for a damaged one."""
    file = folder / NAME
    try:
        values = json.loads(file.read_text())
        if values.pop("version") != VERSION:
            raise ValueError("it is of another version of ngpt_jax")
        if values["format"] not in TOKEN_FORMATS or values["dtype"] not in ("uint16", "uint32"):
            raise ValueError("format or dtype is wrong")
        if type(values.get("empty", 0)) is not int:
            raise ValueError("empty is wrong")
        sets = parse_sets(values.pop("sets"), values["format"], values["dtype"])
        manifest = Manifest(sets=sets, **values)
        tokenizer_facts(SimpleNamespace(**manifest.tokenizer))
        [manifest.fingerprint(name) for name in ("train", *sets)]
        return manifest
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise ConfigError(
            f"{field}: {str(file)!r} is damaged ({type(e).__name__}: {e}); {_anew(folder, field)}."
        ) from e


def parse_sets(values: Mapping[str, Any], format: str, dtype: str) -> dict[str, SetFacts]:
    """``Manifest.sets`` from JSON.

    Raises ValueError, LookupError, TypeError or AttributeError for what is impossible.
    """
    sets = {
        name: SetFacts(**facts | {"shards": tuple(ShardFacts(**s) for s in facts["shards"])})
        for name, facts in values.items()
    }
    for facts in sets.values():
        numbers = [n for shard in facts.shards for n in (shard.tokens, shard.bytes)]
        numbers += [facts.documents, facts.bytes]
        if not facts.shards or any(type(n) is not int or n < 1 for n in numbers):
            raise ValueError("a number is wrong")
        if any(type(s.file) is not str or type(s.sha256) is not str for s in facts.shards):
            raise ValueError("a name is wrong")
        size = np.dtype(dtype).itemsize
        if format == "bin" and any(s.tokens * size != s.bytes for s in facts.shards):
            raise ValueError("tokens and bytes of a shard disagree")
    return sets


def open_manifest(folder: epath.Path, tokenizer: Tokenizer, field: str) -> Manifest:
    """As :func:`read_manifest`; refuses another tokenizer, and what :func:`check_shards` does."""
    manifest = read_manifest(folder, field)
    where = f"{field}: {str(folder)!r} (tokenizer {manifest.tokenizer['name']!r})"
    check_tokenizer(tokenizer, manifest.tokenizer["fingerprint"], where, "prepared")
    check_shards(manifest, folder, field)
    return manifest


def check_shards(manifest: Manifest, folder: epath.Path, field: str) -> None:
    """Refuses shards that are missing or have another size."""
    for shard in manifest.shards():
        file = folder / shard.file
        if not file.is_file():
            raise ConfigError(f"{field}: {str(file)!r} is missing; {_anew(folder, field)}.")
        if (size := file.stat().length) != shard.bytes:
            raise ConfigError(
                f"{field}: {str(file)!r} has {size:,} bytes, not {shard.bytes:,}; it is damaged:"
                f" {_anew(folder, field)}."
            )


def verify(
    manifest: Manifest,
    folder: epath.Path,
    field: str,
    doing: Callable[[str], None] = lambda what: None,
) -> None:
    """Reads every shard; refuses one that is missing, or whose size or sha256 differs.

    Args:
      manifest: of the folder.
      folder: of the shards.
      field: that names the folder, for messages.
      doing: told what is being done.
    """
    check_shards(manifest, folder, field)
    for shard in manifest.shards():
        doing(f"hashing {shard.file}")
        with reading(f"{field}: {str(folder / shard.file)!r}"):
            found = sha256_of(folder / shard.file)
        if found != shard.sha256:
            raise ConfigError(
                f"{field}: {str(folder / shard.file)!r} was altered; {_anew(folder, field)}."
            )


def _anew(folder: epath.Path, field: str) -> str:
    if field == "data.cache":
        return f"delete {str(folder)!r}, and the same command prepares it anew"
    return "prepare the folder anew"


def sha256_of(file: epath.Path) -> str:
    with open_binary(file) as f:
        return hashlib.file_digest(cast(Any, f), "sha256").hexdigest()
