"""gs:// on a stand-in for a bucket: text, prepared folders and bin files."""

import base64
import hashlib
import sys
from typing import ClassVar

import numpy as np
import pytest
from data_helpers import raises
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from ngpt_jax.checkpoint import checksums
from ngpt_jax.config import DataConfig
from ngpt_jax.data import corpus
from ngpt_jax.data.list_files import find_files
from ngpt_jax.data.preparing.folder import prepare_folder
from ngpt_jax.data.text.sources import open_source
from ngpt_jax.data.tokenizers.load import load_tokenizer
from ngpt_jax.training.workdir import open_workdir


class Bucket(MemoryFileSystem):
    """In memory, under the names of Google's storage."""

    protocol = ("gs", "gcs")
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    def __init__(self, *args, finalize_on_close=None, **kwargs):
        super().__init__(*args, **kwargs)

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").removeprefix("gcs://").strip("/")


@pytest.fixture
def bucket(monkeypatch):
    for name in ("gs", "gcs"):
        monkeypatch.setitem(_registry, name, Bucket)
    Bucket.store.clear()
    folder = epath.Path("gs://bucket/in")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    backend.fsspec_backend._get_filesystem.cache_clear()  # it outlives the test


def load(cache, **fields):
    config = DataConfig(cache=str(cache), **fields)
    return corpus.load_corpus(config, load_tokenizer(config), 4)


def test_text_and_tokens_in_a_bucket(bucket, tmp_path):
    for i in range(9):
        (bucket / f"{i}.txt").write_text(f"document {i}\n")
    (bucket / "t.bin").write_bytes(np.arange(250).astype("<u2").tobytes())
    config = DataConfig(source="text", paths=("gs://bucket/in/*.txt",))
    out = epath.Path("gs://bucket/out")
    tokenizer = load_tokenizer(config)
    made = prepare_folder(open_source(config), 0.3, tokenizer, out, shard_tokens=40, workers=1)
    assert prepare_folder(open_source(config), 0.3, tokenizer, out, shard_tokens=40) == made
    assert sorted(p.name for p in out.iterdir()) == [
        "held_out-00000.bin", "manifest.json", "train-00000.bin"
    ]  # fmt: skip
    by_text = load(tmp_path, source="text", paths=config.paths, held_out=0.3)
    by_folder = load(tmp_path, source="bin", paths=("gs://bucket/out",))
    assert by_folder.tokens == by_text.tokens
    np.testing.assert_equal(by_folder.train[""][3], by_text.train[""][3])
    by_file = load(tmp_path, source="bin", paths=("gs://bucket/in/t.bin",))
    assert by_file.train[""][2]["targets"].tolist() == [9, 10, 11, 12]


@pytest.mark.parametrize("pattern", ["", "/*", "/**", "/**/*"])
def test_a_folder_of_a_bucket_is_listed_as_a_local_one_is(bucket, tmp_path, pattern):
    for folder in (bucket, epath.Path(tmp_path)):
        for name in ("a.txt", "B.TXT", "README.md", ".hidden.txt", "sub/c.txt", "sub/deep/d.txt",
                     "sub/e.csv", ".git/f.txt"):  # fmt: skip
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
    listed = []
    for folder in (str(bucket), str(tmp_path)):
        files, left_out = find_files([f"{folder}{pattern}"], "data.paths", (".txt",))
        names = [str(file).removeprefix(folder) for file in files]
        listed.append((names, [line.replace(folder, "") for line in left_out]))
    assert listed[0] == listed[1]
    assert "/sub/c.txt" in listed[0][0]
    assert "leaves out" in listed[0][1][0]


def test_held_out_files_of_a_bucket_are_not_trained_on(bucket):
    for name in ("train.txt", "test.txt"):
        (bucket / name).write_text(name)
    for pattern in ("", "/*", "/**"):
        with raises("data.paths: 'gs://bucket/in/test.txt' looks like held-out data"):
            open_source(DataConfig(source="text", paths=(f"gs://bucket/in{pattern}",)))


