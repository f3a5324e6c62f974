"""Conversions: bit for bit there and back, logits as PyTorch gives them, refusals of one line."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as hf
from data_helpers import ROOT, raises
from test_tokenizers import EOT, byte_level, paths, ranks_file  # noqa: F401

import ngpt_jax
from ngpt_jax.checkpoint.restoring import restore_params
from ngpt_jax.config.fields import SCALES
from ngpt_jax.data.tokenizers.base import ByteTokenizer
from ngpt_jax.data.tokenizers.load import load_tokenizer
from ngpt_jax.data.tokenizers.tiktoken_files import TIKTOKEN_FORMATS, TiktokenFormat
from ngpt_jax.export import folders, hf_tokenizer, huggingface, reference_checkpoint
from ngpt_jax.inference import loading, opening
from ngpt_jax.model import folding
from ngpt_jax.model.params import num_params, param_tree, real_vocab
from ngpt_jax.model.transformer import Transformer, init_params
from ngpt_jax.training import layout

GOLDEN = Path(__file__).parent / "golden"
GQA = {"model.heads": 4, "model.kv_heads": 2, "model.head_dim": 6, "model.mlp_width": 24}
MODELS = {
    "ngpt": {"model.alpha_a.init": 0.2, "model.s_z.init": 10.0},
    "ngpt-gqa": GQA,
    "ngpt-read": {"model.normalize_on_read": True, "model.qk_norm": False},
    "gpt": {"model.kind": "gpt"},
    "gpt-qk": {"model.kind": "gpt", "model.qk_norm": True, **GQA},
}
SLERP = {"slerp": {"model.residual": "slerp", **GQA}}
models = pytest.mark.parametrize("name", MODELS)


def random_params(config, seed=0):
    """No scale or gain a constant, a third of the alphas negative, no matrix on the sphere."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def draw(leaf, p):
        name, x = p.name, rng.standard_normal(leaf.shape)
        if p.is_matrix:
            return jnp.asarray(x / math.sqrt(config.width), leaf.dtype)
        x = (1 + 0.3 * x) * (getattr(config, name).scale if name in SCALES else 1)  # else a gain
        if "alpha" in name:
            x = np.where(rng.random(leaf.shape) < 0.3, -x, x)
        return jnp.asarray(x, leaf.dtype)

    return jax.tree.map(draw, shapes, param_tree(config))


def make_run(tiny, name="ngpt", **fields):
    """Random weights over bytes; there are more ids than bytes, and rows of padding besides."""
    config = tiny(**{"model.vocab_size": 260, **(MODELS | SLERP)[name], **fields})
    tokenizer = load_tokenizer(config.data)
    return loading.LoadedModel(config, tokenizer, random_params(config.model), None, 7)


def logits(config, params, tokens):
    run = jax.jit(lambda p, x: Transformer(config).apply({"params": p}, x))
    return np.asarray(run(params, tokens))[..., : config.vocab_size]


def worst(a, b):
    """Relative to the largest of b."""
    return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))


def some_tokens(config, batch=2):
    rng = np.random.default_rng(1)
    return rng.integers(0, config.vocab_size, (batch, config.context)).astype(np.int32)


def same(a, b, config):
    """Bit for bit, rows of padding left out."""

    def equal(x, y, p):
        x, y = real_vocab(x, p.axes, config), real_vocab(y, p.axes, config)
        return x.dtype == y.dtype and np.array_equal(x, y)

    return jax.tree.all(jax.tree.map(equal, a, b, param_tree(config)))


def convert(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "ngpt_jax.tools.convert", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | environment,
    )  # fmt: skip


# --------------------------------------------------------------------- Hugging Face, without torch


@pytest.mark.parametrize("name", MODELS | SLERP)
def test_raw_round_trip_is_exact(tiny, tmp_path, name):
    run = make_run(tiny, name)
    assert huggingface.write_folder(run, str(tmp_path / "hf")) == []
    back = huggingface.read_folder(str(tmp_path / "hf"))
    assert back.config == run.config
    assert back.tokenizer == ByteTokenizer()
    assert same(back.params, run.params, run.config.model)
    padding = np.asarray(back.params["input_embedding"])[260:]
    assert len(padding) == 384 - 260
    assert np.array_equal(padding, np.eye(1, 16).repeat(len(padding), 0) * (name[:3] != "gpt"))


