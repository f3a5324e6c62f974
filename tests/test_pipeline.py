"""Batches: in which order, that none is lost, and that nothing but the seed decides."""

import gc
import hashlib
import itertools
import multiprocessing
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from data_helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packing import stream_of

from ngpt_jax.data import pipeline
from ngpt_jax.data.corpus import EvalSet
from ngpt_jax.data.packing import Concatenated

property_test = settings(max_examples=60, deadline=None, derandomize=True)

CONTEXT, BATCH = 16, 4
TOKENS = np.random.default_rng(0).integers(0, 257, 40 * CONTEXT + 10).astype(np.uint16)


def windows_in(tokens):
    return Concatenated(stream_of(tokens, vocab_size=2**16), CONTEXT, 256)


def batches(
    seed=0, position=0, threads=2, prefetch=8, tokens=TOKENS, count=50, batch_size=BATCH, rows=None,
    workers=0,
):  # fmt: skip
    dataset = pipeline.train_dataset(windows_in(tokens), seed)
    iterator = pipeline.train_batches(
        dataset, batch_size, position, threads, prefetch, rows, workers
    )
    return list(itertools.islice(iterator, count))


def fingerprint(some):
    digest = hashlib.sha256()
    for batch in some:
        for key in ("inputs", "targets"):
            assert batch[key].dtype == np.int32
            digest.update(batch[key].tobytes())
    return digest.hexdigest()


def windows_of(some):
    """Rows as bytes of the whole window."""
    return [
        np.append(row, last).tobytes()
        for batch in some
        for row, last in zip(batch["inputs"], batch["targets"][:, -1])
    ]


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]


def wait_for_no_threads():
    deadline = time.monotonic() + 10
    while prefetch_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not prefetch_threads()


def test_shapes_and_shift():
    for batch in batches():
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            "inputs": ((BATCH, CONTEXT), np.int32),
            "targets": ((BATCH, CONTEXT), np.int32),
        }
        np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])


