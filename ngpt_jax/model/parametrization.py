"""How learning rates and scales follow the shape: factors that are applied where they are read.

A config keeps the values of its base shape, so that it may be resolved again and its shape
overridden. With ``model.parametrization``:

* ``ngpt``: one learning rate for all, and each scale starts at its ``init``: no factor anywhere.
* ``nugpt``: nuGPT (https://arxiv.org/abs/2604.27077, section 3.1), from base_width, base_layers and
  base_steps. Stored values of alpha, s_qk and s_z start at 0.03 (config/resolve.py).
* ``root_width``: all rates times (width/base_width)^-1/2. With base_width = 1 the learning rate
  0.24 is 0.24/sqrt(width). One implementer tells this of https://arxiv.org/abs/2608.01284, with an
  alpha that starts at 0.1 (model.alpha_a.init, model.alpha_m.init).
"""

from ngpt_jax.config import Config, ModelConfig


def _over_base(value: int, base: int | None) -> float:
    """A size over that of the base shape; 1 where there is no base."""
    return 1.0 if base is None else value / base


def initial_value(config: ModelConfig, name: str) -> float:
    """The effective value at the start of a learned scale, such as alpha_a.

    With nugpt alpha is its ``init`` times (layers/base_layers)^-1, and s_z times
    (width/base_width)^(1/2), so that logits keep their size.
    """
    init = getattr(config, name).init
    if config.parametrization == "nugpt":
        if name in ("alpha_a", "alpha_m"):
            return init / _over_base(config.layers, config.base_layers)
        if name == "s_z":
            return init * _over_base(config.width, config.base_width) ** 0.5
    return init


# Exponents of width/base_width in the learning rates of nuGPT.
_NUGPT = {"input_table": -0.5, "block_matrix": -0.75, "output_table": -0.75, "vector": 0.0}


def rate_factor(config: Config, group: str) -> float:
    """What multiplies the learning rate of a group of parameters (model/params.py); 1 for none.

    With nugpt all rates are times (train.steps/base_steps)^(-1/3). The rate of the output table is
    always times ``optimizer.output_rate`` besides, which is 1/2 in the runs of nuGPT's authors.
    With adamh and muonh that of the input table, scales and gains is times ``optimizer.adam_rate``.
    """
    model, optimizer = config.model, config.optimizer
    assert config.train.steps is not None and optimizer.output_rate is not None
    factor = optimizer.output_rate if group == "output_table" else 1.0
    if group in ("input_table", "vector") and optimizer.adam_rate is not None:
        factor *= optimizer.adam_rate
    width = _over_base(model.width, model.base_width)
    if model.parametrization == "nugpt":
        length = _over_base(config.train.steps, optimizer.base_steps)
        factor *= width ** _NUGPT[group] * length ** (-1 / 3)
    elif model.parametrization == "root_width":
        factor *= width**-0.5
    return factor