def test_names_and_shapes(tiny, tmp_path):
    run = make_run(tiny, "ngpt-gqa")
    tensors = huggingface.to_torch(run.config.model, run.params, "bfloat16")
    layer = "model.layers.1."
    assert tensors["lm_head.weight"].shape == (260, 16)
    assert tensors[layer + "self_attn.k_proj.weight"].shape == (12, 16)
    assert tensors[layer + "self_attn.o_proj.weight"].shape == (16, 24)
    assert tensors[layer + "mlp.up_proj.weight"].shape == (24, 16)
    key = np.asarray(run.params["layers"]["key_kernel"][1], jnp.bfloat16)  # (embed, 2, 6)
    assert np.array_equal(tensors[layer + "self_attn.k_proj.weight"][7], key[:, 1, 1])
    out = np.asarray(run.params["layers"]["out_kernel"][1], jnp.bfloat16)  # (4, 6, embed)
    assert np.array_equal(tensors[layer + "self_attn.o_proj.weight"][:, 8], out[1, 2])
    assert all(w.flags.c_contiguous for w in tensors.values())


def test_bfloat16_keeps_scales(tiny, tmp_path):
    run = make_run(tiny)
    huggingface.write_folder(run, str(tmp_path / "hf"), "bfloat16")
    back = huggingface.read_folder(str(tmp_path / "hf"))
    rounded = jax.tree.map(
        lambda w, p: w.astype(jnp.bfloat16).astype(w.dtype) if p.is_matrix else w,
        run.params, param_tree(run.config.model),
    )  # fmt: skip
    assert same(back.params, rounded, run.config.model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ngpt-gqa", "ngpt-read"])
def test_folded_folder(tiny, tmp_path, name):
    run = make_run(tiny, name)
    huggingface.write_folder(run, str(tmp_path / "hf"), fold=True)
    config, params, tokenizer = huggingface.read_folder(str(tmp_path / "hf"))
    assert config.model == folding.folded_config(run.config.model)
    assert same(params, folding.fold(run.config.model, run.params), config.model)
    opening.write_weights(str(tmp_path / "run"), config, params, tokenizer.fingerprint)
    model = ngpt_jax.load(str(tmp_path / "run"))
    x = some_tokens(run.config.model)
    right = logits(run.config.model, run.params, x)
    assert worst(logits(model.config.model, model.params, x), right) < 1e-5
    assert model.generate("ab", 4, temperature=0).ids
    again = loading.open_model("workdir", str(tmp_path / "run"), None, [])
    huggingface.write_folder(again, str(tmp_path / "again"), fold=True)
    assert same(huggingface.read_folder(str(tmp_path / "again")).params, params, config.model)


@pytest.mark.slow
def test_command_there_and_back(tiny, tmp_path):
    run = make_run(tiny, "ngpt-gqa", **{"data.seed": 3, "train.batch_size": 8})
    one, folder, two = (tmp_path / n for n in ("one", "folder", "two"))
    opening.write_weights(str(one), run.config, run.params, run.tokenizer.fingerprint)
    folder.mkdir()  # an empty folder may be there
    out = convert(f"--workdir={one}", f"--to_hf={folder}")
    assert (out.returncode, out.stderr) == (0, "")
    count = f"{num_params(run.config.model):,}"
    assert out.stdout == f"{one}, step 0 -> {folder}: ngpt, {count} parameters\n"
    names = ["config.json", "configuration_ngpt.py", "functions_ngpt.py", "generation_config.json"]
    names += ["model.safetensors", "modeling_ngpt.py", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(p.name for p in folder.iterdir()) == names
    out = convert(f"--from_hf={folder}", f"--out={two}", "--config.eval.every=5")
    assert (out.returncode, out.stderr) == (0, "")
    configs = [json.loads((p / "config.json").read_text()) for p in (one, two)]
    assert configs[0] | {"eval": configs[1]["eval"]} == configs[1]
    assert configs[1]["eval"]["every"] == 5
    back = ngpt_jax.load(str(two))
    assert back.step == 0
    assert same(back.params, run.params, run.config.model)
    like = layout.abstract_params(run.config.model, back.mesh)  # as init_from reads it
    params, progress = restore_params(two, like)
    assert same(params, run.params, run.config.model)
    assert progress["tokenizer"] == run.tokenizer.fingerprint


def as_written_before(folder):
    """Takes out of config.json what folders lack that were written before choices were fields."""

    def change(values):
        model = values["ngpt_jax"]["config"]["model"]
        values["qk_norm"] = values.pop("choices")["qk_norm"]
        for name in huggingface.choices(ngpt_jax.config.ModelConfig()):
            section, _, leaf = name.rpartition(".")
            if name != "qk_norm":
                del (model[section] if section else model)[leaf]
        values["ngpt_jax"]["config"]["optimizer"]["project"] = True  # for GPT too

    edit(folder / "config.json", change)


@models
def test_folder_written_before(tiny, tmp_path, name):
    run = make_run(tiny, name)
    huggingface.write_folder(run, str(tmp_path / "hf"))
    as_written_before(tmp_path / "hf")
    back = huggingface.read_folder(str(tmp_path / "hf"))
    assert back.config == run.config
    assert same(back.params, run.params, run.config.model)


# ------------------------------------------------------------------------------------- tokenizers


def written_tokenizer(tiny, tmp_path, path):
    config = tiny(**{"data.tokenizer": str(path)})
    tokenizer = load_tokenizer(config.data)
    facts, notes = hf_tokenizer.write(tmp_path, config.data, tokenizer, 16)
    assert facts["fingerprint"] == tokenizer.fingerprint
    if facts["file"] is not None:  # the copy is the same tokenizer
        data = dataclasses.replace(config.data, tokenizer=str(tmp_path / facts["file"]))
        assert load_tokenizer(data).fingerprint == tokenizer.fingerprint
    return tokenizer, notes


TEXTS = ["  two\n\n a\t abc abcd<|x 123456", "na\u00efve \U0001f389\x00", " ", "the cat "]


@pytest.mark.parametrize("kind", ["byte", "json", "tiktoken", "gpt2"])
def test_tokenizer_json_gives_the_same_ids(tiny, tmp_path, paths, kind):  # noqa: F811
    tokenizer, notes = written_tokenizer(tiny, tmp_path, paths[kind])
    assert notes == []
    built = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert built.encode(text).ids == tokenizer.encode(text)
        assert built.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    facts = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert built.token_to_id(facts["eos_token"]) == tokenizer.eod
    assert built.encode("a" + facts["eos_token"]).ids == [*tokenizer.encode("a"), tokenizer.eod]


def test_tokens_that_a_file_adds_are_left_out(tiny, tmp_path):
    file = byte_level(hf.AddedToken(EOT, special=True), "<s>", file=tmp_path / "t.json")
    with_start = hf.Tokenizer.from_file(str(file))
    with_start.post_processor = hf.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", with_start.token_to_id("<s>"))]
    )
    with_start.save(str(file))
    (tmp_path / "out").mkdir()
    tokenizer, _ = written_tokenizer(tiny, tmp_path / "out", file)
    built = hf.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert built.encode("some text").ids == tokenizer.encode("some text")


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """A .tiktoken file with tokens that only the right pattern of words can tell apart."""
    more = [b"12", b"123", b"1234", b" \n", b"\n\n", b"  ", b"ab", b"abc", b"bc"]
    ranks = {token: i for i, token in enumerate([*(bytes([i]) for i in range(256)), *more])}
    pattern = TIKTOKEN_FORMATS["cl100k_base"].pattern
    monkeypatch.setitem(TIKTOKEN_FORMATS, "d", TiktokenFormat(pattern, {EOT: 265}, len(ranks)))
    (tmp_path / "d.tiktoken").write_bytes(ranks_file(ranks))
    (tmp_path / "out").mkdir()
    return tmp_path / "d.tiktoken"


def test_tiktoken_is_built_where_it_can_be(tiny, tmp_path, digits):
    tokenizer, notes = written_tokenizer(tiny, tmp_path / "out", digits)
    assert notes == []
    built = hf.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(rng.choice(list("ab c1234\n \r\t\u00e9'S!"), 40))
        assert built.encode(text).ids == tokenizer.encode(text)


def _without(pattern, old, new):
    assert old in pattern
    return pattern.replace(old, new)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: _without(p, r"\z", "$"),  # which is the end of a line there
        lambda p: _without(p, "{1,3}", "{1,3}+"),  # which is not possessive there
        lambda p: r"\w+|\W",
    ],
)
def test_tiktoken_that_cannot_be_built_is_told(tiny, tmp_path, digits, monkeypatch, change):
    right = hf_tokenizer._pattern
    monkeypatch.setattr(hf_tokenizer, "_pattern", lambda pattern: change(right(pattern)))
    _, notes = written_tokenizer(tiny, tmp_path / "out", digits)
    assert len(notes) == 1 and "AutoTokenizer finds no tokenizer" in notes[0]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["original_tokenizer"]


