"""Documents, tokens and batches: where they come from, in which order, and that none is lost."""

import gc
import gzip
import hashlib
import itertools
import json
import re
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpt_jax.config import ConfigError, DataConfig
from ngpt_jax.data import pipeline, sources
from ngpt_jax.data.tokenizers import ByteTokenizer, load_json_tokenizer, load_tokenizer

ROOT = Path(__file__).parents[1]
LLAMA = ROOT.parent / "shared" / "tokenizers" / "llama2-32k.json"

property_test = settings(max_examples=60, deadline=None, derandomize=True)
texts = st.text(max_size=40)  # without surrogates, as the default of hypothesis is for UTF-8


def raises(pattern):
    """A ConfigError of one line."""
    return pytest.raises(ConfigError, match=r"\A(?=[^\n]*\Z)[^\n]*" + pattern)


def text_config(*paths, **fields):
    return DataConfig(source="text", paths=tuple(map(str, paths)), **fields)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def json_lines(*documents, key="text"):
    return "".join(json.dumps({"id": 1, key: text}) + "\n" for text in documents)


# ------------------------------------------------------------------------------------- sources


def utf8_size(documents):
    return sum(len(text.encode()) for text in documents)


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
    corpus = sources.stdlib_corpus(tmp_path / "lib", 0.3)
    assert list(corpus.held_out) == ["stdlib"]
    both = [*corpus.train, *corpus.held_out["stdlib"]]
    expected = [c * 500 for c in "abou"] + ["j" * 20, "naïve = '\xe9'\n", "caf\ufffd = 1\n"]
    assert sorted(both) == sorted(expected)
    assert 0.2 < utf8_size(corpus.held_out["stdlib"]) / utf8_size(both) < 0.4
    as_read = [c for c in ["b" * 500, "a" * 500, "caf\ufffd = 1\n"] if c in corpus.train]
    assert corpus.train[: len(as_read)] == as_read  # sorted by path


def test_stdlib_of_this_python():
    corpus = sources.load_corpus(DataConfig())
    held = corpus.held_out["stdlib"]
    total = utf8_size(corpus.train) + utf8_size(held)
    assert total > 6_000_000
    assert abs(utf8_size(held) / total - 0.05) < 0.005
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = {}  # text -> modules that have it
    for file in sources.stdlib_files(root):
        text = file.read_text(encoding="utf-8", errors="replace")
        modules.setdefault(text, set()).add(file.relative_to(root).parts[0])
    train_modules, held_modules = (
        set.union(*(modules[text] for text in side if len(modules[text]) == 1))
        for side in (corpus.train, held)
    )
    assert not train_modules & held_modules
    if sys.version_info < (3, 14):  # a module that moved over would have been trained on
        assert {"json", "logging", "collections", "operator.py"} <= held_modules
        assert {"asyncio", "typing.py", "argparse.py"} <= train_modules
    assert sources.load_corpus(DataConfig()) == corpus


@pytest.mark.parametrize("share", [0.001, 0.2, 0.999])
def test_stdlib_keeps_both_sides(tmp_path, share):
    fake_stdlib(tmp_path / "lib")
    corpus = sources.stdlib_corpus(tmp_path / "lib", share)
    assert corpus.train
    assert corpus.held_out["stdlib"]


def test_stdlib_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python311.zip")})
    with raises("no source files.*data.source=text"):
        sources.load_corpus(DataConfig())


