"""What `diagnose` measures on one run: its checkpoint and text, and a table for each figure.

A table is a list of rows by column; layers count from 0, ``depth`` is layer / (layers - 1).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from ngpt_jax.checkpoint.restoring import restore
from ngpt_jax.config import Config, ConfigError
from ngpt_jax.data import pipeline
from ngpt_jax.data.corpus import Corpus, load_corpus
from ngpt_jax.data.tokenizers.load import with_tokenizer
from ngpt_jax.files import reason
from ngpt_jax.model import inspect as d
from ngpt_jax.optim import recipes
from ngpt_jax.parallel.backend import enable_x64_if_used
from ngpt_jax.parallel.mesh import make_mesh
from ngpt_jax.training import layout
from ngpt_jax.training.setup import make_dataset
from ngpt_jax.training.step import TrainState, make_train_step

Row = dict[str, Any]
_QUANTILES = 201  # of what is too much to list


class Opened(NamedTuple):
    """A run's checkpoint: ``label`` names it in tables, ``progress`` says where its data are."""

    label: str
    workdir: epath.Path
    config: Config
    state: TrainState
    progress: dict[str, Any]


def open_run(label: str, path: str, config: Config, checkpoint: epath.Path) -> Opened:
    """Reads a checkpoint onto the first device here."""
    enable_x64_if_used(config.model)
    mesh = make_mesh(config, jax.devices()[:1])
    config, _ = layout.for_mesh(config, mesh)
    like = layout.abstract_state(config, recipes.make_optimizer(config)[0], mesh)
    where = f"{checkpoint} is not of the model and optimizer in {path}/config.json"
    mend = "put the config.json of its run there"
    state, progress = restore(checkpoint, like._asdict(), where, mend)
    return Opened(label, epath.Path(path), config, like._replace(**state), progress)


def load_text(run: Opened) -> Corpus:
    """The run's own text; raises ConfigError where it is not here, or is another one."""
    try:
        config, tokenizer = with_tokenizer(run.config)
        if tokenizer.fingerprint != run.progress["tokenizer"]:
            raise ConfigError("the tokenizer here is not the one that the run was trained with.")
        corpus = load_corpus(config.data, tokenizer, config.model.context)
    except OSError as e:
        raise ConfigError(f"{e.filename or 'the text'} cannot be read: {reason(e)}.") from e
    if corpus.fingerprint != run.progress["data"]:
        raise ConfigError("the text here is not the one that the run was trained on.")
    return corpus


def _depth(run: Opened, layer: int) -> float:
    return layer / max(run.config.model.layers - 1, 1)


def _place(run: Opened, layer: int) -> Row:
    return {"layer": layer, "depth": _depth(run, layer)}


# ---------------------------------------------------------------------------- from parameters alone


def embeddings(run: Opened) -> list[Row]:
    """Rows' norms, eigenvalues of the covariance over their median, cosines of pairs of rows.

    Sorted; ``position`` goes from 0 to 1. Of the cosines, those of normalized rows, 201 quantiles.
    """
    rows: list[Row] = []
    for name, _, table in d.matrices(run.config.model, run.state.params):
        if name not in d.TABLES:
            break
        quantiles = np.quantile(d.pairwise_cosines(table), np.linspace(0, 1, _QUANTILES))
        measured = {
            "norm": np.sort(d.norms(table)),
            "eigenvalue_over_median": d.eigenvalues_over_median(table),
            "cosine": quantiles,
        }
        for quantity, values in measured.items():
            for position, value in zip(np.linspace(0, 1, len(values)), values):
                rows.append({"run": run.label, "table": name, "quantity": quantity,
                             "position": position, "value": value})  # fmt: skip
    return rows


