"""Tokenizes text into shards of token ids, with a manifest.

Examples:
  python -m ngpt_jax.data.prepare --source=text --paths='web/*.jsonl.zst' --tokenizer=llama2.json \\
      --out=web_llama2
  python -m ngpt_jax.data.prepare --source=tfds --tfds_name=lm1b --tokenizer=gpt2/ --out=lm1b_gpt2
  python -m ngpt_jax.data.prepare --verify --out=web_llama2
  python -m ngpt_jax.data.prepare --config=experiments/124m.py

The last line fetches and prepares what an experiment trains on into its data.cache, as its first
start would: on a machine that has a network, say, for machines that have none. Otherwise training
reads the folder with --config.data.source=bin --config.data.paths=web_llama2 and the
same tokenizer. The same command continues a preparation that was stopped. The same text and
tokenizer give the same bytes, whatever the number of workers.
"""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

from absl import flags

from ngpt_jax import signals
from ngpt_jax.config import ConfigError, DataConfig, command
from ngpt_jax.config.experiment import load_config
from ngpt_jax.config.sources import TOKEN_FORMATS
from ngpt_jax.data import source_flags
from ngpt_jax.errors import drop_unwritten

if TYPE_CHECKING:  # imported where they are used, so that --help is quick
    from etils import epath

    from ngpt_jax.data.manifest import Manifest
    from ngpt_jax.terminal import Terminal

_OUT = flags.DEFINE_string("out", None, "Folder of the shards, local or gs://.")
_TOKENIZER = flags.DEFINE_string("tokenizer", "byte", "As --config.data.tokenizer of training.")
_END = flags.DEFINE_string("end_of_document", None, "As --config.data.end_of_document.")
_FORMAT = flags.DEFINE_enum("format", "bin", TOKEN_FORMATS, "Of the shards.")
_SHARD_TOKENS = flags.DEFINE_integer(
    "shard_tokens", None, "Tokens of a training shard; default: 100 million.", lower_bound=1
)
_WORKERS = flags.DEFINE_integer("workers", None, "Processes; default: one a core.", lower_bound=1)
_CONFIG = flags.DEFINE_string(
    "config", None, "FILE[:variant,...], or a name: prepare its data, in place of --out."
)
_VERIFY = flags.DEFINE_bool("verify", False, "Compare all shards of --out with its manifest.")


def _command(overrides: list[tuple[str, str]]) -> int:
    if _CONFIG.value is not None:
        return _prepare_experiment(_CONFIG.value, overrides)
    command.refuse_overrides(overrides)
    if not _OUT.value:
        raise ConfigError("--out is missing: the folder of the shards (see --help).")
    from ngpt_jax.data.list_files import parse_path
    from ngpt_jax.data.manifest import notes as manifest_notes
    from ngpt_jax.terminal import Terminal

    out, terminal = parse_path(_OUT.value, "--out"), Terminal()
    try:
        manifest = _verify(out, terminal) if _VERIFY.value else _prepare(out, terminal)
    except KeyboardInterrupt:
        return _stopped(terminal)
    finally:
        terminal.close()
    for line in manifest_notes(manifest):
        terminal.say(line)
    for name, facts in manifest.sets.items():
        terminal.say(
            f"{name}: {facts.tokens:,} tokens of {facts.documents:,} documents"
            f" ({facts.bytes:,} bytes of text) in {len(facts.shards)} shards"
        )
    if not _VERIFY.value:
        terminal.say(f"train on it: {_training_command(manifest)}")
    drop_unwritten()
    return 0


def _prepare_experiment(spec: str, overrides: list[tuple[str, str]]) -> int:
    modules = flags.FLAGS.flags_by_module_dict()
    own = modules[source_flags.__name__] + modules[sys.argv[0]]
    for flag in own:
        if flag.present and flag.name not in ("config", "workers"):
            raise ConfigError(f"--{flag.name}: with --config, give --config.data.… instead.")
    from ngpt_jax.data.corpus import load_corpus
    from ngpt_jax.data.tokenizers.load import with_tokenizer
    from ngpt_jax.terminal import Terminal

    terminal = Terminal()
    _stop_by_interrupt()
    config, tokenizer = with_tokenizer(load_config(spec, overrides))
    try:
        corpus = load_corpus(
            config.data, tokenizer, config.model.context, terminal, workers=_WORKERS.value
        )
    except KeyboardInterrupt:
        return _stopped(terminal)
    finally:
        terminal.close()
    terminal.say(f"{corpus.tokens:,} tokens to train on -> {config.data.cache}")
    drop_unwritten()
    return 0


def _stop_by_interrupt() -> None:
    signals.Listener(signal.default_int_handler, "received: stopping; what is done is kept")


def _stopped(terminal: Terminal) -> int:
    terminal.say("stopped; run the same command again to continue")
    return 130


def _training_command(manifest: Manifest) -> str:
    flags = {"source": manifest.format, "paths": _OUT.value, "tokenizer": _TOKENIZER.value}
    if _END.value is not None:
        flags["end_of_document"] = _END.value
    more = [f"--config.data.{name}={value}" for name, value in flags.items()]
    return source_flags.training_command(_OUT.value or "", more)


def _verify(out: epath.Path, terminal: Terminal) -> Manifest:
    from ngpt_jax.data import manifest as manifest_lib
    from ngpt_jax.data.preparing.progress import Progress

    if not (out / manifest_lib.NAME).exists():
        raise ConfigError(f"--out={out}: there is no {manifest_lib.NAME} in it.")
    manifest = manifest_lib.read_manifest(out, "--out")
    with Progress("verifying shards", terminal) as progress:
        manifest_lib.verify(manifest, out, "--out", progress.doing)
    terminal.close()
    terminal.say(f"{out}: all shards are as the manifest says")
    return manifest


def _prepare(out: epath.Path, terminal: Terminal) -> Manifest:
    from ngpt_jax.data.preparing.folder import SHARD_TOKENS, prepare_folder
    from ngpt_jax.data.text.sources import open_source
    from ngpt_jax.data.tokenizers.load import load_tokenizer

    _stop_by_interrupt()
    source = source_flags.text_source()
    named = DataConfig(tokenizer=_TOKENIZER.value, end_of_document=_END.value)
    tokenizer = load_tokenizer(named, "--")
    text = open_source(source, "--")
    for line in text.left_out:
        terminal.say(line)
    return prepare_folder(
        text, source.held_out, tokenizer, out,
        format=_FORMAT.value, shard_tokens=_SHARD_TOKENS.value or SHARD_TOKENS,
        workers=_WORKERS.value, terminal=terminal,
    )  # fmt: skip


if __name__ == "__main__":
    command.run_command(_command)