@pytest.mark.parametrize("kind", ["model", "gpt2"])
def test_tokenizer_comes_back_from_the_folder(tiny, tmp_path, paths, kind):  # noqa: F811
    run = make_run(tiny, **{"model.vocab_size": 300, "data.tokenizer": paths[kind]})
    huggingface.write_folder(run, str(tmp_path / "hf"))
    back = huggingface.read_folder(str(tmp_path / "hf"))
    assert back.tokenizer.fingerprint == run.tokenizer.fingerprint
    place = Path(back.config.data.tokenizer)
    assert place.is_absolute() and place.is_relative_to(tmp_path / "hf")
    overrides = [("data.tokenizer", paths[kind])]
    assert huggingface.read_folder(str(tmp_path / "hf"), overrides).config == run.config
    with raises("--from_hf=.*: data.tokenizer .* is not the one that it was trained with"):
        huggingface.read_folder(str(tmp_path / "hf"), [("data.tokenizer", "byte")])


# --------------------------------------------------------------------------------------- refusals


@pytest.fixture
def folder(tiny, tmp_path):
    huggingface.write_folder(make_run(tiny), str(tmp_path / "hf"))
    return tmp_path / "hf"


def edit(file, change):
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(model_type="llama"), "is of model_type 'llama', not ngpt_jax; give a"),
        (lambda v: v.pop("ngpt_jax"), "what config.json has under ngpt_jax cannot be read"),
        (lambda v: v["ngpt_jax"]["tokenizer"].update(file=3), "ngpt_jax cannot be read .tokenizer"),
        (lambda v: v["ngpt_jax"]["config"].update(modle=3), "Unknown field modle.*; give a folder"),
        (lambda v: v.update(vocab_size=300), "says vocab_size = 300, but the config .* 260"),
        (lambda v: v["scale_factors"].update(s_z=1.0), "says scale_factors = .*, but"),
    ],
)  # fmt: skip
def test_folders_that_are_not_ours(folder, change, message):
    edit(folder / "config.json", change)
    with raises(f"--from_hf={folder}.*{message}"):
        huggingface.read_folder(str(folder))


