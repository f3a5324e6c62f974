"""Shards as one stream, and documents in windows: every token once, none lost."""

import itertools
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from data_helpers import raises, write_array_record, write_bin
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpt_jax.config import DataConfig
from ngpt_jax.data import corpus, packing, shards
from ngpt_jax.data.packing import BestFit, Concatenated, best_fit, document_lengths
from ngpt_jax.data.shards import TokenStream, open_bin, token_dtype
from ngpt_jax.data.tokenizers.load import load_tokenizer

property_test = settings(max_examples=100, deadline=None, derandomize=True)
EOD = 256
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 257, 3000)


class InMemory:
    """A shard that is an array."""

    name = "memory"

    def __init__(self, tokens):
        self.tokens = np.asarray(tokens, np.uint16)

    def __len__(self):
        return len(self.tokens)

    def read(self, start, stop):
        return self.tokens[start:stop]

    def fingerprint(self):
        return self.tokens.tobytes().hex()


def stream_of(*pieces, vocab_size=257):
    return TokenStream([InMemory(piece) for piece in pieces], vocab_size)


# -------------------------------------------------------------------------------------- shards


def test_token_dtype():
    assert token_dtype(257) == np.uint16
    assert token_dtype(2**16) == np.uint16
    assert token_dtype(2**16 + 1) == np.uint32


@property_test
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_a_stream_is_its_shards_in_a_row(sizes, data):
    whole = np.arange(sum(sizes))
    stream = stream_of(*np.split(whole, np.cumsum(sizes)[:-1]))
    assert len(stream) == len(whole)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    part = stream.part(start, stop)
    for some, expected in ((stream, whole), (part, whole[start:stop])):
        assert len(some) == len(expected)
        a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(expected))] * 2)))
        assert some.read(a, b).tolist() == expected[a:b].tolist()
        assert some.read(a, b).dtype == np.int32
        assert np.concatenate([[], *some.chunks()]).tolist() == expected.tolist()


def load(context=16, **fields):
    fields["cache"] = str(fields["cache"])
    config = DataConfig(**fields)
    return corpus.load_corpus(config, load_tokenizer(config), context)


LLM_C, LLM_C_32 = (20240520, 1), (20240801, 7)


