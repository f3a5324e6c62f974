"""Conversions against PyTorch: logits and text in transformers, the authors' checkpoints."""

import json
import os
import pickle

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import pytest
import tokenizers as hf
from choices import label, pairwise
from data_helpers import raises
from test_convert import (
    GOLDEN,
    GQA,
    MODELS,
    as_written_before,
    convert,
    logits,
    make_run,
    same,
    some_tokens,
    worst,
)
from test_tokenizers import paths  # noqa: F401

import ngpt_jax
from ngpt_jax import sphere
from ngpt_jax.export import huggingface, reference_checkpoint
from ngpt_jax.inference.opening import write_weights

WHY = "needs pip install '.[torch]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
functions_ngpt = pytest.importorskip("ngpt_jax.export.functions_ngpt", reason=WHY)

DTYPES = ("model.dtype", "model.param_dtype")
POINTS = [(n, folded) for n in MODELS for folded in (False, True) if not (folded and n[0] == "g")]


def load_torch(path, **how):
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(str(path), trust_remote_code=True, **how).eval()


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.double().numpy()


# ------------------------------------------------------------------------------------ Hugging Face


@pytest.mark.parametrize(("name", "folded"), POINTS)
def test_logits_are_those_of_torch(tiny, tmp_path, name, folded):
    run = make_run(tiny, name)
    x = some_tokens(run.config.model)
    ours = logits(run.config.model, run.params, x)
    path = str(tmp_path / "hf")
    huggingface.write_folder(run, path, fold=folded)
    theirs = load_torch(path)
    assert {p.dtype for p in theirs.parameters()} == {torch.float32}
    assert worst(torch_logits(theirs, x), ours) < 1e-5
    double = torch_logits(load_torch(path, dtype=torch.float64), x)
    assert worst(torch_logits(theirs, x), double) < 1e-5

    half = str(tmp_path / "half")
    huggingface.write_folder(run, half, "bfloat16", folded)
    theirs = load_torch(half, dtype="auto")
    for parameter_name, p in theirs.named_parameters():
        matrix = parameter_name.endswith(("proj.weight", "tokens.weight", "head.weight"))
        assert p.dtype == (torch.bfloat16 if matrix else torch.float32), parameter_name
    error = worst(torch_logits(theirs, x), ours)
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize("fields", pairwise(), ids=label)
def test_every_choice_in_torch(tiny, tmp_path, x64, fields):
    fields = {f"model.{name}": value for name, value in fields.items()}
    run = make_run(tiny, **GQA, **fields, **dict.fromkeys(DTYPES, "float64"))
    params = jax.tree.map(lambda w: w.astype("float32").astype(w.dtype), run.params)
    run.params, x = params, some_tokens(run.config.model)
    ours = logits(run.config.model, params, x)
    scaled = any(fields[f"model.{name}.form"] == "vector" for name in ("s_qk", "s_u", "s_v", "s_z"))
    for fold in (False, True)[: 1 + scaled]:
        path = str(tmp_path / f"hf{fold}")
        huggingface.write_folder(run, path, fold=fold)
        most = 1e-5 if fold else 1e-12  # the folder holds float32
        assert worst(torch_logits(load_torch(path, dtype=torch.float64), x), ours) < most


@pytest.mark.parametrize(("name", "folded"), POINTS)
def test_folder_written_before(tiny, tmp_path, name, folded):
    run = make_run(tiny, name)
    x = some_tokens(run.config.model)
    huggingface.write_folder(run, str(tmp_path / "hf"), fold=folded)
    new = load_torch(tmp_path / "hf")
    as_written_before(tmp_path / "hf")
    old = load_torch(tmp_path / "hf")
    assert old.config.choices == new.config.choices
    assert np.array_equal(torch_logits(old, x), torch_logits(new, x))


def test_slerp():
    """As the sphere's, channel by channel; finite with finite gradients at 0 and pi."""
    rng = np.random.default_rng(0)
    h, f, alpha = (rng.standard_normal((7, 16)).astype(np.float32) for _ in range(3))
    h, f = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (h, f))
    for near, b in (("", f), ("the same", h), ("opposite", -h)):
        for a in (alpha, alpha[:, :1], 0 * alpha, 1 + 0 * alpha):
            leaves = [torch.tensor(x, requires_grad=True) for x in (h, b, a)]
            out = functions_ngpt.slerp(*leaves)
            out.square().sum().backward()
            assert all(x.grad.isfinite().all() for x in leaves)
            if near != "opposite":
                right = sphere.slerp(h, b, np.abs(a))
                assert np.max(np.abs(out.detach().numpy() - right)) < 2e-6, near