def test_damaged_folders(folder, tmp_path):
    weights, config = folder / "model.safetensors", folder / "config.json"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4])
    with raises("--from_hf=.*: model.safetensors cannot be read"):
        huggingface.read_folder(str(folder))
    weights.write_bytes(b"{}")
    with raises("--from_hf=.*: model.safetensors cannot be read"):
        huggingface.read_folder(str(folder))
    weights.unlink()
    with raises("--from_hf=.* is not complete: model.safetensors must be in it"):
        huggingface.read_folder(str(folder))
    weights.with_suffix(".safetensors.index.json").write_text('{"weight_map": ["a"]}')
    with raises("--from_hf=.*: model.safetensors.index.json has no weight_map"):
        huggingface.read_folder(str(folder))
    config.write_text("[" * 100_000)
    with raises("--from_hf=.*: config.json cannot be read"):
        huggingface.read_folder(str(folder))
    config.write_text("{")
    with raises("--from_hf=.*: config.json cannot be read"):
        huggingface.read_folder(str(folder))
    config.write_text("[]")
    with raises("--from_hf=.*: config.json is not a table"):
        huggingface.read_folder(str(folder))
    for path in (tmp_path / "nowhere", tmp_path):
        with raises("--from_hf=.* is not a Hugging Face folder: config.json must be in it"):
            huggingface.read_folder(str(path))


