"""Text to token ids and back: UTF-8 bytes, and the file formats that tokenizers come in."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import tokenizers

from ngpt_jax.config import ConfigError, DataConfig

if TYPE_CHECKING:  # imported where they are used, as few runs need them
    import sentencepiece
    import tiktoken

END_OF_DOCUMENT = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")
_KINDS = (
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
        return load_gpt2_tokenizer(path, end_of_document)
    if not os.path.exists(file):
        raise ConfigError(
            f"data.tokenizer: there is no file or folder {path!r}; give byte or the path of"
            f" {_KINDS}."
        )
    for suffix in reversed(Path(file).suffixes):  # a model may be called tokenizer.model.v1
        if suffix in _LOADERS:
            return _LOADERS[suffix](path, end_of_document)
    raise ConfigError(f"data.tokenizer: {path!r} has none of the known suffixes; give {_KINDS}.")


def utf8(text: str) -> bytes:
    """The bytes of a text, "?" for half a surrogate pair."""
    return text.encode("utf-8", "replace")


def _fingerprint(kind: str, eod: int, *contents: bytes) -> str:
    digest = hashlib.sha256(f"{kind} {eod}".encode())
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _read(path: str) -> bytes:
    try:
        return Path(os.path.expanduser(path)).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"data.tokenizer: cannot read {path!r} ({error.strerror}); give {_KINDS}."
        ) from error


def _name(path: str) -> str:
    return Path(os.path.abspath(os.path.expanduser(path))).stem


def _end_of_document(
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


def _decode_documents(
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
    fingerprint: str = field(default=_fingerprint("byte", 256), init=False)

    def encode(self, text: str) -> list[int]:
        return list(utf8(text))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(utf8(text), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return _decode_documents(
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
        return _decode_documents(ids, self.vocab_size, self.eod, self._decode)

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
    content = _read(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing more special
        reason = str(error).splitlines()[0] if str(error) else "unknown format"
        raise ConfigError(
            f"data.tokenizer: {path!r} is not a tokenizers JSON file ({reason}); give another."
        ) from error
    eod, eod_id = _end_of_document(path, end_of_document, tokenizer.token_to_id)
    # A file may carry the settings of the model it was made for: documents are read whole.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # that is, as the text that they are
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if eod in added:  # not each file marks it as special
        tokenizer.add_special_tokens([eod])
    return JsonTokenizer(
        tokenizer=tokenizer,
        name=_name(path),
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        eod=eod_id,
        fingerprint=_fingerprint("json", eod_id, content),
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
        return _decode_documents(ids, self.vocab_size, self.eod, self.processor.decode)


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

    content = _read(path)
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
        _, eod = _end_of_document(path, end_of_document, control_symbol, "control symbol")
    return SentencePieceTokenizer(
        processor=processor,
        name=_name(path),
        vocab_size=processor.get_piece_size(),
        eod=eod,
        fingerprint=_fingerprint("sentencepiece", eod, content),
    )


@dataclass(frozen=True)
class TiktokenTokenizer:
    """Byte-level BPE by tiktoken, see :func:`load_tiktoken_tokenizer`, :func:`load_gpt2_tokenizer`.

    Text never gives ``eod`` or another special token, and ``decode(encode(text)) == text``; ids
    that are not UTF-8 together decode to U+FFFD. Time is n log n in the longest word. A text with
    more than about 10^6 characters of white space in a row, which tiktoken's pattern cannot
    match, is encoded in portions of 2^18 characters: its ids may differ at their borders from
    those of the whole, and decode to the same text.
    """

    encoding: tiktoken.Encoding
    name: str
    vocab_size: int
    eod: int
    fingerprint: str
    unused: frozenset[int]

    def encode(self, text: str) -> list[int]:
        return self._encode(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        clean = utf8(text).decode()
        try:
            ids = self.encoding.encode_to_numpy(clean, disallowed_special=())
        except ValueError:  # the stack of the pattern's matcher is full
            portions = [clean[i : i + 2**18] for i in range(0, len(clean), 2**18)]
            ids = np.concatenate(
                [self.encoding.encode_to_numpy(p, disallowed_special=()) for p in portions]
            )
        return ids.astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        used = (i for i in ids if i not in self.unused)
        return _decode_documents(used, self.vocab_size, self.eod, self.encoding.decode)


def _tiktoken_tokenizer(
    path: str,
    end_of_document: str | None,
    pattern: str,
    ranks: dict[bytes, int],
    special_tokens: dict[str, int],
    *contents: bytes,
) -> TiktokenTokenizer:
    from tiktoken import Encoding

    _, eod = _end_of_document(path, end_of_document, special_tokens.get, "special token")
    encoding = Encoding(
        _name(path), pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens
    )
    used = {*ranks.values(), *special_tokens.values()}
    return TiktokenTokenizer(
        encoding=encoding,
        name=_name(path),
        vocab_size=encoding.n_vocab,
        eod=eod,
        fingerprint=_fingerprint("tiktoken", eod, pattern.encode(), *contents),
        unused=frozenset(range(encoding.n_vocab)) - used,
    )


class TiktokenFormat(NamedTuple):
    """What a .tiktoken file does not say: the pattern of words, the special tokens' ids."""

    pattern: str
    special_tokens: dict[str, int]
    ranks: int  # lines of the file


