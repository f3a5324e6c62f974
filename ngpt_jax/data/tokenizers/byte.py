"""The tokenizer without a file: UTF-8 bytes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ngpt_jax.data.tokenizers.base import Tokenizer, fingerprint_of, utf8


@dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """UTF-8 bytes are ids 0 to 255, ``eod`` is 256, which no text can spell.

    ``decode(encode(text)) == text``; bytes that are not UTF-8 decode to U+FFFD.
    """

    name: str = field(default="byte", init=False)
    vocab_size: int = field(default=257, init=False)
    eod: int = field(default=256, init=False)
    fingerprint: str = field(default=fingerprint_of("byte", 256), init=False)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(utf8(text), np.uint8).astype(np.int32) for text in texts]

    def decode_document(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")
