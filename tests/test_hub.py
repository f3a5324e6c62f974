"""Data sets and tokenizers of the Hugging Face Hub, from a stand-in: the real one is not asked."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow
import pytest
import tokenizers
from hub_server import serving
from pyarrow import parquet

from ngpt_jax.config import ConfigError
from ngpt_jax.data.hub import Repository, find_repository
from ngpt_jax.data.text import hub as text_hub

ROOT = Path(__file__).parents[1]
CARD = {
    "configs": [
        {
            "config_name": "plain",
            "data_files": [
                {"split": "train", "path": "plain/train-*"},
                {"split": "test", "path": ["plain/test.jsonl"]},
            ],
        }
    ]
}


def texts(seed, count=300):
    return [f"document {seed} {i}, some more words {i * 7919 % 1000}. " * 9 for i in range(count)]


def shard(documents):
    file = io.BytesIO()
    table = pyarrow.table({"text": documents})
    parquet.write_table(table, file, compression="none", use_dictionary=False)
    return file.getvalue()


def jsonl(documents):
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


def tokenizer_file():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts(0), trainer)
    return tokenizer.to_str().encode()


@pytest.fixture
def hub():
    with serving() as (server, url):
        server.url = url
        files = {f"plain/train-{i:05}-of-00003.parquet": shard(texts(i)) for i in range(3)}
        files |= {"plain/test.jsonl": jsonl(texts("held out", 20)), "README.md": b"# text"}
        server.add("dataset", "me/text", files, CARD)
        server.add("dataset", "me/gated", files, CARD, gated=True)
        server.add("model", "me/tokenizer", {"tokenizer.json": tokenizer_file()})
        yield server


@pytest.fixture
def start(hub, tmp_path):
    """Starts a command with a home and a Hub of its own."""

    def start(*command, **more):
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path)}
        env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **more}
        return subprocess.Popen(
            [sys.executable, *command], env=env, cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start


@pytest.fixture
def prepare(start):
    """Runs data.prepare; returns its exit code and its output."""

    def prepare(*flags, out="out", paths="me/text", **more):
        command = ["-m", "ngpt_jax.data.prepare", "--source=hub", f"--paths={paths}", "--workers=1"]
        process = start(*command, f"--out={out}", *flags, **more)
        return process.communicate(timeout=300)[0], process.returncode

    return prepare


def size_of(folder):
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # it was deleted meanwhile
                total += os.stat(os.path.join(where, name)).st_size
    return total


def test_a_set_is_fetched_a_file_at_a_time_and_once(hub, prepare, tmp_path):
    """Ten files through a Hub that fails now and then; the disk never holds two of them."""
    files = {f"plain/train-{i:05}.parquet": shard(texts(i)) for i in range(10)}
    hub.add("dataset", "me/ten", files | {"plain/test.jsonl": jsonl(texts("held out", 20))}, CARD)
    one = max(map(len, files.values()))
    commit = hub.commit("dataset", "me/ten")
    at = f"/datasets/me/ten/resolve/{commit}/plain/train-00001.parquet"
    hub.faults["/api/datasets/me/ten"] = [429]
    hub.faults[at] = [503, 429]
    for path, _ in zip(files, range(3)):
        hub.faults[f"/cdn/{hashlib.sha256(files[path]).hexdigest()}"] = ["break"]
    most, done, fetched = 0, threading.Event(), tmp_path / "out/.fetched"

    def watch():
        nonlocal most
        while not done.wait(0.005):
            most = max(most, size_of(fetched) + size_of(tmp_path / "hf"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, code = prepare("--hub_eval_split=test", paths="me/ten")
    done.set()
    watcher.join()
    assert code == 0, output
    assert one / 2 < most < 1.1 * one + 20_000  # a file, and notes about it
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["origin"] == f"me/ten@{commit}"
    assert manifest["sets"]["train"]["documents"] == 3000
    # The same tokens as from files on the disk.
    folder = tmp_path / "local"
    for path, body in hub.repos["dataset", "me/ten"]["files"].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(body)
    command = [
        sys.executable, "-m", "ngpt_jax.data.prepare", "--source=text", "--out=here", "--workers=1",
        "--paths=local/plain/train-*", "--eval_paths=test=local/plain/test.jsonl",
    ]  # fmt: skip
    env = dict(os.environ, PYTHONPATH=str(ROOT), HOME=str(tmp_path))
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=env)
    for name in ("train-00000.bin", "test-00000.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    hub.log.clear()
    output, code = prepare("--hub_eval_split=test", paths="me/ten")
    assert code == 0 and hub.fetched() == []
    assert not fetched.exists()


def test_a_fetch_that_was_killed_goes_on(hub, prepare, start, tmp_path):
    files = {f"plain/train-{i}.parquet": shard(["12345678" * 3000] * 900) for i in range(3)}
    hub.add("dataset", "me/text", files | {"plain/test.jsonl": jsonl(texts(0, 20))}, CARD)
    hub.pause = 0.005
    command = ["-m", "ngpt_jax.data.prepare", "--source=hub", "--paths=me/text", "--workers=1"]
    command += ["--out=out", "--hub_eval_split=test", "--shard_tokens=1000000"]
    process = start(*command)
    deadline = time.monotonic() + 120
    while len(hub.fetched()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)  # two of them are whole
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.pause = 0.0
    assert len(list((tmp_path / "out").glob("train-*.bin"))) > 20
    hub.log.clear()
    output, code = prepare("--hub_eval_split=test", "--shard_tokens=1000000")
    assert code == 0, output
    assert len(hub.fetched()) < 4 and not (tmp_path / "out/.fetched").exists()


def test_a_set_that_changes_is_noticed_and_the_old_one_stays(hub, prepare, tmp_path):
    def documents(out):
        sets = json.loads((tmp_path / out / "manifest.json").read_text())["sets"]
        return sum(facts["documents"] for facts in sets.values())

    assert prepare()[1] == 0
    hub.repos["dataset", "me/text"]["files"]["plain/train-00003.parquet"] = shard(texts(3))
    hub.log.clear()
    output, code = prepare()
    newest = hub.commit("dataset", "me/text")
    assert code == 0 and f"give me/text@{newest}" in output and hub.fetched() == []
    output, code = prepare(out="new", paths=f"me/text@{newest}")
    assert code == 0 and (documents("out"), documents("new")) == (900, 1200)
    assert len(hub.fetched()) >= 4


def test_the_data_of_an_experiment_are_prepared_for_machines_without_a_network(
    hub, start, tmp_path
):
    command = [
        "--config=quickstart:debug", "--config.data.source=hub", "--config.data.paths=me/text",
        "--config.data.hub_eval_split=test", "--config.data.tokenizer=hub:me/tokenizer",
    ]  # fmt: skip
    alone = {"HF_HUB_OFFLINE": "1"}

    def said(*arguments, **more):
        process = start("-m", *arguments, *command, **more)
        output = process.communicate(timeout=300)[0]
        return process.returncode, output

    code, output = said("ngpt_jax.main", **alone)
    assert code == 2 and "is not on this machine" in output
    code, output = said("ngpt_jax.data.prepare", "--workers=1")
    assert code == 0 and "tokens to train on -> ~/.cache/ngpt_jax/data" in output, output
    hub.log.clear()
    code, output = said("ngpt_jax.main", **alone)
    assert code == 0 and hub.log == [], output
    # The model is handed on with the tokenizer that the Hub has.
    given = ["--workdir=runs/quickstart-debug", "--to_hf=handed_on"]
    process = start("-m", "ngpt_jax.tools.convert", *given, **alone)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    original = hub.repos["model", "me/tokenizer"]["files"]["tokenizer.json"]
    assert (tmp_path / "handed_on/original_tokenizer/tokenizer.json").read_bytes() == original
    code, output = said("ngpt_jax.data.prepare", "--out=x")
    assert code == 2 and "error: --out: with --config, give --config.data" in output
    code, output = said("ngpt_jax.data.prepare", "--source=hub")
    assert code == 2 and "error: --source: with --config, give --config.data" in output


def test_without_a_network_what_is_there_is_used(hub, prepare, tmp_path):
    assert prepare("--hub_eval_split=test")[1] == 0
    for more in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        output, code = prepare("--hub_eval_split=test", **more)
        assert code == 0 and ("HF_HUB_OFFLINE" in more or "cannot be reached" in output), output
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        output, code = prepare(paths="me/gated", out="new", **more)
        assert code == 2 and output.count("\n") == 1 and "data.source=text" in output


def test_files_in_the_cache_of_huggingface_hub_are_read_there_and_stay(
    hub, prepare, start, tmp_path
):
    code = (
        "import huggingface_hub as h\n"
        "for i in range(3):\n"
        "    name = f'plain/train-{i:05}-of-00003.parquet'\n"
        "    print(h.hf_hub_download('me/text', name, repo_type='dataset'))"
    )
    output, _ = start("-c", code).communicate()
    hub.log.clear()
    output, code = prepare()
    assert code == 0 and hub.fetched() == [], output
    assert len(list(tmp_path.glob("hf/hub/datasets--me--text/snapshots/*/plain/*.parquet"))) == 3


@pytest.mark.parametrize(
    ("flags", "paths", "more", "message"),
    [
        ([], "me/none", {}, "is not there, or not for you"),
        ([], "me/none", {"HF_TOKEN": "secret"}, "is not there, or not for you"),
        ([], "me/gated", {}, "is gated: accept its terms at http"),
        ([], "me/text@nope", {}, "has no revision 'nope'"),
        ([], "text", {}, "as OWNER/NAME"),
        (["--hub_split=dev"], "me/text", {}, "has no split 'dev' but test, train"),
        (["--hub_config=fancy"], "me/text", {}, "give one of the configs of me/text: plain"),
        (["--hub_eval_split=train"], "me/text", {}, "is the split to train on"),
        (["--tokenizer=hub:me/none"], "me/text", {}, "is not there, or not for you"),
        (["--tokenizer=hub:me/text"], "me/text", {}, "is not there, or not for you"),
    ],
)
def test_what_is_refused_is_one_line(prepare, flags, paths, more, message):
    output, code = prepare(*flags, paths=paths, **more)
    assert code == 2 and message in output and output.count("\n") == 1, output


def test_a_gated_set_with_a_token_and_a_tokenizer(hub, prepare, tmp_path):
    output, code = prepare("--tokenizer=hub:me/tokenizer", paths="me/gated", HF_TOKEN="secret")
    assert code == 0, output
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    commit = hub.commit("model", "me/tokenizer")
    assert manifest["tokenizer"]["name"] == f"me/tokenizer@{commit[:12]}"
    assert manifest["tokenizer"]["vocab_size"] == 300


def repository(paths, configs=()):
    return Repository("dataset", "me/x", "0" * 40, dict.fromkeys(paths, (1, "")), list(configs))


@pytest.mark.parametrize(
    ("paths", "configs", "config", "train"),
    [
        (["a.parquet", "b.jsonl.gz", "c.md"], [], None, ["a.parquet", "b.jsonl.gz"]),
        (["train.jsonl", "dev.jsonl", "test.jsonl"], [], None, ["train.jsonl"]),
        (["data/train-0.parquet", "data/valid-0.parquet"], [], None, ["data/train-0.parquet"]),
        (["a.jsonl", "b.txt", "dataset_infos.json"], [], None, ["a.jsonl"]),
        (["a/LICENSE.txt", "requirements.txt", "c4-train.0.json.gz"], [], None,
         ["c4-train.0.json.gz"]),
        (["dataset_infos.json", "en/train/0.parquet"], [], "en", ["en/train/0.parquet"]),
        (["train.json", "test.jsonl", "train_license.txt"], [], None,
         ["train.json", "train_license.txt"]),
        (
            ["train.json", "extra.jsonl", "b.jsonl", "license.txt"],
            [{"config_name": "a", "data_files": ["train.json", "extra.jsonl", "license.txt"]}],
            None, ["train.json"],
        ),
        (
            ["a.jsonl", "b.txt"], [{"config_name": "default", "data_files": {"train": "*.txt"}}],
            None, ["b.txt"],
        ),
        (["constrain.jsonl", "x-test.jsonl"], [], None, ["constrain.jsonl"]),
        (["en/train/0.parquet", "de/train/0.parquet"], [], "de", ["de/train/0.parquet"]),
        (
            ["x/1.parquet", "y/1.parquet"],
            [{"config_name": "default", "data_files": "x/*"}], None, ["x/1.parquet"],
        ),
        (
            ["x/y/1.parquet", "x/1.parquet"],
            [{"config_name": "a", "data_files": {"train": "x/**"}}], None,
            ["x/1.parquet", "x/y/1.parquet"],
        ),
        (
            ["x/1.parquet", "y/1.parquet"],
            [{"config_name": "a", "data_dir": "x"}, {"config_name": "b", "data_dir": "y",
              "default": True}], None, ["y/1.parquet"],
        ),
    ],
)  # fmt: skip
def test_the_files_of_a_split(paths, configs, config, train):
    assert text_hub._splits(repository(paths, configs), config, "data.")["train"] == train


def test_a_choice_between_configs_is_left_to_the_user():
    configs = [{"config_name": name, "data_files": f"{name}/*"} for name in "ab"]
    with pytest.raises(ConfigError, match="give one of the configs of me/x: a, b"):
        text_hub._splits(repository(["a/1.jsonl", "b/1.jsonl"], configs), None, "data.")


def test_where_the_hub_takes_calls_and_does_not_answer(hub, tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    arguments = ("dataset", "me/text", str(tmp_path), "data.paths")
    found = find_repository(*arguments)
    monkeypatch.setattr("ngpt_jax.data.hub._PATIENCE", 0.2)
    monkeypatch.setattr("ngpt_jax.data.hub._SILENCE", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        again = find_repository(*arguments)
        with pytest.raises(ConfigError, match="cannot be fetched"):
            find_repository("dataset", "me/other", str(tmp_path), "data.paths")
    assert again.commit == found.commit and "the hub cannot be reached" in again.note
    assert capsys.readouterr().err.count("trying again in 4 s") == 1


def test_the_patterns_of_a_card():
    paths = [
        "en/train-00.jsonl",
        "en/train-0x.jsonl",
        "en/deep/train-01.jsonl",
        "de/train-00.jsonl",
    ]
    assert text_hub._matching(paths, ["*/train-[0-9][0-9].jsonl"]) == [paths[0], paths[3]]
    assert text_hub._matching(paths, ["*/train-[!0-9][0-9].jsonl"]) == []
    assert text_hub._matching(paths, text_hub._files({"data_dir": "en/"})) == paths[:3]
    assert text_hub._files({"data_files": {"train": None}}) == {"train": []}
    repo = Repository(
        "dataset", "me/text", "0" * 40, dict.fromkeys(paths, (1, "")), [{"data_dir": "de"}]
    )
    assert text_hub._splits(repo, None, "data.") == {"train": ["de/train-00.jsonl"]}