@pytest.mark.parametrize(
    ("dtype", "header", "token_dtype"),
    [("<u2", None, None), ("<u2", None, "uint16"), ("<u4", None, "uint32"),
     ("<u2", LLM_C, None), ("<u4", LLM_C_32, None), ("<u4", LLM_C_32, "uint32")],
)  # fmt: skip
def test_bin_files_of_each_kind(tmp_path, dtype, header, token_dtype):
    write_bin(tmp_path / "train_0.bin", TOKENS[:2000], dtype, header)
    write_bin(tmp_path / "train_1.bin", TOKENS[2000:2900], dtype, header)
    write_bin(tmp_path / "val.bin", TOKENS[2900:], dtype, header)
    found = load(
        source="bin", paths=(str(tmp_path / "train_*.bin"),), token_dtype=token_dtype,
        eval_paths=(f"val={tmp_path}/val.bin",), cache=tmp_path / "cache",
    )  # fmt: skip
    window = found.train[""][1999 // 16]
    start = 1999 // 16 * 16
    assert window["inputs"].tolist() == TOKENS[start : start + 16].tolist()
    assert window["targets"].tolist() == TOKENS[start + 1 : start + 17].tolist()
    (val,) = found.held_out
    assert val.stream.read(0, len(val.stream)).tolist() == TOKENS[2900:].tolist()
    # Bytes that are no UTF-8 count as the character that stands for them, document by document.
    pieces = [[]]
    for token in TOKENS[2900:]:
        if token == EOD:
            pieces.append([])
        else:
            pieces[-1].append(token)
    decoded = "".join(bytes(p).decode("utf-8", "replace") for p in pieces)
    assert val.num_bytes == len(decoded.encode())


def test_bin_without_held_out_files(tmp_path):
    tokens = np.tile([*range(99), EOD], 30)
    file = write_bin(tmp_path / "t.bin", tokens)
    found = load(source="bin", paths=(str(file),), held_out=0.105, cache=tmp_path / "c")
    (held,) = found.held_out
    assert held.name == "held_out"
    assert found.tokens == 2600  # cut after the end of a document
    assert held.stream.read(0, 400).tolist() == tokens[2600:].tolist()


@pytest.mark.parametrize(
    ("name", "data", "fields", "message"),
    [
        ("a.bin", b"", {}, "a.bin' holds no tokens; drop it"),
        ("a.bin", b"123", {}, "size of .*a.bin', 3 bytes, is no multiple of 2 .uint16.; it is cut"),
        ("a.bin", b"123456", {"token_dtype": "uint32"}, "6 bytes, is no multiple of 4 .uint32"),
        ("a.txt", b"1234", {}, "a.txt' has none of the known suffixes .bin"),
        ("a.bin", b"\xff\xff" * 40, {}, "a.bin' has the token id 65535, but data.tokenizer knows"),
    ],
)
def test_bad_bin_files(tmp_path, name, data, fields, message):
    (tmp_path / name).write_bytes(data)
    with raises("data.*" + message):
        load(source="bin", paths=(str(tmp_path / name),), cache=tmp_path / "cache", **fields)
    assert not (tmp_path / "cache").exists()


def test_bad_headers(tmp_path):
    file = write_bin(tmp_path / "a.bin", TOKENS[:50], header=LLM_C)
    path = epath.Path(file)
    with raises("holds uint16, not token_dtype=uint32"):
        open_bin(path, "data.paths", "uint32", 257)
    file.write_bytes(file.read_bytes()[:-10])
    with raises("data.paths: .*a.bin' should hold 50 tokens but holds 45; it is cut"):
        open_bin(path, "data.paths", None, 257)
    write_bin(file, TOKENS[:50], header=(20240520, 3))
    with raises("has llm.c's header in version 3"):
        open_bin(path, "data.paths", None, 257)


def test_folders_with_held_out_bins(tmp_path):
    write_bin(tmp_path / "train.bin", TOKENS)
    val = write_bin(tmp_path / "val.bin", TOKENS[:100])
    with raises("data.paths: .*val.bin' looks like held-out data; give a glob without it, and"):
        load(source="bin", paths=(str(tmp_path),), cache=tmp_path / "c")
    with raises("data.eval_paths: .*val.bin' of 'val' is in data.paths too"):
        load(source="bin", paths=(str(tmp_path),), eval_paths=(f"val={val}",), cache=tmp_path / "c")


def test_a_bin_file_that_becomes_shorter(tmp_path):
    file = write_bin(tmp_path / "a.bin", TOKENS)
    found = load(source="bin", paths=(str(file),), cache=tmp_path / "c")
    with file.open("r+b") as f:
        f.truncate(100)
    with raises("data: .*a.bin' has become shorter; restore it"):
        found.train[""][100]


def test_threads_may_read_while_files_are_opened_and_dropped(tmp_path):
    shard = open_bin(epath.Path(write_bin(tmp_path / "a.bin", TOKENS)), "data.paths", None, 257)

    def read(_):
        shards._open_file.cache_clear()
        return shard.read(5, 50).tolist() == TOKENS[5:50].tolist()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(5000)))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_array_record_of_token_ids(tmp_path, dtype):
    documents = [RNG.integers(0, 257, n) for n in (1, 50, 3, 700, 1, 1, 40)]
    file = write_array_record(
        tmp_path / "a.array_record", [d.astype(dtype).tobytes() for d in documents]
    )
    config = {"source": "array_record", "token_dtype": dtype, "cache": tmp_path / "c"}
    found = load(paths=(str(file),), eval_paths=(), held_out=0.1, **config)
    whole = np.concatenate(documents)
    stream = found.train[""].stream
    assert len(stream) + len(found.held_out[0].stream) == len(whole)
    for start, stop in itertools.combinations((0, 1, 2, 50, 51, 54, 55, 300, len(stream)), 2):
        assert stream.read(start, stop).tolist() == whole[start:stop].tolist()
    again = load(paths=(str(file),), held_out=0.1, **config)  # the index is read from the cache
    assert again.fingerprint == found.fingerprint
    odd = write_array_record(tmp_path / "odd.array_record", [b"123"])
    with raises("data.paths: a record of .*odd.array_record' is no whole number of uint"):
        load(paths=(str(odd),), **config)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:50], lambda b: b[:-1] + b"x"])
