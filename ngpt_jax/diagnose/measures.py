"""What is measured on one run: a table for each figure, a list of rows by column.

Layers count from 0; ``depth`` is layer / (layers - 1).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ngpt_jax.config import Config, ConfigError
from ngpt_jax.data.corpus import Corpus
from ngpt_jax.diagnose.run_state import RunState, held_out_sequences, next_batch
from ngpt_jax.model import inspect
from ngpt_jax.optim import recipes
from ngpt_jax.training.step import TrainState, make_train_step

Row = dict[str, Any]
_QUANTILES = 201  # of a distribution with too many values to list


def _place(run: RunState, layer: int | None) -> Row:
    """The columns for a layer, None for what is in no layer."""
    depth = None if layer is None else layer / max(run.config.model.layers - 1, 1)
    return {"layer": layer, "depth": depth}


def _deciles(values: np.ndarray) -> Row:
    return dict(zip(("p10", "p50", "p90"), np.quantile(values, (0.1, 0.5, 0.9))))


# ---------------------------------------------------------------------------- from parameters alone


def embeddings(run: RunState, seen: np.ndarray | None) -> list[Row]:
    """For both tables: norms of rows, eigenvalues of their covariance, cosines of pairs of rows.

    Eigenvalues are divided by their median. Values are sorted and ``position`` goes from 0 to 1;
    the cosines are given as 201 quantiles. Rows of ids that are not ``seen`` are left out; None:
    the text is not known.
    """
    rows: list[Row] = []
    left_out = None if seen is None else int(np.sum(~seen))
    for name, _, table in inspect.matrices(run.config.model, run.state.params, seen):
        if name not in inspect.TABLES:
            break
        quantiles = np.quantile(inspect.pairwise_cosines(table), np.linspace(0, 1, _QUANTILES))
        measured = {
            "norm": np.sort(inspect.norms(table)),
            "eigenvalue_over_median": inspect.eigenvalues_over_median(table),
            "cosine": quantiles,
        }
        for quantity, values in measured.items():
            for position, value in zip(np.linspace(0, 1, len(values)), values):
                rows.append({"run": run.label, "table": name, "quantity": quantity,
                             "position": position, "value": value,
                             "ids_left_out": left_out})  # fmt: skip
    return rows


def condition_numbers(run: RunState) -> list[Row]:
    """For each matrix of each layer: a row with the median over heads, and a row a head.

    The MLP's matrices count as one head. ``renormalized`` is the condition number with every vector
    along embed made a unit vector, for models whose weights are free; else None.
    """
    model, rows = run.config.model, list[Row]()
    for matrix in inspect.matrices(model, run.state.params):
        if matrix.layer is None:
            continue
        heads = inspect.head_matrices(model, matrix)
        found = inspect.condition_numbers(inspect.singular_values(heads))
        again: Any = [None] * len(found)
        middle: Any = None
        if model.weights == "free":
            again = inspect.condition_numbers(inspect.singular_values(inspect.unit(heads)))
            middle = np.median(again)
        head = {"run": run.label, "matrix": matrix.name, **_place(run, matrix.layer)}
        summary = {"head": "median", "condition": np.median(found), "renormalized": middle}
        rows.append(head | summary)
        if matrix.name in inspect.HEAD_KERNELS:
            for i, (x, y) in enumerate(zip(found, again)):
                rows.append(head | {"head": i, "condition": x, "renormalized": y})
    return rows


def scales(run: RunState) -> list[Row]:
    """For each learned scale and layer: mean and quantiles over channels of effective values.

    Alphas are the sizes of steps: |alpha| unless the model gives them a sign.
    """
    rows: list[Row] = []
    for name, values in inspect.effective_scales(run.config.model, run.state.params).items():
        for layer, channel in enumerate(np.atleast_2d(values)):
            rows.append({
                "run": run.label, "scale": name, **_place(run, None if name == "s_z" else layer),
                "mean": channel.mean(), "mean_abs": np.abs(channel).mean(), **_deciles(channel),
            })  # fmt: skip
    return rows


def scale_histograms(run: RunState) -> list[Row]:
    """For each effective scale and layer: density over channels, for s_z over the vocabulary."""
    rows: list[Row] = []
    for name, values in inspect.effective_scales(run.config.model, run.state.params).items():
        bins = np.clip(np.sqrt(values.shape[-1]), 10, 40)
        edges = np.histogram_bin_edges(values, int(bins))
        for layer, channel in enumerate(np.atleast_2d(values)):
            density, _ = np.histogram(channel, edges, density=True)
            for left, right, value in zip(edges, edges[1:], density):
                rows.append({"run": run.label, "scale": name,
                             "layer": None if name == "s_z" else layer,
                             "from": left, "to": right, "density": value})  # fmt: skip
    return rows


def query_and_key(run: RunState, layers: Sequence[int]) -> list[Row]:
    """For chosen layers: norms of the vectors along embed, and singular values of the heads.

    Values fall. Singular values are medians over heads, with the least and the greatest.
    """
    model, rows = run.config.model, list[Row]()
    for matrix in inspect.matrices(model, run.state.params):
        if matrix.layer not in layers or matrix.name not in ("query_kernel", "key_kernel"):
            continue
        length = np.sort(inspect.norms(matrix.vectors))[::-1]
        singular = inspect.singular_values(inspect.head_matrices(model, matrix))
        measured = {
            "norm": (length, length, length),
            "singular_value": (np.median(singular, 0), singular.min(0), singular.max(0)),
        }
        condition = float(np.median(inspect.condition_numbers(singular)))
        for quantity, values in measured.items():
            places = np.linspace(0, 1, len(values[0]))
            for position, middle, least, greatest in zip(places, *values):
                rows.append({
                    "run": run.label, "layer": matrix.layer, "matrix": matrix.name,
                    "quantity": quantity, "position": position, "value": middle,
                    "least": least, "greatest": greatest, "median_condition": condition,
                })  # fmt: skip
    return rows


# ------------------------------------------------------------------------------- from held-out text


def angles(run: RunState, corpus: Corpus, sequences: int) -> list[Row]:
    """For each layer: degrees between h and each proposal, and between h before and after it.

    Means and quantiles are over the tokens of ``sequences`` held-out sequences.
    """
    fn = jax.jit(functools.partial(inspect.block_angles, run.config.model))
    found: dict[str, list[np.ndarray]] = {name: [] for name in inspect.BLOCKS}
    for batch in held_out_sequences(run, corpus, sequences):
        real = batch["weights"] > 0
        for name, values in jax.device_get(fn(run.state.params, batch)).items():
            found[name].append(values[:, real])
    rows = []
    for name in inspect.BLOCKS:
        values = np.concatenate(found[name], axis=1).astype(np.float64)  # (layers, tokens, 2)
        for layer in range(run.config.model.layers):
            for i, quantity in enumerate(("proposal", "step")):
                x = values[layer, :, i]
                rows.append({
                    "run": run.label, "block": name, "quantity": quantity, **_place(run, layer),
                    "mean": x.mean(), "std": x.std(), **_deciles(x), "tokens": x.size,
                })  # fmt: skip
    return rows


def attention_entropy(run: RunState, corpus: Corpus, sequences: int) -> list[Row]:
    """For each head: mean over positions of its entropy, in nats and ``normalized``.

    The latter is divided by the log of the number of visible positions; its mean is over positions
    that see more than themselves.
    """
    fn = jax.jit(functools.partial(inspect.attention_entropies, run.config.model))
    nats: Any = 0.0  # sums of shape (layers, heads)
    shares: Any = 0.0
    tokens = choices = 0
    for batch in held_out_sequences(run, corpus, sequences):
        entropies, seen = jax.device_get(fn(run.state.params, batch))
        real = batch["weights"] > 0
        several = real & (seen > 1)
        nats = nats + entropies[:, real].sum(1, dtype=np.float64)
        share = entropies[:, several] / np.log(seen[several])[:, None]
        shares = shares + share.sum(1, dtype=np.float64)
        tokens, choices = tokens + int(real.sum()), choices + int(several.sum())
    return [
        {"run": run.label, **_place(run, layer), "head": head,
         "nats": nats[layer, head] / tokens, "normalized": shares[layer, head] / max(choices, 1),
         "tokens": tokens}
        for layer in range(run.config.model.layers) for head in range(run.config.model.heads)
    ]  # fmt: skip


# ----------------------------------------------------------------------------- from a step's batch


def make_probe(config: Config) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """A jitted function (state, batch, rate) -> (parameters, gradients, ok).

    The parameters are those after the run's own training step with the constant learning rate
    ``rate``; spikes are not refused. The gradients are those of the mean loss, before clipping. The
    step was ok if loss and gradients were finite.
    """

    def keep(updates, *_, **__):
        return updates, updates

    first = optax.GradientTransformationExtraArgs(optax.init_empty_state, keep)

    def probe(state: TrainState, batch, rate):
        optimizer = dataclasses.replace(
            config.optimizer, schedule="constant", warmup_steps=0, learning_rate=rate
        )
        train = dataclasses.replace(config.train, spike_deviations=0.0)
        constant = dataclasses.replace(config, optimizer=optimizer, train=train)
        tx, schedule = recipes.make_optimizer(constant)
        step = make_train_step(constant, optax.chain(first, tx), schedule)
        state = state._replace(opt_state=(optax.EmptyState(), state.opt_state))
        after, metrics = step(state, batch)
        return after.params, after.opt_state[0], metrics["skipped_in_row"] == 0

    return jax.jit(probe)


def rotation_and_gradient(
    run: RunState, corpus: Corpus, seen: np.ndarray
) -> tuple[list[Row], list[Row]]:
    """Degrees by which one step turns each vector along embed, and the parts of its gradient.

    The step is the next one of the run, with its optimizer's moments, at two learning rates:
    ``own`` is that which the schedule has for it, ``peak`` is optimizer.learning_rate. The latter
    also tells something where the schedule has come to 0, and makes checkpoints of different age
    comparable. Quantiles are over vectors. The radial part of a gradient is the one along its
    vector, which a projection removes. Of the tables, the rows of the ``seen`` ids count.

    Returns:
      Rows about the rotation, and about the gradient. Raises ConfigError where the step has no
      finite loss or gradient.
    """
    config, state = run.config, run.state
    _, schedule = recipes.make_optimizer(config)
    batch, probe = next_batch(run, corpus), make_probe(config)
    own, peak = float(schedule(state.step)), config.optimizer.learning_rate
    after_own, _, _ = probe(state, batch, jnp.asarray(own))
    after_peak, gradients, ok = probe(state, batch, jnp.asarray(peak))
    if not bool(ok):
        raise ConfigError("the next step has no finite loss or gradient.")
    rotation, gradient = list[Row](), list[Row]()
    trees = (state.params, after_own, after_peak, gradients)
    for w, a, p, g in zip(*(inspect.matrices(config.model, tree, seen) for tree in trees)):
        head = {"run": run.label, "matrix": w.name, **_place(run, w.layer)}
        for which, rate, moved in (("own", own, a), ("peak", peak, p)):
            turned = inspect.angles_between(w.vectors, moved.vectors)
            rotation.append(head | {
                "rate": which, "learning_rate": rate, "mean": turned.mean(), **_deciles(turned),
            })  # fmt: skip
        parts = inspect.radial_and_tangential(w.vectors, g.vectors)
        off = parts.angles()
        gradient.append(head | {
            "radial_share": parts.share(),
            "radial_norm": np.linalg.norm(parts.radial),
            "tangential_norm": np.linalg.norm(parts.tangential),
            "mean_angle": off.mean() if off.size else None,
            "mean_abs_cosine": np.abs(np.cos(np.radians(off))).mean() if off.size else None,
            "vectors_with_gradient": off.size,
        })  # fmt: skip
    return rotation, gradient