@pytest.mark.parametrize("name", ["ngpt-gqa", "gpt-qk", "slerp"])
def test_text_from_transformers(tiny, tmp_path, name):
    """Greedy text with and without cache, alone and padded, is ours up to a near tie."""
    run = make_run(tiny, name, **{"model.context": 64})
    huggingface.write_folder(run, str(tmp_path / "hf"))
    write_weights(str(tmp_path / "run"), run.config, run.params, run.tokenizer.fingerprint)
    model = load_torch(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(tmp_path / "hf"), trust_remote_code=True
    )
    prompts = ["ab", "a longer one: "]
    ours = ngpt_jax.load(str(tmp_path / "run")).generate(prompts, 12, temperature=0)
    batch = tokenizer([tokenizer.eos_token + p for p in prompts], return_tensors="pt", padding=True)
    how = {"max_new_tokens": 12, "do_sample": False}
    together = model.generate(**batch, **how)
    assert torch.equal(model.generate(**batch, **how, use_cache=False), together)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(**batch, **how, **static), together)
    for i, (prompt, mine) in enumerate(zip(prompts, ours)):
        ids = tokenizer(tokenizer.eos_token + prompt, return_tensors="pt")["input_ids"]
        alone = model.generate(ids, **how)[0]
        padding = int((batch["attention_mask"][i] == 0).sum())
        assert torch.equal(alone, together[i, padding:])
        theirs = alone[ids.shape[1] :].tolist()
        differ = [n for n, (a, b) in enumerate(zip(theirs, mine.ids)) if a != b]
        if differ:
            with torch.no_grad():
                best = model(alone[None, : ids.shape[1] + differ[0]]).logits[0, -1].topk(2).values
            assert best[0] - best[1] < 1e-3
        else:
            assert theirs == mine.ids


def test_what_transformers_asks_of_a_model(tiny, tmp_path):
    run = make_run(tiny, "ngpt")
    huggingface.write_folder(run, str(tmp_path / "hf"))
    model = load_torch(tmp_path / "hf")
    ids = torch.from_numpy(some_tokens(run.config.model)).long()
    out = model(ids, labels=ids, output_hidden_states=True)
    before, after = out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    nats = torch.nn.functional.cross_entropy(before, after)
    assert out.loss.item() == pytest.approx(nats.item(), rel=1e-6)
    for change in ((300,), (None, 64)):
        with pytest.raises(NotImplementedError, match="is that of the training, 260"):
            model.resize_token_embeddings(*change)
    for change in ((), (260,), (None, 20)):
        assert model.resize_token_embeddings(*change) is model.get_input_embeddings()
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert len(out.hidden_states) == 3
    assert torch.allclose(out.hidden_states[-1].norm(dim=-1), torch.ones(2, 16), atol=1e-6)
    logits = out.logits.detach().numpy()
    with torch.no_grad():
        assert worst(model(ids, logits_to_keep=1).logits[:, 0].numpy(), logits[:, -1]) < 1e-5
        first = model(ids[:, :9], use_cache=True)
        rest = model(ids[:, 9:], past_key_values=first[1]).logits.numpy()
        assert worst(rest, logits[:, 9:]) < 1e-5
    # Saved anew, be it in parts, it comes back; so does what it learned.
    model.lm_head.weight.data[3] *= 2
    model.save_pretrained(str(tmp_path / "again"), max_shard_size="20KB")
    assert not (tmp_path / "again" / "model.safetensors").exists()
    back = huggingface.read_folder(str(tmp_path / "again"))
    changed = dict(run.params)
    changed["output_embedding"] = run.params["output_embedding"].at[3].multiply(2)
    assert back.config == run.config
    assert same(back.params, changed, run.config.model)


