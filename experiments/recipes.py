"""What do the recipes do for nGPT, and for GPT with QK-norm? Each with its own learning rate.

    python -m ngpt_jax.tools.compare --experiment=experiments/recipes.py

0.23 M parameters (3 layers, width 64, 2 heads), bytes of Python's standard library, context 128,
1,000 steps of 2,048 tokens, float32, one CPU core for each run. A recipe takes the place of Adam
alone, and the learning rate is tuned. The rest is what speedup.py found for Adam, which favours
Adam; nGPT has its warm-up for prose and its scales for this text, a pair that was not tuned.
About 70 runs, 3 core-hours on an AMD EPYC.
The results are in experiments/README.md.
"""

from small import small_model

from ngpt_jax.config.experiment import apply_variants
from ngpt_jax.study.plan import Study


def get_config(variants: str = ""):
    config = small_model()
    config.train.steps = 1000
    config.data.source = "stdlib"
    config.data.held_out = 0.02
    return apply_variants(config, variants, {})


_NGPT = {
    "model.s_z.init": 10.0,
    "model.alpha_a.init": 0.2,
    "model.alpha_m.init": 0.2,
    "optimizer.warmup_share": 0.1,
} | {f"model.{name}.scale": 1.0 for name in ("alpha_a", "alpha_m", "s_qk", "s_z")}
_GPT = {
    "model.kind": "gpt",
    "model.qk_norm": True,
    "model.init_std": 0.06,
    "optimizer.warmup_share": 0.2,
}

# Recipe -> the middle one of three rates, half and twice as large the others.
NGPT = {
    "ngpt": 7e-3,
    "muon": 1.4e-2,
    "ngpt2026": 1.4e-2,
    "adamh": 5.6e-2,
    "muonh": 5.6e-2,
    "lion": 1.4e-3,
    "sgd": 1.0,
}
GPT = {
    "adamw": 6e-3,
    "muon": 1.2e-2,
    "adamh": 1.4e-2,
    "muonh": 1.4e-2,
    "lion": 1e-3,
    "sgd": 0.2,
}


def get_study(variants: str = ""):
    models = {f"ngpt-{name}": _NGPT | {"optimizer.recipe": name} for name in NGPT}
    models |= {f"gpt_qk-{name}": _GPT | {"optimizer.recipe": name} for name in GPT}
    rates = {f"ngpt-{name}": rate for name, rate in NGPT.items()}
    rates |= {f"gpt_qk-{name}": rate for name, rate in GPT.items()}
    return Study(
        title="Recipes for nGPT and for GPT with QK-norm",
        models=models,
        settings={"stdlib128": {}},
        budgets=(1000,),
        seeds=(0, 1, 2),
        tuned="optimizer.learning_rate",
        ladders={name: (rate / 2, rate, 2 * rate) for name, rate in rates.items()},
        cores=1,
    )
