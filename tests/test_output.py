"""What cannot be shown to the user ends nothing that succeeded; a missing backend is one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ngpt_jax.errors import tell
from ngpt_jax.terminal import Terminal

ROOT = Path(__file__).parents[1]


def run(*command, **env):
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)], cwd=ROOT, capture_output=True, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", **env},
    )  # fmt: skip


def training(tmp_path, book):
    return [
        "ngpt_jax.main", f"--config={ROOT}/experiments/quickstart.py:debug",
        f"--workdir={tmp_path}/run", "--config.data.source=text", f"--config.data.paths={book}",
        f"--config.data.cache={tmp_path}/cache", "--config.train.steps=2",
        "--config.model.width=16", "--config.sample.prompt=é→", "--config.sample.tokens=8",
    ]  # fmt: skip


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.slow
@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, C_LOCALE], ids=["ascii", "C"])
def test_a_run_whose_output_cannot_be_encoded(tmp_path, book, env):
    done = run(*training(tmp_path, book), **env)
    assert done.returncode == 0, done.stderr
    assert (rb"\xe9\u2192" if env is not C_LOCALE else rb"\udcc3\udca9") in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_preparation_whose_output_cannot_be_encoded(tmp_path, encoding):
    for name in ("a", "b"):
        rows = [json.dumps({"text": f"{name} text {i} " * 20}) for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    done = run(
        "ngpt_jax.data.prepare", "--source=text", f"--paths={tmp_path}/a.jsonl",
        f"--eval_paths=→ł={tmp_path}/b.jsonl", f"--out={tmp_path}/out", PYTHONIOENCODING=encoding,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rb"\u2192\u0142: " in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_error_that_cannot_be_encoded(encoding):
    done = run("ngpt_jax.main", "--config=ł.py", PYTHONIOENCODING=encoding)
    assert done.returncode == 2
    assert done.stderr.startswith(rb"error: ")
    assert rb"\u0142.py" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_a_command_whose_output_is_closed(tmp_path, closed):
    code = """
from ngpt_jax.config import command
def work(overrides):
    from ngpt_jax.errors import drop_unwritten, tell
    from ngpt_jax.terminal import Terminal
    file = open("out", "w")  # it does not take the place of stdout
    terminal = Terminal()
    terminal.say("line")
    terminal.close()
    tell("warning: line")
    print("line")
    file.write("done")
    drop_unwritten()
command.run_command(work)
"""
    done = subprocess.run(
        ["bash", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code],
        cwd=tmp_path, capture_output=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_text() == "done"


class Gone:
    """A stream that nobody reads any more."""

    encoding = "ascii"

    def __init__(self, error):
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error

    def isatty(self):
        return True


@pytest.mark.parametrize(
    "error",
    [OSError(5, "Input/output error"), OSError(28, "No space"), BrokenPipeError(32, "Broken pipe"),
     UnicodeEncodeError("ascii", "é", 0, 1, "no"), ValueError("I/O operation on closed file")],
    ids=["terminal gone", "disk full", "pipe closed", "not encodable", "closed"],
)  # fmt: skip
def test_a_terminal_that_fails(monkeypatch, error):
    monkeypatch.setenv("TERM", "xterm")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Gone(error))
    terminal = Terminal()
    terminal.say("é")
    terminal.show("step", 0.5, "é")
    terminal.say("line")
    terminal.show("step", 0.7, "é")
    terminal.close()
    terminal.tell("line")
    tell("warning: line")


@pytest.mark.parametrize(("term", "draws"), [("dumb", False), ("unknown", False), ("xterm", True)])
def test_a_dumb_terminal_gets_plain_lines(monkeypatch, term, draws):
    monkeypatch.setenv("TERM", term)
    written = []
    stream = SimpleNamespace(
        write=written.append, flush=lambda: None, isatty=lambda: True, encoding="utf-8"
    )
    monkeypatch.setattr(sys, "stdout", stream)
    terminal = Terminal()
    terminal.show("step 1", 0.5, "loss 3")
    terminal.tell("step 1  loss 3")
    terminal.close()
    text = "".join(written)
    assert ("\x1b" in text) == draws
    assert draws or text == "step 1  loss 3\n"


@pytest.mark.slow
def test_few_file_handles_are_enough(tmp_path, book):
    command = [sys.executable, "-m", *training(tmp_path, book), "--config.data.workers=2"]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -n 256; exec "$@"', "bash", *command],
        cwd=ROOT, capture_output=True, check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "tpu", "nonsense"])
def test_a_backend_that_is_not_there_is_one_line(tmp_path, book, platform):
    done = run(*training(tmp_path, book), JAX_PLATFORMS=platform)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 2, lines
    assert len(lines) == 1 or platform == "tpu"  # libtpu has words of its own
    assert lines[-1].startswith(f"error: JAX_PLATFORMS={platform}: jax finds no such device here")
    assert "unset JAX_PLATFORMS" in lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [("main", "--config=experiments/quickstart.py", "--dry_run"), ("tools.benchmark",),
     ("tools.benchmark_decode",), ("tools.sample", "--workdir=RUN", "--prompt=a"),
     ("tools.evaluate", "--workdir=RUN", "--text=BOOK"), ("tools.diagnose", "--workdir=RUN"),
     ("tools.length", "--workdir=RUN", "--text=BOOK"),
     ("tools.convert", "--workdir=RUN", "--to_hf=OUT")],
    ids=lambda c: c[0],
)  # fmt: skip
def test_of_every_command(runs, command):
    values = {"RUN": runs / "ngpt", "BOOK": runs / "book.txt", "OUT": runs / "out"}
    arguments = []
    for flag, equals, value in (argument.partition("=") for argument in command[1:]):
        arguments.append(flag + equals + str(values.get(value, value)))
    done = run(f"ngpt_jax.{command[0]}", *arguments, JAX_PLATFORMS="cuda")
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 2, lines
    assert len(lines) == 1
    assert lines[0].startswith("error: JAX_PLATFORMS=cuda: jax finds no such device here")