@pytest.mark.parametrize(("name", "folded"), POINTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_keeps_its_dtype(tiny, tmp_path, name, folded, dtype):
    run = make_run(tiny, name)
    huggingface.write_folder(run, str(tmp_path / "a"), "bfloat16", folded)
    model = load_torch(tmp_path / "a", dtype=getattr(torch, dtype))
    assert model.dtype == model.model.dtype == getattr(torch, dtype)
    model.save_pretrained(str(tmp_path / "b"))
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == dtype
    again = load_torch(tmp_path / "b", dtype="auto")
    assert again.dtype == model.dtype and again.lm_head.weight.dtype == model.dtype
    assert again.get_memory_footprint() == model.get_memory_footprint()
    if not name.startswith("gpt"):
        assert again.model.layers[0].alpha_a.dtype == torch.float32


@pytest.mark.parametrize(("name", "folded"), POINTS)
def test_packed_documents(tiny, tmp_path, name, folded):
    """Positions begin anew, without a mask or earlier keys: attention stays within documents."""
    run = make_run(tiny, name)
    huggingface.write_folder(run, str(tmp_path / "hf"), fold=folded)
    model = load_torch(tmp_path / "hf")
    ids = torch.from_numpy(some_tokens(run.config.model)).long()[:, :12]

    def positions(*lengths):
        return torch.cat([torch.arange(n) for n in lengths])[None]

    def alone(*ends):
        starts = (0, *ends[:-1])
        return torch.cat([model(ids[:, a:b]).logits for a, b in zip(starts, ends)], 1)

    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        cache = {"past_key_values": transformers.DynamicCache()}  # empty
        for call, how in (
            (model, {"use_cache": False}), (model, {"use_cache": True}), (model, cache),
            (compiled, {"use_cache": False}),
        ):  # fmt: skip
            packed = call(ids, position_ids=positions(4, 1, 7), **how).logits
            assert worst(packed.numpy(), alone(4, 5, 12).numpy()) < 1e-5
        both = torch.cat([positions(4, 8), positions(12)])  # a row of one document beside
        packed = model(ids, position_ids=both).logits
        assert worst(packed[:1].numpy(), alone(4, 12)[:1].numpy()) < 1e-5
        assert worst(packed[1:].numpy(), alone(12)[1:].numpy()) < 1e-5
        ones = torch.ones_like(ids)  # a mask says itself what is seen
        later = {"position_ids": positions(12) + 5}  # one document
        one, masked = model(ids, **later).logits, model(ids, ones, **later).logits
        assert worst(one.numpy(), masked.numpy()) < 1e-5
        masked = model(ids, attention_mask=ones, position_ids=positions(4, 8)).logits
        assert worst(masked.numpy(), alone(4, 12).numpy()) > 1e-3


@pytest.mark.parametrize(("name", "folded"), POINTS)
def test_gradient_checkpointing(tiny, tmp_path, name, folded):
    run = make_run(tiny, name)
    huggingface.write_folder(run, str(tmp_path / "hf"), fold=folded)
    model = load_torch(tmp_path / "hf").train()
    ids = torch.from_numpy(some_tokens(run.config.model)).long()

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert model.is_gradient_checkpointing
        for a, b in zip(gradients(), plain, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="does not go with a cache"):
        model(ids, past_key_values=transformers.DynamicCache())
    cached = model.eval()(ids[:, :5], use_cache=True)[1]
    assert cached.get_seq_length() == 5


def test_arguments_as_other_models_take_them(tiny, tmp_path, caplog, monkeypatch):
    run = make_run(tiny)
    huggingface.write_folder(run, str(tmp_path / "hf"))
    model = load_torch(tmp_path / "hf", attn_implementation="eager")
    ids = torch.from_numpy(some_tokens(run.config.model)).long()
    embeddings = model.get_input_embeddings()(ids)
    one = "You must specify exactly one of input_ids or inputs_embeds"
    for call in (model, model.model):
        with pytest.raises(ValueError, match=one):
            call(ids, inputs_embeds=embeddings)
        with pytest.raises(ValueError, match=one):
            call()
    with torch.no_grad():
        by_embeddings = model(inputs_embeds=embeddings).logits
        assert worst(by_embeddings.numpy(), model(ids).logits.numpy()) < 1e-5
    monkeypatch.setattr(transformers.utils.logging.get_logger(), "propagate", True)
    assert model(ids, output_attentions=True).attentions is None
    assert "output_attentions: sdpa does not return attentions" in caplog.text


@pytest.mark.parametrize("kind", ["byte", "json", "model", "tiktoken", "gpt2"])
def test_auto_tokenizer(tiny, tmp_path, paths, kind):  # noqa: F811
    if kind == "model" and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers reads SentencePiece models from 5.0 on")
    run = make_run(tiny, **{"model.vocab_size": 300, "data.tokenizer": paths[kind]})
    notes = huggingface.write_folder(run, str(tmp_path / "hf"))
    assert len(notes) == (kind == "model")
    auto = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "hf"), trust_remote_code=True)
    assert auto.eos_token_id == auto.pad_token_id == run.tokenizer.eod
    for text in ("  two\n\n a\t abc abcd<|x", "na\u00efve \U0001f389", "the cat "):
        assert auto(text)["input_ids"] == run.tokenizer.encode(text)


