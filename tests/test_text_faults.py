"""Text that is whole though it looks damaged, and damaged text: errors that say where."""

import contextlib
import gzip
import itertools
import json
import os
import re
import time

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from data_helpers import (
    documents,
    json_lines,
    raises,
    text_config,
    write,
    write_array_record,
    write_bin,
    write_parquet,
)
from pyarrow import parquet
from test_prepare import contents, load, run, tokens_of

from ngpt_jax import terminal as terminal_lib
from ngpt_jax.config import DataConfig
from ngpt_jax.data.preparing import progress as progress_lib
from ngpt_jax.data.preparing import tokenize
from ngpt_jax.data.preparing.folder import Stopped
from ngpt_jax.data.tokenizers.base import ByteTokenizer
from ngpt_jax.terminal import Terminal

TEXTS = [f"document {i} of some words\nand more é\n" for i in range(60)]


class Said(Terminal):
    """Plain output that is remembered."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def say(self, text):
        self.lines.append(text)
        self._told = time.monotonic()


# ----------------------------------------------------------------------------------- packed files


def zst(data, window_log=31, level=3, **options):
    how = zstandard.ZstdCompressionParameters.from_level(level, window_log=window_log, **options)
    packer = zstandard.ZstdCompressor(compression_params=how).compressobj()
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize("name", ["x.jsonl.zst", "x.txt.zst"])
@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_zst_of_any_window(tmp_path, name, window_log):
    raw = (json_lines(*TEXTS) if "jsonl" in name else "".join(TEXTS)).encode()
    expected = TEXTS if "jsonl" in name else ["".join(TEXTS)]
    whole = zst(raw, window_log)
    half = raw.index(b"\n", len(raw) // 2) + 1
    frames = zst(raw[:half], window_log) + zst(raw[half:], 10)  # of two windows
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"  # as of pzstd
    for data in (whole, frames, skippable + whole):
        (tmp_path / name).write_bytes(data)
        assert documents(text_config(tmp_path / name))[0] == expected
    (tmp_path / name).write_bytes(whole[:-9])
    with raises("data.paths: cannot read .*cut short; if zstd -t --long=31 finds it whole, unpack"):
        documents(text_config(tmp_path / name))


def test_zst_that_unpacks_to_much_takes_little_memory(tmp_path):
    (tmp_path / "x.jsonl.zst").write_bytes(
        zst((b" " * 2**20 + b"\n") * 512 + json_lines("a", "b").encode(), 17)
    )
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert documents(text_config(tmp_path / "x.jsonl.zst"))[0] == ["a", "b"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


def test_zst_that_needs_a_dictionary_is_told_how_to_be_unpacked(tmp_path):
    samples = [json_lines(t, str(i) * 9).encode() for i, t in enumerate(TEXTS * 20)]
    dictionary = zstandard.train_dictionary(1024, samples)
    packed = zstandard.ZstdCompressor(dict_data=dictionary).compress(json_lines(*TEXTS).encode())
    (tmp_path / "x.jsonl.zst").write_bytes(packed)
    with raises("cannot read .*x.jsonl.zst': .*ictionary.*; if zstd -t --long=31 finds it whole"):
        documents(text_config(tmp_path / "x.jsonl.zst"))


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.txt.gz"])
def test_gz_of_several_members(tmp_path, name):
    raw = (json_lines(*TEXTS) if "jsonl" in name else "".join(TEXTS)).encode()
    expected = TEXTS if "jsonl" in name else ["".join(TEXTS)]
    parts = [raw[i : i + 100] for i in range(0, len(raw), 100)]  # a cut may split a letter
    packed = b"".join(map(gzip.compress, parts))
    for data in (packed, gzip.compress(b"") + packed, packed + bytes(512)):  # padded as on tapes
        (tmp_path / name).write_bytes(data)
        assert documents(text_config(tmp_path / name))[0] == expected
    for cut in (1, 8, 12, len(packed)):
        (tmp_path / name).write_bytes(packed[:-cut])
        with raises("data.paths: cannot read .*; if gzip -t finds it whole, unpack it; else mend"):
            documents(text_config(tmp_path / name))


# ---------------------------------------------------------------------------------------- parquet


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(),
        pa.binary_view(), pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)  # fmt: skip
def test_parquet_of_every_kind_of_string(tmp_path, kind):
    texts = ["one é", None, "", "two", " \n", "one é"]
    plain = pa.array(texts, kind.value_type if pa.types.is_dictionary(kind) else kind)
    column = plain.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else plain
    parquet.write_table(pa.table({"text": column, "n": range(6)}), tmp_path / "x.parquet")
    assert documents(text_config(tmp_path / "x.parquet"))[0] == ["one é", "two", "one é"]


@pytest.mark.parametrize(
    "values",
    [[1, 2], [["a"], ["b"]], [{"a": "b"}], [1.5], [True], pa.array([b"ab"], pa.binary(2)),
     pa.array([1, 2]).dictionary_encode()],
    ids=list("abcdefg"),
)  # fmt: skip
def test_parquet_of_what_is_no_string(tmp_path, values):
    file = write_parquet(tmp_path / "x.parquet", text=values)
    with raises("data.paths: .*x.parquet': column 'text' holds .*, not strings; set data.tex"):
        documents(text_config(file))


def test_parquet_of_nulls_alone(tmp_path):
    """One such shard among others is read; alone it is no text."""
    write_parquet(tmp_path / "d/a.parquet", text=pa.nulls(3))
    with raises("data.paths: there is no text"):
        run(text_config(tmp_path / "d"), tmp_path / "o")
    write_parquet(tmp_path / "d/b.parquet", text=TEXTS)
    assert documents(text_config(tmp_path / "d"))[0] == TEXTS


def test_parquet_with_two_columns_of_one_name(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "x.parquet")
    with raises("has several columns 'text'; rename all but one"):
        documents(text_config(tmp_path / "x.parquet"))


# -------------------------------------------------------------------------------- null and blank


def with_gaps(folder, kind):
    texts = [None, *TEXTS[:30], "", " \n\t", *TEXTS[30:], None]
    if kind == "parquet":
        write_parquet(folder / "x.parquet", text=texts)
    elif kind == "array_record":
        folder.mkdir()
        write_array_record(folder / "x", [(t or "").encode() for t in texts])
    else:
        write(folder / f"x.{kind}", "".join(json.dumps({"text": t}) + "\n" for t in texts))
    source = "array_record" if kind == "array_record" else "text"
    return DataConfig(source=source, paths=(str(folder),))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "array_record"])
def test_documents_without_text_are_left_out_and_counted(tmp_path, kind):
    config, said = with_gaps(tmp_path / "in", kind), Said()
    made = run(config, tmp_path / "out", terminal=said)
    assert made.empty == 4
    assert said.lines[-1] == "left out 4 documents without text (null or blank)"
    assert sum(facts.documents for facts in made.sets.values()) == 60
    assert run(config, tmp_path / "out", terminal=said) == made
    plain = tmp_path / "plain"
    made = run(text_config(write(tmp_path / "p/x.jsonl", json_lines(*TEXTS))), plain)
    assert made.empty == 0
    assert np.array_equal(tokens_of(tmp_path / "out", "train"), tokens_of(plain, "train"))


def test_blank_text_files_are_counted(tmp_path):
    write(tmp_path / "in/a.txt", " \n")
    write(tmp_path / "in/b.txt", "")
    write(tmp_path / "in/c.jsonl", json_lines(*TEXTS))
    assert run(text_config(tmp_path / "in"), tmp_path / "out").empty == 2


def test_null_is_no_reason_to_stop_but_a_number_is(tmp_path):
    file = write(tmp_path / "x.jsonl", '{"text": null}\n{"text": 5}\n')
    with raises("line 2 has 'text' of type int, not str"):
        documents(text_config(file))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_count_outlives_a_stop(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(tokenize, "_CHARACTERS_AT_ONCE", 100)
    config = with_gaps(tmp_path / "in", kind)
    whole = run(config, tmp_path / "whole", shard_tokens=300)
    stops = 0
    while not (tmp_path / "cut/manifest.json").exists():
        calls = itertools.count()
        with contextlib.suppress(Stopped):
            run(config, tmp_path / "cut", shard_tokens=300, stopped=lambda c=calls: next(c) == 4)
        stops += 1
    assert stops > 3
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert whole.empty == 4


# ------------------------------------------------------------------------------- what is not UTF-8


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_a_bad_byte_is_told_with_its_line(tmp_path, packed):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[packed]
    lines = json_lines(*TEXTS * 900).encode()  # more than a buffer
    bad = lines + b'{"text": "caf\xe9"}\n' + lines
    (tmp_path / f"x.jsonl{packed}").write_bytes(pack(bad))
    with raises(
        rf"data.paths: .*x.jsonl{packed}', line 54001 is not UTF-8 \(byte 0xe9 at offset"
        rf" {len(lines) + 13:,} of the text\); mend that line, or convert the file if all"
    ):
        documents(text_config(tmp_path / f"x.jsonl{packed}"))
    text = b"one\r\ntwo\rthree\n\xc3\xa9 then \xc3\x28\n"
    (tmp_path / f"y.txt{packed}").write_bytes(pack(text))
    with raises(rf"y.txt{packed}', line 4 is not UTF-8 \(byte 0xc3 at offset 23 of the text\)"):
        documents(text_config(tmp_path / f"y.txt{packed}"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("é\nx".encode("utf-16"), "is not UTF-8 but UTF-16; convert it to UTF-8"),
        ("é\nx".encode("utf-16-be").join([b"\xfe\xff", b""]), "is not UTF-8 but UTF-16"),
        (b"\xef\xbb\xbfa\n\xff", r"line 2 is not UTF-8 \(byte 0xff at offset 5"),
        (b"a\nb\xe2\x82", r"line 2 is not UTF-8 \(byte 0xe2 at offset 3"),  # cut within a letter
        (b"\xed\xa0\x80", r"line 1 is not UTF-8 \(byte 0xed at offset 0"),  # half a pair
    ],
)
def test_other_bytes_that_are_not_utf8(tmp_path, data, message):
    (tmp_path / "x.txt").write_bytes(data)
    with raises(f"data.paths: .*x.txt'.*{message}"):
        documents(text_config(tmp_path / "x.txt"))


@pytest.mark.parametrize("kind", [pa.string(), pa.binary(), pa.string_view()], ids=str)
def test_a_bad_byte_of_parquet_is_told_with_its_row(tmp_path, kind):
    values = [*(t.encode() for t in TEXTS * 9), b"caf\xe9"]
    column = pa.array(values, pa.binary())
    if kind != pa.binary():
        column = column.view(pa.string()) if kind == pa.string() else column.cast(kind, safe=False)
    parquet.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    with raises(
        r"x.parquet', row 541 of column 'text' is not UTF-8 \(byte 0xe9 at offset 3\); mend that"
    ):
        documents(text_config(tmp_path / "x.parquet"))


def test_a_bad_byte_of_array_record_is_told_with_its_record(tmp_path):
    file = write_array_record(tmp_path / "x", [b"good"] * 300 + [b"ab\xff"])
    with raises(r"x', record 301 is not UTF-8 text \(byte 0xff at offset 2\); set data.token_dty"):
        documents(DataConfig(source="array_record", paths=(str(file),)))


# ------------------------------------------------------------------------------ long work is told


def test_a_long_document_is_told_while_it_is_tokenized(tmp_path, monkeypatch):
    monkeypatch.setattr(progress_lib, "_LONG", 0.3)
    monkeypatch.setattr(terminal_lib, "_SILENCE", 0.3)
    monkeypatch.setattr(tokenize, "_CHARACTERS_AT_ONCE", 2**10)
    write(tmp_path / "a.txt", "word\n" * 2**17)
    real = ByteTokenizer.encode_batch

    def slow(self, texts):
        time.sleep(2)
        return real(self, texts)

    monkeypatch.setattr(ByteTokenizer, "encode_batch", slow)
    said = Said()
    run(text_config(tmp_path / "a.txt"), tmp_path / "out", terminal=said)
    told = [line for line in said.lines if "tokenizing a document of 0.7 million char" in line]
    assert len(told) >= 2, said.lines
    assert re.fullmatch(
        r"preparing tokens +\d+%  tokenizing a document of .* characters for \d:\d\d", told[0]
    )


def test_silence_never_lasts_ten_seconds():
    assert progress_lib._LONG < 10 and terminal_lib._SILENCE + 0.5 < 10


def test_long_reading_and_hashing_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(progress_lib, "_LONG", 0.2)
    monkeypatch.setattr(terminal_lib, "_SILENCE", 0.2)
    said = Said()
    with progress_lib.Progress("verifying shards", said) as progress:
        progress.doing("hashing train-00000.bin")
        time.sleep(1.2)
    count = len(said.lines)
    assert said.lines[-1] == "verifying shards  hashing train-00000.bin for 0:01"
    time.sleep(1)
    assert len(said.lines) == count  # the thread has ended


# ----------------------------------------------------------------------------------- what is kept


def test_an_index_is_not_kept_for_a_file_that_changed_inside(tmp_path):
    """The size, the first and the last MiB and the time of change are as before."""
    tokens = np.full(2_000_000, 65, "<u2")
    tokens[::500] = 256

    def opened():
        fields = {"source": "bin", "packing": "best_fit", "cache": str(tmp_path / "c")}
        return load(paths=(str(file),), held_out=0.5, **fields)

    file = write_bin(tmp_path / "a.bin", tokens)
    before, stat = opened(), os.stat(file)
    for start in (900_000, 1_100_000):  # to train on, held out
        tokens[start : start + 80_000 : 7] = 256
    write_bin(tmp_path / "a.bin", tokens)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert os.stat(file).st_mtime_ns == stat.st_mtime_ns
    after = opened()
    assert len(after.train[""].index.starts) > len(before.train[""].index.starts)
    assert after.held_out[0].num_bytes < before.held_out[0].num_bytes


# ----------------------------------------------------------------------- folders of Hive, the cache


def test_paths_of_hive(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for lang in ("en", "de"):
        for split in ("train", "val"):
            name = f"data/lang={lang}/split={split}/part=0.jsonl"
            write(tmp_path / name, json_lines(f"{lang} {split}", "x"))
    train = "data/lang=en/split=train"
    for held in (
        "val=data/lang=en/split=val", "val=data/lang=*/split=val/*.jsonl",
        " val = data/lang=en/split=val/part=0.jsonl", f"val={tmp_path}/data/lang=en/split=val",
    ):  # fmt: skip
        texts, sets = documents(text_config(train, eval_paths=(held,)))
        assert texts == ["en train", "x"]
        assert sets["val"][0] in ("en val", "de val") and list(sets) == ["val"]
    assert len(documents(text_config("data/lang=*/split=train"))[0]) == 4
    monkeypatch.chdir(tmp_path / "data")
    for held in ("lang=en/split=val", "lang=en/split=val/*.jsonl", "./lang=en/split=val"):
        with raises(
            f"data.eval_paths: '{re.escape(held)}' is a path without a name; put one before it,"
            f" e.g. val={re.escape(held)}"
        ):
            documents(text_config("lang=en/split=train", eval_paths=(held,)))


def test_a_cache_that_cannot_be_used(tmp_path, monkeypatch):
    text = write(tmp_path / "a.jsonl", json_lines(*TEXTS))
    (tmp_path / "file").write_text("x")

    def refused(cache):
        with raises("") as error:
            load(source="text", paths=(str(text),), cache=str(cache))
        assert not re.search("[0-9a-f]{32}", str(error.value))
        return str(error.value)

    for cache in (tmp_path / "file", tmp_path / "file/below"):
        assert refused(cache) == (
            f"data.cache = '{cache}': '{tmp_path}/file' is no folder; give another."
        )
    with monkeypatch.context() as patch:  # root may write everywhere
        patch.setattr(os, "access", lambda path, mode: False)
        assert refused(tmp_path / "c/d") == (
            f"data.cache = '{tmp_path}/c/d' cannot be written: '{tmp_path}' is read-only for this"
            " user; give another folder."
        )
    assert refused("/proc/x/y").startswith("data.cache = '/proc/x/y' cannot be written: ")
    with monkeypatch.context() as patch:

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        patch.setattr(os, "fsync", full)
        wanted = f"data.cache = '{tmp_path}/c' cannot be written: No space left on device; give"
        assert refused(tmp_path / "c").startswith(wanted)
    load(source="text", paths=(str(text),), cache=str(tmp_path / "c"))
    tokens = write_bin(tmp_path / "a.bin", np.arange(5000) % 256)
    with monkeypatch.context() as patch, raises(wanted.replace("/c'", "/d'")):
        patch.setattr(os, "fsync", full)
        load(source="bin", paths=(str(tokens),), packing="best_fit", cache=str(tmp_path / "d"))
