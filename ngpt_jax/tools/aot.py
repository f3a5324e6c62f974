"""Compiles training or generation for TPUs or GPUs that are not there, and tells what it needs.

Examples:
  python -m ngpt_jax.tools.aot --config=experiments/1b.py --topology=v5e:4x4
  python -m ngpt_jax.tools.aot --config=experiments/124m.py --topology=h100:8
  python -m ngpt_jax.tools.aot --config=experiments/1b.py --topology=h100:2x8 --search
  python -m ngpt_jax.tools.aot --config=experiments/124m.py --topology=h100:1 \\
      --config.train.batch_size=32 --config.model.remat=none --config.model.scan_layers=False
  python -m ngpt_jax.tools.aot --config=experiments/1b.py --topology=v5e:4x4 --slices=2 \\
      --config.mesh.data=2 --json=report.json
  python -m ngpt_jax.tools.aot --config=experiments/124m.py --topology=h100:1 --program=decode \\
      --rows=8 --prompt=512 --tokens=512
  python -m ngpt_jax.tools.aot --config=experiments/quickstart.py --topology=local

The program is the one that training or generation runs, with its mesh, kernels and donation. Needs
compilers (pip install '.[aot]') but no TPU or GPU; model.attention=cudnn, which auto takes on GPUs,
needs cuDNN too (pip install nvidia-cudnn-cu13). --topology=local compiles for the devices of this
machine. Exit code 1 means that the program does not fit.
"""

import os
from typing import Any

from absl import flags

from ngpt_jax.config import ConfigError, command, experiment
from ngpt_jax.parallel.backend import set_xla_flags

_CONFIG = flags.DEFINE_string("config", None, "Experiment FILE[:variant,...].")
_TOPOLOGY = flags.DEFINE_string(
    "topology", "v5e:4x4", "TPUs as GENERATION:SHAPE, v5e:4x4 or v5p:2x2x4 for example; GPUs as"
    " GPU:COUNT or GPU:HOSTSxCOUNT, h100:8 or h100:2x8 for example (a100, a100-40gb, h100, h200,"
    " b200); or local.",
)  # fmt: skip
_PROGRAM = flags.DEFINE_enum(
    "program", "train", ["train", "prefill", "decode"], "The training step, or what generation"
    " does: prefill reads prompts, decode draws tokens."
)  # fmt: skip
_ROWS = flags.DEFINE_integer("rows", None, "Texts at one time (default 1).", lower_bound=1)
_PROMPT = flags.DEFINE_integer(
    "prompt", None, "Tokens of a prompt (default: the context less --tokens).", lower_bound=1
)
_TOKENS = flags.DEFINE_integer(
    "tokens", None, "Tokens to generate for each, for which the cache has room (default 256, or"
    " half of a shorter context).", lower_bound=1,
)  # fmt: skip
_SLICES = flags.DEFINE_integer("slices", 1, "TPU slices of that topology.", lower_bound=1)
_WINDOWS = flags.DEFINE_integer(
    "windows", None, "Sequences of a microbatch for each of the mesh.data * mesh.fsdp groups of"
    " chips, instead of the config's batch size.", lower_bound=1,
)  # fmt: skip
_SEARCH = flags.DEFINE_bool("search", False, "Find the largest --windows that fits.")
_JSON = flags.DEFINE_string("json", None, "Also write the report to this file.")
_LOWERED = flags.DEFINE_string(
    "lowered", None, "Also write the step's StableHLO text, before compilation, to this file."
)


def _main(overrides: list[tuple[str, str]]) -> int:
    if _CONFIG.value is None:
        raise ConfigError("Give an experiment: --config=experiments/1b.py (see --help).")
    command.check_output(json=_JSON.value, lowered=_LOWERED.value)
    if _SEARCH.value and (_WINDOWS.value or _LOWERED.value):
        raise ConfigError(
            "--search finds --windows itself and compiles many steps: leave out"
            " --windows and --lowered."
        )
    train = _PROGRAM.value == "train"
    if not train and (_SEARCH.value or _WINDOWS.value):
        raise ConfigError(
            f"--search and --windows are for training; with --program={_PROGRAM.value} give --rows."
        )
    if train and (_ROWS.value or _PROMPT.value or _TOKENS.value):
        raise ConfigError(
            "--rows, --prompt and --tokens are for --program=prefill or decode; the batch of"
            " training is --windows or --config.train.batch_size."
        )
    config = experiment.load_config(_CONFIG.value, overrides)
    set_xla_flags(config.runtime.xla_flags)
    if _TOPOLOGY.value != "local":
        os.environ["JAX_PLATFORMS"] = "cpu"  # this machine's own devices play no part
    from ngpt_jax.aot import report, search, show, topologies
    from ngpt_jax.data.tokenizers.load import with_tokenizer
    from ngpt_jax.parallel.backend import enable_x64_if_used

    devices = topologies.topology_devices(_TOPOLOGY.value, _SLICES.value)
    enable_x64_if_used(config.model)
    if config.model.vocab_size is None:
        config, _ = with_tokenizer(config)
    if _SEARCH.value:
        found = search.search(config, devices)
    elif train:
        if _WINDOWS.value:
            config = search.with_sequences(config, len(devices), _WINDOWS.value)
        found = report.report_of(config, devices, _LOWERED.value)
    else:
        texts = _texts(config.model.context)
        found = report.report_of(config, devices, _LOWERED.value, _PROGRAM.value, texts)
    print(show.show(found))
    command.write_json(_JSON.value, found)
    return 0 if found["fits"] else 1


def _texts(context: int) -> Any:
    from ngpt_jax.aot.programs import Texts

    tokens = _TOKENS.value or min(256, context // 2)
    prompt = _PROMPT.value or context - tokens
    if prompt < 1:
        raise ConfigError(
            f"--tokens={tokens} leaves no room for a prompt in the context of {context}; give less,"
            " or --prompt."
        )
    return Texts(_ROWS.value or 1, prompt, tokens)


if __name__ == "__main__":
    command.run_command(_main)