def test_text_files_of_each_kind(tmp_path):
    write(tmp_path / "d" / "b.txt", "\ufeffBé\r\ntwo\n")
    write(tmp_path / "d" / "a.jsonl", json_lines("one", " \n", "", "two") + "\n")
    write(tmp_path / "d" / "sub" / "C.TXT.gz", "gz")
    write(tmp_path / "d" / "sub" / "d.jsonl.gz", json_lines("x\u2028y", "\ud800!"))
    write(tmp_path / "d" / "e.jsonl.txt", "{plain}")
    write(tmp_path / "d" / ".hidden.txt", "no")
    write(tmp_path / "d" / ".git" / "f.txt", "no")
    write(tmp_path / "d" / "README.md", "no")
    write(tmp_path / "d" / "blank.txt", " \n")
    val = write(tmp_path / "val.txt", "val")
    held = {"eval_paths": (f"v={val}", f" w = {tmp_path / 'd' / 'sub'}/../../val.t?t")}

    def train(*paths):
        corpus = sources.load_corpus(text_config(*paths, **held))
        assert corpus.held_out == {"v": ["val"], "w": ["val"]}
        return corpus.train

    below = ["one", "two", "Bé\ntwo\n", "{plain}", "gz", "x\u2028y", "?!"]
    assert train(tmp_path / "d") == below
    assert train(tmp_path / "d" / "**" / "*.txt") == ["Bé\ntwo\n", "{plain}"]
    assert train(tmp_path / "d" / "s*", tmp_path / "d" / "?.txt") == [*below[4:], "Bé\ntwo\n"]
    assert train(tmp_path / "d" / "b.txt", tmp_path / "d") == [below[2], *below[:2], *below[3:]]
    write(tmp_path / "[1].txt", "not a glob")
    assert train(tmp_path / "[1].txt") == ["not a glob"]


def test_home_and_text_key(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "x.jsonl", json_lines("a", "b", key="body"))
    corpus = sources.load_corpus(text_config("~/x.jsonl", text_key="body"))
    assert sorted([*corpus.train, *corpus.held_out["held_out"]]) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.jsonl", '{"text": "a"}\n\n{"text": \n', r"x.jsonl', line 3 is not JSON"),
        ("x.jsonl", '{"text": "a"}\n[1]\n', r"x.jsonl', line 2 is not a JSON object"),
        (
            "x.jsonl",
            '{"body": "a", "id": 1}\n',
            r"line 1 has no 'text' but 'body', 'id'; set data.t",
        ),
        ("x.jsonl.gz", '{"text": 5}\n', r"line 1: 'text' is int, not a string"),
        ("x.md", "a", r"x.md' has none of the known suffixes .txt, .jsonl, .txt.gz, .jsonl.gz"),
        ("x.txt", " \n", r"there is no text in .*x.txt'; give"),
        ("x.txt", "", r"there is no text in"),
        ("x.jsonl", "\n", r"there is no text in"),
        ("x.txt", "one line\n", r"only document is a single line.*data.eval_paths"),
    ],
)
def test_bad_text_file(tmp_path, name, data, message):
    path = write(tmp_path / name, data)
    with raises("data.paths: .*" + message):
        sources.load_corpus(text_config(path))
    good = write(tmp_path / "good.txt", "good\n")
    if "single line" not in message:
        with raises("data.eval_paths: .*" + message):
            sources.load_corpus(text_config(good, eval_paths=(f"val={path}",)))


def test_unreadable_text_file(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with raises("data.paths: .*latin.txt' is not UTF-8"):
        sources.load_corpus(text_config(tmp_path / "latin.txt"))
    (tmp_path / "fake.txt.gz").write_bytes(b"plain")
    with raises("data.paths: cannot read .*fake.txt.gz"):
        sources.load_corpus(text_config(tmp_path / "fake.txt.gz"))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"plain text" * 99)[:-12])
    with raises("data.paths: cannot read .*cut.txt.gz"):
        sources.load_corpus(text_config(tmp_path / "cut.txt.gz"))


def test_paths_without_files(tmp_path):
    with raises("data.paths: there is no file or folder '.*gone.txt'; check"):
        sources.load_corpus(text_config(tmp_path / "gone.txt"))
    with raises(r"data.paths: no file matches '.*x\*.txt'; check"):
        sources.load_corpus(text_config(tmp_path / "x*.txt"))
    with raises("data.paths: there is no .txt, .* file below the folder"):
        sources.load_corpus(text_config(tmp_path))
    with raises("data.paths: there is no file or folder ''"):
        sources.load_corpus(text_config(""))
    with raises("data.paths is empty"):
        sources.load_corpus(text_config())
    with raises("data.source must be one of stdlib, text, got 'web'"):
        sources.load_corpus(DataConfig(source="web"))


