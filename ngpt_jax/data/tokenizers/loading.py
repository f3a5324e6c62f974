"""Text to token ids and back: UTF-8 bytes, and the file formats that tokenizers come in."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import tokenizers

from ngpt_jax.config import ConfigError, DataConfig

if TYPE_CHECKING:  # imported where they are used, as few runs need them
    import sentencepiece

END_OF_DOCUMENT = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")
KINDS = (
    "a tokenizers JSON file (.json), a SentencePiece .model, a .tiktoken file, or a folder with"
    " GPT-2's encoder.json and vocab.bpe"
)


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

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of all that ids depend on: kind, content of the files, ``eod``."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any special token, be it added or spelled in the text."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, (tokens,) int32.

        In the calling thread; only a tokenizers JSON file takes the threads that the variable
        TOKENIZERS_PARALLELISM allows.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; ``eod`` and ids that stand for nothing are left out."""


def load_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that ``config.tokenizer`` names; raises ConfigError."""
    path, end_of_document = config.tokenizer, config.end_of_document
    if path == "byte":
        if end_of_document is not None:
            raise ConfigError(
                "data.end_of_document is for a tokenizer's file; data.tokenizer=byte has its own."
            )
        return ByteTokenizer()
    file = os.path.expanduser(path)
    if os.path.isdir(file):
        from ngpt_jax.data.tokenizers.tiktoken_files import load_gpt2_tokenizer

        return load_gpt2_tokenizer(path, end_of_document)
    if not os.path.exists(file):
        raise ConfigError(
            f"data.tokenizer: there is no file or folder {path!r}; give byte or the path of"
            f" {KINDS}."
        )
    for suffix in reversed(Path(file).suffixes):  # a model may be called tokenizer.model.v1
        if suffix in _LOADERS:
            return _LOADERS[suffix](path, end_of_document)
    raise ConfigError(f"data.tokenizer: {path!r} has none of the known suffixes; give {KINDS}.")


def utf8(text: str) -> bytes:
    """The bytes of a text, "?" for half a surrogate pair."""
    return text.encode("utf-8", "replace")


def fingerprint_of(kind: str, eod: int, *contents: bytes) -> str:
    digest = hashlib.sha256(f"{kind} {eod}".encode())
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def read_file(path: str) -> bytes:
    try:
        return Path(os.path.expanduser(path)).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"data.tokenizer: cannot read {path!r} ({error.strerror}); give {KINDS}."
        ) from error


def file_stem(path: str) -> str:
    return Path(os.path.abspath(os.path.expanduser(path))).stem


def find_end_of_document(
    path: str, wanted: str | None, find: Callable[[str], int | None], kind: str = "token"
) -> tuple[str, int]:
    """The token ``wanted``, or the first known one, and its id."""
    candidates = END_OF_DOCUMENT if wanted is None else (wanted,)
    for token in candidates:
        if (i := find(token)) is not None:
            return token, i
    raise ConfigError(
        f"data.end_of_document: {path!r} has no {kind} {' or '.join(map(repr, candidates))};"
        " name the one that ends a document."
    )


def decode_documents(
    ids: Iterable[int], vocab_size: int, eod: int, decode: Callable[[list[int]], str]
) -> str:
    # Document by document: decoders treat the start of a text in a way of their own.
    known = (int(i) for i in ids if 0 <= i < vocab_size)
    documents = itertools.groupby(known, lambda i: i == eod)
    return "".join(decode(list(document)) for is_eod, document in documents if not is_eod)


@dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes are ids 0 to 255, ``eod`` is 256: no text is ever taken for ``eod``.

    ``decode(encode(text)) == text``; bytes that are not UTF-8 decode to U+FFFD.
    """

    name: str = field(default="byte", init=False)
    vocab_size: int = field(default=257, init=False)
    eod: int = field(default=256, init=False)
    fingerprint: str = field(default=fingerprint_of("byte", 256), init=False)

    def encode(self, text: str) -> list[int]:
        return list(utf8(text))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(utf8(text), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return decode_documents(
            ids,
            self.vocab_size,
            self.eod,
            lambda document: bytes(document).decode("utf-8", "replace"),
        )


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
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(utf8(text).decode(), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        clean = [utf8(text).decode() for text in texts]
        encodings = self.tokenizer.encode_batch_fast(clean, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return decode_documents(ids, self.vocab_size, self.eod, self._decode)

    def _decode(self, document: list[int]) -> str:
        return self.tokenizer.decode(document, skip_special_tokens=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.tokenizer.encode_special_tokens = True  # which the library's pickle leaves out


def load_json_tokenizer(path: str, end_of_document: str | None = None) -> JsonTokenizer:
    """Reads a ``tokenizers`` JSON file.

    Args:
      path: of the file; ``~`` is expanded.
      end_of_document: its token; None: the first of ``END_OF_DOCUMENT`` that it has.

    Raises ConfigError: no such file, another kind of file, no such token.
    """
    content = read_file(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing more special
        reason = str(error).splitlines()[0] if str(error) else "unknown format"
        raise ConfigError(
            f"data.tokenizer: {path!r} is not a tokenizers JSON file ({reason}); give another."
        ) from error
    eod, eod_id = find_end_of_document(path, end_of_document, tokenizer.token_to_id)
    # A file may carry the settings of the model it was made for: documents are read whole.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # that is, as the text that they are
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if eod in added:  # not each file marks it as special
        tokenizer.add_special_tokens([eod])
    return JsonTokenizer(
        tokenizer=tokenizer,
        name=file_stem(path),
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        eod=eod_id,
        fingerprint=fingerprint_of("json", eod_id, content),
    )


@dataclass(frozen=True)
class SentencePieceTokenizer:
    """A SentencePiece model, see :func:`load_sentencepiece_tokenizer`.

    Text never gives ``eod``; user-defined symbols that a text spells are read as such, as the
    model wants it. ``decode(encode(text)) == text`` where the model has an identity normalizer
    that keeps white space, and byte fallback or all characters; but "\u2581" becomes a space,
    for which SentencePiece uses it.
    """

    processor: sentencepiece.SentencePieceProcessor
    name: str
    vocab_size: int
    eod: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(utf8(text), out_type=int)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        clean = [utf8(text) for text in texts]
        batch = self.processor.encode(clean, out_type=int, num_threads=1)
        return [np.array(ids, np.int32) for ids in batch]

    def decode(self, ids: Iterable[int]) -> str:
        return decode_documents(ids, self.vocab_size, self.eod, self.processor.decode)


def load_sentencepiece_tokenizer(
    path: str, end_of_document: str | None = None
) -> SentencePieceTokenizer:
    """Reads a SentencePiece model.

    Args:
      path: of the file; ``~`` is expanded.
      end_of_document: a control symbol; None: the model's eos, or the first of
        ``END_OF_DOCUMENT`` that is one.

    Raises ConfigError: no such file, another kind of file, no such control symbol.
    """
    from sentencepiece import SentencePieceProcessor

    content = read_file(path)
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except Exception as error:  # RuntimeError, whose text is the library's C++
        raise ConfigError(
            f"data.tokenizer: {path!r} is not a SentencePiece model, or damaged; give another."
        ) from error

    def control_symbol(piece: str) -> int | None:
        i = processor.piece_to_id(
            piece
        )  # of <unk>, not a control symbol, if there is no such piece
        return i if processor.is_control(i) else None

    eod = processor.eos_id()
    if end_of_document is not None or eod < 0:
        _, eod = find_end_of_document(path, end_of_document, control_symbol, "control symbol")
    return SentencePieceTokenizer(
        processor=processor,
        name=file_stem(path),
        vocab_size=processor.get_piece_size(),
        eod=eod,
        fingerprint=fingerprint_of("sentencepiece", eod, content),
    )


def _load_tiktoken(path: str, end_of_document: str | None) -> Tokenizer:
    from ngpt_jax.data.tokenizers.tiktoken_files import load_tiktoken_tokenizer

    return load_tiktoken_tokenizer(path, end_of_document)


_LOADERS: dict[str, Callable[[str, str | None], Tokenizer]] = {
    ".json": load_json_tokenizer,
    ".model": load_sentencepiece_tokenizer,
    ".tiktoken": _load_tiktoken,
}
