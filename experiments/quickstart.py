"""nGPT learns Python on your laptop: bytes of the running Python's own standard library.

    python -m ngpt_jax.main --config=experiments/quickstart.py

1.1 M parameters (4 layers, width 128, 4 heads), context 256, 1.4 M tokens in 700 steps of 8
sequences; under five minutes on two cores.
Variants: gpt (the baseline, with a recipe of its own), debug (tiny, seconds).
"""

from ngpt_jax.config import default_config
from ngpt_jax.config.experiment import apply_variants
from ngpt_jax.study.plan import Study


def get_config(variants: str = ""):
    config = default_config()
    config.model.layers = 4
    config.model.width = 128
    config.model.heads = 4
    config.model.context = 256
    config.model.scan_layers = False  # a CPU runs four unrolled blocks faster
    # A short run starts the scales near where they end, and lets them move in small steps: from
    # the paper's 1, s_z moves by learning_rate * sqrt(width) a step and would not arrive; alpha
    # likewise. get_study() is the search. A high rate over few steps wants a short warm-up, though
    # the paper's has none.
    config.model.s_z.init = 10.0
    config.model.alpha_a.init = 0.35
    config.model.alpha_m.init = 0.35
    for scale in (config.model.s_z, config.model.s_qk, config.model.alpha_a, config.model.alpha_m):
        scale.scale = 0.5
    config.optimizer.learning_rate = 7e-3
    config.optimizer.warmup_share = 0.1
    config.train.steps = 700
    config.train.batch_size = 8
    config.eval.every = 250
    config.eval.batches = 5
    config.eval.batch_size = 32
    config.checkpoint.every = 250
    config.log.every = 50
    config.sample.prompt = "def "
    return apply_variants(config, variants, {"gpt": gpt, "debug": debug})


def gpt(config):
    config.model.kind = "gpt"
    config.model.init_std = 0.06  # 0.02 is for wide models
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_share = 0.2


def debug(config):
    config.model.layers = 2
    config.model.width = 32
    config.model.context = 128
    config.model.attention = "xla"  # heads of 8 are too small for other kernels
    config.train.batch_size = 16
    config.train.steps = 20
    config.eval.every = 10
    config.eval.batches = 2
    config.checkpoint.every = 10
    config.log.every = 5


# Of models with Adam; "slow": the scales start near where they end and move in small steps.
_STARTS = {"model.s_z.init": 10.0, "model.alpha_a.init": 0.2, "model.alpha_m.init": 0.2}
_SCALES = [f"model.{name}.scale" for name in ("alpha_a", "alpha_m", "s_qk", "s_z")]
_SLOW = _STARTS | dict.fromkeys(_SCALES, 0.5) | {"optimizer.warmup_share": 0.1}
_GPT = {"model.kind": "gpt", "optimizer.warmup_share": 0.2}
_GPT |= _STARTS | dict.fromkeys(_SCALES, None)  # not read by GPT; what its rows were made with
_MUON = {"optimizer.recipe": "muon"}
_GPT_QK = _GPT | _MUON | {"model.qk_norm": True}


def _alpha(init: float) -> dict[str, float]:
    return {"model.alpha_a.init": init, "model.alpha_m.init": init}


_ADAM_MODELS = {
    "gpt_init0.06": _GPT | {"model.init_std": 0.06},
    "gpt_init0.09": _GPT | {"model.init_std": 0.09},  # 1/sqrt(width)
    "gpt_init0.125": _GPT | {"model.init_std": 0.125},
    "ngpt+slow": _SLOW,
    "ngpt+slow+alpha0.35": _SLOW | _alpha(0.35),
    "ngpt+slower": _STARTS | dict.fromkeys(_SCALES, 1.0) | {"optimizer.warmup_share": 0.0},
}
_MUON_MODELS = {
    "ngpt_muon": _SLOW | _MUON | _alpha(0.35),
    "ngpt_muon+warmup0": _SLOW | _MUON | _alpha(0.35) | {"optimizer.warmup_share": 0.0},
    "ngpt_muon+warmup0+alpha0.5": _SLOW | _MUON | _alpha(0.5) | {"optimizer.warmup_share": 0.0},
    "gpt_qk_muon": _GPT_QK | {"model.init_std": 0.06},
    "gpt_qk_muon+init0.03": _GPT_QK | {"model.init_std": 0.03},
    "gpt_qk_muon+init0.03+warmup10": _GPT_QK
    | {"model.init_std": 0.03, "optimizer.warmup_share": 0.1},
}


def get_study(variants: str = ""):
    """The search for the recipes: python -m ngpt_jax.tools.compare --experiment=FILE

    With Adam, each model has the two recipes that did best in the search of speedup.py, and one
    step further; with Muon three that did well in fair.py:search.
    """
    models = _ADAM_MODELS | _MUON_MODELS
    rates = {"gpt_i": (2e-3, 4e-3, 8e-3), "ngpt+": (7e-3, 1.4e-2, 2.8e-2)}
    rates |= {"ngpt_": (7e-3, 1.4e-2, 2.8e-2), "gpt_q": (6e-3, 1.2e-2, 2.4e-2)}
    once = {"eval.every": 1_000_000, "checkpoint.every": 1_000_000, "sample.tokens": 0}
    return Study(
        title="Search for the recipes of quickstart.py",
        models=models,
        settings={"stdlib256": once},
        budgets=(700,),
        seeds=(7,),
        tuned="optimizer.learning_rate",
        ladders={m: rates[m[:5]] for m in models},
        cores=1,
    )
