"""From nanoGPT: its files train by the page's lines, and each of its settings is on the page."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from data_helpers import write
from hub_server import serving
from test_docs import blocks, commands, read

from ngpt_jax.config import Config, convert

ROOT = Path(__file__).parents[1]
PAGE = Path("ngpt_jax/data/nanogpt.md")
SETTINGS = """
    out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from
    wandb_log wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size block_size
    n_layer n_head n_embd dropout bias learning_rate max_iters weight_decay beta1 beta2 grad_clip
    decay_lr warmup_iters lr_decay_iters min_lr backend device dtype compile""".split()


def line_of(config):
    """The page's line that trains with an experiment, without "python"."""
    (line,) = [c for c in commands(PAGE) if f"--config={config}" in c and "-m" in c]
    return line[1:]


def train(folder, *command, **env):
    shape = (
        "--config.train.steps=2 --config.train.batch_size=8 --config.eval.batches=1"
        " --config.eval.batch_size=8 --config.model.layers=1 --config.model.context=32"
        " --config.sample.tokens=4"
    ).split()
    done = subprocess.run(
        [sys.executable, *command, *shape], cwd=folder, text=True, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def gpt2_file():
    """GPT-2's vocabulary in its size and its layout, with names of no meaning for its words."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"w{i}" for i in range(50_256 - 256)), "<|endoftext|>"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({word: i for i, word in enumerate(words)}, [])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer.to_str().encode()


@pytest.mark.slow
def test_openwebtext_as_prepared_for_nanogpt(tmp_path):
    """As data/openwebtext/prepare.py writes it: uint16, each document with 50256 after it."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data/openwebtext"
    folder.mkdir(parents=True)
    for name, count in (("train", 60), ("val", 6)):
        documents = [[*rng.integers(0, 50_256, 99), 50_256] for _ in range(count)]
        ids = np.concatenate(documents).astype(np.uint16)
        file = np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="w+", shape=ids.shape)
        file[:] = ids
        file.flush()
    with serving() as (hub, url):
        hub.add("model", "openai-community/gpt2", {"tokenizer.json": gpt2_file()})
        env = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path)}
        env["HF_HUB_OFFLINE"] = "0"
        out = train(tmp_path, *line_of("124m"), "--config=124m:debug", **env)
    assert "6,000 tokens of text (bin) -> runs/owt" in out
    assert re.search(r"held-out val: 1\d\.\d{4} nats/token, .* \(600 tokens\)", out)
    assert (tmp_path / "runs/owt/loss.png").exists()


class Bomb:
    """A pickle that leaves a file when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.slow
def test_characters_as_prepared_for_nanogpt(tmp_path):
    """As data/shakespeare_char/prepare.py writes them: ids of the sorted characters, uint16."""
    folder = tmp_path / "data/shakespeare_char"
    text = "First Citizen:\nWe know't, we know't!\n\n\u00c9 KING: speak & go.\n" * 120
    write(folder / "input.txt", text)
    characters = sorted(set(text))
    stoi = {character: i for i, character in enumerate(characters)}
    cut = int(len(text) * 0.9)
    for name, part in (("train", text[:cut]), ("val", text[cut:])):
        np.array([stoi[c] for c in part], dtype=np.uint16).tofile(folder / f"{name}.bin")
    meta = {"vocab_size": len(stoi), "stoi": stoi, "bomb": Bomb(tmp_path / "unpickled")}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))

    (program,) = [code for language, code in blocks(PAGE) if language == "python"]
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "chars.json"))
    assert tokenizer.encode(text).ids == [stoi[c] for c in text]
    assert tokenizer.decode([stoi[c] for c in text]) == text
    out = train(tmp_path, *line_of("quickstart"))
    assert f"{cut:,} tokens of text (bin) -> runs/shakespeare_char" in out
    assert f"({len(text) - cut:,} tokens)" in out
    assert "\nsample:\nKING" in out
    assert not (tmp_path / "unpickled").exists()


def test_every_setting_is_on_the_page():
    table = read(PAGE).split("## Its settings")[1].split("| nanoGPT's sampling")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    theirs = [name for left, *_ in rows for name in re.findall(r"`(\w+)`", left)]
    assert theirs == SETTINGS
    fields = {field.name for field in convert.fields(Config())}
    for _, *right in rows:
        for name in re.findall(r"`([a-z]+\.[a-z_\d]+)(?:=\w+)?`", " ".join(right)):
            assert name in fields, name
