"""nGPT learns Python on your laptop: bytes of the running Python's own standard library.

    python -m ngpt_jax.main --config=experiments/quickstart.py

1.1 M parameters (4 layers, width 128, 4 heads), context 128, 1.0 M tokens in 500 steps of 16
windows; under five minutes on two cores.
Variants: gpt (the baseline, with a rate of its own), debug (tiny, seconds).
"""

from ngpt_jax.config import default_config
from ngpt_jax.config_file import apply_variants


def get_config(variants: str = ""):
    config = default_config()
    config.model.layers = 4
    config.model.width = 128
    config.model.heads = 4
    config.model.context = 128
    config.model.scan_layers = False  # a CPU runs four unrolled blocks faster
    # A short run starts s_z nearer to where it ends: from the paper's 1 it moves by
    # learning_rate * sqrt(width) a step and would not arrive.
    config.model.s_z.init = 10.0
    config.optimizer.learning_rate = 1e-2
    config.train.steps = 500
    config.train.batch_size = 16
    config.eval.every = 200
    config.eval.batches = 5
    config.eval.batch_size = 64
    config.checkpoint.every = 200
    config.log.every = 50
    config.sample.prompt = "def "
    return apply_variants(config, variants, {"gpt": gpt, "debug": debug})


def gpt(config):
    config.model.kind = "gpt"
    config.optimizer.learning_rate = 3e-3


def debug(config):
    config.model.layers = 2
    config.model.width = 32
    config.train.steps = 20
    config.eval.every = 10
    config.eval.batches = 2
    config.checkpoint.every = 10
    config.log.every = 5
