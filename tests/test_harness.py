"""Scores against lm-evaluation-harness itself: pip install '.[eval]'."""

# ruff: noqa: F811 (fixtures of another file)

import json
import os
import types

import pytest

os.environ.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1")  # before lm_eval reads them

from test_evaluate import (  # noqa: F401 (fixtures among them)
    CONTEXT,
    EOD,
    FILES,
    command,
    lines,
    local,
    model,
    near,
    run,
)

import ngpt_jax
from ngpt_jax.config import ConfigError
from ngpt_jax.evaluation import scorers, tasks


@pytest.fixture
def adapter():
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install '.[eval]'")
    from ngpt_jax.evaluation import harness

    return harness


def compare(adapter, model, some, limit=None):
    """Runs tasks both ways, in other batches; the largest difference of a log-probability.

    Relative where it is above 1: float32 sums of some hundred bytes are large numbers.
    """
    found = adapter.run_harness(model, some, limit=limit, batch_size=5)
    worst = 0.0
    for task in some:
        scored, _ = scorers.score_task(model, task)
        theirs = found.scored[task.name]
        assert [s.id for s in scored] == [s.id for s in theirs]
        assert [s.chosen for s in scored] == [s.chosen for s in theirs]
        assert [s.chosen_norm for s in scored] == [s.chosen_norm for s in theirs]
        for ours, other in zip(scored, theirs, strict=True):
            assert [f.greedy for f in ours.found] == [f.greedy for f in other.found]
            pairs = zip(ours.found, other.found, strict=True)
            far = (abs(a.log_prob - b.log_prob) / max(-b.log_prob, 1) for a, b in pairs)
            worst = max(worst, *far)
        # Its own accuracies and errors, of its own process_results and aggregation.
        for name, value in scorers.summarize(task, scored).items():
            assert found.results[task.name][name] == near(value), name
    return worst


def test_the_harness_finds_the_same(adapter, model, local):
    assert compare(adapter, model, list(local.values())) < 1e-5


def test_continuations_without_a_space_before_them(adapter, model, tmp_path):
    records = [
        {"id": i, "context": "Of A ", "continuations": ["ab", " b", "né", "x y"], "label": i}
        for i in range(4)
    ]
    task = tasks.read_task(lines(tmp_path / "bare.jsonl", records), limit=3)
    assert task.delimiter == ""
    assert compare(adapter, model, [task], limit=3) < 1e-5


def request(*args):
    return types.SimpleNamespace(args=args)


def test_rolling_windows_are_those_of_the_harness(adapter, model):
    from lm_eval import utils

    for size in (0, 1, 5, 6, 7, 23):
        ids = list(range(size))
        theirs = utils.get_rolling_token_windows(ids, -1, 6, 1)
        theirs = [([*given, told[-1]], len(told)) for given, told in theirs]
        assert list(scorers.rolling_windows(ids, -1, 6)) == theirs
    texts = ["Naïve text, longer than the context.", "short"]
    found = adapter.NgptLM(model).loglikelihood_rolling([request(t) for t in texts], True)
    result = scorers.score_text(model, texts)
    assert -sum(found) == pytest.approx(result["nats_per_token"] * result["tokens"], abs=1e-5)


def test_generation_for_the_harness(adapter, model):
    lm = adapter.NgptLM(model, batch_size=2)
    prompt = "a prompt that is longer than what fits"
    greedy = {"until": [], "max_gen_toks": 5}
    requests = [
        request("ab", greedy),
        request(prompt, {"until": ["\n"], "max_new_tokens": 4, "do_sample": False}),
        request("abc", greedy),
        request("ab", greedy),
        request("ab", {"until": [], "max_gen_toks": 5, "do_sample": True, "temperature": 2.0,
                       "top_k": 3, "seed": 4}),
    ]  # fmt: skip
    said = lm.generate_until(requests, disable_tqdm=True)
    for text, wanted in zip((said[0], said[2], said[3]), ("ab", "abc", "ab")):
        assert text == model.generate(wanted, 5, temperature=0).text
    kept = [EOD, *prompt.encode()][-(CONTEXT - 4) :]
    assert said[1] == model.generate([kept], 4, temperature=0, stop="\n")[0].text
    drawn = model.generate("ab", 5, temperature=2.0, top_k=3, seed=4)
    assert said[4] == drawn.text
    whole = lm.generate_until([request(prompt, {})], disable_tqdm=True)[0]  # 12 after 12 tokens
    kept = [EOD, *prompt.encode()][-CONTEXT // 2 :]
    assert whole == model.generate([kept], CONTEXT // 2, temperature=0)[0].text
    stop = drawn.text[2:3]
    cut = request("ab", {**requests[4].args[1], "until": stop})
    assert lm.generate_until([cut], disable_tqdm=True)[0] == drawn.text.split(stop)[0]


def test_the_harness_knows_the_model_by_name(adapter, run):
    from lm_eval.api.registry import get_model

    lm = get_model("ngpt_jax").create_from_arg_string(f"workdir={run}", {"batch_size": "auto"})
    assert (lm.max_length, lm.eot_token_id, lm.batch_size) == (32, EOD, 16)
    assert lm.tok_encode("é") == [EOD, 0xC3, 0xA9] and lm.tok_decode(lm.tok_encode("é")) == "é"
    with pytest.raises(ConfigError, match="workdir=RUN"):
        get_model("ngpt_jax").create_from_arg_string("")


@pytest.mark.slow
def test_the_command_with_the_harness(adapter, run, tmp_path):
    for name, records in FILES.items():
        lines(tmp_path / f"{name}.jsonl.gz", records)
    out = tmp_path / "out"
    arguments = (
        f"--workdir={run}", "--tasks=" + ",".join(FILES), f"--tasks_dir={tmp_path}",
        f"--out={out}",
    )  # fmt: skip
    reports = []
    for more in ((), ("--harness",)):
        done = command(*arguments, *more)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads((out / "evaluate.json").read_text()))
        reports[-1]["csv"] = {kind: (out / f"{kind}.csv").read_text() for kind in FILES}
    ours, theirs = reports
    assert theirs["lm_eval"][0].isdigit()
    for kind in FILES:
        for name, value in ours["tasks"][kind].items():
            if name != "too_long":
                assert theirs["tasks"][kind][name] == near(value)
        assert ours["csv"][kind].splitlines()[0] == theirs["csv"][kind].splitlines()[0]


@pytest.mark.slow
def test_real_tasks_both_ways(adapter):
    """On 500 examples: NGPT_EVAL_WORKDIR names a run, NGPT_EVAL_TASKS a folder of task files."""
    workdir, folder = (os.environ.get(f"NGPT_EVAL_{x}") for x in ("WORKDIR", "TASKS"))
    if workdir is None or folder is None:
        pytest.skip("set NGPT_EVAL_WORKDIR to a run and NGPT_EVAL_TASKS to a folder of tasks")
    names = ("lambada_openai", "hellaswag", "arc_easy", "winogrande")
    paths = [path for name in names if (path := tasks.find_task(name, folder)) is not None]
    if not paths:
        pytest.skip(f"{folder} holds none of {', '.join(names)}")
    some = [tasks.read_task(path, 500) for path in paths]
    worst = compare(adapter, ngpt_jax.load(workdir), some, limit=500)
    print(f"{len(some)} tasks: log-probabilities differ by at most {worst:.2g}")
    assert worst < 1e-5
