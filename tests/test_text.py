"""Text from tokens as they come: what decoding everything again gives, in linear time."""

import numpy as np
import pytest
import tokenizers as hf
from test_tokenizers import paths  # noqa: F401

from ngpt_jax.config import DataConfig
from ngpt_jax.data.tokenizers.base import ByteTokenizer
from ngpt_jax.data.tokenizers.json_file import JsonTokenizer
from ngpt_jax.data.tokenizers.load import load_tokenizer
from ngpt_jax.inference.text import Generation, Streamed, TextStream

KINDS = ["byte", "json", "model", "tiktoken", "gpt2", "byte_fallback", "pieces"]


def made(vocab, decoder):
    tokenizer = hf.Tokenizer(hf.models.BPE({name: i for i, name in enumerate(vocab)}, []))
    tokenizer.decoder = decoder
    return JsonTokenizer("made", len(vocab), 0, "", tokenizer, None)


@pytest.fixture(params=KINDS)
def tokenizer(request, paths):  # noqa: F811
    if request.param == "byte_fallback":  # as Llama 2's
        vocab = [
            "</s>",
            *(f"<0x{b:02X}>" for b in range(256)),
            *"abc",
            "\u2581",
            "\u2581a",
            "\u2581\u2581b",
        ]
        steps = [
            hf.decoders.Replace("\u2581", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse(),
            hf.decoders.Strip(" ", 1, 0),
        ]  # fmt: skip
        return made(vocab, hf.decoders.Sequence(steps))
    if request.param == "pieces":
        return made(["</s>", "a", "##b", "c", ".", "##d"], hf.decoders.WordPiece())
    return load_tokenizer(DataConfig(tokenizer=paths[request.param]))


def by_decoding_all(tokenizer, prompt, ids, stops):
    """Text and number of tokens, all decoded again for every token."""
    before = tokenizer.decode(prompt)
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(prompt + ids[:n])[len(before) :]
        if places := [text.find(stop) for stop in stops if stop in text]:
            return text[: min(places)], n, "stop"
    return text, n, "tokens"


def streamed(tokenizer, prompt, ids, stops, chunk):
    text = TextStream(tokenizer, prompt, stops)
    text.limit(len(ids), 10**9)

    def draws():
        for i in range(0, len(ids), chunk):
            text.add(ids[i : i + chunk], [0.0] * chunk)
            yield
            if text.stop_reason:
                return

    stream = Streamed(text, draws())
    told = "".join(stream)
    return told, stream.result


def texts(tokenizer, rng):
    """Ids of text with characters of one to four bytes and runs of white space, and any ids."""
    words = ["a", "b", " ", "  ", "\n", "é", "漢字", "😀", "ab", ".", "x", " END"]
    whole = tokenizer.encode_batch(["".join(rng.choice(words, 40))])[0].tolist()
    anything = rng.integers(0, tokenizer.vocab_size + 2, 60)
    return [whole or [1], [int(i) for i in anything if i != tokenizer.eod]]


@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_text_is_that_of_decoding_all(tokenizer, chunk):
    rng = np.random.default_rng(0)
    for _ in range(30):
        whole, anything = texts(tokenizer, rng)
        cut = int(rng.integers(0, 4))
        for prompt, ids in (([], whole), (whole, anything)):
            is_text = ids is whole
            prompt, ids = [tokenizer.eod, *prompt, *ids[:cut]], ids[cut:] or [1]
            before, all_of_it = tokenizer.decode(prompt), tokenizer.decode(prompt + ids)
            if not all_of_it.startswith(before):
                continue  # the prompt ends within a character
            places = rng.integers(0, max(len(all_of_it), 1), 2)
            inside = tuple(s for p in places if (s := all_of_it[p : p + 3].strip("\ufffd")))
            for stops in ((), inside, ("never there",)):
                text, n, why = by_decoding_all(tokenizer, prompt, ids, stops)
                told, result = streamed(tokenizer, prompt, ids, stops, chunk)
                assert result == Generation(text, ids[:n], [0.0] * n, why)
                if is_text:  # later bytes may change what was told of bytes that are no text
                    assert told == text


def test_a_stop_string_in_text_of_split_characters():
    t = ByteTokenizer()
    ids = list("ab 漢字 é😀 END cd".encode())
    for stop, text in (("漢字", "ab "), ("字 é", "ab 漢"), ("😀 E", "ab 漢字 é"), ("d", None)):
        for chunk in (1, 3, 32):
            told, result = streamed(t, [t.eod], ids, (stop,), chunk)
            assert told == result.text == (text or "ab 漢字 é😀 END c")
            assert t.decode(result.ids).endswith(stop)


@pytest.mark.parametrize("end", ["b", "", "ab"])
def test_a_long_stop_string_that_nearly_comes(end):
    t, stop = ByteTokenizer(), "a" * 300 + "b"
    ids = list(("a" * 500 + end + "c" * 20).encode())
    for chunk in (1, 4, 32):
        told, result = streamed(t, [t.eod], ids, (stop, "a" * 900), chunk)
        met = result.stop_reason == "stop"
        assert met == bool(end)
        assert told == result.text == ("a" * (199 + len(end)) if met else "a" * 500 + "c" * 20)
        assert len(result.ids) == (500 + len(end) if met else 520)


@pytest.mark.parametrize("what", ["text", "white space", "half characters", "no text"])
def test_time_is_linear(tokenizer, what, monkeypatch):
    """Counts the ids that are decoded: a small multiple of those drawn."""
    decoded, decode = [0], type(tokenizer).decode

    def counted(self, ids):
        ids = list(ids)
        decoded[0] += len(ids)
        return decode(self, ids)

    monkeypatch.setattr(type(tokenizer), "decode", counted)
    count = {}
    for size in (1000, 4000):
        if what == "text":
            ids = (tokenizer.encode("a b 漢 é. x\n") or [1]) * size
        elif what == "white space":
            ids = (tokenizer.encode("   \n") or [1]) * size
        elif what == "half characters":
            ids = [i for i in tokenizer.encode("漢")[:1] or [1] for _ in range(size)]
        else:
            ids = [tokenizer.vocab_size + 1] * size
        decoded[0] = 0
        told, result = streamed(tokenizer, [tokenizer.eod], ids[:size], ("never there",), 4)
        assert result.ids == ids[:size] and len(told) == len(result.text)
        count[size] = decoded[0]
    assert count[4000] < 4.4 * count[1000]
    assert count[4000] < (20 if what == "text" else 240) * 4000
