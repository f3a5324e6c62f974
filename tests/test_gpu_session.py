"""The session for a GPU, tried without one."""

import json
import os
import subprocess
import time
from pathlib import Path

import gpu_checks
import gpu_session
import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parents[1]


def session(out, *arguments):
    command = ["bash", "tests/gpu_session.sh", "--dry", f"--out={out}", *arguments]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=os.environ)
    lines = [json.loads(text) for text in out.read_text().splitlines()] if out.exists() else []
    return done, lines


@pytest.mark.slow
def test_a_dry_session_runs_to_its_end_and_a_second_one_has_nothing_to_do(tmp_path):
    out = tmp_path / "results.jsonl"
    done, lines = session(out)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {line["check"]: line for line in lines}
    assert list(results) == [check.name for check in gpu_session.plan(dry=True)]
    wanted = {"golden": "agrees", "kernels": "agrees", "model": "agrees"}
    for name, line in results.items():
        assert line["result"] == wanted.get(name.partition("/")[0], "measured"), line
        assert line["device"] == "cpu"
    assert results["train/tiny/xla"]["ratios"]["ngpt/gpt_qk_norm"] > 0
    assert "nothing for VERIFIED" in done.stdout
    done, again = session(out)
    assert done.returncode == 0 and again == lines
    assert "ms, " in done.stdout and "nothing for VERIFIED" in done.stdout


def test_without_time_all_is_skipped_and_told(tmp_path):
    done, lines = session(tmp_path / "results.jsonl", "--budget=0")
    assert done.returncode == 0, done.stderr
    assert {line["result"] for line in lines} == {"skipped"}
    assert len(lines) == len(gpu_session.plan(dry=True))
    assert "NOT verified" in done.stdout


def test_the_next_session_tries_again_what_has_no_result(tmp_path):
    path = tmp_path / "results.jsonl"
    first = gpu_session.Record(path, session=1)
    for name, result in zip("abcd", ("agrees", "skipped", "error", "begun")):
        first.add(name, result)
    path.write_text(path.read_text() + '{"check": "a", "res')  # cut off while it was written
    assert [name for name in "abcde" if first.is_due(name)] == ["e"]
    assert first.died("d") and not first.died("a")
    second = gpu_session.Record(path, session=2)
    assert [name for name in "abcde" if second.is_due(name)] == list("bcde")
    assert not second.died("d")
    second.add("b", "differs")
    assert gpu_session.Record(path, session=2).last()["b"]["result"] == "differs"


def test_an_error_is_told_and_the_next_check_follows(tmp_path, monkeypatch):
    def fails():
        raise RuntimeError("no such kernel\nand more")

    for name, function in (("fails", fails), ("works", lambda: ("agrees", {"summary": "well"}))):
        monkeypatch.setattr(gpu_checks, name, function, raising=False)
    checks = [gpu_session.Check(f"kernels/{name}", 1, name) for name in ("fails", "works")]
    monkeypatch.setattr(gpu_session, "plan", lambda dry: checks)
    for device_works in (True, False):
        monkeypatch.setattr(gpu_checks, "device_works", lambda works=device_works: works)
        record = gpu_session.Record(tmp_path / f"{device_works}.jsonl", session=1)
        code = gpu_session.run_part("kernels", record, time.time() + 99, dry=True)
        assert code == (not device_works)
        if code:  # a new process goes on
            assert gpu_session.run_part("kernels", record, time.time() + 99, dry=True) == 0
        results = [line["result"] for line in record.lines]
        assert results == ["begun", "error", "begun", "agrees"]
        assert record.lines[1]["error"] == "RuntimeError: no such kernel"
        assert "no such kernel" in gpu_session.table(record, dry=True)


def test_only_kernels_that_all_agree_on_one_device_are_verified():
    needed = [
        c.name for c in gpu_session.plan(dry=False) if c.part in ("golden", "kernels", "model")
    ]
    good = {name: {"result": "agrees", "device": "NVIDIA X"} for name in needed}
    assert '"NVIDIA X": "2' in gpu_session.verdict(good, dry=False)
    one = needed[len(needed) // 2]
    for line in ({"result": "differs"}, {"result": "skipped"}, {"result": "agrees", "device": "Y"}):
        assert "NOT verified" in gpu_session.verdict(good | {one: line}, dry=False)
    del good[one]
    assert one in gpu_session.verdict(good, dry=False)


def test_a_wrong_kernel_differs():
    """Values, gradients, one number alone, and bfloat16 rounded twice."""
    own, reference, arguments = gpu_checks.KERNELS["swiglu"]((40, 96), "bfloat16")

    def changed(change):
        return gpu_checks.compare(lambda *a: change(own(*a)), reference, arguments)[0]

    assert changed(lambda out: out) == "agrees"
    assert changed(lambda out: (out[0] * 1.01, out[1])) == "differs"
    assert changed(lambda out: (out[0], out[1] * 1.01)) == "differs"
    assert changed(lambda out: (out[0].at[3, 5].add(0.5), out[1])) == "differs"
    assert changed(lambda out: (out[0].at[3, 5].set(jnp.nan), out[1])) == "differs"
    assert changed(lambda out: ((out[0] * 1.3).astype("bfloat16") / 1.3, out[1])) == "differs"


def test_every_kernel_of_the_session_has_the_shapes_of_its_reference():
    """Traced, in the real sizes and without memory for them."""
    for check in gpu_session.plan(dry=False):
        if check.part == "kernels":
            options = dict(check.arguments)
            make = gpu_checks.KERNELS[options.pop("name")]

            def both(make=make, options=options):
                own, reference, arguments = make(**options)
                return own(*arguments), reference(*arguments)

            own, reference = jax.eval_shape(both)
            assert [x.shape for x in own] == [x.shape for x in reference], check.name
