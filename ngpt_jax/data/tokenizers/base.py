"""What every tokenizer is, the one without a file, and what is common to those from files."""

import collections
import hashlib
import itertools
import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ngpt_jax.config import ConfigError

END_OF_DOCUMENT = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")
KINDS = (
    "a tokenizers JSON file (.json), a SentencePiece .model, a .tiktoken file, or a folder with"
    " GPT-2's encoder.json and vocab.bpe, or hub:OWNER/NAME of the Hugging Face Hub"
)
LITTLE_LOST = 0.001  # a share of a text that need not be told
_PROBE = "".join(map(chr, range(33, 127)))
_PROBE += "  two\n\n\tand na\u00efve \u6f22\u5b57 \u0939\u093f\u0928 \U0001f389 \u03b1\u0436\u05d0."


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back. Each kind of tokenizer is a class derived from this one.

    Half a surrogate pair, which UTF-8 cannot hold, is encoded as "?".

    Attributes:
      name: for people to read.
      vocab_size: largest id + 1.
      eod: id of the end-of-document token.
      fingerprint: hex SHA-256 of everything that the ids depend on: kind, content of the files,
        ``eod``.
    """

    name: str
    vocab_size: int
    eod: int
    fingerprint: str

    lossless = False  # whether decode(encode(text)) == text for all texts

    @property
    def unknown(self) -> int | None:
        """The id for text that has no token; None where there is none."""
        return None

    def encode(self, text: str) -> list[int]:
        """Ids of a text. None is a special token, even where the text spells one."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, (tokens,) int32.

        Runs in the calling thread. A tokenizers JSON file alone uses more threads, as many as the
        environment variable TOKENIZERS_PARALLELISM allows.
        """
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; ``eod`` and ids without a token are left out."""
        # Document by document: decoders treat the start of a text in a way of their own.
        known = (int(i) for i in ids if 0 <= i < self.vocab_size)
        documents = itertools.groupby(known, lambda i: i == self.eod)
        return "".join(self.decode_document(list(some)) for is_eod, some in documents if not is_eod)

    def decode_document(self, ids: list[int]) -> str:
        """Text of ids below ``vocab_size``, none of which is ``eod``."""
        raise NotImplementedError

    def normalize(self, text: str) -> str:
        """The text that is encoded in place of ``text``."""
        return text

    def stands_for(self, ids: Iterable[int]) -> str:
        """As :meth:`decode`, but nothing for unknown text."""
        return self.decode(i for i in ids if i != self.unknown)

    def text_bytes(self, text: str, ids: Iterable[int]) -> int:
        """Length in UTF-8 of what the ids of a text stand for: bits per byte are divided by it."""
        known = text if self.lossless else self.stands_for(ids)
        return len(known) if known.isascii() else len(utf8(known))


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes are ids 0 to 255, ``eod`` is 256, which no text can spell.

    ``decode(encode(text)) == text``; bytes that are not UTF-8 decode to U+FFFD.
    """

    lossless = True

    def __init__(self) -> None:
        super().__init__("byte", 257, 256, fingerprint_of("byte", 256))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(utf8(text), np.uint8).astype(np.int32) for text in texts]

    def decode_document(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


def gives_back(tokenizer: Tokenizer) -> bool:
    """Whether a text with all kinds of characters is decoded as it was, but for white space around.

    A tokenizer that does may still lose rare characters.
    """
    return tokenizer.lossless or tokenizer.stands_for(tokenizer.encode(_PROBE)).strip() == _PROBE


def lost_characters(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[int, int]:
    """How many characters decoding does not give back, and how many there are, without white space.

    What the tokenizer's own normalization changes is not lost, but what it leaves out is.
    """
    lost = total = 0
    for text in texts:
        found = collections.Counter(tokenizer.stands_for(tokenizer.encode(text)))
        # A normalizer may also write bytes as other characters, which are decoded to the text.
        normal = tokenizer.normalize(text)
        both = [collections.Counter(t) - found for t in (text, normal)]
        missing = [sum(n for c, n in some.items() if not _is_space(c)) for some in both]
        missing[1] += max(_visible(text) - _visible(normal), 0)
        total += sum(not _is_space(c) for c in text)
        lost += min(missing)
    return lost, total


def _visible(text: str) -> int:
    """Characters without accents, control characters and white space, composed ones as several."""
    parts = unicodedata.normalize("NFKD", text)
    return sum(unicodedata.category(c)[0] not in "MCZ" for c in parts)


def warnings_of_loss(name: str, share: float) -> list[str]:
    """A line about a tokenizer that loses this share of a text; none where that is little."""
    if share < LITTLE_LOST:
        return []
    return [
        f"warning: the tokenizer {name!r} loses {share:.1%} of the text, whose characters have no"
        " token; bits/byte counts the bytes that tokens stand for"
    ]


def _is_space(character: str) -> bool:
    return character.isspace() or character == "\u2581"  # as which some tokenizers write spaces


def check_tokenizer(tokenizer: Tokenizer, saved: str, where: str, verb: str = "trained") -> None:
    """Refuses a tokenizer that is not the one that tokens or weights were made with.

    Args:
      tokenizer: of ``data.tokenizer``.
      saved: fingerprint of the tokenizer that was used.
      where: what was made with it, for the message.
      verb: how it was made, for the message.

    Raises ConfigError.
    """
    if tokenizer.fingerprint != saved:
        raise ConfigError(
            f"{where}: data.tokenizer ({tokenizer.name!r}, {tokenizer.vocab_size:,} ids,"
            f" fingerprint {tokenizer.fingerprint[:8]}) is not the one that it was {verb} with"
            f" (fingerprint {saved[:8]}); give that one with --config.data.tokenizer."
        )


def utf8(text: str) -> bytes:
    """The bytes of a text, "?" for half a surrogate pair."""
    return text.encode("utf-8", "replace")


def fingerprint_of(kind: str, eod: int, *contents: bytes) -> str:
    """``Tokenizer.fingerprint`` from the contents of the tokenizer's files."""
    digest = hashlib.sha256(f"{kind} {eod}".encode())
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class TokenizerFile:
    """The file (or folder) of a tokenizer, as the config or a command's flags name it.

    Attributes:
      path: as given, or of what was fetched; may begin with ``~``.
      end_of_document: the token that ends a document; None: one of ``END_OF_DOCUMENT``.
      prefix: of the names of the fields in messages.
      repository: of the hub, from which the file was fetched.
    """

    path: str
    end_of_document: str | None
    prefix: str
    repository: str = ""

    @property
    def real_path(self) -> str:
        return os.path.expanduser(self.path)

    @property
    def stem(self) -> str:
        return self.repository or Path(os.path.abspath(self.real_path)).stem

    def error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.prefix}tokenizer: {problem}")

    def read(self, name: str = "") -> bytes:
        """The content of the file, or of the file ``name`` of the folder; raises ConfigError."""
        try:
            return Path(self.real_path, name).read_bytes()
        except OSError as e:
            path = os.path.join(self.path, name) if name else self.path
            raise self.error(f"cannot read {path!r} ({e.strerror}); give {KINDS}.") from e

    def find_end_of_document(self, find: Callable[[str], int | None], kind: str) -> tuple[str, int]:
        """The end-of-document token and its id; raises ConfigError where there is none.

        Args:
          find: gives the id of a token, None where there is no such token.
          kind: of the token, for the message.
        """
        wanted = END_OF_DOCUMENT if self.end_of_document is None else (self.end_of_document,)
        for token in wanted:
            if (i := find(token)) is not None:
                return token, i
        raise ConfigError(
            f"{self.prefix}end_of_document: {self.path!r} has no {kind}"
            f" {' or '.join(map(repr, wanted))}; name the one that ends a document."
        )
