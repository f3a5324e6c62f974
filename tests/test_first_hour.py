"""The first hour: short names, a tokenizer of one's own, and what a run or a failure leaves."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import tokenizers
from data_helpers import json_lines, write
from etils import epath

from ngpt_jax import plots
from ngpt_jax.config import ConfigError
from ngpt_jax.config.experiment import call_in_file, shipped
from ngpt_jax.data.text.held_out import choose_split
from ngpt_jax.training import history, loop, metrics

ROOT = Path(__file__).parents[1]
SMALL = (
    "--config.train.steps=4 --config.log.every=2 --config.model.layers=1 --config.model.width=16"
    " --config.model.context=32 --config.sample.tokens=8"
).split()


@pytest.fixture
def start(tmp_path):
    """Runs a command in an empty folder, where nothing of the clone lies; returns its output."""
    folder = tmp_path / "empty"
    folder.mkdir()

    def start(*command, code=0):
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=folder, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout
        return done.stdout

    start.folder = folder
    return start


# --------------------------------------------------------------------------------- short names


def test_an_experiment_by_its_short_name_from_another_folder(start):
    out = start("-m", "ngpt_jax.main", "--config=quickstart:debug", "--print_config")
    file = f"--config={ROOT}/experiments/quickstart.py:debug"
    assert out == start("-m", "ngpt_jax.main", file, "--print_config")
    assert "config.model.width = 32 " in out
    out = start("-m", "ngpt_jax.main", "--config=nonsense", code=2)
    assert "error: --config: no file 'nonsense'; give one, or a name: 0_5b, 124m, 1b," in out
    assert len(out.splitlines()) == 1


def test_a_file_goes_before_a_short_name_where_its_path_is_given(start):
    write(start.folder / "quickstart.py", "def get_config(variants): raise ValueError('mine')")
    out = start("-m", "ngpt_jax.main", "--config=quickstart.py", "--print_config", code=2)
    assert out == "error: --config=quickstart.py: mine\n"


def test_the_package_has_all_rooms_and_the_experiments():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {file.parent for file in (ROOT / "ngpt_jax").rglob("*.py")}
    there = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert {*project["packages"]} == there | {"ngpt_jax.experiments"}
    assert project["package-dir"] == {"ngpt_jax.experiments": "experiments"}
    names = {file.stem for file in (ROOT / "experiments").glob("*.py")}
    assert {"quickstart", "124m", "0_5b", "1b"} <= shipped().keys() <= names
    for path in shipped().values():  # they need nothing that is in the clone alone
        call_in_file("config", path, "get_config")


# ------------------------------------------------------------------------ a tokenizer of one's own


def pasted(out, module):
    """The arguments of the command that the output tells the user to run next."""
    (line,) = re.findall(rf"^(?:train with it:|train on it:| ) python (-m {module} .*)$", out, re.M)
    return shlex.split(line)


@pytest.mark.slow
def test_own_text_own_tokenizer_training_and_sampling_in_three_commands(start, book):
    """Each command but the first is the one that the command before it tells."""
    write(start.folder / "book.txt", Path(book).read_text())
    out = start(
        "-m", "ngpt_jax.data.train_tokenizer", "--source=text", "--paths=book.txt",
        "--vocab_size=300", "--out=book.json",
    )  # fmt: skip
    assert "book.json: 300 tokens, learned from 1 documents (" in out
    train = pasted(out, "ngpt_jax.main")
    assert train == [
        "-m", "ngpt_jax.main", "--config=quickstart", "--workdir=runs/book",
        "--config.data.source=text", "--config.data.paths=book.txt",
        "--config.data.tokenizer=book.json",
    ]  # fmt: skip
    out = start(*train, "--config=quickstart:debug", *SMALL)
    assert "held-out text: " in out and out.splitlines()[-4] == "next:"
    assert (start.folder / "runs/book/loss.png").exists()
    sample = pasted(out, "ngpt_jax.tools.sample")
    assert start(*sample, "--tokens=8").startswith("def ")
    evaluate = pasted(out, "ngpt_jax.tools.evaluate")
    assert "held-out text" in start(*evaluate)
    duel = pasted(out, "ngpt_jax.tools.duel")
    name, workdir = "--config=quickstart:debug", "--workdir=runs/book-duel"
    assert duel[2:] == [name, workdir, *train[4:], *SMALL]


def test_the_tokenizer_learns_from_the_training_text_alone_and_always_the_same(start, tmp_path):
    texts = [f"{i} word{i * 7919 % 97} " * 20 + chr(0x4E00 + i) * 30 for i in range(60)]
    write(start.folder / "in.jsonl", json_lines(*texts))
    command = (
        "-m", "ngpt_jax.data.train_tokenizer", "--source=text", "--paths=in.jsonl",
        "--vocab_size=400", "--held_out=0.2",
    )  # fmt: skip
    start(*command, "--out=a.json")
    start(*command, "--out=b.json")
    a = (start.folder / "a.json").read_bytes()
    assert a == (start.folder / "b.json").read_bytes()

    split = choose_split(lambda: texts, 0.2, "")
    train = [text for text in texts if "train" in split(text)]
    assert 0 < len(train) < 60
    write(start.folder / "train.jsonl", json_lines(*train))
    write(start.folder / "held_out.jsonl", json_lines("nothing of this: " + "zqzq " * 500))
    given = ("--paths=train.jsonl", "--eval_paths=val=held_out.jsonl", "--out=c.json")
    start("-m", "ngpt_jax.data.train_tokenizer", "--source=text", "--vocab_size=400", *given)
    assert a == (start.folder / "c.json").read_bytes()

    out = start(*command, "--out=a.json", code=2)
    assert out == "error: --out=a.json is there already; choose another, or delete it.\n"
    assert (start.folder / "a.json").read_bytes() == a


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--vocab_size=257", "--out=x.json"], "258"), (["--out=x.model"], "--out: name the file"),
     ([], "--out: name the file"), (["--out=x.json", "--paths=nowhere.txt"], "nowhere.txt"),
     (["--out=nowhere/x.json"], "there is no folder nowhere"),
     (["--out=x.json", "--paths=blank.txt", "--eval_paths=v=book.txt"], "there is no text in it"),
     (["--out=x.json", "--config.train.steps=1"], "--config.train.steps is a flag of training")],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_what_a_tokenizer_cannot_be_trained_with_is_one_line(start, flags, message):
    write(start.folder / "book.txt", "some words\nmore words\n" * 40)
    write(start.folder / "blank.txt", "\n \n")
    paths = [] if any("--paths" in flag for flag in flags) else ["--paths=book.txt"]
    out = start("-m", "ngpt_jax.data.train_tokenizer", "--source=text", *paths, *flags, code=2)
    assert out.splitlines()[-1].startswith("error: ") and message in out
    assert not list(start.folder.glob("*.json"))


def test_tokens_of_own_text_stand_for_all_of_it(start):
    write(start.folder / "book.txt", "plain words\nmore words\n" * 40)
    out = start(
        "-m", "ngpt_jax.data.train_tokenizer", "--source=text", "--paths=book.txt",
        "--vocab_size=5000", "--out=book.json",
    )  # fmt: skip
    assert "warning: the text has no more to learn from" in out
    tokenizer = tokenizers.Tokenizer.from_file(str(start.folder / "book.json"))
    assert tokenizer.get_vocab_size() < 300
    text = "never seen: \u00e9 \u2192 \U0001f600\n\t  words"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    out = start(
        "-m", "ngpt_jax.data.prepare", "--source=text", "--paths=book.txt", "--out=tokens",
        "--tokenizer=book.json", "--workers=1",
    )  # fmt: skip
    assert pasted(out, "ngpt_jax.main")[2:] == [
        "--config=quickstart", "--workdir=runs/tokens", "--config.data.source=bin",
        "--config.data.paths=tokens", "--config.data.tokenizer=book.json",
    ]  # fmt: skip


# ------------------------------------------------------------- what a run and what a failure leaves


def fake_wandb(monkeypatch, fails):
    def init(**_):
        if fails:
            raise RuntimeError("no network")
        return types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))


@pytest.mark.slow
def test_a_failed_start_leaves_no_folder_and_takes_none_away(small, tmp_path, monkeypatch):
    fake_wandb(monkeypatch, fails=True)
    config = small(**{"log.wandb_project": "x", "train.steps": 2})
    with pytest.raises(ConfigError, match="wandb did not start .no network.; or set it to None"):
        loop.train(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    write(tmp_path / "mine" / "notes.txt", "mine")
    with pytest.raises(ConfigError, match="wandb did not start"):
        loop.train(config, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    fake_wandb(monkeypatch, fails=False)
    assert loop.train(config, tmp_path / "new") == 0
    before = {path.name for path in (tmp_path / "new").iterdir()}
    fake_wandb(monkeypatch, fails=True)
    with pytest.raises(ConfigError, match="wandb did not start"):
        loop.train(config, tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == before


@pytest.mark.slow
def test_the_plot_at_the_end_and_a_plot_that_fails(small, tmp_path, monkeypatch, capsys):
    config = small()
    assert loop.train(config, tmp_path) == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "loss.csv").read_text().splitlines()
    assert table[0] == "run,set,step,loss"
    losses = history.read_losses(tmp_path)
    assert [step for step, _ in losses.train] == [3, 6, 9, 12]
    assert [step for step, _ in losses.held_out["held_out"]] == [4, 8, 12]
    assert losses.at_end() == losses.held_out["held_out"][-1][1]
    assert table[1] == f"ngpt,training,3,{losses.train[0][1]!r}" and len(table) == 8
    assert f"losses: {tmp_path}/loss.png" in capsys.readouterr().out

    for error in (OSError(28, "No space left on device"), ValueError("a font")):

        def fail(*_, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(plots, "save", fail)
            assert loop.train(config, tmp_path) == 0
        said = capsys.readouterr().out
        assert "warning: loss.png cannot be written: " in said
        assert "held-out text: " in said and "losses: " not in said


def test_losses_are_read_from_what_a_crash_has_left(tmp_path):
    rows = [
        {"step": 2, "train/loss": 3.0}, {"step": 4, "train/loss": 2.5, "eval/a/loss": 2.75},
        {"step": 4, "eval/b/c/loss": 2.25, "eval/b/c/tokens": 9}, {"no step": 1},
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write(tmp_path / "metrics.jsonl", text + '[]\n7\n{"step": 6, "train/lo')
    losses = history.read_losses(tmp_path)
    assert losses == ([(2, 3.0), (4, 2.5)], {"a": [(4, 2.75)], "b/c": [(4, 2.25)]})
    assert losses.at_end() == 2.5
    assert history.read_losses(tmp_path / "none") == ([], {})
    history.plot_losses({"x": history.Losses([], {})}, tmp_path / "empty.png")
    assert (tmp_path / "empty.csv").read_text() == "run,set,step,loss\n"


def test_a_run_in_a_folder_whose_name_looks_like_a_pattern(tmp_path):
    """Its rows are found again, and those of steps that are made again go."""
    folder = epath.Path(tmp_path / "run [1]*")
    folder.mkdir()
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writer = metrics.MetricWriter(folder, start)
        for step in steps:
            writer.write(step, {"train/loss": step + start / 10})
        writer.close()
    assert history.read_losses(folder).train == [(1, 1), (2, 2), (3, 3.2), (4, 4.2)]
