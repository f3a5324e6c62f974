"""Text to token ids and back: UTF-8 bytes, or any ``tokenizers`` JSON file."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers

from ngpt_jax.config import ConfigError, DataConfig

END_OF_DOCUMENT = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")


class Tokenizer(Protocol):
    """What the program asks of a tokenizer.

    Half a surrogate pair, which UTF-8 cannot hold, is encoded as "?".
    """

    @property
    def name(self) -> str:
        """For people to read."""

    @property
    def vocab_size(self) -> int:
        """Largest id + 1."""

    @property
    def eod(self) -> int:
        """Id of the end-of-document token."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any special token, be it added or spelled in the text."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, (tokens,) int32."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; ``eod`` and ids that stand for nothing are left out."""


def load_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that ``config.tokenizer`` names; raises ConfigError."""
    if config.tokenizer != "byte":
        return load_json_tokenizer(config.tokenizer, config.end_of_document)
    if config.end_of_document is not None:
        raise ConfigError(
            "data.end_of_document is for a tokenizers JSON file; data.tokenizer=byte has its own."
        )
    return ByteTokenizer()


def utf8(text: str) -> bytes:
    """The bytes of a text, "?" for half a surrogate pair."""
    return text.encode("utf-8", "replace")


@dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes are ids 0 to 255, ``eod`` is 256: no text is ever taken for ``eod``.

    ``decode(encode(text)) == text``; bytes that are not UTF-8 decode to U+FFFD.
    """

    name: str = field(default="byte", init=False)
    vocab_size: int = field(default=257, init=False)
    eod: int = field(default=256, init=False)

    def encode(self, text: str) -> list[int]:
        return list(utf8(text))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(utf8(text), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", "replace")


@dataclass(frozen=True)
class JsonTokenizer:
    """A ``tokenizers`` JSON file, see :func:`load_json_tokenizer`.

    Text that spells ``eod`` (or a token that the file marks as special) is encoded as plain
    text. Only where the model itself, without added tokens, arrives at that id (a word-level
    vocabulary, an ``eod`` that is an ordinary token) can the id occur within a document.
    ``decode(encode(text)) == text`` where the file's normalizer and decoder allow it.
    """

    tokenizer: tokenizers.Tokenizer
    name: str
    vocab_size: int
    eod: int

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(utf8(text).decode(), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        clean = [utf8(text).decode() for text in texts]
        encodings = self.tokenizer.encode_batch_fast(clean, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        # Document by document: decoders treat the start of a text in a way of their own.
        known = (int(i) for i in ids if 0 <= i < self.vocab_size)
        documents = itertools.groupby(known, lambda i: i == self.eod)
        return "".join(
            self.tokenizer.decode(list(document), skip_special_tokens=False)
            for is_eod, document in documents
            if not is_eod
        )


def load_json_tokenizer(path: str, end_of_document: str | None = None) -> JsonTokenizer:
    """Reads a ``tokenizers`` JSON file.

    Args:
      path: of the file; ``~`` is expanded.
      end_of_document: its token; None: the first of ``END_OF_DOCUMENT`` that it has.

    Raises ConfigError: no such file, another kind of file, no such token.
    """
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise ConfigError(
            f"data.tokenizer: there is no file {path!r}; give byte or the path of a tokenizers"
            " JSON file."
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more special
        reason = str(error).splitlines()[0] if str(error) else "unknown format"
        raise ConfigError(
            f"data.tokenizer: {path!r} is not a tokenizers JSON file ({reason}); give another."
        ) from error
    candidates = END_OF_DOCUMENT if end_of_document is None else (end_of_document,)
    found = [(t, i) for t in candidates if (i := tokenizer.token_to_id(t)) is not None]
    if not found:
        raise ConfigError(
            f"data.end_of_document: {path!r} has no token {' or '.join(candidates)};"
            " name the one that ends a document."
        )
    eod, eod_id = found[0]
    # A file may carry the settings of the model it was made for: documents are read whole.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # that is, as the text that they are
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if eod in added:  # not each file marks it as special
        tokenizer.add_special_tokens([eod])
    return JsonTokenizer(
        tokenizer=tokenizer,
        name=file.stem,
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        eod=eod_id,
    )
