"""Scores on tasks and texts: against plain loops, by hand, and against lm-evaluation-harness."""

import csv
import functools
import gzip
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

import ngpt_jax
from ngpt_jax.config import ConfigError
from ngpt_jax.data.tokenizers.base import ByteTokenizer
from ngpt_jax.evaluation import report, scorers, tasks
from ngpt_jax.evaluation.report import examples, table_lines
from ngpt_jax.evaluation.scorers import Likelihood, Scored
from ngpt_jax.inference import scoring
from ngpt_jax.inference.loading import LoadedModel
from ngpt_jax.model.transformer import Transformer, init_params
from ngpt_jax.parallel.mesh import device_mesh
from ngpt_jax.training import loop

ROOT = Path(__file__).parents[1]
EOD = 256
CONTEXT = 24


@pytest.fixture
def model(tiny):
    """Bytes, a context of 24, one for all tests; its weights are those of no training."""
    if not _MADE:
        _MADE.append(make_model(tiny))
    return _MADE[0]


_MADE = []


def make_model(tiny, **fields):
    config = tiny(**{"model.vocab_size": 257, "model.context": CONTEXT, "train.seed": 3, **fields})
    # From another seed than train.seed, with larger logits: some tokens are far likelier.
    params = init_params(config.model, jax.random.key(11))
    params["s_z"] = 3 * params["s_z"]
    mesh = device_mesh(config.mesh, jax.devices()[:1])
    return LoadedModel(config, ByteTokenizer(), params, mesh, 7)


class Loop:
    """The plain way: one token at a time, all logits."""

    def __init__(self, model):
        apply = Transformer(model.config.model).apply
        self._logits = jax.jit(lambda ids: apply({"params": model.params}, ids))

    def token(self, before, i):
        """Log-probability of id ``i`` after the ids before it, and whether it is the likeliest."""
        ids = np.zeros((1, CONTEXT), np.int32)
        ids[0, : len(before)] = before
        logits = np.asarray(self._logits(ids)[0, len(before) - 1], np.float64)
        top = logits.max()
        return logits[i] - top - np.log(np.sum(np.exp(logits - top))), np.argmax(logits) == i

    def continuation(self, context, text):
        """Of a text, and of the white space before it."""
        ids = [EOD, *context.encode(), *text.encode()]
        count = len(ids) - 1 - len(context.rstrip().encode())
        start = max(len(ids) - (CONTEXT + 1), 0)
        found = [self.token(ids[start:j], ids[j]) for j in range(len(ids) - count, len(ids))]
        return sum(f[0] for f in found), all(f[1] for f in found)


def near(value, rel=1e-5):
    return value if value is None else pytest.approx(value, rel=rel)


