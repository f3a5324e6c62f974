"""Tokenizers of the ``tokenizers`` library, from its JSON files."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers

from ngpt_jax.data.tokenizers.base import Tokenizer, TokenizerFile, fingerprint_of, utf8
from ngpt_jax.files import reason

_PARTS = (tokenizers.models.BPE, tokenizers.models.Unigram)  # their tokens are parts of words


@dataclass(frozen=True)
class JsonTokenizer(Tokenizer):
    """A ``tokenizers`` JSON file, see :func:`load_json`.

    Text that spells ``eod`` (or another special token of the file) is encoded as plain text. A
    document can hold the id ``eod`` only where the model without added tokens produces it: with a
    word-level vocabulary, or where ``eod`` is an ordinary token. ``decode(encode(text)) == text``
    where the file's normalizer and decoder allow it.
    """

    tokenizer: tokenizers.Tokenizer
    unknown_id: int | None

    def encode(self, text: str) -> list[int]:  # without the threads that a batch starts
        return self.tokenizer.encode(utf8(text).decode(), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        clean = [utf8(text).decode() for text in texts]
        encodings = self.tokenizer.encode_batch_fast(clean, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode_document(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    @property
    def unknown(self) -> int | None:
        return self.unknown_id

    def normalize(self, text: str) -> str:
        text, normalizer = utf8(text).decode(), self.tokenizer.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def stands_for(self, ids: Iterable[int]) -> str:
        if self.tokenizer.decoder is not None or not isinstance(self.tokenizer.model, _PARTS):
            return super().stands_for(ids)
        # Without a decoder, the library puts spaces between the parts of a word.
        known = (i for i in ids if 0 <= i < self.vocab_size and i not in (self.eod, self.unknown))
        return "".join(self.tokenizer.id_to_token(i) or "" for i in known)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.tokenizer.encode_special_tokens = True  # the library does not pickle this setting


def load_json(file: TokenizerFile) -> JsonTokenizer:
    """Reads a ``tokenizers`` JSON file.

    Raises ConfigError: no such file, another kind of file, no such end-of-document token.
    """
    content = file.read()
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as e:  # the library raises plain Exceptions
        raise file.error(
            f"{file.path!r} is not a tokenizers JSON file ({reason(e)}); give another."
        ) from e
    eod, eod_id = file.find_end_of_document(tokenizer.token_to_id, "token")
    # A file may carry the settings of the model it was made for: here documents are read whole.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # special tokens in a text are encoded as plain text
    # BPE dropout is the only randomness that a file can hold. Tokens that were made with it are not
    # those of this tokenizer, so the fingerprint tells them apart.
    random = bool(getattr(tokenizer.model, "dropout", None))
    if random:
        tokenizer.model.dropout = None
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if eod in added:  # some files do not mark it as special
        tokenizer.add_special_tokens([eod])
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    fingerprint = fingerprint_of("json", eod_id, content, *[b"no dropout"] * random)
    if tokenizer.decoder is None and tokenizer.pre_tokenizer is not None:
        for kind in ("ByteLevel", "Metaspace"):  # without a decoder, text shows their characters
            if kind.encode() in tokenizer.pre_tokenizer.__getstate__():
                tokenizer.decoder = getattr(tokenizers.decoders, kind)()
    unknown = _unknown(tokenizer)
    return JsonTokenizer(file.stem, vocab_size, eod_id, fingerprint, tokenizer, unknown)


def _unknown(tokenizer: tokenizers.Tokenizer) -> int | None:
    """The id for text that has no token."""
    if isinstance(tokenizer.model, tokenizers.models.Unigram):
        return json.loads(tokenizer.to_str())["model"]["unk_id"]
    token = tokenizer.model.unk_token
    return None if token is None else tokenizer.token_to_id(token)