# ----------------------------------------------------------------------------- the authors' layout


def golden_checkpoint(kind, file, top=True, prefix="_orig_mod.", **arguments):
    golden = np.load(GOLDEN / f"a_{kind}_pert.npz")
    raw = {n.removeprefix("param/"): golden[n] for n in golden.files if n.startswith("param/")}
    state = {prefix + n: torch.from_numpy(w) for n, w in raw.items()}
    known = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 97, "block_size": 32}
    known |= {"use_nGPT": int(kind == "ngpt"), "base_scale": 32**-0.5, "dropout": 0.0}
    content = {"model": state, "model_args": known | arguments, "iter_num": 9, "config": {"a": "b"}}
    torch.save(content if top else state, file)
    return golden, raw


@pytest.fixture
def words(tmp_path):
    """An override: a tokenizer of two ids, as the golden vocabulary is smaller than bytes."""
    tokenizer = hf.Tokenizer(hf.models.WordLevel(vocab={"a": 0, "</s>": 1}, unk_token="a"))
    tokenizer.save(str(tmp_path / "words.json"))
    return ("data.tokenizer", str(tmp_path / "words.json"))


@pytest.mark.parametrize(("dtype", "most"), [("float64", 1e-9), ("float32", 2e-5)])
@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_golden_weights(request, tmp_path, words, kind, dtype, most):
    if dtype == "float64":
        request.getfixturevalue("x64")
    golden, _ = golden_checkpoint(kind, tmp_path / "ckpt.pt")
    overrides = [words, ("model.dtype", dtype), ("model.param_dtype", dtype)]
    config, params, tokenizer = reference_checkpoint.read(str(tmp_path / "ckpt.pt"), overrides)
    write_weights(str(tmp_path / "run"), config, params, tokenizer.fingerprint)
    model = ngpt_jax.load(str(tmp_path / "run"))
    ours = logits(model.config.model, model.params, golden["x"].astype(np.int32))
    assert ours.dtype == dtype
    assert np.max(np.abs(ours - golden["logits"])) < most


def test_state_dict_alone_wants_flags(tmp_path, words):
    file = str(tmp_path / "state.pt")
    _, raw = golden_checkpoint("ngpt", file, top=False, prefix="")
    with raises(f"--config.model.heads is needed: --from_reference={file} does not tell"):
        reference_checkpoint.read(file, [words])
    with raises("--config.model.context is needed: .* number of tokens of a training sequence"):
        reference_checkpoint.read(file, [words, ("model.heads", "4")])
    with raises("--config.data.tokenizer is needed: .* of its 97 token ids"):
        reference_checkpoint.read(file, [("model.heads", "4"), ("model.context", "32")])
    given = [words, ("model.heads", "4"), ("model.context", "32")]
    config, params, _ = reference_checkpoint.read(file, given)
    assert (config.model.kind, config.model.layers, config.model.width) == ("ngpt", 2, 32)
    assert (config.model.mlp_width, config.model.kv_heads, config.model.vocab_size) == (128, 4, 97)
    assert np.array_equal(params["s_z"][:97], raw["sz"])
    for heads, message in (("5", "5 heads do not divide its 32 query"), ("x", "wants a number")):
        with raises(message):
            reference_checkpoint.read(file, [words, ("model.heads", heads), given[2]])