def lines(path, records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return epath.Path(path)


CHOICES = [
    {"id": 0, "context": "The cat", "continuations": [" sat.", " stood up.", " é"], "label": 1},
    {"id": "b", "context": "A much longer context than fits", "continuations": [" x", " yes!"],
     "label": 0},
    {"id": 2, "context": "ends in space ", "continuations": [" on", " off"], "label": 1},
    {"id": 3, "context": "", "continuations": [" Naïve", " café"], "label": 0},
    {"id": 4, "context": "long", "continuations": [" continuation, far longer than it is", " no"],
     "label": 0},
]  # fmt: skip
COMPLETIONS = [
    {"id": i, "context": text, "continuations": [word], "label": 0}
    for i, (text, word) in enumerate([("So it", " is"), ("In the", " end"), ("\n", " né")])
]
CONTEXTS = [
    {"id": 0, "contexts": ["So Anna", "So Maria"], "continuation": " left early.", "label": 1},
    {"id": 1, "contexts": ["It was he", "It was the doctor"], "continuation": " é.", "label": 0},
]
FILES = {"choices": CHOICES, "completion": COMPLETIONS, "contexts": CONTEXTS}


@pytest.fixture
def local(tmp_path):
    """A task of each kind, from files."""
    return {
        kind: tasks.read_task(lines(tmp_path / f"{kind}.jsonl", records))
        for kind, records in FILES.items()
    }


# ------------------------------------------------------------------------------------------ scoring


def test_log_probabilities_are_those_of_a_plain_loop(model, local):
    plain = Loop(model)
    for kind in ("choices", "completion", "contexts"):
        scored, _ = scorers.score_task(model, local[kind], batch_size=3)
        for example, s in zip(local[kind].examples, scored, strict=True):
            for (context, text), found in zip(example.pairs, s.found, strict=True):
                if len(text) > CONTEXT:
                    continue
                log_prob, greedy = plain.continuation(context, text)
                assert found.log_prob == pytest.approx(log_prob, abs=1e-4)
                assert found.greedy == greedy


def test_what_the_model_says_itself_is_greedy(model):
    said = model.generate([[EOD, 65]], 6, temperature=0)[0].ids
    row = [EOD, 65, *said]
    (likeliest,) = [x for _, x in model.score([row])]
    assert likeliest[1:].all()
    wrong = [*row[:-1], (row[-1] + 1) % 256]
    assert model.score([wrong])[0][1].tolist() == [*likeliest[:-1].tolist(), False]
    cut = [[(row, 6)], [(wrong, 6)]]
    assert [f.greedy for f in scorers.log_likelihoods(model, cut)] == [True, False]


def test_of_equals_greedy_decoding_takes_the_first(model):
    params = jax.tree.map(lambda p: p, model.params)
    params["output_embedding"] = params["output_embedding"] * 0  # all logits are 0
    flat = LoadedModel(model.config, model.tokenizer, params, model.mesh, 0)
    log_probs, likeliest = flat.score([[EOD, 0, 1, 256]])[0]
    np.testing.assert_allclose(log_probs, -np.log(257), rtol=1e-6)
    assert likeliest.tolist() == [True, False, False]


def test_batches_keep_order_and_budget(model, monkeypatch):
    shapes, score = [], scoring.score

    def spy(config, params, tokens):
        shapes.append(tokens.shape)
        return score(config, params, tokens)

    rng = np.random.default_rng(0)
    rows = [[EOD, *rng.integers(0, 256, n).tolist()] for n in (3, 70, 1, 0, 130, 8, 64, 5, 2)]
    alone = [model.score([row])[0] for row in rows]
    monkeypatch.setattr(scoring, "score", spy)
    shares = []
    together = model.score(rows, batch_size=2, progress=shares.append)
    for (a, b), (c, d), row in zip(alone, together, rows, strict=True):
        assert a.shape == b.shape == c.shape == d.shape == (len(row) - 1,)
        np.testing.assert_allclose(a, c, atol=1e-5)
        np.testing.assert_array_equal(b, d)
    # The context is 24 tokens, padded to 64; longer rows come two by two.
    assert shapes == [(2, 193), (2, 65), (2, 65), (2, 65), (1, 65)]
    assert shares == sorted(shares) and shares[-1] == 1
    assert model.score([]) == []


def test_rows_that_hold_nothing_to_score(model):
    full, empty, one = model.score([[65, 66, 67], [], [65]])
    assert [len(full[0]), len(empty[0]), len(one[0])] == [2, 0, 0]
    for some in (empty, one, *model.score([[]]), *model.score([np.zeros(0)])):
        assert (some[0].dtype, some[1].dtype, some[1].shape) == (np.float32, bool, (0,))
    assert np.isfinite(full[0]).all()
    assert np.array_equal(model.score(np.array([[65, 66, 67]]))[0][0], full[0])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[65, 9999, 66]], "A row holds the token id 9999; the model knows 0 to 256"),
        ([[65, 66], [65, 300]], "A row holds the token id 300"),  # a row of padding
        ([[65, 257]], "A row holds the token id 257"),
        ([[65, -1]], "A row holds the token id -1"),
        ([np.array([65, -1])], "A row holds the token id -1"),
        ([[65, 1.0]], "rows: a token id must be a whole number"),
        ([np.array([65.0])], r"rows: a token id must be a whole number, got 65\.0"),
        ([[65, False]], "rows: a token id must be a whole number"),
        ([[65, None]], "rows: a token id must be a whole number"),
        ([65, 66], "rows must be"),
        (["text"], "rows must be"),
        ("text", "rows must be"),
        (None, "rows must be"),
    ],
)
def test_rows_that_cannot_be_scored(model, rows, message):
    with pytest.raises(ConfigError, match=message):
        model.score(rows)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, None, "4"])
