"""Measures of a model's inside: matrices, embeddings, scales, angles, attention, steps.

Measures of parameters use numpy in float64, because float32 cannot tell a condition number of 1e7.
Measures of activations use jax in at least float32. Angles are in degrees, entropies in nats. Zero
vectors give finite numbers; only the condition number of a zero matrix is infinite. Equation
numbers are those of https://arxiv.org/abs/2410.01131.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ngpt_jax import sphere
from ngpt_jax.config import ModelConfig
from ngpt_jax.model.attention import softmax_scale
from ngpt_jax.model.params import TABLE, learned_scales, real_vocab
from ngpt_jax.model.transformer import Batch, Transformer

TABLES, HEAD_KERNELS, MLP_KERNELS = (
    tuple(p.name for p in TABLE.values() if p.is_matrix and axis in p.axes)
    for axis in ("vocab", "head_dim", "mlp")
)
BLOCKS = ("attention", "mlp")

_PAIRED_ROWS = 2048  # rows of a table at most, of which all pairs are compared


# ----------------------------------------------------------------------------------- parameters


class Matrix(NamedTuple):
    """A matrix as its vectors along embed, (n, embed) in float64; layer is None for tables."""

    name: str
    layer: int | None
    vectors: np.ndarray


def matrices(config: ModelConfig, params: Any, seen: np.ndarray | None = None) -> Iterator[Matrix]:
    """Yields both tables, then every matrix of every layer; one at a time is in memory.

    Args:
      config: of the model.
      params: parameters or a tree like them, such as gradients.
      seen: (vocab_size,) bool, the ids whose rows of the tables are wanted; None: all but the rows
        that pad the vocabulary.
    """
    for name in TABLES:
        axes = TABLE[name].axes
        rows = _vectors(real_vocab(params[name], axes, config), axes)
        yield Matrix(name, None, rows if seen is None else rows[seen])
    for name in HEAD_KERNELS + MLP_KERNELS:
        for layer, w in enumerate(params["layers"][name]):
            yield Matrix(name, layer, _vectors(w, TABLE[name].module_axes))


def _vectors(leaf: Any, axes: tuple[str, ...]) -> np.ndarray:
    array = np.asarray(leaf).astype(np.float64)
    return np.moveaxis(array, axes.index("embed"), -1).reshape(-1, array.shape[axes.index("embed")])


def norms(vectors: np.ndarray) -> np.ndarray:
    """Norms along the last axis."""
    return np.linalg.norm(vectors, axis=-1)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of norm 1 along the last axis; a zero vector stays zero."""
    length = norms(vectors)[..., None]
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)


def head_matrices(config: ModelConfig, matrix: Matrix) -> np.ndarray:
    """A matrix for each head (heads or kv_heads, head_dim, embed); in the MLP (1, mlp, embed)."""
    if matrix.name in HEAD_KERNELS:
        return matrix.vectors.reshape(-1, config.head_dim or 1, config.width)
    return matrix.vectors[None]


def singular_values(heads: np.ndarray) -> np.ndarray:
    """The singular values of each head's matrix, falling: (heads, min(head_dim, embed))."""
    return np.linalg.svd(heads, compute_uv=False)


def condition_numbers(singular: np.ndarray) -> np.ndarray:
    """Largest over smallest of falling singular values (..., n); inf for a singular matrix."""
    largest, smallest = singular[..., 0], singular[..., -1]
    out = np.full(largest.shape, np.inf)
    return np.divide(largest, smallest, out=out, where=smallest > 0)


def eigenvalues_over_median(table: np.ndarray) -> np.ndarray:
    """Eigenvalues of the covariance of the rows (n, embed), falling, divided by their median.

    A table of few rows has eigenvalues that are zero but for rounding. They are returned as 0, and
    the median is that of the others.
    """
    if len(table) < 2:
        return np.zeros(table.shape[1])
    values = np.linalg.eigvalsh(np.cov(table, rowvar=False).reshape(table.shape[1], -1))[::-1]
    values = np.where(values > 1e-12 * max(values[0], 0.0), values, 0.0)
    positive = values[values > 0]
    return values / np.median(positive) if positive.size else values


