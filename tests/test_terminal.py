"""What a person sees: finished steps only, what is done meanwhile, each final line once."""

import re
import sys
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from ngpt_jax import terminal as terminal_lib
from ngpt_jax.terminal import Terminal
from ngpt_jax.training import loop
from ngpt_jax.training.logger import Logger, Progress


class Late:
    """An array of a step that the device finishes later."""

    def __init__(self, value):
        self.value, self.ready = value, False

    def is_ready(self):
        return self.ready

    def block_until_ready(self):
        self.ready = True
        return self

    def __float__(self):
        assert self.ready, "an unfinished loss was waited for"
        return float(self.value)

    def __array__(self, *_, **__):
        return np.float32(self.value)


class Shown(Terminal):
    """A terminal that draws, and remembers what it was told to."""

    def __init__(self):
        super().__init__()
        self.shown, self._draws = [], True

    def wants_news(self):
        return True

    def show(self, label, share, status=None):
        self.shown.append((label, share, status))


@pytest.fixture
def logger(tiny):
    terminal = Shown()
    config = tiny(**{"log.every": 4})
    made = Logger(config, Progress(), lambda step, row: None, terminal, lambda: "")
    made._summarize = lambda params: {}
    return made


def step(logger, number, value=2.5):
    """Adds a step that is not finished; returns its loss."""
    loss = Late(value)
    with logger.clock:
        pass
    rest = {name: np.float32(0) for name in ("grad_norm", "learning_rate", "skipped")}
    logger.add(number, {"loss": loss, "skipped_in_row": np.float32(0), **rest})
    return loss


def test_the_bar_is_never_ahead_of_finished_steps(logger):
    shown = logger.terminal.shown
    first, second = step(logger, 1, 3.0), step(logger, 2, 2.0)
    assert {(label, share) for label, share, _ in shown} == {("step      0/8", 0.0)}
    assert "loss" not in shown[-1][2]
    first.ready = True
    third = step(logger, 3)
    label, share, status = shown[-1]
    assert (label, share) == ("step      1/8", 1 / 8)
    assert re.fullmatch(r"loss 3\.0000  elapsed 0:0\d", status)
    assert not second.ready and not third.ready  # nothing waits for the device
    step(logger, 4, 1.0)
    del shown[:]
    logger.write_row(4, None)
    assert [label for label, _, _ in shown] == [f"step      {n}/8" for n in (1, 2, 3, 4, 4)]
    assert [share for _, share, _ in shown[:4]] == [n / 8 for n in (1, 2, 3, 4)]
    assert re.match(r"loss 1\.0000  [\d,]+ tokens/s  eta .*  elapsed 0:0\d$", shown[-1][2])
    step(logger, 5)
    assert shown[-1][:2] == ("step      4/8", 0.5)


def watch(monkeypatch):
    """Makes stdout a terminal that draws; returns the list of what it is sent."""
    monkeypatch.setenv("TERM", "xterm")
    written = []
    stream = SimpleNamespace(
        write=written.append, flush=lambda: None, isatty=lambda: True, encoding="utf-8"
    )
    monkeypatch.setattr(sys, "stdout", stream)
    return written


def test_the_bar_has_percent_and_what_is_done_meanwhile(monkeypatch):
    screen = watch(monkeypatch)
    terminal = Terminal()
    terminal.show("step 1/4", 0.25, "loss 3.0  elapsed 0:01")
    text = "".join(screen)
    assert "step 1/4" in text and "25%" in text and "loss 3.0  elapsed 0:01" in text
    del screen[:]
    with terminal.doing("evaluating 9 tokens"):
        time.sleep(0.7)
    text = "".join(screen)
    assert "step 1/4" in text and "evaluating 9 tokens, 0:0" in text
    assert text.rindex("loss 3.0") > text.rindex("evaluating")  # as it was before
    terminal.close()


@pytest.mark.parametrize("silence", [0.0, 60.0])
def test_plain_output_is_never_silent_for_long(monkeypatch, capsys, silence):
    monkeypatch.setattr(terminal_lib, "_SILENCE", silence)
    terminal = Terminal()
    terminal.say("a line")
    with terminal.doing("saving step 3"):
        time.sleep(0.7)
    assert terminal.wants_news() == (not silence)
    terminal.show("step 3/4", 0.75, "loss 2.0")
    expected = "a line\nsaving step 3, 0:00\nstep 3/4   75%  loss 2.0\n"
    out = re.sub("0:01", "0:00", capsys.readouterr().out)
    assert out == ("a line\n" if silence else expected)
    assert silence == terminal_lib._SILENCE


def test_a_quiet_terminal_says_nothing(monkeypatch, capsys):
    monkeypatch.setattr(terminal_lib, "_SILENCE", 0.0)
    terminal = Terminal(quiet=True)
    with terminal.doing("work"):
        time.sleep(0.7)
    terminal.show("step", 0.5, "loss")
    terminal.say("line")
    assert not terminal.wants_news() and capsys.readouterr().out == ""


def test_a_run_says_no_line_twice(small, tmp_path, capsys):
    assert loop.train(small(**{"sample.tokens": 3}), tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line, count in Counter(lines).items() if count > 1] == []
    for start in ("step     12/12", "held-out text: ", "losses: ", "sample:"):
        assert sum(line.startswith(start) for line in lines) == 1, start
    order = [line.split(":")[0].split("/")[0] for line in lines[-6:]]
    assert order[0] == "12 steps made in 0" and order[1] == "held-out text"
    assert lines[-1] == f"losses: {tmp_path}/loss.png"