def test_bad_eval_paths(tmp_path):
    a, b = write(tmp_path / "a.txt", "a\n"), write(tmp_path / "b.txt", "b\n")
    for item in ("val", f"={b}", "val=", ""):
        with raises("data.eval_paths must be name=path, got " + re.escape(repr(item))):
            sources.load_corpus(text_config(a, eval_paths=(item,)))
    with raises("data.eval_paths: two sets are called 'v'"):
        sources.load_corpus(text_config(a, eval_paths=(f"v={b}", f"v={b}")))
    with raises("data.eval_paths: .*b.txt' of 'v' is in data.paths too"):
        sources.load_corpus(text_config(tmp_path, eval_paths=(f"v={b}",)))
    with raises("data.eval_paths: there is no file"):
        sources.load_corpus(text_config(a, eval_paths=("v=gone.txt",)))


def test_split_of_documents():
    documents = [f"document {i}" for i in range(200)]
    corpus = sources.split_documents(documents, 0.05)
    held = corpus.held_out["held_out"]
    assert len(held) == 10
    assert not set(held) & set(corpus.train)
    assert sorted([*held, *corpus.train]) == sorted(documents)
    # Stable: against another order, another machine (fixed hash), and a few more documents.
    again = sources.split_documents(documents[::-1], 0.05)
    assert set(again.held_out["held_out"]) == set(held)
    assert hashlib.sha256("".join(held).encode()).hexdigest()[:8] == "72827982"
    more = sources.split_documents([*documents, "a", "b", "c"], 0.05)
    assert len(set(more.held_out["held_out"]) & set(held)) >= 8
    # Copies stay together, and both sides always have something.
    assert sources.split_documents(["a", "b"] * 9, 0.01).train in (["a"] * 9, ["b"] * 9)
    assert sources.split_documents(["a", "b"], 0.99).train


def test_split_of_one_document():
    text = "".join(f"line {i}\n" for i in range(100))
    corpus = sources.split_documents([text, text], 0.05)
    (head,), (tail,) = corpus.train, corpus.held_out["held_out"]
    assert head + tail == text
    assert head.endswith("\n")
    assert 0.03 < len(tail) / len(text) < 0.07
    long_tail = sources.split_documents(["\n \na\nb" + "b" * 1000 + "\n\n \n"], 0.05)
    assert long_tail.train == ["\n \na\n"]
    long_head = sources.split_documents(["a" * 1000 + "\nb" + "\n" * 1000], 0.5)
    assert long_head.held_out["held_out"] == ["b" + "\n" * 1000]
    with raises("single line"):
        sources.split_documents(["\n\n" + "a" * 100 + "\n\n"], 0.05)


@property_test
@given(st.text(alphabet="ab\n ", max_size=30), st.floats(0.01, 0.99))
def test_split_of_any_one_document(text, share):
    inner = text.strip()
    if not inner:
        return
    if "\n" not in inner:
        with raises("single line"):
            sources.split_documents([text], share)
        return
    corpus = sources.split_documents([text], share)
    (head,), (tail,) = corpus.train, corpus.held_out["held_out"]
    assert head + tail == text
    assert head.strip()
    assert head.endswith("\n")
    assert tail.strip()


# ---------------------------------------------------------------------------------- tokenizers


def byte_level(*added, merges=(), file=None):
    """A tokenizers JSON file: byte-level BPE with the given added tokens."""
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, *("".join(m) for m in merges)])}
    tokenizer = hf.Tokenizer(hf.models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    tokenizer.add_tokens(list(added))
    tokenizer.enable_truncation(3)  # of no use here: must not have an effect
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(file))
    return str(file)


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    special = hf.AddedToken("<|endoftext|>", special=True)
    file = tmp_path_factory.mktemp("json") / "tiny.json"
    return byte_level("<user>", special, "<eos>", merges=[("a", "b"), ("ab", "c")], file=file)


@pytest.fixture(scope="module", params=["byte", "json"])
def tokenizer(request, json_file):
    return load_tokenizer(DataConfig(tokenizer="byte" if request.param == "byte" else json_file))


def test_byte_tokenizer():
    t = load_tokenizer(DataConfig())
    assert (t.name, t.vocab_size, t.eod) == ("byte", 257, 256)
    assert t.encode("aé") == [97, 195, 169]
    assert t.decode([97, 256, 195, 169, 300, -1]) == "aé"
    assert t.decode(np.array([97, 0xFF, 98], np.uint16)) == "a\ufffdb"
    assert t.encode("\ud800") == [ord("?")]