def pairwise_cosines(table: np.ndarray) -> np.ndarray:
    """Dot products of all pairs of normalized rows of a table (n, embed), rising.

    Of a table with more than 2048 rows, 2048 are drawn, the same each time.
    """
    if len(table) > _PAIRED_ROWS:
        rows = np.random.default_rng(0).choice(len(table), _PAIRED_ROWS, replace=False)
        table = table[np.sort(rows)]
    rows = unit(table)
    return np.sort((rows @ rows.T)[np.triu_indices(len(rows), 1)])


def effective_scales(config: ModelConfig, params: Any) -> dict[str, np.ndarray]:
    """Effective values (section 2.5) of the learned scales that a model has, by name.

    s_z is (vocab,), the others are (layers, n); a scalar has one channel. Alphas are the sizes of
    steps, as the model uses them.
    """

    def widen(stored: Any) -> np.ndarray:
        return np.asarray(stored).astype(np.float64)

    return {
        name: values.reshape(*(() if name == "s_z" else (config.layers,)), -1)
        for name, values in learned_scales(config, params, widen)
    }


# ------------------------------------------------------------------------- a step, its gradient


def angles_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Degrees between the vectors of a and b (..., embed), whatever their norms.

    Exact near 0. The result is 90 where one of the vectors is zero, and 0 where both are.
    """
    a, b = unit(a), unit(b)
    return np.degrees(2 * np.arctan2(norms(a - b), norms(a + b)))


class Parts(NamedTuple):
    """Parts (n,) of the gradients of n vectors w: the signed component along w, and the rest."""

    radial: np.ndarray
    tangential: np.ndarray

    def share(self) -> float:
        """The radial share of the squared norm over all vectors; 0 where the gradient is zero."""
        radial, tangential = (float(np.sum(np.square(x))) for x in self)
        return radial / (radial + tangential) if radial + tangential else 0.0

    def angles(self) -> np.ndarray:
        """Degrees from w to its gradient, 90 for a tangent one; zero gradients are left out."""
        some = (self.radial != 0) | (self.tangential != 0)
        return np.degrees(np.arctan2(self.tangential, self.radial))[some]


def radial_and_tangential(w: np.ndarray, gradient: np.ndarray) -> Parts:
    """Splits a gradient (n, embed) into its parts along the vectors w (n, embed) and the rest.

    The gradient of a zero vector counts as tangential.
    """
    direction = unit(w)
    radial = np.sum(direction * gradient, axis=-1)
    return Parts(radial, norms(gradient - radial[:, None] * direction))


# ---------------------------------------------------------------------------------- activations


def _forward(config: ModelConfig, params: Any, batch: Batch, *collections: str) -> Any:
    _, sown = Transformer(config).apply(
        {"params": params}, batch["inputs"], batch.get("segment_ids"), batch.get("positions"),
        method="hidden_and_table", mutable=list(collections),
    )  # fmt: skip
    return sown


def block_angles(config: ModelConfig, params: Any, batch: Batch) -> dict[str, jax.Array]:
    """How far each branch of a block proposes to turn h, and how far it turns h.

    Args:
      batch: inputs (B, T) int32, and segment_ids and positions where the model uses them.

    Returns:
      "attention" and "mlp": (layers, B, T, 2) degrees in at least float32. [..., 0] is the angle
      between h and the branch's output (h_A and h_M of equations 10 and 11), [..., 1] is that
      between h before and after the step. Norms of the vectors do not matter.
    """
    sown = _forward(config, params, batch, "angles")["angles"]["layers"]
    return {name: jnp.degrees(sown[name][0]) for name in BLOCKS}


def entropy(
    query: jax.Array,
    key: jax.Array,
    scale: float,
    segment_ids: jax.Array | None = None,
    block: int = 128,
) -> tuple[jax.Array, jax.Array]:
    """Entropy of the distributions of causal attention, in nats.

    The scores of ``block`` queries are in memory at one time.

    Args:
      query: (B, T, heads, head_dim).
      key: (B, T, kv_heads, head_dim), each for heads / kv_heads neighbouring query heads.
      scale: of q k^T.
      segment_ids: (B, T); a position sees its own segment only. None: no segments.

    Returns:
      Entropies (B, T, heads) in at least float32, and the number of positions that each position
      sees, itself included, (B, T) int32. The largest possible entropy is the log of this number.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads, block = key.shape[2], min(block, length)
    count = -(-length // block)
    rest = ((0, 0), (0, count * block - length))
    # (count, B, block, ...), so that the loop goes over the first axis.
    queries = jnp.pad(sphere.promote(query), (*rest, (0, 0), (0, 0)))
    queries = queries.reshape(batch, count, block, kv_heads, heads // kv_heads, head_dim)
    segments = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else segment_ids
    own = jnp.pad(segments, rest, mode="edge").reshape(batch, count, block)
    keys = sphere.promote(key)

    def of_block(inputs):
        start, q, own = inputs
        rows = jnp.minimum(start + jnp.arange(block), length - 1)
        mask = (jnp.arange(length) <= rows[:, None]) & (own[..., None] == segments[:, None])
        scores = scale * jnp.einsum("bqkgd,btkd->bqkgt", q, keys, precision="highest")
        mask_ = mask[:, :, None, None]
        log_p = jax.nn.log_softmax(jnp.where(mask_, scores, -jnp.inf), axis=-1)
        terms = jnp.where(mask_, jnp.exp(log_p) * jnp.where(mask_, log_p, 0), 0)
        return -jnp.sum(terms, axis=-1), jnp.sum(mask, axis=-1, dtype=jnp.int32)

    blocks = jnp.arange(count) * block, jnp.moveaxis(queries, 1, 0), jnp.moveaxis(own, 1, 0)
    nats, seen = (jnp.moveaxis(x, 0, 1) for x in jax.lax.map(of_block, blocks))
    nats = nats.reshape(batch, count * block, heads)[:, :length]
    return jnp.maximum(nats, 0), seen.reshape(batch, count * block)[:, :length]


def attention_entropies(
    config: ModelConfig, params: Any, batch: Batch, block: int = 128
) -> tuple[jax.Array, jax.Array]:
    """Entropy of every head's attention at every position, in nats.

    Args:
      batch: as in :func:`block_angles`.
      block: queries of one layer whose scores are in memory at one time.

    Returns:
      Entropies (layers, B, T, heads), and the number of positions that each position sees, (B, T).
    """
    sown = _forward(config, params, batch, "intermediates")["intermediates"]["layers"]

    def of_layer(query_and_key):  # as attention reads them, with s_qk in the keys
        return entropy(*query_and_key, softmax_scale(config), batch.get("segment_ids"), block)

    nats, seen = jax.lax.map(of_layer, (sown["query"][0], sown["key"][0]))
    return nats, seen[0]


# ------------------------------------------------------------------------------ during training


def summarize(config: ModelConfig, params: Any, batch: Batch) -> dict[str, jax.Array]:
    """Scalars that are logged with every evaluation; they cost one forward pass.

    Returns:
      angle_attention, angle_mlp: degrees between h and the output of each branch; step_attention,
      step_mlp: degrees between h before and after each step. All four are means over layers and
      the batch's targets, with their weights.
      cosine_input_embedding, cosine_output_embedding: the mean cosine of two rows.
      norm_spread_input_embedding, norm_spread_output_embedding, with ``weights=free``: standard
      deviation over mean of the rows' norms.
    """
    out: dict[str, jax.Array] = {}
    weights = batch.get("weights", jnp.ones(batch["inputs"].shape, jnp.float32))
    total = config.layers * jnp.maximum(jnp.sum(weights), 1)
    for name, angles in block_angles(config, params, batch).items():
        angle, step = (jnp.sum(angles[..., i] * weights) / total for i in (0, 1))
        out |= {f"angle_{name}": angle, f"step_{name}": step}
    for name in TABLES:
        # A mask instead of a slice, because the table's rows may be sharded over devices.
        n = config.vocab_size
        assert n is not None
        table = sphere.promote(params[name])
        real = jnp.arange(table.shape[0]) < n
        mean = jnp.sum(jnp.where(real[:, None], sphere.normalize(table), 0), axis=0) / n
        # |sum of n unit vectors|^2 = n + the sum over ordered pairs.
        pairs = max(n - 1, 1)
        out[f"cosine_{name}"] = (n * jnp.sum(jnp.square(mean)) - 1) / pairs
        if config.weights == "free":
            length = sphere.safe_norm(table)
            average = jnp.sum(jnp.where(real, length, 0)) / n
            variance = jnp.sum(jnp.where(real, jnp.square(length - average), 0)) / n
            spread = jnp.sqrt(variance) / jnp.where(average > 0, average, 1)
            out[f"norm_spread_{name}"] = spread
    return out
