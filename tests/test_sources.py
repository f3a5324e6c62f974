"""Documents: where they come from, in which order, and what bad files are told."""

import dataclasses
import gzip
import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from data_helpers import (
    ROOT,
    documents,
    json_lines,
    raises,
    text_config,
    write,
    write_array_record,
    write_parquet,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpt_jax.config import DataConfig, SourceConfig
from ngpt_jax.config.sources import SOURCES
from ngpt_jax.data.list_files import find_files
from ngpt_jax.data.text import held_out, sources
from ngpt_jax.data.text.held_out import choose_split
from ngpt_jax.data.text.stdlib import stdlib_files, stdlib_texts

property_test = settings(max_examples=60, deadline=None, derandomize=True)


def utf8_size(texts):
    return sum(len(text.encode()) for text in texts)


def test_each_source_is_in_the_table():
    """Text has a function that opens it; bin holds tokens."""
    assert {*sources.OPENERS, "bin"} == SOURCES.keys()
    fields = {field.name for field in dataclasses.fields(SourceConfig)}
    assert all(fields.issuperset(source.reads.split()) for source in SOURCES.values())


# -------------------------------------------------------------------------------------- stdlib


def fake_stdlib(root):
    for name, text in {
        "ast.py": "a" * 500,
        "json/__init__.py": "j" * 20,
        "json/decoder.py": "naïve = '\xe9'\r\n",
        "json/empty.py": "\n",
        "abc.py": "b" * 500,
        "os.py": "o" * 500,
        "unittest/case.py": "u" * 500,
        "unittest/test/test_case.py": "skipped",
        "json/tests/x.py": "skipped",
        "json/__pycache__/x.py": "skipped",
        "ctypes/macholib/dyld.py": "skipped",
        "test/test_json.py": "skipped",
        "site-packages/json/x.py": "skipped",
        "config-3.11-x86_64-linux-gnu/python-config.py": "skipped",
        "_sysconfigdata__linux_x86_64-linux-gnu.py": "skipped",
        "sitecustomize.py": "skipped",
        "not_of_python.py": "skipped",
        "json/notes.txt": "skipped",
    }.items():
        write(root / name, text)
    write(root / "latin1.py", "skipped: not a module of Python's")
    (root / "enum.py").write_bytes(b"caf\xe9 = 1\n")
    outside = write(root.parent / "outside" / "secret.py", "skipped")
    (root / "re.py").symlink_to(outside)
    (root / "email").symlink_to(outside.parent)


def test_stdlib_files_and_split(tmp_path):
    fake_stdlib(tmp_path / "lib")
    texts = stdlib_texts(tmp_path / "lib", 0.3)
    assert list(texts) == ["train", "stdlib"]
    both = [*texts["train"], *texts["stdlib"]]
    expected = [c * 500 for c in "abou"] + ["j" * 20, "naïve = '\xe9'\n", "caf\ufffd = 1\n"]
    assert sorted(both) == sorted(expected)
    assert 0.2 < utf8_size(texts["stdlib"]) / utf8_size(both) < 0.4
    as_read = [c for c in ["b" * 500, "a" * 500, "caf\ufffd = 1\n"] if c in texts["train"]]
    assert texts["train"][: len(as_read)] == as_read  # sorted by path


def test_stdlib_of_this_python():
    train, held_sets = documents(DataConfig())
    held = held_sets["stdlib"]
    total = utf8_size(train) + utf8_size(held)
    assert total > 6_000_000
    assert abs(utf8_size(held) / total - 0.05) < 0.005
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = {}  # text -> modules that have it
    for file in stdlib_files(root):
        text = file.read_text(encoding="utf-8", errors="replace")
        modules.setdefault(text, set()).add(file.relative_to(root).parts[0])
    train_modules, held_modules = (
        set.union(*(modules[text] for text in side if len(modules[text]) == 1))
        for side in (train, held)
    )
    assert not train_modules & held_modules
    if sys.version_info < (3, 14):  # a module that moved over would have been trained on
        assert {"json", "logging", "collections", "operator.py"} <= held_modules
        assert {"asyncio", "typing.py", "argparse.py"} <= train_modules


@pytest.mark.parametrize("share", [0.001, 0.2, 0.999])
def test_stdlib_keeps_both_sides(tmp_path, share):
    fake_stdlib(tmp_path / "lib")
    texts = stdlib_texts(tmp_path / "lib", share)
    assert texts["train"]
    assert texts["stdlib"]


def test_stdlib_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python311.zip")})
    with raises("no source files.*data.source=text"):
        documents(DataConfig())


# ---------------------------------------------------------------------------------------- text


def test_text_files_of_each_kind(tmp_path):
    write(tmp_path / "d" / "b.txt", "\ufeffBé\r\ntwo\n")
    write(tmp_path / "d" / "a.jsonl", json_lines("one", " \n", "", "two") + "\n")
    write(tmp_path / "d" / "sub" / "C.TXT.gz", "gz")
    write(tmp_path / "d" / "sub" / "d.jsonl.gz", json_lines("x\u2028y", "\ud800!"))
    write(tmp_path / "d" / "e.jsonl.txt", "{plain}")
    write(tmp_path / "d" / "f.jsonl.zst", json_lines("zst", "zst2"))
    write(tmp_path / "d" / "g.txt.zst", "zst3")
    write_parquet(tmp_path / "d" / "h.parquet", text=["row", None, " ", "row2"], n=[1, 2, 3, 4])
    write(tmp_path / "d" / ".hidden.txt", "no")
    write(tmp_path / "d" / ".git" / "f.txt", "no")
    write(tmp_path / "d" / "README.md", "no")
    write(tmp_path / "d" / "blank.txt", " \n")
    (tmp_path / "d" / "loop").symlink_to(tmp_path / "d")
    val = write(tmp_path / "val.txt", "val")
    held = {"eval_paths": (f"v={val}", f" w = {tmp_path / 'd' / 'sub'}/../../val.t?t")}

    def train(*paths):
        texts, held_out = documents(text_config(*paths, **held))
        assert held_out == {"v": ["val"], "w": ["val"]}
        return texts

    packed = ["zst", "zst2", "zst3", "row", "row2"]
    below = ["one", "two", "Bé\ntwo\n", "{plain}", *packed, "gz", "x\u2028y", "\ud800!"]
    assert train(tmp_path / "d") == below
    assert train(tmp_path / "d" / "*.txt") == ["Bé\ntwo\n", "{plain}"]
    assert train(tmp_path / "d" / "s*", tmp_path / "d" / "?.txt") == [*below[9:], "Bé\ntwo\n"]
    assert train(tmp_path / "d" / "b.txt", tmp_path / "d") == [below[2], *below[:2], *below[3:]]
    write(tmp_path / "[1].txt", "not a glob")
    assert train(tmp_path / "[1].txt") == ["not a glob"]


def test_home_and_text_key(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "x.jsonl", json_lines("a", "b", key="body"))
    assert documents(text_config("~/x.jsonl", text_key="body")) == (["a", "b"], {})


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.jsonl", '{"text": "a"}\n\n{"text": \n', r"x.jsonl', line 3 is not JSON"),
        ("x.jsonl", "[" * 100_000 + "\n", r"x.jsonl', line 1 is not JSON"),
        ("x.jsonl", '{"text": "a"}\n[1]\n', r"x.jsonl', line 2 is not a JSON object"),
        ("x.jsonl", '{"body": "a", "id": 1}\n', r"has no 'text' but 'body', 'id'; set data.t"),
        ("x.jsonl.gz", '{"text": 5}\n', r"line 1 has 'text' of type int, not str"),
        ("x.md", "a", r"x.md' has none of the known suffixes .txt, .txt.gz, .txt.zst, .jsonl"),
    ],
)
def test_bad_text_file(tmp_path, name, data, message):
    path = write(tmp_path / name, data)
    with raises("data.paths: .*" + message):
        documents(text_config(path))
    good = write(tmp_path / "good.txt", "good\n")
    with raises("data.eval_paths: .*" + message):
        documents(text_config(good, eval_paths=(f"val={path}",)))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("latin.txt", b"caf\xe9", "latin.txt', line 1 is not UTF-8 .byte 0xe9 at offset 3"),
        ("fake.txt.gz", b"plain", "cannot read .*fake.txt.gz'"),
        (
            "cut.txt.gz",
            gzip.compress(b"plain" * 99, mtime=0)[:-9],
            "cannot read .*cut.txt.gz'",
        ),
        ("fake.jsonl.zst", b"plain", "cannot read .*fake.jsonl.zst'"),
        ("fake.parquet", b"plain", "fake.parquet' cannot be read"),
        ("empty.parquet", b"", "empty.parquet' cannot be read"),
    ],
)
def test_unreadable_text_file(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with raises("data.paths: .*" + message):
        documents(text_config(tmp_path / name))


def test_bad_parquet_columns(tmp_path):
    file = write_parquet(tmp_path / "x.parquet", body=["a"], n=[1])
    with raises("data.paths: .* has no column 'text' but 'body', 'n'; set data.text_key"):
        documents(text_config(file))
    with raises("column 'n' holds int64, not strings; set data.text_key"):
        documents(text_config(file, text_key="n"))


def test_paths_without_files(tmp_path):
    with raises("data.paths: there is no file or folder '.*gone.txt'; check"):
        documents(text_config(tmp_path / "gone.txt"))
    with raises(r"data.paths: no file matches '.*x\*.txt'; check"):
        documents(text_config(tmp_path / "x*.txt"))
    with raises("data.paths: there is no .txt, .* file below the folder"):
        documents(text_config(tmp_path))
    with raises("data.paths: there is no file or folder ''"):
        documents(text_config(""))
    with raises("data.paths is empty"):
        documents(text_config())


def test_bad_eval_paths(tmp_path):
    a, b = write(tmp_path / "a.txt", "a\n"), write(tmp_path / "b.txt", "b\n")
    for item in ("val", f"={b}", "val=", "", f"a/b={b}", f"train={b}"):
        with raises("data.eval_paths must be name=path, got " + re.escape(repr(item))):
            documents(text_config(a, eval_paths=(item,)))
    with raises("data.eval_paths: two sets are called 'v'"):
        documents(text_config(a, eval_paths=(f"v={b}", f"v={b}")))
    with raises("data.eval_paths: .*b.txt' of 'v' is in data.paths too"):
        documents(text_config(tmp_path, eval_paths=(f"v={b}",)))
    with raises("data.eval_paths: there is no file"):
        documents(text_config(a, eval_paths=("v=gone.txt",)))


def linked(tmp_path):
    """d holds the folder a, a link to a folder elsewhere, circles, and files of other kinds."""
    write(tmp_path / "d/a/x.jsonl", json_lines("a1", "a2"))
    write(tmp_path / "disk2/b/sub/y.jsonl", json_lines("b1"))
    write(tmp_path / "disk2/c.jsonl", json_lines("c1"))
    (tmp_path / "d/b").symlink_to(tmp_path / "disk2/b")
    (tmp_path / "d/0").symlink_to(tmp_path / "d")
    (tmp_path / "disk2/b/sub/back").symlink_to(tmp_path / "d")
    (tmp_path / "d/twice").symlink_to(tmp_path / "d/a")
    (tmp_path / "d/c.jsonl").symlink_to(tmp_path / "disk2/c.jsonl")
    return tmp_path / "d"


@pytest.mark.parametrize("pattern", ["", "*", "**", "**/*", "**/*.jsonl", "../d/**/**", "./*"])
def test_links_to_folders_are_followed(tmp_path, pattern):
    folder = linked(tmp_path)
    texts, _ = documents(text_config(folder / pattern))
    assert sorted(texts) == ["a1", "a2", "b1", "c1"]


def test_links_do_not_change_how_a_folder_of_files_is_read(tmp_path):
    """The names of files are in fingerprints of prepared text: they stay those without links."""
    folder = linked(tmp_path)
    files, _ = find_files([str(folder)], "data.paths", (".jsonl",))
    names = [str(file.relative_to(folder)) for file in files]
    assert names == ["a/x.jsonl", "b/sub/y.jsonl", "c.jsonl"]


@pytest.mark.parametrize("pattern", ["", "*", "**"])
def test_files_that_are_left_out_are_named(tmp_path, pattern):
    write(tmp_path / "d/a.jsonl", json_lines("a"))
    write(tmp_path / "d/README.md", "no")
    write(tmp_path / "d/.b.jsonl", json_lines("b"))
    write(tmp_path / "d/sub/config.json", '{"n": 1}')
    write(tmp_path / "d/sub/pretty.json", json.dumps({"text": "no"}, indent=1))
    (tmp_path / "d/gone").symlink_to(tmp_path / "nowhere")
    for i in range(3):
        write(tmp_path / f"d/z{i}.csv", "no")
    config = text_config(tmp_path / "d" / pattern, eval_paths=(f"v={tmp_path}/e",))
    write(tmp_path / "e/v.txt", "v")
    write(tmp_path / "e/v.doc", "no")
    assert documents(config) == (["a"], {"v": ["v"]})
    hidden = "" if pattern == "**" else ".*b.jsonl"
    of_train, of_held_out = sources.open_source(config).left_out
    assert of_held_out == f"data.eval_paths leaves out 1 file or hidden folder: {tmp_path}/e/v.doc"
    assert of_train.startswith("data.paths leaves out 8 files or hidden folders: ")
    assert of_train.endswith(", ...")
    assert re.search(hidden, of_train)
    assert sources.open_source(text_config(tmp_path / "d/a.jsonl")).left_out == []
    assert sources.open_source(text_config(tmp_path / "d/*.jsonl")).left_out == []


def test_lines_of_json_under_other_names(tmp_path):
    write(tmp_path / "d/a.ndjson", json_lines("a"))
    write(tmp_path / "d/b.json", json_lines("b", "b2"))
    write(tmp_path / "d/c.json.gz", json_lines("c"))
    write(tmp_path / "d/d.NDJSON.zst", json_lines("d" * 5000))
    write(tmp_path / "d/words.json", '["a", "b"]')
    texts, _ = documents(text_config(tmp_path / "d"))
    assert texts == ["a", "b", "b2", "c", "d" * 5000]
    array = write(tmp_path / "d/e.json", json.dumps([{"text": "e"}], indent=2))
    for path in ("d", "d/*", "d/**/*.json", "d/e.json"):
        with raises("data.paths: '.*e.json' is one JSON array; write a document a line, as jq"):
            documents(text_config(tmp_path / path))
    array.unlink()
    with raises("data.paths: '.*words.json', line 1 is not a JSON object"):
        documents(text_config(tmp_path / "d/words.json"))
    with raises("data.paths: '.*words.json' has none of the known suffixes .*or holds something"):
        documents(text_config(tmp_path / "d/w*.json"))


def split_files(folder, suffix, texts=("one", "two")):
    make = {
        ".parquet": lambda file: write_parquet(file, text=list(texts)),
        ".jsonl.gz": lambda file: write(file, json_lines(*texts)),
        ".array_record": lambda file: write_array_record(file, [t.encode() for t in texts]),
    }
    return [make[suffix](folder / f"{name}{suffix}") for name in ("train", "validation", "test")]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl.gz", ".array_record"])
@pytest.mark.parametrize("pattern", ["", "*", "**"])
def test_held_out_files_are_not_trained_on(tmp_path, suffix, pattern):
    (tmp_path / "d").mkdir()
    split_files(tmp_path / "d", suffix)
    source = "array_record" if suffix == ".array_record" else "text"
    with raises(f"data.paths: '.*{suffix}' looks like held-out data; .*eval_paths=validation=/"):
        documents(DataConfig(source=source, paths=(str(tmp_path / "d" / pattern),)))


@pytest.mark.parametrize(
    ("names", "flags"),
    [
        (["train/0.parquet", "test/0.parquet", "test/1.parquet"], "test={}/test/*.parquet"),
        (["train-0.jsonl", "validation-0-of-2.jsonl", "validation-1-of-2.jsonl"],
         "validation={}/validation-*-of-2.jsonl"),
        (["train/pos/1.txt", "test/pos/1.txt", "test/neg/2.txt"], "test={}/test/**/*.txt"),
        (["wiki.train.txt", "wiki.valid.txt"], "valid={}/wiki.valid.txt"),
        (["part-0.jsonl", "DEV.jsonl"], "dev={}/DEV.jsonl"),
        (["part-0.jsonl", "held-out.jsonl"], "held-out={}/held-out.jsonl"),
        (["training.jsonl", "testing.jsonl"], "testing={}/testing.jsonl"),
        (["wikiTrain.jsonl", "wikiTest.jsonl"], "test={}/wikiTest.jsonl"),
    ],
)  # fmt: skip
def test_the_right_eval_paths_are_told(tmp_path, names, flags):
    for name in names:
        file = tmp_path / "test" / name  # the folder of all of them says nothing
        if name.endswith(".parquet"):
            write_parquet(file, text=[name])
        else:
            write(file, json_lines(name))
    flags = flags.format(tmp_path / "test")
    with raises("data.paths: .* looks like held-out data; .* --config.data.eval_paths="
                + re.escape(flags)):  # fmt: skip
        documents(text_config(tmp_path / "test"))
    with raises(".*--eval_paths=" + re.escape(flags)):
        sources.open_source(text_config(tmp_path / "test"), "--")
    # What the message says is right.
    pattern = flags.partition("=")[2]
    train = [f for f in (tmp_path / "test").rglob("*") if re.search("[tT]rain|part", str(f))]
    files = [str(f) for f in train if f.is_file()]
    texts, held_out = documents(text_config(*files, eval_paths=(f"v={pattern}",)))
    assert len(texts) + len(held_out["v"]) == len(names)


@pytest.mark.parametrize(
    "names",
    [
        ["test.txt"], ["test.jsonl"], ["test.txt", "a.txt"], ["a.txt", "test/b.txt"],
        ["latest.jsonl", "medieval.jsonl"], ["tests.jsonl", "contest.jsonl"],
        ["train-test-mix.jsonl", "a.jsonl"], ["test-0.jsonl", "test-1.jsonl"],
        ["test/a.jsonl", "test/b.jsonl"],
    ],
)  # fmt: skip
def test_files_that_are_not_held_out(tmp_path, names):
    for name in names:
        write(tmp_path / "d" / name, json_lines(name))
    assert len(documents(text_config(tmp_path / "d"))[0]) == len(names)


# ------------------------------------------------------------------------- array_record and tfds


def test_array_record_of_text(tmp_path):
    texts = [f"document {i}" for i in range(600)]
    file = write_array_record(
        tmp_path / "x.array_record", [*(t.encode() for t in texts), b" ", "é".encode()]
    )
    config = DataConfig(source="array_record", paths=(str(file),))
    assert documents(config) == ([*texts, "é"], {})
    (unit,) = sources.open_source(config).train
    assert unit.size == 602
    assert [position for _, position in unit.read()][-1] == 602


def test_bad_array_record(tmp_path):
    def config(file, **fields):
        return DataConfig(source="array_record", paths=(str(file),), **fields)

    write(tmp_path / "x.array_record", "hello " * 100)
    with raises("data.paths: '.*x.array_record' (holds no|cannot be read)"):
        documents(config(tmp_path / "x.array_record"))
    write_array_record(tmp_path / "ids.array_record", [b"\xff\xfe\x00\x01"])
    with raises(
        "ids.array_record', record 1 is not UTF-8 text .byte 0xff at offset 0.; set data.token"
    ):
        documents(config(tmp_path / "ids.array_record"))
    whole = write_array_record(tmp_path / "w.array_record", [b"x" * 5000] * 40).read_bytes()
    (tmp_path / "cut.array_record").write_bytes(whole[: len(whole) // 2])
    with raises("data.paths: '.*cut.array_record' (holds no|cannot be read)"):
        documents(config(tmp_path / "cut.array_record"))


class TinySet(tfds.core.GeneratorBasedBuilder):
    """Text made here: no network, no TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(300), "validation": self._generate_examples(20)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"text": f"é document {i} of {count}\n", "n": i}


@pytest.fixture(scope="module")
def tiny_set(tmp_path_factory):
    """The folder of all sets."""
    folder = tmp_path_factory.mktemp("tfds")
    TinySet(data_dir=str(folder), file_format="array_record").download_and_prepare()
    assert "tensorflow" not in sys.modules
    return folder


def test_tfds(tiny_set):
    def config(**fields):
        return DataConfig(source="tfds", **fields)

    by_folder = config(paths=(str(tiny_set),), tfds_eval_split="validation")
    train, held_out = documents(by_folder)
    assert sorted(train) == sorted(f"é document {i} of 300\n" for i in range(300))
    assert sorted(held_out["validation"]) == sorted(f"é document {i} of 20\n" for i in range(20))
    by_name = config(tfds_name="tiny_set", paths=(str(tiny_set),))
    assert documents(by_name) == (train, {})
    with raises("data.tfds_split: 'test' is none of the splits train, validation"):
        documents(config(paths=(str(tiny_set),), tfds_split="test"))
    with raises("data.text_key: 'body' is none of n, text"):
        documents(config(paths=(str(tiny_set),), text_key="body"))
    with raises("data.tfds_split: split 'train', record 1 is not UTF-8 text"):
        documents(config(paths=(str(tiny_set),), text_key="n"))
    with raises("data.tfds_eval_split is the split to train on"):
        documents(config(paths=(str(tiny_set),), tfds_eval_split="train"))
    linked = tiny_set.parent / "t [1]"
    linked.symlink_to(tiny_set)
    assert documents(config(paths=(str(linked),))) == (train, {})
    with raises("data.paths: there is no dataset_info.json below"):
        documents(config(paths=(str(tiny_set / "gone"),)))
    with raises("data.tfds_name: 'no_such_set' cannot be opened with tfds"):
        documents(config(tfds_name="no_such_set", paths=(str(tiny_set),)))


# ------------------------------------------------------------------------------------ held out


def split_of(texts, share):
    split = choose_split(lambda: iter(texts), share, "data.paths")
    sides = {"train": [], "held_out": []}
    for text in texts:
        for name, piece in split(text).items():
            sides[name].append(piece)
    return sides["train"], sides["held_out"]


def test_split_of_documents(monkeypatch):
    texts = [f"document {i}" for i in range(200)]
    train, held = split_of(texts, 0.05)
    assert len(held) == 10
    assert not set(held) & set(train)
    assert sorted([*held, *train]) == sorted(texts)
    # Stable: against another order, another machine (fixed hash), and a few more documents.
    assert set(split_of(texts[::-1], 0.05)[1]) == set(held)
    import hashlib

    assert hashlib.sha256("".join(held).encode()).hexdigest()[:8] == "72827982"
    assert len(set(split_of([*texts, "a", "b", "c"], 0.05)[1]) & set(held)) >= 8
    # Copies stay together, and both sides always have something.
    assert split_of(["a", "b"] * 9, 0.01)[0] in (["a"] * 9, ["b"] * 9)
    assert all(split_of(["a", "b"], 0.99))
    # Of many documents the share alone decides: close to what is counted out of few.
    monkeypatch.setattr(held_out, "_DOCUMENTS", 100)
    many = [f"document {i}" for i in range(20_000)]
    read = []
    split = choose_split(lambda: (read.append(t) or t for t in many), 0.05, "data.paths")
    assert len(read) == 1001
    held = [t for t in many if "held_out" in split(t)]
    assert 900 < len(held) < 1100


def test_split_of_one_document():
    text = "".join(f"line {i}\n" for i in range(100))
    (head,), (tail,) = split_of([text], 0.05)
    assert head + tail == text
    assert head.endswith("\n")
    assert 0.03 < len(tail) / len(text) < 0.07
    assert split_of([text, text], 0.05) == ([head, head], [tail, tail])
    assert split_of(["\n \na\nb" + "b" * 1000 + "\n\n \n"], 0.05)[0] == ["\n \na\n"]
    assert split_of(["a" * 1000 + "\nb" + "\n" * 1000], 0.5)[1] == ["b" + "\n" * 1000]
    with raises("data.paths: the only document is a single line"):
        split_of(["\n\n" + "a" * 100 + "\n\n"], 0.05)
    with raises("data.paths: there is no text"):
        split_of([], 0.05)


@property_test
@given(st.text(alphabet="ab\n ", max_size=30), st.floats(0.01, 0.99))
def test_split_of_any_one_document(text, share):
    inner = text.strip()
    if not inner:
        return
    if "\n" not in inner:
        with raises("single line"):
            split_of([text], share)
        return
    (head,), (tail,) = split_of([text], share)
    assert head + tail == text
    assert head.strip()
    assert head.endswith("\n")
    assert tail.strip()


def test_sources_and_tokenizers_load_no_jax():
    code = (
        "import sys; from ngpt_jax.data.preparing import folder;"
        " from ngpt_jax.data.text import sources; from ngpt_jax.data.tokenizers import load;"
        "assert not {'jax', 'flax', 'grain', 'tensorflow_datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
