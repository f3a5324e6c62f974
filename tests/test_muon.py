"""Which matrices Muon orthogonalizes, and that it does."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from ngpt_jax.model.params import param_tree
from ngpt_jax.optim.muon import ScaleByMuonState, dimension_numbers, orthogonalize, scale_by_muon
from ngpt_jax.optim.recipes import make_optimizer
from ngpt_jax.training.step import init_state

# Axes of the stacked parameters: (read, written). Heads are merged, or axes of their own.
MATRICES = {
    "query_kernel": ((1,), (2, 3)), "key_kernel": ((1,), (2, 3)), "value_kernel": ((1,), (2, 3)),
    "out_kernel": ((1, 2), (3,)),
    "up_kernel": ((1,), (2,)), "gate_kernel": ((1,), (2,)), "down_kernel": ((1,), (2,)),
}  # fmt: skip
HEADS_APART = {
    "query_kernel": ((1,), (3,)), "key_kernel": ((1,), (3,)), "value_kernel": ((1,), (3,)),
    "out_kernel": ((2,), (3,)),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
@pytest.mark.parametrize("heads", ["together", "apart"])
def test_every_leaf_that_is_orthogonalized_by_name(tiny, kind, heads):
    model = tiny(**{"model.kind": kind, "model.qk_norm": True}).model
    numbers = dimension_numbers(model, heads)
    expected = MATRICES | (HEADS_APART if heads == "apart" else {})
    found = {name: n for name, n in numbers["layers"].items() if n is not None}
    assert found == {name: MuonDimensionNumbers(*n) for name, n in expected.items()}
    assert all(n is None for name, n in numbers.items() if name != "layers")
    assert set(numbers["layers"]) == set(param_tree(model)["layers"])


def newton_schulz(m):
    """An independent computation: the singular values go through the polynomial."""
    u, s, v = np.linalg.svd(m, full_matrices=False)
    s = s / np.sqrt(np.sum(s**2))
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return u * s @ v


def matrices_of(name, w, heads):
    """(index of a matrix in the stacked array, the matrix) for each, by numpy alone."""
    for layer in range(len(w)):
        if heads == "apart" and name in HEADS_APART:
            axis = 0 if name == "out_kernel" else 1
            for head in range(w[layer].shape[axis]):
                index = (layer, head) if axis == 0 else (layer, slice(None), head)
                yield index, w[index]
        elif name == "out_kernel":
            yield (layer,), w[layer].reshape(-1, w.shape[-1])
        else:
            yield (layer,), w[layer].reshape(w.shape[1], -1)


CASES = [("ngpt", "together", True), ("ngpt", "apart", False), ("gpt", "together", False)]


@pytest.mark.parametrize(("kind", "heads", "scan"), CASES)
def test_updates_equal_numpy_for_each_matrix(x64, tiny, kind, heads, scan):
    """Two steps of the recipe: momentum with look-ahead, orthogonal, rms 0.2; Adam for the rest."""
    config = tiny(**{
        "model.kind": kind, "model.qk_norm": True, "model.kv_heads": 1, "model.scan_layers": scan,
        "model.param_dtype": "float64", "optimizer.recipe": "muon", "optimizer.muon_heads": heads,
        "optimizer.clip_norm": 0.0, "optimizer.weight_decay": 0.0, "optimizer.schedule": "constant",
        "optimizer.learning_rate": 0.5, "optimizer.warmup_steps": 0, "model.weights": "free",
    })  # fmt: skip
    tx, _ = make_optimizer(config)
    params = init_state(config, tx).params
    keys = iter(jax.random.split(jax.random.key(0), 100))
    first, second = (
        jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape, p.dtype), params)
        for _ in range(2)
    )
    _, state = tx.update(first, tx.init(params), params, step=0)
    updates, _ = tx.update(second, state, params, step=1)
    for name in MATRICES:
        g1, g2 = (np.asarray(g["layers"][name]) for g in (first, second))
        m = 0.95 * 0.05 * g1 + 0.05 * g2
        ahead, u = 0.95 * m + 0.05 * g2, np.asarray(updates["layers"][name])
        for index, matrix in matrices_of(name, ahead, heads):
            expected = -0.5 * 0.2 * np.sqrt(max(matrix.shape)) * newton_schulz(matrix)
            np.testing.assert_allclose(u[index].reshape(matrix.shape), expected, atol=1e-9)
            least = np.linalg.svd(matrix / np.linalg.norm(matrix), compute_uv=False).min()
            s = np.linalg.svd(u[index].reshape(matrix.shape), compute_uv=False)
            s = s / (0.1 * np.sqrt(max(matrix.shape)))
            assert s.max() < 1.25
            assert s.min() > 0.65 or least < 0.003
            assert np.sqrt(np.mean(u[index] ** 2)) == pytest.approx(0.1, rel=0.3)
    adam = optax.adam(0.5, 0.9, 0.95)
    _, theirs = adam.update(first, adam.init(params))
    expected, _ = adam.update(second, theirs)
    rest = [n for n, p in param_tree(config.model)["layers"].items() if not p.is_matrix]
    pairs = [(updates["layers"][n], expected["layers"][n]) for n in rest]
    pairs += [(updates[n], expected[n]) for n in updates if n != "layers"]
    for a, b in pairs:
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_the_direction_is_that_of_optax(x64):
    """But for the scale and their bias correction, which changes the share of the last gradient."""
    g = jax.random.normal(jax.random.key(0), (3, 8, 5), jnp.float64)
    numbers = MuonDimensionNumbers((1,), (2,))
    theirs = optax.contrib.scale_by_muon(
        weight_dimension_numbers=numbers, nesterov=False, eps=1e-30
    )
    expected, _ = theirs.update(g, theirs.init(g))
    np.testing.assert_allclose(orthogonalize(g, numbers), expected, atol=1e-10)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_matrices_of_any_size(size):
    g = jax.random.normal(jax.random.key(0), (4, 2, 6))
    numbers = MuonDimensionNumbers((0,), (1, 2))
    out = orthogonalize(size * g, numbers)
    expected = orthogonalize(g, numbers) if size else jnp.zeros_like(g)
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_axes_in_any_order(order):
    g = jax.random.normal(jax.random.key(0), (2, 4, 6))  # batch, read, written
    expected = orthogonalize(g, MuonDimensionNumbers((1,), (2,))).transpose(order)
    numbers = MuonDimensionNumbers((order.index(1) - 3,), (order.index(2),))
    np.testing.assert_allclose(orthogonalize(g.transpose(order), numbers), expected, atol=1e-6)


def test_the_state_stays_where_told():
    tx = scale_by_muon(MuonDimensionNumbers())
    old = ScaleByMuonState(jax.random.normal(jax.random.key(0), (4, 3)))
    _, state = tx.update(jnp.full((4, 3), jnp.nan), old, ok=jnp.asarray(False))
    np.testing.assert_array_equal(state.momentum, old.momentum)
    _, state = tx.update(jnp.ones((4, 3)), old, ok=jnp.asarray(True))
    np.testing.assert_allclose(state.momentum, 0.95 * old.momentum + 0.05, rtol=1e-6)
