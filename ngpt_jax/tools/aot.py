"""Compiles the training step for TPUs that are not there, and tells what it needs.

Examples:
  python -m ngpt_jax.tools.aot --config=experiments/1b.py --topology=v5e:4x4
  python -m ngpt_jax.tools.aot --config=experiments/1b.py:ctx8k --topology=v5p:2x2x4 --search
  python -m ngpt_jax.tools.aot --config=experiments/1b.py --topology=v5e:4x4 --slices=2 \\
      --config.mesh.data=2 --json=report.json
  python -m ngpt_jax.tools.aot --config=experiments/quickstart.py --topology=local

The step is the same program that training runs, with its mesh, kernels and donation. Needs libtpu
(pip install '.[tpu]') but no TPU. --topology=local compiles for the devices of this machine.
Exit code 1 means that the step does not fit.
"""

import os

from absl import flags

from ngpt_jax.config import ConfigError, command, experiment
from ngpt_jax.parallel.backend import set_xla_flags

_CONFIG = flags.DEFINE_string("config", None, "Experiment FILE[:variant,...].")
_TOPOLOGY = flags.DEFINE_string(
    "topology", "v5e:4x4", "Chips as GENERATION:SHAPE, for example v5e:4x4 or v5p:2x2x4; or local."
)
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
    if _TOPOLOGY.value == "local" and _SLICES.value > 1:
        raise ConfigError("--slices is for TPU topologies; leave it out with --topology=local.")
    config = experiment.load_config(_CONFIG.value, overrides)
    set_xla_flags(config.runtime.xla_flags)
    if _TOPOLOGY.value != "local":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # this machine's own devices play no part
    from ngpt_jax.aot import report, topologies
    from ngpt_jax.data.tokenizers.load import with_tokenizer
    from ngpt_jax.parallel.backend import enable_x64_if_used

    devices = topologies.topology_devices(_TOPOLOGY.value, _SLICES.value)
    enable_x64_if_used(config.model)
    if config.model.vocab_size is None:
        config, _ = with_tokenizer(config)
    if _SEARCH.value:
        found = report.search(config, devices)
    else:
        if _WINDOWS.value:
            config = report.with_sequences(config, len(devices), _WINDOWS.value)
        found = report.report_of(config, devices, _LOWERED.value)
    print(report.show(found))
    command.write_json(_JSON.value, found)
    return 0 if found["fits"] else 1


if __name__ == "__main__":
    command.run_command(_main)
