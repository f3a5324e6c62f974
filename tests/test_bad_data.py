"""Data that are wrong without looking so: each is refused in one line, or does no harm."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers as hf
import zstandard
from data_helpers import (
    ROOT,
    documents,
    json_lines,
    raises,
    text_config,
    write,
    write_array_record,
    write_bin,
)
from test_prepare import contents, load, run
from test_sources import TinySet

from ngpt_jax.config import DataConfig, default_config, from_config_dict
from ngpt_jax.config.fields import MixtureConfig
from ngpt_jax.data.preparing import folder as folder_lib
from ngpt_jax.data.preparing.folder import Stopped
from ngpt_jax.data.tokenizers.base import ByteTokenizer

RNG = np.random.default_rng(0)
TEXTS = ["".join(RNG.choice(list("abc \n"), 200)) + "." for _ in range(60)]


@pytest.fixture
def prepared(tmp_path):
    """A folder of bin shards and the text it was made of."""
    write(tmp_path / "in/a.jsonl", json_lines(*TEXTS))
    run(text_config(tmp_path / "in"), tmp_path / "out")
    return tmp_path / "out"


def test_another_text_key_is_another_text(tmp_path):
    rows = [json.dumps({"text": f"one {i}", "other": f"two {i}"}) for i in range(40)]
    write(tmp_path / "a.jsonl", "\n".join(rows))
    paths, cache = (str(tmp_path / "a.jsonl"),), tmp_path / "c"
    prints = {
        load(source="text", paths=paths, text_key=key, cache=cache).fingerprint
        for key in ("text", "other")
    }
    assert len(prints) == 2
    with raises("has no 'nope' but 'other', 'text'; set data.text_key"):
        load(source="text", paths=paths, text_key="nope", cache=cache)


def test_a_kill_between_the_first_shard_and_its_record(tmp_path, monkeypatch):
    write(tmp_path / "in/a.jsonl", json_lines(*TEXTS))
    config, real = text_config(tmp_path / "in"), folder_lib.ShardWriter.commit

    def killed(self, numbers):
        real(self, numbers)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(folder_lib.ShardWriter, "commit", killed)
        with pytest.raises(SystemExit):
            run(config, tmp_path / "cut")
    assert (tmp_path / "cut/train-00000.bin").exists()
    run(config, tmp_path / "cut")
    run(config, tmp_path / "whole")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("path", ["out/*.bin", "ou*", "."])
def test_shards_of_a_prepared_folder_one_by_one(prepared, path):
    """held_out-00000.bin is among them."""
    said = "is of a prepared folder, which knows its tokenizer and what is held out; give "
    for source in ("bin", "array_record"):  # to array_record, ids may look like text
        with raises(f"data.paths: .* {said}'.*out' itself"):
            load(source=source, paths=(str(prepared.parent / path),), cache=prepared.parent / "c")
    (prepared.parent / "b").mkdir()
    write_bin(prepared.parent / "b/a.bin", RNG.integers(0, 257, 500))
    files = {"paths": (str(prepared.parent / "b"),), "cache": prepared.parent / "c"}
    with raises(f"data.eval_paths: .*train-00000.bin' {said}its held-out files alone"):
        load(source="bin", eval_paths=(f"v={prepared}",), **files)
    held_out = f"v={prepared}/held_out-00000.bin"
    assert load(source="bin", eval_paths=(held_out,), **files).held_out[0].name == "v"


def test_the_manifest_of_another_program(prepared):
    other = prepared.parent / "other"
    other.mkdir()
    write_bin(other / "a.bin", RNG.integers(0, 257, 500))
    (other / "manifest.json").write_text('{"version": 1, "files": ["a.bin"]}')
    assert load(source="bin", paths=(str(other),), cache=prepared.parent / "c").tokens > 400


def test_what_is_said_of_a_prepared_folder_and_is_not_so(prepared):
    how = {"paths": (str(prepared),), "cache": prepared.parent / "c"}
    with raises("data.token_dtype=uint32, but '.*' holds uint16; set data.token_dtype=uint16"):
        load(source="bin", token_dtype="uint32", **how)
    with raises("data.source=array_record, but '.*' holds bin; set data.source=bin"):
        load(source="array_record", **how)
    assert load(source="bin", token_dtype="uint16", **how).tokens


def test_a_prepared_folder_without_its_manifest(prepared):
    (prepared / "manifest.json").unlink()
    with raises("data.paths: .*held_out-00000.bin' looks like held-out data"):
        load(source="bin", paths=(str(prepared),), cache=prepared.parent / "c")


def test_names_that_only_look_like_held_out_ones(tmp_path):
    for name in ("latest-0.bin", "medieval_1.bin"):
        write_bin(tmp_path / name, RNG.integers(0, 257, 500))
    assert load(source="bin", paths=(str(tmp_path),), cache=tmp_path / "c").tokens > 900


@pytest.mark.parametrize("name", ["x.txt.zst", "x.jsonl.zst"])
def test_zst_that_is_cut_short(tmp_path, name):
    pack = zstandard.ZstdCompressor().compress
    lines = json_lines(*TEXTS) if "jsonl" in name else "\n".join(TEXTS)
    frames = [pack(line.encode()) for line in lines.splitlines(keepends=True)]
    for data in (pack(lines.encode()), b"".join(frames)):
        (tmp_path / name).write_bytes(data)
        whole, _ = documents(text_config(tmp_path / name))
        assert "".join(whole).count(".") == 60
        for cut in (1, 9, len(data) // 2, len(data) - 3):
            (tmp_path / name).write_bytes(data[:-cut])
            with raises(f"data.paths: (cannot read .*{name}'|.*is not JSON)"):
                documents(text_config(tmp_path / name))
    (tmp_path / name).write_bytes(b"".join(frames[:7]))  # whole frames are a whole file
    assert documents(text_config(tmp_path / name))[0]
    (tmp_path / name).write_bytes(b"")
    with raises("cannot read .*: it is cut short"):
        documents(text_config(tmp_path / name))


def test_one_early_end_of_document_does_not_move_the_cut_there(tmp_path):
    tokens = np.full(100_000, 7)
    tokens[100] = 256
    file = write_bin(tmp_path / "a.bin", tokens)
    assert load(source="bin", paths=(str(file),), cache=tmp_path / "c").tokens == 95_000


def test_a_mixture_that_trains_on_what_it_holds_out(tmp_path):
    a, b = write(tmp_path / "a.txt", "a\ntext"), write(tmp_path / "b.txt", "b\ntext")
    mixture = {
        "one": MixtureConfig(source="text", paths=(str(a),), eval_paths=(f"v={b}",)),
        "two": MixtureConfig(source="text", paths=(str(b),)),
    }
    with raises("data.mixture.one.eval_paths: '.*b.txt' is in data.mixture.two.paths too"):
        load(source="mixture", mixture=mixture, cache=tmp_path / "c")


def test_a_mixture_with_two_shares_of_one_file(tmp_path):
    file = write(tmp_path / "a.jsonl", json_lines(*TEXTS))
    other = write(tmp_path / "b.jsonl", json_lines(*TEXTS[:9]))
    for fields in ({"held_out": 0.2}, {"eval_paths": (f"v={other}",)}):
        mixture = {
            "one": MixtureConfig(source="text", paths=(str(file),)),
            "two": MixtureConfig(source="text", paths=(str(file),), **fields),
        }
        with raises("data.mixture.two.held_out: '.*a.jsonl' is trained on by data.mixture.one too"):
            load(source="mixture", mixture=mixture, cache=tmp_path / "c")
        mixture["one"] = MixtureConfig(source="text", paths=(str(file),), **fields)
        assert load(source="mixture", mixture=mixture, cache=tmp_path / "c").tokens


def test_a_mixture_that_trains_on_a_held_out_split(tmp_path):
    TinySet(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    same = {"source": "tfds", "paths": (str(tmp_path),)}
    mixture = {
        "one": MixtureConfig(**same, tfds_eval_split="validation"),
        "two": MixtureConfig(**same, tfds_split="validation"),
    }
    with raises("data.mixture.one.tfds_eval_split: .* is in data.mixture.two.tfds_split too"):
        load(source="mixture", mixture=mixture, cache=tmp_path / "c")
    # A set is not called train, for what is trained on is.
    turned = {**same, "tfds_split": "validation", "tfds_eval_split": "train"}
    loaded = load(**turned, cache=tmp_path / "c")
    assert [held.name for held in loaded.held_out] == ["held_out"]
    assert loaded.tokens < 1000 < loaded.held_out[0].num_bytes


def test_a_mixture_with_two_shares_of_the_standard_library(tmp_path):
    mixture = {
        "one": MixtureConfig(source="stdlib"),
        "two": MixtureConfig(source="stdlib", held_out=0.3),
    }
    with raises("data.mixture.two.held_out: .* is trained on by data.mixture.one too"):
        load(source="mixture", mixture=mixture, cache=tmp_path / "c")


def test_a_file_of_empty_records(tmp_path):
    ids = RNG.integers(0, 257, 500).astype("<u2").tobytes()
    for name, records in (("a", [ids]), ("b", [b"", b""]), ("c", [ids])):
        write_array_record(tmp_path / f"{name}.ar", records)
    with raises("data.paths: '.*b.ar' holds no tokens; drop it"):
        load(source="array_record", token_dtype="uint16", paths=(f"{tmp_path}/*.ar",),
             cache=tmp_path / "c")  # fmt: skip


def test_damaged_shards_in_the_cache_are_called_so(tmp_path):
    """The user gave no --out, and data.paths is not to blame."""
    file = write(tmp_path / "a.jsonl", json_lines(*TEXTS))
    how = {"source": "text", "paths": (str(file),), "cache": tmp_path / "c"}
    load(**how)
    (shard,) = (tmp_path / "c").glob("*/train-*.bin")
    whole = shard.read_bytes()
    for damaged, said in ((whole[:-10], "damaged: "), (bytes(len(whole)), "was altered; ")):
        shard.write_bytes(damaged)
        with raises(
            f"data.cache: '.*train-00000.bin' .*{said}delete '.*', and the same command prepares"
        ):
            load(**how)
    shutil.rmtree(shard.parent)
    assert load(**how).tokens


def test_uint32_taken_for_uint16(tmp_path):
    file = write_bin(tmp_path / "a.bin", RNG.integers(0, 257, 500), "<u4")
    with raises(
        "token of .*a.bin' is 0 or near 0: it seems to hold uint32; set token_dtype=uint32"
    ):
        load(source="bin", paths=(str(file),), cache=tmp_path / "c")


def word_level(file, size):
    """A tokenizer of ``size`` ids."""
    vocab = {"</s>": 0} | {f"w{i}": i for i in range(1, size)}
    hf.Tokenizer(hf.models.WordLevel(vocab, unk_token="w1")).save(str(file))
    return str(file)


def zipf(size, most):
    return np.minimum((RNG.pareto(0.5, size) * 20).astype(np.int64) + 1, most)


@pytest.mark.parametrize("header", [None, (20240801, 7)])
def test_a_large_vocabulary_means_uint32(tmp_path, header):
    ids = zipf(20_000, 70_000)
    ids[::200] = 0
    write_bin(tmp_path / "a.bin", ids, "<u4", header)
    found = load(
        source="bin", paths=(str(tmp_path / "a.bin"),), cache=tmp_path / "c",
        tokenizer=word_level(tmp_path / "t.json", 70_001),
    )  # fmt: skip
    assert found.tokens + len(found.held_out[0].stream) == 20_000
    assert found.train[""].stream.read(0, 1000).tolist() == ids[:1000].tolist()


@pytest.mark.parametrize(
    ("dtype", "most", "vocab", "token_dtype", "message"),
    [
        ("<u4", 130_000, 60_000, None, "every second token of .* is 0 or near 0: .* set token_d"),
        ("<u4", 130_000, 130_001, "uint16", "every second token of .* seems to hold uint32; set"),
        (">u4", 130_000, 60_000, None, "seems to hold big-endian uint32; write it as little"),
        ("<i8", 60_000, 60_001, None, "seems to hold int64; write it as little-endian uint16 or"),
        ("<i8", 250, 257, None, "seems to hold int64; write it as little-endian uint16 or uint32"),
        ("<i8", 60_000, 60_001, "uint32", "seems to hold int64; write it as little-endian"),
        ("<i8", 130_000, 130_001, None, "seems to hold int64; write it as little-endian"),
        ("<i8", 130_000, 130_001, "uint16", "seems to hold int64; write it as little-endian"),
        (">i8", 60_000, 60_001, None, "seems to hold big-endian int64; write it as little-endian"),
        ("<u2", 60_000, 70_001, None, "has the token id .*, or set token_dtype"),
        ("<u2", 60_000, 60_001, "uint32", "has the token id .*, or set token_dtype"),
        (">u2", 30_000, 30_001, None, "seems to be big-endian; write it as little-endian"),
        (">u2", 30_000, 65_536, "uint16", "seems to be big-endian; write it as little-endian"),
        (">u4", 70_000, 70_001, None, "seems to be big-endian; write it as little-endian"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("source", ["bin", "array_record"])
def test_token_ids_of_another_type(tmp_path, source, dtype, most, vocab, token_dtype, message):
    ids, file = zipf(20_000, most), tmp_path / "a.bin"
    if source == "bin":
        write_bin(file, ids, dtype)
    else:
        token_dtype = token_dtype or ("uint16" if vocab <= 2**16 else "uint32")
        rows = [row.astype(dtype).tobytes() for row in ids.reshape(-1, 100)]
        write_array_record(file, rows)
    tokenizer = word_level(tmp_path / "t.json", vocab)
    with raises("data.*" + message):
        load(
            source=source, paths=(str(file),), cache=tmp_path / "c", tokenizer=tokenizer,
            token_dtype=token_dtype,
        )  # fmt: skip


@pytest.mark.parametrize("most", [60_000, 3000, 9])
def test_token_ids_of_the_right_type(tmp_path, most):
    tokenizer = word_level(tmp_path / "t.json", 60_001)
    sizes = (20_000, 1001, 17)
    for size in sizes:
        write_bin(tmp_path / f"{size}.bin", zipf(size, most))
    found = load(
        source="bin", paths=(str(tmp_path / "*.bin"),), cache=tmp_path / "c", tokenizer=tokenizer
    )
    assert found.tokens + len(found.held_out[0].stream) == sum(sizes)
    # Halves may look like this where the user says so, or where a length is odd.
    write_bin(tmp_path / "u.bin", np.tile([700, 0], 500))
    config = {"cache": tmp_path / "c", "token_dtype": "uint16", "tokenizer": tokenizer}
    assert load(source="bin", paths=(str(tmp_path / "u.bin"),), **config).tokens
    rows = [np.tile([700, 0], 50).astype("<u2").tobytes()] * 9 + [b"ab"]
    write_array_record(tmp_path / "u.array_record", rows)
    paths = (str(tmp_path / "u.array_record"),)
    assert load(source="array_record", paths=paths, **config).tokens


@pytest.mark.parametrize("weights", [(1e-7, 1.0), (1.0, 1e-7), (1e-9, 1e-9)])
def test_tiny_weights(tmp_path, weights):
    from test_packing import stream_of

    from ngpt_jax.data import pipeline
    from ngpt_jax.data.packing import Concatenated

    windows = {n: Concatenated(stream_of(np.full(9000, i)), 8, 256) for i, n in enumerate("ab")}
    dataset = pipeline.mixed_dataset(windows, dict(zip("ab", weights)), 0)
    share = weights[0] / sum(weights)
    n = 3 * 10**8
    seen = [int(dataset[n + i]["inputs"][0]) for i in range(50)]
    assert abs(seen.count(0) - 50 * share) <= 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.seed", -1, "data.seed must be a whole number from 0 to 4294967295, got -1"),
        ("data.cache", "", "data.cache must name a folder"),
        ("data.held_out", float("nan"), "data.held_out must be finite"),
        ("optimizer.learning_rate", float("inf"), "optimizer.learning_rate must be finite"),
        ("checkpoint.on_error", "ignore", "checkpoint.on_error must be one of stop, continue"),
        ("checkpoint.keep_every", 0, "checkpoint.keep_every must be positive"),
        ("data.packing", "first_fit", "data.packing must be one of concatenate, best_fit"),
        (
            "data.source",
            "web",
            "data.source must be one of stdlib, prose, text, tfds, hub, array_record, bin",
        ),
    ],
)
def test_bad_fields(field, value, message):
    values = default_config()
    values.train.steps = 1
    section, leaf = field.split(".")
    values[section][leaf] = value
    with raises(message):
        from_config_dict(values)


def test_held_out_sets_without_text(tmp_path):
    train = write_bin(tmp_path / "a.bin", RNG.integers(0, 257, 5000))
    val = write_bin(tmp_path / "v.bin", [256, 256])
    with raises("data: the held-out set 'v' holds no text"):
        load(source="bin", paths=(str(train),), eval_paths=(f"v={val}",), cache=tmp_path / "c")


def test_shards_altered_in_place(prepared):
    shard = prepared / "train-00000.bin"
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(bytes(data))
    with raises("data.paths: .*train-00000.bin' was altered; prepare the folder anew"):
        load(source="bin", paths=(str(prepared),), cache=prepared.parent / "c")
    shard.unlink()
    with raises("train-00000.bin' is missing"):
        run(text_config(prepared.parent / "in"), prepared)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float32"}, {"dtype": "int16"}, {"format": "parquet"}, {"tokenizer": {}},
        {"tokenizer": 5}, {"sets": {}}, {"sets": 5}, {"source": None, "extra": 1},
    ],
)  # fmt: skip
def test_manifests_with_wrong_fields(prepared, change):
    file = prepared / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with raises("manifest.json' is damaged .*; prepare the folder anew"):
        load(source="bin", paths=(str(prepared),), cache=prepared.parent / "c")


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokens", -5), ("tokens", "x"), ("tokens", 3), ("bytes", "x"), ("file", 5), ("sha256", None)],
)
def test_manifests_with_wrong_shards(prepared, name, value):
    file = prepared / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["sets"]["train"]["shards"][0][name] = value
    file.write_text(json.dumps(manifest))
    with raises("manifest.json' is damaged"):
        load(source="bin", paths=(str(prepared),), cache=prepared.parent / "c")


def test_manifests_that_are_no_text(prepared):
    file = prepared / "manifest.json"
    for content in (b"[" * 100_000, b"\xff\xfe", b""):
        file.write_bytes(content)
        with raises("manifest.json' is damaged"):
            load(source="bin", paths=(str(prepared),), cache=prepared.parent / "c")
    file.unlink()
    file.mkdir()
    with raises("manifest.json' is damaged"):
        load(source="bin", paths=(str(prepared),), cache=prepared.parent / "c")


@pytest.mark.parametrize(
    "progress",
    ["[" * 100_000, '{"source": 1}', '{"place": -5}', '{"place": ["a", 0, 0]}', '{"sets": []}'],
)
def test_damaged_progress(prepared, progress):
    config, out = text_config(prepared.parent / "in"), prepared.parent / "cut"
    with pytest.raises(Stopped):
        run(config, out, stopped=lambda: True)
    file = out / "progress.json"
    if progress.startswith("{"):
        progress = json.dumps(json.loads(file.read_text()) | json.loads(progress))
    file.write_text(progress)
    with raises("(progress.json' is damaged; delete|the beginning of another text)"):
        run(config, out)


def test_what_is_no_regular_file(tmp_path):
    write(tmp_path / "d/a.txt", "a\ntext")
    (tmp_path / "d/loop1").symlink_to(tmp_path / "d")
    (tmp_path / "d/loop2").symlink_to(tmp_path / "d")
    assert documents(text_config(tmp_path / "d/**/*.txt"))[0] == ["a\ntext"]
    (tmp_path / "d/gone.txt").symlink_to(tmp_path / "nowhere")
    with raises("data.paths: .*gone.txt' is a link to nothing, or no regular file; drop it"):
        documents(text_config(tmp_path / "d"))
    (tmp_path / "d/gone.txt").unlink()
    os.mkfifo(tmp_path / "d/pipe.txt")
    for path in ("d", "d/*.txt"):
        with raises("data.paths: .*pipe.txt' is a link to nothing, or no regular file; drop it"):
            documents(text_config(tmp_path / path))


def test_storage_that_is_not_known(tmp_path):
    for source in ("text", "bin", "array_record", "tfds"):
        with raises("data.paths: 'foo://x/a.txt' is on a storage that cannot be used"):
            load(source=source, paths=("foo://x/a.txt",), cache=tmp_path / "c")
    write(tmp_path / "a.txt", "a\ntext")
    with raises("'gs://b/y' cannot be written: "):
        run(text_config(tmp_path / "a.txt"), "gs://b/y")


def test_damaged_sets_of_tfds(tmp_path):
    folder = tmp_path / "tfds"
    TinySet(data_dir=str(folder), file_format="array_record").download_and_prepare()
    shard = next(folder.rglob("*train*.array_record*"))
    whole = shard.read_bytes()
    config = DataConfig(source="tfds", paths=(str(folder),))
    for data in (b"", whole[: len(whole) // 2], b"garbage" * 999):
        shard.write_bytes(data)
        with raises("data.tfds_split: split 'train'.*(cannot be read|not UTF-8).*prepare the set"):
            documents(config)
    shard.unlink()
    with raises("data.tfds_split: .* cannot be read: No such file"):
        documents(config)


def test_text_that_a_tokenizer_cannot_encode(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "a\ntext")

    def broken(self, texts):
        raise Exception("WordLevel error: Missing [UNK] token")

    monkeypatch.setattr(ByteTokenizer, "encode_batch", broken)
    with raises("The tokenizer 'byte' cannot encode the text .*UNK.*; give another"):
        run(text_config(tmp_path / "a.txt"), tmp_path / "out")


def test_array_record_on_a_full_disk(tmp_path):
    """A real limit on the size of files."""
    write(tmp_path / "a.jsonl", json_lines(*TEXTS * 20))
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
    for kind in ("array_record", "bin"):
        done = subprocess.run(
            [sys.executable, "-c", limited + "from ngpt_jax.config.command import run_command;"
             " import sys; from ngpt_jax.data.prepare import _command; run_command(_command)",
             "--source=text", f"--paths={tmp_path}/a.jsonl", f"--out={tmp_path}/{kind}",
             f"--format={kind}", "--workers=1"],
            cwd=ROOT, text=True, capture_output=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert re.fullmatch(rf"error: '.*{kind}' cannot be written: .*\n", done.stderr)


def words_file(folder):
    """A tokenizers JSON file: what bytes are tokenized with has no workers."""
    words = hf.Tokenizer(hf.models.WordLevel({"a": 0, "</s>": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    words.save(str(folder / "words.json"))
    return folder / "words.json"


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    code = """
import sys; sys.path.insert(0, "tests")
from ngpt_jax.data.preparing import folder, tokenize
if __name__ == "__main__":
    tokenize._PORTIONS_BEFORE_WORKERS, tokenize._CHARACTERS_AT_ONCE = 1, 1000
    import multiprocessing, test_prepare as t
    def told(*args):
        print(*(p.pid for p in multiprocessing.active_children()), flush=True)
        import time; time.sleep(60)
    folder.Progress.show = lambda self, *_: (
        told() if len(multiprocessing.active_children()) == 2 else None)
    t.run(t.text_config(sys.argv[1], tokenizer=sys.argv[3]), sys.argv[2], workers=2)