def test_tensors_that_do_not_fit(tiny):
    run = make_run(tiny)
    model, name = run.config.model, "model.layers.1.mlp.s_u"
    tensors = huggingface.to_torch(model, run.params, "float32")
    with raises(rf"it lacks the tensor {name}, which is \(64,\) here"):
        huggingface.from_torch("it", model, {n: w for n, w in tensors.items() if n != name})
    with raises(rf"it: the tensor {name} is \(3,\), not \(64,\)"):
        huggingface.from_torch("it", model, tensors | {name: np.zeros(3)})
    with raises(r"it has a tensor bias \(3,\), which this model has not"):
        huggingface.from_torch("it", model, tensors | {"bias": np.zeros(3)})


def test_output_is_whole_or_not_there(tiny, tmp_path, monkeypatch):
    def fail(folder, *_):
        assert folder.parent == tmp_path and folder.name.startswith(".hf.")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_tokenizer, "write", fail)
    with raises("--to_hf=.* cannot be written: No space left on device"):
        huggingface.write_folder(make_run(tiny), str(tmp_path / "hf"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    for path, message in (
        ("full", "exists already, and not empty; choose another name"),
        ("full/a", "exists already; choose another name"),
        ("no/where", "there is no folder"),
    ):
        with raises(f"--out={tmp_path / path}.*{message}"):
            folders.check_new("out", str(tmp_path / path))
    with raises("--to_hf=gs://b/c must be a local path"):
        folders.check_new("to_hf", "gs://b/c")
    folders.check_new("out", "gs://b/c", remote=True)


def test_what_cannot_be_folded(tiny, tmp_path):
    with raises(r"--folded: this model \(model.kind=gpt\) has no scales to fold; leave it out"):
        huggingface.write_folder(make_run(tiny, "gpt"), str(tmp_path / "hf"), fold=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Give one of --workdir, --from_hf and --from_reference to read from."),
        (["--workdir=a", "--from_hf=b", "--out=c"], "to read from, not --workdir and --from_hf."),
        (["--workdir=a"], "--workdir needs --to_hf or --to_reference."),
        (["--workdir=a", "--to_hf=b", "--to_reference=c"], "not --to_hf and --to_reference."),
        (["--from_hf=a", "--to_hf=b"], "--from_hf needs --out, not --to_hf."),
        (["--from_hf=a", "--out=b", "--folded"], "--folded is for --to_hf; leave it out."),
        (["--from_hf=a", "--out=b", "--step=3"], "--step is for --workdir; leave it out."),
        (["--workdir=a", "--to_reference=b", "--dtype=bfloat16"], "--dtype is for --to_hf;"),
        (["--workdir=a", "--to_hf=b", "--dtype=float16"], "--dtype"),
    ],
)
def test_flags(flags, message):
    out = convert(*flags)
    assert out.returncode == 2
    assert out.stderr.startswith("error: ") and out.stderr.count("\n") == 1
    assert message in out.stderr


@pytest.mark.slow
def test_command_refuses_in_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError")
    places = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    for flags, message in (
        ([f"--workdir={tmp_path}", f"--to_hf={tmp_path}/hf"], "is not the folder of a training"),
        (["--from_reference=a.pt", f"--out={tmp_path}/run"], "pip install '.[torch]' in the clone"),
    ):
        out = convert(*flags, PYTHONPATH=places)
        assert (out.returncode, out.stderr.count("\n")) == (2, 1), out.stderr
        assert message in out.stderr


def test_without_torch(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with raises(r"--to_reference needs PyTorch: pip install '\.\[torch\]' in the clone"):
        reference_checkpoint.write(make_run(tiny), str(tmp_path / "ckpt.pt"))
    with raises(r"--from_reference needs PyTorch: pip install '\.\[torch\]' in the clone"):
        reference_checkpoint.read(str(tmp_path / "ckpt.pt"))
