"""The preconditioned gradient of the logits changes gradients as stated, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ngpt_jax.config import ConfigError
from ngpt_jax.model import folding
from ngpt_jax.model.logit_gradient import factors
from ngpt_jax.model.params import scale_factor
from ngpt_jax.model.transformer import Transformer, init_params
from ngpt_jax.training.step import _loss_and_grads

ON = {"optimizer.logit_gradient": "preconditioned", "model.dtype": "float64",
      "model.param_dtype": "float64", "model.s_z.init": 5.0, "model.layers": 1}  # fmt: skip


def start(config):
    """Parameters with an uneven s_z, one entry of it negative, and a batch."""
    params = init_params(config.model, jax.random.key(0))
    noise = jax.random.normal(jax.random.key(1), params["s_z"].shape)
    params["s_z"] = params["s_z"] * (1 + 0.3 * noise).at[3].set(-0.5)
    ids = jax.random.randint(jax.random.key(2), (2, 4, 16), 0, 60)
    return params, {"inputs": ids[0], "targets": ids[1]}


def by_hand(config, params, batch, power):
    """The loss of the logits z = s_z u, with the factor on dL/du put in by hand."""
    model, stop = config.model, jax.lax.stop_gradient
    h, _ = Transformer(model).apply({"params": params}, batch["inputs"], method="hidden_and_table")
    table = params["output_embedding"]
    if model.normalize_on_read:
        table = table / jnp.linalg.norm(table, axis=1, keepdims=True)
    u = (h @ table.T)[..., :60]
    s_z = (params["s_z"] * scale_factor(model, "s_z"))[:60]
    relative = stop(s_z / jnp.mean(s_z))
    factor = jnp.sign(relative) * jnp.abs(relative) ** power
    z = stop(s_z * u) + factor * (u - stop(u)) + (s_z - stop(s_z)) * stop(u)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, batch["targets"]))


@pytest.mark.parametrize(
    ("power", "fields"),
    [
        (1.0, {}),
        (0.5, {"train.accumulate": 2, "model.loss_chunk": 8}),
        (0.0, {"model.normalize_on_read": True}),
    ],
)
def test_the_stated_gradient(x64, tiny, power, fields):
    config = tiny(**ON | fields | {"optimizer.logit_power": power})
    params, batch = start(config)
    loss, grads = jax.jit(lambda p: _loss_and_grads(config, p, batch))(params)
    expected_loss, expected = jax.value_and_grad(by_hand, 1)(config, params, batch, power)
    assert float(loss) == pytest.approx(float(expected_loss), abs=1e-13)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, atol=1e-12, rtol=1e-9, err_msg=str(path))


def test_forward_values_are_the_same_bit_for_bit_and_gradients_are_not(tiny):
    fields = {"model.s_z.init": 5.0, "model.layers": 1}
    config = tiny(**fields)
    params, batch = start(config)
    plain, plain_grads = jax.jit(lambda p: _loss_and_grads(config, p, batch))(params)
    on = tiny(**{"optimizer.logit_gradient": "preconditioned"} | fields)
    loss, grads = jax.jit(lambda p: _loss_and_grads(on, p, batch))(params)
    assert float(loss) == float(plain)
    jax.tree.map(
        np.testing.assert_array_equal,
        folding.fold(config.model, params, 1.0), folding.fold(config.model, params),
    )  # fmt: skip
    np.testing.assert_array_equal(grads["s_z"], plain_grads["s_z"])
    for name in ("output_embedding", "input_embedding"):
        ratio = np.linalg.norm(grads[name]) / np.linalg.norm(plain_grads[name])
        assert 0.1 < ratio < 0.3  # about 1 / mean(s_z)


def test_factors():
    s_z = jnp.array([1.0, 3.0, -2.0, 100.0])  # the last row pads the vocabulary
    np.testing.assert_allclose(factors(s_z, 1.0, 3), [1.5, 4.5, -3.0, 150.0], rtol=1e-6)
    np.testing.assert_allclose(factors(s_z, 0.5, 3)[:3], np.sqrt([1.5, 4.5, 3]) * [1, 1, -1], 1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model.kind": "gpt", "optimizer.logit_gradient": "preconditioned"},
            "optimizer.logit_gradient = preconditioned needs model.s_z",
        ),
        ({"optimizer.logit_power": 0.5}, "optimizer.logit_power = 0.5 is for .*; leave it out"),
    ],
)
def test_refused(tiny, fields, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        tiny(**fields)
