"""Decoding with a cache, folded weights, sampling, and the model that ngpt_jax.load gives."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_golden import load as load_golden

import ngpt_jax
from ngpt_jax.aot.hlo_text import parse
from ngpt_jax.aot.hlo_traffic import moved as bytes_moved
from ngpt_jax.config import ConfigError
from ngpt_jax.data.tokenizers.base import ByteTokenizer
from ngpt_jax.decoding import folding
from ngpt_jax.decoding.cache import Slots, empty_cache
from ngpt_jax.decoding.forward import tables_of
from ngpt_jax.decoding.prefill import prefill, read_prompts
from ngpt_jax.decoding.rows import inverse_norm, row_max, square_norm
from ngpt_jax.decoding.sampling import Sampling, draw, filter_logits
from ngpt_jax.decoding.step import decode, read_next
from ngpt_jax.inference import opening
from ngpt_jax.inference.loading import LoadedModel
from ngpt_jax.inference.text import Streamed, TextStream
from ngpt_jax.model import folding as folding_lib
from ngpt_jax.model import norms
from ngpt_jax.model.params import FOLDED_MARK, param_tree, unit_axes
from ngpt_jax.model.transformer import Transformer, init_params, output_logits
from ngpt_jax.optim.recipes import make_optimizer
from ngpt_jax.projection import keep_params_on_sphere, project_params
from ngpt_jax.training import loop

GREEDY = Sampling(temperature=0.0)


def moved(config, seed=1):
    """Parameters whose scales have left their start, so that leaving one out shows."""
    params = init_params(config, jax.random.key(0))
    rng = np.random.default_rng(seed)

    def move(path, w):
        name = path[-1].key
        if name.startswith(("s_", "alpha")) or "norm" in name:
            return w * rng.uniform(0.5, 2.0, w.shape) * rng.choice([-1.0, 1.0], w.shape)
        return w if config.weights == "sphere" else 5 * w

    params = jax.tree_util.tree_map_with_path(move, params)
    if "s_z" in params:
        params["s_z"] = 20 * params["s_z"]  # a trained model's mean s_z exceeds 10
    if config.weights == "sphere":
        params["input_embedding"] = 1.3 * params["input_embedding"]  # off the sphere
    return jax.tree.map(lambda w: jnp.asarray(w, config.param_dtype), params)


def logits_of(config, params, tokens):
    return jax.jit(lambda p, t: Transformer(config).apply({"params": p}, t))(params, tokens)


def decoded_logits(config, params, tokens, cut, pieces):
    """Logits of every token by prefill and decoding; row b begins at cut[b]."""
    weights, folded = folding.for_inference(config, params), folding_lib.folded_config(config)
    first = jnp.asarray(cut)

    @jax.jit
    def start(tokens, caches):
        return read_prompts(config, weights, tokens, first, caches)

    @jax.jit
    def go_on(tokens, caches, end):
        tables = tables_of(config, end + jnp.arange(tokens.shape[1]), first)
        return read_next(config, weights, tokens, caches, Slots(first, end), tables)

    caches = empty_cache(folded, *tokens.shape)
    out, place = [], 0
    for size in pieces:
        some = tokens[:, place:][:, :size]
        h, caches = go_on(some, caches, place) if place else start(some, caches)
        place += size
        out.append(output_logits(folded, h, weights["output_embedding"]))
    return np.concatenate(out, axis=1)


def check_decoding(config, params, x, bound, pieces=(8, 3)):
    """Rows of x of different lengths, read in pieces of several sizes; the logits of x at once."""
    length = x.shape[1]
    cut = np.array([0, 5, 3, 1][: len(x)])
    tokens = np.zeros(x.shape, np.int32)
    for row, source, c in zip(tokens, x, cut):
        row[c:] = source[: length - c]
    full = np.asarray(logits_of(config, params, x))
    real = np.isfinite(full)
    most = np.abs(full[real]).max()
    pieces = [*pieces, *[1] * (length - sum(pieces))]
    got = decoded_logits(config, params, tokens, cut, pieces)
    for b, c in enumerate(cut):
        keep = real[b, : length - c]
        assert np.abs(got[b, c:][keep] - full[b, : length - c][keep]).max() < bound * most
    return full


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_decoding_gives_the_full_forward_pass_on_golden_weights(tiny, kind):
    config, golden, params = load_golden(tiny, kind, "pert", dtype="float32")
    x = golden["x"].astype(np.int32)
    logits = check_decoding(config.model, params, x, 1e-5)
    assert np.abs(logits[np.isfinite(logits)]).max() > 3
    check_decoding(config.model, params, x[:1], 1e-5)  # one row is laid out as a vector
    check_decoding(dataclasses.replace(config.model, dtype="bfloat16"), params, x, 0.03)


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_a_token_is_few_kernels_that_read_weights_and_cache_once(tiny, kind):
    config = tiny(**{
        "model.kind": kind, "model.layers": 4, "model.width": 256, "model.heads": 4,
        "model.vocab_size": 8192,
    }).model  # fmt: skip
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    weights = jax.eval_shape(lambda p: folding.for_inference(config, p), params)
    tokens, first = np.zeros((1, 512), np.int32), np.zeros(1, np.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    start = functools.partial(prefill, config, num_slots=768)
    decoder = jax.eval_shape(lambda w, k: start(w, tokens, first, keys=k), weights, keys)
    text = decode.lower(config, weights, decoder, 16, GREEDY, -1).compile().as_text()
    (loop,) = [i for i in parse(text).entry.instructions.values() if i.opcode == "while"]
    (body,), (condition,) = loop.called("body"), loop.called("condition")
    step = [*body.instructions.values(), *condition.instructions.values()]
    kernels = sum(bytes_moved(i) > 0 for i in step)
    assert kernels <= 125, kernels
    del weights["input_embedding"]  # of which a row is read
    least = sum(math.prod(x.shape) * x.dtype.itemsize
                for x in jax.tree.leaves((weights, decoder.caches)))  # fmt: skip
    assert sum(map(bytes_moved, step)) < 1.05 * least


@pytest.mark.parametrize("size", [1, 37, 768, 37 * 64])
def test_sums_and_maxima_by_parts(x64, size):
    x = np.random.default_rng(0).standard_normal((3, size))
    np.testing.assert_allclose(square_norm(x)[:, 0], (x * x).sum(-1), rtol=1e-13)
    np.testing.assert_array_equal(row_max(jnp.asarray(x))[:, 0], x.max(-1))
    np.testing.assert_allclose(inverse_norm(x) * x, norms.unit(jnp.asarray(x)), rtol=1e-13)
    lowest = row_max(jnp.full((3, size), -jnp.inf))
    assert np.all(np.isfinite(lowest)) and np.all(np.exp(-np.inf - lowest) == 0)
    for extreme in (0.0, 1e-30, 1e30):  # squares under- and overflow
        y = jnp.asarray(extreme * x, jnp.float32)
        assert np.all(np.isfinite(inverse_norm(y) * y))


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "ngpt", "kv_heads": 2, "head_dim": 6},
        {"kind": "gpt", "kv_heads": 1},
        {"kind": "gpt", "qk_norm": True},
        {"kind": "ngpt", "normalize_on_read": True, "qk_norm": False},
    ],
    ids=lambda fields: " ".join(f"{k}={v}" for k, v in fields.items()),
)
def test_decoding_with_grouped_queries_and_other_shapes(tiny, x64, fields):
    fields = {f"model.{name}": value for name, value in fields.items()}
    config = tiny(**{
        "model.width": 32, "model.heads": 4, "model.context": 24, "model.dtype": "float64",
        "model.param_dtype": "float64", **fields,
    }).model  # fmt: skip
    x = np.random.default_rng(0).integers(0, 60, (3, 24), np.int32)
    check_decoding(config, moved(config), x, 1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folded_weights_give_the_logits_of_raw_ones(tiny, dtype):
    config, golden, params = load_golden(tiny, "ngpt", "pert", dtype="float32")
    config = dataclasses.replace(config.model, dtype=dtype)
    folded, weights = folding_lib.folded_config(config), folding_lib.fold(config, params)
    assert jax.tree.structure(weights) == jax.tree.structure(param_tree(folded))
    x = golden["x"].astype(np.int32)
    raw, own = logits_of(config, params, x)[..., :97], logits_of(folded, weights, x)[..., :97]
    most = np.abs(golden["logits"]).max()
    assert np.abs(raw - own).max() < (1e-5 if dtype == "float32" else 0.05) * most
    if dtype == "float32":
        assert np.abs(own - golden["logits"]).max() < 2e-5


def test_folded_weights_are_refused_by_training_and_projection(tiny):
    config = tiny()
    model = folding_lib.folded_config(config.model)
    weights = folding_lib.fold(config.model, init_params(config.model, jax.random.key(0)))
    assert FOLDED_MARK in weights["layers"]
    axes = unit_axes(config.model)  # the projection takes them for trees like the raw one alone
    for project in (functools.partial(project_params, axes=axes), keep_params_on_sphere(axes).init):
        with pytest.raises(ValueError, match=r"axes must have the structure of params.*'s_z'"):
            project(weights)
    for refused in (
        lambda: make_optimizer(dataclasses.replace(config, model=model)),
        lambda: init_params(model, jax.random.key(0)),
        lambda: unit_axes(model),
        lambda: folding_lib.fold(model, weights),
    ):
        with pytest.raises(ConfigError, match=r"model\.folded: .* train from the raw ones"):
            refused()
    for fields in ({"model.kind": "gpt"}, {"model.normalize_on_read": True}):
        with pytest.raises(ConfigError, match=r"model\.folded needs scales to fold"):
            tiny(**{"model.folded": True, **fields})


# --------------------------------------------------------------------------------- sampling


def test_filters_keep_what_they_say():
    probs = np.array([0.4, 0.1, 0.3, 0.05, 0.15])
    logits = jnp.log(jnp.asarray(probs))[None]

    def kept(**how):
        return np.flatnonzero(np.isfinite(filter_logits(logits, Sampling(**how))[0])).tolist()

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [0, 2]
    assert kept(top_k=99) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.01) == kept(top_p=1e-38) == [0]
    assert kept(top_p=0.69) == [0, 2]
    assert kept(top_p=0.75) == [0, 2, 4]
    assert kept(min_p=0.3) == [0, 2, 4]
    assert kept(min_p=0.3, top_k=2) == [0, 2]
    # At temperature 0.5 probabilities are squared, 0.16 0.01 0.09 ...: the filters see those.
    assert kept(temperature=0.5, min_p=0.3) == [0, 2]
    # What top_k left is renormalized: 0.4 and 0.3 become 0.57 and 0.43.
    assert kept(top_k=2, top_p=0.55) == [0]


def test_draws_follow_the_distribution():
    probs = np.array([0.5, 0.2, 0.3])
    logits = jnp.tile(jnp.log(jnp.asarray(probs)), (20000, 1))
    keys = jax.random.split(jax.random.key(0), 20000)
    drawn = np.asarray(draw(logits, Sampling(), keys))
    assert np.abs(np.bincount(drawn) / 20000 - probs).max() < 0.015
    drawn = np.asarray(draw(logits, Sampling(top_k=2), keys))
    assert np.abs(np.bincount(drawn) / 20000 - [0.625, 0, 0.375]).max() < 0.015
    for how in (GREEDY, Sampling(temperature=1e-38)):
        assert np.all(np.asarray(draw(logits, how, keys)) == 0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -1}, "temperature must"),
        ({"temperature": float("nan")}, "temperature must"),
        ({"top_k": -1}, "top_k must not be negative"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"min_p": 1.0}, r"min_p must lie in \[0, 1\)"),
        ({"tokens": 0}, "tokens must be positive"),
        ({"stop": ["x", ""]}, "A stop string is empty"),
        ({"seed": 2**32}, "seed must be a whole number from 0 to 4294967295, got 4294967296"),
        ({"seed": -1}, "seed must be a whole number from 0 to"),
        ({"seed": 3.5}, "seed must be a whole number from 0 to 4294967295, got 3.5"),
        ({"seed": None}, "seed must be a whole number from 0 to"),
        ({"context": 0}, "and the context 0: no room"),
        ({"tokens": 2**31, "context": 2**32}, r"A text of 2\^31 tokens does not fit"),
        ({"context": 8}, r"A prompt has 9 tokens, and the context 8: no room for more\. Cut it,"),
    ],
)
def test_values_out_of_range_are_refused(model, how, message):
    with pytest.raises(ConfigError, match=message):
        model.generate("8 bytes.", **how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"prompts": None}, "prompts must be a text, token ids, or a list of them, got None"),
        ({"prompts": 5}, "prompts must be a text"),
        ({"prompts": np.int32(5)}, "prompts must be a text"),
        ({"prompts": b"bytes"}, "prompts must be a text"),
        ({"prompts": {"a": 1}}, "prompts must be a text"),
        ({"prompts": ["a", None]}, "prompts must be a text"),
        ({"prompts": [256, "a"]}, "prompts: a token id must be a whole number, got 'a'"),
        ({"prompts": [256, 1.0]}, r"prompts: a token id must be a whole number, got 1\.0 \(float"),
        ({"prompts": [True, 65]}, "prompts: a token id must be a whole number, got True"),
        ({"prompts": [[256, [65]]]}, "prompts: a token id must be a whole number"),
        (
            {"prompts": np.array([256.0])},
            r"prompts: a token id must be a whole number, got 256\.0 \(",
        ),
        (
            {"prompts": np.array([True])},
            r"prompts: a token id must be a whole number, got True \(b",
        ),
        ({"prompts": np.zeros((1, 1, 2), int)}, "prompts: a token id must be a whole number"),
        ({"prompts": np.zeros((2, 0), int)}, "A prompt has no tokens"),
        ({"prompts": np.array([256, 65.5], object)}, "prompts: a token id must be a whole number"),
        ({"prompts": [-1]}, "A prompt holds the token id -1"),
        ({"prompts": [2**70]}, "A prompt holds the token id"),
        ({"tokens": 4.5}, r"tokens must be a whole number, got 4\.5 \(float\)"),
        ({"tokens": True}, "tokens must be a whole number, got True"),
        ({"tokens": None}, "tokens must be a whole number"),
        ({"top_k": 2.5}, "top_k must be a whole number"),
        ({"top_k": "3"}, "top_k must be a whole number"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": None}, "temperature must be a number"),
        ({"temperature": np.ones(2)}, "temperature must be a number"),
        ({"temperature": True}, "temperature must be a number"),
        ({"temperature": 1e300}, r"temperature must be a number from 0 to 1e\+30, got 1e\+300"),
        ({"temperature": 10**400}, "temperature must be a number"),
        ({"top_p": 1j}, "top_p must be a number"),
        ({"min_p": [0.1]}, "min_p must be a number"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": np.True_}, "seed must be a whole number"),
        ({"seed": np.uint64(2**33)}, "seed must be a whole number from 0 to 4294967295, got"),
        ({"stop": 5}, r"stop must be a text or a list of texts, got 5 \(int\)"),
        ({"stop": b"x"}, "stop must be a text or a list of texts"),
        ({"stop": ["a", None]}, "stop must be a text or a list of texts, got None"),
        ({"context": 9.5}, "context must be a whole number"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused(model, how, message):
    prompts = how.get("prompts", "a")
    rest = {name: value for name, value in how.items() if name != "prompts"}
    with pytest.raises(ConfigError, match=message) as caught:
        model.generate(prompts, **rest)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="^prompt|A prompt" if "prompts" in how else message):
        model.stream(prompts, **rest)  # at once, before the first piece
    if not rest:
        with pytest.raises(ConfigError, match="^texts|A prompt"):
            model.logprobs(prompts)


def test_numbers_of_numpy_and_jax_are_numbers(model):
    plain = model.generate("a", 3, seed=1, top_k=4, temperature=0.5)
    for of in (np.int64, jnp.int32):
        how = {"seed": np.int64(1), "top_k": of(4), "temperature": of(1) / 2, "top_p": of(1)}
        assert model.generate("a", of(3), stop=None, **how) == plain
    for ids in (np.array([256, 97]), jnp.array([256, 97]), (256, 97), [jnp.int32(256), 97],
                np.array([256, 97], object)):  # fmt: skip
        assert model.generate(ids, 3, seed=1, top_k=4, temperature=0.5) == plain
        assert model.generate([ids], 3, seed=1, top_k=4, temperature=0.5) == [plain]
    assert model.generate(jnp.array([[256, 97]]), 3, seed=1, top_k=4, temperature=0.5) == [plain]
    assert model.generate(np.array(["a"]), 3, seed=1, top_k=4, temperature=0.5) == [plain]
    for stop in ({"never"}, np.array(["never"]), iter(["never"])):
        assert model.generate("a", 3, stop=stop) == model.generate("a", 3)
    assert "".join(model.stream("a", 3, stop={"never"})) == model.generate("a", 3).text
    for empty in ([], (), np.array([]), np.zeros((0, 3), int)):
        assert model.generate(empty) == model.logprobs(empty) == model.score(empty) == []
    np.testing.assert_array_equal(model.logprobs(jnp.array([256, 97])), model.logprobs("a"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"workdir": None}, "workdir must be the folder of a run, got None"),
        ({"workdir": ""}, "workdir must be the folder of a run, got ''"),
        ({"step": 1.5}, "step must be a whole number"),
        ({"step": True}, "step must be a whole number"),
        ({"step": -1}, "step must be at least 0, got -1"),
        ({"overrides": ["model.dtype"]}, "overrides must be like"),
    ],
)
def test_arguments_of_load(how, message):
    with pytest.raises(ConfigError, match=message):
        ngpt_jax.load(**{"workdir": "runs/a", **how})


# ------------------------------------------------------------------------------ loaded models


@pytest.fixture(scope="module")
def model():
    """A model with random weights, bytes, context 96."""
    from ngpt_jax import config as config_lib

    values = config_lib.default_config()
    values.model.update(layers=2, width=16, heads=2, context=96, vocab_size=257, loss_chunk=64)
    values.train.steps = 1
    config = config_lib.from_config_dict(values)
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    return LoadedModel(config, ByteTokenizer(), moved(config.model), mesh, 0)


def test_greedy_text_follows_the_logits_in_batches_of_different_lengths(model):
    prompts = ["a", "some longer prompt than that one", "third"]
    found = model.generate(prompts, 20, temperature=0)
    for prompt, got in zip(prompts, found):
        seen = [256, *prompt.encode(), *got.ids]
        logits = logits_of(model.config.model, model.params, np.array([seen]))[0, :, :257]
        n = len(got.ids)
        assert got.ids == np.argmax(logits[-1 - n : -1], axis=-1).tolist()
        assert got.stop_reason == "tokens" and n == 20
        want = jax.nn.log_softmax(logits, axis=-1)[np.arange(len(seen) - 1), seen[1:]]
        np.testing.assert_allclose(got.log_probs, want[-n:], atol=1e-4)
        np.testing.assert_allclose(model.logprobs(seen), want, atol=1e-4)
    text = model.logprobs("some")
    np.testing.assert_array_equal(text, model.logprobs([256, *b"some"]))


def test_draws_depend_on_the_seed_and_the_row_alone(model):
    prompts = ["row 0", "row one"]
    both = model.generate(prompts, 40, temperature=1.0, seed=3)
    assert both == model.generate(prompts, 40, temperature=1.0, seed=3)
    assert both[0].ids == model.generate("row 0", 40, temperature=1.0, seed=3).ids
    assert both[0].ids != model.generate("row 0", 40, temperature=1.0, seed=4).ids
    same = model.generate(["x", "x"], 40, temperature=1.0)
    assert same[0].ids != same[1].ids


def test_a_stream_gives_the_text_of_generate(model):
    for stop in ((), ("a", "\n"), "e"):
        how = {"temperature": 1.0, "seed": 5, "stop": stop}
        whole = model.generate("Begin", 80, **how)
        stream = model.stream("Begin", 80, **how)
        assert "".join(stream) == whole.text
        assert stream.result.text == whole.text and stream.result.ids == whole.ids
        assert stream.result.stop_reason == whole.stop_reason


def test_the_context_ends_a_text(model):
    short, long = model.generate(["x", "y" * 80], 40, temperature=1.0, seed=1)
    assert (len(short.ids), short.stop_reason) == (40, "tokens")
    assert (len(long.ids), long.stop_reason) == (15, "context")
    assert long.text == model.tokenizer.decode(long.ids)
    (more,) = model.generate(["y" * 80], 40, temperature=1.0, context=200)
    assert (len(more.ids), more.stop_reason) == (40, "tokens")
    with pytest.raises(ConfigError, match="A text has 97 tokens, more than the context of 96"):
        model.logprobs("z" * 97)


def test_the_end_of_the_document_ends_a_text(model):
    weights = dict(model._weights)
    # The last hidden state points somewhere: a table in which only ``eod`` lies there.
    table = np.zeros(weights["output_embedding"].shape, np.float32)
    probe = LoadedModel(model.config, model.tokenizer, model.params, model.mesh, 0)
    h, _ = read_prompts(
        model.config.model, weights, jnp.array([[256, 97]]), jnp.zeros(1, jnp.int32),
        empty_cache(model.config.model, 1, 2),
    )  # fmt: skip
    table[256] = 50 * h[0, -1]
    probe._weights = weights | {"output_embedding": jnp.asarray(table)}
    got = probe.generate("a", 20, temperature=0)
    assert (got.ids, got.text, got.stop_reason) == ([256], "", "document")


def test_a_text_that_ends_within_a_chunk_is_whole():
    stream = TextStream(ByteTokenizer(), [256], ())
    stream.limit(10, 100)
    stream.add([*b"ab", 256, *b"cd"], 5 * [0.0])
    assert stream.result() == ("ab", [*b"ab", 256], 3 * [0.0], "document")
    stream = TextStream(ByteTokenizer(), [256], ())
    stream.limit(3, 100)
    stream.add(list(b"abcde"), 5 * [0.0])
    assert stream.result() == ("abc", list(b"abc"), 3 * [0.0], "tokens")


def test_a_prompt_of_ids_may_end_within_a_character():
    def says(prompt: bytes, *pieces: bytes) -> list[str]:
        stream = TextStream(ByteTokenizer(), [256, *prompt], ())
        stream.limit(sum(map(len, pieces)), 100)
        told = []
        for piece in pieces:
            stream.add(list(piece), [0.0] * len(piece))
            told.append(stream.news())
        assert "".join(told) == stream.result().text
        return told

    smile = "😀".encode()
    assert says(b"a" + smile[:2], smile[2:3], smile[3:], b"!") == ["", "😀", "!"]
    assert says(b"a" + smile[:2], b"b") == ["b"]
    assert says("a\ufffd".encode(), b"b") == ["b"]


def test_weights_that_are_not_finite_are_refused(model):
    broken = jax.tree.map(lambda w: w * jnp.nan, model.params)
    broken = LoadedModel(model.config, model.tokenizer, broken, model.mesh, 0)
    with pytest.raises(ConfigError, match="a log-probability of nan: its weights are not finite"):
        broken.generate("a", 5)
    for texts in ("abc", ["a", "abc"]):
        with pytest.raises(ConfigError, match="a log-probability of nan"):
            broken.logprobs(texts)


def test_prompts_may_be_ids_and_must_be_known(model):
    assert model.generate([256, 97], 5, seed=1) == model.generate("a", 5, seed=1)
    assert model.generate(np.array([256, 97]), 5, seed=1) == model.generate("a", 5, seed=1)
    assert model.generate([], 5) == []
    with pytest.raises(ConfigError, match="A prompt holds the token id 257; the model knows 0 to"):
        model.generate([257], 5)
    with pytest.raises(ConfigError, match="A prompt has no tokens"):
        model.generate([[]], 5)


def pieces(ids, stops=(), chunk=1):
    text = TextStream(ByteTokenizer(), [256], stops)
    text.limit(len(ids), 1000)

    def draws():
        for i in range(0, len(ids), chunk):
            text.add(ids[i : i + chunk], [0.0] * chunk)
            yield

    stream = Streamed(text, draws())
    return list(stream), stream.result


def test_pieces_are_whole_characters_and_hold_back_what_may_be_a_stop():
    ids = list("aé\u20acb".encode())
    assert pieces(ids)[0] == ["a", "é", "\u20ac", "b"]
    told, result = pieces(list(b"one END two"), stops=("END",))
    assert "".join(told) == result.text == "one " and result.stop_reason == "stop"
    assert bytes(result.ids) == b"one END"  # to the token that made it whole
    assert pieces(list(b"one END two"), ("END",), chunk=4)[1] == result
    told, result = pieces(list(b"one EN"), stops=("END",))
    assert told[-1] == "EN" and result.text == "one EN"  # nothing came after
    told, _ = pieces(list("é".encode())[:1])
    assert told == ["\ufffd"]


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_a_run_is_loaded_without_its_text(runs, kind, tmp_path):
    model = ngpt_jax.load(str(runs / kind))
    assert model.step == 4 and model.config.model.kind == kind
    assert model.config.model.vocab_size == 257
    got = model.generate("the ", 8, temperature=0)
    assert len(got.ids) == 8
    copy = tmp_path / "copy"
    opening.write_weights(str(copy), model.config, model.params, model.tokenizer.fingerprint)
    again = ngpt_jax.load(str(copy))
    assert again.step == 0 and again.generate("the ", 8, temperature=0) == got
    # The kernels are chosen for this machine anew.
    values = json.loads((copy / "config.json").read_text())
    values["model"]["kernels"] = "pallas"
    (copy / "config.json").write_text(json.dumps(values))
    assert ngpt_jax.load(str(copy)).config.model.kernels == "auto"
    half = ngpt_jax.load(str(runs / kind), overrides={"model.dtype": "bfloat16"})
    assert half.config.model.dtype == "bfloat16" and half.generate("the ", 8).ids


def test_folders_that_are_no_runs_and_other_tokenizers_are_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match="no such folder; give the --workdir of a training run"):
        ngpt_jax.load(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="is not the folder of a training run"):
        ngpt_jax.load(str(tmp_path))
    with pytest.raises(ConfigError, match=r"--step=3: .* has no such checkpoint; there are 4"):
        ngpt_jax.load(str(runs / "ngpt"), step=3)
    with pytest.raises(ConfigError, match=r"data\.path\b.*Did you mean data\.paths"):
        ngpt_jax.load(str(runs / "ngpt"), overrides={"data.path": "x"})
    with pytest.raises(ConfigError, match=r"is there already, and not empty"):
        opening.write_weights(str(runs / "ngpt"), *[None] * 3)
    from tokenizers import Tokenizer, models

    other = Tokenizer(models.WordLevel({"</s>": 0, "the": 1}, unk_token="</s>"))
    other.save(str(tmp_path / "other.json"))
    with pytest.raises(ConfigError, match=r"data\.tokenizer .* is not the one that it was trained"):
        ngpt_jax.load(
            str(runs / "ngpt"), overrides={"data.tokenizer": str(tmp_path / "other.json")}
        )


def test_training_goes_on_from_imported_weights_but_not_in_their_folder(runs, tmp_path):
    model = ngpt_jax.load(str(runs / "ngpt"))
    weights = tmp_path / "weights"
    opening.write_weights(str(weights), model.config, model.params, model.tokenizer.fingerprint)
    config = dataclasses.replace(model.config, init_from=str(weights))
    assert loop.train(config, tmp_path / "more") == 0
    with pytest.raises(ConfigError, match=r"holds weights alone, .*; start .*--config\.init_from"):
        loop.train(model.config, weights)


@pytest.mark.slow
def test_the_sample_command(runs, tmp_path):
    def run(*arguments, **how):
        command = [sys.executable, "-m", "ngpt_jax.tools.sample", f"--workdir={runs / 'ngpt'}"]
        return subprocess.run([*command, *arguments], capture_output=True, text=True, **how)

    (tmp_path / "start.txt").write_text("the q")
    done = run(f"--prompt_file={tmp_path / 'start.txt'}", "--tokens=6", "--temperature=0")
    assert done.returncode == 0, done.stderr
    text = ngpt_jax.load(str(runs / "ngpt")).generate("the q", 6, temperature=0).text
    assert done.stdout == f"the q{text}\n"
    assert "[6 tokens in" in done.stderr and "as many as asked for" in done.stderr
    done = run("--prompt=-", "--prompt=b", "--tokens=90", input="a")
    assert done.stdout.startswith("--- 1 of 2\na") and "\n--- 2 of 2\nb" in done.stdout
    assert "the context is full (--context allows more)" in done.stderr
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfthe q")
    done = run(f"--prompt_file={tmp_path / 'mark.txt'}", "--tokens=6", "--temperature=0")
    assert done.stdout == f"the q{text}\n"
    done = subprocess.run(
        [sys.executable, "-m", "ngpt_jax.tools.sample", f"--workdir={runs / 'ngpt'}",
         "--prompt=-", "--tokens=6"],
        input=b"\xff\xfe", capture_output=True, env=os.environ | {"LC_ALL": "C"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"error: --prompt=- is not UTF-8 text")
    for arguments, message in (
        (["--prompt=" + 40 * "x"], "error: A prompt has 41 tokens, and the context 32: no room"),
        (["--top_p=0"], "error: top_p must lie in (0, 1], got 0.0."),
        (["--prompt_file=none.txt"], "error: --prompt_file=none.txt cannot be read"),
        (["--prompt=-", "--prompt=-"], "error: --prompt=- is given twice"),
        (["--prompt=\udcff"], "error: A --prompt or --stop is not UTF-8 text; convert it first."),
    ):
        refused = run(*arguments, input="")
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.startswith(message) and refused.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_benchmark_of_decoding(tmp_path):
    command = (
        f"-m ngpt_jax.tools.benchmark_decode --tokens=64 --rounds=1 --prompt=8 --batch_size=2"
        f" --json={tmp_path / 'decode.json'} --config.model.width=16 --config.model.layers=1"
        " --config.model.vocab_size=64"
    )
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "decode.json").read_text())
    assert set(numbers["models"]) == {"ngpt", "gpt"} and numbers["slots"] == [72, 288]
    for row in numbers["models"].values():
        assert row["decode_tokens_per_second"] == pytest.approx(2e3 / row["decode_ms"])
        assert row["prefill_tokens_per_second"] == pytest.approx(16e3 / row["prefill_ms"])
    assert "nGPT's tokens/s over GPT's: prefill" in done.stdout
    command = command.replace("--tokens=64", "--tokens=100")
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--tokens=100 must be a multiple of 16" in done.stderr


def test_importing_the_package_loads_nothing():
    code = (
        "import sys, json, ngpt_jax; print(json.dumps([m for m in ('jax', 'flax', 'orbax') if m in"
        " sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == []
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        _ = ngpt_jax.lode
