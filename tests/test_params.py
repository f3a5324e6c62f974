"""The table of parameters against Flax's own tree, under every choice."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from choices import label, make, pairwise, single

from ngpt_jax.config import default_config, from_config_dict
from ngpt_jax.model.params import TABLE, num_params, param_list, param_tree
from ngpt_jax.model.transformer import Transformer, init_params

FOLDED = [{"kind": "ngpt", "folded": True}, {"kind": "ngpt", "folded": True, "s_qk.form": "none"}]


@pytest.mark.parametrize("fields", [*single(), *pairwise(), *FOLDED], ids=label)
def test_flax_has_the_parameters_of_the_table(fields):
    config = make(fields).model

    def init(key):
        return Transformer(config).init(key, jnp.zeros((1, 2), jnp.int32))["params"]

    boxed = jax.eval_shape(init, jax.random.key(0))
    specs = nn.get_partition_spec(boxed)
    found = {
        "/".join(key.key for key in path): (tuple(spec), leaf.shape)
        for (path, leaf), spec in zip(
            jax.tree_util.tree_flatten_with_path(nn.unbox(boxed))[0],
            jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, jax.sharding.PartitionSpec)),
            strict=True,
        )
    }
    assert found == {p.path: (p.axes, p.shape(config)) for p in param_list(config)}
    assert jax.tree.structure(nn.unbox(boxed)) == jax.tree.structure(param_tree(config))
    real = (
        math.prod(shape) * 20 // (128 if "vocab" in axes else 20) for axes, shape in found.values()
    )
    assert num_params(config) == sum(real)


def test_groups_and_names_of_the_table():
    """Both tables have the same axes, so that groups are written down; these follow from axes."""
    for p in TABLE.values():
        assert ("embed" in p.axes and len(set(p.axes) - {"layers"}) > 1) == p.is_matrix, p
        assert p.path in (p.name, f"layers/{p.name}") and (p.axes[0] == "layers") == ("/" in p.path)
        assert ("vocab" in p.axes and p.is_matrix) == p.group.endswith("_table"), p
    assert len({p.path for p in TABLE.values()}) == len(TABLE) == 21


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        ("ngpt", [0.2309392, -0.1326244, 0.2426504, 0.4898379, -0.2454808, -0.0519141, -0.1961008]),
        ("gpt", [-0.0052469, -0.0323469, 0.0159513, -0.0066907, -0.0040478, 0.0418858, 0.0090087]),
    ],
)
def test_a_seed_gives_the_parameters_that_it_always_gave(kind, first):
    """The order in which modules declare parameters decides their random numbers."""
    values = default_config()
    values.model.update(kind=kind, layers=2, width=16, heads=2, vocab_size=257)
    values.train.steps = 1
    layers = init_params(from_config_dict(values).model, jax.random.key(0))["layers"]
    names = [p.name for p in TABLE.values() if p.group == "block_matrix"]
    found = [float(layers[name].ravel()[0]) for name in names]
    assert found == pytest.approx(first, abs=2e-6)