def test_json_tokenizer(json_file):
    t = load_tokenizer(DataConfig(tokenizer=json_file))
    assert (t.name, t.vocab_size, t.eod) == ("tiny", 261, 259)
    assert len(t.encode("abc")) == 1
    assert len(t.encode("abc abc\n" * 100)) == 400  # file's truncation and padding are off
    assert load_json_tokenizer(json_file, "<eos>").eod == 260
    assert load_json_tokenizer(json_file, "\u0120").eod == t.encode(" ")[0]


@pytest.mark.parametrize("token", ["<|endoftext|>", "<eos>"])
def test_text_that_spells_the_end_of_a_document(json_file, token):
    t = load_json_tokenizer(json_file, token)  # <eos> is not marked as special in the file
    text = f"a{token}b {token}"
    assert t.eod not in t.encode(text)
    assert t.decode(t.encode(text)) == text
    assert t.eod not in np.concatenate(t.encode_batch([text, text]))


@property_test
@given(st.lists(texts, max_size=4))
def test_round_trip(tokenizer, documents):
    batch = tokenizer.encode_batch(documents)
    for text, ids in zip(documents, batch):
        assert ids.dtype == np.int32
        assert ids.tolist() == tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eod for i in ids)
    joined = pipeline.join_documents(documents, tokenizer)
    assert tokenizer.decode(joined) == "".join(documents)


def test_bad_tokenizers(tmp_path, json_file):
    with raises("data.end_of_document is for a tokenizers JSON file"):
        load_tokenizer(DataConfig(end_of_document="</s>"))
    with raises("data.tokenizer: there is no file '.*gone.json'; give byte or"):
        load_tokenizer(DataConfig(tokenizer=str(tmp_path / "gone.json")))
    for data in ("{}", "not json", '{"model": {"type": "BPE"}}'):
        bad = write(tmp_path / "bad.json", data)
        with raises("data.tokenizer: '.*bad.json' is not a tokenizers JSON file"):
            load_tokenizer(DataConfig(tokenizer=str(bad)))
    with raises("data.end_of_document: '.*tiny.json' has no token <nope>"):
        load_tokenizer(DataConfig(tokenizer=json_file, end_of_document="<nope>"))
    plain = byte_level(file=tmp_path / "plain.json")
    with raises("data.end_of_document: .*plain.json' has no token </s> or <.endoftext.> or"):
        load_tokenizer(DataConfig(tokenizer=plain))


@pytest.mark.skipif(not LLAMA.exists(), reason=f"needs {LLAMA}, which is not part of the project")
def test_llama_tokenizer():
    t = load_tokenizer(DataConfig(tokenizer=str(LLAMA)))
    assert t.encode("Hello world") == [15043, 3186]
    assert (t.vocab_size, t.eod) == (32000, 2)
    for text in ("  two\n\n a\t", "naïve café 🎉\x00\u2028", "a</s>b</s>", " ", "", "\n"):
        assert t.decode(t.encode(text)) == text
        assert t.eod not in t.encode(text)
    documents = ["one", " two", "three"]
    joined = pipeline.join_documents(documents, t)
    assert joined.dtype == np.uint16
    assert t.decode(joined) == "one twothree"


# ------------------------------------------------------------------------------------ pipeline

CONTEXT, BATCH = 16, 4
TOKENS = np.random.default_rng(0).integers(0, 257, 40 * CONTEXT + 10).astype(np.uint16)


def batches(seed=0, position=0, threads=2, prefetch=8, tokens=TOKENS, count=50, batch_size=BATCH):
    dataset = pipeline.train_dataset(tokens, CONTEXT, seed)
    iterator = pipeline.train_batches(dataset, batch_size, position, threads, prefetch)
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


def test_token_dtype():
    assert pipeline.token_dtype(257) is np.uint16
    assert pipeline.token_dtype(2**16) is np.uint16
    assert pipeline.token_dtype(2**16 + 1) is np.uint32


