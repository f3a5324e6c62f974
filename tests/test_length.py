"""Perplexity beyond the training context."""

import math
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from test_generation import logits_of, model  # noqa: F401 (a fixture)

from ngpt_jax.config import ConfigError
from ngpt_jax.evaluation import length as measures
from ngpt_jax.inference.loading import LoadedModel

EOD = 256


def test_windows_lie_within_documents():
    documents = [np.arange(10), np.arange(100, 103), np.arange(20, 29)]
    found = measures.cut_sequences(documents, EOD, 4, 9)
    assert found.tolist() == [
        [EOD, 0, 1, 2, 3], [3, 4, 5, 6, 7], [EOD, 20, 21, 22, 23], [23, 24, 25, 26, 27],
    ]  # fmt: skip
    assert len(measures.cut_sequences(documents, EOD, 4, 3)) == 3
    with pytest.raises(ConfigError, match=r"the 11 tokens .* \(the longest document has 10\)"):
        measures.cut_sequences(documents, EOD, 11, 3)


def test_lengths_double():
    assert measures.lengths_of(96, 8) == [96, 192, 384, 768]
    assert measures.lengths_of(96, 1) == [96]
    for factor in (0, 3, -2):
        with pytest.raises(ConfigError, match=f"--factor={factor} must be a power of two"):
            measures.lengths_of(96, factor)


def test_nats_are_those_of_the_full_forward_pass(model):  # noqa: F811
    rng = np.random.default_rng(0)
    windows = rng.integers(0, 256, (2, 65))
    told = []
    scored = measures.score_lengths(model, windows, [16, 32, 64], told.append)
    assert [x.shape for x in scored.values()] == [(8, 16), (4, 32), (2, 64)]
    assert told == [1 / 3, 2 / 3, 1]
    for length, found in scored.items():
        rows = [w[i : i + length + 1] for w in windows for i in range(0, 64, length)]
        logits = logits_of(model.config.model, model.params, np.array(rows)[:, :-1])[..., :257]
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        for row, mine, want in zip(rows, found, log_probs):
            np.testing.assert_allclose(mine, -want[np.arange(length), row[1:]], atol=2e-4)

    broken = LoadedModel(
        model.config, model.tokenizer, jax.tree.map(lambda w: w * np.nan, model.params),
        model.mesh, 0,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="its weights are not finite"):
        measures.score_lengths(broken, windows, [32])


def test_summaries_by_hand():
    nats = np.arange(16.0).reshape(2, 8)
    rows = measures.by_position("a", nats)
    assert [(r["first"], r["last"]) for r in rows] == [
        (1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8),
    ]  # fmt: skip
    assert rows[0]["nats"] == 4 and rows[-1]["nats"] == 10.5
    assert rows[0]["error"] == pytest.approx(np.std([0, 8], ddof=1) / math.sqrt(2))
    (row,) = measures.by_length("a", {4: nats.reshape(4, 4)}, 2)
    assert row["nats"] == 7.5 and row["perplexity"] == pytest.approx(math.exp(7.5))
    assert row["error"] == pytest.approx(4)
    table = measures.table([row], ["a"])
    assert table[1] == ("4", "1808  (7.500 ± 4.000 nats)")


def test_the_command(runs, tmp_path):
    command = [sys.executable, "-m", "ngpt_jax.tools.length", f"--workdir={runs / 'ngpt'}"]

    def run(*more):
        return subprocess.run([*command, *more], capture_output=True, text=True)

    done = run(f"--against={runs / 'gpt'}", f"--text={runs / 'book.txt'}", "--factor=4",
               "--windows=4", f"--out={tmp_path / 'out'}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 sequences of 128 tokens" in done.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "length.csv", "position.csv", "length.png",
    }  # fmt: skip
    lines = (tmp_path / "out" / "length.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 3
    twin = tmp_path / "twin" / "ngpt"
    shutil.copytree(runs / "ngpt", twin)
    done = run(f"--against={twin}", f"--text={runs / 'book.txt'}", "--factor=2", "--windows=2",
               f"--out={tmp_path / 'two'}")  # fmt: skip
    assert done.returncode == 0 and f"nGPT {twin.resolve()}" in done.stdout, done.stderr
    refused = run(f"--against={runs / 'gpt' / '..' / 'ngpt'}", "--factor=2")
    assert refused.stderr.startswith("error: --against is the folder of --workdir")
    refused = run("--factor=64")
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        "error: No document has the 2048 tokens of the longest sequence"
    )
