"""Muon: momentum whose matrices are made orthogonal, with the matrices known by named axes."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from ngpt_jax import sphere
from ngpt_jax.config import ModelConfig
from ngpt_jax.model.params import Param, param_tree
from ngpt_jax.optim.transformations import keep_state_unless_ok
from ngpt_jax.projection import is_absent

_HEADS = ("heads", "kv_heads")
# Of https://github.com/KellerJordan/modded-nanogpt: the singular values s in (0, 1] of a matrix
# become a s + b s^3 + c s^5. After five such steps those above 0.002 are between 0.68 and 1.21.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5


def dimension_numbers(config: ModelConfig, heads: str = "together") -> Any:
    """Which axes make up the matrices that Muon orthogonalizes, from the names of the axes.

    Args:
      config: of the model.
      heads: together: the heads of a kernel in attention are one matrix; apart: each is one.

    Returns:
      A tree like the parameters with :class:`optax.contrib.MuonDimensionNumbers` for the matrices
      of the blocks, and None for tables, scales and gains. ``embed`` is one side of a matrix, all
      other axes but ``layers``, and but the heads where they are apart, are the other. Kernels have
      the axes that they read before those that they write.
    """
    batch = ("layers", *(_HEADS if heads == "apart" else ()))

    def numbers(p: Param) -> MuonDimensionNumbers | None:
        if p.group != "block_matrix":
            return None
        embed = p.axes.index("embed")
        others = tuple(i for i, a in enumerate(p.axes) if a != "embed" and a not in batch)
        if embed < others[0]:
            return MuonDimensionNumbers((embed,), others)
        return MuonDimensionNumbers(others, (embed,))

    return jax.tree.map(numbers, param_tree(config))


def _axes(numbers: MuonDimensionNumbers) -> list[tuple[int, ...]]:
    """Both sides of a matrix as tuples of axes."""
    return [a if isinstance(a, tuple) else (a,) for a in numbers]


def orthogonalize(x: jax.Array, numbers: MuonDimensionNumbers) -> jax.Array:
    """Each matrix U S V^T becomes about U V^T, by five Newton-Schulz steps.

    The singular values come to 0.68 to 1.21 where they were above 0.002 of the Frobenius norm; a
    zero matrix stays zero. Computed in at least float32.

    Args:
      x: matrices.
      numbers: their two sides; all other axes count matrices.

    Returns:
      An array like ``x``.
    """
    rows, columns = ([axis % x.ndim for axis in side] for side in _axes(numbers))
    batch = [i for i in range(x.ndim) if i not in (*rows, *columns)]
    order = (*batch, *rows, *columns)
    moved = sphere.promote(x).transpose(order)
    lengths = [x.shape[i] for i in batch]
    m = moved.reshape(*lengths, _size(x, rows), _size(x, columns))
    wide = m.shape[-2] <= m.shape[-1]
    m = m if wide else m.mT  # the products below are of the size of the smaller side
    m = sphere.normalize(m, (-2, -1))
    for _ in range(_STEPS):
        gram = m @ m.mT
        m = _A * m + (_B * gram + _C * gram @ gram) @ m
    m = m if wide else m.mT
    inverse = sorted(range(x.ndim), key=order.__getitem__)
    return m.reshape(moved.shape).transpose(inverse).astype(x.dtype)


def _size(x: jax.Array, axes: Iterable[int]) -> int:
    return math.prod(x.shape[axis] for axis in axes)


class ScaleByMuonState(NamedTuple):
    """The momentum m, like the parameters."""

    momentum: optax.Updates


def scale_by_muon(
    numbers: Any, momentum: float = 0.95, rms: float = 0.2
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum with look-ahead, made orthogonal, and scaled to a root mean square of ``rms``.

    .. math::

      m \leftarrow \beta m + (1 - \beta) g, \qquad
      u = \mathrm{rms} \sqrt{\max(a, b)} \; \mathrm{orthogonal}(\beta m + (1 - \beta) g)

    for matrices of shape a x b. An orthogonal matrix has min(a, b) singular values of 1, so the
    entries of u have the root mean square ``rms``; with 0.2 the learning rate of Adam serves
    (https://arxiv.org/abs/2502.16982). There is no bias correction: the size of m does not matter.

    Args:
      numbers: a tree of :class:`optax.contrib.MuonDimensionNumbers` like the updates. Leaves that
        are masked, see :func:`optax.partition`, pass through whatever stands there.
      momentum: :math:`\beta`.
      rms: of the updates.

    Returns:
      A transformation whose ``update`` takes ``ok``, True by default. Where it is False the state
      stays the same bit for bit, and the updates have no meaning.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optax.contrib import MuonDimensionNumbers
      >>> from ngpt_jax.optim.muon import scale_by_muon
      >>> params = {"kernel": jnp.ones((3, 4, 2))}  # layers, read, written
      >>> numbers = {"kernel": MuonDimensionNumbers((1,), (2,))}
      >>> tx = optax.chain(scale_by_muon(numbers), optax.scale_by_learning_rate(1e-2))
      >>> updates, state = tx.update(params, tx.init(params))
      >>> updates["kernel"].shape
      (3, 4, 2)

    References:
      Jordan, `modded-nanogpt <https://github.com/KellerJordan/modded-nanogpt>`_, 2024
    """

    def init_fn(params):
        return ScaleByMuonState(optax.tree.zeros_like(params))

    def direction(g, m, n):
        if is_absent(g):
            return g
        sides = [_size(g, side) for side in _axes(n)]
        ahead = momentum * m + (1 - momentum) * g
        return (rms * max(sides) ** 0.5 * orthogonalize(ahead, n)).astype(g.dtype)

    def step(gradients, state, params=None):
        del params
        new = optax.tree.update_moment(gradients, state.momentum, momentum, 1)
        return gradients, ScaleByMuonState(new)

    def updates_of(state, gradients):
        leaves, treedef = jax.tree.flatten(gradients, is_leaf=is_absent)
        trees = map(treedef.flatten_up_to, (state.momentum, numbers))
        return treedef.unflatten(map(direction, leaves, *trees))

    return keep_state_unless_ok(optax.GradientTransformation(init_fn, step), updates_of)