"""
    write(tmp_path / "a.jsonl", json_lines(*TEXTS))
    (tmp_path / "program.py").write_text(code)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "a.jsonl"),
         str(tmp_path / "out"), str(words_file(tmp_path))],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.time() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_a_second_preparation_waits_and_can_be_stopped(prepared, tmp_path, monkeypatch):
    import fcntl

    out = tmp_path / "locked"
    out.mkdir()
    said = []
    terminal = type("T", (), {"say": lambda self, text: said.append(text)})()
    with open(out / ".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(Stopped):
            run(text_config(tmp_path / "in"), out, stopped=lambda: bool(said), terminal=terminal)
    assert said == [f"waiting for another process, which prepares {out}"]


def test_an_occupied_folder_is_left_as_it_is(tmp_path):
    write(tmp_path / "a.txt", "a\ntext")
    write(tmp_path / "occupied/x", "x")
    with raises("occupied' is not empty; choose another --out, or delete it"):
        run(text_config(tmp_path / "a.txt"), tmp_path / "occupied")
    assert os.listdir(tmp_path / "occupied") == ["x"]


def test_a_dry_run_sees_what_is_wrong(prepared, tiny):
    from ngpt_jax.training import dry_run

    for fields, message in [
        ({"data.source": "bin", "data.paths": (str(prepared),)}, None),
        ({"data.source": "array_record", "data.paths": (str(prepared),)}, "set data.source=bin"),
        ({"data.cache": "gs://x/y"}, "must be a folder of this machine"),
    ]:
        _, problem = dry_run.report(tiny(**{"model.vocab_size": 300, **fields}))
        assert (message is None) == (problem is None), problem
        assert message is None or message in str(problem)
    shutil.copy(prepared / "train-00000.bin", prepared.parent / "cut.bin")
    with (prepared.parent / "cut.bin").open("ab") as f:
        f.write(b"x")
    _, problem = dry_run.report(
        tiny(**{"model.vocab_size": 300, "data.source": "bin",
                "data.paths": (str(prepared.parent / "cut.bin"),)})
    )  # fmt: skip
    assert "is no multiple of 2" in str(problem)
