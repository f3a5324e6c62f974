"""Tokenizers: ids and text of each kind, what a text cannot spell, and files that are wrong."""

import base64
import gzip
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf
from data_helpers import ROOT, SHARED, raises
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpt_jax.config import DataConfig
from ngpt_jax.data.tokenizers.base import fingerprint_of, gives_back, lost_characters
from ngpt_jax.data.tokenizers.load import load_tokenizer
from ngpt_jax.data.tokenizers.tiktoken_files import TIKTOKEN_FORMATS, TiktokenFormat
from ngpt_jax.export.hf_tokenizer import _plain

LLAMA = SHARED / "tokenizers" / "llama2-32k.json"
GPT2 = SHARED / "tokenizers" / "gpt2"
PROSE = SHARED / "corpus" / "prose.val.jsonl.gz"
KINDS = ["byte", "json", "model", "tiktoken", "gpt2"]
EOT = "<|endoftext|>"
MERGES = [("a", "b"), ("ab", "c"), ("<", "|")]

property_test = settings(max_examples=60, deadline=None, derandomize=True)
# Without surrogates, as the default of hypothesis is for UTF-8; "\u2581" is SentencePiece's space.
texts = st.text(
    st.sampled_from(f" \n\tabc\x00é\u2028🎉{EOT}</s>") | st.characters(exclude_characters="\u2581"),
    max_size=40,
)


def needs(path):
    return pytest.mark.skipif(
        not path.exists(), reason=f"needs {path}, which is not part of the project"
    )


def load(path, end_of_document=None):
    return load_tokenizer(DataConfig(tokenizer=str(path), end_of_document=end_of_document))


def byte_level(*added, merges=(), file):
    """A tokenizers JSON file: byte-level BPE with the given added tokens."""
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, *("".join(m) for m in merges)])}
    tokenizer = hf.Tokenizer(hf.models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    tokenizer.add_tokens(list(added))
    tokenizer.enable_truncation(3)  # of no use here: must not have an effect
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(file))
    return file


def write_model(file, text="abc abc  the cat\n", **options):
    """A SentencePiece model of few pieces; like LLaMA's save for its size."""
    model = io.BytesIO()
    options = {"user_defined_symbols": ["<user>"], "control_symbols": ["<end>"]} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 3),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        minloglevel=2,
        **{"model_type": "bpe"} | options,
    )
    file.write_bytes(model.getvalue())
    return file


def ranks_file(ranks):
    return b"".join(base64.b64encode(t) + f" {i}\n".encode() for t, i in ranks.items())


def tiny_ranks():
    tokens = [*(bytes([255 - i]) for i in range(256)), b"ab", b"abc", b" a", b"<|"]
    return {token: i for i, token in enumerate(tokens)}


