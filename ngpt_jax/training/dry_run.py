"""What a run would be: parameter table, counts and memory, from shapes alone."""

import os
from collections.abc import Sequence
from pathlib import Path

import jax

from ngpt_jax.config import Config, ConfigError
from ngpt_jax.data.corpus import check_corpus, sources
from ngpt_jax.data.text.sources import open_source
from ngpt_jax.data.text.units import Unit
from ngpt_jax.data.token_files import holds_tokens, open_tokens
from ngpt_jax.data.tokenizers.base import Tokenizer
from ngpt_jax.data.tokenizers.load import with_tokenizer
from ngpt_jax.model.params import axis_sizes, num_params
from ngpt_jax.optim.recipes import make_optimizer
from ngpt_jax.parallel.mesh import check_eval_batch, make_mesh
from ngpt_jax.parallel.rules import axis_size
from ngpt_jax.terminal import format_bytes
from ngpt_jax.training import layout
from ngpt_jax.training.setup import epochs_of, size_warnings
from ngpt_jax.training.throughput import GIB, chip_of, train_flops_per_token

_ENOUGH = 100_000  # characters, from which the number of tokens is estimated


def _size_of_text(config: Config, tokenizer: Tokenizer) -> tuple[int, str]:
    """Tokens to train on, 0 where they are not known, and a line that tells them."""
    tokens, exact = 0, True
    for _, prefix, source in sources(config.data):
        if holds_tokens(source, prefix):
            cache = Path(config.data.cache).expanduser()
            tokens += len(open_tokens(source, prefix, tokenizer, cache).train)
        else:
            exact = False
            text = open_source(source, prefix, download=False, cache=config.data.cache)
            tokens += _estimate(text.train, tokenizer)
    if not tokens:
        return 0, "its size is not known before it is prepared"
    epochs = epochs_of(config, tokens)
    times = f"each read {epochs:{',.0f' if epochs >= 100 else '.3g'}} times"
    return tokens, f"{'' if exact else 'about '}{tokens:,} tokens, {times}"


def _estimate(units: Sequence[Unit], tokenizer: Tokenizer) -> int:
    """Tokens of text that is not prepared, from the first documents of its first file."""
    tokens, characters, read = 0.0, 0, 0
    for text, read in units[0].read() if units else ():  # noqa: B007
        part = text[:_ENOUGH]  # of a long document its beginning stands for all of it
        tokens += len(tokenizer.encode(part)) * len(text) / max(len(part), 1) + 1
        characters += len(text)
        if characters > _ENOUGH:
            break
    return round(sum(unit.size for unit in units) * tokens / read) if read else 0


def _fits(least: int, device: jax.Device) -> str:
    """At least how much of a device's memory is used."""
    chip, limit = chip_of(device), (device.memory_stats() or {}).get("bytes_limit")
    if chip is not None:
        limit = limit or int(chip.memory * GIB)
    elif device.platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = memory // jax.local_device_count()
    used = f"at least {format_bytes(least)} per device"
    if limit is None:
        return f"{used}; the memory of {device.device_kind} is not known"
    left = limit - least
    end = "does not fit" if left < 0 else f"fits, with {format_bytes(left)} left for activations"
    return f"{used} of {format_bytes(limit)}: {end}"


def report(config: Config) -> tuple[str, ConfigError | None]:
    """Checks a run before it starts, and describes it.

    Returns:
      The text; and what is wrong with text or tokenizer, where the model is known without them.

    Raises:
      ConfigError: anything else is wrong.
    """
    problem, name = None, config.data.tokenizer
    tokenizer, available, text = None, 0, "not known"
    try:
        config, tokenizer = with_tokenizer(config)
        name = tokenizer.name
        check_corpus(config.data, tokenizer)
        available, text = _size_of_text(config, tokenizer)
    except ConfigError as e:
        if config.model.vocab_size is None:
            raise
        problem = e
    mesh = make_mesh(config)
    check_eval_batch(config.eval.batch_size, mesh)
    config, told = layout.for_mesh(config, mesh)
    tx, _ = make_optimizer(config)
    state = layout.abstract_state(config, tx, mesh)
    model, train = config.model, config.train
    assert train.steps is not None and model.loss_chunk is not None
    tokens = train.batch_size * model.context
    vocab = axis_sizes(model)["vocab"]
    sequences, length = layout.abstract_batch(config, mesh)["inputs"].sharding.shard_shape(
        (train.batch_size // train.accumulate, model.context)
    )
    tensor = axis_size(mesh, "tensor")
    logits = 4 * min(model.loss_chunk, sequences * length) * vocab // tensor
    scores = 4 * sequences * length * model.context * model.heads // tensor
    sizes = layout.bytes_per_device(state.params), layout.bytes_per_device(state.opt_state)
    params, least, in_memory = format_bytes(sizes[0]), 2 * sizes[0] + sizes[1] + logits, ""
    if model.attention == "xla":
        in_memory = f", attention scores of a block {format_bytes(scores)} (several at a time)"
        least += scores
    facts = [
        ("parameters", f"{num_params(model):,} ({model.kind}; padding left out)"),
        ("vocabulary", f"{model.vocab_size:,} of {name}, padded to {vocab:,}"),
        ("run", f"{train.steps:,} steps of {tokens:,} tokens: {train.steps * tokens:,} tokens"),
        ("text", text),
        ("compute", f"{train_flops_per_token(model):.3g} FLOPs per token,"
         f" {train_flops_per_token(model) * train.steps * tokens:.3g} in all"),
        ("devices", layout.describe_mesh(mesh)),
        *((f"model.{name}", what) for name, what in told.items()),
        ("memory per device", f"parameters {params},"
         f" optimizer {format_bytes(sizes[1])}, gradients {params},"
         f" logits of a chunk {format_bytes(logits)}"
         f"{in_memory}; other activations come on top"),
        ("in all", _fits(least, mesh.devices.flat[0])),
    ]  # fmt: skip
    width = max(len(name) for name, _ in facts)
    lines = [f"{name:{width}}  {fact}" for name, fact in facts]
    if tokenizer is not None:
        lines += [f"warning: {line}" for line in size_warnings(config, tokenizer, available)]
    return "\n".join([layout.parameter_table(config, mesh), "", *lines]), problem
