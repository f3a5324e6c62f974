"""tiktoken from local files: .tiktoken ranks, or GPT-2's encoder.json and vocab.bpe."""

import base64
import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tiktoken import Encoding

from ngpt_jax.data.tokenizers.base import KINDS, Tokenizer, TokenizerFile, fingerprint_of, utf8


@dataclass(frozen=True)
class TiktokenTokenizer(Tokenizer):
    """Byte-level BPE by tiktoken, see :func:`load_tiktoken` and :func:`load_gpt2`.

    Text never gives ``eod`` or another special token, and ``decode(encode(text)) == text``. Ids
    whose bytes are not UTF-8 decode to U+FFFD. Encoding takes n log n in the longest word.

    tiktoken's pattern cannot match more than about 10^6 characters of white space in a row. Such a
    text is encoded in portions of 2^18 characters. Ids at the borders of portions may differ from
    those of the whole text, but they decode to the same text.
    """

    lossless = True
    encoding: Encoding
    unused: frozenset[int]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode(utf8(text).decode()) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        try:
            ids = self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # stack overflow in the matcher of the pattern
            portions = [text[i : i + 2**18] for i in range(0, len(text), 2**18)]
            ids = np.concatenate(
                [self.encoding.encode_to_numpy(p, disallowed_special=()) for p in portions]
            )
        return ids.astype(np.int32)

    def decode_document(self, ids: list[int]) -> str:
        return self.encoding.decode([i for i in ids if i not in self.unused])


def _tokenizer(
    file: TokenizerFile,
    pattern: str,
    ranks: dict[bytes, int],
    special_tokens: dict[str, int],
    *contents: bytes,
) -> TiktokenTokenizer:
    _, eod = file.find_end_of_document(special_tokens.get, "special token")
    encoding = Encoding(
        file.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens
    )
    unused = frozenset(range(encoding.n_vocab)) - {*ranks.values(), *special_tokens.values()}
    fingerprint = fingerprint_of("tiktoken", eod, pattern.encode(), *contents)
    return TiktokenTokenizer(file.stem, encoding.n_vocab, eod, fingerprint, encoding, unused)


class TiktokenFormat(NamedTuple):
    """What a .tiktoken file does not say: the pattern that splits text, the special tokens."""

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
# Files of a Hugging Face folder, from which transformers makes a tokenizer.json.
_UNREADABLE = {"tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt"}
_CL100K_SPECIAL_TOKENS = ("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
TIKTOKEN_FORMATS = {
    "gpt2": TiktokenFormat(_GPT2_PATTERN, {"<|endoftext|>": 50256}, 50256),
    "r50k_base": TiktokenFormat(_GPT2_PATTERN, {"<|endoftext|>": 50256}, 50256),
    "p50k_base": TiktokenFormat(_GPT2_PATTERN, {"<|endoftext|>": 50256}, 50280),
    "cl100k_base": TiktokenFormat(
        _CL100K_PATTERN,
        {name: 100257 + i for i, name in enumerate(_CL100K_SPECIAL_TOKENS)}
        | {"<|endofprompt|>": 100276},
        100256,
    ),
    "o200k_base": TiktokenFormat(
        _O200K_PATTERN, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}, 199998
    ),
}


def load_tiktoken(file: TokenizerFile) -> TiktokenTokenizer:
    """Reads a .tiktoken file, whose lines are a token in base64, a space and its rank.

    The file's stem must be a key of ``TIKTOKEN_FORMATS``. The end-of-document token must be a
    special token; <|endoftext|> where none is named.

    Raises ConfigError: no such file, unknown stem, damaged file, no such token.
    """
    known = TIKTOKEN_FORMATS.get(file.stem)
    if known is None:
        raise file.error(
            f"{file.path!r} is not called as its encoding; its name must be"
            f" {' or '.join(TIKTOKEN_FORMATS)}, and .tiktoken."
        )
    content = file.read()
    try:
        ranks = _parse_ranks(content, known)
    except ValueError as e:
        raise file.error(
            f"{file.path!r} is damaged, or not {file.stem} ({e}); give another."
        ) from e
    return _tokenizer(file, known.pattern, ranks, known.special_tokens, content)


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


GPT2_FILES = ("encoder.json", "vocab.bpe")  # of its folder


def byte_names() -> dict[int, str]:
    """The character that stands for each byte in GPT-2's tokenizer and others of its kind.

    A printable byte is itself; the others are the characters 256, 257, ...
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    return {b: chr(b if b in printable else next(others)) for b in range(256)}


def load_gpt2(folder: TokenizerFile) -> TiktokenTokenizer:
    """Reads GPT-2's encoder.json (token to id) and vocab.bpe (merges) from their folder.

    The end-of-document token must be a special token; <|endoftext|> where none is named.

    Raises ConfigError: no such files, damaged files, no such token.
    """
    if not all(Path(folder.real_path, name).exists() for name in GPT2_FILES):
        there = sorted(os.listdir(folder.real_path), key=lambda name: name != "tokenizer.json")
        known = re.compile(r"tokenizer\.json|.*\.(model|tiktoken)")
        if readable := list(filter(known.fullmatch, there)):
            raise folder.error(
                f"of the folder {folder.path!r}, give the file that is read:"
                f" {os.path.join(folder.path, readable[0])}."
            )
        if _UNREADABLE & {*there}:
            raise folder.error(
                f"the folder {folder.path!r} has no tokenizer.json; write one with transformers:"
                " AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
            )
        raise folder.error(
            f"the folder {folder.path!r} lacks encoder.json or vocab.bpe; give {KINDS}."
        )
    encoder_json, vocab_bpe = map(folder.read, GPT2_FILES)
    try:
        ranks, special_tokens = _parse_gpt2(encoder_json, vocab_bpe)
    except ValueError as e:
        raise folder.error(
            f"encoder.json and vocab.bpe of {folder.path!r} are damaged, or not of one tokenizer"
            f" ({e}); give others."
        ) from e
    return _tokenizer(folder, _GPT2_PATTERN, ranks, special_tokens, encoder_json, vocab_bpe)


def _parse_gpt2(encoder_json: bytes, vocab_bpe: bytes) -> tuple[dict[bytes, int], dict[str, int]]:
    """Ranks and special tokens; raises ValueError.

    The function of tiktoken.load is not used, because it may read an old file from a cache.
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
    byte_of = {name: b for b, name in byte_names().items()}
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
