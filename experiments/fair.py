"""nGPT and GPT with QK-norm, each with Adam and with Muon, each tuned with the same care.

    python -m ngpt_jax.tools.compare --experiment=experiments/fair.py:search

0.23 M parameters (3 layers, width 64, 2 heads), bytes, context 128, 2,048 tokens a step, float32,
one CPU core for each run, on the prose that `python -m ngpt_jax.data.corpora prose` makes.
Variants: search (for the four recipes: one field at a time, as many trials for each).
"""

from small import small_model

from ngpt_jax.config import ConfigError
from ngpt_jax.config.experiment import apply_variants
from ngpt_jax.study.plan import Study

SETTINGS = {"prose128": {"data.source": "prose"}}


def get_config(variants: str = ""):
    config = small_model()
    config.train.steps = 1500
    return apply_variants(config, variants, dict.fromkeys(STUDIES, _same))


def _same(config):
    """The studies differ in get_study alone."""


_SCALES = [f"model.{name}.scale" for name in ("alpha_a", "alpha_m", "s_qk", "s_z")]


def _alpha(init: float) -> dict[str, float]:
    return {"model.alpha_a.init": init, "model.alpha_m.init": init}


# Where the search starts: what speedup.py found for Adam.
_NGPT = (
    {"model.s_z.init": 10.0, "optimizer.warmup_share": 0.1}
    | _alpha(0.2)
    | dict.fromkeys(_SCALES, 0.5)
)
_GPT = {
    "model.kind": "gpt",
    "model.qk_norm": True,
    "model.init_std": 0.06,
    "optimizer.weight_decay": 0.1,
    "optimizer.warmup_share": 0.2,
}
_MUON = {"optimizer.recipe": "muon"}
# Model -> the fields where the search starts, and the rates of which the middle one is searched at.
START = {
    "ngpt": (_NGPT, (3.5e-3, 7e-3, 1.4e-2)),
    "ngpt_muon": (_NGPT | _MUON, (7e-3, 1.4e-2, 2.8e-2)),
    "gpt_qk": (_GPT, (3e-3, 6e-3, 1.2e-2)),
    "gpt_qk_muon": (_GPT | _MUON, (6e-3, 1.2e-2, 2.4e-2)),
}
TRIALS = {
    "ngpt": {
        "": {},
        "warmup0": {"optimizer.warmup_share": 0.0},
        "warmup20": {"optimizer.warmup_share": 0.2},
        "alpha0.35": _alpha(0.35),
        # A scale parameter so large does not move.
        "alpha0.5+fixed": _alpha(0.5) | dict.fromkeys(_SCALES[:2], 1e6),
        "slower": dict.fromkeys(_SCALES, 1.0),
        "s_z20": {"model.s_z.init": 20.0},
        "b2_0.99": {"optimizer.b2": 0.99},
    },
    "gpt_qk": {
        "": {},
        "decay0": {"optimizer.weight_decay": 0.0},
        "decay0.3": {"optimizer.weight_decay": 0.3},
        "decay1": {"optimizer.weight_decay": 1.0},
        "warmup10": {"optimizer.warmup_share": 0.1},
        "init0.03": {"model.init_std": 0.03},
        "init0.125": {"model.init_std": 0.125},
        "b2_0.99": {"optimizer.b2": 0.99},
    },
}


def get_study(variants: str = ""):
    if variants not in STUDIES:
        raise ConfigError(
            f"There is no study {variants!r}; there are {', '.join(STUDIES)}, as FILE:NAME."
        )
    return STUDIES[variants]()


def search():
    """One field at a time from where the search starts; as many trials for each model."""
    models = {}
    for model, (start, rates) in START.items():
        for name, fields in TRIALS[model.removesuffix("_muon")].items():
            models[f"{model}{name and '+' + name}"] = (
                start | fields | {"optimizer.learning_rate": rates[1]}
            )
    return Study(
        title="Search for the recipes of fair.py",
        models=models,
        settings=SETTINGS,
        budgets=(1500,),
        seeds=(7,),
        cores=1,
    )


STUDIES = {"search": search}
