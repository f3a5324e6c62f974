"""Trains a tokenizer on text: byte-level BPE like GPT-2's, as a JSON file of ``tokenizers``.

Examples:
  python -m ngpt_jax.data.train_tokenizer --source=text --paths=book.txt --vocab_size=2048 \\
      --out=book.json
  python -m ngpt_jax.data.train_tokenizer --source=text --paths='web/*.jsonl.zst' --out=web.json

Training reads it with --config.data.tokenizer=book.json. Text that is held out is left out here
too. The same text gives the same tokenizer.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from ngpt_jax import signals
from ngpt_jax.config import ConfigError, command
from ngpt_jax.data import source_flags
from ngpt_jax.errors import drop_unwritten

_OUT = flags.DEFINE_string("out", None, "The file to write, NAME.json.")
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", 8192, "Tokens: 256 bytes, the end of a document, and what is learned.", 258
)
_MEGABYTES = flags.DEFINE_integer(
    "megabytes", 1000, "Text to learn from; more of it hardly changes the tokens.", 1
)
_EOD = "<|endoftext|>"


def _command(overrides: list[tuple[str, str]]) -> int:
    command.refuse_overrides(overrides)
    out = _OUT.value or ""
    if not out.endswith(".json"):
        raise ConfigError("--out: name the file to write, such as book.json.")
    if os.path.exists(out):
        raise ConfigError(f"--out={out} is there already; choose another, or delete it.")
    command.check_output(out=out)
    import tokenizers

    from ngpt_jax.data.preparing.progress import Progress
    from ngpt_jax.data.text.held_out import choose_split
    from ngpt_jax.data.text.sources import open_source
    from ngpt_jax.data.text.units import Unit, read_texts
    from ngpt_jax.data.tokenizers.base import utf8
    from ngpt_jax.files import write_atomically, writing
    from ngpt_jax.terminal import Terminal

    signals.Listener(signal.default_int_handler, "received: stopping")
    terminal, source = Terminal(), source_flags.text_source()
    text = open_source(source, "--")
    for line in text.left_out:
        terminal.say(line)
    limit, read, documents = _MEGABYTES.value * 10**6, 0, 0

    def texts(progress: Progress, folder: str) -> Iterator[str]:
        def fetch(unit: Unit) -> None:
            unit.fetch(Path(folder), progress.doing)

        nonlocal read, documents
        split = None
        if not text.held_out:
            progress.doing("choosing what to hold out")
            split = choose_split(lambda: read_texts(text.train, fetch), source.held_out, text.field)
        for document in read_texts(text.train, fetch):
            document = split(document).get("train", "") if split else document
            if not document:
                continue
            read, documents = read + len(utf8(document)), documents + 1
            progress.doing(f"reading text, {read / 1e6:,.0f} MB")
            yield document
            if read >= limit:
                break
        progress.doing("learning tokens")

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE.value,
        special_tokens=[_EOD],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    try:
        with (
            Progress("training the tokenizer", terminal) as progress,
            tempfile.TemporaryDirectory() as folder,
        ):
            tokenizer.train_from_iterator(texts(progress, folder), trainer)
    except KeyboardInterrupt:
        terminal.say("stopped; nothing was written")
        return 130
    finally:
        terminal.close()
    if not documents:
        raise ConfigError(f"{text.field}: there is no text in it; give some.")
    with writing(out):
        write_atomically(out, tokenizer.to_str())
    terminal.say(
        f"{out}: {tokenizer.get_vocab_size():,} tokens, learned from {documents:,} documents"
        f" ({read:,} bytes)"
    )
    if tokenizer.get_vocab_size() < _VOCAB_SIZE.value:
        terminal.say("warning: the text has no more to learn from; give more text for more tokens")
    more = [*source_flags.training_flags(source), f"--config.data.tokenizer={out}"]
    terminal.say(f"train with it: {source_flags.training_command(out, more)}")
    drop_unwritten()
    return 0


if __name__ == "__main__":
    command.run_command(_command)