def test_what_is_not_in_a_bucket(bucket, tmp_path):
    with raises("data.paths: no file matches 'gs://bucket/x/\\*.txt'; check"):
        load(tmp_path, source="text", paths=("gs://bucket/x/*.txt",))
    with raises("data.paths: there is no file or folder 'gs://bucket/x'"):
        load(tmp_path, source="bin", paths=("gs://bucket/x",))
    (bucket / "a.array_record").write_bytes(b"x")
    with raises("data.paths: array_record files are read from local disks alone, not 'gs://"):
        load(tmp_path, source="array_record", paths=("gs://bucket/in/a.array_record",))
    with raises("data.cache = 'gs://bucket/cache' must be a folder of this machine"):
        load("gs://bucket/cache")


@pytest.mark.parametrize("source", ["text", "bin", "array_record", "tfds"])
def test_paths_on_a_storage_that_is_not_installed(tmp_path, source, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with raises(r"data.paths: 'gs://b/x' is on .* and gs:// with pip install '\.\[gcs\]' in the"):
        load(tmp_path, source=source, paths=("gs://b/x",))


def test_storage_that_is_not_installed():
    with raises(r"--workdir=gs://bucket/run cannot be reached \(.*\); gs:// needs pip install"):
        open_workdir("gs://bucket/run")


@pytest.mark.parametrize("knows", [True, False], ids=["it knows md5", "it does not"])
def test_checksums_of_a_checkpoint_on_gs(bucket, tmp_path, monkeypatch, knows):
    """Nothing is downloaded, and what has changed is noticed; a copy on a disk is read."""
    info, opened, downloaded = Bucket.info, Bucket._open, []

    def info_of_gs(self, path, **kwargs):
        found = info(self, path, **kwargs)
        if knows and found["type"] == "file":
            md5 = hashlib.md5(self.store[self._strip_protocol(path)].getvalue())
            found["md5Hash"] = base64.b64encode(md5.digest()).decode()
        return found

    def noted(self, path, mode="rb", **kwargs):
        downloaded.extend([path.rpartition("/")[2]] if mode == "rb" else [])
        return opened(self, path, mode, **kwargs)

    monkeypatch.setattr(Bucket, "info", info_of_gs)
    monkeypatch.setattr(Bucket, "_open", noted)
    folder, copy = epath.Path("gs://bucket/run/checkpoints/5"), epath.Path(tmp_path)
    for base in (folder, copy):
        (base / "state/d").mkdir(parents=True, exist_ok=True)
        (base / "state/d/a").write_bytes(b"a" * 9)
        (base / "b").write_bytes(b"bb")
    checksums.write(folder, {"step": 5}, {})
    checksums.verify(folder)
    assert [name for name in downloaded if name in "ab"] == ([] if knows else ["b", "a"] * 2)
    (copy / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    checksums.verify(copy)
    for base in (folder, copy):
        (base / "state/d/a").write_bytes(b"a" * 8 + b"b")
        with pytest.raises(checksums.DamagedCheckpoint, match="state/d/a has another checksum"):
            checksums.verify(base)
        (base / "state/d/a").unlink()
        with pytest.raises(checksums.DamagedCheckpoint, match="state/d/a is missing"):
            checksums.verify(base)


def test_a_checkpoint_of_a_disk_is_verified_on_gs(bucket, tmp_path):
    (tmp_path / "a").write_bytes(b"a" * 9)
    checksums.write(epath.Path(tmp_path), {}, {})
    for name in ("a", "manifest.json"):
        (bucket / name).write_bytes((tmp_path / name).read_bytes())
    checksums.verify(bucket)
    (bucket / "a").write_bytes(b"b" * 9)
    with pytest.raises(checksums.DamagedCheckpoint, match="a has another checksum"):
        checksums.verify(bucket)
