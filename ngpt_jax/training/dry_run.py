"""What a run would be: parameter table, counts and memory, from shapes alone."""

from ngpt_jax.config import Config, ConfigError
from ngpt_jax.data.corpus import check_corpus
from ngpt_jax.data.tokenizers.load import with_tokenizer
from ngpt_jax.model.params import axis_sizes, num_params
from ngpt_jax.optim.recipes import make_optimizer
from ngpt_jax.parallel.mesh import check_eval_batch, make_mesh
from ngpt_jax.parallel.rules import axis_size
from ngpt_jax.terminal import format_bytes
from ngpt_jax.training import layout
from ngpt_jax.training.throughput import train_flops_per_token


def report(config: Config) -> tuple[str, ConfigError | None]:
    """Checks a run before it starts, and describes it.

    Returns:
      The text; and what is wrong with text or tokenizer, where the model is known without them.

    Raises:
      ConfigError: anything else is wrong.
    """
    problem, name = None, config.data.tokenizer
    try:
        config, tokenizer = with_tokenizer(config)
        name = tokenizer.name
        check_corpus(config.data, tokenizer)
    except ConfigError as e:
        if config.model.vocab_size is None:
            raise
        problem = e
    mesh = make_mesh(config)
    check_eval_batch(config.eval.batch_size, mesh)
    config, kernel = layout.for_mesh(config, mesh)
    tx, _ = make_optimizer(config)
    state = layout.abstract_state(config, tx, mesh)
    model, train = config.model, config.train
    assert train.steps is not None
    tokens = train.batch_size * model.context
    vocab = axis_sizes(model)["vocab"]
    sequences, length = layout.abstract_batch(config, mesh)["inputs"].sharding.shard_shape(
        (train.batch_size // train.accumulate, model.context)
    )
    tensor = axis_size(mesh, "tensor")
    logits = 4 * min(model.loss_chunk, sequences * length) * vocab // tensor
    scores = 4 * sequences * length * model.context * model.heads // tensor
    params = format_bytes(layout.bytes_per_device(state.params))
    in_memory = f", attention scores of a block {format_bytes(scores)} (several at a time)"
    facts = [
        ("parameters", f"{num_params(model):,} ({model.kind}; padding left out)"),
        ("vocabulary", f"{model.vocab_size:,} of {name}, padded to {vocab:,}"),
        ("run", f"{train.steps:,} steps of {tokens:,} tokens: {train.steps * tokens:,} tokens"),
        ("compute", f"{train_flops_per_token(model):.3g} FLOPs per token,"
         f" {train_flops_per_token(model) * train.steps * tokens:.3g} in all"),
        ("devices", layout.describe_mesh(mesh)),
        ("attention", kernel.removeprefix("attention kernel: ")),
        ("memory per device", f"parameters {params},"
         f" Adam {format_bytes(layout.bytes_per_device(state.opt_state))}, gradients {params},"
         f" logits of a chunk {format_bytes(logits)}"
         f"{in_memory if model.attention == 'xla' else ''}; other activations come on top"),
    ]  # fmt: skip
    width = max(len(name) for name, _ in facts)
    lines = [f"{name:{width}}  {fact}" for name, fact in facts]
    return "\n".join([layout.parameter_table(model, mesh), "", *lines]), problem
