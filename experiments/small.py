"""What the studies of the small model share: speedup.py, recipes.py and fair.py."""

from ngpt_jax.config import default_config
from ngpt_jax.config.experiment import one_run_of_many

# The scales that short runs move in smaller steps than the paper.
SCALES = [f"model.{name}.scale" for name in ("alpha_a", "alpha_m", "s_qk", "s_z")]


def small_model():
    """The config of one run: 3 layers of width 64 with 2 heads, 16 sequences of 128 tokens."""
    config = default_config()
    config.model.layers = 3
    config.model.width = 64
    config.model.heads = 2
    config.model.context = 128
    config.model.scan_layers = False
    config.train.batch_size = 16
    config.eval.batch_size = 16
    one_run_of_many(config)
    return config
