"""nGPT learns Python on your laptop: bytes of the running Python's own standard library.

    python -m ngpt_jax.main --config=experiments/quickstart.py

1.1 M parameters (4 layers, width 128, 4 heads), context 256, 1.8 M tokens in 900 steps of 8
sequences; under five minutes on two cores. The matrices are trained with Muon.
Variants: gpt (GPT with QK-norm and Muon, with a recipe of its own), paper (nGPT with Adam, the
paper's optimizer), debug (tiny, seconds).
"""

from ngpt_jax.config import default_config
from ngpt_jax.config.experiment import apply_variants, variant
from ngpt_jax.study.plan import Study

_SCALES = [f"model.{name}.scale" for name in ("alpha_a", "alpha_m", "s_qk", "s_z")]


def _alpha(init: float) -> dict[str, float]:
    return {"model.alpha_a.init": init, "model.alpha_m.init": init}


# A short run starts the scales near where they end, and lets them move in small steps: from the
# paper's 1, s_z moves by learning_rate * sqrt(width) a step and would not arrive; alpha likewise.
_SLOW = {"model.s_z.init": 10.0} | dict.fromkeys(_SCALES, 0.5)
_MUON = {"optimizer.recipe": "muon"}
_GPT = {"model.kind": "gpt", "optimizer.warmup_share": 0.2}
_GPT_QK = _GPT | _MUON | {"model.qk_norm": True}
# What get_study() found. A high rate over few steps wants a short warm-up with Adam, though the
# paper has none. With Muon nGPT does as well without one (1.2062 nats, and 1.2060 with it).
RECIPES = {
    "ngpt": _SLOW | _MUON | _alpha(0.35) | {"optimizer.learning_rate": 1.4e-2},  # no warm-up
    "gpt": _GPT_QK | {
        "model.init_std": 0.03,
        "optimizer.weight_decay": 0.0,
        "optimizer.learning_rate": 6e-3,
    },
    "paper": _SLOW | _alpha(0.35) | {
        "optimizer.recipe": "ngpt",
        "optimizer.warmup_share": 0.1,
        "optimizer.learning_rate": 7e-3,
    },
}  # fmt: skip


def get_config(variants: str = ""):
    config = default_config()
    config.model.layers = 4
    config.model.width = 128
    config.model.heads = 4
    config.model.context = 256
    config.model.scan_layers = False  # a CPU runs four unrolled blocks faster
    config.train.steps = 900
    config.train.batch_size = 8
    config.eval.every = 250
    config.eval.batches = 5
    config.eval.batch_size = 32
    config.checkpoint.every = 250
    config.log.every = 50
    config.sample.prompt = "def "
    config.update_from_flattened_dict(RECIPES["ngpt"])
    known = {"gpt": gpt, "paper": paper, "debug": debug, "finals": lambda config: None}
    return apply_variants(config, variants, known)


def gpt(config):
    config.update_from_flattened_dict(RECIPES["gpt"])


def paper(config):
    config.update_from_flattened_dict(RECIPES["paper"])


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


def get_study(variants: str = ""):
    """The search for the recipes; variant finals: each of them on two cores, three seeds."""
    return variant(variants, STUDIES)()


def search():
    """With Adam, the two recipes that did best in the search of speedup.py, and one step further.

    With Muon, three that were chosen by hand, and the one that fair.py:search found. The search
    has 700 steps.
    """
    adam = {"optimizer.recipe": None}
    slow = _SLOW | adam | {"optimizer.warmup_share": 0.1}
    slower = slow | _alpha(0.2) | dict.fromkeys(_SCALES, 1.0) | {"optimizer.warmup_share": 0.0}
    # What the rows of GPT were made with, though GPT does not read it.
    unread = {"model.s_z.init": 10.0} | _alpha(0.2) | dict.fromkeys(_SCALES, None)
    gpt, gpt_qk, ngpt = _GPT | unread | adam, _GPT_QK | unread, _SLOW | _MUON
    none = {"optimizer.warmup_share": 0.0}
    models = {
        "gpt_init0.06": gpt | {"model.init_std": 0.06},
        "gpt_init0.09": gpt | {"model.init_std": 0.09},  # 1/sqrt(width)
        "gpt_init0.125": gpt | {"model.init_std": 0.125},
        "ngpt+slow": slow | _alpha(0.2),
        "ngpt+slow+alpha0.35": slow | _alpha(0.35),
        "ngpt+slower": slower,
        "ngpt_muon": ngpt | _alpha(0.35) | {"optimizer.warmup_share": 0.1},
        "ngpt_muon+warmup0": ngpt | _alpha(0.35) | none,
        "ngpt_muon+warmup0+alpha0.5": ngpt | _alpha(0.5) | none,
        "ngpt_muon+warmup0+b2_0.99": ngpt | _alpha(0.35) | none | {"optimizer.b2": 0.99},
        "gpt_qk_muon": gpt_qk | {"model.init_std": 0.06},
        "gpt_qk_muon+init0.03": gpt_qk | {"model.init_std": 0.03},
        "gpt_qk_muon+init0.03+warmup10": gpt_qk
        | {"model.init_std": 0.03, "optimizer.warmup_share": 0.1},
        "gpt_qk_muon+init0.03+decay0": gpt_qk
        | {"model.init_std": 0.03, "optimizer.weight_decay": 0.0},
    }

    def rates(model: str) -> tuple[float, ...]:
        if model.startswith("ngpt"):
            return 7e-3, 1.4e-2, 2.8e-2
        return (6e-3, 1.2e-2, 2.4e-2) if model.startswith("gpt_qk") else (2e-3, 4e-3, 8e-3)

    once = {"eval.every": 1_000_000, "checkpoint.every": 1_000_000, "sample.tokens": 0}
    return Study(
        title="Search for the recipes of quickstart.py",
        models=models,
        settings={"stdlib256": once},
        budgets=(700,),
        seeds=(7,),
        tuned="optimizer.learning_rate",
        ladders={model: rates(model) for model in models},
        cores=1,
    )


def finals():
    """What the first run of a newcomer gives, and takes."""
    return Study(
        title="The quickstart",
        models=RECIPES,
        settings={"stdlib256": {}},
        budgets=(900,),
        seeds=(0, 1, 2),
        cores=2,
    )


STUDIES = {"": search, "finals": finals}