def test_each_window_once_an_epoch():
    epochs = [windows_of(batches(position=40 * e, count=40 // BATCH)) for e in range(3)]
    expected = [TOKENS[i : i + CONTEXT + 1].astype(np.int32).tobytes()
                for i in range(0, 40 * CONTEXT, CONTEXT)]  # fmt: skip
    for epoch in epochs:
        assert epoch != expected
        assert sorted(epoch) == sorted(expected)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    # Every token but the first, save the tail, is a target once.
    targets = np.concatenate([b["targets"].ravel() for b in batches(count=40 // BATCH)])
    np.testing.assert_array_equal(np.sort(targets), np.sort(TOKENS[1 : 40 * CONTEXT + 1]))


def test_seeds_share_no_epoch():
    orders = [windows_of(batches(seed=s, position=40 * e, count=10))
              for s in range(3) for e in range(3)]  # fmt: skip
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_batches_do_not_depend_on_the_reading_ahead():
    expected = fingerprint(batches())
    assert fingerprint(batches(seed=1)) != expected
    for threads, prefetch in [(0, 0), (1, 1), (1, 8), (2, 1), (4, 32), (8, 3)]:
        assert fingerprint(batches(threads=threads, prefetch=prefetch)) == expected


@pytest.mark.slow
def test_batches_do_not_depend_on_worker_processes():
    """Also from the middle of a stream; workers end with the iterator, and load no jax backend."""
    expected = fingerprint(batches(position=77 * BATCH, count=20))
    assert fingerprint(batches(position=77 * BATCH, count=20, workers=2)) == expected
    gc.collect()
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("position", [1, 8, 38, 40, 123, 40 * 1000 + 7])
def test_batches_from_a_position(position):
    """Also across the ends of epochs and where the position is no multiple of the batch."""
    windows = windows_of(batches(count=50 + 60, batch_size=1)) if position < 60 else None
    here = batches(position=position)
    assert fingerprint(here[20:] + batches(position=position + 50 * BATCH, count=20)) == (
        fingerprint(batches(position=position + 20 * BATCH))
    )
    if windows:
        assert windows_of(here)[:50] == windows[position : position + 50]
    # The windows in order are the same for each batch size: a pure function of the position.
    assert windows_of(here) == windows_of(batches(position=position, batch_size=10, count=20))


def test_batches_in_a_new_process():
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_pipeline as t;"
        "print(t.fingerprint(t.batches(seed=3, position=13, threads=1)), flush=True);"
        "dataset = t.pipeline.train_dataset(t.windows_in(t.TOKENS), 0);"
        "it = t.pipeline.train_batches(dataset, 4, 0, 2, 8);"
        "next(it); assert t.prefetch_threads(); print('flax' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert out.returncode == 0, out.stderr  # and no thread keeps it from ending
    assert out.stdout.split() == [fingerprint(batches(seed=3, position=13)), "False"]


def test_order_is_that_of_earlier_versions():
    """A new grain must not reshuffle a run that goes on: its position would mean other text."""
    tokens = np.arange(100 * CONTEXT + 1, dtype=np.uint16)
    (first, *_, last) = batches(position=5, tokens=tokens, count=500)
    assert (first["inputs"][:, 0] // CONTEXT).tolist() == [72, 24, 52, 93]
    assert (last["inputs"][:, 0] // CONTEXT).tolist() == [4, 65, 22, 6]


def test_threads_end_with_the_iterator():
    dataset = pipeline.train_dataset(windows_in(TOKENS), 0)
    wait_for_no_threads()
    iterator = pipeline.train_batches(dataset, BATCH, 0, 2, 8)
    next(iterator)
    assert prefetch_threads()
    iterator.close()
    wait_for_no_threads()
    iterator = pipeline.train_batches(dataset, BATCH, 0, 2, 8)
    next(iterator)
    assert prefetch_threads()
    del iterator
    gc.collect()
    wait_for_no_threads()


def test_fewer_windows_than_a_batch():
    one = pipeline.train_dataset(windows_in(TOKENS[:17]), 2**32 - 1)
    (batch,) = itertools.islice(pipeline.train_batches(one, 3, 0, 2, 8), 1)
    assert batch["targets"].tolist() == [TOKENS[1:17].tolist()] * 3


def test_rows_of_processes_make_up_the_batch():
    whole = batches(count=20, position=3)
    for processes in (2, 4):
        each = BATCH // processes
        parts = [batches(count=20, position=3, rows=np.arange(i * each, (i + 1) * each))
                 for i in range(processes)]  # fmt: skip
        joined = [
            {k: np.concatenate([p[k] for p in part]) for k in part[0]} for part in zip(*parts)
        ]
        assert fingerprint(joined) == fingerprint(whole)


# ------------------------------------------------------------------------------------- mixtures


def mixture(weights, lengths, seed=0):
    """Windows that tell their source and number."""
    tokens = {
        name: np.arange(length * CONTEXT + 1) // CONTEXT + 10_000 * i
        for i, (name, length) in enumerate(lengths.items())
    }
    windows = {
        name: Concatenated(stream_of(t, vocab_size=2**16), CONTEXT, 256)
        for name, t in tokens.items()
    }
    return pipeline.mixed_dataset(windows, weights, seed)


@property_test
@given(
    st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 10), min_size=1),
    st.integers(0, 10**9),
)
def test_shares_of_a_mixture(weights, position):
    """In any stretch of n windows, n * weight of each source, to within one a source."""
    n, names = 100, sorted(weights)
    dataset = mixture(weights, {name: 2000 + i for i, name in enumerate(names)})
    first = [int(dataset[position + i]["inputs"][0]) for i in range(n)]
    for i, name in enumerate(names):
        share = weights[name] / sum(weights.values())
        assert abs(sum(t // 10_000 == i for t in first) - n * share) <= len(names)


def test_each_source_of_a_mixture_has_its_own_epochs():
    lengths, weights = {"a": 30, "b": 50, "c": 20}, {"a": 3.0, "b": 1.0, "c": 0.5}
    dataset = mixture(weights, lengths)
    seen = {0: [], 1: [], 2: []}
    for i in range(1000):
        token = int(dataset[i]["inputs"][0])
        seen[token // 10_000].append(token % 10_000)
    for source, length in enumerate(lengths.values()):
        whole = len(seen[source]) // length
        assert whole >= 2
        for epoch in range(whole):
            part = seen[source][epoch * length : (epoch + 1) * length]
            assert sorted(part) == list(range(length))
        assert seen[source][:length] != seen[source][length : 2 * length]
    again, other = mixture(weights, lengths), mixture(weights, lengths, seed=1)
    order = [int(dataset[i]["inputs"][0]) for i in range(50)]
    assert [int(again[i]["inputs"][0]) for i in range(50)] == order
    assert [int(other[i]["inputs"][0]) for i in range(50)] != order


# ----------------------------------------------------------------------------------- evaluation


@property_test
@given(st.lists(st.integers(0, 256), min_size=1, max_size=60), st.integers(1, 7), st.integers(1, 4))
def test_each_eval_target_once(tokens, context, batch_size):
    eval_set = EvalSet("val", stream_of(tokens), 0, 256)
    some = list(pipeline.eval_batches(eval_set, context, batch_size, mask_documents=True))
    assert len(some) == pipeline.num_eval_batches(eval_set, context, batch_size)
    kinds = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), np.int32)
    kinds["weights"] = np.float32
    for batch in some:
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            k: ((batch_size, context), dtype) for k, dtype in kinds.items()
        }
        starts = np.diff(batch["segment_ids"], axis=1) > 0
        assert (starts == (batch["inputs"][:, 1:] == 256)).all()
    inputs, targets, weights = (
        np.concatenate([b[key].ravel() for b in some]) for key in ("inputs", "targets", "weights")
    )
    n = len(tokens)
    assert weights.tolist() == [1.0] * n + [0.0] * (len(weights) - n)
    assert len(weights) - n < context * batch_size
    assert targets[:n].tolist() == tokens
    assert inputs[:n].tolist() == [256, *tokens[:-1]]
    assert not inputs[n:].any()
    assert not targets[n:].any()


@property_test
@given(st.integers(1, 60), st.sets(st.integers(0, 4), min_size=1), st.sampled_from([None, 1, 2]))
def test_some_rows_of_eval_batches(tokens, rows, limit):
    """They are those of the whole batch, and nothing else is read."""
    eval_set = EvalSet("val", stream_of(np.arange(tokens) % 256), 0, 256)
    rows = np.array(sorted(rows))
    whole = list(pipeline.eval_batches(eval_set, 3, 5, limit, True))
    some = list(pipeline.eval_batches(eval_set, 3, 5, limit, True, rows))
    assert len(some) == len(whole)
    for a, b in zip(some, whole):
        np.testing.assert_equal(a, {name: x[rows] for name, x in b.items()})
    total = sum(batch["weights"].sum() for batch in whole)
    assert pipeline.num_eval_tokens(eval_set, 3, 5, limit) == total


def test_a_process_reads_its_rows_alone(monkeypatch):
    eval_set = EvalSet("val", stream_of(np.arange(250)), 0, 256)
    read, real = [], eval_set.stream.read

    def counted(start, stop):
        read.append(stop - start)
        return real(start, stop)

    monkeypatch.setattr(type(eval_set.stream), "read", lambda self, *at: counted(*at))
    list(pipeline.eval_batches(eval_set, 5, 10, rows=np.array([3, 4])))
    assert read == [11] * 5


def test_eval_limit():
    eval_set = EvalSet("val", stream_of([7] * 100 + [256]), 100, 256)
    every = list(pipeline.eval_batches(eval_set, 8, 2))
    assert len(every) == 7
    for limit in (1, 3, 7, 100):
        some = list(pipeline.eval_batches(eval_set, 8, 2, limit))
        assert len(some) == min(limit, 7)
        for a, b in zip(some, every):
            np.testing.assert_equal(a, b)
    exact = EvalSet("val", stream_of([7] * 32), 32, 256)
    assert [b["weights"].sum() for b in pipeline.eval_batches(exact, 8, 2)] == [16, 16]


def test_throughput():
    """Far below the 4 M tokens/s of an idle core, as tests share theirs: catches a mistake."""
    dataset = pipeline.train_dataset(Concatenated(stream_of(np.zeros(10**6)), 128, 256), 0)
    iterator = pipeline.train_batches(dataset, 16, 0, 2, 8)
    next(iterator)
    start = time.process_time()
    for _ in range(200):
        next(iterator)
    assert 200 * 16 * 128 / (time.process_time() - start) > 300_000
