"""nGPT learns English prose: a small model for the evaluation tasks, its own tokenizer.

    python -m ngpt_jax.main --config=experiments/prose.py

Reads prose.train.jsonl.gz and prose.val.jsonl.gz, with {"text": ...} on each line, from the folder
that the environment variable NGPT_PROSE names. 4 layers, width 192, 6 heads, context 256, 4,096
tokens (3.7 characters each): 3.9 M parameters. 12.3 M tokens in 6,000 steps of 8 sequences, once
through the text. 51 minutes (2.5e14 FLOPs) on two cores of an Intel Xeon; after the first 200 steps
each core was a device of its own:

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m ngpt_jax.main \
        --config=experiments/prose.py --config.mesh.data=2 --config.mesh.fsdp=1

Variants: gpt (the baseline).
prose/tokenizer.json was made from the training text: python experiments/prose.py
"""

import os

from ngpt_jax.config import default_config
from ngpt_jax.config.experiment import apply_variants

PROSE = os.environ.get("NGPT_PROSE", "NGPT_PROSE")  # where it is not set, no such folder
TRAIN = f"{PROSE}/prose.train.jsonl.gz"
TOKENIZER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "prose", "tokenizer.json")


def get_config(variants: str = ""):
    config = default_config()
    config.model.layers = 4
    config.model.width = 192
    config.model.heads = 6
    config.model.context = 256
    config.model.scan_layers = False
    config.model.s_z.init = 10.0  # see speedup.py for the search
    config.model.alpha_a.init = 0.2
    config.model.alpha_m.init = 0.2
    for scale in (config.model.s_z, config.model.s_qk, config.model.alpha_a, config.model.alpha_m):
        scale.scale = 0.5
    config.optimizer.learning_rate = 7e-3
    config.optimizer.warmup_share = 0.1
    config.train.steps = 6000
    config.train.batch_size = 8
    config.data.source = "text"
    config.data.paths = (TRAIN,)
    config.data.eval_paths = (f"val={PROSE}/prose.val.jsonl.gz",)
    config.data.tokenizer = TOKENIZER
    config.eval.every = 2000
    config.eval.batch_size = 32
    config.checkpoint.every = 500
    config.checkpoint.keep = 1
    config.log.every = 100
    config.sample.prompt = "The"
    return apply_variants(config, variants, {"gpt": gpt})


def gpt(config):
    config.model.kind = "gpt"
    config.model.init_std = 0.07  # 1/sqrt(width)
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_share = 0.2


def train_tokenizer():
    """Byte-level BPE of 4,096 tokens on the training text, with the ``tokenizers`` library."""
    import gzip
    import json

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    with gzip.open(TRAIN, "rt", encoding="utf-8") as lines:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    tokenizer.save(TOKENIZER, pretty=False)


if __name__ == "__main__":
    train_tokenizer()
