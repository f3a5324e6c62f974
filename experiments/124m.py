"""A GPT-2-small-sized nGPT on one accelerator.

    python -m ngpt_jax.main --config=experiments/124m.py

The first start fetches OpenWebText and LLaMA-2's tokenizer from the Hugging Face Hub, a file at a
time, and keeps its tokens, about 20 GB, in data.cache. Prepared tokens or text of your own:

    --config.data.source=bin --config.data.paths=FOLDER
    --config.data.source=text --config.data.paths='corpus/*.jsonl.gz'

with --config.data.tokenizer=FILE for another tokenizer; see ngpt_jax/data/README.md.

12 layers, width 768, 12 heads, context 1024. With the 32,000 tokens of LLaMA-2's tokenizer: 162.5 M
parameters, of which 113.2 M in the blocks. 2.5 B tokens in 19,200 steps of 131,072 (22 tokens a
block parameter). If memory is short: --config.train.accumulate=4, for example.
Expected cost: 8.8e8 FLOPs per token, 2.2e18 in all; 2.1 hours of one H200 at the 325,000 tokens/s
that 20 steps of batch 32 gave there (29 % MFU). The whole run was never made.
Variants: gpt (the baseline, at 6e-4, GPT-2's usual rate; neither model was tuned here), debug
(tiny), stdlib (on bytes of the standard library, without a network); nugpt and root_width (rates
that follow other shapes, see ngpt_jax/optim/README.md).
"""

from ngpt_jax.config import default_config
from ngpt_jax.config.experiment import apply_variants


def get_config(variants: str = ""):
    config = default_config()
    config.model.layers = 12
    config.model.width = 768
    config.model.heads = 12
    config.model.context = 1024
    config.model.vocab_size = 32_000
    config.model.dtype = "bfloat16"
    config.optimizer.learning_rate = 1.5e-3
    config.train.steps = 19_200
    config.train.batch_size = 128
    config.data.source = "hub"
    config.data.paths = ("Skylion007/openwebtext",)
    config.data.tokenizer = "hub:hf-internal-testing/llama-tokenizer"
    config.eval.every = 2000
    config.eval.batches = 20
    config.eval.batch_size = 64
    config.checkpoint.every = 1000
    names = {"gpt": gpt, "debug": debug, "stdlib": stdlib}
    return apply_variants(config, variants, names | {"nugpt": nugpt, "root_width": root_width})


def gpt(config):
    config.model.kind = "gpt"
    config.optimizer.learning_rate = 6e-4


def nugpt(config):
    """nuGPT with this shape as the base: rates and scales follow from it for other shapes."""
    config.model.parametrization = "nugpt"
    config.model.base_width = config.model.width
    config.model.base_layers = config.model.layers
    config.optimizer.base_steps = config.train.steps


def root_width(config):
    """The rate 0.24/sqrt(width), and alphas that start at 0.1."""
    config.model.parametrization = "root_width"
    config.model.base_width = 1
    config.optimizer.learning_rate = 0.24
    config.model.alpha_a.init = 0.1
    config.model.alpha_m.init = 0.1


def debug(config):
    config.model.layers = 2
    config.model.width = 64
    config.model.heads = 8
    config.model.context = 64
    config.model.dtype = "float32"
    config.model.attention = "xla"  # heads of 8 are too small for other kernels
    config.train.steps = 20
    config.train.batch_size = 8
    config.eval.every = 10
    config.eval.batches = 2
    config.eval.batch_size = 8
    config.checkpoint.every = 10
    config.log.every = 5


def stdlib(config):
    config.model.vocab_size = None
    config.data.source = "stdlib"
    config.data.paths = ()
    config.data.tokenizer = "byte"