def condition_numbers(run: Opened) -> list[Row]:
    """Of each head's matrix and the median over heads, of each matrix of the MLP.

    ``renormalized``: with every vector along embed made a unit vector; for free weights alone.
    """
    model, rows = run.config.model, list[Row]()
    for matrix in d.matrices(model, run.state.params):
        if matrix.layer is None:
            continue
        heads = d.head_matrices(model, matrix)
        found = d.condition_numbers(d.singular_values(heads))
        again: np.ndarray | None = None
        if model.weights == "free":
            again = d.condition_numbers(d.singular_values(d.unit(heads)))
        head = {"run": run.label, "matrix": matrix.name, **_place(run, matrix.layer)}
        summary = {"head": "median", "condition": np.median(found)}
        rows.append(head | summary | {"renormalized": None if again is None else np.median(again)})
        if matrix.name in d.HEAD_KERNELS:
            rows += [
                head | {"head": i, "condition": x, "renormalized": None if again is None else y}
                for i, (x, y) in enumerate(zip(found, found if again is None else again))
            ]
    return rows


def scales(run: Opened) -> list[Row]:
    """Mean over channels of each effective scale by layer, with quantiles; alphas are |alpha|."""
    rows: list[Row] = []
    for name, values in d.effective_scales(run.config.model, run.state.params).items():
        for layer, channel in enumerate(np.atleast_2d(values)):
            of_layer = name != "s_z"
            low, middle, high = np.quantile(channel, (0.1, 0.5, 0.9))
            rows.append({
                "run": run.label, "scale": name, "layer": layer if of_layer else None,
                "depth": _depth(run, layer) if of_layer else None, "mean": channel.mean(),
                "mean_abs": np.abs(channel).mean(), "p10": low, "p50": middle, "p90": high,
            })  # fmt: skip
    return rows


def scale_histograms(run: Opened) -> list[Row]:
    """Densities of each effective scale over channels by layer, of s_z over the vocabulary."""
    rows: list[Row] = []
    for name, values in d.effective_scales(run.config.model, run.state.params).items():
        bins = np.clip(np.sqrt(values.shape[-1]), 10, 40)
        edges = np.histogram_bin_edges(values, int(bins))
        for layer, channel in enumerate(np.atleast_2d(values)):
            density, _ = np.histogram(channel, edges, density=True)
            for left, right, value in zip(edges, edges[1:], density):
                rows.append({"run": run.label, "scale": name,
                             "layer": None if name == "s_z" else layer,
                             "from": left, "to": right, "density": value})  # fmt: skip
    return rows


def query_and_key(run: Opened, layers: Sequence[int]) -> list[Row]:
    """Of chosen layers: norms of the vectors along embed, and singular values of the heads.

    Sorted, falling; of singular values the median over heads, and the least and greatest.
    """
    model, rows = run.config.model, list[Row]()
    for matrix in d.matrices(model, run.state.params):
        if matrix.layer not in layers or matrix.name not in ("query_kernel", "key_kernel"):
            continue
        length = np.sort(d.norms(matrix.vectors))[::-1]
        singular = d.singular_values(d.head_matrices(model, matrix))
        measured = {
            "norm": (length, length, length),
            "singular_value": (np.median(singular, 0), singular.min(0), singular.max(0)),
        }
        condition = float(np.median(d.condition_numbers(singular)))
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


def held_out_windows(run: Opened, corpus: Corpus, windows: int) -> Iterator[dict[str, np.ndarray]]:
    """The first windows of the first held-out set, one at a time."""
    return pipeline.eval_batches(
        corpus.held_out[0], run.config.model.context, 1, windows, run.config.data.mask_documents
    )