def test_batch_sizes_that_are_none(model, size):
    with pytest.raises(ConfigError, match="batch_size must be"):
        model.score([[65, 66]], batch_size=size)
    with pytest.raises(ConfigError, match="batch_size must be"):
        scorers.score_text(model, ["some text"], size)


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_texts_without_tokens(model, texts):
    with pytest.raises(ConfigError, match="The texts hold no tokens"):
        scorers.score_text(model, texts)


def test_shorter_rows_come_in_larger_batches(tiny, monkeypatch):
    shapes = []

    def spy(config, params, tokens):
        shapes.append(tokens.shape)
        return np.zeros((len(tokens), tokens.shape[1] - 1)), np.zeros((len(tokens), 1), bool)

    model = make_model(tiny, **{"model.context": 256})
    monkeypatch.setattr(scoring, "score", spy)
    rows = [[1] * 250] * 3 + [[1] * 100] * 5 + [[1] * 5] * 12
    model.score(rows, batch_size=2)
    assert shapes == [(2, 257), (2, 257), (4, 129), (8, 65), (4, 65)]


# ------------------------------------------------------------------------------------------ windows


def test_windows_of_a_text_by_hand():
    ids = list(range(10))  # the example in lm_eval's LM.loglikelihood_rolling
    assert list(scorers.rolling_windows(ids, -1, 4)) == [
        ([-1, 0, 1, 2, 3], 4), ([3, 4, 5, 6, 7], 4), ([5, 6, 7, 8, 9], 2),
    ]  # fmt: skip
    assert list(scorers.rolling_windows([7], -1, 4)) == [([-1, 7], 1)]
    assert list(scorers.rolling_windows([], -1, 4)) == []


@pytest.mark.parametrize("length", [1, 2, 5, 7])
@pytest.mark.parametrize("size", [1, 2, 5, 6, 7, 8, 14, 15, 23])
def test_each_token_counts_once_after_those_before_it(length, size):
    ids = list(range(100, 100 + size))
    counted = []
    for row, count in scorers.rolling_windows(np.array(ids), -1, length):
        row = [int(i) for i in row]
        assert 1 <= count < len(row) <= length + 1
        assert row == [-1, *ids][1 + row[-1] - 100 - len(row) + 1 :][: len(row)]
        counted += row[-count:]
    assert counted == ids


def test_a_continuation_stays_whole_where_it_fits():
    assert scorers.windows([9, 1, 2], [3, 4], 8) == [([9, 1, 2, 3, 4], 2)]
    assert scorers.windows([9, 1, 2], [3, 4], 3) == [([1, 2, 3, 4], 2)]
    assert scorers.windows([9, 1, 2], [3, 4], 2) == [([2, 3, 4], 2)]
    assert scorers.windows([9, 1, 2], [3, 4, 5], 2) == [([2, 3, 4], 2), ([3, 4, 5], 1)]


def test_pairs_are_encoded_together():
    encode = scorers.encode_pair
    assert encode(ByteTokenizer(), "ab", " c") == ([EOD, 97, 98], [32, 99])
    assert encode(ByteTokenizer(), "ab \n", "c") == ([EOD, 97, 98], [32, 10, 99])
    assert encode(ByteTokenizer(), "", " é") == ([EOD], [32, 0xC3, 0xA9])
    assert encode(ByteTokenizer(), " \n", "x") == ([EOD], [32, 10, 120])
    # A tokenizer that merges across the border: the pair's ids are those of the whole.
    pairs = types.SimpleNamespace(eod=0, encode=lambda text: [len(x) for x in text.split("|")])
    assert encode(pairs, "a|bb", "b|cc") == ([0, 1, 2], [2])


# -------------------------------------------------------------------------------- scores by hand


class ByHand:
    """Stands for a model: byte b has the log-probability -b / 100, whatever is before it."""

    def __init__(self, context=CONTEXT):
        self.config = types.SimpleNamespace(model=types.SimpleNamespace(context=context))
        self.tokenizer = ByteTokenizer()

    def score(self, rows, batch_size=16, progress=None):
        return [
            (np.array([-i / 100 for i in row[1:]], np.float32), np.array(row[1:]) == ord("a"))
            for row in rows
        ]


