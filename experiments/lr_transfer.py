"""Does the best learning rate stay where it is when the model grows wider?

    python -m ngpt_jax.tools.compare --experiment=experiments/lr_transfer.py

nGPT, nuGPT and the rule 0.24/sqrt(width), widths 32 to 256, 3 layers, heads of 16 channels, bytes
of Python's standard library, context 128, 1,024 tokens a step, 500 steps, float32, one CPU core for
each run. Every point is a run with its whole schedule. All seeds run around the best rate.
The results are in experiments/README.md.
"""

from ngpt_jax.config import default_config
from ngpt_jax.config.experiment import apply_variants, one_run_of_many
from ngpt_jax.study.plan import Study

BASE = 64  # the width at which nuGPT is nGPT


def get_config(variants: str = ""):
    config = default_config()
    config.model.layers = 3
    config.model.width = BASE
    config.model.head_dim = 16
    config.model.heads = BASE // 16
    config.model.context = 128
    config.model.scan_layers = False
    # 500 steps are too few to travel from the paper's 1 and 0.05.
    config.model.s_z.init = 10.0
    config.model.alpha_a.init = 0.1
    config.model.alpha_m.init = 0.1
    config.optimizer.warmup_share = 0.1
    config.train.batch_size = 8
    config.train.steps = 500
    config.data.source = "stdlib"
    config.data.held_out = 0.02
    config.eval.batch_size = 16
    one_run_of_many(config)
    return apply_variants(config, variants, {})


# nuGPT's constant 0.03 is 1/sqrt(width) at its authors' base width; here it is so at this one. So
# are its other two constants: the rate of the output table, and no other length of the run.
_NUGPT = {
    "model.parametrization": "nugpt",
    "model.base_width": BASE,
    "optimizer.output_rate": 1.0,
} | {f"model.{name}.scale": BASE**-0.5 for name in ("alpha_a", "alpha_m", "s_qk", "s_z")}


def get_study(variants: str = ""):
    return Study(
        title="Does the best learning rate transfer over widths?",
        notes=(
            "At width 64 nGPT and nuGPT are the same model with the same rates. The rates of"
            " root_width are divided by sqrt(width)."
        ),
        models={
            "ngpt": {},
            "nugpt": _NUGPT,
            "root_width": {"model.parametrization": "root_width", "model.base_width": 1},
        },
        settings={
            f"width{width}": {"model.width": width, "model.heads": width // 16}
            for width in (32, 64, 128, 256)
        },
        budgets=(500,),
        seeds=(0, 1, 2),
        tuned="optimizer.learning_rate",
        ladders={
            "ngpt": (3.5e-3, 7e-3, 1.4e-2, 2.8e-2, 5.6e-2),
            "nugpt": (3.5e-3, 7e-3, 1.4e-2, 2.8e-2, 5.6e-2),
            "root_width": (0.03, 0.06, 0.12, 0.24, 0.48),
        },
        near=1,
        cores=1,
    )