# As in tiktoken_ext.openai_public, whose functions download.
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TIKTOKEN_FORMATS = {
    "gpt2": TiktokenFormat(_GPT2_PATTERN, {"<|endoftext|>": 50256}, 50256),
    "r50k_base": TiktokenFormat(_GPT2_PATTERN, {"<|endoftext|>": 50256}, 50256),
    "p50k_base": TiktokenFormat(_GPT2_PATTERN, {"<|endoftext|>": 50256}, 50280),
    "cl100k_base": TiktokenFormat(
        _CL100K_PATTERN,
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
        100256,
    ),
    "o200k_base": TiktokenFormat(
        _O200K_PATTERN, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}, 199998
    ),
}


def load_tiktoken_tokenizer(path: str, end_of_document: str | None = None) -> TiktokenTokenizer:
    """Reads a .tiktoken file, whose lines are a token in base64, a space and its rank.

    Args:
      path: of the file, whose stem is in ``TIKTOKEN_FORMATS``; ``~`` is expanded.
      end_of_document: a special token; None: <|endoftext|>.

    Raises ConfigError: no such file, unknown stem, damaged file, no such token.
    """
    known = TIKTOKEN_FORMATS.get(_name(path))
    if known is None:
        raise ConfigError(
            f"data.tokenizer: {path!r} is not called as its encoding; its name must be"
            f" {' or '.join(TIKTOKEN_FORMATS)}, and .tiktoken."
        )
    content = _read(path)
    try:
        ranks = _parse_ranks(content, known)
    except ValueError as error:
        raise ConfigError(
            f"data.tokenizer: {path!r} is damaged, or not {_name(path)} ({error}); give another."
        ) from error
    return _tiktoken_tokenizer(
        path, end_of_document, known.pattern, ranks, known.special_tokens, content
    )


def _parse_ranks(content: bytes, known: TiktokenFormat) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"line {number} is not a token in base64 and a rank") from None
    if len(ranks) != known.ranks:
        raise ValueError(f"{len(ranks)} tokens instead of {known.ranks}")
    special_ids = set(known.special_tokens.values())
    free = set(range(len(ranks) + len(special_ids))) - special_ids
    if len(set(ranks.values()) & free) < len(ranks):
        raise ValueError("two tokens of one rank, or a rank out of range")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError("a byte without a token")
    return ranks


def load_gpt2_tokenizer(path: str, end_of_document: str | None = None) -> TiktokenTokenizer:
    """Reads GPT-2's encoder.json (token to id) and vocab.bpe (merges).

    Args:
      path: of the folder with both; ``~`` is expanded.
      end_of_document: a special token; None: <|endoftext|>.

    Raises ConfigError: no such files, damaged files, no such token.
    """
    files = [os.path.join(path, name) for name in ("encoder.json", "vocab.bpe")]
    if not all(os.path.exists(os.path.expanduser(file)) for file in files):
        raise ConfigError(
            f"data.tokenizer: the folder {path!r} lacks encoder.json or vocab.bpe; give {_KINDS}."
        )
    encoder_json, vocab_bpe = map(_read, files)
    try:
        ranks, special_tokens = _parse_gpt2(encoder_json, vocab_bpe)
    except ValueError as error:
        raise ConfigError(
            f"data.tokenizer: encoder.json and vocab.bpe of {path!r} are damaged, or not of one"
            f" tokenizer ({error}); give others."
        ) from error
    return _tiktoken_tokenizer(
        path, end_of_document, _GPT2_PATTERN, ranks, special_tokens, encoder_json, vocab_bpe
    )


def _parse_gpt2(encoder_json: bytes, vocab_bpe: bytes) -> tuple[dict[bytes, int], dict[str, int]]:
    """Ranks and special tokens.

    tiktoken.load has a function for it, which may read an old file from a cache instead.
    """
    try:
        encoder = json.loads(encoder_json)
    except (ValueError, RecursionError):
        raise ValueError("encoder.json is not JSON") from None
    ids = list(encoder.values()) if isinstance(encoder, dict) else []
    if not all(type(i) is int for i in ids) or sorted(ids) != list(range(len(ids))) or not ids:
        raise ValueError("encoder.json is not a table of tokens with ids 0, 1, ...")
    merges = []
    for number, line in enumerate(vocab_bpe.decode(errors="replace").split("\n"), 1):
        pair = line.split()
        if len(pair) == 2 and not line.startswith("#version"):
            merges.append("".join(pair))
        elif pair and number > 1:
            raise ValueError(f"line {number} of vocab.bpe is not a pair")
    # GPT-2 writes bytes as printable characters: those that are not as 256, 257, ...
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    byte_of = {chr(b if b in printable else next(others)): b for b in range(256)}
    tokens = [*byte_of, *merges]
    if missing := [token for token in tokens if token not in encoder]:
        raise ValueError(f"encoder.json has no {missing[0]!r}")
    ranks = [encoder[token] for token in tokens]
    if any(first >= second for first, second in itertools.pairwise(ranks[256:])):
        raise ValueError("the ids of encoder.json are not in the order of vocab.bpe")
    special_tokens = {token: encoder[token] for token in encoder.keys() - set(tokens)}
    if unknown := [token for token in special_tokens if not re.fullmatch(r"<\|\w+\|>", token)]:
        raise ValueError(f"vocab.bpe does not arrive at {min(unknown)!r}")
    encoded = (bytes(byte_of[character] for character in token) for token in tokens)
    return dict(zip(encoded, ranks)), special_tokens


_LOADERS: dict[str, Callable[[str, str | None], Tokenizer]] = {
    ".json": load_json_tokenizer,
    ".model": load_sentencepiece_tokenizer,
    ".tiktoken": load_tiktoken_tokenizer,
}