def write_gpt2(folder, merges=MERGES, special=(EOT,)):
    folder.mkdir(exist_ok=True)
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (ord(c) > 255, c))
    tokens = [*alphabet, *("".join(pair) for pair in merges), *special]
    encoder = {token: i for i, token in enumerate(tokens)}
    (folder / "encoder.json").write_text(json.dumps(encoder))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "vocab.bpe").write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def paths(tmp_path_factory):
    """{kind: path} of a tiny tokenizer of each kind; ids 0 and 262 of the .tiktoken are gaps."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "tiny.tiktoken").write_bytes(ranks_file(tiny_ranks()))
    added = ("<user>", hf.AddedToken(EOT, special=True), "<eos>")
    special = {EOT: 261, "<|fim_prefix|>": 263}
    pattern = TIKTOKEN_FORMATS["cl100k_base"].pattern
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TIKTOKEN_FORMATS, "tiny", TiktokenFormat(pattern, special, 260))
        yield {
            "byte": "byte",
            "json": str(byte_level(*added, merges=MERGES[:2], file=folder / "tiny.json")),
            "model": str(write_model(folder / "tiny.model")),
            "tiktoken": str(folder / "tiny.tiktoken"),
            "gpt2": str(write_gpt2(folder / "gpt2")),
        }


@pytest.fixture(scope="session", params=KINDS)
def any_tokenizer(request, paths):
    return load(paths[request.param])


# ------------------------------------------------------------------------------------- each kind


@property_test
@given(st.lists(texts, max_size=4))
def test_round_trip(any_tokenizer, documents):
    t = any_tokenizer
    batch = t.encode_batch(documents)
    assert len(batch) == len(documents)
    for text, ids in zip(documents, batch):
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert ids.tolist() == t.encode(text)
        assert t.decode(ids) == text
        assert all(0 <= i < t.vocab_size and i != t.eod for i in ids)
    joined = np.concatenate([np.append(ids, t.eod) for ids in batch] or [[]])
    assert t.decode(joined) == "".join(documents)


def test_what_a_lossless_tokenizer_stands_for(any_tokenizer):
    """Its caches of earlier versions stay valid."""
    assert gives_back(any_tokenizer)
    text = "abc  é🎉\n" * 50
    assert lost_characters(any_tokenizer, [text]) in ((0, 50 * 5), (0, 0))
    ids = any_tokenizer.encode(text)
    assert any_tokenizer.text_bytes(text, ids) == len(text.encode())


@pytest.mark.parametrize("kind", ["ByteLevel", "Metaspace"])
def test_a_file_without_a_decoder_gets_that_of_its_characters(tmp_path, paths, kind):
    values = json.loads((ROOT / paths["json"]).read_text()) | {"decoder": None}
    if kind == "Metaspace":
        values["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True,
        }  # fmt: skip
        values["model"]["vocab"] |= {"\u2581": max(values["model"]["vocab"].values()) + 99}
    (tmp_path / "t.json").write_text(json.dumps(values))
    tokenizer = load(tmp_path / "t.json")
    text = "abc ab a" if kind == "Metaspace" else "abc é \t a"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@property_test
@given(st.lists(st.integers(-2, 310)))
def test_any_ids_decode(any_tokenizer, ids):
    """Also bytes that are no character, ids out of range, and those that stand for nothing."""
    assert isinstance(any_tokenizer.decode(ids), str)
    assert isinstance(any_tokenizer.decode(np.array(ids, np.int64)), str)


def test_half_a_surrogate_pair(any_tokenizer):
    t = any_tokenizer
    assert t.decode(t.encode("a\ud83d\ud83db")) == "a??b"
    assert [t.decode(ids) for ids in t.encode_batch(["\udc80", "a"])] == ["?", "a"]


def test_special_tokens_in_text(any_tokenizer):
    t = any_tokenizer
    for token in (EOT, "</s>", "<s>", "<unk>", "<end>", "<|fim_prefix|>", "<0x41>"):
        text = f"a{token}b {token}"
        for ids in (t.encode(text), *t.encode_batch([text, token])[:1]):
            assert t.eod not in ids
            assert len(ids) > 8
            assert t.decode(ids) == text


def test_documents_are_decoded_one_by_one(any_tokenizer):
    t = any_tokenizer
    ids = [i for text in ("one", " two", "three") for i in [*t.encode(text), t.eod]]
    assert t.decode(ids) == "one twothree"
    # Halves of a character do not meet across the end of a document.
    cut = t.encode("é")[-2:]
    if len(cut) == 2 and t.decode(cut) == "é":
        assert t.decode([cut[0], t.eod, cut[1]]) == "\ufffd\ufffd"


def test_pickled(any_tokenizer):
    again = pickle.loads(pickle.dumps(any_tokenizer))
    text = f"abc  {EOT}</s>\n"
    assert again.encode(text) == any_tokenizer.encode(text)
    assert again.decode(again.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_long_text_without_spaces(paths, kind):
    t = load(paths[kind])
    start = time.process_time()
    for text in ("a" * 10**6, "é" * 10**5, "ab" * 10**5):
        assert t.decode(t.encode(text)) == text
    assert time.process_time() - start < 30  # seconds here; hours if it were quadratic


@pytest.mark.parametrize("kind", KINDS[1:])
def test_fingerprint(paths, kind, tmp_path):
    file = os.path.basename(paths[kind])
    shutil.copytree(os.path.dirname(paths[kind]), tmp_path / "copy")
    first, copy = load(paths[kind]), load(tmp_path / "copy" / file)
    assert copy.fingerprint == first.fingerprint
    assert len(first.fingerprint) == 64 and int(first.fingerprint, 16)
    others = [load(paths[other]).fingerprint for other in KINDS]
    assert len(set(others)) == len(KINDS)
    other_end = {"json": "<eos>", "model": "<end>", "tiktoken": "<|fim_prefix|>"}
    if kind in other_end:
        assert load(paths[kind], other_end[kind]).fingerprint != first.fingerprint


def test_fingerprint_of_a_changed_file(tmp_path):
    a = load(byte_level(EOT, file=tmp_path / "x.json")).fingerprint
    assert load(byte_level(EOT, merges=[("a", "b")], file=tmp_path / "x.json")).fingerprint != a
    a = load(write_model(tmp_path / "x.model")).fingerprint
    assert load(write_model(tmp_path / "x.model", "other text")).fingerprint != a
    # Byte-identical special tokens and vocabulary sizes, other merges.
    a = load(write_gpt2(tmp_path / "x", [("a", "b")])).fingerprint
    assert load(write_gpt2(tmp_path / "x", [("a", "c")])).fingerprint != a


def test_byte_tokenizer():
    t = load("byte")
    assert (t.name, t.vocab_size, t.eod) == ("byte", 257, 256)
    assert t.fingerprint.startswith("78f471ee")  # the same in each version
    assert t.encode("aé") == [97, 195, 169]
    assert t.decode([97, 256, 195, 169, 300, -1]) == "aé"
    assert t.decode(np.array([97, 0xFF, 98], np.uint16)) == "a\ufffdb"


def test_json_tokenizer(paths):
    t = load(paths["json"])
    assert (t.name, t.vocab_size, t.eod) == ("tiny", 261, 259)
    assert len(t.encode("abc")) == 1
    assert len(t.encode("abc abc\n" * 100)) == 400  # file's truncation and padding are off
    assert load(paths["json"], "\u0120").eod == t.encode(" ")[0]
    plain = load(paths["json"], "<eos>")  # not marked as special in the file
    assert plain.eod == 260
    assert plain.eod not in plain.encode("a<eos>b")
    assert plain.decode(plain.encode("a<eos>b")) == "a<eos>b"


@pytest.mark.parametrize("dropout", [0.1, 1.0])
def test_dropout_of_a_file_is_off(paths, tmp_path, dropout):
    values = json.loads((ROOT / paths["json"]).read_text())
    values["model"]["dropout"] = dropout
    (tmp_path / "dropout.json").write_text(json.dumps(values))
    plain, tokenizer = load(paths["json"]), load(tmp_path / "dropout.json")
    text = "abcabc ab abab " * 20
    for one in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        assert one.encode(text) == plain.encode(text)
        (batch,) = one.encode_batch([text])
        assert batch.tolist() == plain.encode(text)
    assert json.loads(_plain(tokenizer.tokenizer).to_str())["model"]["dropout"] is None
    # Tokens that an earlier version made with dropout are not taken for those of this tokenizer.
    content, eod = (tmp_path / "dropout.json").read_bytes(), tokenizer.eod
    assert tokenizer.fingerprint != fingerprint_of("json", eod, content)
    content = (ROOT / paths["json"]).read_bytes()
    assert plain.fingerprint == fingerprint_of("json", plain.eod, content)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_tokenizer(tmp_path, model_type):
    file = write_model(tmp_path / "tiny.model", model_type=model_type)
    t = load(file)
    library = sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert (t.name, t.vocab_size, t.eod) == ("tiny", len(library), library.eos_id())
    for text in ("abc the cat", "  é🎉\n", "x<user>y", ""):
        assert t.encode(text) == library.encode(text)
        assert t.decode(t.encode(text)) == text
    # A text may spell a user-defined symbol, and gets its id; it can never be eod.
    assert library.piece_to_id("<user>") in t.encode("x<user>y")
    assert load(file, "<end>").eod == library.piece_to_id("<end>")
    assert t.decode([library.piece_to_id("<0xC3>")]) == "\ufffd"
    shutil.copy(file, tmp_path / "tokenizer.model.v1")
    assert load(tmp_path / "tokenizer.model.v1").fingerprint == t.fingerprint


def test_eos_of_sentencepiece(tmp_path):
    t = load(write_model(tmp_path / "c.model", eos_piece="<stop>", control_symbols=["</s>"]))
    assert t.processor.id_to_piece(t.eod) == "<stop>"
    file = write_model(tmp_path / "a.model", eos_id=-1, control_symbols=[EOT])
    t = load(file)
    assert t.processor.id_to_piece(t.eod) == EOT
    assert t.eod not in t.encode(EOT)
    with raises("data.end_of_document: '.*b.model' has no control symbol '</s>' or '<.endoft"):
        load(write_model(tmp_path / "b.model", eos_id=-1))


def test_tiktoken_tokenizer(paths):
    t, ranks = load(paths["tiktoken"]), tiny_ranks()
    assert (t.name, t.vocab_size, t.eod) == ("tiny", 264, 261)
    assert load(paths["tiktoken"], "<|fim_prefix|>").eod == 263
    assert t.encode("abc") == [ranks[b"abc"]]
    assert t.encode("b ab") == [ranks[b"b"], ranks[b" "], ranks[b"ab"]]  # by rank
    assert t.decode([260, *t.encode("x"), 262, 261, 264, -1]) == "x"
    assert t.decode([263]) == "<|fim_prefix|>"
    assert t.decode([ranks[b"\xc3"]]) == "\ufffd"


def test_table_of_tiktoken_formats():
    """Against tiktoken's own, whose functions are made not to download."""
    from tiktoken_ext import openai_public

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: {})
        patch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **kwargs: {})
        theirs = {name: getattr(openai_public, name)() for name in TIKTOKEN_FORMATS
                  if name != "tiny"}  # fmt: skip
    for name, their in theirs.items():
        ours = TIKTOKEN_FORMATS[name]
        assert ours.pattern == their["pat_str"]
        assert ours.special_tokens == their["special_tokens"]
        if "explicit_n_vocab" in their:
            assert ours.ranks + len(ours.special_tokens) == their["explicit_n_vocab"]


