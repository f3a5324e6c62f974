"""The tokenizer that a config names."""

import dataclasses
import os
from pathlib import Path

from ngpt_jax.config import Config, ConfigError, DataConfig
from ngpt_jax.data import hub
from ngpt_jax.data.tokenizers.base import KINDS, ByteTokenizer, Tokenizer, TokenizerFile
from ngpt_jax.errors import tell

_HUB = "hub:"


def _here(file: TokenizerFile, cache: str) -> TokenizerFile:
    """The file on this machine; that of a repository of the Hugging Face Hub is fetched first."""
    if not file.path.startswith(_HUB):
        return file
    field, spec = f"{file.prefix}tokenizer", file.path.removeprefix(_HUB)
    repo = hub.find_repository("model", spec, cache, field)
    if repo.note:
        tell(repo.note)
    names = [name for name in ("tokenizer.json", "tokenizer.model") if name in repo.files]
    if not names:
        raise file.error(f"{repo.name} has no tokenizer.json or tokenizer.model; give another.")
    path = str(hub.fetch_kept(repo, names[0], field))
    name = f"{repo.name}@{repo.commit[:12]}"
    return dataclasses.replace(file, path=path, repository=name)


def tokenizer_path(config: DataConfig, prefix: str = "data.") -> Path | None:
    """The file or folder here that holds the tokenizer, fetched if need be; None for bytes."""
    file = TokenizerFile(config.tokenizer, config.end_of_document, prefix)
    if file.path == "byte":
        return None
    return Path(_here(file, config.cache).real_path)


def load_tokenizer(config: DataConfig, prefix: str = "data.") -> Tokenizer:
    """The tokenizer that ``config.tokenizer`` names; raises ConfigError.

    Args:
      config: its tokenizer and end_of_document are read.
      prefix: of the names of the fields in messages.
    """
    file = TokenizerFile(config.tokenizer, config.end_of_document, prefix)
    if file.path == "byte":
        if file.end_of_document is not None:
            raise ConfigError(
                f"{prefix}end_of_document is for a tokenizer's file; {prefix}tokenizer=byte has its"
                " own."
            )
        return ByteTokenizer()
    file = _here(file, config.cache)
    # Each library is imported where it is needed: few runs need more than one.
    if os.path.isdir(file.real_path):
        from ngpt_jax.data.tokenizers.tiktoken_files import load_gpt2

        return load_gpt2(file)
    if not os.path.exists(file.real_path):
        raise file.error(
            f"there is no file or folder {file.path!r}; give byte or the path of {KINDS}."
        )
    for suffix in reversed(Path(file.real_path).suffixes):  # a file may end in .model.v1
        if suffix == ".json":
            from ngpt_jax.data.tokenizers.json_file import load_json

            return load_json(file)
        if suffix == ".model":
            from ngpt_jax.data.tokenizers.sentencepiece_file import load_sentencepiece

            return load_sentencepiece(file)
        if suffix == ".tiktoken":
            from ngpt_jax.data.tokenizers.tiktoken_files import load_tiktoken

            return load_tiktoken(file)
    raise file.error(f"{file.path!r} has none of the known suffixes; give {KINDS}.")


def with_tokenizer(config: Config) -> tuple[Config, Tokenizer]:
    """The config with ``model.vocab_size`` filled in, and its tokenizer; raises ConfigError."""
    tokenizer = load_tokenizer(config.data)
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"The tokenizer's ids go up to {tokenizer.vocab_size - 1}, but model.vocab_size ="
            f" {vocab_size}; set it to at least {tokenizer.vocab_size}, or to None."
        )
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    return dataclasses.replace(config, model=model), tokenizer