def test_damaged_indices_are_made_anew(tmp_path, damage):
    file = tmp_path / "a.array_record"
    write_array_record(file, [np.full(n, 7, "<u4").tobytes() for n in (100, 300)])
    config = {
        "source": "array_record", "token_dtype": "uint32", "cache": tmp_path / "c",
        "paths": (str(file),),
    }  # fmt: skip
    first = load(**config)
    indices = list((tmp_path / "c/indices").glob("*/0.npy"))
    before = [index.read_bytes() for index in indices]
    for index in indices:
        index.write_bytes(damage(index.read_bytes()))
    again = load(**config)
    assert again.fingerprint == first.fingerprint
    assert [index.read_bytes() for index in indices] == before


def test_fingerprints_of_files_follow_the_content(tmp_path):
    def fingerprint(tokens, name="a.bin"):
        file = write_bin(tmp_path / name, tokens)
        return load(source="bin", paths=(str(file),), cache=tmp_path / "c").fingerprint

    changed = TOKENS.copy()
    changed[5] = (changed[5] + 1) % 257
    assert fingerprint(TOKENS) == fingerprint(TOKENS, "b.bin")
    assert len({fingerprint(TOKENS), fingerprint(changed), fingerprint(TOKENS[:-1])}) == 3


# ------------------------------------------------------------------------------------- packing

documents_of_tokens = st.lists(st.lists(st.integers(0, 9), max_size=30), min_size=1, max_size=30)


def joined(documents):
    return [i for d in documents for i in [*d, EOD]]


@property_test
@given(documents_of_tokens, st.integers(1, 12), st.booleans())
def test_concatenated_windows(documents, context, masked):
    tokens = joined(documents)
    windows = Concatenated(stream_of(tokens), context, EOD, masked)
    assert len(windows) == (len(tokens) - 1) // context
    number = np.cumsum([0, *(t == EOD for t in tokens)])  # of the document of each token
    for i in range(len(windows)):
        start = i * context
        window = windows[i]
        assert window["inputs"].tolist() == tokens[start : start + context]
        assert window["targets"].tolist() == tokens[start + 1 : start + context + 1]
        assert ("segment_ids" in window) == masked
        if masked:  # inputs of one segment are those whose targets are of one document
            ids = window["segment_ids"]
            of_target = number[start + 1 : start + context + 1]
            assert (np.diff(ids) != 0).tolist() == (np.diff(of_target) != 0).tolist()
            expected = [j - ids.tolist().index(i) for j, i in enumerate(ids)]
            assert window["positions"].tolist() == expected
    if not len(windows):
        with raises(f"model.context = {context} needs a training text of {context + 1} tokens"):
            packing.check_sequences(windows, stream_of(tokens), context)


def test_document_lengths(monkeypatch):
    documents = [[1], [], [2, 3], [4] * 50]
    expected = [2, 1, 3, 51]
    for chunk in (1, 3, 2**20):
        monkeypatch.setattr(shards, "_TOKENS_AT_ONCE", chunk)
        assert document_lengths(stream_of(joined(documents)), EOD).tolist() == expected
        unfinished = stream_of([*joined(documents), 5, 6])
        assert document_lengths(unfinished, EOD).tolist() == [*expected, 2]