def test_gpt2_tokenizer(tmp_path):
    t = load(write_gpt2(tmp_path / "gpt2"))
    assert (t.name, t.vocab_size, t.eod) == ("gpt2", 260, 259)
    assert t.encode("abc") == [257]
    library = hf.ByteLevelBPETokenizer(
        *(str(tmp_path / "gpt2" / name) for name in ("encoder.json", "vocab.bpe"))
    )
    text = "abc ab  é\n\n<| it's \x00\xa0🎉"
    assert t.encode(text) == library.encode(text).ids
    assert load(write_gpt2(tmp_path / "x", special=[EOT, "<|pad|>"]), "<|pad|>").eod == 260


def test_gpt2_files_are_read_anew(tmp_path, monkeypatch):
    """tiktoken keeps copies by path, here or in the temporary folder."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    folder = tmp_path / "gpt2"
    assert load(write_gpt2(folder, [("a", "b")])).encode("abac") == [256, 64, 66]
    assert load(write_gpt2(folder, [("a", "c")])).encode("abac") == [64, 65, 256]
    assert not cache.exists()


@pytest.mark.parametrize("kind", ["tiktoken", "gpt2"])
def test_more_white_space_than_tiktoken_takes(paths, kind):
    t = load(paths[kind])
    text = "é" + " " * (3 * 10**6) + "é"
    with pytest.raises(ValueError, match="[Ss]tack"):
        t.encoding.encode_to_numpy(text)
    (ids,) = t.encode_batch([text])
    assert ids.dtype == np.int32
    assert t.decode(ids) == text


def test_libraries_are_imported_where_they_are_used():
    code = (
        "import sys; from ngpt_jax.data.tokenizers.load import load_tokenizer;"
        "from ngpt_jax.config import DataConfig; load_tokenizer(DataConfig());"
        "assert not {'tiktoken', 'sentencepiece'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# -------------------------------------------------------------------------------------- bad input


def test_paths_that_are_no_tokenizer(tmp_path, paths):
    with raises("data.end_of_document is for a tokenizer's file; data.tokenizer=byte has its own"):
        load("byte", "</s>")
    kinds = ".*JSON.*SentencePiece.*tiktoken.*encoder.json"
    for gone in ("gone.json", "", "a\0b", "x" * 5000):
        with raises("data.tokenizer: there is no file or folder '.*'; give byte or" + kinds):
            load(gone)
    for name in ("vocab.txt", "json", ".json"):
        (tmp_path / name).write_text("{}")
        with raises("data.tokenizer: '.*' has none of the known suffixes; give" + kinds):
            load(tmp_path / name)
    (tmp_path / "vocab.txt").rename(tmp_path / "other.txt")  # as Hugging Face's folders have
    with raises("data.tokenizer: the folder '.*' lacks encoder.json or vocab.bpe; give" + kinds):
        load(tmp_path)
    os.symlink("/proc/self/mem", tmp_path / "x.model")
    with raises("data.tokenizer: cannot read '.*x.model' .Input/output error.; give"):
        load(tmp_path / "x.model")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokenizer.json", "give the file that is read: .*/tokenizer.json"),
        ("tokenizer.model", "give the file that is read: .*/tokenizer.model"),
        ("spiece.model", "give the file that is read: .*/spiece.model"),
        ("qwen.tiktoken", "give the file that is read: .*/qwen.tiktoken"),
        ("vocab.txt", "has no tokenizer.json; write one with transformers"),
        ("tokenizer_config.json", "has no tokenizer.json; write one with transformers"),
    ],
)
def test_a_hugging_face_folder_names_its_file(tmp_path, name, message):
    for one in ("config.json", name, "a.model" if name == "tokenizer.json" else name):
        (tmp_path / one).write_text("{}")
    with raises("data.tokenizer: .*" + message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "token", "message"),
    [
        ("json", "<nope>", "'.*tiny.json' has no token '<nope>'; name the one that ends"),
        ("model", "<nope>", "'.*tiny.model' has no control symbol '<nope>'; name"),
        ("model", "<user>", "'.*tiny.model' has no control symbol '<user>'; name"),
        ("model", "<unk>", "'.*tiny.model' has no control symbol '<unk>'; name"),
        ("model", "<0x0A>", "'.*tiny.model' has no control symbol"),
        ("tiktoken", "</s>", "'.*tiny.tiktoken' has no special token '</s>'; name"),
        ("gpt2", "a\nb", r"'.*gpt2' has no special token 'a\\nb'; name"),
        ("gpt2", "", "'.*gpt2' has no special token ''; name"),
    ],
)
def test_no_such_end_of_document(paths, kind, token, message):
    with raises("data.end_of_document: " + message):
        load(paths[kind], token)


def test_no_end_of_document(tmp_path):
    with raises("data.end_of_document: .*plain.json' has no token '</s>' or '<.endoftext.>' or"):
        load(byte_level(file=tmp_path / "plain.json"))
    with raises("data.end_of_document: .*x' has no special token '</s>' or '<.endoftext.>' or"):
        load(write_gpt2(tmp_path / "x", special=()))


@pytest.mark.parametrize("data", ["", "{}", "not json", "[]", '{"model": {"type": "BPE"}}'])
def test_damaged_json(tmp_path, data):
    (tmp_path / "bad.json").write_text(data)
    with raises("data.tokenizer: '.*bad.json' is not a tokenizers JSON file .*; give another"):
        load(tmp_path / "bad.json")


def test_damaged_model(tmp_path, paths):
    good = (ROOT / paths["model"]).read_bytes()
    file = tmp_path / "bad.model"
    for data in (b"", b"{}", b"garbage" * 99, bytes(10**4), good[:-1], good[: len(good) // 2]):
        file.write_bytes(data)
        with raises("data.tokenizer: '.*bad.model' is not a SentencePiece model, or damaged; give"):
            load(file)


def with_ranks(**changes):
    ranks = {token.hex(): rank for token, rank in tiny_ranks().items()} | changes
    return ranks_file({bytes.fromhex(t): i for t, i in ranks.items() if i is not None})


GOOD_RANKS = ranks_file(tiny_ranks())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 tokens instead of 260"),
        (b"\xff\x00garbage\n", "line 1 is not a token in base64 and a rank"),
        (b"IQ== 0\nI 1\n", "line 2 is not"),
        (b"IQ== 0\n*Ig== 1\n", "line 2 is not"),
        (b"IQ== 0\n\nIg== 1\n", "line 2 is not"),
        (b"IQ== 0.5\n", "line 1 is not"),
        (GOOD_RANKS[:-4], "line 260 is not"),
        (GOOD_RANKS[:-5], "line 260 is not"),
        (GOOD_RANKS[:-9], "259 tokens instead of 260"),
        (GOOD_RANKS + b"YWJi 260\n", "261 tokens instead of 260"),
        (with_ranks(**{"6162": 3}), "two tokens of one rank"),
        (with_ranks(**{"6162": -1}), "or a rank out of range"),
        (with_ranks(**{"6162": 10**30}), "or a rank out of range"),
        (with_ranks(**{"6162": 261}), "or a rank out of range"),
        (with_ranks(**{"61": None, "616161": 158}), "a byte without a token"),
    ],
)
def test_damaged_tiktoken(paths, tmp_path, data, reason):
    file = tmp_path / "tiny.tiktoken"
    file.write_bytes(data)
    with raises(f"data.tokenizer: '.*tiny.tiktoken' is damaged, or not tiny .*{reason}.*; give"):
        load(file)


def test_tiktoken_file_of_another_name(tmp_path):
    for name in ("mine", "cl100k", "R50K_BASE"):
        file = tmp_path / f"{name}.tiktoken"
        file.write_bytes(GOOD_RANKS)
        with raises(f"data.tokenizer: '.*{name}.tiktoken' is not called as.* gpt2 or r50k_base"):
            load(file)
    # A part of a known one, or a web page instead.
    (tmp_path / "r50k_base.tiktoken").write_bytes(GOOD_RANKS)
    with raises("data.tokenizer: .* damaged, or not r50k_base .260 tokens instead of 50256.; give"):
        load(tmp_path / "r50k_base.tiktoken")


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("encoder.json", lambda text: "", "encoder.json is not JSON"),
        ("encoder.json", lambda text: text[:-9], "encoder.json is not JSON"),
        ("encoder.json", lambda text: "[" * 10**6, "encoder.json is not JSON"),
        ("encoder.json", lambda text: "[1]", "encoder.json is not a table"),
        ("encoder.json", lambda text: "{}", "encoder.json is not a table"),
        ("encoder.json", lambda text: text.replace("259", "258"), "encoder.json is not a table"),
        ("encoder.json", lambda text: text.replace("259", "1e99"), "encoder.json is not a table"),
        ("encoder.json", lambda text: text.replace("259", '"x"'), "encoder.json is not a table"),
        ("encoder.json", lambda text: text.replace('"abc"', '"abx"'), "encoder.json has no 'abc'"),
        ("encoder.json", lambda text: text.replace('"a"', '"aa"'), "encoder.json has no 'a'"),
        ("encoder.json", lambda text: text.replace(EOT, "</s>"), "does not arrive at '</s>'"),
        ("vocab.bpe", lambda text: "", "vocab.bpe does not arrive at '<.'"),
        ("vocab.bpe", lambda text: text[:-3], "line 4 of vocab.bpe is not a pair"),
        ("vocab.bpe", lambda text: text[:-4], "does not arrive at '<.'"),
        ("vocab.bpe", lambda text: text.replace("ab c", "ab"), "line 3 of vocab.bpe is not"),
        ("vocab.bpe", lambda text: text.replace("ab c", "a b c"), "line 3 of vocab.bpe is not"),
        ("vocab.bpe", lambda text: text.replace("ab c", "ab x"), "encoder.json has no 'abx'"),
        ("vocab.bpe", lambda text: text + "\udcff \udcff\n", "encoder.json has no '��'"),
        (
            "vocab.bpe",
            lambda text: text.replace("a b\nab c\n", "ab c\na b\n"),
            "not in the order of vocab.bpe",
        ),
    ],
)
def test_damaged_gpt2(tmp_path, name, change, reason):
    file = write_gpt2(tmp_path / "gpt2") / name
    file.write_bytes(change(file.read_text()).encode("utf-8", "surrogateescape"))
    with raises(f"data.tokenizer: encoder.json and vocab.bpe of '.*gpt2' are .*{reason}.*; give"):
        load(tmp_path / "gpt2")
    file.unlink()
    with raises("data.tokenizer: the folder '.*gpt2' lacks encoder.json or vocab.bpe; give"):
        load(tmp_path / "gpt2")


# ------------------------------------------------------------------- files beside the project


@needs(LLAMA)
def test_llama_tokenizer():
    t = load(LLAMA)
    assert t.encode("Hello world") == [15043, 3186]
    assert (t.vocab_size, t.eod) == (32000, 2)
    for text in ("  two\n\n a\t", "naïve café 🎉\x00\u2028", "a</s>b</s>", " ", "", "\n"):
        assert t.decode(t.encode(text)) == text
        assert t.eod not in t.encode(text)


@needs(GPT2)
@needs(PROSE)
def test_gpt2_as_the_tokenizers_library_has_it():
    t = load(GPT2)
    assert (t.name, t.vocab_size, t.eod) == ("gpt2", 50257, 50256)
    library = hf.ByteLevelBPETokenizer(str(GPT2 / "encoder.json"), str(GPT2 / "vocab.bpe"))
    with gzip.open(PROSE, "rt") as lines:
        documents = [json.loads(line)["text"] for line in lines][:20]
    rng = random.Random(0)
    alphabet = "  \n\t\r'sStdlvre09aZé\u3000\xa0\u0301漢🎉!?-_</|>\x00"
    documents += ["".join(rng.choices(alphabet, k=50)) for _ in range(500)]
    for text, ids in zip(documents, t.encode_batch(documents)):
        assert ids.tolist() == library.encode(text).ids
        assert t.decode(ids) == text