def test_join_documents(monkeypatch):
    t = ByteTokenizer()
    documents = ["ab", "", "é"]
    expected = [97, 98, 256, 256, 195, 169, 256]
    for portion in (1, 3, 2**20):
        monkeypatch.setattr(pipeline, "_CHARACTERS_AT_ONCE", portion)
        joined = pipeline.join_documents(iter(documents), t)
        assert joined.dtype == np.uint16
        assert joined.tolist() == expected
    assert pipeline.join_documents([], t).tolist() == []


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
        "import sys; sys.path.insert(0, 'tests'); import test_data as t;"
        "print(t.fingerprint(t.batches(seed=3, position=13, threads=1)), flush=True);"
        "it = t.pipeline.train_batches(t.pipeline.train_dataset(t.TOKENS, 16, 0), 4, 0, 2, 8);"
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


def test_sources_and_tokenizers_load_no_jax():
    code = (
        "import sys; from ngpt_jax.data import sources, tokenizers;"
        "assert not {'jax', 'flax', 'grain'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_threads_end_with_the_iterator():
    dataset = pipeline.train_dataset(TOKENS, CONTEXT, 0)
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


def test_bad_training_input():
    with raises("model.context = 16 needs a training text of 17 tokens or more.* are 16; lower"):
        pipeline.train_dataset(TOKENS[:16], CONTEXT, 0)
    with raises("model.context = 16 .* there are 0"):
        pipeline.train_dataset(TOKENS[:0], CONTEXT, 0)
    with raises("data.seed must not be negative, got -1"):
        pipeline.train_dataset(TOKENS, CONTEXT, -1)
    one = pipeline.train_dataset(TOKENS[:17], CONTEXT, 2**40)
    (batch,) = itertools.islice(pipeline.train_batches(one, 3, 0, 2, 8), 1)
    assert batch["targets"].tolist() == [TOKENS[1:17].tolist()] * 3


@property_test
@given(st.lists(texts, min_size=1, max_size=5), st.integers(1, 7), st.integers(1, 4))
def test_each_eval_target_once(tokenizer, documents, context, batch_size):
    eval_set = pipeline.make_eval_set("val", documents, tokenizer)
    assert eval_set.name == "val"
    assert eval_set.num_bytes == utf8_size(documents)
    assert eval_set.tokens.dtype == np.uint16
    expected = [i for text in documents for i in [*tokenizer.encode(text), tokenizer.eod]]
    some = list(pipeline.eval_batches(eval_set, context, batch_size))
    assert len(some) == pipeline.num_eval_batches(eval_set, context, batch_size)
    for batch in some:
        for key, dtype in {"inputs": np.int32, "targets": np.int32, "weights": np.float32}.items():
            assert batch[key].shape == (batch_size, context)
            assert batch[key].dtype == dtype
    inputs, targets, weights = (
        np.concatenate([b[key].ravel() for b in some]) for key in ("inputs", "targets", "weights")
    )
    n = len(expected)
    assert weights.tolist() == [1.0] * n + [0.0] * (len(weights) - n)
    assert len(weights) - n < context * batch_size
    assert targets[:n].tolist() == expected
    assert inputs[:n].tolist() == [tokenizer.eod, *expected[:-1]]
    assert not inputs[n:].any()
    assert not targets[n:].any()


def test_eval_limit():
    eval_set = pipeline.make_eval_set("val", ["x" * 100], ByteTokenizer())
    every = list(pipeline.eval_batches(eval_set, 8, 2))
    assert len(every) == 7
    for limit in (1, 3, 7, 100):
        some = list(pipeline.eval_batches(eval_set, 8, 2, limit))
        assert len(some) == min(limit, 7)
        for a, b in zip(some, every):
            np.testing.assert_equal(a, b)
    exact = pipeline.make_eval_set("val", ["x" * 31], ByteTokenizer())
    assert [b["weights"].sum() for b in pipeline.eval_batches(exact, 8, 2)] == [16, 16]
    empty = pipeline.make_eval_set("val", [], ByteTokenizer())
    assert list(pipeline.eval_batches(empty, 8, 2)) == []


def test_throughput():
    """Far below the 3 M tokens/s of an idle core, as tests share theirs: catches a mistake."""
    tokens = np.zeros(10**6, np.uint16)
    dataset = pipeline.train_dataset(tokens, 128, 0)
    iterator = pipeline.train_batches(dataset, 16, 0, 2, 8)
    next(iterator)
    start = time.process_time()
    for _ in range(200):
        next(iterator)
    assert 200 * 16 * 128 / (time.process_time() - start) > 300_000