def plain_best_fit(lengths, context):
    """Rooms left after best-fit decreasing, one piece at a time."""
    rooms = []
    for length in sorted((n % context for n in lengths if n % context), reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            best = min(fitting, key=lambda i: rooms[i])
            rooms[best] -= length
        else:
            rooms.append(context - length)
    return sorted(rooms)


@property_test
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 12))
def test_best_fit_is_that_of_one_at_a_time(lengths, context):
    index = best_fit(np.array(lengths), context)
    covered = np.zeros(sum(lengths), int)
    for start, length in zip(index.starts, index.lengths):
        covered[start : start + length] += 1
    assert (covered == 1).all()
    filled = np.add.reduceat(index.lengths, index.offsets[:-1])
    assert filled.max() <= context
    whole = sum(n // context for n in lengths)
    assert sorted(context - filled) == sorted([0] * whole + plain_best_fit(lengths, context))


@property_test
@given(documents_of_tokens, st.integers(1, 12), st.booleans())
def test_best_fit_windows(documents, context, masked):
    """Each token is a target once, predicted from the one before it in its document or an EOD."""
    tokens = joined(documents)
    stream = stream_of(tokens)
    windows = BestFit(
        stream, context, EOD, best_fit(document_lengths(stream, EOD), context), masked
    )
    pairs = []
    for window in map(windows.__getitem__, range(len(windows))):
        real = window["weights"] == 1
        assert set(window["weights"]) <= {0.0, 1.0}
        assert not np.diff(real.astype(int)).max(initial=0) > 0  # padding at the end alone
        pairs += zip(window["inputs"][real].tolist(), window["targets"][real].tolist())
        if masked:
            ids = window["segment_ids"]
            assert (ids[~real] == 0).all()
            assert (ids[real] > 0).all()
            expected = [j - ids.tolist().index(i) for j, i in enumerate(ids[real])]
            assert window["positions"][real].tolist() == expected
            starts = np.flatnonzero(np.diff(ids[real], prepend=0))
            assert (np.diff(ids[real]) >= 0).all()
            at = [pairs[len(pairs) - real.sum() + s][0] for s in starts]
            short = [i for i in at if i != EOD]
            assert len(short) <= 1 or max(map(len, documents)) + 1 > context
    assert sorted(pairs) == sorted(zip([EOD, *tokens[:-1]], tokens))


def test_best_fit_through_the_config(tmp_path):
    tokens = np.array(joined(RNG.integers(0, 9, n).tolist() for n in RNG.integers(0, 60, 200)))
    file = write_bin(tmp_path / "a.bin", tokens)
    fields = {"source": "bin", "paths": (str(file),), "cache": tmp_path / "c"}
    found = load(packing="best_fit", mask_documents=True, **fields)
    windows = found.train[""]
    room = len(windows) * 16
    assert found.tokens <= room < found.tokens * 1.02
    assert {"inputs", "targets", "weights", "segment_ids", "positions"} == set(windows[0])
    again = load(packing="best_fit", **fields).train[""]
    np.testing.assert_array_equal(again[3]["targets"], windows[3]["targets"])


def test_mixtures_are_checked(tmp_path):
    from ngpt_jax.config.experiment import load_config

    def config(*overrides):
        given = [item.split("=", 1) for item in overrides]
        spec = "experiments/quickstart.py:debug"
        return load_config(spec, [("data.source", "mixture"), *map(tuple, given)])

    web = ("data.mixture.web.source=bin", "data.mixture.web.paths=x.bin")
    assert config(*web).data.mixture["web"].weight == 1.0
    for overrides, message in [
        ((), "data.source=mixture needs sources, e.g."),
        ((*web, "data.mixture.web.weight=0"), "data.mixture.web.weight must be positive"),
        ((*web, "data.paths=x"), "data.paths is not read where data.source=mixture"),
        (("data.mixture.web.source=mixture",), "data.mixture.web.source must be one of"),
        (("data.mixture.web.source=text",), "data.mixture.web.source=text needs"),
        (("data.mixture.web.sorce=bin",), r"Unknown field --config.data.mixture.web.sorce"),
        ((*web, "data.mixture.web.text_key=x"), "data.mixture.web.text_key is for .*text, tfds"),
        ((*web, "data.mixture.web.token_dtype=int8"), "token_dtype must be one of uint16, uint32"),
    ]:
        with raises(re.escape(message) if "--" in message else message):
            config(*overrides)


def test_few_files_are_open(tmp_path):
    """As many as "ulimit -n 256" allows, whatever the number of shards."""
    before = len(os.listdir("/proc/self/fd"))
    for i in range(150):
        file = write_bin(tmp_path / f"{i}.bin", TOKENS[:20])
        open_bin(epath.Path(file), "data.paths", None, 257).read(0, 9)
    assert len(os.listdir("/proc/self/fd")) - before <= 64
