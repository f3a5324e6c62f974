"""The fair study at the sizes that papers use, for one GPU: nGPT and GPT with QK-norm.

    python -m ngpt_jax.tools.compare --experiment=experiments/gpu_study.py

Each with Adam and with Muon. Two sizes: 6 layers of width 256, and 18 layers of width 512, heads of
64, context 2,048: the shapes that anGPT's paper (arXiv 2505.22014) calls 32M and 127M by its larger
vocabulary. With the 32,000 tokens of LLaMA-2's tokenizer they have 22.7 M and 108.4 M parameters.
OpenWebText, bfloat16 compute, float32 weights. The sequences a step (20 and 96) make the same steps
the same tokens per parameter: 11,000, 22,000 and 44,000 steps are 20, 40 and 80.
Never run; what it costs and needs is in experiments/gpu_study.md.
Variants: 32m or 127m (one size alone), long (32m at 160 and 320 tokens per parameter), and debug:
the study with tiny models, on bytes of the standard library, in a minute or two on two CPU cores:

    python -m ngpt_jax.tools.compare --experiment=experiments/gpu_study.py:debug --out=runs/gpu
"""

import dataclasses

from ngpt_jax.config import default_config
from ngpt_jax.config.experiment import apply_variants, one_run_of_many, variant
from ngpt_jax.study.plan import Study

SETTINGS = {
    "32m": {"model.layers": 6, "model.width": 256, "model.heads": 4, "train.batch_size": 20},
    "127m": {
        "model.layers": 18,
        "model.width": 512,
        "model.heads": 8,
        "train.batch_size": 96,
        "train.accumulate": 2,
    },
}
TINY = {
    "32m": {"model.layers": 1, "model.width": 32, "model.heads": 2, "train.batch_size": 2},
    "127m": {"model.layers": 2, "model.width": 64, "model.heads": 4, "train.batch_size": 8},
}


def get_config(variants: str = ""):
    config = default_config()
    config.update_from_flattened_dict(SETTINGS["32m"])
    config.model.context = 2048
    config.model.vocab_size = 32_000
    config.model.dtype = "bfloat16"
    config.train.steps = 11_000
    config.data.source = "hub"
    config.data.paths = ("Skylion007/openwebtext",)
    config.data.tokenizer = "hub:hf-internal-testing/llama-tokenizer"
    config.data.held_out = 0.005  # about 50 M tokens, all of which are evaluated at the end
    config.data.workers = 2  # the small model reads millions of tokens a second
    config.eval.batch_size = 32
    config.mesh.fsdp = 1  # of several GPUs CUDA_VISIBLE_DEVICES names the one of a run
    one_run_of_many(config)
    known = dict.fromkeys(STUDIES, lambda config: None) | {"127m": _127m, "debug": debug}
    return apply_variants(config, variants, known)


def _127m(config):
    config.update_from_flattened_dict(SETTINGS["127m"])


def debug(config):
    config.update_from_flattened_dict(TINY["32m"])
    config.train.steps = 4
    config.model.context = 64
    config.model.vocab_size = None
    config.model.dtype = "float32"
    config.data.source = "stdlib"
    config.data.paths = ()
    config.data.tokenizer = "byte"
    config.data.workers = 0
    config.log.every = 1


# The rate alone is tuned. nGPT has the paper's recipe: no warm-up, and the scales start where the
# paper starts them, because 11,000 steps and more are enough to travel from there. GPT has a weight
# decay of 0.1 and a warm-up of a tenth, as anGPT's tuned baseline; its init is about half of
# 1/sqrt(width), which was best at width 64.
_GPT = {
    "model.kind": "gpt",
    "model.qk_norm": True,
    "model.init_std": 0.025,
    "optimizer.weight_decay": 0.1,
    "optimizer.warmup_share": 0.1,
}
_MUON = {"optimizer.recipe": "muon"}
MODELS = {"ngpt": {}, "ngpt_muon": _MUON, "gpt_qk": _GPT, "gpt_qk_muon": _GPT | _MUON}

# anGPT's fits at 20 tokens per parameter: GPT 1.0e-2 at 32M and 5.2e-3 at 127M; its own normalized
# model 3.0e-3 and 2.4e-3. nGPT's authors and a reproduction took 1.5e-3 to 3e-3 at width 1,024.
# Muon did best with one to two times Adam's rate in small trials. Longer runs want less.
LADDERS = {
    "ngpt": (1.5e-3, 3e-3, 6e-3),
    "ngpt_muon": (3e-3, 6e-3, 1.2e-2),
    "gpt_qk": (2.6e-3, 5.2e-3, 1.04e-2),
    "gpt_qk_muon": (5.2e-3, 1.04e-2, 2.08e-2),
}

STUDY = Study(
    title="nGPT and GPT with QK-norm, with Adam and with Muon, on one GPU",
    models=MODELS,
    settings=SETTINGS,
    budgets=(11_000, 22_000, 44_000),
    seeds=(0, 1, 2),
    tuned="optimizer.learning_rate",
    ladders=LADDERS,
    baseline={"ngpt": "gpt_qk", "ngpt_muon": "gpt_qk_muon", "gpt_qk_muon": "gpt_qk"},
)


def _alone(size: str, **changes) -> Study:
    return dataclasses.replace(STUDY, settings={size: SETTINGS[size]}, **changes)


STUDIES = {
    "": STUDY,
    "32m": _alone("32m"),
    "127m": _alone("127m"),
    "long": _alone("32m", budgets=(88_000, 176_000)),
    "debug": dataclasses.replace(
        STUDY,
        settings=TINY,
        budgets=(4,),
        seeds=(0,),
        tuned=None,
        ladders={},
    ),
}


def get_study(variants: str = ""):
    return variant(variants, STUDIES)
