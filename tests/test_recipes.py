"""Every recipe for both models: it learns, keeps its state where told, and is cut over meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ngpt_jax.config.recipes import RECIPES as FACTS
from ngpt_jax.model.params import param_tree, unit_axes
from ngpt_jax.optim.recipes import RECIPES, make_optimizer
from ngpt_jax.projection import sphere_deviation

CASES = [(r, kind) for r in RECIPES for kind in ("ngpt", "gpt") if (r, kind) != ("ngpt2026", "gpt")]
RATES = {"sgd": 1.0, "lion": 3e-3}
ALL_ON = {"optimizer.tangent": "both", "optimizer.max_angle": 0.3}


def test_every_recipe_has_a_function():
    assert list(RECIPES) == list(FACTS)


@functools.cache
def params_of(kind, model):
    del kind
    from ngpt_jax.model.transformer import init_params

    return init_params(model, jax.random.key(0))


@pytest.mark.parametrize(("recipe", "kind"), CASES)
def test_learns_and_keeps_its_state_where_told(tiny, recipe, kind):
    """On a loss of its own, which compiles faster than the model: the distance to a target."""
    extra = ALL_ON if kind == "ngpt" and recipe not in ("adamh", "muonh") else {}
    config = tiny(**{
        "model.kind": kind, "optimizer.recipe": recipe, "train.steps": 30,
        "optimizer.learning_rate": RATES.get(recipe, 2e-2), **extra,
    })  # fmt: skip
    tx, _ = make_optimizer(config)
    start = params_of(kind, config.model)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    target = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(next(keys), p.shape), start)

    def loss(params):
        return optax.tree.norm(optax.tree.sub(params, target), squared=True)

    @jax.jit
    def step(params, state, number, ok):
        grads = jax.tree.map(lambda g: jnp.where(ok, g, jnp.nan), jax.grad(loss)(params))
        updates, state = tx.update(grads, state, params, step=number, ok=ok)
        return jax.tree.map(lambda p, u: jnp.where(ok, p + u, p), params, updates), state

    params, state = start, jax.jit(tx.init)(start)
    for number in range(12):
        params, state = step(params, state, number, True)
        if number == 5:
            kept = step(params, state, number, False)
            jax.tree.map(np.testing.assert_array_equal, kept, (params, state))
    assert loss(params) < 0.98 * loss(start)
    if kind == "ngpt":
        off = sphere_deviation(params, unit_axes(config.model))
        assert max(map(float, jax.tree.leaves(off))) < 1e-6
    if recipe in ("adamh", "muonh") and kind == "gpt":
        for name, p in param_tree(config.model)["layers"].items():
            if p.is_matrix:
                axes = tuple(range(1, len(p.axes)))
                norms = [
                    jnp.sqrt(jnp.sum(jnp.square(t["layers"][name]), axes)) for t in (params, start)
                ]
                np.testing.assert_allclose(*norms, rtol=1e-6)
