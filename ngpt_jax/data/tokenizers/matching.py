"""The tokenizer of a config, and the check that it is the one that weights or tokens belong to."""

from __future__ import annotations

import dataclasses

from ngpt_jax.config import Config, ConfigError
from ngpt_jax.data.tokenizers.loading import Tokenizer, load_tokenizer


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


def check_tokenizer(
    where: str, tokenizer: Tokenizer, fingerprint: str, made: str = "trained"
) -> None:
    """Refuses a tokenizer that is not the one that something was made with.

    Args:
      where: names what was made: the flag of a run's folder, say.
      tokenizer: the one that data.tokenizer names.
      fingerprint: of the one that it was made with.
      made: "trained" for weights, "prepared" for tokens.

    Raises ConfigError.
    """
    if tokenizer.fingerprint != fingerprint:
        raise ConfigError(
            f"{where}: data.tokenizer ({tokenizer.name}) is not the one that it was {made} with"
            f" (fingerprint {fingerprint[:8]}, not {tokenizer.fingerprint[:8]}); give that one with"
            " --config.data.tokenizer."
        )
