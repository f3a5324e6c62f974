"""Kills a run with SIGKILL again and again, and compares its end with that of an undisturbed one.

    python tests/torture.py --kills=25 --out=/tmp/torture

A third of the kills falls inside a save, a third inside an evaluation, a third anywhere. With
--signal=HUP or USR1 the run is asked to stop instead, and saves its step. Prints one line a kill,
and at the end whether weights, moments and metrics are the same bit for bit.
tests/test_torture.py runs a short form of it.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

STEPS, LOG, EVAL, SAVE = 60, 3, 7, 5
CLOCKS = ("seconds", "tokens_per_second")


def child(workdir: str, book: str, kill_in: str, seed: int, number: int) -> int:
    """A run that kills itself at a random instant of a save or of an evaluation."""
    from ngpt_jax import config as config_lib
    from ngpt_jax.checkpoint import saving
    from ngpt_jax.training import evaluator, loop

    rng = random.Random(seed)

    def die_soon(seconds: float) -> None:
        delay = rng.uniform(0, seconds)
        timer = threading.Timer(delay, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()

    def fatal(real, times: int, seconds: float):
        """``real``, during the n-th call of which the process dies."""
        left = [times]

        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                print(f"in {kill_in}", flush=True)
                die_soon(seconds)
            return real(*args, **kwargs)

        return call

    if kill_in == "save":
        saving.Save._work = fatal(saving.Save._work, rng.randint(1, 3), 0.05)
    elif kill_in == "eval":
        evaluator.evaluate = fatal(evaluator.evaluate, rng.randint(1, 2), 0.2)
    values = config_lib.default_config()
    values.model.update(layers=2, width=32, heads=2, context=32, loss_chunk=64)
    values.train.update(steps=STEPS, batch_size=4)
    values.optimizer.learning_rate = 1e-2
    values.data.update(source="text", paths=(book,))
    values.log.every, values.eval.every, values.checkpoint.every = LOG, EVAL, SAVE
    values.sample.tokens = 0
    return loop.train(config_lib.from_config_dict(values), Path(workdir))


def start(
    workdir: Path, book: Path, kill_in: str = "-", seed: int = 0, number: int = signal.SIGKILL
) -> subprocess.Popen:
    command = [sys.executable, __file__, "--child", str(workdir), str(book), kill_in]
    command += [str(seed), str(int(number))]
    root = Path(__file__).parents[1]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    return subprocess.Popen(
        command, env=env, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def one_life(
    workdir: Path, book: Path, kill_in: str, seed: int, say, number: int = signal.SIGKILL
) -> bool:
    """A start that is killed, or stopped; whether it was before it came to its end."""
    process = start(workdir, book, kill_in, seed, number)
    before = []
    if kill_in == "-":
        assert process.stdout is not None
        for line in process.stdout:
            before.append(line.rstrip())
            if line.startswith("compiled"):
                break
        time.sleep(random.Random(seed).uniform(0, 1.0))
        process.send_signal(number)
    out, err = process.communicate(timeout=300)
    # 75: saved, the same command goes on. A signal after the end of the training kills.
    if process.returncode not in (0, -number, 0 if number == signal.SIGKILL else 75):
        raise AssertionError(f"exit code {process.returncode}\n{out}\n{err}")
    lines = before + out.splitlines()
    resumed = next((line for line in lines if line.startswith("resumed")), "from the start")
    killed = process.returncode != 0
    where = {"-": "anywhere"}.get(kill_in, kill_in)
    say(f"{resumed}; {f'killed in {where}' if killed else 'came to its end'}  {err.strip()}")
    return killed


def rows(workdir: Path) -> list[dict]:
    """Metrics without what a clock showed."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith(CLOCKS)} for line in lines]


def final_arrays(workdir: Path) -> list[np.ndarray]:
    """Parameters, moments and counts of the newest checkpoint."""
    import jax
    import orbax.checkpoint as ocp

    newest = max((workdir / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    assert int(newest.name) == STEPS
    tree = ocp.PyTreeCheckpointer().restore(newest / "state")
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def torture(out: Path, kills: int, say=print, number: int = signal.SIGKILL) -> None:
    """Raises AssertionError where the tortured run is not the undisturbed one."""
    out.mkdir(parents=True, exist_ok=True)
    book = out / "book.txt"
    rng = np.random.default_rng(0)
    words = "the quick brown fox jumps over the lazy dog and runs away".split()
    book.write_text("\n".join(" ".join(rng.choice(words, 8)) for _ in range(300)))
    _, err = (whole := start(out / "whole", book)).communicate(timeout=600)
    assert whole.returncode == 0, err
    done = 0
    for seed in range(10 * kills):
        if done == kills:
            break
        # The end of a run is a place like any other: one that came to it begins anew.
        kind = ("save", "eval", "-")[seed % 3]
        done += (killed := one_life(out / "cut", book, kind, seed, say, number))
        if not killed:
            check(out)
            (out / "cut").rename(out / f"cut-{seed}")
    while one_life(out / "cut", book, "none", 0, say):
        pass
    check(out)
    say(f"{done} kills: weights, moments and metrics are those of the undisturbed run")


def check(out: Path) -> None:
    assert rows(out / "cut") == rows(out / "whole")
    a, b = final_arrays(out / "whole"), final_arrays(out / "cut")
    assert len(a) == len(b) > 10
    assert all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(a, b))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        workdir_, book_, kill_in_, seed_, number_ = sys.argv[2:]
        sys.exit(child(workdir_, book_, kill_in_, int(seed_), int(number_)))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder")
    parser.add_argument("--signal", default="KILL", help="KILL, HUP, USR1, ...")
    given = parser.parse_args()
    torture(given.out, given.kills, number=signal.Signals[f"SIG{given.signal}"])