def test_accuracies_of_a_model_by_hand(tmp_path):
    records = [  # -log p: 2.26 and 1.94; a character 1.13 and 0.97 (with the space, 2.58 and 2.26)
        {"id": 0, "context": "x", "continuations": [" aa", " bb"], "label": 0},
        # 1.29 and 2.26, 1.29 and 1.13 a character: acc and acc_norm differ.
        {"id": 1, "context": "x", "continuations": [" a", " aa"], "label": 1},
        # Equal: the first.
        {"id": 2, "context": "x", "continuations": [" ab", " ba", " ba", " ba"], "label": 1},
    ]
    task = tasks.read_task(lines(tmp_path / "t.jsonl", records))
    assert (task.name, task.kind, task.delimiter) == ("t", "choices", " ")
    scored, too_long = scorers.score_task(ByHand(), task)
    assert too_long == 0
    assert [s.chosen for s in scored] == [0, 0, 0]
    assert [s.chosen_norm for s in scored] == [0, 1, 0]
    assert scored[1].found[0].log_prob == pytest.approx(-1.29)
    assert scored[1].lengths == (1, 2)
    result = scorers.summarize(task, scored)
    assert result["examples"] == 3
    assert result["chance"] == pytest.approx((1 / 2 + 1 / 2 + 1 / 4) / 3)
    assert result["acc"] == pytest.approx(1 / 3) and result["acc_norm"] == pytest.approx(2 / 3)
    assert result["acc_stderr"] == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 2))
    columns, rows = examples(task, scored)
    assert columns == ["id", "chosen", "chosen_norm", "label", *(f"log_prob_{i}" for i in range(4))]
    assert [row["label"] for row in rows] == [0, 1, 1] and "log_prob_2" not in rows[0]
    assert table_lines("t (3)", [result]) == [
        ("t (3)", "acc", "0.3333 ± 0.3333", "0.4167"),
        ("", "acc_norm", "0.6667 ± 0.3333", "0.4167"),
    ]


def test_lengths_are_characters_without_the_delimiter():
    found = (Likelihood(-3.0, False), Likelihood(-4.0, False))
    # A character of two bytes counts once: -1.5 against -1.0 a character.
    assert Scored(0, 1, found, (2, 4)).chosen_norm == 1
    example = tasks.Example(0, (("", " né"), ("", " nées")), 1)
    task = tasks.Task("t", epath.Path("t"), "choices", [example], " ")
    assert scorers.attach(task, found)[0].lengths == (2, 4)
    bare = task._replace(delimiter="")
    assert scorers.attach(bare, found)[0].lengths == (3, 5)


def test_a_completion_is_right_where_all_of_it_is_the_likeliest(tmp_path):
    records = [
        {"id": 0, "context": "x", "continuations": ["aa"], "label": 0},
        {"id": 1, "context": "x", "continuations": ["ab"], "label": 0},
    ]
    task = tasks.read_task(lines(tmp_path / "words.jsonl", records))
    scored, _ = scorers.score_task(ByHand(), task)
    result = scorers.summarize(task, scored)
    assert (task.kind, result["acc"], result["chance"]) == ("completion", 0.5, None)
    assert result["perplexity"] == pytest.approx(math.exp((1.94 + 1.95) / 2), rel=1e-6)
    columns, rows = examples(task, scored)
    assert columns == ["id", "greedy", "log_prob"] and [r["greedy"] for r in rows] == [1, 0]


def test_a_continuation_under_several_contexts(model, local):
    scored, _ = scorers.score_task(model, local["contexts"])
    result = scorers.summarize(local["contexts"], scored)
    assert set(result) == {"examples", "chance", "acc", "acc_stderr"} and result["chance"] == 0.5
    assert all(s.chosen == s.chosen_norm for s in scored)


def test_standard_error_is_that_of_a_mean():
    values = [1, 0, 0, 1, 1, 1, 0]
    p, error = scorers.mean_and_error(values)
    assert p == pytest.approx(4 / 7)
    assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(7))
    assert scorers.mean_and_error([1, 1]) == (1, 0)
    assert scorers.mean_and_error([1]) == (1, None)
    assert scorers.perplexity(1000) == math.exp(700)


