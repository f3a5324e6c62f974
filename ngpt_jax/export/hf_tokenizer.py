"""The tokenizer of a Hugging Face folder: files for transformers' AutoTokenizer, and the original.

``tokenizer.json`` gives the token ids of the training and adds none of its own. In training each
document follows an end of document: put ``eos_token`` before a prompt. Unlike in training, a text
that spells a special token is read as that token, unless ``split_special_tokens=True`` is given.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from ngpt_jax.config import DataConfig, command
from ngpt_jax.data.tokenizers.base import ByteTokenizer, Tokenizer
from ngpt_jax.data.tokenizers.json_file import JsonTokenizer
from ngpt_jax.data.tokenizers.load import tokenizer_path
from ngpt_jax.data.tokenizers.sentencepiece_file import SentencePieceTokenizer
from ngpt_jax.data.tokenizers.tiktoken_files import GPT2_FILES, TiktokenTokenizer, byte_names

ORIGINAL = "original_tokenizer"  # folder with the files that the training read
EOD_OF_BYTES = "<|endoftext|>"
# Texts that a rebuilt tokenizer must encode as the original does.
_PROBES = (
    "Hello world, it's 12345.67 o'clock; WE'LL see: don't!",
    "def f(x):\n    return x ** 2  # two\n\n\n\tand\ttabs  \n",
    "  two\n \n a\r\n\r b \n x \u3000\xa0 y   ",
    "na\u00efve caf\u00e9 \u6f22\u5b57 \u0939\u093f\u0928\u094d\u0926\u0940 \U0001f389\x00",
    "".join(map(chr, range(1, 384))),
)


def write(
    folder: Path, data: DataConfig, tokenizer: Tokenizer, context: int
) -> tuple[dict[str, Any], list[str]]:
    """Writes the tokenizer's files.

    Args:
      folder: that of the model.
      data: data.tokenizer names the original.
      tokenizer: loaded from there.
      context: length of a training sequence in tokens.

    Returns:
      What --from_hf reads: fingerprint, and file, the path of the original in the folder (None:
      bytes need no file); and notes on what transformers cannot read.
    """
    eos, readable, notes = EOD_OF_BYTES, True, []
    original = tokenizer_path(data)
    built: tokenizers.Tokenizer | None = None
    if isinstance(tokenizer, ByteTokenizer):
        built = _of_bytes()
    elif isinstance(tokenizer, JsonTokenizer):
        eos = str(tokenizer.tokenizer.id_to_token(tokenizer.eod))
        built = _plain(tokenizer.tokenizer)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        eos = tokenizer.processor.id_to_piece(tokenizer.eod)
        assert original is not None
        shutil.copyfile(original, folder / "tokenizer.model")
        notes = ["AutoTokenizer reads this SentencePiece model from transformers 5 on."]
    elif isinstance(tokenizer, TiktokenTokenizer):
        eos, built = tokenizer.encoding.decode([tokenizer.eod]), _of_tiktoken(tokenizer)
        readable = all(
            built.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
            for text in _PROBES
        )
    if not readable:
        notes = [
            "AutoTokenizer finds no tokenizer: this tiktoken file, rebuilt with the tokenizers"
            f" library, gives other token ids; use the file in {ORIGINAL} with tiktoken."
        ]
    else:
        if built is not None:
            built.save(str(folder / "tokenizer.json"))
        values = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": eos,
            "eos_token": eos,
            "pad_token": eos,
            "padding_side": "left",
            "model_max_length": context,
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
        }
        command.write_json(str(folder / "tokenizer_config.json"), values)
    file = original and _copy_original(folder, original)
    return {"fingerprint": tokenizer.fingerprint, "file": file}, notes


def _copy_original(folder: Path, source: Path) -> str:
    """Copies the original; returns the copy's path in the folder."""
    place = folder / ORIGINAL
    place.mkdir()
    if source.is_dir():
        for name in GPT2_FILES:
            shutil.copyfile(source / name, place / name)
        return ORIGINAL
    shutil.copyfile(source, place / source.name)
    return f"{ORIGINAL}/{source.name}"


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    # ignore_merges: a word that is a token is that token; merging its parts may give others.
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _of_bytes() -> tokenizers.Tokenizer:
    tokenizer = _byte_level({name: b for b, name in byte_names().items()}, [])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([EOD_OF_BYTES])
    return tokenizer


def _plain(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that adds no tokens to a text, and neither truncates nor pads it."""
    values = json.loads(tokenizer.to_str())
    values |= {"post_processor": None, "truncation": None, "padding": None}
    return tokenizers.Tokenizer.from_str(json.dumps(values))


def _of_tiktoken(tokenizer: TiktokenTokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer: a merge for each pair of tokens that makes a third, sorted by its id."""
    encoding, names = tokenizer.encoding, byte_names()
    ranks = {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}
    special = {token: encoding.encode_single_token(token) for token in encoding.special_tokens_set}

    def name(token: bytes) -> str:
        return "".join(names[b] for b in token)

    merges = [
        (name(token[:i]), name(token[i:]))
        for token in sorted(ranks, key=ranks.__getitem__)
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    vocab = {name(token): rank for token, rank in ranks.items()} | special
    built = _byte_level(vocab, merges)
    built.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(_pattern(encoding._pat_str)), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    built.add_special_tokens(list(special))
    return built


def _pattern(pattern: str) -> str:
    """tiktoken's pattern in the syntax of the tokenizers library.

    In that syntax $ is the end of a line, and {1,3}+ is not possessive. No pattern needs its
    possessive quantifiers: what follows each of them begins with other characters.
    """
    return re.sub(r"([+*?}])\+", r"\1", pattern).replace("$", r"\z")
