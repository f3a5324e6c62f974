"""Preparation: token counts, identical bytes, going on after a stop, manifests, packing."""

import dataclasses
import errno
import gzip
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers as hf
from data_helpers import ROOT, SHARED, json_lines, raises, text_config, write
from etils import epath

from ngpt_jax.config import DataConfig
from ngpt_jax.data import corpus, manifest
from ngpt_jax.data.preparing import tokenize
from ngpt_jax.data.preparing.folder import Stopped, prepare_folder
from ngpt_jax.data.text.sources import open_source
from ngpt_jax.data.tokenizers.base import ByteTokenizer
from ngpt_jax.data.tokenizers.load import load_tokenizer


def run(config, out, **options):
    options = {"shard_tokens": 4000, "workers": 1} | options
    source, tokenizer = open_source(config), load_tokenizer(config)
    return prepare_folder(source, config.held_out, tokenizer, epath.Path(out), **options)


def contents(folder):
    """Name and hash of every file of a folder."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.iterdir()
        if file.name != ".lock"
    }


def tokens_of(folder, name):
    facts = manifest.read_manifest(epath.Path(folder), "--out").sets[name]
    return np.concatenate([np.fromfile(folder / s.file, "<u2") for s in facts.shards])


@pytest.fixture
def texts():
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list("abc é\n"), rng.integers(1, 200))) + "." for _ in range(300)]


@pytest.fixture
def config(tmp_path, texts):
    write(tmp_path / "in" / "a.jsonl.gz", json_lines(*texts[:100]))
    write(tmp_path / "in" / "b.jsonl.zst", json_lines(*texts[100:250]))
    write(tmp_path / "in" / "c.jsonl", json_lines(*texts[250:]))
    return text_config(tmp_path / "in")


@pytest.fixture
def small_portions(monkeypatch):
    """Portions of a kilobyte, so that a small text has many."""
    monkeypatch.setattr(tokenize, "_CHARACTERS_AT_ONCE", 1000)


def test_tokens_documents_and_bytes(config, texts, tmp_path, small_portions):
    made = run(config, tmp_path / "out")
    t = ByteTokenizer()
    sides = {name: [] for name in ("train", "held_out")}
    for text in texts:
        split = corpus_split(texts, config.held_out)
        sides[next(iter(split(text)))].append(text)
    for name, expected in sides.items():
        ids = [i for text in expected for i in [*t.encode(text), t.eod]]
        assert tokens_of(tmp_path / "out", name).tolist() == ids
        facts = made.sets[name]
        assert (facts.tokens, facts.documents) == (len(ids), len(expected))
        assert facts.bytes == len("".join(expected).encode())
    assert len(made.sets["train"].shards) > 3
    assert all(4000 <= s.tokens < 5300 for s in made.sets["train"].shards[:-1])
    for facts in made.sets.values():
        for shard in facts.shards:
            data = (tmp_path / "out" / shard.file).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
    assert manifest.read_manifest(epath.Path(tmp_path / "out"), "--out") == made
    assert sorted(contents(tmp_path / "out")) == sorted(
        ["manifest.json", *(s.file for f in made.sets.values() for s in f.shards)]
    )


def corpus_split(texts, share):
    from ngpt_jax.data.text.held_out import choose_split

    return choose_split(lambda: iter(texts), share, "data.paths")


@pytest.mark.parametrize("format", ["bin", "array_record"])
def test_two_runs_give_identical_bytes(config, tmp_path, small_portions, format):
    run(config, tmp_path / "a", format=format)
    first = contents(tmp_path / "a")
    run(config, tmp_path / "a", format=format)  # complete: left as it is
    assert contents(tmp_path / "a") == first
    run(config, tmp_path / "b", format=format, workers=2)
    assert contents(tmp_path / "b") == first


@pytest.mark.slow
def test_workers_give_the_same_bytes(config, tmp_path, small_portions, monkeypatch):
    vocab = {token: i for i, token in enumerate(["</s>", *"abc .\n"])}  # an é is lost
    hf.Tokenizer(hf.models.BPE(vocab, [])).save(str(tmp_path / "some.json"))
    config = dataclasses.replace(config, tokenizer=str(tmp_path / "some.json"))
    run(config, tmp_path / "one", workers=1)
    used, real = [], tokenize._in_workers

    def in_workers(*args):
        used.append(1)
        return real(*args)

    monkeypatch.setattr(tokenize, "_in_workers", in_workers)
    run(config, tmp_path / "two", workers=2)
    assert used
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize("format", ["bin", "array_record"])
def test_a_stopped_preparation_goes_on(config, tmp_path, small_portions, format, monkeypatch):
    run(config, tmp_path / "whole", format=format)
    encoded = []
    real = ByteTokenizer.encode_batch

    def counting(self, batch):
        encoded.extend(batch)
        return real(self, batch)

    monkeypatch.setattr(ByteTokenizer, "encode_batch", counting)
    starts = 0
    while not (tmp_path / "cut/manifest.json").exists():
        starts += 1
        try:
            run(config, tmp_path / "cut", format=format, stopped=at_poll(7))
        except Stopped:
            shards = [f for f in os.listdir(tmp_path / "cut") if f.startswith("train")]
            assert len(shards) == starts
    assert starts > 3
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert len(encoded) < 300 + starts * 7 * 12  # whole shards are not made again


def test_a_killed_preparation_goes_on(config, tmp_path, texts):
    """SIGKILL at random instants, until it is done."""
    code = """