def test_bits_and_perplexity_of_a_text_by_hand():
    texts = ["a" * 30, "é"]  # longer than the context; two bytes, 195 and 169
    result = scorers.score_text(ByHand(), texts)
    nats = (30 * 97 + 195 + 169) / 100
    assert (result["documents"], result["tokens"], result["bytes"]) == (2, 32, 32)
    assert result["nats_per_token"] == pytest.approx(nats / 32)
    assert result["perplexity"] == pytest.approx(math.exp(nats / 32))
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / 32)


def test_a_text_is_scored_as_in_a_plain_loop(model):
    text = "Each token once, after as much as the window holds: naïve.\n"
    ids, plain = [EOD, *text.encode()], Loop(model)
    log_prob, done = 0.0, 0
    while done < len(ids) - 1:
        end = min(done + CONTEXT, len(ids) - 1)
        start = max(end - CONTEXT, 0)
        log_prob += sum(plain.token(ids[start:j], ids[j])[0] for j in range(done + 1, end + 1))
        done = end
    result = scorers.score_text(model, [text, text], batch_size=2)
    assert result["nats_per_token"] == pytest.approx(-log_prob / len(text.encode()), abs=1e-5)


def test_weights_that_are_not_finite_are_refused(model):
    params = jax.tree.map(lambda p: p * np.nan, model.params)
    broken = LoadedModel(model.config, model.tokenizer, params, model.mesh, 0)
    with pytest.raises(ConfigError, match="log-probability of nan: its weights are not finite"):
        scorers.score_text(broken, ["abc"])


def test_untrained_weights_are_those_of_the_seed(model):
    fresh = scorers.untrained(model)
    wanted = init_params(model.config.model, jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, fresh.params, wanted)
    assert fresh.config == model.config and fresh.step == 0


# ------------------------------------------------------------------------------------------ files


def test_files_of_tasks(tmp_path):
    for name, records in FILES.items():
        lines(tmp_path / f"{name}.jsonl.gz", records)
    path = tasks.find_task("choices", str(tmp_path))
    task = tasks.read_task(path)
    assert task.name == "choices" and task == tasks.read_task(
        tasks.find_task(str(tmp_path / "choices.jsonl.gz"), None)
    )
    assert [example.id for example in task.examples] == [0, "b", 2, 3, 4]
    assert task.examples[0].pairs[1] == ("The cat", " stood up.") and task.examples[0].label == 1
    assert len(tasks.read_task(path, limit=2).examples) == 2
    contexts = tasks.read_task(tasks.find_task("contexts", str(tmp_path)))
    assert contexts.examples[0].pairs == (
        ("So Anna", " left early."), ("So Maria", " left early."),
    )  # fmt: skip
    assert tasks.find_task("nothing", str(tmp_path)) is None
    bare = [{"id": 0, "context": "x", "continuations": ["a", " b"], "label": 0}]
    assert tasks.read_task(lines(tmp_path / "bare.jsonl", bare)).delimiter == ""
    (tmp_path / "blank.jsonl").write_text("\n" + json.dumps(bare[0]) + "\n  \n")
    assert len(tasks.read_task(epath.Path(tmp_path / "blank.jsonl")).examples) == 1


GOOD = {"id": 0, "context": "x", "continuations": ["a", "b"], "label": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ({"label": ...}, "line 2 has no 'label' but 'context', 'continuations', 'id'"),
        ({"id": ...}, "line 2 has no 'id'"),
        ({"continuations": ...}, "line 2 has no 'continuations'"),
        ({"id": 1.5}, "line 2: 'id' must be a number or a text, got 1.5"),
        ({"id": "a\ud800"}, "line 2: 'id' holds half a surrogate pair"),
        ({"label": 2}, "line 2: 'label' must be an index from 0 to 1, got 2"),
        ({"label": -1}, "'label' must be an index from 0 to 1, got -1"),
        ({"label": True}, "'label' must be an index"),
        ({"label": "1"}, "'label' must be an index from 0 to 1, got '1'"),
        ({"continuations": []}, "'continuations' must be a list of texts"),
        ({"continuations": "ab"}, "'continuations' must be a list of texts, got 'ab'"),
        ({"continuations": ["a", ""]}, "'continuations' must be text, and not empty, got ''"),
        ({"context": None}, "'context' must be a text, got None"),
        ({"contexts": ["a", "b"]}, "line 2 has no 'continuation'"),
        ({"contexts": ["a"], "continuation": "b", "label": 0}, "'contexts' must be two or more"),
        ({"contexts": ["a", "b"], "continuation": 3}, "'continuation' must be text"),
        ({"continuations": ["a"], "label": 0}, "kind 'completion', those above are 'choices'"),
    ],
)
def test_a_wrong_line_is_told(tmp_path, line, message):
    if isinstance(line, dict):
        line = json.dumps({k: v for k, v in {**GOOD, **line}.items() if v is not ...})
    path = tmp_path / "task.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    with pytest.raises(ConfigError, match="--tasks: '.*task.jsonl', .*" + re.escape(message)) as e:
        tasks.read_task(epath.Path(path))
    assert "\n" not in str(e.value)


