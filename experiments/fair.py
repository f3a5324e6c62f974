"""nGPT and GPT with QK-norm, each with Adam and with Muon, each tuned with the same care.

    python -m ngpt_jax.tools.compare --experiment=experiments/fair.py

0.23 M parameters (3 layers, width 64, 2 heads), bytes, context 128, 2,048 tokens a step, float32,
one CPU core for each run. Two texts: the source of Python's standard library, and the prose that
`python -m ngpt_jax.data.corpora prose` makes. 5, 10 and 36 tokens per parameter, five seeds; the
learning rate is tuned for each model, text and budget.
Variants: long (130 tokens per parameter), context (sequences of 1,024 tokens) and width (128
channels), on prose with three seeds; ablation changes single pieces. search finds the recipes,
on a budget and a seed that the tables do not use: 20 runs for each model. Those with Adam had more
in speedup.py, 65 nGPT and 48 GPT. The study without a variant has 168 runs or more, about 8
core-hours on an AMD EPYC; --dry_run lists them.
"""

from small import SCALES, small_model

from ngpt_jax.config.experiment import apply_variants, variant
from ngpt_jax.study.plan import Study

PROSE = {"data.source": "prose"}
SETTINGS = {"stdlib128": {"data.source": "stdlib", "data.held_out": 0.02}, "prose128": PROSE}


def get_config(variants: str = ""):
    config = small_model()
    config.train.steps = 1130
    return apply_variants(config, variants, {name: _same for name in STUDIES if name})


def _same(config):
    """The studies differ in get_study alone."""


def _alpha(init: float) -> dict[str, float]:
    return {"model.alpha_a.init": init, "model.alpha_m.init": init}


_STILL = 1e6  # a scale parameter so large does not move
_FIXED = _alpha(0.5) | dict.fromkeys(SCALES[:2], _STILL)
# Where the search starts: what speedup.py found for Adam on other prose.
_NGPT = (
    {"model.s_z.init": 10.0, "optimizer.warmup_share": 0.1}
    | _alpha(0.2)
    | dict.fromkeys(SCALES, 0.5)
)
_GPT = {
    "model.kind": "gpt",
    "model.qk_norm": True,
    "model.init_std": 0.06,
    "optimizer.weight_decay": 0.1,
    "optimizer.warmup_share": 0.2,
}
_MUON = {"optimizer.recipe": "muon"}
# Model -> its fields there, and the rates of the tables; the search has the middle one.
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
        "alpha0.5+fixed": _FIXED,
        "slower": dict.fromkeys(SCALES, 1.0),
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
# What did well, together, and one step further where the best lay at an edge.
SECOND = {
    "ngpt": {
        "alpha0.5": _alpha(0.5),
        "alpha0.35+b2_0.99": _alpha(0.35) | {"optimizer.b2": 0.99},
    },
    "ngpt_muon": {
        "warmup0+s_z20": {"optimizer.warmup_share": 0.0, "model.s_z.init": 20.0},
        "warmup0+b2_0.99": {"optimizer.warmup_share": 0.0, "optimizer.b2": 0.99},
    },
    "gpt_qk": {
        "warmup30": {"optimizer.warmup_share": 0.3},
        "decay0+b2_0.99": {"optimizer.weight_decay": 0.0, "optimizer.b2": 0.99},
    },
    "gpt_qk_muon": {
        "init0.015": {"model.init_std": 0.015},
        "init0.03+decay0": {"model.init_std": 0.03, "optimizer.weight_decay": 0.0},
    },
}


def _named(model: str, change: str) -> str:
    return f"{model}{change and '+' + change}"


def trials(model: str) -> dict[str, dict]:
    """What the search tries for a model: fields over those of START, by the trial's name."""
    return TRIALS[model.removesuffix("_muon")] | SECOND[model]


# The trial of each model with the lowest mean loss over both texts.
FOUND = {
    "ngpt": "alpha0.35",
    "ngpt_muon": "warmup0+b2_0.99",
    "gpt_qk": "warmup30",
    "gpt_qk_muon": "init0.03+decay0",
}
MODELS = {model: START[model][0] | trials(model)[name] for model, name in FOUND.items()}
RATES = {model: rates for model, (_, rates) in START.items()}
# At 36 tokens per parameter the best rates with Muon are as low as those with Adam.
LOWER = {model: RATES[model.removesuffix("_muon")] for model in RATES}