import sys, time; sys.path.insert(0, "tests")
from ngpt_jax.data.preparing import tokenize
from ngpt_jax.data.tokenizers.base import ByteTokenizer
tokenize._CHARACTERS_AT_ONCE = 1000
real = ByteTokenizer.encode_batch
ByteTokenizer.encode_batch = lambda self, batch: (time.sleep(0.01), real(self, batch))[1]
import test_prepare as t
t.run(t.text_config(sys.argv[1]), sys.argv[2])
"""
    rng = np.random.default_rng(0)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/.progress.json.77.tmp").write_text("of a kill while it was written")
    for _attempt in range(40):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "in"), str(tmp_path / "cut")], cwd=ROOT
        )
        if _attempt < 5:
            time.sleep(rng.uniform(0.4, 1.4))  # Python has started after half a second
            process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "_CHARACTERS_AT_ONCE", 1000)
        run(config, tmp_path / "whole")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def at_poll(number):
    """A stop at the n-th poll."""
    polls = itertools.count(1)
    return lambda: next(polls) == number


def test_named_held_out_sets(tmp_path):
    a, b = write(tmp_path / "a.txt", "train text"), write(tmp_path / "b.txt", "held out")
    made = run(text_config(a, eval_paths=(f"val={b}",)), tmp_path / "out")
    assert list(made.sets) == ["train", "val"]
    assert bytes(tokens_of(tmp_path / "out", "val")[:-1].astype(np.uint8)) == b"held out"


def test_bad_text_leaves_no_shards(tmp_path):
    good, bad = write(tmp_path / "a.txt", "good\ntext"), write(tmp_path / "b.jsonl", "{")
    with raises("data.paths: .*b.jsonl', line 1 is not JSON"):
        run(text_config(good, bad), tmp_path / "out")
    assert set(contents(tmp_path / "out")) <= {".lock"}
    write(tmp_path / "b.jsonl", json_lines("now good"))
    run(text_config(good, bad), tmp_path / "out")
    blank = write(tmp_path / "blank.txt", " \n")
    with raises("there is no text"):
        run(text_config(blank), tmp_path / "o2")
    with raises("val: there is no text in it"):
        run(text_config(good, eval_paths=(f"val={blank}",)), tmp_path / "o3")


def test_folders_of_something_else(config, tmp_path, small_portions):
    run(config, tmp_path / "out")
    before = contents(tmp_path / "out")
    other = text_config(tmp_path / "in" / "c.jsonl")
    with raises("holds tokens of another text, tokenizer or split; choose another --out"):
        run(other, tmp_path / "out")
    with raises("holds tokens of another text"):
        run(config, tmp_path / "out", shard_tokens=5000)
    assert contents(tmp_path / "out") == before
    with raises(r"in' is not empty; choose another --out, or delete it"):
        run(config, tmp_path / "in")
    with raises("cannot be written: (Not a directory|File exists)"):
        run(config, tmp_path / "in" / "c.jsonl")
    with pytest.raises(Stopped):
        run(config, tmp_path / "cut", stopped=at_poll(7))
    with raises("holds the beginning of another text"):
        run(other, tmp_path / "cut")
    (tmp_path / "cut/train-00000.bin").write_bytes(b"short")
    with raises("train-00000.bin' has 5 bytes, not"):
        run(config, tmp_path / "cut")
    (tmp_path / "cut/progress.json").write_text("{")
    with raises("progress.json' is damaged; delete"):
        run(config, tmp_path / "cut")


@pytest.mark.parametrize(
    "damage",
    ["{", "[]", '{"version": 9}', '{"version": 1}', "null",
     lambda text: text.replace('"train"', '"other"'), lambda text: text.replace('"uint16"', '"x"'),
     lambda text: text.replace('"tokens"', '"tokns"'), lambda text: text[: len(text) // 2]],
)  # fmt: skip
def test_damaged_manifests(config, tmp_path, damage):
    run(config, tmp_path / "out")
    file = tmp_path / "out/manifest.json"
    file.write_text(damage if isinstance(damage, str) else damage(file.read_text()))
    with raises("data.paths: '.*manifest.json' is damaged .*; prepare the folder anew"):
        load(source="bin", paths=(str(tmp_path / "out"),), cache=tmp_path / "cache")


def load(context=16, **fields):
    fields["cache"] = str(fields["cache"])
    config = DataConfig(**fields)
    return corpus.load_corpus(config, load_tokenizer(config), context)


def test_training_reads_what_was_prepared(config, tmp_path, small_portions):
    """The same tokens and fingerprint through the cache, a bin folder, or array_record."""
    cache = tmp_path / "cache"
    by_cache = load(source="text", paths=config.paths, cache=cache)
    run(config, tmp_path / "bin")
    run(config, tmp_path / "ar", format="array_record")
    by_bin = load(source="bin", paths=(str(tmp_path / "bin"),), cache=cache)
    by_record = load(source="array_record", paths=(str(tmp_path / "ar"),), cache=cache)
    for other in (by_bin, by_record):
        assert other.tokens == by_cache.tokens
        for window in (0, 7, len(by_cache.train[""]) - 1):
            np.testing.assert_equal(other.train[""][window], by_cache.train[""][window])
        (a,), (b,) = by_cache.held_out, other.held_out
        assert (a.name, a.num_bytes) == (b.name, b.num_bytes)
        np.testing.assert_array_equal(
            a.stream.read(0, len(a.stream)), b.stream.read(0, len(b.stream))
        )
    (tmp_path / "bin").rename(tmp_path / "moved")
    moved = load(source="bin", paths=(str(tmp_path / "moved"),), cache=cache)
    assert by_bin.fingerprint == moved.fingerprint
    with raises("data.source=bin, but .*ar' holds array_record; set data.source=array_record"):
        load(source="bin", paths=(str(tmp_path / "ar"),), cache=cache)


def test_prepared_folders_that_do_not_fit(config, tmp_path, small_portions, monkeypatch):
    cache = tmp_path / "cache"
    run(config, tmp_path / "out")
    folder = str(tmp_path / "out")
    json_file = tmp_path / "t.json"
    words = hf.Tokenizer(hf.models.WordLevel({"a": 0, "</s>": 1, "?": 2}, unk_token="?"))
    words.save(str(json_file))
    with raises(
        "data.paths: .*out' .tokenizer 'byte'.: data.tokenizer .'t', 3 ids, .* is not the one that"
        " it was prepared with"
    ):
        load(source="bin", paths=(folder,), tokenizer=str(json_file), cache=cache)
    with raises("must be the only path; several go into data.mixture"):
        load(source="bin", paths=(folder, folder), cache=cache)
    with raises("data.eval_paths: .* has held-out sets of its own"):
        load(source="bin", paths=(folder,), eval_paths=(f"v={folder}",), cache=cache)
    shard = tmp_path / "out/train-00001.bin"
    data = shard.read_bytes()
    shard.write_bytes(data[:-2])
    with raises("data.paths: .*train-00001.bin' has .* bytes, not .*; it is damaged"):
        load(source="bin", paths=(folder,), cache=cache)
    shard.unlink()
    with raises("data.paths: .*train-00001.bin' is missing; prepare the folder anew"):
        load(source="bin", paths=(folder,), cache=cache)
    shard.write_bytes(data[::-1])
    made = manifest.read_manifest(epath.Path(folder), "--out")

    def broken(file):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))

    with monkeypatch.context() as m, raises("train-00000.bin' cannot be read: Input/output error"):
        m.setattr(manifest, "open_binary", broken)
        manifest.verify(made, epath.Path(folder), "--out")
    with raises("train-00001.bin' was altered"):
        manifest.verify(made, epath.Path(folder), "--out")


ALPHABET = "abcdefghijklmnopqrstuvwxyz .\n"


def lossy(file, kind):
    """A tokenizers file that knows only some characters or words."""
    model = {
        "bpe": lambda: hf.models.BPE({c: i for i, c in enumerate(["</s>", *ALPHABET])}, []),
        "unigram": lambda: hf.models.Unigram(
            [("</s>", 0.0), ("?", 0.0), *((c, -2.0) for c in ALPHABET)], 1, False
        ),
        "words": lambda: hf.models.WordLevel(
            {w: i for i, w in enumerate(["</s>", "[UNK]", *"the fox runs".split()])}, "[UNK]"
        ),
        "pieces": lambda: hf.models.WordPiece(
            {
                w: i
                for i, w in enumerate(["</s>", "[UNK]", *ALPHABET, *(f"##{c}" for c in ALPHABET)])
            },
            unk_token="[UNK]",
        ),
    }[kind]()
    tokenizer = hf.Tokenizer(model)
    if kind == "words":
        tokenizer.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    if kind == "pieces":
        tokenizer.normalizer = hf.normalizers.Lowercase()
        tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
        tokenizer.decoder = hf.decoders.WordPiece()
    tokenizer.save(str(file))
    return str(file)


LOSSY = ("bpe", "unigram", "words", "pieces")


@pytest.mark.parametrize("kind", LOSSY)
def test_text_that_a_tokenizer_loses(tmp_path, kind):
    """The digits are lost. Bytes are counted alike from text and bin."""
    texts = ["the fox runs the fox runs 123456\n"] * 300
    write(tmp_path / "a.jsonl", json_lines(*texts))
    held = write(tmp_path / "b.jsonl", json_lines(*texts[:50]))
    fields = {
        "tokenizer": lossy(tmp_path / "t.json", kind), "eval_paths": (f"v={held}",),
        "cache": str(tmp_path / "c"),
    }  # fmt: skip
    config = text_config(tmp_path / "a.jsonl", **fields)
    made = run(config, tmp_path / "out")
    share = 6 / 26
    assert abs(made.tokenizer["lost"] - share) < 0.0001
    (note,) = manifest.notes(made)
    assert "warning" in note
    assert f"loses {share:.1%} of the text" in note
    known = load(source="text", paths=config.paths, **fields).held_out[0].num_bytes
    assert known == made.sets["v"].bytes
    assert 20 * 50 <= known <= 27 * 50  # with white space where that comes back
    for name in ("train", "v"):  # as files of somebody else
        (tmp_path / f"out/{name}-00000.bin").rename(tmp_path / f"{name}.bin")
    fields["eval_paths"] = (f"v={tmp_path}/v.bin",)
    (as_bin,) = load(source="bin", paths=(f"{tmp_path}/train.bin",), **fields).held_out
    assert as_bin.num_bytes == known


@pytest.mark.parametrize("kind", LOSSY)
def test_a_tokenizer_that_loses_most_is_refused(tmp_path, kind):
    write(tmp_path / "a.jsonl", json_lines(*[f"{i} ДВЕ ЖАБЫ ИДУТ fox" for i in range(900)]))
    config = text_config(tmp_path / "a.jsonl", tokenizer=lossy(tmp_path / "t.json", kind))
    with raises("The tokenizer 't' loses [89].% of the text: .* give a tokenizer that was made"):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("foreign", [4, 3000])
def test_the_first_documents_do_not_stand_for_all(tmp_path, foreign):
    """Short documents, the first ones in another language than the others."""
    lines = ["ДВЕ ЖАБЫ ИДУТ"] * foreign + ["the fox runs"] * (3004 - foreign)
    lines = lines if foreign == 4 else lines[::-1]
    held = write(tmp_path / "b.jsonl", json_lines(*["the fox runs"] * 300))
    write(tmp_path / "a.jsonl", json_lines(*lines))
    config = text_config(
        tmp_path / "a.jsonl", tokenizer=lossy(tmp_path / "t.json", "bpe"), eval_paths=(f"v={held}",)
    )
    if foreign == 4:
        assert run(config, tmp_path / "out").tokenizer.get("lost", 0.0) < 0.02
    else:
        with raises("The tokenizer 't' loses 9.% of the text"):
            run(config, tmp_path / "out")


def test_what_a_normalizer_leaves_out_is_lost(tmp_path):
    write(tmp_path / "a.jsonl", json_lines(*[f"the fôx runs {i:05}\n" for i in range(90)]))
    tokenizer = hf.Tokenizer(hf.models.BPE({c: i for i, c in enumerate(["</s>", *ALPHABET])}, []))
    rules = [hf.normalizers.NFD(), hf.normalizers.StripAccents()]
    rules.append(hf.normalizers.Replace(hf.Regex("[0-9]"), ""))
    tokenizer.normalizer = hf.normalizers.Sequence(rules)
    tokenizer.save(str(tmp_path / "t.json"))
    config = text_config(tmp_path / "a.jsonl", tokenizer=str(tmp_path / "t.json"))
    assert run(config, tmp_path / "out").tokenizer["lost"] == round(5 / 15, 4)


def test_normalization_is_no_loss(tmp_path):
    write(tmp_path / "a.jsonl", json_lines(*[f"The Fox runs, {'x' * i}." for i in range(90)]))
    alphabet = [*"abcdefghijklmnopqrstuvwxyz.,"]
    vocab = {
        w: i for i, w in enumerate(["</s>", "[UNK]", *alphabet, *(f"##{c}" for c in alphabet)])
    }
    tokenizer = hf.Tokenizer(hf.models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = hf.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = hf.decoders.WordPiece()
    tokenizer.save(str(tmp_path / "t.json"))
    config = text_config(tmp_path / "a.jsonl", tokenizer=str(tmp_path / "t.json"))
    made = run(config, tmp_path / "out")
    assert manifest.notes(made) == []
    assert made.tokenizer.keys() == {"name", "fingerprint", "vocab_size", "eod"}


def test_a_text_that_changed_is_prepared_anew(config, tmp_path):
    cache = tmp_path / "cache"
    first = load(source="text", paths=config.paths, cache=cache)
    assert load(source="text", paths=config.paths, cache=cache).fingerprint == first.fingerprint
    assert len(list(cache.glob("*/manifest.json"))) == 1
    os.utime(tmp_path / "in/c.jsonl")  # touched: prepared anew, but to the same tokens
    assert load(source="text", paths=config.paths, cache=cache).fingerprint == first.fingerprint
    assert len(list(cache.glob("*/manifest.json"))) == 2
    write(tmp_path / "in/c.jsonl", json_lines("another text"))
    assert load(source="text", paths=config.paths, cache=cache).fingerprint != first.fingerprint


def test_the_command(config, tmp_path):
    def command(*flags):
        return subprocess.run(
            [sys.executable, "-m", "ngpt_jax.data.prepare", *flags],
            cwd=ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    out, other, data = f"--out={tmp_path}/out", f"--out={tmp_path}/b", f"{tmp_path}/in/c.jsonl"
    done = command("--source", "text", "--paths", str(tmp_path / "in"), out)
    assert done.returncode == 0, done.stderr
    assert "train: " in done.stdout
    assert "held_out: " in done.stdout
    assert command("--verify", out).returncode == 0
    for flags, message in [
        (["--source=text", out], "--source=text needs --paths, e.g. --paths=book.txt"),
        (["--source=text", "--paths=x"], "--out is missing"),
        (
            ["--source=bin", "--paths=x", out],
            "--source must be one of stdlib, prose, text, tfds, h",
        ),
        (["--source=text", "--paths=gone", out], "--paths: there is no file or folder 'gone'"),
        # Names of files are told as they are.
        (["--source=text", "--paths=data.jsonl", out], "file or folder 'data.jsonl'; check"),
        (["--source=text", "--paths=--config.data.x", out], "file or folder '--config.data.x'; c"),
        (["--source=text", f"--paths={data}", "--text_key=x", other], f"--paths: {data!r}, line 1"),
        (["--source=text", f"--paths={data}", "--text_key=x", other], "'text'; set --text_key."),
        (["--source=text", "--paths=x", "--held_out=2", out], "--held_out must lie between"),
        (["--source=stdlib", "--paths=x", out], "--paths is for --source=prose, text"),
        (["--source=stdlib", "--tokenizer=gone", out], "--tokenizer: "),
        (["--source=stdlib", "--workers=0", out], "workers"),
        (["--verify", f"--out={tmp_path}"], "there is no manifest.json in it"),
        (["--config.data.seed=1", out], "is a flag of training"),
    ]:
        done = command(*flags)
        assert done.returncode == 2, flags
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert message in done.stderr
    assert "Examples:" in command("--help").stdout


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason=f"needs {SHARED}, which is not part of the project")
@pytest.mark.parametrize("name", ["gpt2", "llama2-32k.json"])
def test_counts_are_those_of_the_tokenizers_themselves(tmp_path, name):
    file = SHARED / "corpus/prose.val.jsonl.gz"
    config = text_config(file, tokenizer=str(SHARED / "tokenizers" / name))
    made = run(config, tmp_path / "out", shard_tokens=30_000, workers=2)
    folder = SHARED / "tokenizers/gpt2"
    if name == "gpt2":
        direct = hf.ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    else:
        direct = hf.Tokenizer.from_file(str(SHARED / "tokenizers" / name))
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    count = sum(len(direct.encode(text, add_special_tokens=False).ids) + 1 for text in texts)
    assert sum(facts.tokens for facts in made.sets.values()) == count
    assert sum(facts.documents for facts in made.sets.values()) == len(texts) == 100
