"""A sample of text from the parameters of a run, at its end."""

from typing import Any

import jax
import numpy as np

from ngpt_jax.config.fields import ModelConfig, SampleConfig
from ngpt_jax.data.tokenizers.base import Tokenizer
from ngpt_jax.decoding import folding, generation
from ngpt_jax.decoding.sampling import Sampling


def sample_text(model: ModelConfig, how: SampleConfig, tokenizer: Tokenizer, params: Any) -> str:
    """``sample.prompt`` and what follows, as long as the context has room; "" where it has none."""
    if not how.tokens or model.context < 2:
        return ""
    prompt = [tokenizer.eod, *tokenizer.encode(how.prompt)][-(model.context - 1) :]
    weights = jax.jit(lambda p: folding.for_inference(model, p))(params)
    chunks = generation.generate(
        model, weights, [prompt],
        min(how.tokens, model.context - len(prompt)), Sampling(how.temperature), how.seed,
    )  # fmt: skip
    ids = np.concatenate([chunk[0] for chunk, _ in chunks]).tolist()
    return how.prompt + tokenizer.decode(ids)