def test_choices_that_are_not_theirs(tmp_path, words):
    golden_checkpoint("ngpt", tmp_path / "ckpt.pt")
    with raises("--from_reference=.*: the authors' layout has no place for model.residual=slerp"):
        reference_checkpoint.read(str(tmp_path / "ckpt.pt"), [words, ("model.residual", "slerp")])


def test_base_scale_is_that_of_the_file(tmp_path, words):
    golden_checkpoint("ngpt", tmp_path / "ckpt.pt", base_scale=0.5)
    model = reference_checkpoint.read(str(tmp_path / "ckpt.pt"), [words])[0].model
    assert [getattr(model, n).scale for n in ("alpha_a", "alpha_m", "s_qk", "s_z")] == [0.5] * 4
    assert (model.s_u.scale, model.s_v.scale) == (1.0, 1.0)


@pytest.mark.parametrize("name", ["ngpt", "ngpt-gqa", "gpt", "plain"])
def test_reference_round_trip(tiny, tmp_path, name):
    """Bit for bit where the constants are the authors' own, else the same logits."""
    fields = {} if name == "plain" else MODELS[name]
    run = make_run(tiny, "ngpt", **{"model.alpha_a.init": 0.05, "model.s_z.init": 1.0} | fields)
    file = str(tmp_path / "ckpt.pt")
    notes = reference_checkpoint.write(run, file)
    assert len(notes) == (name == "ngpt-gqa")
    content = torch.load(file, weights_only=True)
    arguments = content["model_args"]
    assert arguments == {
        "n_layer": 2, "n_head": run.config.model.heads, "n_embd": 16, "vocab_size": 260,
        "block_size": 16, "use_nGPT": int(name != "gpt"), "base_scale": 0.25,
    }  # fmt: skip
    assert content["model"]["transformer.h.1.c_fc.weight"].dtype == torch.float32
    config, params, _ = reference_checkpoint.read(file, [("data.tokenizer", "byte")])
    x = some_tokens(run.config.model)
    right = logits(run.config.model, run.params, x)
    assert worst(logits(config.model, params, x), right) < 1e-5
    assert same(params, run.params, config.model) == (name != "ngpt")


def test_what_the_layout_cannot_say(tiny, tmp_path):
    def refused(message, name="ngpt", **fields):
        run = make_run(tiny, name, **{f"model.{n}": v for n, v in fields.items()})
        with raises(f"--to_reference: the authors' layout has no place for {message}"):
            reference_checkpoint.write(run, str(tmp_path / "ckpt.pt"))

    refused("model.qk_norm=True in gpt", "gpt-qk")
    refused("model.qk_norm=False in ngpt", "ngpt-read")
    refused("model.residual=slerp in ngpt", residual="slerp")
    refused("model.final_norm=none in gpt", "gpt", final_norm="none")
    refused("model.rope_base=500.0", rope_base=500.0)
    refused("model.rms_eps=0.1", "gpt", rms_eps=0.1)
    huggingface.write_folder(make_run(tiny), str(tmp_path / "hf"), fold=True)
    folded = huggingface.read_folder(str(tmp_path / "hf"))
    with raises("no place for scales that are folded in"):
        run = make_run(tiny)
        run.config, run.params = folded.config, folded.params
        reference_checkpoint.write(run, str(tmp_path / "ckpt.pt"))


class Anything:
    pass