def test_files_that_are_no_tasks(tmp_path, book):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"x" * 999)[:20])
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}')
    for name, message in (
        ("empty.jsonl", "'[^']*empty.jsonl' holds no examples"),
        ("cut.jsonl.gz", "cannot read '[^']*cut.jsonl.gz'"),
        ("latin.jsonl", "'[^']*latin.jsonl', line 1 is not UTF-8 .byte 0xe9 at offset 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            tasks.read_task(epath.Path(tmp_path / name))
    for name, message in (
        (str(tmp_path / "gone.jsonl"), "there is no file"),
        (book, "book.txt' is no .jsonl or .jsonl.gz file"),
    ):
        with pytest.raises(ConfigError, match=message):
            tasks.find_task(name, None)
    with pytest.raises(ConfigError, match="--tasks_dir=.*gone: there is no such folder"):
        tasks.find_task("x", str(tmp_path / "gone"))
    said = str(tasks.unknown_task("lattin", str(tmp_path)))
    assert "there are cut, empty, latin. Did you mean latin?" in said
    assert "give --tasks_dir" in str(tasks.unknown_task("latin", None))
    with pytest.raises(ConfigError, match="--text=.* holds no text"):
        scorers.read_text(str(tmp_path / "empty.jsonl"), "text")


def test_a_continuation_that_melts_into_its_context_is_refused(tmp_path):
    fake = ByHand()
    fake.tokenizer = types.SimpleNamespace(eod=0, encode=lambda text: [1] * ((len(text) + 1) // 2))
    task = tasks.read_task(lines(tmp_path / "t.jsonl", [GOOD]))
    with pytest.raises(ConfigError, match="id 0: a continuation has no token of its own"):
        scorers.score_task(fake, task)


# -------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory, book):
    from ngpt_jax.config import experiment

    folder = tmp_path_factory.mktemp("run") / "run"
    overrides = {
        "data.source": "text", "data.paths": book, "model.context": "32", "train.steps": "4",
        "train.batch_size": "4", "eval.every": "4", "eval.batches": "1", "sample.tokens": "0",
    }  # fmt: skip
    config = experiment.load_config(f"{ROOT}/experiments/quickstart.py:debug", [*overrides.items()])
    assert loop.train(config, folder) == 0
    return folder


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "ngpt_jax.tools.evaluate", *map(str, arguments)],
        cwd=ROOT, env=os.environ, text=True, capture_output=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_from_end_to_end(run, tmp_path, book):
    for name, records in FILES.items():
        lines(tmp_path / f"{name}.jsonl.gz", records)
    done = command(
        f"--workdir={run}", f"--tasks=choices,{tmp_path}/completion.jsonl.gz,contexts",
        f"--tasks_dir={tmp_path}", f"--text={book}", "--untrained", "--limit=4", "--batch_size=4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = run / "evaluate"
    files = [f"{kind}{of}.csv" for kind in FILES for of in ("", ".untrained")]
    assert sorted(p.name for p in out.iterdir()) == sorted(["evaluate.json", *files])
    report = json.loads((out / "evaluate.json").read_text())
    assert report["step"] == 4 and report["lm_eval"] is None and report["limit"] == 4
    assert report["tasks"]["choices"]["examples"] == 4
    assert report["tasks"]["choices"]["too_long"] == 1
    loaded = ngpt_jax.load(str(run))
    models = {"": (loaded, report), ".untrained": (scorers.untrained(loaded), report["untrained"])}
    for of, (model, results) in models.items():
        for kind in FILES:
            task = tasks.read_task(tasks.find_task(kind, str(tmp_path)), 4)
            scored, _ = scorers.score_task(model, task)
            wanted = scorers.summarize(task, scored)
            for name, value in wanted.items():
                assert results["tasks"][kind][name] == near(value)
            with open(out / f"{kind}{of}.csv", newline="") as f:
                rows = list(csv.DictReader(f))
            _, ours = examples(task, scored)
            for row, mine in zip(rows, ours, strict=True):
                assert row.pop("id") == str(mine.pop("id"))
                assert {k: float(v) for k, v in row.items() if v} == near(mine)
        text = scorers.score_text(model, [Path(book).read_text()])
        assert results["text"] == pytest.approx(text, rel=1e-5)
    assert report["text"]["bits_per_byte"] < report["untrained"]["text"]["bits_per_byte"]
    assert re.search(r"^ +measure +step 4 +untrained +chance$", done.stdout, re.M)
    assert re.search(r"^choices \(4\) +acc +0\.\d{4} ± .* 0\.4583$", done.stdout, re.M)
    assert "evaluate.json, choices.csv" in done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_without_tasks_and_text_the_held_out_text_is_scored(runs, tmp_path, monkeypatch):
    evaluate = functools.partial(report.evaluate, str(runs / "ngpt"), None, [])
    table = evaluate(report.Wanted([], [], None, None, None, 16, False), False, str(tmp_path))
    assert "the text is the run's held-out text" in table
    found = json.loads((tmp_path / "evaluate.json").read_text())["text"]
    text = tmp_path / "val.jsonl"
    text.write_text(json.dumps({"content": (runs / "val.txt").read_text()}) + "\n")
    wanted = report.Wanted([], [], str(text), "content", None, 16, False)
    evaluate(wanted, False, str(tmp_path))
    assert found == json.loads((tmp_path / "evaluate.json").read_text())["text"]
    assert (found["documents"], found["tokens"]) == (1, 260)
    with pytest.raises(ConfigError, match="has no 'text' but 'content'; set --text_key"):
        evaluate(wanted._replace(text_key=None), False, str(tmp_path))

    # Other text is not the run's, wherever it lies.
    for folder, change in (
        ("another", lambda facts: facts | {"held_out": "0" * 64}),
        ("older", lambda facts: {"data": "0" * 64}),
        ("converted", lambda facts: {"tokenizer": facts["tokenizer"]}),
    ):
        copy = tmp_path / folder
        shutil.copytree(runs / "ngpt", copy)
        facts = json.loads((copy / "versions.json").read_text())
        (copy / "versions.json").write_text(json.dumps(change(facts)))
        told = "does not tell which" if folder == "converted" else "the text here is not the run's"
        with pytest.raises(ConfigError, match=f"held-out text is not here .*{told}.*; give --text"):
            report.evaluate(
                str(copy), None, [], report.Wanted([], [], None, None, None, 16, False), False, None
            )

    def missing(*_):
        raise ConfigError("no such file")

    monkeypatch.setattr(scorers, "load_corpus", missing)
    with pytest.raises(ConfigError, match="held-out text is not here .no such file.; give --text"):
        evaluate(report.Wanted([], [], None, None, None, 16, False), False, str(tmp_path))


def test_bad_input_is_told_in_a_line(run, tmp_path):
    lines(tmp_path / "choices.jsonl", CHOICES)
    for arguments, message in (
        ((f"--workdir={tmp_path}", "--tasks=choice", f"--tasks_dir={tmp_path}"),
         "there are choices. Did you mean choices?"),
        ((f"--workdir={tmp_path}", "--tasks=choices", f"--tasks_dir={tmp_path}"),
         "is not the folder of a training run"),
        ((f"--workdir={run}", "--limit=3"), "--limit is for --tasks; give some, or leave it out"),
        ((f"--workdir={run}", "--text=x.txt", "--tasks_dir=x"), "--tasks_dir is for --tasks"),
        ((f"--workdir={run}", "--harness"), "--harness is for --tasks"),
    ):  # fmt: skip
        done = command(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: --") and message in line


def test_without_the_harness_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "ngpt_jax.evaluation.harness", raising=False)
    with pytest.raises(ConfigError, match="pip install '.\\[eval\\]' in the clone of ngpt_jax"):
        import ngpt_jax.evaluation.harness  # noqa: F401