def get_study(variants: str = ""):
    return variant(variants, STUDIES)()


# Runs of the search here, and of that of speedup.py.
_HERE = len(SETTINGS) * len(trials("ngpt"))
FOUND_IN = dict.fromkeys(MODELS, _HERE) | {"ngpt": _HERE + 65, "gpt_qk": _HERE + 48}


def _study(title: str, settings, budgets: tuple[int, ...], seeds: tuple[int, ...], rates) -> Study:
    return Study(
        title=title,
        models=MODELS,
        settings=settings,
        budgets=budgets,
        seeds=seeds,
        tuned="optimizer.learning_rate",
        ladders=rates,
        baseline={"ngpt": "gpt_qk", "ngpt_muon": "gpt_qk_muon", "gpt_qk_muon": "gpt_qk"},
        cores=1,
        trials=FOUND_IN,
    )


def fair():
    """5, 10 and 36 tokens per parameter."""
    title = "nGPT and GPT with QK-norm, with Adam and with Muon"
    return _study(title, SETTINGS, (565, 1130, 4080), (11, 12, 13, 14, 15), RATES)


def long():
    """130 tokens per parameter: 30 M tokens, most of the prose once."""
    return _study("130 tokens per parameter", {"prose128": PROSE}, (14_720,), (11, 12, 13), LOWER)


def context():
    """Sequences of 1,024 tokens, 18 and 36 tokens per parameter."""
    fields = PROSE | {"model.context": 1024, "train.batch_size": 2}
    return _study("Context 1,024", {"prose1024": fields}, (2040, 4080), (11, 12, 13), LOWER)


def width():
    """Twice as wide: 0.86 M parameters, 5 and 10 tokens per parameter."""
    fields = PROSE | {"model.width": 128, "model.heads": 4}
    return _study("Width 128", {"prose128x128": fields}, (2100, 4200), (11, 12, 13), LOWER)


def ablation():
    """One piece changed, all with Muon, each with a rate of its own."""
    changed = {
        "ngpt_muon": {
            "": {},
            "no_projection": {"optimizer.project": False},
            "free_weights": {"model.weights": "free"},
            "no_qk_norm": {"model.qk_norm": False},
            "alpha0.05": _alpha(0.05),
            "alpha0.35": _alpha(0.35),
            "alpha0.5+fixed": _FIXED,
            "s_z1": {"model.s_z.init": 1.0},
            "s_z10+fixed": {"model.s_z.scale": _STILL},
            "paper_scales": dict.fromkeys(SCALES, None),
            "warmup10": {"optimizer.warmup_share": 0.1},
        },
        "gpt_qk_muon": {
            "": {},
            "unit_weights": {"model.weights": "sphere"},
            "decay0.1": {"optimizer.weight_decay": 0.1},
            "warmup0": {"optimizer.warmup_share": 0.0},
        },
    }
    names = {
        _named(model, name): (model, fields)
        for model, pieces in changed.items()
        for name, fields in pieces.items()
    }
    return Study(
        title="Which piece does it, with Muon?",
        models={name: MODELS[model] | fields for name, (model, fields) in names.items()},
        settings={"prose128": PROSE},
        budgets=(1130,),
        seeds=(11, 12, 13),
        tuned="optimizer.learning_rate",
        ladders={name: RATES[model] for name, (model, _) in names.items()},
        cores=1,
    )


def search():
    """One field at a time, then two more trials; as many for each model."""
    models = {}
    for model, (start, rates) in START.items():
        for name, fields in trials(model).items():
            models[_named(model, name)] = start | fields | {"optimizer.learning_rate": rates[1]}
    return Study(
        title="Search for the recipes of fair.py",
        models=models,
        settings=SETTINGS,
        budgets=(1000,),
        seeds=(7,),
        cores=1,
    )


STUDIES = {
    "": fair, "long": long, "context": context, "width": width, "ablation": ablation,
    "search": search,
}  # fmt: skip