def test_files_that_are_no_weights(tmp_path):
    def refused(message):
        with raises(f"--from_reference={file}.*{message}"):
            reference_checkpoint.read(str(file))

    file = tmp_path / "a.pt"
    refused("there is no such file")
    for content in (
        b"",
        b"some text\n",
        b"# A heading\n",
        b"PK\x03\x04 and no more",
        b"\x80\x02}q\x00",
    ):
        file.write_bytes(content)
        refused("is not a file of torch.save, or is damaged")
    torch.save({"model": {}, "args": Anything()}, file)
    refused("holds other objects than tensors, numbers and texts, which are not loaded")
    file.write_bytes(pickle.dumps({"model": Anything()}))
    refused("is not a file of torch.save, or is damaged")
    golden_checkpoint("ngpt", file)
    file.write_bytes(file.read_bytes()[:-3000])
    refused("is not a file of torch.save, or is damaged")
    for content in ({}, {"model": {"a": torch.ones(2)}}, {"model": 3}, [torch.ones(2)]):
        torch.save(content, file)
        refused("has no tensors transformer.wte.weight and lm_head.weight")
    plain = torch.ones(2, 2)
    for odd, what in (
        (plain.to_sparse(), "torch.float32, torch.sparse_coo"),
        (plain.to("meta"), "meta, torch.strided"),
        (plain.to(torch.complex64), "torch.complex64"),
        (plain.to(torch.int8), "torch.int8"),
    ):
        torch.save({"transformer.wte.weight": odd, "lm_head.weight": plain}, file)
        refused(f"the tensor transformer.wte.weight is {what}.*; save plain tensors")


@pytest.mark.parametrize(
    ("arguments", "override", "message"),
    [
        ({"n_layer": 3}, None, "model_args has n_layer = 3, but its tensors are of 2"),
        ({"vocab_size": 98}, None, "model_args has vocab_size = 98, but its tensors are of 97"),
        ({"n_head": "4"}, None, "model_args has n_head = '4', which is no number"),
        ({"n_head": 5}, None, "5 heads do not divide its 32 query and 32 key channels"),
        ({"use_nGPT": 0}, None, "model_args has use_nGPT = 0, but there are scales sz"),
        ({}, ("model.heads", "2"), "--config.model.heads=2 contradicts --from_.*, which has 4"),
        ({}, ("model.kind", "gpt"), "--config.model.kind=gpt contradicts --from_.* has ngpt"),
        ({}, ("model.context", "64"), "--config.model.context=64 contradicts .*, which has 32"),
        ({}, ("model.kv_heads", "2"), "--config.model.kv_heads=2 contradicts .*, which has 4"),
    ],
)
def test_contradictions(tmp_path, words, arguments, override, message):
    golden_checkpoint("ngpt", tmp_path / "ckpt.pt", **arguments)
    with raises(message):
        overrides = [words, *([override] if override else [])]
        reference_checkpoint.read(str(tmp_path / "ckpt.pt"), overrides)


def test_tensors_of_another_model(tmp_path, words):
    file = tmp_path / "ckpt.pt"

    def refused(change, message):
        golden_checkpoint("ngpt", file, prefix="")
        content = torch.load(file, weights_only=True)
        change(content["model"])
        torch.save(content, file)
        with raises(f"--from_reference={file}.*{message}"):
            reference_checkpoint.read(str(file), [words])

    name, wide = "transformer.h.1.suv", torch.ones(32, 33)
    refused(lambda s: s.pop(name), rf"lacks the tensor {name}, which is \(256,\) here")
    refused(lambda s: s.update({name: wide}), rf"tensor {name} is \(32, 33\), not \(256,\)")
    refused(lambda s: s.update(bias=wide), r"has a tensor bias \(32, 33\), which this model has")
    refused(lambda s: s.update({"transformer.wte.weight": wide[0]}), "lacks the matrix")
    refused(lambda s: s.pop("transformer.h.0.query.weight"), "lacks the matrix")


@pytest.mark.slow
def test_command_on_the_authors_layout(tmp_path, words):
    golden_checkpoint("ngpt", tmp_path / "ckpt.pt")
    run, again = tmp_path / "run", tmp_path / "again.pt"
    out = convert(
        f"--from_reference={tmp_path / 'ckpt.pt'}",
        f"--out={run}",
        f"--config.{words[0]}={words[1]}",
    )
    assert (out.returncode, out.stderr) == (0, "")
    assert "position operator is not RoPE" in out.stdout and out.stdout.count("\n") == 2
    assert json.loads((run / "config.json").read_text())["model"]["heads"] == 4
    out = convert(f"--workdir={run}", f"--to_reference={again}")
    assert (out.returncode, out.stderr) == (0, "")
    first, second = (torch.load(p, weights_only=True) for p in (tmp_path / "ckpt.pt", again))
    assert {f"_orig_mod.{n}" for n in second["model"]} == set(first["model"])
    for n, w in second["model"].items():
        assert torch.equal(w, first["model"][f"_orig_mod.{n}"]), n
