"""SentencePiece models."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sentencepiece import SentencePieceProcessor

from ngpt_jax.data.tokenizers.base import Tokenizer, TokenizerFile, fingerprint_of, utf8


@dataclass(frozen=True)
class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, see :func:`load_sentencepiece`.

    Text never gives ``eod``. Text that spells a user-defined symbol gives that symbol, as the model
    wants it. ``decode(encode(text)) == text`` where the model has an identity normalizer that keeps
    white space, and byte fallback or all characters. But "\u2581" decodes to a space, because
    SentencePiece writes spaces so.
    """

    processor: SentencePieceProcessor

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        clean = [utf8(text) for text in texts]
        batch = self.processor.encode(clean, out_type=int, num_threads=1)
        return [np.array(ids, np.int32) for ids in batch]

    def decode_document(self, ids: list[int]) -> str:
        return self.processor.decode(ids)

    def normalize(self, text: str) -> str:
        return self.processor.normalize(utf8(text).decode())

    @property
    def unknown(self) -> int:
        return self.processor.unk_id()


def load_sentencepiece(file: TokenizerFile) -> SentencePieceTokenizer:
    """Reads a SentencePiece model.

    The end-of-document token must be a control symbol. Where none is named, it is the model's eos,
    or the first of ``END_OF_DOCUMENT`` that is a control symbol.

    Raises ConfigError: no such file, another kind of file, no such control symbol.
    """
    content = file.read()
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except Exception as e:  # a RuntimeError whose text is C++ source
        raise file.error(
            f"{file.path!r} is not a SentencePiece model, or damaged; give another."
        ) from e

    def control_symbol(piece: str) -> int | None:
        # For an unknown piece it is the id of <unk>, which is no control symbol.
        i = processor.piece_to_id(piece)
        return i if processor.is_control(i) else None

    eod = processor.eos_id()
    if file.end_of_document is not None or eod < 0:
        _, eod = file.find_end_of_document(control_symbol, "control symbol")
    vocab_size = processor.get_piece_size()
    fingerprint = fingerprint_of("sentencepiece", eod, content)
    return SentencePieceTokenizer(file.stem, vocab_size, eod, fingerprint, processor)