def angles(run: Opened, corpus: Corpus, windows: int) -> list[Row]:
    """Degrees between h and each proposal, and between h before and after each step.

    Over the tokens of held-out text, by layer.
    """
    fn = jax.jit(functools.partial(d.block_angles, run.config.model))
    found: dict[str, list[np.ndarray]] = {name: [] for name in d.BLOCKS}
    for batch in held_out_windows(run, corpus, windows):
        real = batch["weights"] > 0
        for name, values in jax.device_get(fn(run.state.params, batch)).items():
            found[name].append(values[:, real])
    rows = []
    for name in d.BLOCKS:
        values = np.concatenate(found[name], axis=1).astype(np.float64)  # (layers, tokens, 2)
        for layer in range(run.config.model.layers):
            for i, quantity in enumerate(("proposal", "step")):
                x = values[layer, :, i]
                low, middle, high = np.quantile(x, (0.1, 0.5, 0.9))
                rows.append({
                    "run": run.label, "block": name, "quantity": quantity, **_place(run, layer),
                    "mean": x.mean(), "std": x.std(), "p10": low, "p50": middle, "p90": high,
                    "tokens": x.size,
                })  # fmt: skip
    return rows


def attention_entropy(run: Opened, corpus: Corpus, windows: int) -> list[Row]:
    """Mean over positions of each head's entropy: nats, and over the log of visible positions.

    The second mean is over positions that see more than themselves.
    """
    fn = jax.jit(functools.partial(d.attention_entropies, run.config.model))
    nats: Any = 0.0
    shares: Any = 0.0
    tokens = choices = 0
    for batch in held_out_windows(run, corpus, windows):
        entropies, seen = jax.device_get(fn(run.state.params, batch))
        real = batch["weights"] > 0
        several = real & (seen > 1)
        nats = nats + entropies[:, real].sum(1, dtype=np.float64)  # (layers, heads)
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


def next_batch(run: Opened, corpus: Corpus) -> dict[str, np.ndarray]:
    """The training batch that the run would see next."""
    batches = pipeline.train_batches(
        make_dataset(run.config, corpus), run.config.train.batch_size, run.progress["position"],
        threads=0, prefetch=1,
    )  # fmt: skip
    try:
        return next(batches)
    finally:
        batches.close()


def make_probe(config: Config) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """Jitted (state, batch, rate) -> parameters after the run's own step, gradients, if it was ok.

    It is the training step with its optimizer at a learning rate of choice; gradients are those of
    the mean loss before clipping. Spikes are not refused.
    """
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, spike_deviations=0.0)
    )

    def keep(updates, state, params=None, **extra):
        del state, params, extra
        return updates, updates

    first = optax.GradientTransformationExtraArgs(optax.init_empty_state, keep)

    def probe(state: TrainState, batch, rate):
        def schedule(step):
            return rate

        step = make_train_step(config, optax.chain(first, recipes.adam(config, schedule)), schedule)
        state = state._replace(opt_state=(optax.EmptyState(), state.opt_state))
        after, metrics = step(state, batch)
        return after.params, after.opt_state[0], metrics["skipped_in_row"] == 0

    return jax.jit(probe)


def rotation_and_gradient(run: Opened, corpus: Corpus) -> tuple[list[Row], list[Row]]:
    """How far one step turns each vector along embed, in degrees, and its gradient's parts.

    The step is the next one of the run, with its optimizer's moments: ``own`` at the rate that the
    schedule has for it, ``peak`` at optimizer.learning_rate, which also tells something where
    the schedule has come to 0, and compares checkpoints of different age. Quantiles over vectors.
    Radial is the part of the gradient along its vector, which a projection takes away again.

    Raises ConfigError where the step has no finite gradient.
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
    for w, a, p, g in zip(*(d.matrices(config.model, tree) for tree in trees)):
        head = {"run": run.label, "matrix": w.name}
        head |= {"layer": None, "depth": None} if w.layer is None else _place(run, w.layer)
        for which, rate, moved in (("own", own, a), ("peak", peak, p)):
            turned = d.angles_between(w.vectors, moved.vectors)
            low, middle, high = np.quantile(turned, (0.1, 0.5, 0.9))
            rotation.append(head | {"rate": which, "learning_rate": rate, "mean": turned.mean(),
                                    "p10": low, "p50": middle, "p90": high})  # fmt: skip
        parts = d.radial_and_tangential(w.vectors, g.vectors)
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
