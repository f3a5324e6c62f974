"""Signals that ask to stop: answered at once, also while XLA compiles or text is tokenized."""

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from ngpt_jax import signals
from ngpt_jax.training.stop_signal import EXIT_RESUME, StopSignal

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "TERM": "xterm"}


class Session:
    """A command on a terminal of its own, as a person starts it."""

    def __init__(self, *command, env):
        self.text, (self._fd, inner) = "", pty.openpty()
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=inner, stdout=inner, stderr=inner,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(inner)

    def read_until(self, text, seconds=120.0):
        """Seconds until the text appears."""
        start = time.monotonic()
        while text not in self.text:
            left = start + seconds - time.monotonic()
            assert left > 0, f"no {text!r} in {self.text}"
            if select.select([self._fd], [], [], left)[0]:
                self._read()
        return time.monotonic() - start

    def _read(self):
        try:
            self.text += os.read(self._fd, 65536).decode(errors="replace")
        except OSError:  # the end, on Linux
            raise AssertionError(f"it ended: {self.text}") from None

    def end(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def press_ctrl_c(self):
        os.write(self._fd, b"\x03")

    def finish(self, seconds=120.0):
        try:
            while True:
                self._read()
        except AssertionError:
            return self.process.wait(seconds)


@pytest.fixture(autouse=True)
def nothing_is_ignored():
    """Under nohup SIGHUP is ignored, and children inherit that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def terminal():
    """terminal(*command) -> Session, which does not outlive the test."""
    sessions = []

    def start(*command, env=ENV):
        sessions.append(Session(*command, env=env))
        return sessions[-1]

    yield start
    for session in sessions:
        session.end()


def training(tmp_path, book, *more):
    return [
        sys.executable, "-m", "ngpt_jax.main", f"--config={ROOT}/experiments/quickstart.py:debug",
        f"--workdir={tmp_path}/run", "--config.data.source=text", f"--config.data.paths={book}",
        f"--config.data.cache={tmp_path}/cache", "--config.train.steps=1000000",
        "--config.model.width=16", "--config.eval.every=1000000", "--config.log.every=10",
        "--config.checkpoint.every=1000000", "--config.sample.tokens=8", *more,
    ]  # fmt: skip


@pytest.fixture
def much_text(tmp_path):
    """More than is tokenized at once, for a tokenizer that starts workers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(["the quick brown fox"], trainer)
    tokenizer.save(str(tmp_path / "bpe.json"))
    line = json.dumps({"text": "the quick brown fox jumps over the lazy dog. " * 200}) + "\n"
    with open(tmp_path / "text.jsonl", "w") as f:
        for i in range(12000):
            f.write(line.replace("fox", f"fox {i}", 1))
    return str(tmp_path / "text.jsonl"), str(tmp_path / "bpe.json")


@pytest.mark.slow
def test_ctrl_c_is_answered_while_xla_compiles(terminal, tmp_path, book):
    log = {"JAX_LOG_COMPILES": "1", "XLA_FLAGS": ""}
    unrolled = ["--config.model.scan_layers=False", "--config.model.layers=4"]  # takes XLA longer
    session = terminal(*training(tmp_path, book, *unrolled), env=ENV | log)
    session.read_until("Finished jaxpr to MLIR module conversion jit(train_step)")
    time.sleep(0.5)
    session.press_ctrl_c()
    assert session.read_until("SIGINT received: stopping") < 1
    assert "Finished XLA compilation of jit(train_step)" not in session.text
    assert session.finish() == EXIT_RESUME
    assert "Traceback" not in session.text


@pytest.mark.slow
@pytest.mark.parametrize("number", signals.STOP_SIGNALS, ids=lambda n: n.name)
def test_a_signal_is_answered_while_no_python_runs(terminal, number):
    code = """
import hashlib
from ngpt_jax.training.stop_signal import StopSignal
stop = StopSignal()
print("at work", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 12_000_000)
print("finished", stop(), flush=True)
"""
    session = terminal(sys.executable, "-c", code)
    session.read_until("at work")
    time.sleep(0.2)
    os.kill(session.process.pid, number)
    assert session.read_until(f"{number.name} received: stopping") < 1
    assert "finished" not in session.text
    assert session.finish() == 0
    assert "finished True" in session.text


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "prepare"])
def test_ctrl_c_is_answered_while_text_is_tokenized(terminal, tmp_path, much_text, command):
    path, tokenizer = much_text
    if command == "train":
        arguments = training(tmp_path, path, f"--config.data.tokenizer={tokenizer}")
    else:
        arguments = [
            sys.executable, "-m", "ngpt_jax.data.prepare", "--source=text", f"--paths={path}",
            f"--tokenizer={tokenizer}", f"--out={tmp_path}/out", "--workers=2",
        ]  # fmt: skip
    session = terminal(*arguments)
    session.read_until("%")
    session.press_ctrl_c()
    assert session.read_until("SIGINT received: stopping") < 1
    assert session.finish() == (EXIT_RESUME if command == "train" else 130)
    assert "Traceback" not in session.text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_signal_saves_the_step(tmp_path, book, name):
    number = getattr(signal, name)
    process = subprocess.Popen(
        training(tmp_path, book, "--config.data.workers=1"),
        cwd=ROOT, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.time() + 120
    while not (metrics.exists() and metrics.read_text()):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, number)  # workers get it too, as from a terminal or SLURM
    out, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_RESUME, err
    assert err == ""
    assert f"{name} received: stopping" in out
    (saved,) = (tmp_path / "run/checkpoints").iterdir()
    assert f"{name}: saved step {saved.name};" in out


@pytest.mark.slow
def test_a_closed_terminal_saves_the_step(terminal, tmp_path, book):
    session = terminal(*training(tmp_path, book))
    session.read_until("loss ")
    os.close(session._fd)  # SIGHUP, and every write fails from here on
    assert session.process.wait(60) == EXIT_RESUME
    assert list((tmp_path / "run/checkpoints").iterdir())


def test_ignored_signals_stay_ignored_and_handlers_come_back():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    handlers = [signal.getsignal(number) for number in signals.STOP_SIGNALS]
    try:
        stop = StopSignal()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop() and stop.name is None
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop() and stop.name == "SIGUSR2"
        stop.restore()
        assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] == handlers
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_answer_is_given_once(capfd):
    stop = StopSignal()
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGUSR1)
    deadline = time.monotonic() + 5
    out = ""
    while "received" not in out and time.monotonic() < deadline:
        out += capfd.readouterr().out
    time.sleep(0.2)
    out += capfd.readouterr().out
    stop.restore()
    assert out.count("SIGUSR1 received") == 1


def test_a_second_ctrl_c_quits():
    stop = StopSignal()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.restore()


def test_ctrl_c_ends_other_commands_without_a_trace():
    code = """
from ngpt_jax.config import command
def wait(overrides):
    raise KeyboardInterrupt
command.run_command(wait)
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (130, b"")


def test_a_process_is_born_with_the_signals_blocked():
    code = "import signal; print(len(signal.pthread_sigmask(signal.SIG_BLOCK, ())))"
    with signals.blocked():
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert int(out) == len(signals.STOP_SIGNALS)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(signals.STOP_SIGNALS)
